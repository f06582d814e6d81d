"""The spike policy on numbers made by hand: what is a spike, where the run goes back to, what it leaves out."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from train.spikes import LEAST_HISTORY, Applied, SpikeConfig, SpikeState, rollback_order

POLICY = SpikeConfig(window_steps=8)
SPIKES = SpikeState(in_a_row=3, first_skipped=13)


def state_after(losses: list[float], norms: list[float] | None = None, policy: SpikeConfig = POLICY) -> SpikeState:
    """Steps of two sequences each, all of them applied."""
    state = SpikeState()
    for step, (loss, norm) in enumerate(zip(losses, norms or [1.0] * len(losses), strict=True)):
        state = state.after_applied(policy, position=2 * step, loss=loss, norm=norm)
    return state


def test_a_step_is_compared_by_its_robust_deviation_and_an_outlier_in_the_window_moves_nothing() -> None:
    losses = [3.0, 3.2, 2.8, 3.4, 2.6, 3.6, 2.4, 3.1]
    score = state_after(losses).score(POLICY, loss=5.0, norm=1.0)
    deviation = max(
        1.4826 * np.median(np.abs(np.subtract(losses, np.median(losses)))), (3.6 - np.median(losses)) / 1.645
    )
    assert score is not None
    assert score.loss_z == pytest.approx((5.0 - np.median(losses)) / deviation, rel=1e-12)
    assert (score.norm_z, score.is_spike) == (0.0, False)
    assert state_after(losses[: LEAST_HISTORY - 1]).score(POLICY, loss=99.0, norm=1.0) is None, "too little to compare"
    assert state_after(losses).score(replace(POLICY, window_steps=0), loss=99.0, norm=1.0) is None


# In a window without any spread a deviation is 0.05 nats of loss and 0.1 of the norm's logarithm.
@pytest.mark.parametrize(
    ("loss", "norm", "is_spike"),
    [
        (3.39, 1.0, False),
        (3.41, 1.0, True),
        (-9.0, 0.0, False),
        (3.0, 90.0, False),
        (3.0, 110.0, True),
        (3.19, 3.0, False),
        (3.21, 3.0, True),
        (3.21, 2.0, False),
    ],
)
def test_a_loss_far_above_is_a_spike_and_a_norm_only_with_support(loss: float, norm: float, is_spike: bool) -> None:
    score = state_after([3.0] * 8).score(POLICY, loss=loss, norm=norm)
    assert score is not None
    assert score.is_spike is is_spike


def test_spikes_count_in_a_row_and_a_step_that_is_not_finite_neither_counts_nor_ends_the_row() -> None:
    state = state_after([3.0] * 8)
    for step, is_spike, in_a_row in ((9, False, 0), (10, True, 1), (11, False, 1), (12, True, 2)):
        state = state.after_skipped(step=step, is_spike=is_spike)
        assert (state.in_a_row, state.first_skipped) == (in_a_row, 9)
    for policy in (POLICY, replace(POLICY, window_steps=0)):
        after = state.after_applied(policy, position=0, loss=3.0, norm=1.0)
        assert (after.in_a_row, after.first_skipped) == (0, 0)


def test_a_loss_that_rises_slowly_has_no_spike_and_is_told_once_its_median_is_too_high() -> None:
    state, losses = SpikeState(), [4.0 + 0.05 * step for step in range(40)]
    for step, loss in enumerate(losses):
        score = state.score(POLICY, loss=loss, norm=1.0)
        assert score is None or not score.is_spike
        state = state.after_applied(POLICY, position=step, loss=loss, norm=1.0)
        # The median of the first full window is the lowest; it rises 0.05 a step.
        assert state.has_risen(POLICY) is (step >= 8 and 0.05 * (step - 7) > POLICY.max_rise)


def test_a_checkpoint_is_good_when_enough_steps_stayed_in_the_band_after_it() -> None:
    state = state_after([3.0] * 8).after_save(8)
    assert [state.proven(POLICY, step=step).good_step for step in (8, 12, 13)] == [0, 0, 8]
    assert state.after_save(10).proven(POLICY, step=13).good_step == 8, "the first one is looked at until it is good"
    tried = replace(state, rollbacks=2, rolled_back_to=4, left_at=10)
    assert tried.proven(POLICY, step=13).rollbacks == 2, "what comes before the trouble proves nothing"
    assert replace(tried, candidate=10).proven(POLICY, step=15).rollbacks == 0
    assert state.after_skipped(step=9, is_spike=True).proven(POLICY, step=99).good_step == 0
    rising = state.after_applied(POLICY, position=0, loss=3.3, norm=1.0)
    for _ in range(4):
        rising = rising.after_applied(POLICY, position=0, loss=3.3, norm=1.0)
    assert rising.proven(POLICY, step=99).good_step == 0, "the median is 0.3 above its lowest"


def test_each_rollback_in_a_row_leaves_out_more_on_either_side_but_nothing_before_the_checkpoint() -> None:
    saved = SpikeState(dropped=((2, 1),))
    for rollbacks, window in ((0, (58, 10)), (1, (52, 22)), (2, (44, 54))):
        state = replace(state_after([3.0] * 30), rollbacks=rollbacks)
        # Applied steps have the positions 0, 2, ... 58; spikes those from 60 up to 66.
        after = state.rolled_back(saved, left_at=33, step=20, resumes_at=44, spike_end=66, batch_sequences=2)
        assert after.dropped == ((2, 1), window)
        assert (after.rollbacks, after.rolled_back_to, after.in_a_row) == (rollbacks + 1, 20, 0)
        assert (after.left_at, after.candidate) == (33, 20)


@pytest.mark.parametrize(
    ("state", "order"),
    [
        (SPIKES, [10, 5, 12]),
        (replace(SPIKES, first_skipped=12), [10, 5]),
        (replace(SPIKES, good_step=5), [5, 10, 12]),
        (replace(SPIKES, rollbacks=1, rolled_back_to=10), [5, 10, 12]),
        (SpikeState(good_step=10), [10, 5]),
        (replace(SPIKES, good_step=7), [10, 5, 12]),
        (SpikeState(first_skipped=13), []),
    ],
)
def test_the_run_goes_back_to_the_good_checkpoint_or_to_the_one_before_the_spikes(
    state: SpikeState, order: list[int]
) -> None:
    # That of 12 was made by a stop, where one is due every five steps.
    assert rollback_order([20, 15, 12, 10, 5], state, every_steps=5) == order


def test_no_checkpoint_from_before_a_row_of_skipped_steps_is_pruned_until_it_ends() -> None:
    assert all(step in SPIKES.stay(20) for step in (5, 10, 15))
    tried = SpikeState(good_step=5, candidate=15, rolled_back_to=10)
    assert [tried.stay(20), replace(tried, rollbacks=1).stay(20)] == [{0, 5, 15}, {5, 10, 15}]


def test_the_state_survives_json_to_the_bit_and_a_state_that_no_run_writes_is_refused() -> None:
    state = replace(
        state_after([math.pi, 1 / 3]), candidate=5, good_step=4, dropped=((3, 4), (9, 1)), lowest_median=0.1
    )
    values = state.to_json()
    assert SpikeState.from_json(values) == state
    assert SpikeState.from_json(None) == SpikeState()
    changes: list[dict[str, Any]] = [
        {"history": [{"position": 0}]},
        {"history": [Applied(0, math.nan, 0.0).__dict__]},
        {"dropped": [[9, 1], [3, 4]]},
        {"dropped": [[-1, 2]]},
        {"candidate": "5"},
        {"good_step": 1.5},
        {"lowest_median": "low"},
        {"unknown": 1},
        {"dropped": None},
    ]
    for value in (*(values | change for change in changes), [], "x", {}):
        with pytest.raises(ValueError, match="has a 'spikes' that no run writes"):
            SpikeState.from_json(value)


@pytest.mark.parametrize(
    "change",
    [
        {"window_steps": 7},
        {"window_steps": -1},
        {"loss_z": 0.0},
        {"norm_z": math.nan},
        {"norm_ratio": -1.0},
        {"max_rise": 0.0},
        {"max_skips": 0},
        {"max_rollbacks": -1},
        {"good_after_steps": 0},
    ],
)
def test_a_threshold_that_cannot_be_is_refused_by_name_and_value(change: dict[str, float]) -> None:
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=rf"spikes\.{name} = {value} "):
        SpikeConfig(**change)  # type: ignore[arg-type]
