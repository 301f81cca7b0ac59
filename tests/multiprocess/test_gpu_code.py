"""What a GPU would be given is where a GPU has it: every engine on `tests.stand_in`, which is no GPU."""

import json
import sys

import pytest
import torch

from tests.multiprocess.layouts import launch_jobs
from tests.stand_in.device import COMPILER, build
from tests.train.helpers import launch, metrics, read_json, torchrun, write_corpus

pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None, reason="no g++ to compile the stand-in for a GPU"),
    pytest.mark.skipif(torch.backends.cuda.is_built(), reason="this torch has a CUDA device of its own"),
]

SPLIT = ["parallel.expert=2", "parallel.overlap_degree=2"]
ENGINES = {  # the replicated one first: accelerate remembers DeepSpeed
    "replicated": ["train.gradient_accumulation_steps=2"],
    "ZeRO-1": [*SPLIT, "parallel.zero=1"],
    "ZeRO-2": [*SPLIT, "parallel.zero=2", "train.gradient_accumulation_steps=2", "parallel.offload_optimizer=true"],
    "ZeRO-3": [*SPLIT, "parallel.zero=3", "train.recompute=layers", "parallel.persistent_elements=0"],
}
FIGURES = ("loss", "router_loss", "grad_norm", "eval_loss")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return str(build(tmp_path_factory.mktemp("stand_in")))


def on_gpus(processes, library, module, *words):
    launcher = torchrun(processes) if processes > 1 else [sys.executable]
    places = {"STAND_IN_LIBRARY": library, "DS_ACCELERATOR": "cuda"}  # which other tests here leave at cpu
    return launch([*launcher, "-m", "tests.stand_in", module], *words, **places)


def test_tensors_on_both_devices_are_refused_as_by_cuda_and_nccl(library):
    done = on_gpus(1, library, "tests.multiprocess.gpu_mistakes")
    assert done.returncode == 0, done.stderr[-3000:]
    apart = "Expected all tensors to be on the same device"
    places = ("a product", "a sum on the host", "values of the host", "two GPUs")
    assert json.loads(done.stdout) == {
        **dict.fromkeys(places, apart),
        "a choice on the host": "indices should be either on cpu or on the same device as the indexed tensor (cpu)",
        "a gradient": "attempting to assign a gradient with device type 'cuda' to a tensor with device type 'cpu'",
        "a collective": "No backend type associated with device type cpu",
        "a collective of another's": "a tensor on cuda:1 in a collective of cuda:0",
    }


@pytest.mark.parametrize(("precision", "bound", "dies"), [("fp32", 1e-4, False), ("bf16", 2e-2, True)])
def test_every_engine_trains_saves_and_goes_on_as_on_the_host(tmp_path, library, precision, bound, dies):
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    common = [f"data.path={corpus}", f"train.precision={precision}", "checkpoint.every=2", "evaluate.every=2"]
    jobs = {
        place: [{"words": [*common, *words, f"run.dir={tmp_path / place / name}"]} for name, words in ENGINES.items()]
        for place in ("host", "gpu")
    }
    assert launch_jobs(tmp_path, 2, jobs["host"])[0] == [0] * len(ENGINES)
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps([again for job in jobs["gpu"] for again in ([job | {"dies_at": 4}] * dies + [job])]))
    done = on_gpus(2, library, "tests.multiprocess.many_runs", str(path))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert read_json(path.with_suffix(".codes")) == ([99] * dies + [0]) * len(ENGINES)
    for name in ENGINES:
        assert read_json(tmp_path / "gpu" / name / "environment.json")["device"] == "NVIDIA H100 80GB HBM3"
        rows = [metrics(tmp_path / place / name) for place in ("gpu", "host")]
        assert [row["step"] for row in rows[0]] == [0, 1, 2, 3, 4]
        for mine, other in zip(*rows, strict=True):
            for figure in FIGURES:
                assert (figure in mine) == (figure in other)
                if figure in mine:
                    assert mine[figure] == pytest.approx(other[figure], rel=bound), (name, mine["step"], figure)


def test_a_layout_is_verified_in_bf16(tmp_path, library):
    words = ["recipe=demo", "train.precision=bf16", "parallel.expert=2", "parallel.zero=1", f"run.dir={tmp_path}"]
    done = on_gpus(2, library, "train.verify", *words)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert read_json(tmp_path / "certificate.json")["ok"]
