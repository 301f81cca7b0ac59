"""What is wrong with documents: counted where it lies, since blank ones may be many, and listed as far as is asked."""

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from train.config import DataConfig
from train.data.columns import parts_of
from train.data.formats import BLANK
from train.errors import DataError


@dataclass(frozen=True)
class Problems:
    """The documents that have one.

    Attributes:
        datasets: with the columns `problem` and `source`, one after the other.
    """

    datasets: tuple[Dataset, ...] = ()

    @cached_property
    def kinds(self) -> Counter[str]:
        """How many there are of each kind, in the order in which they come."""
        counts: Counter[str] = Counter()
        for part in self._parts():
            for kind in _kinds(part).value_counts().to_pylist():
                counts[kind["values"]] += kind["counts"]
        return counts

    @property
    def first(self) -> str:
        """Place and problem of the first."""
        return ": ".join(next(iter(self)))

    def __add__(self, other: "Problems") -> "Problems":
        """Lists those of the other after its own."""
        return Problems(self.datasets + other.datasets)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """Yields place and problem of each."""
        return self.of(self.kinds)

    def of(self, kinds: Collection[str]) -> Iterator[tuple[str, str]]:
        """Yields place and problem of those of some kinds."""
        wanted = pa.array(kinds, pa.string())
        for part in self._parts():
            for row in part.filter(pc.is_in(_kinds(part), wanted)).to_pylist():
                yield row["source"], row["problem"]

    def _parts(self) -> Iterator[pa.RecordBatch]:
        for documents in self.datasets:
            for part in parts_of(documents, "problem", "source"):
                if part.column(0).null_count < len(part):
                    yield part.filter(part.column(0).is_valid())


def _kinds(part: pa.RecordBatch) -> pa.Array:
    """Gives the kind of each problem: what is before the colon."""
    return pc.replace_substring_regex(part.column(0), "(?s):.*", "")


def is_tolerated(problem: str, config: DataConfig) -> bool:
    """Says whether a document with this problem, or kind of one, is left out and counted, rather than an error."""
    kind = problem.partition(":")[0]
    if kind == "too long":
        return config.too_long == "skip"
    return kind == BLANK or config.bad_rows == "skip"


def refused_kinds(problems: Problems, config: DataConfig) -> Counter[str]:
    """Counts the problems that are not tolerated, by their kind."""
    return Counter({kind: count for kind, count in problems.kinds.items() if not is_tolerated(kind, config)})


def refuse(problems: Problems, config: DataConfig) -> None:
    """Refuses problems that are not tolerated.

    Args:
        problems: of the documents.
        config: says which are.

    Raises:
        DataError: naming the first, and how many of which kind there are.
    """
    kinds = refused_kinds(problems, config)
    if not kinds:
        return
    source, problem = next(problems.of(kinds))
    more = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    hint = f" (bad rows: {more}; inspect_data lists them, data.bad_rows=skip leaves them out)"
    raise DataError(f"{source}: {problem}{hint if kinds.total() > 1 else ''}")
