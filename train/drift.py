"""How far a run's routing has moved from that of the model it started from.

Shape letters: see `mixtral/modeling.py`.
"""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mixtral.losses import router_divergence
from mixtral.moe import Router, Routing
from mixtral.weights.names import unwrapped
from train.config import Config, routing_can_move
from train.data.loader import Data
from train.data.share import Share
from train.errors import CheckpointError
from train.lora import AdaptedRouter
from train.objective import predict
from train.parallel.engine import Engine


class Routed(NamedTuple):
    """Where a batch's tokens went.

    Attributes:
        logits: L tensors (T, E), raw.
        experts: L tensors (T, K), the routed indices.
        token_mask_T: false for padding.
    """

    logits: tuple[Tensor, ...]
    experts: tuple[Tensor, ...]
    token_mask_T: Tensor


class BaseRouter(NamedTuple):
    """A router as a run began with it.

    Attributes:
        weight_EH: of its logits.
        adapter: A (r, H), B (E, r) and the scale of what an adapter adds to them; None without one.
    """

    weight_EH: Tensor
    adapter: tuple[Tensor, Tensor, float] | None

    @torch.no_grad()
    def logits(self, x_TH: Tensor) -> Tensor:
        """Scores every expert as `Router` does, without dropout."""
        x_TH = x_TH.to(torch.promote_types(x_TH.dtype, torch.float32))
        with torch.autocast(x_TH.device.type, enabled=False):
            logits_TE = F.linear(x_TH, self.weight_EH.to(x_TH.dtype))
            if self.adapter is None:
                return logits_TE
            a_rH, b_Er, scale = self.adapter
            return logits_TE + scale * F.linear(F.linear(x_TH, a_rH.to(x_TH.dtype)), b_Er.to(x_TH.dtype))


