"""Numbers for people. Nothing here imports torch."""


def count(number: float) -> str:
    """Writes a count: 46.7 B, 12.9 M, 340."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f}"
