"""Peak memory of each of two processes that start from a Mixtral of 2 GB, its experts split over them.

usage: python -m bench.sharded_start [--dir FOLDER] [--json FILE]

Memory is a rank's peak resident set while it loads, above what it was before, less the same of a start from a tiny
folder: what loading costs whatever the size. Kept are the bytes of the parameters that the rank then holds.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.instruments import resident
from bench.weights import SIZES, evict, make

PROCESSES = 2
LARGE = {"num_hidden_layers": 10}
TINY = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 10}
BOUND = 1.15


def measure(folder: str, stage: str) -> dict[str, int]:
    """Loads on this rank; returns the bytes it keeps and its peak above the start."""
    from train.compose import compose
    from train.model import empty_model, find_weights, model_config, starting_weights
    from train.parallel.layout import open_engine
    from train.parallel.zero import ZeroEngine

    words = [f"model.init_from={folder}", "parallel.expert=2", f"parallel.zero={stage}", "train.precision=bf16"]
    config = compose(["recipe=pretrain_tiny", "data.sequence_length=64", "evaluate.sample_tokens=0", *words]).config
    engine = open_engine(config)
    assert isinstance(engine, ZeroEngine)
    find_weights(config.model)
    model: Any = empty_model(model_config(config.model, None))
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    engine.load(model, starting_weights(config, model.config))
    parameters = list(model.parameters())
    kept = sum(max(tensor.nbytes, getattr(tensor, "ds_tensor", tensor).nbytes) for tensor in parameters)
    peak = resident("VmHWM") - before
    engine.close(wait=True)
    return {"kept": kept, "peak": peak}


def launch(folder: Path, stage: int) -> list[dict[str, int]]:
    """Starts the processes; returns what each measured."""
    evict(folder)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(PROCESSES)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command += ["-m", "bench.sharded_start", "--measure", str(folder), str(stage)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    found = [json.JSONDecoder().raw_decode(said)[0] for said in done.stdout.split("measured ")[1:]]
    if len(found) != PROCESSES:
        raise SystemExit(f"the start at ZeRO-{stage} failed:\n{done.stderr[-3000:]}")
    return found


def main() -> None:
    """Writes the folders, starts from each at every stage, prints a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.sharded_start")
    parser.add_argument("--dir", type=Path, help="where to write the weights for a while; by default the temporary one")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print("measured " + json.dumps(measure(*options.measure)), flush=True)
        return
    rows = []
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        large, tiny = Path(name, "large"), Path(name, "tiny")
        make(large, SIZES | LARGE)
        make(tiny, SIZES | TINY)
        size = sum(path.stat().st_size for path in large.glob("*.safetensors"))
        print(f"{size / 1e9:.2f} GB of bf16 weights, {PROCESSES} processes, parallel.expert=2, cold page cache")
        print(f"{'':>8}{'rank':>6}{'kept':>12}{'peak':>12}{'constant':>12}{'ratio':>10}")
        for stage in (1, 2, 3):
            constants = launch(tiny, stage)
            for rank, (row, constant) in enumerate(zip(launch(large, stage), constants, strict=True)):
                ratio = (row["peak"] - constant["peak"]) / row["kept"]
                cells = "".join(f"{figure / 1e9:>9.3f} GB" for figure in (row["kept"], row["peak"], constant["peak"]))
                held = "" if ratio <= BOUND else f"  above {BOUND}"
                print(f"{f'ZeRO-{stage}':>8}{rank:>6}{cells}{ratio:>8.2f} x{held}", flush=True)
                rows.append(row | {"stage": stage, "rank": rank, "constant": constant["peak"], "ratio": ratio})
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
