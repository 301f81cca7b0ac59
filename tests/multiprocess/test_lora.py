"""Adapters and partly frozen models train in every layout what one process trains."""

import pytest
import torch
from safetensors.torch import load_file

from mixtral import MixtralConfig
from mixtral.weights.adapters import Adapter, AdapterFolder
from tests.train.helpers import SMALL, metrics, read_json, run_small, write_corpus
from tests.warm import launch_ranks

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

EVERYWHERE = ["lora.rank=4", "lora.targets=q_proj,k_proj,v_proj,o_proj,lm_head,gate"]
EP2 = ["parallel.expert=2"]
LAYOUTS = {
    "adapters everywhere, EP 2, ZeRO-1": (2, [*EVERYWHERE, *EP2, "parallel.zero=1"]),
    "adapters everywhere, EP 2, ZeRO-3": (2, [*EVERYWHERE, *EP2, "parallel.zero=3"]),
    "adapters everywhere, EP 4, ZeRO-2": (4, [*EVERYWHERE, "parallel.expert=4", "parallel.zero=2"]),
    "experts alone, EP 2, ZeRO-2": (2, ["lora.rank=4", "lora.targets=", *EP2, "parallel.zero=2"]),
    "DoRA, frozen experts, EP 2, ZeRO-2": (
        2,
        ["lora.rank=4", "lora.dora=true", "lora.experts=false", *EP2, "parallel.zero=2"],
    ),
    "replicated": (2, [*EVERYWHERE, "train.gradient_accumulation_steps=3"]),
    "frozen experts, EP 2, ZeRO-1": (2, ["train.only=attention,norms", *EP2, "parallel.zero=1"]),
    "frozen experts, EP 2, ZeRO-3": (2, ["train.only=router", *EP2, "parallel.zero=3"]),
    "experts of one layer, EP 2, ZeRO-2": (2, ["train.only=model.layers.1.mlp.experts.*", *EP2, "parallel.zero=2"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_trains_what_one_process_would_and_leaves_the_rest_bit_for_bit(tmp_path, layout):
    processes, words = LAYOUTS[layout]
    done = launch_ranks(processes, "train.verify", "recipe=demo", f"run.dir={tmp_path}", *words)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    rows = read_json(tmp_path / "certificate.json")["rows"]
    frozen = [row for row in rows if row["kind"].startswith("frozen")]
    assert frozen
    assert all(row["max_rel"] == 0.0 for row in frozen)
    for row in rows:
        if row["kind"].startswith("fp64"):
            assert row["max_rel"] <= row["bound"] == 1e-10
        elif row["kind"].startswith(("gradient", "loss", "export")):
            assert row["max_rel"] <= row["bound"] == 1e-5


def test_a_planted_fault_in_the_adapters_gradients_is_found(tmp_path):
    words = ["recipe=demo", *EVERYWHERE, *EP2, "parallel.zero=2", f"run.dir={tmp_path}"]
    fault = "expert_gradients_times_ranks"
    done = launch_ranks(2, "tests.multiprocess.faulty_verify", fault, *words)
    assert done.returncode == 5, done.stderr[-2000:]
    rows = read_json(tmp_path / "certificate.json")["rows"]
    out_of_bounds = {row["kind"] for row in rows if not row["ok"]}
    assert {"gradient:expert", "gradient norm"} <= out_of_bounds
    assert "gradient:dense" not in {row["kind"] for row in rows if not row["ok"] and "step 1" in row["name"]}


def test_adapters_saved_by_two_processes_are_those_of_one_and_go_on_in_either(tmp_path):
    corpus = write_corpus(tmp_path / "corpus.jsonl", documents=300)
    small = [*SMALL, f"data.path={corpus}", "optim.lr=1e-2", "optim.eps=1e-6", "schedule.warmup_steps=0"]

    def run(name, processes, *words):
        split = ["parallel.expert=2", "parallel.zero=2", "train.micro_batch_size=2"] if processes > 1 else []
        done = launch_ranks(processes, "train", *small, f"run.dir={tmp_path / name}", *words, *split)
        assert done.returncode == 0, done.stderr[-3000:]
        return tmp_path / name

    base = f"model.init_from={run('base', 1, 'train.max_steps=1') / 'export'}"
    one, two = (run(f"from {processes}", processes, base, *EVERYWHERE) for processes in (1, 2))
    wanted, found = (load_file(folder / "export" / "adapter_model.safetensors") for folder in (one, two))
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert (tensor - wanted[name]).norm() <= 1e-4 * wanted[name].norm(), name
    adapter = Adapter(4, 8.0, ("q_proj", "k_proj", "v_proj", "o_proj", "lm_head", "gate"), experts=True)
    config = MixtralConfig.from_pretrained(tmp_path / "base" / "export")
    source = AdapterFolder(two / "export", config, adapter)
    assert all(torch.isfinite(source.tensor(name, [0, 7])).all() for name in source.shapes)
    last = metrics(two)[-1]["eval_loss"]
    for processes in (1, 2):
        words = [base, f"lora.init_from={two / 'export'}", "lora.format=fused", "train.max_steps=1"]
        assert metrics(run(f"on by {processes}", processes, *words))[0]["eval_loss"] == pytest.approx(last, abs=1e-5)


def test_four_bit_weights_split_over_two_processes_are_those_of_one_and_train_the_same(tmp_path):
    words = [*EVERYWHERE, "lora.quantize=nf4", *EP2, "parallel.zero=2", f"run.dir={tmp_path / 'proof'}"]
    done = launch_ranks(2, "train.verify", "recipe=demo", *words)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    certificate = read_json(tmp_path / "proof" / "certificate.json")
    assert certificate["trained"].endswith("beside nf4 weights")
    assert all(row["max_rel"] == 0.0 for row in certificate["rows"] if row["kind"].startswith("frozen"))
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    assert run_small(tmp_path / "base", f"data.path={corpus}", "train.max_steps=1") == 0
    same = [f"model.init_from={tmp_path / 'base' / 'export'}", f"data.path={corpus}", "schedule.warmup_steps=0"]
    same += [*EVERYWHERE, "lora.quantize=nf4", "optim.lr=1e-2", "optim.eps=1e-6"]
    assert run_small(tmp_path / "one", *same) == 0
    split = ["parallel.expert=2", "parallel.zero=1", "train.micro_batch_size=2", f"run.dir={tmp_path / 'two'}"]
    done = launch_ranks(2, "train", *SMALL, *same, *split)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (tmp_path / name / "checkpoints" / "step-00000004" / "state.json" for name in ("one", "two"))
    assert read_json(two)["frozen"] == read_json(one)["frozen"]
    wanted, found = (load_file(tmp_path / name / "export" / "adapter_model.safetensors") for name in ("one", "two"))
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert (tensor - wanted[name]).norm() <= 1e-4 * wanted[name].norm(), name
