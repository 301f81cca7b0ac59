"""The certificate holds for right layouts, and does not for planted faults."""

import re

import pytest

from tests.multiprocess.faulty_verify import FAULTS
from tests.train.helpers import launch, read_json, torchrun
from tests.warm import launch_ranks

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

LAYOUTS = {
    "ZeRO-1": (2, ["parallel.expert=2", "parallel.zero=1"]),
    "ZeRO-2": (2, ["parallel.expert=2", "parallel.zero=2", "train.gradient_accumulation_steps=3"]),
    "ZeRO-3": (2, ["parallel.expert=2", "parallel.zero=3", "train.router_loss_scope=document"]),
    "without experts split": (2, ["parallel.zero=2", "train.router_loss_scope=huggingface"]),
    "DeepSpeed's capacity layer": (2, ["parallel.expert=2", "parallel.zero=2", "parallel.dispatch=deepspeed_capacity"]),
    "replicated": (2, ["train.gradient_accumulation_steps=3", "train.recompute=layers"]),
    "EP 2 x DP 2": (4, ["parallel.expert=2", "parallel.zero=1", "train.gradient_accumulation_steps=3"]),
    "ZeRO-3, EP 2 x DP 2": (
        4,
        [
            *("parallel.expert=2", "parallel.zero=3", "train.gradient_accumulation_steps=3"),
            *("train.router_z_loss_coef=1", "train.recompute=layers"),
        ],
    ),
    "EP 4": (4, ["parallel.expert=4", "parallel.zero=3", "train.router_loss_scope=previous_step"]),
    "overlapped": (2, ["parallel.expert=2", "parallel.zero=2", "parallel.overlap_degree=3"]),
    "overlapped, ZeRO-3, EP 2 x DP 2": (
        4,
        [
            *("parallel.expert=2", "parallel.zero=3", "train.gradient_accumulation_steps=3"),
            *("train.recompute=layers", "parallel.overlap_degree=2"),
        ],
    ),
    "overlapped, bf16, adapters": (
        2,
        [
            *("parallel.expert=2", "parallel.zero=1", "train.precision=bf16", "lora.rank=4"),
            *("train.recompute=layers", "parallel.overlap_degree=2"),
        ],
    ),
    "bf16, adapters": (
        2,
        ["parallel.expert=2", "parallel.zero=2", "train.precision=bf16", "lora.rank=4", "train.recompute=layers"],
    ),
    "bf16, ZeRO-1": (2, ["parallel.expert=2", "parallel.zero=1", "train.precision=bf16"]),
    "bf16, EP 2 x DP 2": (4, ["parallel.expert=2", "parallel.zero=2", "train.precision=bf16"]),
    "bf16, ZeRO-3": (
        2,
        ["parallel.expert=2", "parallel.zero=3", "train.precision=bf16", "train.gradient_accumulation_steps=3"],
    ),
}


def verify(case, processes, module, *words):
    """Runs a case's processes; returns the code of the one that failed first, and what all of them said."""
    if case != "ZeRO-2":  # one by a launcher
        done = launch_ranks(processes, module, *words)
        return done.returncode, done.stdout[-3000:] + done.stderr[-2000:]
    done = launch([*torchrun(processes), "-m", module], *words)
    failed = re.search(r"exitcode  : (\d+)", done.stderr)
    assert (failed is None) == (done.returncode == 0), done.stderr[-2000:]
    return int(failed[1]) if failed else 0, done.stdout[-3000:] + done.stderr[-2000:]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_trains_what_one_process_would(tmp_path, layout):
    processes, words = LAYOUTS[layout]
    code, said = verify(layout, processes, "train.verify", "recipe=demo", f"run.dir={tmp_path}", *words)
    assert code == 0, said
    certificate = read_json(tmp_path / "certificate.json")
    assert certificate["ok"]
    assert "lora.rank=4" in words or len(certificate["rows"]) == 135
    for row in certificate["rows"]:
        if row["kind"].startswith("fp64"):
            assert row["max_rel"] <= row["bound"] == 1e-10
        elif certificate["dtype"] == "fp32" and row["kind"].startswith(("gradient", "loss", "router", "export")):
            assert row["max_rel"] <= row["bound"] == 1e-5


SEEN_BY = {
    "expert_gradients_times_ranks": {"gradient:expert", "gradient norm"},
    "router_gradient_not_reduced": {"gradient:router"},
    "norm_averaged_over_ranks": {"gradient norm", "update:dense", "update:expert"},
    "router_loss_times_world": {"fp64 gradient:router", "gradient:router"},
    "experts_swapped_in_export": {"export:expert"},
    "window_off_by_one": {"fp64 gradient:dense", "gradient:dense"},
    "packed_row_sees_its_neighbour": {"fp64 gradient:dense", "gradient:dense"},
}


PLANTED = [*((fault, "parallel.zero=2") for fault in FAULTS), ("expert_gradients_times_ranks", "train.precision=bf16")]
PLANTED.append(("router_gradient_not_reduced", "parallel.zero=3"))


@pytest.mark.parametrize(("fault", "word"), PLANTED)
def test_a_planted_fault_is_found_and_named(tmp_path, fault, word):
    words = ["recipe=demo", "parallel.expert=2", f"run.dir={tmp_path}"]
    words += [word] if word.startswith("parallel.zero") else [word, "parallel.zero=2"]
    if fault == "window_off_by_one":
        words.append("model.sliding_window=16")
    code, said = verify(fault, 2, "tests.multiprocess.faulty_verify", fault, *words)
    assert code == 5, said
    certificate = read_json(tmp_path / "certificate.json")
    assert not certificate["ok"]
    seen = {row["kind"] for row in certificate["rows"] if not row["ok"]}
    assert seen >= SEEN_BY[fault] - ({"gradient norm"} if "bf16" in word else set())  # rounding hides so little there
    assert read_json(tmp_path / "exit.json")["code"] == 5
