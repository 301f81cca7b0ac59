"""Masters and moments where DeepSpeed keeps them, one adapter for each way it does.

All names here are private to DeepSpeed; tests/train/test_contract.py says when one has moved.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

from train.parallel.state import EngineState, Whole


def zero_state(optimizer: Any, wholes: dict[nn.Parameter, Whole], kinds: Sequence[str]) -> EngineState:
    """Opens what DeepSpeed's optimizer partitions over the processes.

    Args:
        optimizer: of DeepSpeed's engine.
        wholes: see `EngineState`.
        kinds: see `EngineState`.
    """
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return WeightsPartitioned(optimizer, wholes, kinds)
    if isinstance(optimizer, BF16_Optimizer):  # ZeRO-1 in bf16
        return StatePartitioned(optimizer, wholes, kinds, optimizer.fp32_groups_flat_partition)
    assert isinstance(optimizer, DeepSpeedZeroOptimizer), type(optimizer)
    return StatePartitioned(optimizer, wholes, kinds, optimizer.single_partition_of_fp32_groups)


class StatePartitioned(EngineState):
    """ZeRO-1 and 2: each group of parameters is one flat tensor, of which a process keeps the masters of a part.

    Args:
        zero: DeepSpeed's optimizer.
        wholes: see `EngineState`.
        kinds: see `EngineState`.
        partitions: the masters of this process's part of each group.
    """

    def __init__(
        self, zero: Any, wholes: dict[nn.Parameter, Whole], kinds: Sequence[str], partitions: list[Tensor]
    ) -> None:
        super().__init__(zero.optimizer, wholes, kinds)
        self._zero, self._partitions = zero, partitions

    def masters(self) -> list[Tensor]:
        return self._partitions

    def places(self) -> Iterator[tuple[Whole, int, Tensor, int, int]]:
        parameter: Any
        for parameter, whole in self.wholes.items():
            mapping = parameter._hp_mapping
            if mapping is not None:  # or it lies in other processes' parts alone
                here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
                master = self._partitions[mapping.param_group_index]
                yield whole, whole.start + here.start, master, there.start, there.numel

    def publish(self) -> None:
        self._zero.update_lp_params()


class WeightsPartitioned(EngineState):
    """ZeRO-3: each parameter is cut into equal parts, the last padded, and the parts lie in flat groups."""

    def __init__(self, zero: Any, wholes: dict[nn.Parameter, Whole], kinds: Sequence[str]) -> None:
        super().__init__(zero.optimizer, wholes, kinds)
        self._zero = zero

    def masters(self) -> list[Tensor]:
        partitions: list[Tensor] = self._zero.fp32_partitioned_groups_flat
        return partitions

    def places(self) -> Iterator[tuple[Whole, int, Tensor, int, int]]:
        parameter: Any
        for parameter, whole in self.wholes.items():
            group, offset, size = self._zero.grad_position[self._zero.get_param_id(parameter)]
            first = self._zero._get_param_partition_rank(parameter) * size
            yield whole, whole.start + first, self.masters()[group], offset, min(size, parameter.ds_numel - first)

    def slices(self) -> Iterator[Any]:
        return (item for item in super().slices() if item.values.numel() > 0)

    def publish(self) -> None:
        self._zero.checkpoint_event_prologue()
        for group in range(len(self._zero.fp16_groups)):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        self._zero.checkpoint_event_epilogue()
