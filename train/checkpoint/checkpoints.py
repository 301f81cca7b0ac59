"""The checkpoints of a run: written, found again, kept and deleted. Every process takes part in each of these."""

import base64
import contextlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from train.checkpoint.changes import allowed_changes, described
from train.checkpoint.durable import Written, check_file, sync_folder, write_durably
from train.checkpoint.find import ASIDE, Found, delete, find, listed, read_name, set_aside
from train.checkpoint.frozen import frozen_digests
from train.checkpoint.manifest import (
    NAME,
    STATE,
    file_name,
    folder_name,
    read_manifest,
    render,
    step_of,
)
from train.checkpoint.values import Values, write_slices
from train.config import Config
from train.data.loader import Data
from train.errors import CheckpointError, ConfigError, DataError, MachineError, NumericsError, UserError
from train.folder import RunFolder, has_trained
from train.parallel.engine import Engine

T = TypeVar("T")
REWIND = "rewind.json"  # says that the newest checkpoint is gone back to, and how; see `train.rewind`


class Pending(NamedTuple):
    """A checkpoint that is being written.

    Attributes:
        step: that it is of.
        partial: the folder it is written into.
        target: what that will be called.
        state: what is not in tensors; on the main process.
        written: this process's file, once it is.
        published: is done once the checkpoint has its name; None while files are written.
    """

    step: int
    partial: Path
    target: Path
    state: dict[str, Any] | None
    written: "Future[Written]"
    published: "Future[None] | None" = None


class Part(Protocol):
    """What a run carries from step to step, besides its weights; the same on every process."""

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...


