"""The schedules against the numbers of arXiv:2412.19437 §4.2, written out once more by hand."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.schedules import ScheduleConfig, scheduled_values, steps_to_go

T = 10**12
B = 10**9
SEQUENCE_TOKENS = 4096

V3 = ScheduleConfig(
    total_tokens=14_800 * B,
    lr_peak=2.2e-4,
    warmup_steps=2000,
    constant_until_tokens=10 * T,
    decay_until_tokens=14_300 * B,
    lr_after_decay=2.2e-5,
    final_from_tokens=14_633 * B,
    lr_final=7.3e-6,
    batch_start_sequences=3072,
    batch_full_sequences=15360,
    batch_ramp_tokens=469 * B,
    bias_speed=0.001,
    bias_speed_until_tokens=14_300 * B,
    balance_alpha=0.0001,
    mtp_weight=0.3,
    mtp_weight_until_tokens=10 * T,
    mtp_weight_late=0.1,
)
LATE_STEP = 100_000


def lr(*, step: int = LATE_STEP, tokens_seen: int) -> float:
    return scheduled_values(V3, step=step, tokens_seen=tokens_seen).lr


def cosine(tokens_seen: int) -> float:
    """The half cosine from 2.2e-4 at 10T to 2.2e-5 at 14.3T, in the form cos^2 that the code doesn't use."""
    return 2.2e-5 + (2.2e-4 - 2.2e-5) * math.cos(math.pi / 2 * (tokens_seen - 10 * T) / (4.3 * T)) ** 2


@pytest.mark.parametrize(("step", "expected"), [(0, 0.0), (1, 1.1e-7), (1000, 1.1e-4), (1999, 2.2e-4 - 1.1e-7)])
def test_learning_rate_rises_linearly_over_2000_steps(step: int, expected: float) -> None:
    # 1e-12: a few roundings of float64 (2.2e-16 each).
    assert lr(step=step, tokens_seen=step * 3072 * SEQUENCE_TOKENS) == pytest.approx(expected, rel=1e-12, abs=0.0)


@pytest.mark.parametrize("step", [2000, 2001])
def test_learning_rate_is_the_peak_from_step_2000_on(step: int) -> None:
    assert lr(step=step, tokens_seen=step * 3072 * SEQUENCE_TOKENS) == 2.2e-4


@pytest.mark.parametrize(
    ("tokens_seen", "expected"),
    [
        (10 * T - 1, 2.2e-4),
        (10 * T, 2.2e-4),
        (10 * T + 1, cosine(10 * T + 1)),
        (12_150 * B, (2.2e-4 + 2.2e-5) / 2),
        (11 * T, cosine(11 * T)),
        (14 * T, cosine(14 * T)),
        (14_300 * B - 1, cosine(14_300 * B - 1)),
        (14_300 * B, 2.2e-5),
        (14_300 * B + 1, 2.2e-5),
        (14_633 * B - 1, 2.2e-5),
        (14_633 * B, 7.3e-6),
        (14_633 * B + 1, 7.3e-6),
        (14_800 * B, 7.3e-6),
    ],
)
def test_learning_rate_by_tokens(tokens_seen: int, expected: float) -> None:
    # 1e-12: a few roundings of float64.
    assert lr(tokens_seen=tokens_seen) == pytest.approx(expected, rel=1e-12, abs=0.0)


def test_cosine_joins_its_neighbours_without_a_step_or_a_kink() -> None:
    one_step_tokens = 15360 * SEQUENCE_TOKENS
    # Largest slope of the half cosine: pi/2 * fall / length.
    steepest = math.pi / 2 * (2.2e-4 - 2.2e-5) / (4.3 * T) * one_step_tokens
    rates = [
        lr(tokens_seen=tokens) for tokens in range(10 * T - 10 * one_step_tokens, 14_400 * B, 997 * one_step_tokens)
    ]
    # 1 + 1e-9 covers the rounding of a difference of float64 numbers.
    assert max(before - after for before, after in itertools.pairwise(rates)) <= 997 * steepest * (1 + 1e-9)
    assert all(before >= after for before, after in itertools.pairwise(rates))
    for edge in (10 * T, 14_300 * B):
        # At both ends the cosine is flat: one step moves it by less than a 1000th of the steepest step.
        assert abs(lr(tokens_seen=edge + one_step_tokens) - lr(tokens_seen=edge - one_step_tokens)) < steepest / 1000


