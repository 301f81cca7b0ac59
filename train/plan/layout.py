"""A run seen as the arithmetic needs it: sizes, and what one process holds of everything."""

import functools
import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from train.config import MOMENTS, PROBLEMS, QUANTIZED, Config, words_of
from train.plan.weights import Count, Weight, count, weights_of

NF4 = 0.5 + (1 + 4 / 256) / 64
"""Bytes of a weight in four bits: a scale in eight bits for 64 of them, and one in fp32 for 256 of these."""


@dataclass(frozen=True)
class Layout:
    """A configuration on so many processes, a device each.

    Attributes:
        config: of the run.
        processes: in all.
        on_gpu: whether they compute on GPUs, or on the processor.
    """

    config: Config
    processes: int
    on_gpu: bool = True

    @functools.cached_property
    def weights(self) -> list[Weight]:
        """Every parameter of the whole model."""
        return weights_of(self.config)

    @functools.cached_property
    def count(self) -> Count:
        """Of the parameters."""
        return count(self.config, self.weights)

    @property
    def expert_ranks(self) -> int:
        """P, ranks over which a layer's experts are split."""
        return self.config.parallel.expert

    @property
    def zero(self) -> int:
        """What DeepSpeed partitions."""
        return self.config.parallel.zero

    @property
    def bytes(self) -> int:
        """Of a number in `train.precision`: weights and activations."""
        return 2 if self.config.train.precision == "bf16" else 4

    @property
    def moments(self) -> int:
        """Numbers that the optimizer keeps of each element."""
        return len(MOMENTS[self.config.optim.name])

    @property
    def moment_bytes(self) -> int:
        """Of one of these."""
        return 2 if self.config.optim.moments == "bf16" else 4

    @property
    def tokens(self) -> int:
        """T, of a process in one forward pass; of a classifier at most."""
        return self.config.train.micro_batch_size * self.config.data.sequence_length

    @property
    def rows_of_step(self) -> int:
        """The global batch: of all processes in one optimizer step."""
        return self.config.train.micro_batch_size * self.config.train.gradient_accumulation_steps * self.processes

    @property
    def tokens_of_step(self) -> int:
        """Of all processes in one optimizer step."""
        return self.rows_of_step * self.config.data.sequence_length

    @property
    def head_dim(self) -> int:
        """D, given or derived."""
        model = self.config.model
        return model.head_dim or model.hidden_size // model.num_attention_heads

    @property
    def is_classifier(self) -> bool:
        """Whether the head tells labels apart, and forms no logits to speak of."""
        return self.config.data.format in PROBLEMS

    def here(self, weight: Weight) -> int:
        """Elements of a parameter in a process, before ZeRO."""
        return weight.elements // self.expert_ranks if weight.is_expert else weight.elements

    def held(self, weight: Weight) -> float:
        """Elements of a parameter in a process between passes: what ZeRO-3 leaves there of it, or all."""
        here = self.here(weight)
        divided = self.zero == 3 and here >= self.config.parallel.persistent_elements
        return weight.elements / self.processes if divided else here

    def is_quantized(self, weight: Weight) -> bool:
        """Whether a parameter is held in four bits."""
        return self.config.lora.quantize == "nf4" and QUANTIZED.fullmatch(weight.name) is not None

    def owned(self, weight: Weight) -> float:
        """Elements of a parameter whose masters and moments a process has."""
        return weight.elements / self.processes if self.zero else self.here(weight)

    @functools.cached_property
    def trained(self) -> list[Weight]:
        """Those parameters that have a gradient."""
        return [weight for weight in self.weights if weight.trained]

    @functools.cached_property
    def trained_here(self) -> int:
        """Elements with a gradient, in a process before ZeRO."""
        return sum(map(self.here, self.trained))

    def differentiated(self, layer: int) -> list[Weight]:
        """Those that have their gradients when a layer's experts just got theirs: attention comes after the experts."""

        def is_there(weight: Weight) -> bool:
            if weight.layer is None:
                return "embed_tokens" not in weight.name
            return weight.layer > layer or (weight.layer == layer and weight.is_expert)

        return list(filter(is_there, self.trained))

    @functools.cached_property
    def trained_owned(self) -> float:
        """Elements whose masters and moments a process has."""
        return sum(map(self.owned, self.trained))

    @property
    def left_out(self) -> list[str]:
        """What this arithmetic does not know of such a run, in words: it may then need less than is computed."""
        data, train, found = self.config.data, self.config.train, []
        if self.is_classifier or not data.packing:
            found.append("rows are counted at their full length, and may be shorter")
        if self.config.parallel.dispatch != "dropless":
            found.append(f"parallel.dispatch={self.config.parallel.dispatch}: its buffers are DeepSpeed's")
        if all(weight.layer != 0 for weight in self.trained) and not self.trains("embed_tokens"):
            found.append(f"train.only={train.only}: layers below all that is trained keep nothing, and are counted")
        return found

    def trains(self, *parts: str) -> bool:
        """Whether any parameter with one of these parts in its name has a gradient."""
        return any(part in self._trained_names for part in parts)

    @functools.cached_property
    def _trained_names(self) -> str:
        """The names of those parameters, a line each."""
        return "\n".join(weight.name for weight in self.trained)

    @property
    def adapted(self) -> list[str]:
        """The linear layers with adapters."""
        return [word for word in words_of(self.config.lora.targets) if self.config.lora.rank]

    @functools.cached_property
    def groups(self) -> list[list[Weight]]:
        """The optimizer's groups as DeepSpeed flattens them: matrices, vectors, and each kind's experts where split."""
        found: dict[tuple[bool, bool], list[Weight]] = {}
        for weight in self.weights:
            if weight.trained:
                found.setdefault((weight.is_expert and self.expert_ranks > 1, not weight.is_matrix), []).append(weight)
        return [found[kind] for kind in sorted(found)]

    @functools.cached_property
    def longest_run(self) -> int:
        """Elements of the most gradients that come one after the other, all of experts that are split, or none of them.

        ZeRO-3 sums what is in its bucket when the kind changes.
        """
        runs = itertools.groupby(
            sorted(self.trained, key=self._turn), lambda weight: weight.is_expert and self.expert_ranks > 1
        )
        return max((sum(map(self.here, run)) for _, run in runs), default=0)

    def _turn(self, weight: Weight) -> tuple[int, bool]:
        """Sorts by when backward reaches them: from the head down, and of a layer the experts first."""
        if weight.layer is None:
            return (1 if "embed_tokens" in weight.name else -self.config.model.num_hidden_layers), False
        return -weight.layer, not weight.is_expert

    def replicas(self, group: list[Weight]) -> int:
        """Over how many processes ZeRO shares a group out."""
        split = group[0].is_expert and self.expert_ranks > 1
        return self.processes // self.expert_ranks if split else self.processes

    @functools.cached_property
    def touched(self) -> int:
        """Elements of the parameters that lie, with any part, in the partition of the rank that has the most of them.

        ZeRO-1 and 2 keep gradients whole there: a parameter across a border is held on both sides of it.
        """
        partitions = [_touched((self.here(weight) for weight in group), self.replicas(group)) for group in self.groups]
        pairs = list(zip(self.groups, partitions, strict=True))
        return max(sum(sums[self._place(group, rank)] for group, sums in pairs) for rank in range(self.processes))

    def _place(self, group: list[Weight], rank: int) -> int:
        split = group[0].is_expert and self.expert_ranks > 1
        return rank // self.expert_ranks if split else rank


def _touched(sizes: Iterable[int], partitions: int) -> list[int]:
    """Sums, for each of equal partitions of what lies end to end, the whole sizes of all that reaches into it."""
    sizes = list(sizes)
    each, start, sums = -(-sum(sizes) // partitions), 0, [0] * partitions
    for size in sizes:
        for partition in range(start // each, (start + size - 1) // each + 1):
            sums[partition] += size
        start += size
    return sums
