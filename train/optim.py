"""Optimizers, their parameter groups, master weights, and the learning rate over the steps."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from mixtral.weights.names import trained_parameters
from train.config import MOMENTS, OptimConfig, ScheduleConfig

NORM_BLOCK = 4096
UPDATE_BLOCK = 2**20
"""Of so many elements at a time, moments of bf16 are there in fp32."""
PART = 2**24
"""When so many elements of gradients are there in fp32, they are used before there are more."""


def build_optimizer(parameters: Mapping[str, Tensor], config: OptimConfig) -> torch.optim.Optimizer:
    """Builds the optimizer; matrices decay, norms do not.

    Args:
        parameters: what is updated, by name.
        config: of the optimizer.
    """
    decayed: dict[bool, list[Tensor]] = {True: [], False: []}  # DeepSpeed takes no empty group
    for parameter in parameters.values():
        shape = getattr(parameter, "ds_shape", parameter.shape)  # DeepSpeed's, of a parameter in parts
        decayed[len(shape) >= 2].append(parameter)
    decay = {True: config.weight_decay, False: 0.0}
    groups = [{"params": members, "weight_decay": decay[matrices]} for matrices, members in decayed.items() if members]
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr)
    kind = AdamWInHalf if config.moments == "bf16" else torch.optim.AdamW
    return kind(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


class AdamWInHalf(torch.optim.AdamW):
    """AdamW that keeps its moments in bf16, as DeepSeek-V3 was trained; source: arXiv 2412.19437, section 3.3.3.

    Each update is PyTorch's own, in fp32, of moments that were rounded after the one before it.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Updates every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        kinds = MOMENTS["adamw"]
        if not self.state[parameter]:
            begin_state(self, [parameter], kinds, 0)
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        space = parameter.new_empty(2, min(UPDATE_BLOCK, parameter.numel()))
        parts = [x.view(-1).split(UPDATE_BLOCK) for x in (parameter, parameter.grad, *(state[kind] for kind in kinds))]
        for value, gradient, *rounded in zip(*parts, strict=True):
            first, second = (wide[: len(value)].copy_(one) for wide, one in zip(space, rounded, strict=True))
            adamw(
                [value],
                [gradient],
                [first],
                [second],
                max_exp_avg_sqs=[],
                state_steps=[state["step"].clone()],
                fused=True,
                beta1=beta1,
                beta2=beta2,
                **{name: group[name] for name in ("amsgrad", "lr", "weight_decay", "eps", "maximize")},
            )
            for one, wide in zip(rounded, (first, second), strict=True):
                one.copy_(wide)
        state["step"] += 1


def begin_state(
    optimizer: torch.optim.Optimizer, tensors: Sequence[Tensor], kinds: Sequence[str], updates: int
) -> None:
    """Gives an optimizer the state that it has after so many updates, with moments of zero.

    Args:
        optimizer: any of `build_optimizer`.
        tensors: that it updates.
        kinds: of its moments, see `MOMENTS`.
        updates: how many.
    """
    dtype = torch.bfloat16 if isinstance(optimizer, AdamWInHalf) else None
    for tensor in tensors if kinds else ():
        optimizer.state[tensor] = {
            "step": torch.tensor(float(updates), device=tensor.device),
            **{kind: torch.zeros_like(tensor, dtype=dtype, requires_grad=False) for kind in kinds},
        }