class Checkpoints:
    """Saves a run, and lets one that died go on.

    Args:
        engine: of the run, not yet prepared.
        folder: of the run, on the main process alone.
        config: of the run, as the user gave it.

    Attributes:
        step: the run goes on after; 0 for a new one.

    Raises:
        CheckpointError: when there are checkpoints, but no whole one.
        ConfigError: when the one to go on from is of a run with other settings.
        MachineError: when none could be written.
    """

    def __init__(self, engine: Engine, folder: RunFolder | None, config: Config) -> None:
        self._engine, self._folder, self._config = engine, folder, config.checkpoint
        self._root = Path(str(config.run.dir)) / "checkpoints"
        self._described = described(config)
        self._rows_per_step = (
            engine.world_size * config.train.micro_batch_size * config.train.gradient_accumulation_steps
        )
        self._parts: dict[str, Part] = {}
        self._frozen: dict[str, str] | None = None
        self._data: dict[str, Any] = {}
        self._found: Found | None = None
        self._pending: Pending | None = None
        if config.checkpoint.resume != "never":
            self._found = find(engine, self._root, config.checkpoint.resume)
        if self._found is not None:
            self._refuse_another(self._found, config)
        if self.enabled:
            engine.everywhere(self._probe)

    @property
    def enabled(self) -> bool:
        """Whether the run saves anything."""
        return self._config.every is not None

    @property
    def step(self) -> int:
        """The step that the run goes on after; 0 for a new one."""
        return self._found.state["step"] if self._found else 0

    @property
    def newest_is_next(self) -> bool:
        """Whether the run, started again by the same words, goes on from its newest checkpoint."""
        resume = self._config.resume
        named = None if resume in ("auto", "never") else Path(resume).expanduser().resolve()
        return resume != "never" and (named is None or named.parent != self._root.resolve())

    def _refuse_another(self, found: Found, config: Config) -> None:
        state, rows = found.state, self._rows_per_step
        differences = allowed_changes(state["config"], self._described, str(found.folder))
        if state["rows_per_step"] != rows:
            raise ConfigError(
                f"{found.folder} is of a run with {state['rows_per_step']} rows a step, and this one has {rows} "
                "(processes x train.micro_batch_size x train.gradient_accumulation_steps): change one of them"
            )
        if config.train.max_steps is not None and config.train.max_steps < state["step"]:
            raise ConfigError(f"train.max_steps={config.train.max_steps} is less than {found.folder} has")
        if self._folder:
            processes = state["processes"], self._engine.world_size
            differences += [f"processes {processes[0]} -> {processes[1]}"] if processes[0] != processes[1] else []
            for name, version in state["versions"].items():
                if version != (here := _versions().get(name)):
                    print(f"WARNING: {found.folder} is of {name} {version}, here is {here}: what follows may differ")
            changed = f"; changed: {', '.join(differences)}" if differences else ""
            print(f"goes on after step {state['step']} from {found.folder}{changed}", flush=True)

    def _probe(self) -> None:
        """Finds out before the first step whether this process can write."""
        try:
            self._root.mkdir(exist_ok=True)
            probe = self._root / f".probe-{self._engine.rank}"
            probe.write_text("1", encoding="utf-8")
            probe.unlink()
        except OSError as error:
            raise MachineError(
                f"checkpoints cannot be written: {self._root}: {error.strerror}; give run.dir on a file system that "
                "every process can write, or checkpoint.every=null"
            ) from None

    def restore(self, data: Data) -> None:
        """Puts a prepared engine and the run's folder into the state of the checkpoint, if there is one.

        Args:
            data: of the run.

        Raises:
            DataError: when it is not what the run was trained on.
            CheckpointError: when the checkpoint is not of this model.
        """
        self._data = self._engine.everywhere(data.fingerprint)
        found = self._found
        if found is None:
            self._engine.on_main(self._start_over)
            return
        self._engine.everywhere(lambda: self._refuse_other_data(found))
        self._frozen = frozen_digests(self._engine)
        self._engine.everywhere(lambda: self._fill(found))
        self._engine.state.publish()
        self._engine.on_main(lambda: self._rewind(found))

    def _refuse_other_data(self, found: Found) -> None:
        """Compares what the run is trained on with what it was, as far as the checkpoint tells."""
        then, now = found.state["data"], self._data
        if then is not None and then != now:
            raise DataError(
                f"{found.folder} is of a run on other data: {_words(then)}, and here {_words(now)}; bring back that "
                "data, or name another run.dir"
            )

    def _start_over(self) -> None:
        """Says that what was done before a first checkpoint is lost."""
        folder = self._folder
        if folder is not None and has_trained(folder.path):
            count = folder.rewind_metrics(-1)
            print(
                f"WARNING: the run in {folder.path} ended before its first checkpoint: it starts over, and its {count} "
                "rows are now in metrics.discarded.jsonl",
                flush=True,
            )

    def _fill(self, found: Found) -> None:
        engine, state = self._engine, found.state
        shapes = {whole.name: list(whole.shape) for whole in engine.state.wholes.values()}
        if shapes != state["parameters"] or self._frozen != state["frozen"]:
            different = [
                name
                for mine, theirs in ((shapes, state["parameters"]), (self._frozen or {}, state["frozen"]))
                for name in sorted(mine.keys() | theirs.keys())
                if mine.get(name) != theirs.get(name)
            ]
            raise CheckpointError(
                f"{found.folder} is not of this model: {different[0]} differs, and {len(different) - 1} more; what is "
                "not trained comes from model.init_from or run.seed, and must be what it was"
            )
        engine.state.begin(state["updates"])
        values = Values(found.folder / name for name in found.files if name != STATE)
        for item in engine.state.slices():
            values.fill(item)

    def _rewind(self, found: Found) -> None:
        """Makes the run's folder what it was at the step."""
        folder = self._folder
        assert folder is not None
        if self._root.is_dir():
            set_aside(self._root, newer_than=self.step)
        if found.folder.parent == self._root:
            self.note("latest", found.folder.name)
        folder.tracker_id = found.state["tracker_id"]
        folder.move_export(self.step)
        if has_trained(folder.path):
            count = folder.rewind_metrics(self.step)
            if count:
                print(f"{count} rows past step {self.step} are now in metrics.discarded.jsonl", flush=True)

    def carry(self, **parts: Part) -> None:
        """Has parts of the run saved in every checkpoint from now on, and gives each what the one restored held."""
        self._parts |= parts
        for name, part in parts.items():
            if self._found is not None and name in self._found.state["parts"]:
                try:
                    part.restore(self._found.state["parts"][name])
                except (LookupError, TypeError, ValueError) as error:
                    raise CheckpointError(f"{self._found.folder} is damaged: its part {name} ({error!r})") from None

    def seed(self, seed: int) -> None:
        """Seeds this process's random numbers, or sets them to where they were.

        With another number of processes they are drawn anew, by seed, step and process.
        """
        if self._found is None:
            torch.manual_seed(seed + self._engine.rank)
        elif self._found.state["processes"] != self._engine.world_size:
            torch.manual_seed(seed + self._engine.rank + (self.step << 32))
        else:
            _set_random(self._found.state["random"][self._engine.rank], self._engine.device)

    def is_due(self, step: int, *, last: bool) -> bool:
        """Whether a step is to be saved after it was taken."""
        return self._config.every is not None and (last or step % self._config.every == 0)

    def save(self, step: int, *, best: bool = False, wait: bool = True) -> None:
        """Writes a checkpoint, then deletes those that are no longer kept.

        Args:
            step: that was taken last.
            best: whether it is the best so far, and kept until another one is.
            wait: until it is written; else `poll` completes it, where `checkpoint.asynchronous` asks for that.

        Raises:
            MachineError: on every process, when it cannot be written; those before are untouched then.
        """
        self._engine.watchdog.enter("a checkpoint", step)
        self.finish()
        target, latest = self._root / folder_name(step), self._root / "latest"
        if not self._engine.on_main(lambda: target.exists() and read_name(latest) == target.name):
            self._pending = self._begin(step, target, beside=self._config.asynchronous and not wait)
        if best:
            self.finish()
            self._engine.on_main(lambda: self.note("best", target.name))
        if wait or not self._config.asynchronous:
            self.finish()

    def poll(self) -> None:
        """Goes on with the checkpoint that is being written, where every process is done with its part of that."""
        pending = self._pending
        if pending is None:
            return
        now = pending.published or pending.written
        if self._engine.max(torch.tensor(float(not now.done()), device=self._engine.device)) > 0:
            return
        if pending.published is not None:
            self.finish()
            return
        with self._saving(pending):
            self._pending = pending._replace(published=self._publish_written(pending, beside=True))

    def _begin(self, step: int, target: Path, *, beside: bool) -> Pending:
        """Begins to write this process's file: from what it holds, or beside training from a copy of that."""
        engine, partial = self._engine, self._root / f".{target.name}.partial"
        if self._frozen is None:
            self._frozen = frozen_digests(engine)
        engine.on_main(lambda: _make_anew(partial))
        random = engine.gather(_random(engine.device))
        state = self._describe(step, random) if self._folder else None
        slices = [item.copy() for item in engine.state.owned()] if beside else list(engine.state.owned())
        file, beat = partial / file_name(engine.rank), engine.watchdog.beat
        written = run_beside(lambda: write_slices(file, slices, beat), beside=beside)
        return Pending(step, partial, target, state, written)

    def finish(self) -> None:
        """Completes the checkpoint that is being written, if any: waits, names it, deletes what is no longer kept."""
        pending, self._pending = self._pending, None
        if pending is not None:
            with self._saving(pending):
                published = pending.published or self._publish_written(pending, beside=False)
                self._engine.everywhere(published.result)

    @contextlib.contextmanager
    def finished(self) -> Iterator[None]:
        """Completes what is being written before a run is left by an error that all processes raise."""
        try:
            yield
        except NumericsError:
            try:
                self.finish()
            except MachineError as error:
                if self._folder:
                    print(f"WARNING: {error}", flush=True)
            raise

    @contextlib.contextmanager
    def _saving(self, pending: Pending) -> Iterator[None]:
        """Says of an error which checkpoint it was that could not be written."""
        try:
            yield
        except UserError as error:
            if self._folder:
                shutil.rmtree(pending.partial, ignore_errors=True)
            raise MachineError(
                f"the checkpoint of step {pending.step} was not written, those before it are untouched: {error}"
            ) from None

    def _publish_written(self, pending: Pending, *, beside: bool) -> "Future[None]":
        """Completes a checkpoint whose files are written and deletes what it replaces, on the main process."""
        mine = self._engine.everywhere(pending.written.result)
        written = self._engine.gather((mine.size, mine.sha256))
        files = {file_name(rank): Written(*file) for rank, file in enumerate(written)}

        def publish() -> None:
            if self._folder is not None:
                with self._folder.held():
                    self._publish(pending, files)
                    self._delete_older(pending.target)

        return run_beside(publish, beside=beside)

    def _publish(self, pending: Pending, files: dict[str, Written]) -> None:
        """Completes a checkpoint and gives it its name."""
        partial, target = pending.partial, pending.target
        for name, file in files.items():
            if not (partial / name).exists() or (partial / name).stat().st_size != file.size:
                raise MachineError(f"{partial / name} is not here: run.dir must be one folder for all hosts")
        assert self._folder is not None
        self._folder.sync_metrics()
        content = json.dumps(pending.state, allow_nan=False).encode()
        files = files | {STATE: write_durably(partial / STATE, [memoryview(content)])}
        write_durably(partial / NAME, [memoryview(render(pending.step, files).encode())])
        sync_folder(partial)
        if target.exists():  # damaged, or it would be the one this run went on from
            set_aside(self._root, newer_than=pending.step - 1)
        partial.rename(target)
        sync_folder(self._root)
        self.note("latest", target.name)
        (self._root / REWIND).unlink(missing_ok=True)  # this one knows what it leaves out

    def _describe(self, step: int, random: list[dict[str, str]]) -> dict[str, Any]:
        state = self._engine.state
        assert self._folder is not None
        return {
            "step": step,
            "rows_per_step": self._rows_per_step,
            "processes": self._engine.world_size,
            "updates": state.updates,
            "parameters": {whole.name: list(whole.shape) for whole in state.wholes.values()},
            "frozen": self._frozen,
            "data": self._data,
            "random": random,
            "parts": {name: part.state() for name, part in self._parts.items()},
            "tracker_id": self._folder.tracker_id,
            "config": self._described,
            "versions": _versions(),
        }

    def newest(self) -> int | None:
        """Says of which step the newest checkpoint is, on every process; None where there is none."""
        return self._engine.on_main(lambda: next((step for step, _ in listed(self._root)), None))

    def note(self, name: str, text: str) -> None:
        """Writes a small file beside the checkpoints, such as which is the latest; it is there whole or not at all."""
        partial = self._root / f".{name}.partial"
        partial.unlink(missing_ok=True)
        write_durably(partial, [memoryview(f"{text}\n".encode())])
        partial.replace(self._root / name)
        sync_folder(self._root)

    def _delete_older(self, newest: Path) -> None:
        """Deletes the checkpoints that are not kept, once the newest is known to be whole.

        Each process has read its own file back; the rest is read here.
        """
        try:
            check_file(newest, STATE, read_manifest(newest)[STATE])
            delete(self._root, self._not_kept())
        except (CheckpointError, OSError) as error:
            print(f"WARNING: {error}; no older checkpoint is deleted", flush=True)

    def _not_kept(self) -> list[str]:
        """Names the folders to delete: older checkpoints, and those set aside whose step was reached again."""
        steps = [step for step, _ in listed(self._root)]
        kept = steps[: self._config.keep_last]
        kept += [step for step in steps if self._config.keep_every and step % self._config.keep_every == 0]
        best = read_name(self._root / "best")
        doomed = [path.name for step, path in listed(self._root) if step not in kept and path.name != best]
        aside = [path.name for path in self._root.glob(f"step-*{ASIDE}")]
        return doomed + [name for name in aside if (step_of(name.removesuffix(ASIDE)) or 0) <= steps[0]]


def run_beside(function: Callable[[], T], *, beside: bool) -> "Future[T]":
    """Runs a function, in a thread of its own where it is to run beside others."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    if beside:
        threading.Thread(target=run, name="checkpoint").start()
    else:
        run()
    return future


def _make_anew(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()


def _versions() -> dict[str, str]:
    return {"torch": torch.__version__, "deepspeed": metadata.version("deepspeed")}


def _words(data: dict[str, Any]) -> str:
    if "streamed" in data:
        return f"a stream whose first {data['streamed']} documents have the SHA-256 {data['sha256'][:8]}"
    return f"{data['documents']:,} documents of {data['tokens']:,} tokens"


def _random(device: torch.device) -> dict[str, str]:
    """Describes where this process's random numbers are."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {name: base64.b64encode(state.numpy().tobytes()).decode() for name, state in states.items()}


def _set_random(states: dict[str, str], device: torch.device) -> None:
    """Sets this process's random numbers to where others were; those of a GPU begin anew where there was none."""
    found = {name: torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8) for name, text in states.items()}
    torch.set_rng_state(found["cpu"])
    if device.type == "cuda" and "cuda" in found:
        torch.cuda.set_rng_state(found["cuda"], device)
