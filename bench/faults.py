"""`python -m bench.faults [--quick | --full] [--seed N] [--out FILE]`: real faults; any loss ends it with 1.

Kills at random moments and before every sub-step of a save, damage to every kind of file, requests to stop, to one
process and to torchrun, gradients that are not finite, and a long clean run. What a run ends with is compared bit by
bit with the run that nothing hit. With --full, besides, runs go on in each other's layout: all of them, or as many as
--transitions says.
"""

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.multiprocess.layouts import ADAPTERS, LAYOUTS, cross
from tests.train.helpers import SMALL, metrics, read_json, torchrun, write_corpus
from tests.warm import launch_ranks
from train.checkpoint.find import find, listed, read_name
from train.config import Config, TrainConfig
from train.errors import CheckpointError
from train.parallel.replicated import ReplicatedEngine

STEPS, EVERY = 240, 20
LATE = 60  # so many steps before the last one a request to stop is certain to be met
ENGINES = {
    "replicated": ["train.precision=bf16"],
    "ZeRO-1": ["parallel.zero=1", "parallel.expert=2", "train.precision=bf16"],
    "ZeRO-2": ["parallel.zero=2", "parallel.expert=2"],
    "ZeRO-3": ["parallel.zero=3", "parallel.expert=2"],
}
FIGURES = ("step", "tokens", "loss", "grad_norm", "router_loss", "eval_loss")
COUNTS = {  # quick, whole
    "kills": (6, 50),
    "requests to stop": (4, 20),
    "damages": (100, 250),
    "poisoned gradients": (100, 100),
    "clean steps": (1000, 1000),
}


@dataclass
class Outcome:
    """What a part of the campaign came to.

    Attributes:
        name: of the part.
        tried: how often.
        losses: what went wrong, a line each.
        seconds: it took.
    """

    name: str
    tried: int = 0
    losses: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def expect(self, holds: bool, otherwise: str) -> None:
        """Counts a loss where something does not hold."""
        if not holds:
            self.losses.append(otherwise)


class Campaign:
    """Faults, with what they are compared with.

    Args:
        home: an empty folder.
        seed: of every choice.
        quick: whether to try fewer.
        transitions: how many runs go on in another layout.
    """

    def __init__(self, home: Path, seed: int, quick: bool, transitions: int) -> None:
        self.home, self.draw, self.quick, self.transitions = home, random.Random(seed), quick, transitions
        self.corpus = write_corpus(home / "corpus.jsonl")
        self.whole = home / "whole"
        assert self.run(self.whole) == 0

    def count(self, name: str) -> int:
        """Says how often to try something."""
        return COUNTS[name][0 if self.quick else 1]

    def words(self, folder: Path, *words: str) -> list[str]:
        """Words of a run of the campaign."""
        own = [f"train.max_steps={STEPS}", f"checkpoint.every={EVERY}", "checkpoint.keep_last=3", "train.log_every=5"]
        own += [f"data.path={self.corpus}", "evaluate.sample_tokens=0", "model.attention_dropout=0.1"]
        return [*SMALL, *own, f"run.dir={folder}", *words]

    def start(self, folder: Path, *words: str, processes: int = 1) -> "subprocess.Popen[bytes]":
        """Starts a run in a process of its own, or in two that share the experts out, under torchrun."""
        launcher = [sys.executable]
        if processes == 2:
            launcher = torchrun(2)
            words = (*words, "parallel.expert=2", "parallel.zero=2", "train.micro_batch_size=2")
        with (self.home / "log").open("ab") as log:
            command = [*launcher, "-m", "train", *self.words(folder, *words)]
            return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})

    def run(self, folder: Path, *words: str, processes: int = 1) -> int:
        """Runs to the end; returns the exit code."""
        return self.start(folder, *words, processes=processes).wait()

    def interrupt(self, folder: Path, number: signal.Signals) -> int:
        """Signals a run at a random moment after it has logged; returns its exit code."""
        process, metrics = self.start(folder), folder / "metrics.jsonl"
        before = metrics.stat().st_size if metrics.exists() else 0
        while process.poll() is None and (not metrics.exists() or metrics.stat().st_size <= before):
            time.sleep(0.01)
        time.sleep(self.draw.uniform(0.0, 2.5))
        process.send_signal(number)
        return process.wait()

    def tell(self, folder: Path, processes: int) -> bool:
        """Asks a run to stop at a random step; returns whether that came in time, well before its last step."""
        process, moment = self.start(folder, processes=processes), self.draw.randrange(5, STEPS - LATE)
        while process.poll() is None and last_step(folder) < moment:
            time.sleep(0.002)
        time.sleep(self.draw.uniform(0.0, 0.05))
        in_time = process.poll() is None and last_step(folder) <= STEPS - LATE
        process.send_signal(signal.SIGTERM)
        process.wait()
        return in_time

    def same(self, folder: Path, whole: Path | None = None) -> bool:
        """Whether a run ended as one that nothing hit, bit by bit."""
        ends = []
        for run in (whole or self.whole, folder):
            rows = [[row.get(name) for name in FIGURES] for row in metrics(run)]
            files = sorted((run / "checkpoints" / f"step-{STEPS:08d}").glob("rank-*.safetensors"))
            ends.append((rows, [path.read_bytes() for path in files]))
        return ends[0] == ends[1]


