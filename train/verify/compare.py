"""The rows of a certificate: what was expected, what came, and how far apart they are."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from mixtral.weights.names import is_stacked
from train.parallel.engine import Piece

Values = dict[str, Tensor]
SCALE_BOUND = 0.1  # whatever rounding does to a gradient, it does not double or lose it


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        name: what was compared.
        kind: to which group it belongs.
        max_rel: the norm of the difference over the norm of what is expected, the worst of its parts.
        scale: the factor by which the expected values come closest in least squares, of the worst part.
        bound: on `max_rel` and, up to `SCALE_BOUND`, on the distance of `scale` from one.
        ok: whether it holds.
    """

    name: str
    kind: str
    max_rel: float
    scale: float
    bound: float
    ok: bool


@dataclass
class Bounds:
    """How far a layout may be off: a constant, or twice what one process in the recipe's precision is off."""

    constant: float
    plain: dict[str, float] = field(default_factory=dict)

    def of(self, name: str) -> float:
        """Gives the bound of a row."""
        return max(self.constant, 2 * self.plain.get(name, 0.0))


@dataclass
class Comparison:
    """Collects rows, in the order of the parameters."""

    rows: list[Row] = field(default_factory=list)

    def scalar(self, name: str, kind: str, got: float, expected: float, bounds: Bounds) -> None:
        """Compares a number."""
        self._add(name, kind, [(abs(got - expected) / abs(expected), got / expected)], bounds.of(name))

    def pieces(
        self,
        name: str,
        kind: str,
        pieces: Iterable[Piece],
        expected: Values,
        bounds: Bounds,
        start: Values | None = None,
    ) -> None:
        """Compares parameters as they come, or their distance from where they started."""
        parts: dict[str, list[tuple[float, float]]] = {}
        missing = {(key, expert) for key, tensor in expected.items() for expert in _experts_of(key, tensor)}
        rounding: dict[str, float] = {}
        elsewhere = False
        whole = math.sqrt(sum(tensor.square().sum().item() for tensor in expected.values()))
        for piece in pieces:
            if piece.tensor is None:
                elsewhere = True
                continue
            missing.remove((piece.name, piece.expert))  # once, and nothing else
            wanted, got = _part(expected[piece.name], piece), piece.tensor.detach().double().cpu()
            floor = 0.0
            if start is not None:
                origin = _part(start[piece.name], piece)
                wanted, got = wanted - origin, got - origin
                floor = 2**-22 * origin.norm().item() / max(wanted.norm().item(), 1e-30)
            parts.setdefault(piece.name, []).append(_distance(got, wanted, whole))
            rounding[piece.name] = max(rounding.get(piece.name, 0.0), floor)
        for parameter, _ in set() if elsewhere else missing:
            parts.setdefault(parameter, []).append((1.0, 0.0))  # nothing came of it
        for parameter, found in parts.items():
            group = "expert" if ".experts." in parameter else "router" if ".gate." in parameter else "dense"
            bound = bounds.of(f"{name}/{parameter}") + rounding.get(parameter, 0.0)
            self._add(f"{name}/{parameter}", f"{kind}:{group}", found, bound)

    def _add(self, name: str, kind: str, parts: list[tuple[float, float]], bound: float) -> None:
        worst = max(parts, key=lambda part: part[0] if math.isfinite(part[0]) else math.inf)
        ok = all(error <= bound and abs(scale - 1) <= min(bound, SCALE_BOUND) for error, scale in parts)
        self.rows.append(Row(name, kind, worst[0], worst[1], bound, ok))


def _experts_of(name: str, tensor: Tensor) -> Iterable[int | None]:
    return range(len(tensor)) if is_stacked(name) else (None,)


def _part(tensor: Tensor, piece: Piece) -> Tensor:
    return tensor if piece.expert is None else tensor[piece.expert]


def _distance(got: Tensor, expected: Tensor, whole: float) -> tuple[float, float]:
    """Relative error and least-squares scale; what should be zero is measured against the whole."""
    norm = expected.norm().item()
    if norm <= 1e-9 * whole:
        return (got - expected).norm().item() / max(whole, 1e-30), 1.0
    return (got - expected).norm().item() / norm, ((got * expected).sum() / norm**2).item()


def table(rows: list[Row]) -> str:
    """Lays rows out by kind, the worst of each, and then every one that does not hold."""
    lines = [f"{'':<26}{'compared':>9}{'worst error':>13}{'its scale':>12}{'bound':>10}"]
    for kind in dict.fromkeys(row.kind for row in rows):
        members = [row for row in rows if row.kind == kind]
        worst = max(members, key=lambda row: row.max_rel / row.bound if math.isfinite(row.max_rel) else math.inf)
        held = "ok" if all(row.ok for row in members) else "OUT OF BOUNDS"
        lines.append(
            f"{kind:<26}{len(members):>9}{worst.max_rel:>13.2e}{worst.scale:>12.8f}{worst.bound:>10.1e}  {held}"
        )
    lines += [
        f"  {row.name}: error {row.max_rel:.2e}, scale {row.scale:.8f}, bound {row.bound:.1e}"
        for row in rows
        if not row.ok
    ]
    return "\n".join(lines)
