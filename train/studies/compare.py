"""Compare two runs on the same data by the relative gap of their smoothed losses: FP8's test against BF16.

    e_t = decay * e_{t-1} + (1 - decay) * x_t;  ema_t = e_t / (1 - decay^t)     bias-corrected: ema_1 = x_1
    gap_t = (ema_a(t) - ema_b(t)) / ema_b(t)                                    positive: a is worse than b

Paper: arXiv:2412.19437 section 3.3 and appendix B.1: the relative loss error of FP8 against BF16 stays below
0.25 %, both smoothed with decay 0.9. The correction is Adam's, arXiv:1412.6980 section 3. Losses are compared at equal
steps; whether both runs read the same tokens is not checked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from train.observe.metrics import Record

# The report's bound on the relative loss error of FP8 training, arXiv:2412.19437 section 3.3.
PAPER_GAP = 0.0025


def ema(values: Sequence[float], decay: float) -> list[float]:
    """Bias-corrected exponential moving average of one value per step, `decay` in [0, 1).

    A value that is not finite leaves the average where it was; before the first finite one it is NaN.
    """
    if not 0.0 <= decay < 1.0:
        raise ValueError(f"decay is {decay}: it must be at least 0 and below 1")
    total, weight = 0.0, 0.0
    smoothed = []
    for value in values:
        if math.isfinite(value):
            total = decay * total + (1.0 - decay) * value
            weight = decay * weight + (1.0 - decay)
        smoothed.append(total / weight if weight else math.nan)
    return smoothed


def common_steps(run_a: Sequence[Record], run_b: Sequence[Record]) -> list[int]:
    """Steps at which both runs logged a finite `loss/main`, ascending."""
    return sorted(_losses(run_a).keys() & _losses(run_b).keys())


def relative_gap(run_a: Sequence[Record], run_b: Sequence[Record], decay: float = 0.9) -> list[float]:
    """Relative gap of the smoothed main losses of `run_a` to the reference `run_b`.

    Returns:
        One ratio for each of `common_steps(run_a, run_b)`; 0.0025 is 0.25 %.
    """
    steps = common_steps(run_a, run_b)
    smooth_a, smooth_b = (ema([losses[step] for step in steps], decay) for losses in (_losses(run_a), _losses(run_b)))
    return [(a - b) / b if b else math.nan for a, b in zip(smooth_a, smooth_b, strict=True)]


def mean_smoothed_gap(run_a: Sequence[Record], run_b: Sequence[Record], decay: float = 0.9) -> float:
    """Signed mean of `relative_gap` over the second half of the common steps; ValueError if there are none."""
    gaps = relative_gap(run_a, run_b, decay)
    if not gaps:
        raise ValueError("the runs share no step with a finite loss/main: compare runs of one schedule")
    half = gaps[len(gaps) // 2 :]
    return sum(half) / len(half)


def _losses(run: Sequence[Record]) -> dict[int, float]:
    steps = [record["step"] for record in run]
    assert all(a < b for a, b in pairwise(steps)), "step records must be in strictly increasing order"
    return {r["step"]: r["loss/main"] for r in run if math.isfinite(r.get("loss/main", math.nan))}