def last_step(folder: Path) -> int:
    """Reads the last step that a run has logged whole; -1 where there is none."""
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    except FileNotFoundError:
        return -1
    return json.loads(lines[-1])["step"] if lines else -1


def kills(campaign: Campaign, outcome: Outcome) -> None:
    """Kills runs by SIGKILL, several times each, and lets them end."""
    number, wanted = 0, campaign.count("kills")
    while outcome.tried < wanted:
        number += 1
        folder = campaign.home / f"killed-{number}"
        for _ in range(min(3, wanted - outcome.tried)):
            if campaign.interrupt(folder, signal.SIGKILL) == 0:
                break  # it had ended before
            outcome.tried += 1
        ended = (folder / "exit.json").exists() or campaign.run(folder) == 0
        outcome.expect(ended and campaign.same(folder), f"{folder.name} is not the run that was not killed")


def sub_steps(campaign: Campaign, outcome: Outcome) -> None:
    """Kills a save before each of its sub-steps; what is found then is whole, and goes on to the same end."""
    folder = campaign.home / "saves"
    words = campaign.words(folder, "checkpoint.keep_last=1")[len(SMALL) :]
    words = [word for word in words if not word.startswith("run.dir=")]
    subprocess.run([sys.executable, "-m", "tests.train.killed_saves", str(folder), *words], capture_output=True)
    killed = sorted(campaign.home.glob("saves-killed-*"))
    engine = ReplicatedEngine(Config(train=TrainConfig(precision="fp32")))
    for died in killed:
        outcome.tried += 1
        with contextlib.redirect_stdout(io.StringIO()):
            found = find(engine, died / "checkpoints", "auto")
        outcome.expect(found is not None and found.state["step"] in (EVERY, 2 * EVERY), f"{died.name}: nothing whole")
    for died in campaign.draw.sample(killed, 4 if campaign.quick else len(killed)):
        outcome.expect(campaign.run(died) == 0 and campaign.same(died), f"{died.name} ends otherwise")
    outcome.expect(len(killed) > 60, f"only {len(killed)} sub-steps were seen")


