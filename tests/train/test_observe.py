"""What a person sees, and trackers that cannot hurt a run."""

import errno
import json
import os
import socket
import time
from itertools import pairwise
from types import SimpleNamespace

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from mixtral import MixtralConfig
from tests.train.helpers import metrics, run_small, write_corpus
from train.config import Config, RunConfig
from train.observe import plots
from train.observe.alarms import CollapseAlarm, DriftAlarm, against_drift
from train.observe.counts import count
from train.observe.hardware import named_peak
from train.observe.progress import Progress, header
from train.observe.trackers import WandB


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus.jsonl")


def row(step, layers=3, experts=8):
    figures = {"loss": 8.0 / step, "router_loss": 2.0, "tokens_per_second": 1234.5}
    figures |= {"router_entropy": [1.5] * layers, "cross_rank_fraction": 0.5, "dropped_fraction": 0.0}
    return {"step": step, "expert_load": [[1 / experts] * experts] * layers, **figures}


@pytest.mark.parametrize("layers", [1, 3, 6])
def test_plots_are_pictures_with_something_on_them(tmp_path, layers):
    rows = [row(step, layers) for step in (1, 10, 20)]
    plots.draw_loss([{"step": 0, "eval_loss": 8.1, "eval_perplexity": 3000.0}, *rows], tmp_path / "loss.png")
    plots.draw_expert_load(rows, tmp_path / "load.png")
    plots.draw_router(rows, tmp_path / "router.png")
    drifted = [
        {"step": at, "router_agreement": [1 - at / 50] * layers, "router_kl": [at / 9] * layers} for at in (0, 9)
    ]
    plots.draw_router_drift(drifted, tmp_path / "drift.png")
    for name in ("loss.png", "load.png", "router.png", "drift.png"):
        assert imread(tmp_path / name)[..., :3].std() > 0.02


def test_a_single_logged_step_can_be_drawn(tmp_path):
    plots.draw_loss([row(1)], tmp_path / "loss.png")
    plots.draw_expert_load([row(1)], tmp_path / "load.png")
    plots.draw_router([row(1)], tmp_path / "router.png")


