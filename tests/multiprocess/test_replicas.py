"""A bit that flips in one process's memory is found before anything more is saved, and put where it is."""

import json

import pytest

from tests.train.helpers import read_json, write_corpus
from tests.warm import launch_ranks

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]
WEIGHT, EXPERTS = "model.layers.1.self_attn.k_proj.weight", "model.layers.0.mlp.experts.down_proj"
CASES = {  # words; the rank and tensor that a bit flips in, during step 4; the step it is found in; what is said
    "replicated, bf16": (
        ["train.precision=bf16", "train.check_replicas_every=5"],
        (2, f"the master of {WEIGHT}"),
        (5, f"the master of {WEIGHT} is not the same", "that of process 2 is not that of processes 0, 1, 3"),
    ),
    "replicated, frozen, before a save": (
        ["train.only=experts", "train.check_replicas_every=100"],
        (0, WEIGHT),
        (6, f"{WEIGHT} is not the same", "that of process 0 is not that of processes 1, 2, 3"),
    ),
    "ZeRO-1, EP 2, experts": (
        ["parallel.zero=1", "parallel.expert=2", "train.check_replicas_every=2"],
        (3, EXPERTS),
        (4, f"{EXPERTS} is not the same", "processes 1, 3 differ, and no majority says which is right"),
    ),
    "ZeRO-3, EP 2, a small weight": (
        ["parallel.zero=3", "parallel.expert=2", "train.check_replicas_every=1", "parallel.persistent_elements=500"],
        (1, "model.norm.weight"),
        (4, "model.norm.weight is not the same", "that of process 1 is not that of processes 0, 2, 3"),
    ),
}


def test_a_flipped_bit_ends_the_run_with_five_naming_tensor_and_process_before_anything_is_saved(tmp_path):
    corpus = write_corpus(tmp_path / "corpus.jsonl", documents=24)
    words = [f"data.path={corpus}", "checkpoint.every=3", "train.max_steps=8", "train.micro_batch_size=1"]
    jobs = [
        {"words": [*words, *case, f"run.dir={tmp_path / name}"], "faults": {4: (rank, f"flip {tensor}")}}
        for name, (case, (rank, tensor), _) in CASES.items()
    ]
    path = tmp_path / "jobs.json"
    path.write_text(json.dumps(jobs))
    done = launch_ranks(4, "tests.multiprocess.faulty_steps", str(path), timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert read_json(path.with_suffix(".codes")) == [5] * len(CASES)
    for name, (_, _, (step, *said)) in CASES.items():
        message = read_json(tmp_path / name / "exit.json")["message"]
        assert message.startswith(f"step {step}: "), message
        assert all(part in message for part in said), message
        assert [saved.name for saved in (tmp_path / name / "checkpoints").glob("step-*")] == ["step-00000003"]