def damages(campaign: Campaign, outcome: Outcome) -> None:
    """Flips, cuts and deletes in files of every kind; each must be found, and a whole checkpoint used."""
    engine = ReplicatedEngine(Config(train=TrainConfig(precision="fp32")))
    source, root = campaign.whole / "checkpoints", campaign.home / "damaged"
    newest = f"step-{STEPS:08d}"
    for _ in range(campaign.count("damages")):
        outcome.tried += 1
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(source, root)
        path = campaign.draw.choice(sorted((root / newest).iterdir()))
        content, kind = bytearray(path.read_bytes()), campaign.draw.choice(["flip", "cut", "delete"])
        place = campaign.draw.randrange(len(content))
        if kind == "delete":
            path.unlink()
        elif kind == "cut":
            path.write_bytes(content[:place])
        else:
            content[place] ^= 1 << campaign.draw.randrange(8)
            path.write_bytes(content)
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said):
                found = find(engine, root, "auto")
        except CheckpointError:
            found = None
        where = f"{kind} at byte {place} of {path.name}"
        outcome.expect(found is not None and found.state["step"] == STEPS - EVERY, f"{where}: not the one before")
        outcome.expect(said.getvalue().count("WARNING") == 1, f"{where}: not one loud line")


def requests(campaign: Campaign, outcome: Outcome) -> None:
    """Asks runs to stop by SIGTERM, every other one by its launcher.

    All processes of a run save one step, it ends with 75 and, started again, as the one that nobody told.
    """
    whole, wanted = campaign.home / "whole-2", campaign.count("requests to stop")
    assert campaign.run(whole, processes=2) == 0
    for number in range(2 * wanted):
        folder, processes = campaign.home / f"told-{number}", 1 + outcome.tried % 2
        if outcome.tried == wanted:
            break
        if not campaign.tell(folder, processes):
            continue  # the request came too late to be one
        outcome.tried += 1
        ended, (step, saved) = read_json(folder / "exit.json"), listed(folder / "checkpoints")[0]
        told = f"stopped by SIGTERM after step {step}, which is saved"
        outcome.expect((ended["code"], ended["message"]) == (75, told), f"{folder.name} ended with {ended}")
        ranks = len(list(saved.glob("rank-*.safetensors")))
        whole_save = ranks == processes and read_name(folder / "checkpoints" / "latest") == saved.name
        outcome.expect(whole_save, f"{saved} is not what all processes saved last")
        ends_alike = campaign.run(folder, processes=processes) == 0
        ends_alike = ends_alike and campaign.same(folder, whole if processes == 2 else None)
        outcome.expect(ends_alike, f"{folder.name} ends otherwise")
    outcome.expect(outcome.tried == wanted, f"only {outcome.tried} requests came in time")


def resumes(campaign: Campaign, outcome: Outcome) -> None:
    """Goes on in each other's layout; a third of the transitions are of bf16, and a third of adapters."""
    count = len(LAYOUTS)
    every = [(one, other) for one in range(count) for other in range(count) if one != other]
    corpus = write_corpus(campaign.home / "short.jsonl", documents=24)
    chosen = sorted(campaign.draw.sample(every, min(campaign.transitions, len(every))))
    base = campaign.home / "base"
    assert campaign.run(base, "train.max_steps=1", "model.attention_dropout=0", f"data.path={corpus}") == 0
    kinds: dict[str, tuple[str, list[str]]] = {"fp32": ("fp32", []), "bf16": ("bf16", [])}
    kinds["adapters"] = ("fp32", [f"model.init_from={base / 'export'}", *ADAPTERS])
    for remainder, (kind, (precision, words)) in enumerate(kinds.items()):
        pairs = [(LAYOUTS[one], LAYOUTS[other]) for one, other in chosen if (one + other) % 3 == remainder]
        (campaign.home / kind).mkdir()
        for problems in cross(campaign.home / kind, corpus, precision, pairs, *words):
            outcome.tried += 1
            for problem in problems:
                outcome.expect(False, f"{kind}, {problem}")


