"""What the routers carry from one optimizer step to the next."""

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

    def follow(self, load_LE: Tensor, *, steps_left: int) -> None:
        """Takes in the load of a step, over all processes.

        Args:
            load_LE: routed rows per token.
            steps_left: that are still to come.
        """
        self.load_LE = load_LE
        if self._rate == 0:
            return
        limit = self._rate * max(0, steps_left - 1)
        missing_LE = self._even_LE - load_LE
        self.bias_LE = (self.bias_LE + self._rate * missing_LE.sign()).clamp(-limit, limit)
        for router, bias_E in zip(self._routers, self.bias_LE, strict=True):
            router.bias_E = bias_E
