"""Evaluation gives the same figures in every layout."""

import json

import pytest

from tests.train.helpers import SMALL, WORDS, read_json, write_corpus
from tests.train.test_labelled import write
from tests.warm import launch_ranks

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]


def test_figures_of_split_experts_and_shared_rows_are_those_of_one_process(tmp_path):
    corpus = write_corpus(tmp_path / "corpus.jsonl", 150)
    done = launch_ranks(1, "train", *SMALL, f"data.path={corpus}", f"run.dir={tmp_path / 'base'}", "optim.lr=5e-3")
    assert done.returncode == 0, done.stderr[-3000:]
    export = tmp_path / "base" / "export"
    rows = [
        {
            "prompt": " ".join(WORDS[n : n + 1 + n % 3]),
            "choices": [f" {word}" * (1 + n % 2) for word in WORDS],
            "answer": n,
        }
        for n in range(9)
    ]
    rows += [{"prompt": f"{word} the", "answer": "x"} for word in WORDS[:5]]
    prompts = write(tmp_path / "p.jsonl", rows)
    free = [word for word in SMALL if not word.startswith("model.")]
    words = [*free, f"data.sources=[{{path: {corpus}}}, {{path: {export / 'held_out.jsonl'}}}]"]
    words += [f"evaluate.prompts={prompts}", "evaluate.answer_tokens=5", "evaluate.micro_batch_size=2"]
    figures = {}
    layouts = {
        "one": (1, []),
        "replicated": (2, []),
        "split": (2, ["parallel.expert=2", "parallel.zero=1"]),
        "partitioned": (2, ["parallel.expert=2", "parallel.zero=3"]),
    }
    for name, (processes, layout) in layouts.items():
        run = tmp_path / name
        named = [f"model.init_from={export}", f"run.dir={run}"]
        done = launch_ranks(processes, "train.evaluate", *words, *named, *layout)
        assert done.returncode == 0, done.stderr[-3000:]
        (figures[name],) = read_json(run / "evaluation.json")["models"].values()
        assert json.loads((run / "exit.json").read_text())["code"] == 0
    assert {"eval_choice_accuracy", "eval_exact_match", f"eval_loss/{corpus}"} <= figures["one"].keys()
    for name in layouts:
        assert figures[name] == pytest.approx(figures["one"], rel=1e-5), name
