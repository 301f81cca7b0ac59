"""What the routers carry from one optimizer step to the next."""

from typing import Any

import torch
from torch import Tensor

from mixtral.modeling import MixtralPreTrainedModel as Model
from mixtral.moe import Router
from train.objective import uniform_load


class Balance:
    """The load of the step before and, where it is asked for, a bias per expert that moves against it.

    The bias follows arXiv 2408.15664, algorithm 1. A published Mixtral has none, so no bias may be larger than the
    steps that are left can take back: the last step trains without.

    Args:
        model: whose routers take the bias.
        rate: by how much a bias moves after a step; 0 sets none.
        device: of the tensors.

    Attributes:
        load_LE: routed rows per token.
        bias_LE: added to the routers' probabilities.
    """

    def __init__(self, model: Model, rate: float, device: torch.device) -> None:
        self.load_LE = self._even_LE = uniform_load(model.config, device)
        self.bias_LE = torch.zeros_like(self.load_LE)
        self._rate = rate
        self._routers = [module for module in model.modules() if isinstance(module, Router)]

    def state(self) -> dict[str, Any]:
        """Describes what the next step depends on."""
        return {"load": self.load_LE.tolist(), "bias": self.bias_LE.tolist()}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes up what `state` described."""
        self.load_LE = torch.tensor(state["load"], dtype=self.load_LE.dtype, device=self.load_LE.device)
        self._set_bias(torch.tensor(state["bias"], dtype=self.bias_LE.dtype, device=self.bias_LE.device))

    def _set_bias(self, bias_LE: Tensor) -> None:
        self.bias_LE = bias_LE
        if self._rate > 0:
            for router, bias_E in zip(self._routers, bias_LE, strict=True):
                router.bias_E = bias_E

    def follow(self, load_LE: Tensor | None, *, steps_left: int) -> None:
        """Takes in the load of a step, over all processes.

        Args:
            load_LE: routed rows per token; None of a step that was skipped, which changes neither load nor bias, but
                for what of it the steps that are left could not take back.
            steps_left: that are still to come.
        """
        moved_LE = self.bias_LE
        if load_LE is not None:
            self.load_LE = load_LE
            moved_LE = moved_LE + self._rate * (self._even_LE - load_LE).sign()
        if self._rate > 0:
            limit = self._rate * max(0, steps_left - 1)
            self._set_bias(moved_LE.clamp(-limit, limit))