class Drift:
    """Compares the routing of held-out rows, always the same ones, with the base's: the model that a run starts from.

    The base is not held, but what it said of the rows: each process keeps that of its own. Nor is that saved. A run
    that goes on fills its engine with the base's weights first, as one that starts does, and only then with a
    checkpoint's: in between, this must be built. It costs a forward pass over these rows, and is exact in every layout,
    whichever saved the checkpoint. That has a hash of the base's routers alone, by which another base is told apart.

    Where the drift is held down, the base's routers themselves are kept, E x H numbers a layer, and asked about what
    enters the trained ones in each training pass. What moves before a router moves what both are asked about.

    Args:
        engine: that holds the base.
        config: of the run.
        data: whose held-out rows are taken.
    """

    def __init__(self, engine: Engine, config: Config, data: Data) -> None:
        self._engine, self._data = engine, data
        self._source = config.model.init_from
        self._way_out = "" if config.train.router_drift_coef else ", or set evaluate.router_drift_tokens=0"
        size = config.evaluate.micro_batch_size or config.train.micro_batch_size
        self._share = Share(engine.rank, engine.world_size, size)
        self._rows = -(-config.evaluate.router_drift_tokens // config.data.sequence_length)
        weights = router_weights(engine)
        self._digest = digest_of(weights)
        self._base = list(self._routed()) if self._rows else []
        self._base_logits: list[Tensor] | None = None
        if config.train.router_drift_coef > 0:
            self._ask(weights)

    @classmethod
    def of(cls, engine: Engine, config: Config, data: Data) -> "Drift | None":
        """Builds what a run asks for; None where its routing cannot move from given weights', or nobody asks."""
        asked = config.evaluate.router_drift_tokens > 0 or config.train.router_drift_coef > 0
        return cls(engine, config, data) if asked and routing_can_move(config) else None

    @torch.no_grad()
    def figures(self) -> dict[str, Any]:
        """Compares the model with the base; every process takes part.

        Returns:
            Nothing without rows; else `router_agreement`, of each layer the share of tokens' choices of experts that
            are among the base's, and `router_kl`, the mean over tokens of KL(base || now) of the routers'
            distributions, in nats, over `router_drift_tokens` tokens of all processes.
        """
        if not self._rows:
            return {}
        sums = []
        for now, base in zip(self._routed(), self._base, strict=True):
            logits, base_logits = ([one.double() for one in routed.logits] for routed in (now, base))
            mask_T = now.token_mask_T
            agreement_L, kl_L = agreement(now, base), router_divergence(logits, base_logits, mask_T)
            sums.append(torch.cat([agreement_L, kl_L, mask_T.sum()[None].double()]))
        *figures, tokens = self._engine.sum(torch.stack(sums).sum(dim=0)).tolist()
        figures = [figure / max(1.0, tokens) for figure in figures]
        layers = len(figures) // 2
        compared = {"router_agreement": figures[:layers], "router_kl": figures[layers:]}
        return compared | {"router_drift_tokens": int(tokens)}

    @torch.no_grad()
    def _routed(self) -> Iterator[Routed]:
        """Runs the model on this process's rows."""
        self._engine.module.eval()
        for batch in self._data.evaluation(self._share, most=self._rows):
            placed = self._engine.place(batch)
            output = predict(self._engine.module, placed, divisor=1, routing=True)
            assert output.router_logits is not None
            assert output.expert_indices is not None
            yield Routed(output.router_logits, output.expert_indices, placed.token_mask.flatten())

    def _ask(self, weights: dict[str, Tensor]) -> None:
        """Has the base's routers asked whenever the trained ones are, in training."""
        routers = routers_of(self._engine)
        self._base_logits = logits = [torch.empty(0)] * len(routers)

        def asking(layer: int, base: BaseRouter) -> Callable[[Router, tuple[Tensor, ...], Routing], None]:
            def ask(router: Router, inputs: tuple[Tensor, ...], _: Routing) -> None:
                if router.training:
                    logits[layer] = base.logits(inputs[0])

            return ask

        for layer, (name, router) in enumerate(routers.items()):
            adapter = None
            if isinstance(router, AdaptedRouter):
                a_rH, b_Er = (weights[f"{name}.lora_{side}.weight"] for side in "AB")
                adapter = a_rH, b_Er, router.scale
            router.register_forward_hook(asking(layer, BaseRouter(weights[f"{name}.weight"], adapter)))

    def base_logits(self) -> list[Tensor] | None:
        """Gives what the base's routers say of the last training pass: L tensors (T, E); None where nobody asks."""
        return None if self._base_logits is None else list(self._base_logits)

    def state(self) -> dict[str, Any]:
        """Describes the base."""
        return {"routers": self._digest}

    def restore(self, state: dict[str, Any]) -> None:
        """Makes sure that the base is the one that `state` described.

        Raises:
            CheckpointError: when it is another.
        """
        if state["routers"] != self._digest:
            raise CheckpointError(
                f"model.init_from={self._source} has other routers than when the run began, so its drift from them "
                f"cannot be told: bring those weights back{self._way_out}"
            )


def agreement(now: Routed, base: Routed) -> Tensor:
    """Sums over tokens the share of their K experts that the base chose too: (L,)."""
    layers = []
    for experts_TK, base_TK in zip(now.experts, base.experts, strict=True):
        share_T = (experts_TK[:, :, None] == base_TK[:, None, :]).any(dim=-1).double().mean(dim=-1)
        layers.append((share_T * now.token_mask_T).sum())
    return torch.stack(layers)


def routers_of(engine: Engine) -> dict[str, Router]:
    """Finds the routers of an engine's model, by the names that nothing wraps, layer by layer."""
    return {unwrapped(name): module for name, module in engine.module.named_modules() if isinstance(module, Router)}


def router_weights(engine: Engine) -> dict[str, Tensor]:
    """Copies the routers' weights, their adapters' too, by name; every process must call it, and has all of them."""
    names = [f"{name}.{part}" for name, router in routers_of(engine).items() for part, _ in router.named_parameters()]
    return {name: values.clone() for name, values in engine.local("weights", names)}


def digest_of(weights: dict[str, Tensor]) -> str:
    """Hashes weights, in the order of their names."""
    digest = hashlib.sha256()
    for _, values in sorted(weights.items()):
        digest.update(values.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
