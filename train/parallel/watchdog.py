"""A run of several processes ends when one of them hangs, rather than waiting for it for ever.

Two threads of each process watch. One exchanges reports through the store where the processes met, over a connection
of its own, and may itself be held up there. The other one counts the seconds in which nothing got on, and ends the
process. Seconds are this process's own, and those in which it was itself stopped do not count.
"""

import contextlib
import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist
from torch import nn

from train.errors import MachineError, UserError
from train.folder import write_exit
from train.parallel.meeting import connect_again, meeting_place, report_key
from train.parallel.progress import SILENT, START, Report, Seen, Verdict, judge

TICKS = 10  # of the seconds that are waited
LONGEST_TICK, SHORTEST_TICK = 15.0, 0.05
PATIENCE_SECONDS = 5.0
STACKS = "stacks-rank{}.txt"
HINT = "the run goes on from its last checkpoint when it is started again"


class Watchdog:
    """Notices that no process of a run gets on, says which one hangs and where, and ends this one.

    As a context it leaves the watch at its end, and has the last word on an error that another process's end led to.

    Args:
        rank, world_size: this process's number and how many there are.
        seconds: that may pass without anything getting on; None watches nothing, nor does a lone process.
    """

    def __init__(self, rank: int, world_size: int, seconds: float | None) -> None:
        self._rank, self._ranks, self._seconds = rank, range(world_size), seconds or 0.0
        self._enabled = seconds is not None and world_size > 1
        self._tick = max(SHORTEST_TICK, min(LONGEST_TICK, self._seconds / TICKS))
        self._step: int | None = None
        self._phase, self._limited = START, False
        self._beats, self._places, self._transfers, self._sign = 0, 0, 0, 0
        self._folder: Path | None = None
        self._threads: list[threading.Thread] = []
        self._ending = threading.Lock()  # held by whoever ends this process, or leaves the watch
        self._stopped, self._hurry = threading.Event(), threading.Event()
        self._heard: dict[int, Report] = {}
        self._exchanges, self._waits, self._left, self._written = 0, False, False, False
        self._proposed: Verdict | None = None
        self._verdict: Verdict | None = None

    def enter(self, phase: str, step: int | None = None, *, limited: bool | None = True) -> None:
        """Notes that this process's work has come to a place which every process comes to.

        Args:
            phase: what comes now.
            step: at which; by default the one before.
            limited: whether it must get on; None: if what was before must.
        """
        self._phase, self._step = phase, self._step if step is None else step
        self._limited = self._limited if limited is None else limited
        self._places += 1
        self._beats += 1

    def beat(self) -> None:
        """Notes that this process's work has got on."""
        self._beats += 1

    def transferred(self) -> None:
        """Notes a message between two processes, which gloo counts as a collective of both."""
        self._transfers += 1
        self._beats += 1

    def attend(self, model: nn.Module) -> None:
        """Takes each forward pass of a model for a place in the work."""
        enter = self.enter  # nothing here may keep the model alive

        def note(module: nn.Module, _: object) -> None:
            enter("a training step" if module.training else "an evaluation", limited=None)

        model.register_forward_pre_hook(note)

    def start(self, folder: Path) -> None:
        """Begins to watch.

        Args:
            folder: of the run, into which stacks and `exit.json` are written.
        """
        self._folder = folder
        if self._enabled:
            for work in (self._talk, self._watch):
                self._threads.append(threading.Thread(target=work, name=f"watchdog{work.__name__}", daemon=True))
                self._threads[-1].start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Leaves the watch; an error that a hang led to is the hang's, which ends the process."""
        if not self._threads:
            return
        with self._ending:
            if error is not None and not isinstance(error, UserError):
                self._exchange()
                if self._verdict is not None:
                    self._end(self._verdict)
            self._left = True
            self._exchange()
            self._stopped.set()
            self._hurry.set()
        for thread in self._threads:
            thread.join(timeout=PATIENCE_SECONDS)
        faulthandler.cancel_dump_traceback_later()

    def _exchange(self) -> None:
        """Has reports exchanged once more, all of it from now on; gives up where the store does not answer."""
        before = self._exchanges
        _await(lambda: self._exchanges >= before + 2 or not self._threads[0].is_alive(), poke=self._hurry)

    def _report(self) -> Report:
        self._sign += 1
        return Report(
            sign=self._sign,
            beats=self._beats,
            places=self._places,
            collectives=self._collectives(),
            step=self._step,
            phase=self._phase,
            limited=self._limited,
            left=self._left,
            written=self._written,
            owner=f"pid {os.getpid()} on {socket.gethostname()}",
        )

    def _collectives(self) -> dict[str, int]:
        """Counts the collectives that this process has begun, by group."""
        world: Any = dist.distributed_c10d._world
        counts = {str(world.pg_names[group]): group._get_sequence_number_for_group() for group in list(world.pg_map)}
        if dist.is_initialized() and dist.get_backend() == "gloo":
            counts[str(world.pg_names[dist.group.WORLD])] -= self._transfers
        return counts

    def _talk(self) -> None:
        """Tells the others where this process is, and hears where they are, as long as the store answers."""
        keys = [report_key(rank) for rank in self._ranks]
        with contextlib.suppress(RuntimeError):  # the store is gone
            store = connect_again(max(PATIENCE_SECONDS, self._seconds))
            while True:
                is_last = self._stopped.is_set()
                store.set(keys[self._rank], self._report().to_json())
                if self._proposed is not None:
                    self._verdict = Verdict.from_json(store.compare_set("verdict", "", self._proposed.to_json()))
                elif store.check(["verdict"]):
                    self._verdict = Verdict.from_json(store.get("verdict"))
                if self._waits:
                    self._heard = dict(zip(self._ranks, map(Report.from_json, store.multi_get(keys)), strict=True))
                self._exchanges += 1
                if is_last:
                    return
                self._hurry.wait(self._tick)
                self._hurry.clear()

    def _watch(self) -> None:
        """Counts the seconds in which nothing gets on."""
        clock = moved = answered = 0.0
        last, progress, exchanges = time.monotonic(), self._report().progress, 0
        seen: dict[int, Seen] = {}
        while self._rearm() and not self._stopped.wait(self._tick):
            now = time.monotonic()
            clock += min(now - last, 2 * self._tick)  # or it was this process that was stopped
            last, before, progress = now, progress, self._report().progress
            self._waits = before == progress
            if not self._waits:
                moved = answered = clock
                self._heard = {}
                seen.clear()
            if self._exchanges != exchanges:
                answered, exchanges = clock, self._exchanges
            for rank, report in self._heard.items():
                seen.setdefault(rank, Seen(report, clock, clock)).take(report, clock)
            verdict = self._verdict
            if verdict is None and clock - moved >= self._seconds:
                verdict = self._silence() if clock - answered >= self._seconds else judge(seen, clock, self._seconds)
            if verdict is not None:
                with self._ending:
                    if not self._stopped.is_set():
                        self._end(verdict)

    def _rearm(self) -> bool:
        """Has the stacks written to stderr, unless it is called again: by a thread that needs no interpreter."""
        with contextlib.suppress(OSError, RuntimeError):
            faulthandler.dump_traceback_later(self._seconds * SILENT, file=2)
        return True

    def _silence(self) -> Verdict:
        """Judges by what this process knows alone."""
        place = f"{meeting_place()}, where the processes met,"
        what = f"no sign of life for {self._seconds:g} s (train.hang_seconds) of {place} nor of its host"
        message = f"{what}; process {self._rank} waited, at {self._report()}"
        return Verdict(message=message, speaker=self._rank, silent=[rank for rank in self._ranks if rank != self._rank])

    def _end(self, verdict: Verdict) -> None:
        """Agrees on a verdict, writes this process's stacks and, where it is the speaker, `exit.json`; then ends it."""
        self._proposed = verdict
        _await(lambda: self._verdict is not None, poke=self._hurry)
        agreed, folder = self._verdict or verdict, self._folder
        assert folder is not None
        self._attempt(lambda: self._write_stacks(folder / "failures", agreed.message))
        self._written = True
        if agreed.speaker == self._rank:
            message = f"{agreed.message}; stacks: {folder}/failures/{STACKS.format('*')}; {HINT}"
            print(f"error: {message}", file=sys.stderr, flush=True)
            self._attempt(lambda: write_exit(folder, MachineError.reason, MachineError.code, message))
        self._waits = True

        def all_have() -> bool:
            return bool(self._heard) and all(
                one.written or one.left for rank, one in self._heard.items() if rank not in agreed.silent
            )

        _await(all_have, poke=self._hurry, seconds=PATIENCE_SECONDS + 2 * self._tick)
        os._exit(MachineError.code)

    def _write_stacks(self, folder: Path, why: str) -> None:
        """Writes where each thread of this process is; no source is read for it, which may be out of reach as well."""
        folder.mkdir(exist_ok=True)
        with (folder / STACKS.format(self._rank)).open("w", encoding="utf-8") as file:
            file.write(f"{why}\n\nprocess {self._rank}: {self._report()}\n")
            for thread in threading.enumerate():
                file.write(f"0x{thread.ident or 0:016x} is {thread.name}\n")
            file.write("\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)

    def _attempt(self, work: Callable[[], object]) -> None:
        """Does what a file system that is out of reach would hold up for ever, and does not wait for ever."""
        done = threading.Event()

        def run() -> None:
            try:
                work()
            except OSError as error:
                print(f"process {self._rank}: {error}", file=sys.stderr, flush=True)
            finally:
                done.set()

        threading.Thread(target=run, name="watchdog_write", daemon=True).start()
        if not done.wait(PATIENCE_SECONDS):
            with contextlib.suppress(OSError, RuntimeError):
                faulthandler.dump_traceback(file=2, all_threads=True)


def _await(condition: Callable[[], bool], *, poke: threading.Event, seconds: float = PATIENCE_SECONDS) -> None:
    """Waits until something holds, or gives up."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        poke.set()
        time.sleep(SHORTEST_TICK)
