"""What a person should hear of at once: layers whose router no longer chooses."""

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
