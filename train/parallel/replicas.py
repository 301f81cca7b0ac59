"""Whether what several processes hold alike is alike: a flipped bit is found, and named, before it is saved."""

from collections import Counter
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from mixtral.weights.names import is_stacked
from train.errors import NumericsError
from train.parallel.engine import Engine

BLOCK = 2**20
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
STEP = 0x1E3779B97F4A7C15  # odd, as any factor is, so that no bit is lost modulo 2^64


class Replicas:
    """Compares, now and then, hashes of what each process holds as others do.

    Args:
        engine: prepared.
        every: steps between comparisons; None makes none.
        step: that the run goes on after.
    """

    def __init__(self, engine: Engine, every: int | None, step: int) -> None:
        self._engine, self._every, self._step = engine, every, step

    def begin_update(self) -> None:
        """Compares if the step about to be taken is one to compare at; every process must call it at every step.

        An update at ZeRO-1 and 2 writes the weights anew, so a flipped bit is to be seen before.

        Raises:
            NumericsError: see `compare`.
        """
        self._step += 1
        if self._every is not None and self._step % self._every == 0:
            self.compare()

    def compare(self) -> None:
        """Compares; every process must call it.

        Raises:
            NumericsError: on every process, naming the tensor and the processes where it is not what it is elsewhere.
        """
        engine = self._engine
        if self._every is None or engine.world_size == 1:
            return
        held = dict(engine.replicas())
        hashes = torch.stack([hashed(tensor) for tensor in held.values()]).tolist() if held else []
        of_ranks = engine.gather(dict(zip(held, hashes, strict=True)))
        for name in held:
            for ranks in holders(name, engine.world_size, engine.expert_ranks):
                odd = odd_ones({rank: of_ranks[rank][name] for rank in ranks})
                if odd:
                    others = [rank for rank in ranks if rank not in odd]
                    which = f"that of {_words(odd)} is not that of {_words(others)}"
                    raise NumericsError(
                        f"step {self._step}: {name} is not the same on the processes that hold it: "
                        f"{which if others else f'{_words(odd)} differ, and no majority says which is right'}; a bit "
                        "has flipped, or the hosts compute differently: leave that host out, and go on from the last "
                        "checkpoint"
                    )


def hashed(tensor: Tensor) -> Tensor:
    """Hashes a tensor into 64 bits, where it lies; any change of one element changes the hash.

    The elements, as integers, are added up modulo 2^64, each times an odd number of its own.
    """
    flat = tensor.detach().reshape(-1)
    flat = flat.view(INTEGERS[flat.element_size()])
    odd = 2 * torch.arange(min(BLOCK, len(flat)), device=flat.device) + 1
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for block in flat.split(BLOCK):
        total = total * STEP + (block * odd[: len(block)]).sum()
    return total


def holders(name: str, processes: int, expert_ranks: int) -> Iterator[range]:
    """Yields the processes that hold a tensor alike: all, or of what is split over a group, those of each place."""
    places = expert_ranks if is_stacked(name) else 1
    for place in range(places):
        yield range(place, processes, places)


def odd_ones(hashes: Mapping[int, int]) -> list[int]:
    """Names the processes that do not agree with the majority; all of them where there is none."""
    (common, count), *others = Counter(hashes.values()).most_common()
    if not others:
        return []
    return [rank for rank, found in hashes.items() if 2 * count <= len(hashes) or found != common]


def _words(ranks: list[int]) -> str:
    return f"process{'es' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
