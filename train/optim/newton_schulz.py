"""Muon's iteration in numbers: coefficients, products, FLOPs; no torch, so that plans share it.

    x <- a x + (b g + c g g) x,   g = x x^T          STEPS times, x [smaller, larger]

Paper: arXiv:2502.16982 §2.1. `orthogonalize` of `train/optim/muon.py` runs it.
"""

from __future__ import annotations

# Quintic a x + b x^3 + c x^5, that takes singular values from (0, 1] to about 1, between 0.7 and 1.2, in five steps.
COEFFICIENTS, STEPS = (3.4445, -4.7750, 2.0315), 5


def products_of_step(rows: int, cols: int) -> tuple[tuple[int, int, int], ...]:
    """(m, n, k) of the products [m, k] x [k, n] of one step: the gram matrix, its square, and that times x."""
    small, large = sorted((rows, cols))
    return (small, small, large), (small, small, small), (small, large, small)


def orthogonalize_flops(rows: int, cols: int) -> int:
    """Multiplications and additions of all steps: 5 (4 m^2 n + 2 m^3) with the smaller side m."""
    return STEPS * sum(2 * m * n * k for m, n, k in products_of_step(rows, cols))