def poisoned(campaign: Campaign, outcome: Outcome) -> None:
    """Makes the loss, or a gradient, NaN or infinite on one of two processes, in steps at random, in every engine.

    Weights, masters and moments must be the same bit by bit after those steps, and only after those.
    """
    each = campaign.count("poisoned gradients") // len(ENGINES)
    jobs, expected = [], []
    for name, words in ENGINES.items():
        steps = sorted(campaign.draw.sample(range(1, 2 * each), each))
        kinds = [(campaign.draw.randrange(2), campaign.draw.choice(("loss", "gradient", "expert"))) for _ in steps]
        own = [f"data.path={campaign.corpus}", f"run.dir={campaign.home / name}", f"train.max_steps={2 * each}"]
        own += ["train.micro_batch_size=1", f"train.max_skipped_steps={each}", *words]
        jobs.append({"words": own, "faults": dict(zip(steps, kinds, strict=True))})
        expected.append(steps)
        outcome.tried += each
    path = campaign.home / "jobs.json"
    path.write_text(json.dumps(jobs))
    done = launch_ranks(2, "tests.multiprocess.faulty_steps", str(path), timeout=900)
    outcome.expect(done.returncode == 0, done.stderr[-500:])
    for rank in range(2) if done.returncode == 0 else ():
        unchanged = read_json(path.with_suffix(f".{rank}.unchanged"))
        for name, found, steps in zip(ENGINES, unchanged, expected, strict=True):
            outcome.expect(found == steps, f"{name}: steps {found} changed nothing on process {rank}, not {steps}")


def clean(campaign: Campaign, outcome: Outcome) -> None:
    """Trains without a fault, where spikes are skipped; no step may be."""
    outcome.tried = campaign.count("clean steps")
    folder = campaign.home / "clean"
    words = ["train.log_every=1", "train.spike_zscore=6", "train.on_spike=skip"]
    code = campaign.run(folder, f"train.max_steps={outcome.tried}", *words)
    rows = metrics(folder)
    outcome.expect(code == 0 and len(rows) == outcome.tried + 1, f"{len(rows)} rows, exit code {code}")
    outcome.expect(rows[-1]["skipped_steps"] == 0, f"{rows[-1]['skipped_steps']} steps skipped")


PARTS: dict[str, Callable[[Campaign, Outcome], None]] = {
    "SIGKILL at random": kills,
    "SIGKILL in a save": sub_steps,
    "damaged files": damages,
    "SIGTERM": requests,
    "other layouts": resumes,
    "NaN or Inf on one process": poisoned,
    "clean steps": clean,
}


def conduct(campaign: Campaign, names: list[str]) -> Iterator[Outcome]:
    """Goes through parts of the campaign."""
    for name in names:
        part = PARTS[name]
        outcome, started = Outcome(name), time.perf_counter()
        part(campaign, outcome)
        outcome.seconds = round(time.perf_counter() - started, 1)
        yield outcome


def main() -> int:
    """Prints a row for each part; returns 1 where anything was lost."""
    words = argparse.ArgumentParser(prog="python -m bench.faults", description=__doc__)
    words.add_argument("--quick", action="store_true", help="fewer of each: minutes")
    words.add_argument("--full", action="store_true", help="besides, runs go on in each other's layout")
    words.add_argument("--only", choices=list(PARTS), action="append", help="this part alone; may be given again")
    words.add_argument("--transitions", type=int, default=len(LAYOUTS) ** 2, help="at most so many of these, drawn")
    words.add_argument("--seed", type=int, default=0, help="of every choice")
    words.add_argument("--out", type=Path, help="JSON file for the outcomes")
    options = words.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    names = options.only or [name for name in PARTS if options.full or PARTS[name] is not resumes]
    outcomes = []
    with tempfile.TemporaryDirectory() as home:
        print(f"seed {options.seed}\n| fault | tried | lost | seconds |\n|---|---|---|---|", flush=True)
        for outcome in conduct(Campaign(Path(home), options.seed, options.quick, options.transitions), names):
            print(f"| {outcome.name} | {outcome.tried} | {len(outcome.losses)} | {outcome.seconds} |", flush=True)
            outcomes.append(outcome)
    for outcome in outcomes:
        for line in outcome.losses:
            print(f"LOST: {outcome.name}: {line}")
    if options.out:
        content = {"seed": options.seed, "quick": options.quick, "parts": [asdict(outcome) for outcome in outcomes]}
        options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return int(any(outcome.losses for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
