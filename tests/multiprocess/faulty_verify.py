"""Runs `verify` with a fault planted: `python -m tests.multiprocess.faulty_verify FAULT WORDS...`."""

import functools
import math
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

WORLD, RANK = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))


def wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Replaces a function by `around(function, *arguments)`."""
    setattr(owner, name, functools.partial(around, getattr(owner, name)))


def scale_gradients(chosen: str, factor: float) -> None:
    """Scales the gradients of parameters by their names, before anything reduces them."""
    import train.parallel.zero as zero

    def fill(original: Any, *arguments: Any) -> Any:
        for name, parameter in original(*arguments):
            if chosen in name and parameter.requires_grad:
                parameter.register_hook(lambda gradient: gradient * factor)
            yield name, parameter

    wrap(zero, "fill", fill)


def expert_gradients_times_ranks() -> None:
    scale_gradients(".experts.", WORLD)


def router_gradient_not_reduced() -> None:
    scale_gradients(".gate.", 1.0 if RANK == 0 else 0.0)


def norm_averaged_over_ranks() -> None:
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    original = DeepSpeedZeroOptimizer.scaled_global_norm
    DeepSpeedZeroOptimizer.scaled_global_norm = lambda self, **kwargs: original(self, **kwargs) / math.sqrt(WORLD)


def router_loss_times_world() -> None:
    import train.objective as objective

    wrap(objective, "load_balancing_loss", lambda original, *arguments: 2 * original(*arguments))


def experts_swapped_in_export() -> None:
    from mixtral.weights.write import HubWriter

    original = HubWriter.add_parameter
    swapped = {0: 1, 1: 0}
    HubWriter.add_parameter = lambda self, name, tensor, experts: original(
        self, name, tensor, [swapped.get(expert, expert) for expert in experts]
    )


def window_off_by_one() -> None:
    import mixtral.attention as attention

    def mask(original: Any, *, config: Any, **kwargs: Any) -> Any:
        wider = type(config).from_dict(config.to_dict())
        wider.sliding_window, wider._attn_implementation = config.sliding_window + 1, config._attn_implementation
        return original(config=wider, **kwargs)

    wrap(attention, "create_sliding_window_causal_mask", mask)


def packed_row_sees_its_neighbour() -> None:
    import mixtral.attention as attention

    def mask(original: Any, **kwargs: Any) -> Any:
        return original(**kwargs | {"position_ids": None})

    wrap(attention, "create_causal_mask", mask)


FAULTS: dict[str, Callable[[], None]] = {
    function.__name__: function
    for function in (
        expert_gradients_times_ranks,
        router_gradient_not_reduced,
        norm_averaged_over_ranks,
        router_loss_times_world,
        experts_swapped_in_export,
        window_off_by_one,
        packed_row_sees_its_neighbour,
    )
}

if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    from train.cli import main

    FAULTS[sys.argv[1]]()
    sys.exit(main(["verify", *sys.argv[2:]]))
