"""Classifiers train in every layout what one process trains."""

import json

import pytest
from safetensors.torch import load_file

from tests.train.helpers import SMALL, metrics
from tests.train.test_labelled import labelled
from tests.warm import launch_ranks

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

COMMON = [
    *SMALL,
    *("train.max_steps=6", "optim=sgd", "optim.lr=0.02", "schedule=constant", "schedule.warmup_steps=0"),
    *("model.router_aux_loss_coef=0.0", "train.router_z_loss_coef=0.01", "data.too_long=cut", "evaluate.every=3"),
    "data.tokenizer=mixtral",
    "model.vocab_size=32000",
]
FIGURES = ("loss", "router_loss", "grad_norm", "eval_loss", "eval_accuracy", "eval_macro_f1", "eval_mse", "tokens")


@pytest.mark.parametrize("kind", ["classification", "multi_label", "regression"])
def test_a_layout_trains_the_classifier_of_one_process(tmp_path, kind):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in labelled(kind, 45)))  # some steps have rows for few

    def run(name, processes, *words):
        words = [*COMMON, f"data.path={path}", f"data.format={kind}", f"run.dir={tmp_path / name}", *words]
        done = launch_ranks(processes, "train", *words)
        assert done.returncode == 0, done.stderr[-3000:]
        return metrics(tmp_path / name), load_file(tmp_path / name / "export" / "model.safetensors")

    one, weights = run(
        "one", 1, "train.micro_batch_size=8", "evaluate.micro_batch_size=3", "train.epochs=1.2", "train.max_steps=null"
    )
    split = [
        "train.micro_batch_size=2",
        "train.gradient_accumulation_steps=2",
        "train.epochs=1.2",
        "train.max_steps=null",
    ]
    for layout in ({"classification": 1, "multi_label": 2, "regression": 3}[kind], 0):
        words = [f"parallel.expert={2 if layout else 1}", f"parallel.zero={layout}"]
        rows, found = run(f"zero-{layout}", 2, *split, *words)
        for mine, other in zip(rows, one, strict=True):
            for figure in FIGURES:
                assert (figure in mine) == (figure in other)
                if figure in mine:
                    assert mine[figure] == pytest.approx(other[figure], rel=1e-5, abs=1e-6), (mine["step"], figure)
        assert found.keys() == weights.keys()
        for name, tensor in found.items():
            assert (tensor - weights[name]).norm() <= 1e-5 * weights[name].norm(), name


def test_adapters_of_a_classifier_are_the_same_in_two_processes(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in labelled("classification", 60)))
    base = launch_ranks(1, "train", *COMMON, f"data.path={path}", f"run.dir={tmp_path / 'base'}", "train.max_steps=1")
    assert base.returncode == 0, base.stderr[-3000:]
    small = [word for word in COMMON if not word.startswith(("model.", "data.tokenizer"))]
    words = [*small, f"data.path={path}", "data.format=classification", "lora.rank=4", "optim.lr=0.05"]
    words += ["train.max_steps=2"]  # B began at zero: it is the sum of the gradients and of their rounding alone
    words += [f"model.init_from={tmp_path / 'base' / 'export'}"]
    adapters = []
    for processes, split in ((1, ["train.micro_batch_size=4"]), (2, ["train.micro_batch_size=2", *EP2])):
        done = launch_ranks(processes, "train", *words, *split, f"run.dir={tmp_path / str(processes)}")
        assert done.returncode == 0, done.stderr[-3000:]
        adapters.append(load_file(tmp_path / str(processes) / "export" / "adapter_model.safetensors"))
    assert "base_model.model.score.weight" in adapters[0]
    for name, tensor in adapters[0].items():
        assert (tensor - adapters[1][name]).norm() <= 1e-5 * tensor.norm(), name


EP2 = ["parallel.expert=2", "parallel.zero=2"]
