"""Large numbers for a reader."""

from __future__ import annotations


def amount(value: float) -> str:
    """1234567 -> '1.23 M'."""
    for scale, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {letter}"
    return f"{value:.3g}"
