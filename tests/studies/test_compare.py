"""Smoothing and the relative gap, against numbers worked out by hand and with numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest

from train.studies.compare import common_steps, ema, mean_smoothed_gap, relative_gap


def run(losses: dict[int, float]) -> list[dict[str, float]]:
    return [{"step": step, "loss/main": loss} for step, loss in losses.items()]


def test_ema_is_the_weighted_mean_of_all_values_so_far():
    values = np.random.default_rng(1).normal(3.0, 0.3, 200)
    smooth = ema(values.tolist(), 0.9)
    for t in (0, 1, 7, 199):
        weights = 0.9 ** np.arange(t, -1, -1)
        # Both sum at most 200 doubles of one size: 200 * 2**-53 is 2e-14.
        assert smooth[t] == pytest.approx(np.average(values[: t + 1], weights=weights), rel=1e-13)


def test_ema_of_a_constant_is_that_constant_from_the_first_step():
    # One rounding in numerator and denominator each per step.
    assert ema([2.5] * 50, 0.95) == pytest.approx([2.5] * 50, rel=1e-14)


def test_ema_passes_over_what_is_not_finite():
    smooth = ema([math.nan, 1.0, math.inf, 3.0], 0.5)
    assert math.isnan(smooth[0])
    assert smooth[1:] == pytest.approx([1.0, 1.0, (0.5 * 1 + 3) / 1.5], rel=1e-15)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_ema_refuses_a_decay_outside_its_range(decay: float):
    with pytest.raises(ValueError, match=f"decay is {decay}"):
        ema([1.0], decay)


def test_a_run_a_quarter_percent_worse_has_a_gap_of_a_quarter_percent():
    reference = {step: 3.0 + math.sin(step) for step in range(1, 41)}
    worse = {step: loss * 1.0025 for step, loss in reference.items()}
    # The smoothing is linear, so a constant factor passes; the rest is rounding of 1.0025.
    assert relative_gap(run(worse), run(reference)) == pytest.approx([0.0025] * 40, rel=1e-10)
    assert mean_smoothed_gap(run(worse), run(reference)) == pytest.approx(0.0025, rel=1e-10)
    assert mean_smoothed_gap(run(reference), run(worse)) == pytest.approx(-0.0025 / 1.0025, rel=1e-10)


def test_the_mean_gap_is_that_of_the_second_half():
    reference = dict.fromkeys(range(1, 101), 2.0)
    early = {step: 4.0 if step <= 10 else 2.0 for step in reference}
    # After step 50 an early bump of 100 % has faded to less than 0.9**40 = 1.5 %.
    assert 0 < mean_smoothed_gap(run(early), run(reference)) < 0.015 * 0.5


def test_only_steps_that_both_logged_count():
    left, right = run({1: 2.0, 2: math.nan, 3: 2.0, 5: 2.0}), run({1: 2.0, 2: 2.0, 3: 1.0, 4: 9.0})
    assert common_steps(left, right) == [1, 3]
    assert relative_gap(left, right, decay=0.0) == [0.0, 1.0]
    with pytest.raises(ValueError, match="share no step"):
        mean_smoothed_gap(run({1: 2.0}), run({2: 2.0}))