def test_of_a_long_run_a_bounded_number_of_rows_is_parsed_and_drawn_from_its_first_to_its_last(tmp_path, monkeypatch):
    parsed, path, loads = [], tmp_path / "metrics.jsonl", json.loads
    evaluation = {"eval_loss": 8.0, "eval_perplexity": 3000.0}
    rows = [{"step": 0, **evaluation}, *(row(step) | (evaluation if step % 3 == 0 else {}) for step in range(1, 9001))]
    monkeypatch.setattr(plots.json, "loads", lambda line: parsed.append(line) or loads(line))
    for length, most in ((1500, 1500), (9000, 2 * plots.MOST + 2)):
        parsed.clear()
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[:length]))
        read = plots.read_metrics(path)
        assert len(parsed) == len(read) <= most
        assert read == [rows[one["step"]] for one in read]
        evaluated = [one["step"] for one in read if "eval_loss" in one]
        trained = [one["step"] for one in read if "loss" in one]
        assert (evaluated[0], evaluated[-1]) == (0, (length - 1) // 3 * 3)
        assert (trained[0], trained[-1]) == (1, length - 1)
        assert min(len(evaluated), len(trained)) >= min(length // 3, plots.MOST // 2)
    assert max(after - before for before, after in pairwise(evaluated)) <= 3 * 8
    plots.draw(SimpleNamespace(metrics_path=path, path=tmp_path))
    assert {one.name for one in (tmp_path / "plots").iterdir()} == {"loss.png", "expert_load.png", "router.png"}


def test_a_picture_that_the_disk_does_not_take_ends_no_run_and_is_said_once(corpus, tmp_path, capsys, monkeypatch):
    """The pictures of the first evaluation are whole, the rest is cut off."""
    save, saved = Figure.savefig, []

    def savefig(figure, target, **options):
        saved.append(target)
        save(figure, target, **options)
        if len(saved) > 3:
            os.truncate(target, 1000)
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", savefig)
    words = [f"data.path={corpus}", "evaluate.every=1", "run.plots=true", "tracker=tensorboard"]
    assert run_small(tmp_path, *words) == 0
    assert capsys.readouterr().out.count("pictures were not drawn (OSError: [Errno 28] No space left on device") == 1
    assert len(saved) == 3 + 3
    assert imread(tmp_path / "plots" / "loss.png")[..., :3].std() > 0.02
    assert len(list((tmp_path / "plots").iterdir())) == 3


def test_off_a_terminal_progress_is_plain_lines(capsys):
    progress = Progress(100)
    progress.show({"step": 0, "eval_loss": 8.3, "eval_perplexity": 4023.9})
    for _ in range(10):
        progress.advance(seconds=2.0)
    progress.show(row(10))
    assert capsys.readouterr().out.splitlines() == [
        "step 0/100  held-out loss 8.3000, perplexity 4,023.9",
        "step 10/100  loss 0.8000  router 2.000  1,234 tok/s  3:00 left",
    ]


def test_on_a_terminal_progress_is_a_bar(capsys, monkeypatch):
    monkeypatch.setattr("train.observe.progress.sys.stderr.isatty", lambda: True, raising=False)
    progress = Progress(100)
    progress.advance(seconds=1.0)
    progress.show(row(1) | {"eval_loss": 8.3, "eval_perplexity": 4023.9})
    progress.close()
    shown = capsys.readouterr().err
    assert "1/100" in shown
    assert "loss 8.0000" in shown
    assert "step 1: held-out loss 8.3000" in shown


def test_the_header_says_what_runs_where():
    text = header(Config(run=RunConfig(dir="runs/x")), MixtralConfig(), "5 tokens", 100, 2, "cpu")
    assert "46.7 B parameters, 12.9 B active per token: 32 layers, 8 experts, top-2" in text
    assert "8.2 k tokens: 2 processes x 1 rows x 1 accumulated" in text
    assert "runs/x" in text


def test_counts_are_written_for_a_person():
    assert [count(n) for n in (340, 2048, 12_900_000, 46_702_792_704)] == ["340", "2.0 k", "12.9 M", "46.7 B"]


def test_known_devices_have_a_peak_and_others_none():
    assert named_peak("NVIDIA H100 80GB HBM3") == 989e12
    assert named_peak("NVIDIA H100 PCIe") == 756e12
    assert named_peak("NVIDIA A100-SXM4-80GB") == 312e12
    assert named_peak("AMD EPYC") is None


def test_tensorboard_gets_the_same_figures(corpus, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run_small(tmp_path, f"data.path={corpus}", "tracker=tensorboard", "run.plots=true") == 0
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"loss", "eval_loss", "grad_norm"} <= set(events.Tags()["scalars"])
    assert {"loss", "expert_load"} <= set(events.Tags()["images"])
    written = [row["loss"] for row in metrics(tmp_path)[1:]]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(written)


@pytest.mark.slow
def test_wandb_is_written_offline_with_the_same_figures_and_the_picture(corpus, tmp_path, capfd):
    assert run_small(tmp_path, f"data.path={corpus}", "tracker=wandb", "run.plots=true") == 0
    said = capfd.readouterr().out
    assert f"wandb sync {tmp_path}/wandb/offline-run-" in said
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    (log,) = run.glob("run-*.wandb")
    sent = log.read_bytes()
    for row in metrics(tmp_path)[1:]:
        assert json.dumps(row["loss"]).encode() in sent
    assert b"expert_load/layer_1/expert_7" in sent
    assert len(list((run / "files" / "media").rglob("expert_load*.png"))) == 1


@pytest.mark.slow
def test_an_unreachable_wandb_changes_no_loss_and_adds_at_most_five_seconds(corpus, tmp_path, capfd, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
    monkeypatch.setenv("WANDB_API_KEY", "secret0" * 6)
    seconds: list[float] = []

    def timed(method):
        def run(*inputs, **options):
            started = time.monotonic()
            method(*inputs, **options)
            seconds.append(time.monotonic() - started)

        return run

    for method in ("__init__", "log", "finish"):
        monkeypatch.setattr(WandB, method, timed(getattr(WandB, method)))
    folders = {"none": ["tracker=none"], "dead": ["tracker=wandb", "tracker.mode=online"]}
    for name, words in folders.items():
        assert run_small(tmp_path / name, f"data.path={corpus}", *words) == 0
    assert "W&B did not answer in time" in capfd.readouterr().out
    assert len(seconds) == 2 + 5  # before the first step, and four steps
    assert sum(seconds) < 5
    losses = [[row.get("loss") for row in metrics(tmp_path / name)] for name in folders]
    assert losses[0] == losses[1]
    held = [path for path in (tmp_path / "dead").rglob("*") if path.is_file() and b"secret0" in path.read_bytes()]
    assert held == []


def test_the_follower_forwards_whole_lines_once(tmp_path):
    from train.observe.wandb_follower import forward

    logged = []
    run = SimpleNamespace(log=lambda row, step: logged.append((step, row)))
    path = tmp_path / "metrics.jsonl"
    assert forward(run, path, 0) == 0
    path.write_text('{"step": 1, "expert_load": [[0.25, 0.75]], "router_entropy": [0.5]}\n{"step": 2, "lo')
    seen = forward(run, path, 0)
    with path.open("a") as file:
        file.write('ss": 3.5}\n')
    assert forward(run, path, seen) == os.path.getsize(path)
    assert logged == [
        (
            1,
            {
                "step": 1,
                "expert_load/layer_0/expert_0": 0.25,
                "expert_load/layer_0/expert_1": 0.75,
                "router_entropy/layer_0": 0.5,
            },
        ),
        (2, {"step": 2, "loss": 3.5}),
    ]


def test_a_layer_that_collapses_is_announced_once_and_so_is_its_recovery():
    alarm = CollapseAlarm(top_k=2)
    even, collapsed = [0.125] * 8, [0.0, 0.48, 0.01, 0.01, 0.0, 0.5, 0.0, 0.0]
    assert alarm.hear(1, [even, even]) == []
    lines = alarm.hear(2, [even, collapsed])
    assert len(lines) == 1
    assert "step 2: layer 1 sends 98% of its rows to the same 2 of 8 experts" in lines[0]
    assert alarm.hear(3, [even, collapsed]) == []
    assert alarm.hear(4, [even, even]) == ["step 4: layer 1 has recovered"]


def test_a_layer_that_drifts_is_announced_once_and_so_is_its_return():
    alarm = DriftAlarm(0.5, "do less")
    assert alarm.hear(0, [1.0, 1.0]) == []
    assert alarm.hear(5, [0.5, 0.41]) == [
        "ALARM step 5: layer 1 makes 41% of the choices that it made at the start, less than "
        "evaluate.router_agreement_alarm=0.5; do less"
    ]
    assert alarm.hear(10, [0.5, 0.3]) == []
    assert alarm.hear(15, [0.5, 0.5]) == ["step 15: layer 1 has come back"]
    assert DriftAlarm(None, "do less").hear(5, [0.0]) == []


def test_the_advice_is_of_what_the_run_trains():
    config = Config()
    assert "freeze the routers" in against_drift(config)
    config.lora.rank = 4
    assert "train less of what comes before the routers" in against_drift(config)
    config.lora.targets = "q_proj,gate"
    assert "freeze the routers" in against_drift(config)


def test_a_layer_without_a_choice_raises_no_alarm():
    assert CollapseAlarm(top_k=2).hear(1, [[0.5, 0.5]]) == []
