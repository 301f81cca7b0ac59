"""What is written is the same in every layout."""

import json

import pytest

from tests.train.test_generate import TEXTS, save_model
from tests.train.test_labelled import write
from tests.warm import launch_ranks

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]


def test_split_experts_and_shared_prompts_write_what_one_process_writes(tmp_path):
    model = save_model(tmp_path / "m")
    path = write(tmp_path / "p.jsonl", [{"prompt": TEXTS[n % 4] + "x" * n} for n in range(7)])
    words = [f"model.init_from={model}", "train.precision=fp32", "generate.max_new_tokens=12", "generate.batch_size=2"]
    layouts = {
        "one": (1, []),
        "split": (2, ["parallel.expert=2", "parallel.zero=1"]),
        "partitioned": (2, ["parallel.expert=2", "parallel.zero=3"]),
    }
    found = {}
    for name, (processes, layout) in layouts.items():
        done = launch_ranks(processes, "train.generate", *words, *layout, f"generate.prompts={path}")
        assert done.returncode == 0, done.stderr[-3000:]
        found[name] = [json.loads(line) for line in done.stdout.splitlines()]  # nothing else is written there
        assert len(found[name]) == 7
        assert found[name] == found["one"], name
    assert len({row["text"] for row in found["one"]}) == 7
    done = launch_ranks(2, "train.generate", *words, *layouts["split"][1], f"generate.prompt={TEXTS[0]}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == found["one"][0]["text"] + "\n"
