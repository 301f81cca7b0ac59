"""What a person should hear of at once: layers whose router no longer chooses, or no longer chooses as it did."""

from train.config import Config, router_is_trained

COLLAPSED_SHARE = 0.95


def collapsed_layers(expert_load: list[list[float]], top_k: int) -> dict[int, float]:
    """Finds the layers that send nearly all rows to the same K experts, and the share that they send there.

    Args:
        expert_load: of each layer, each expert's share of the rows.
        top_k: K; with K experts in all there is nothing to choose, and no alarm.
    """
    shares = {layer: sum(sorted(load)[-top_k:]) for layer, load in enumerate(expert_load) if len(load) > top_k}
    return {layer: share for layer, share in shares.items() if share >= COLLAPSED_SHARE}


class CollapseAlarm:
    """Turns loads into lines, one when a layer collapses and one when it has recovered."""

    def __init__(self, top_k: int) -> None:
        self._top_k = top_k
        self._collapsed: set[int] = set()

    def hear(self, step: int, expert_load: list[list[float]]) -> list[str]:
        """Returns the lines that a step's load gives cause for."""
        now = collapsed_layers(expert_load, self._top_k)
        lines = [
            f"ALARM step {step}: layer {layer} sends {share:.0%} of its rows to the same {self._top_k} of "
            f"{len(expert_load[layer])} experts; raise model.router_aux_loss_coef or lower optim.lr"
            for layer, share in now.items()
            if layer not in self._collapsed
        ]
        lines += [f"step {step}: layer {layer} has recovered" for layer in sorted(self._collapsed - now.keys())]
        self._collapsed = set(now)
        return lines


def against_drift(config: Config) -> str:
    """Says what to do in a run whose routing moves too far."""
    if router_is_trained(config):
        return "lower optim.lr, raise train.router_drift_coef, or freeze the routers (by lora.targets or train.only)"
    return "lower optim.lr, or train less of what comes before the routers (by lora.targets or train.only)"


class DriftAlarm:
    """Turns agreements with the base's routing into lines, one when a layer's is too small and one when it is not.

    Args:
        least: agreement that is none; None for never.
        advice: what to do.
    """

    def __init__(self, least: float | None, advice: str) -> None:
        self._least, self._advice = least, advice
        self._drifted: set[int] = set()

    def hear(self, step: int, agreement: list[float]) -> list[str]:
        """Returns the lines that each layer's agreement gives cause for."""
        if self._least is None:
            return []
        now = {layer: share for layer, share in enumerate(agreement) if share < self._least}
        lines = [
            f"ALARM step {step}: layer {layer} makes {share:.0%} of the choices that it made at the start, less than "
            f"evaluate.router_agreement_alarm={self._least:g}; {self._advice}"
            for layer, share in now.items()
            if layer not in self._drifted
        ]
        lines += [f"step {step}: layer {layer} has come back" for layer in sorted(self._drifted - now.keys())]
        self._drifted = set(now)
        return lines
