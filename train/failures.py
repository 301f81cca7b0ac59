"""What is kept of a step that was not taken: the batch of each process where it went wrong, for a look at it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import pad

from train.config import Config
from train.data.labelled import AnyBatch
from train.data.loader import Data
from train.data.share import Share
from train.errors import NumericsError, UserError
from train.guard import Guard, Skip
from train.observe.observer import Observer
from train.parallel.engine import Engine
from train.rewind import Rewind

NAMED = 8  # processes in a message


class Failures:
    """Says which step is a spike, or skipped and why, keeps the batch, and tells when too many were skipped.

    Args:
        engine: of the run.
        config: of the run.
        data: of the run.
        share: of this process.
        observer: which speaks.
        guard: which counts.
        rewind: which sends the run back.
    """

    def __init__(
        self,
        engine: Engine,
        config: Config,
        data: Data,
        share: Share,
        observer: Observer,
        guard: Guard,
        rewind: Rewind,
    ) -> None:
        self._engine, self._config, self._data, self._share = engine, config, data, share
        self._observer, self._guard, self._rewind = observer, guard, rewind
        self._folder = Path(str(config.run.dir)) / "failures"

    def report(self, step: int, skip: Skip | None, micro_batches: Sequence[AnyBatch], lr: float) -> UserError | None:
        """Reports a step, if there is anything to say of it; every process must call it.

        Args:
            step: counted from 1.
            skip: why every process skipped it; None of a step that was taken.
            micro_batches: of this process.
            lr: that the step would have had.

        Returns:
            What every process is to end with: when it was one too many in a row, or is gone back from.
        """
        if self._guard.alarm:
            self._observer.say(f"ALARM step {step}: {self._guard.alarm}")
        if skip is None:
            return None
        kept = self._engine.gather(self._keep(step, skip, micro_batches, lr))
        places = [f"process {rank} (rows {_words(self._rows(rank, step))})" for rank in skip.ranks[:NAMED]]
        places += [f"{len(skip.ranks) - NAMED} more"] if len(skip.ranks) > NAMED else []
        what, guard = f"step {step}: {skip.reason} on {', '.join(places)}", self._guard
        batches = f"kept: {', '.join(filter(None, kept))}"
        count = f"{guard.in_a_row} in a row, of train.max_skipped_steps={guard.most}"
        self._observer.say(f"WARNING {what}: skipped, nothing was updated; {count}; {batches}")
        ended = self._rewind.go_back(step, guard.alarm) if guard.alarm else None
        if ended is not None or not guard.is_over:
            return ended
        return NumericsError(f"{what}: nothing was updated; {count}; lower optim.lr or look at the data; {batches}")

    def _batch(self, step: int) -> int:
        """Says which of the data's batches, counted from 0, a step takes."""
        return step - 1 + self._rewind.left_out

    def _rows(self, rank: int, step: int) -> list[range]:
        return Share.of(self._config.train, rank, self._share.world_size).rows(self._batch(step))

    def _keep(self, step: int, skip: Skip, micro_batches: Sequence[AnyBatch], lr: float) -> str | None:
        """Writes the batch of this process, if it is to be kept; says where, or why not."""
        if self._share.rank not in skip.ranks:
            return None
        batch = f"-batch-{self._batch(step) + 1:08d}" if self._rewind.left_out else ""  # the step may come again
        path = self._folder / f"step-{step:08d}{batch}-rank-{self._share.rank}.safetensors"
        described: dict[str, Any] = {
            "step": step,
            "batch": self._batch(step) + 1,
            "rank": self._share.rank,
            "processes": self._share.world_size,
            "seed": self._config.run.seed,
            "lr": lr,
            "reason": skip.reason,
            "ranks": skip.ranks,
            "rows": [list(rows) for rows in self._rows(self._share.rank, step)],
            "documents": self._data.documents(self._share, self._batch(step)),
        }
        try:
            self._folder.mkdir(exist_ok=True)
            path.write_bytes(save(joined(micro_batches)))
            path.with_suffix(".json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
        except OSError as error:  # the run does not depend on it
            return f"not {path} ({error.strerror})"
        return str(path)


def joined(micro_batches: Sequence[AnyBatch]) -> dict[str, Tensor]:
    """Lays the rows of micro-batches below each other, by the names of their tensors; shorter ones are padded."""
    longest = max(batch.input_ids.shape[1] for batch in micro_batches)
    found = {}
    for name in micro_batches[0]._fields:
        tensors = [getattr(batch, name) for batch in micro_batches]
        if name != "labels":
            tensors = [pad(tensor, (0, longest - tensor.shape[1])) for tensor in tensors]
        found[name] = torch.cat(tensors).cpu().contiguous()
    return found


def _words(rows: Sequence[range]) -> str:
    """Writes row numbers: 4-7, 12-15."""
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in rows)
