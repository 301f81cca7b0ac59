"""What a checkpoint of some hundred megabytes costs a run, waiting for it and beside it, against copying its file.

usage: python -m bench.checkpoints [--rounds 5] [--dir FOLDER] [--json FILE]

One process trains in fp32 and saves, first waiting, then with `checkpoint.asynchronous`. Half-way between two saves the
last one's file is copied on the same disk by `cp` and forced to it, so that saves and copies take turns, each after the
same work: what follows another large file at once may find the memory that this one left. The stall is the time in
which no step is taken because of a checkpoint: the call that saves and, beside training, those that see whether it is
complete and complete it. The bandwidth is that until a checkpoint has its name; what deletes an older one then is in
the stall alone. A copy of the state to host memory, which beside training is a part of it, is timed besides. Steps that
are taken while a file is written share the machine with that: how long they are is said too. Medians, and the spread of
all rounds. FOLDER must lie on the disk that is meant.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from train.checkpoint.checkpoints import Checkpoints
from train.checkpoint.find import listed
from train.compose import compose

EVERY = 8  # steps between checkpoints
WORDS = (
    *("recipe=pretrain_tiny", "train.precision=fp32", "model.vocab_size=8192", "model.hidden_size=512"),
    *("model.intermediate_size=1024", "model.num_hidden_layers=2", "model.num_attention_heads=8", "tracker=none"),
    *("data.sequence_length=256", "train.micro_batch_size=4", "evaluate.every=null", "evaluate.sample_tokens=0"),
    *("data.held_out_documents=2", "checkpoint.keep_last=2", f"checkpoint.every={EVERY}"),
)
FIGURES: dict[str, list[float]] = {
    name: [] for name in ("stall", "whole", "to memory", "copy", "bytes", "step", "step beside")
}


class Timed(Checkpoints):
    """The checkpoints of a run, which note how long everything takes."""

    stall, began, named, left, since = 0.0, 0.0, 0.0, 0.0, 0

    def save(self, step: int, **options: Any) -> None:
        self._count_step("step")
        self.since = 0
        self.began = time.perf_counter()
        super().save(step, **options)
        self.stall = time.perf_counter() - self.began
        self._completed()

    def poll(self) -> None:
        pending = self._pending is not None
        self._count_step("step beside" if pending else "step")
        started = time.perf_counter()
        super().poll()
        self.stall += time.perf_counter() - started
        if pending:
            self._completed()
        self.left = time.perf_counter()
        self.since += 1
        if self.since == EVERY // 2 and (saved := listed(self._root)):
            FIGURES["copy"].append(seconds_of_copy(saved[0][1] / "rank-00000.safetensors"))
            self.left = 0.0

    def _delete_older(self, newest: Path) -> None:
        self.named = time.perf_counter()
        super()._delete_older(newest)

    def _count_step(self, kind: str) -> None:
        """Notes what passed since the last call, which is one step; not the first, nor one that a copy disturbed."""
        if self.left:
            FIGURES[kind].append(time.perf_counter() - self.left)

    def _completed(self) -> None:
        """Notes a checkpoint that is complete, and how long copying what it holds takes."""
        self.left = time.perf_counter()
        if self._pending is None:
            FIGURES["stall"].append(self.stall)
            FIGURES["whole"].append(self.named - self.began)
            folder = listed(self._root)[0][1]
            FIGURES["bytes"].append(sum(path.stat().st_size for path in folder.iterdir()))
            started = time.perf_counter()
            copies = [item.copy() for item in self._engine.state.owned()]
            FIGURES["to memory"].append(time.perf_counter() - started)
            del copies
            self.left = 0.0


def seconds_of_copy(path: Path) -> float:
    """Copies a file beside itself, forces it to the disk and removes it; returns how long the first two took."""
    target = path.parents[2] / "copy"
    started = time.perf_counter()
    subprocess.run(["cp", "--reflink=never", path, target], check=True)
    descriptor = os.open(target, os.O_RDONLY)
    os.fsync(descriptor)
    spent = time.perf_counter() - started
    os.close(descriptor)
    target.unlink()
    return spent


def measure(folder: Path, rounds: int, beside: bool) -> dict[str, list[float]]:
    """Trains in this fresh process and returns what was noted; the first and the last checkpoint are left out."""
    import train.run

    vars(train.run)["Checkpoints"] = Timed
    words = [f"run.dir={folder}", f"train.max_steps={EVERY * (rounds + 2)}", f"checkpoint.asynchronous={beside}"]
    assert train.run.run(compose([*WORDS, *words])) == 0
    checkpoints = ("stall", "whole", "to memory", "bytes")
    found = {name: values[1:-1] if name in checkpoints else values for name, values in FIGURES.items()}
    return found | {"copy": found["copy"][1:]}  # none follows the last checkpoint


def line(name: str, values: list[float], scale: float = 1.0, unit: str = "s") -> str:
    """Writes the median of some figures and their spread."""
    low, middle, high = (scale * value for value in (min(values), statistics.median(values), max(values)))
    return f"{name:44}{middle:>9.3f} {unit:5} {low:.3f} to {high:.3f}"


def report(waiting: dict[str, list[float]], beside: dict[str, list[float]]) -> dict[str, float]:
    """Prints the figures; returns those with a target."""
    size, step = waiting["bytes"][0], statistics.median(waiting["step"] + beside["step"])
    shares = [copy / save for copy, save in zip(waiting["copy"], waiting["whole"], strict=True)]
    extra = [stall - copy for stall, copy in zip(beside["stall"], beside["to memory"], strict=True)]
    print(f"{size / 1e6:.0f} MB a checkpoint")
    print(line("a step", waiting["step"] + beside["step"]))
    print(line("waiting: stall", waiting["stall"]))
    print(line("waiting: bandwidth", [size / 1e9 / seconds for seconds in waiting["whole"]], unit="GB/s"))
    print(line("cp and fsync: bandwidth", [size / 1e9 / seconds for seconds in waiting["copy"]], unit="GB/s"))
    print(line("waiting: bandwidth over that of cp", shares, 100, "%"))
    print(line("beside: stall", beside["stall"]))
    print(line("beside: copy to memory", beside["to memory"]))
    print(line("beside: stall beyond that copy, of a step", [value / step for value in extra], 100, "%"))
    print(line("beside: until it is complete", beside["whole"]))
    print(line("beside: a step while a file is written", beside["step beside"]))
    return {"bandwidth": statistics.median(shares), "stall": statistics.median(extra) / step}


def main() -> None:
    """Trains twice, each in a process of its own, and prints what checkpoints cost."""
    words = argparse.ArgumentParser(prog="python -m bench.checkpoints", description=__doc__)
    words.add_argument("--rounds", type=int, default=5, help="checkpoints that are measured, of each kind")
    words.add_argument("--dir", type=Path, help="where to write for a while; by default the temporary folder")
    words.add_argument("--json", type=Path, help="file for the figures")
    words.add_argument("--measure", choices=["true", "false"], help=argparse.SUPPRESS)
    options = words.parse_args()
    if options.measure:
        print("measured", json.dumps(measure(options.dir, options.rounds, options.measure == "true")))
        return
    found = []
    with tempfile.TemporaryDirectory(dir=options.dir) as name:
        for beside in ("false", "true"):
            command = [sys.executable, "-m", "bench.checkpoints", "--measure", beside, "--dir", f"{name}/{beside}"]
            command += ["--rounds", str(options.rounds)]
            done = subprocess.run(command, capture_output=True, text=True, env={"OMP_NUM_THREADS": "1"} | os.environ)
            if done.returncode != 0:
                raise SystemExit(f"the run failed:\n{done.stderr[-3000:]}")
            found.append(json.loads(done.stdout.split("measured ")[1]))
    targets = report(*found)
    if options.json:
        content = {"waiting": found[0], "beside": found[1], "targets": targets}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