def updates_of(optimizer: torch.optim.Optimizer) -> int:
    """Reads how many updates an optimizer with moments has made; one without keeps no count, and 0 is returned."""
    counts = {int(state["step"]) for state in optimizer.state.values() if "step" in state}
    assert len(counts) <= 1, f"parameters were updated {sorted(counts)} times"
    return counts.pop() if counts else 0


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Computes the norm of tensors as of one vector, in fp64 over blocks.

    On a CPU the fp32 norm of a whole matrix of 8 million elements is off by 2e-4: it adds small squares to a large sum.
    """
    parts = []
    for tensor in tensors:
        flat, dtype = tensor.flatten(), torch.promote_types(tensor.dtype, torch.float32)
        whole = len(flat) // NORM_BLOCK * NORM_BLOCK
        blocks = torch.linalg.vector_norm(flat[:whole].view(-1, NORM_BLOCK), dim=1, dtype=dtype)
        parts += [blocks, torch.linalg.vector_norm(flat[whole:], dtype=dtype)[None]]
    return torch.cat(parts).double().norm()


class MasterWeights:
    """fp32 copies of a bf16 model's trained parameters, which the optimizer updates.

    Updates smaller than half a bf16 step would be lost in bf16 weights; here they add up. Gradients are
    accumulated in fp32 as well; those of a single pass stay the model's, and are widened as they are used.

    Attributes:
        by_name: the copies, by parameter name.
        pairs: of a parameter and its copy, in the model's order.
    """

    def __init__(self, model: nn.Module) -> None:
        trained = trained_parameters(model)
        self.by_name = {
            name: parameter.detach().to(torch.float32, copy=True).requires_grad_()
            for name, parameter in trained.items()
        }
        self.pairs = [(parameter, self.by_name[name]) for name, parameter in trained.items()]
        self._of = dict(self.pairs)

    def collect_gradients(self) -> None:
        """Adds the model's gradients to those of the copies."""
        for parameter, _ in self.pairs:
            self.collect(parameter)

    def collect(self, parameter: nn.Parameter) -> None:
        """Adds a parameter's gradient, if it has one, to that of its copy, and lets go of it."""
        master = self._of[parameter]
        if parameter.grad is None:
            return
        if master.grad is None:
            master.grad = parameter.grad.float()
        else:
            master.grad += parameter.grad
        parameter.grad = None

    @property
    def has_collected(self) -> bool:
        """Whether the copies have gradients."""
        return any(master.grad is not None for _, master in self.pairs)

    def gradients(self) -> list[Tensor]:
        """Gives the gradients, of the copies or of the model, wherever they are."""
        pairs = [[one.grad for one in pair if one.grad is not None] for pair in self.pairs]
        return [gradient for pair in pairs for gradient in pair]

    def parts(self) -> Iterator[list[Tensor]]:
        """Yields copies with their gradients, a part at a time; these are gone when the next part is asked for.

        No other copy has a gradient meanwhile, since an optimizer updates all that have one. So what was collected is
        one part.
        """
        most = math.inf if self.has_collected else PART
        part: list[Tensor] = []
        for number, (parameter, master) in enumerate(self.pairs, start=1):
            self.collect(parameter)
            part.append(master)
            if number == len(self.pairs) or sum(one.numel() for one in part) >= most:
                yield part
                for one in part:
                    one.grad = None
                part = []

    @torch.no_grad()
    def publish(self) -> None:
        """Rounds the copies into the model."""
        for parameter, master in self.pairs:
            parameter.copy_(master)


def warm_up_warning(max_steps: int, lr: float, config: ScheduleConfig) -> str | None:
    """Says that a run is over before its warm-up is; None of a run that is not."""
    if config.warmup_steps < max_steps:
        return None
    reached = learning_rate(max_steps, max_steps, lr, config)
    return (
        f"WARNING schedule.warmup_steps={config.warmup_steps}, but the run has {max_steps} steps: its learning rate "
        f"only rises, to {reached:g} of optim.lr={lr:g}; lower schedule.warmup_steps, or give more steps"
    )


def learning_rate(step: int, max_steps: int, peak: float, config: ScheduleConfig) -> float:
    """Gives the learning rate of a step.

    Linear from 0 to the peak over `warmup_steps`, then by `config.name`; the last step has
    `min_lr_ratio` times the peak.

    Args:
        step: counted from 1.
        max_steps: the last step.
        peak: the highest rate.
        config: of the schedule.
    """
    if step <= config.warmup_steps:
        return peak * step / config.warmup_steps
    start = config.warmup_steps
    if config.name == "warmup_stable_decay":
        start = max(start, max_steps - round(config.decay_fraction * max_steps))
    progress = max(0.0, (step - start) / max(1, max_steps - start))
    shape = {
        "constant": 1.0,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
        "linear": 1 - progress,
        "warmup_stable_decay": 1 - progress,
    }[config.name]
    if config.name == "constant":
        return peak
    return peak * (config.min_lr_ratio + (1 - config.min_lr_ratio) * shape)
