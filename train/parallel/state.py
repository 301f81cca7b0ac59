"""What training has changed, by logical name: masters and moments, as flat ranges of the whole model's parameters.

An engine keeps them in its own way. Here each kind of keeping is a list of views, which checkpoints are written from
and read into: no process ever holds more than its own.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mixtral.weights.names import is_stacked, trained_parameters
from train.optim import begin_state, updates_of

MASTERS = "masters"


class Whole(NamedTuple):
    """A parameter of the whole model, and where a process's part of it lies.

    Attributes:
        name: as of a model that nothing wraps.
        shape: with all experts.
        start: of the first element that this process's parameter holds.
    """

    name: str
    shape: tuple[int, ...]
    start: int


class Slice(NamedTuple):
    """A flat range of a whole parameter.

    Attributes:
        kind: masters, or a state of the optimizer.
        whole: the parameter.
        start: of the first element, in all of the parameter.
        values: one-dimensional; a view of what training changes.
    """

    kind: str
    whole: Whole
    start: int
    values: Tensor

    @property
    def stop(self) -> int:
        """One past the last element."""
        return self.start + self.values.numel()

    def copy(self) -> "Slice":
        """Returns the same with values of its own, in host memory."""
        return self._replace(values=self.values.to("cpu", copy=True))

    def part(self, index: int, count: int) -> "Slice":
        """Returns one of `count` parts of about equal size."""
        size = self.values.numel()
        first, last = size * index // count, size * (index + 1) // count
        return self._replace(start=self.start + first, values=self.values[first:last])


def whole_parameters(model: nn.Module, rank: int, expert_ranks: int) -> dict[nn.Parameter, Whole]:
    """Places the trained parameters of a process in the whole model.

    Args:
        model: with this process's experts.
        rank: of the process.
        expert_ranks: over how many consecutive processes each layer's experts are split.
    """
    found = {}
    for name, parameter in trained_parameters(model).items():
        shape, start = tuple(getattr(parameter, "ds_shape", parameter.shape)), 0  # DeepSpeed's, of one in parts
        if is_stacked(name):
            start = rank % expert_ranks * math.prod(shape)
            shape = (shape[0] * expert_ranks, *shape[1:])
        found[parameter] = Whole(name, shape, start)
    return found


class EngineState(ABC):
    """Views of what an engine's training changes.

    Args:
        optimizer: PyTorch's, which updates the masters.
        wholes: the trained parameters, see `whole_parameters`.
        kinds: the names of the optimizer's moments.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, wholes: dict[nn.Parameter, Whole], kinds: Sequence[str]):
        self.optimizer, self.wholes, self.kinds = optimizer, wholes, tuple(kinds)

    @property
    def updates(self) -> int:
        """How many updates the optimizer has made."""
        return updates_of(self.optimizer)

    def begin(self, updates: int) -> None:
        """Gives the optimizer moments of zero, to be overwritten, as after so many updates."""
        begin_state(self.optimizer, self.masters(), self.kinds, updates)

    @abstractmethod
    def masters(self) -> list[Tensor]:
        """The tensors that the optimizer updates, in its own form."""

    @abstractmethod
    def places(self) -> Iterator[tuple[Whole, int, Tensor, int, int]]:
        """Yields of each parameter: where in the whole it begins here, its master tensor, and its range in that."""

    def slices(self) -> Iterator[Slice]:
        """Yields all that this process holds; moments are zero before the first update."""
        if self.updates == 0:
            self.begin(0)
        for whole, start, master, offset, size in self.places():
            flat = {MASTERS: master.detach()} | {kind: self.optimizer.state[master][kind] for kind in self.kinds}
            for kind, tensor in flat.items():
                yield Slice(kind, whole, start, tensor.view(-1)[offset : offset + size])

    def owned(self) -> Iterator[Slice]:
        """Yields what this process is to write, so that all processes together write everything once."""
        return self.slices()

    @abstractmethod
    def publish(self) -> None:
        """Brings masters that were read into what the model computes with; every process must call it."""


class ReplicatedState(EngineState):
    """Every process holds everything, and owns an equal part.

    Args:
        optimizer: see `EngineState`.
        wholes: see `EngineState`.
        kinds: see `EngineState`.
        masters: what the optimizer updates, by name.
        publish: rounds the masters into the weights, where these are not the same.
        rank: of the process.
        world_size: how many hold the same.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        wholes: dict[nn.Parameter, Whole],
        kinds: Sequence[str],
        *,
        masters: dict[str, Any],
        publish: Any,
        rank: int,
        world_size: int,
    ) -> None:
        super().__init__(optimizer, wholes, kinds)
        self._masters, self._publish = masters, publish
        self._share = (rank, world_size)

    def masters(self) -> list[Tensor]:
        return list(self._masters.values())

    def places(self) -> Iterator[tuple[Whole, int, Tensor, int, int]]:
        for whole in self.wholes.values():
            master = self._masters[whole.name]
            yield whole, whole.start, master, 0, master.numel()

    def owned(self) -> Iterator[Slice]:
        return (item.part(*self._share) for item in self.slices())

    def publish(self) -> None:
        if self._publish is not None:
            self._publish()
