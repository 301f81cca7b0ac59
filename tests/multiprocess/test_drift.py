"""Drift of the routing is the same in every layout, and of the base whichever layout goes on."""

import pytest

from tests.multiprocess.layouts import launch_jobs
from tests.train.helpers import metrics, write_corpus

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

LAYOUTS = {
    "replicated": [],
    "split": ["parallel.expert=2", "parallel.zero=1"],
    "partitioned": ["parallel.expert=2", "parallel.zero=3", "parallel.persistent_elements=0"],
}
TUNED = ["train.max_steps=6", "evaluate.every=3", "checkpoint.every=2", "optim=sgd", "optim.lr=0.3"]
ROWS = ["train.micro_batch_size=2", "evaluate.micro_batch_size=1"]


def drift_of(folder):
    rows = {row["step"]: row for row in metrics(folder) if "router_kl" in row}
    return {step: (row["router_agreement"], row["router_kl"]) for step, row in rows.items()}


def test_every_layout_measures_one_process_s_drift_before_and_after_a_death(tmp_path):
    corpus = write_corpus(tmp_path / "corpus.jsonl", documents=150)
    base = [f"data.path={corpus}", "train.max_steps=10", "optim.lr=1e-2", f"run.dir={tmp_path / 'base'}"]
    tuned = [f"data.path={corpus}", f"model.init_from={tmp_path / 'base' / 'export'}", *TUNED]
    tuned += ["evaluate.router_drift_tokens=100", "train.router_drift_coef=0.5"]  # four rows
    one = {"words": [*tuned, f"run.dir={tmp_path / 'one'}"]}
    moved = {"words": [*tuned, f"run.dir={tmp_path / 'moved'}"], "dies_at": 4}
    assert launch_jobs(tmp_path, 1, [{"words": base}, one, moved])[0] == [0, 0, 99]
    jobs, wanted = [{"words": [*tuned, *ROWS, *LAYOUTS["partitioned"], f"run.dir={tmp_path / 'moved'}"]}], [0]
    for name, layout in LAYOUTS.items():
        words = [*tuned, *ROWS, *layout]
        jobs.append({"words": [*words, f"run.dir={tmp_path / name}"]})
        jobs.append({"words": [*words, f"run.dir={tmp_path / name}-died"], "dies_at": 4})
        jobs.append({"words": [*words, f"run.dir={tmp_path / name}-died"]})
        wanted += [0, 99, 0]
    assert launch_jobs(tmp_path, 2, jobs)[0] == wanted
    expected = drift_of(tmp_path / "one")
    assert expected[0] == ([1.0, 1.0], [0.0, 0.0])
    assert min(expected[6][1]) > 1e-6
    held = [row["router_drift_loss"] for row in metrics(tmp_path / "one")[1:]]
    assert held[0] == 0.0
    assert held[-1] > 1e-6
    for name in (*LAYOUTS, "moved"):
        rows = metrics(tmp_path / name)[1:]
        assert [row["router_drift_loss"] for row in rows] == pytest.approx(held, rel=1e-3, abs=1e-9), name
        for step, (agreement, kl) in drift_of(tmp_path / name).items():
            assert agreement == pytest.approx(expected[step][0], abs=1.01 / 128), (name, step)  # a tie, to rounding
            assert kl == pytest.approx(expected[step][1], rel=1e-3, abs=1e-12), (name, step)
    for name in LAYOUTS:
        assert drift_of(tmp_path / name) == drift_of(tmp_path / f"{name}-died")
        for figure in ("loss", "grad_norm", "router_drift_loss"):
            whole, died = ([row.get(figure) for row in metrics(tmp_path / run)] for run in (name, f"{name}-died"))
            assert whole == died