@pytest.mark.parametrize(
    ("tokens_seen", "expected"),
    [
        (0, 3072),
        (469 * B // 4, 6144),
        (469 * B // 2, 9216),
        # 12288 sequences more over 469B tokens: one more each 38,167,317.7 tokens.
        (38_167_317, 3072),
        (38_167_318, 3073),
        (469 * B - 1, 15359),
        (469 * B, 15360),
        (469 * B + 1, 15360),
        (14_800 * B, 15360),
    ],
)
def test_batch_ramp(tokens_seen: int, expected: int) -> None:
    assert scheduled_values(V3, step=LATE_STEP, tokens_seen=tokens_seen).batch_sequences == expected


def test_batch_ramp_takes_about_15000_steps_and_the_run_about_243000() -> None:
    step = tokens_seen = ramp_steps = 0
    while tokens_seen < V3.batch_ramp_tokens:
        tokens_seen += scheduled_values(V3, step=step, tokens_seen=tokens_seen).batch_sequences * SEQUENCE_TOKENS
        step += 1
    ramp_steps = step
    # dn/dx = 1/(4096 * batch(x)) integrates to 469B * ln(5) / (4096 * 12288) = 14,997 steps.
    closed_form = 469 * B * math.log(15360 / 3072) / (SEQUENCE_TOKENS * (15360 - 3072))
    assert closed_form == pytest.approx(14_997, abs=1)
    # Rounding down to whole sequences and finite steps move the sum by less than 0.1 %.
    assert ramp_steps == pytest.approx(closed_form, rel=1e-3)
    full_steps = math.ceil((V3.total_tokens - tokens_seen) / (15360 * SEQUENCE_TOKENS))
    assert ramp_steps + full_steps == pytest.approx(242_800, abs=100)


@given(tokens_seen=st.integers(0, 600 * B), multiple=st.sampled_from([1, 64, 192, 3072]))
def test_batch_is_the_largest_multiple_on_or_below_the_line(tokens_seen: int, multiple: int) -> None:
    config = dataclasses.replace(V3, batch_multiple_sequences=multiple)
    batch = scheduled_values(config, step=0, tokens_seen=tokens_seen).batch_sequences
    # Both sides times 469B: an exact comparison of integers.
    line = min(3072 * 469 * B + 12288 * tokens_seen, 15360 * 469 * B)
    assert batch % multiple == 0
    assert batch * 469 * B <= line < (batch + multiple) * 469 * B


@pytest.mark.parametrize(
    ("tokens_seen", "gamma", "mtp_weight"),
    [
        (0, 0.001, 0.3),
        (10 * T - 1, 0.001, 0.3),
        (10 * T, 0.001, 0.1),
        (10 * T + 1, 0.001, 0.1),
        (14_300 * B - 1, 0.001, 0.1),
        (14_300 * B, 0.0, 0.1),
        (14_300 * B + 1, 0.0, 0.1),
        (14_800 * B, 0.0, 0.1),
    ],
)
def test_gamma_and_lambda_switch_at_their_tokens_and_alpha_never_does(
    tokens_seen: int, gamma: float, mtp_weight: float
) -> None:
    now = scheduled_values(V3, step=LATE_STEP, tokens_seen=tokens_seen)
    assert (now.bias_speed, now.mtp_weight, now.balance_alpha) == (gamma, mtp_weight, 0.0001)


def test_the_last_rates_hold_for_333B_and_167B_tokens_and_gamma_zero_for_500B() -> None:
    assert V3.final_from_tokens - V3.decay_until_tokens == 333 * B
    assert V3.total_tokens - V3.final_from_tokens == 167 * B
    assert V3.total_tokens - V3.bias_speed_until_tokens == 500 * B


def test_phases_of_length_zero_are_legal() -> None:
    config = dataclasses.replace(
        V3,
        warmup_steps=0,
        batch_ramp_tokens=0,
        constant_until_tokens=0,
        decay_until_tokens=0,
        mtp_weight_until_tokens=0,
    )
    now = scheduled_values(config, step=0, tokens_seen=0)
    assert (now.lr, now.batch_sequences, now.mtp_weight) == (2.2e-5, 15360, 0.1)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"total_tokens": 0}, "schedule.total_tokens = 0"),
        ({"lr_peak": -1.0}, "schedule.lr_peak = -1.0"),
        ({"lr_peak": float("nan")}, "schedule.lr_peak = nan"),
        ({"warmup_steps": -5}, "schedule.warmup_steps = -5"),
        ({"constant_until_tokens": 15 * T}, "schedule.constant_until_tokens = 15000000000000"),
        ({"decay_until_tokens": 14_700 * B}, "schedule.decay_until_tokens = 14700000000000"),
        ({"total_tokens": 14_500 * B}, "schedule.total_tokens = 14500000000000"),
        ({"batch_ramp_tokens": 15 * T}, "schedule.batch_ramp_tokens = 15000000000000"),
        ({"bias_speed_until_tokens": 15 * T}, "schedule.bias_speed_until_tokens = 15000000000000"),
        ({"mtp_weight_until_tokens": 15 * T}, "schedule.mtp_weight_until_tokens = 15000000000000"),
        ({"lr_final": 1e-3}, "schedule.lr_final = 0.001"),
        ({"lr_after_decay": 1e-3}, "schedule.lr_after_decay = 0.001"),
        ({"batch_start_sequences": 20000}, "schedule.batch_start_sequences = 20000"),
        ({"batch_multiple_sequences": 1000}, "schedule.batch_start_sequences = 3072"),
        ({"mtp_weight": -0.1}, "schedule.mtp_weight = -0.1"),
    ],
)
def test_inconsistent_config_is_refused_by_name_and_value(changes: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)) as refusal:
        dataclasses.replace(V3, **changes)  # type: ignore[arg-type]
    assert ";" in str(refusal.value), "the sentence after the semicolon is the fix"


@pytest.mark.parametrize("ramp_tokens", [0, 7_000, 64_000, 64_001])
@pytest.mark.parametrize("tokens_seen", [0, 3_000, 9_999, 64_001, 70_000])
def test_the_steps_to_go_are_those_that_a_run_takes(ramp_tokens: int, tokens_seen: int) -> None:
    small = {"batch_start_sequences": 2, "batch_full_sequences": 6, "batch_multiple_sequences": 2}
    config = dataclasses.replace(
        V3,
        total_tokens=64_001,
        batch_ramp_tokens=ramp_tokens,
        **dict.fromkeys(("constant_until_tokens", "decay_until_tokens", "final_from_tokens"), 1000),
        **dict.fromkeys(("bias_speed_until_tokens", "mtp_weight_until_tokens"), 1000),
        **small,
    )
    steps, tokens = 0, tokens_seen
    while tokens < config.total_tokens:
        tokens += scheduled_values(config, step=steps, tokens_seen=tokens).batch_sequences * 32
        steps += 1
    assert steps_to_go(config, sequence_length=32, tokens_seen=tokens_seen) == steps
