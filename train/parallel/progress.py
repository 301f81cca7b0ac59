"""How far each process of a run has come, by what it reports of itself, and which did not get to where others wait."""

import dataclasses
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

START = "the start"
NAMED = 8  # processes in a message
SILENT = 0.5  # of the seconds without a sign of life: it is not the work alone that does not get on


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a process says of itself, again and again.

    Attributes:
        sign: of life, another one in each report.
        beats: how often its work got on, by whatever it is.
        places: how often it came to a place that all processes come to, in one order.
        collectives: how many it has begun, by the name of their group.
        step: at which it is; None before the first one.
        phase: what it is at.
        limited: whether that is something which must get on; reading a corpus, say, may take hours.
        left: whether it has left the work that is watched.
        written: whether its stacks are.
        owner: its process number and host.
    """

    sign: int = 0
    beats: int = 0
    places: int = 0
    collectives: Mapping[str, int] = field(default_factory=dict)
    step: int | None = None
    phase: str = START
    limited: bool = False
    left: bool = False
    written: bool = False
    owner: str = "not yet known"

    def __str__(self) -> str:
        step = "" if self.step is None else f"step {self.step}, "
        return f"{step}{self.phase}"

    @property
    def progress(self) -> tuple[int, Mapping[str, int]]:
        """What grows as long as the process gets on."""
        return self.beats, self.collectives

    def to_json(self) -> str:
        """Writes it down."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Report":
        """Reads it; of nothing makes that of a process which has not reported yet."""
        return cls(**json.loads(text)) if text else cls()


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Why a run is ended, the same for all of its processes.

    Attributes:
        message: for people.
        speaker: the process that says so.
        silent: those that give no sign of life.
    """

    message: str
    speaker: int
    silent: list[int]

    def to_json(self) -> str:
        """Writes it down."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Verdict":
        """Reads it."""
        return cls(**json.loads(text))


@dataclass(slots=True)
class Seen:
    """A process, as another one has seen it while that one waited.

    Attributes:
        report: its last.
        lived: when it gave a sign of life last.
        moved: when it got on last.
    """

    report: Report
    lived: float
    moved: float

    def take(self, report: Report, now: float) -> None:
        """Takes in a report."""
        self.lived = now if report.sign != self.report.sign else self.lived
        self.moved = now if report.progress != self.report.progress else self.moved
        self.report = report


def judge(seen: Mapping[int, Seen], now: float, seconds: float) -> Verdict | None:
    """Judges whether a run hangs, once the process that judges has not got on for long itself.

    It does when a process gives no sign of life, or when none gets on where all must.

    Args:
        seen: all processes, by rank.
        now: as the times in them.
        seconds: that this may take.
    """
    taking_part = {rank: one for rank, one in seen.items() if not one.report.left}
    silent = [rank for rank, one in taking_part.items() if now - one.lived >= seconds * SILENT]
    is_dead = any(now - one.lived >= seconds for one in taking_part.values())
    is_still = all(
        one.report.limited and now - one.moved >= seconds for rank, one in taking_part.items() if rank not in silent
    )
    if len(silent) == len(taking_part) or not (is_dead or is_still):
        return None
    return describe({rank: one.report for rank, one in taking_part.items()}, silent, seconds)


def late_ones(reports: Mapping[int, Report]) -> list[int]:
    """Names the processes that did not come to where the others are, or all when none is behind.

    Where the work stands still, a process that waits for another has begun a collective which that one has not. So
    those are late that lack a collective which another one of its group has begun, and have begun none that another
    one lacks. Where collectives do not tell, the fewest places do.

    Args:
        reports: of all that take part in the work, by rank.
    """

    def is_ahead(one: Report, other: Report) -> bool:
        return any(count > other.collectives.get(name, count) for name, count in one.collectives.items())

    waiting = {rank for rank, one in reports.items() if any(is_ahead(one, other) for other in reports.values())}
    behind = {rank for rank, one in reports.items() if any(is_ahead(other, one) for other in reports.values())}
    if behind - waiting:
        return sorted(behind - waiting)
    fewest = min(one.places for one in reports.values())
    return sorted(rank for rank, one in reports.items() if one.places == fewest)


def describe(reports: Mapping[int, Report], silent: Collection[int], seconds: float) -> Verdict:
    """Says which processes hang, and where they and the others are.

    Args:
        reports: of all that take part in the work, by rank.
        silent: those of them that give no sign of life.
        seconds: how long the others have waited.
    """
    late = sorted(silent) or late_ones(reports)
    others = [rank for rank in reports if rank not in late]
    at = ", last heard of at" if silent else " at"
    where = "; ".join(f"process {rank} ({reports[rank].owner}){at} {reports[rank]}" for rank in late[:NAMED])
    where += f" and {len(late) - NAMED} more" if len(late) > NAMED else ""
    if silent:
        cause = "stopped, cut off or dead, or in code that never gives its interpreter free"
        what = f"no sign of life for {seconds:g} s (train.hang_seconds) of {where}: {cause}"
    elif others or len(late) == 1:
        what = f"hung, nothing having got on for {seconds:g} s (train.hang_seconds): {where}"
    else:
        what = f"nothing has got on for {seconds:g} s (train.hang_seconds), and no process is behind: {where}"
    if others:
        named = ", ".join(map(str, others[:NAMED])) + (f" and {len(others) - NAMED} more" if others[NAMED:] else "")
        what += f"; process {named} waited, at {reports[others[0]]}"
    return Verdict(message=what, speaker=min(set(reports) - set(silent)), silent=sorted(silent))
