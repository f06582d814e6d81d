"""The cost of a whole run against integrals in closed form and against a run that is played out failure by failure."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from train.config import compose
from train.schedules import ScheduleConfig
from train.studies.plan.recipe import (
    HOUR_S,
    Reliability,
    effective_share,
    extension,
    gpu_hours_per_trillion,
    pretraining,
)

LENGTH, WORLD = 4096, 2048


@pytest.fixture(scope="module")
def v3() -> ScheduleConfig:
    return compose(["schedule=v3", "data.store=none", "data.heldout=null", "run.eval_every_steps=0"]).schedule


def test_a_run_whose_tokens_cost_the_same_costs_tokens_times_that(v3: ScheduleConfig) -> None:
    parts = pretraining(v3, sequence_length=LENGTH, world=WORLD, step_s=lambda batch: batch / 800)
    tokens = sum(part.tokens for part in parts)
    assert tokens == v3.total_tokens
    hours = sum(part.gpu_hours for part in parts)
    assert hours == pytest.approx(tokens / LENGTH / 800 * WORLD / HOUR_S, rel=1e-12)


def test_a_ramp_costs_the_integral_of_its_steps(v3: ScheduleConfig) -> None:
    """A pipeline of `fill` micro-batches' bubble: step = (fill + batch) / rate, so a token costs 1 + fill / batch."""
    fill = 1920
    ramp, _ = pretraining(v3, sequence_length=LENGTH, world=WORLD, step_s=lambda batch: (fill + batch) / 800)
    low, high = v3.batch_start_sequences, v3.batch_full_sequences
    # The batch grows linearly in tokens: the mean of 1 / batch is the logarithm over the difference.
    mean = 1 + fill * math.log(high / low) / (high - low)
    exact = ramp.tokens / LENGTH / 800 * WORLD / HOUR_S * mean
    # Twelve points of a smooth function, and a batch rounded down to a multiple of 128: 0.4 % of the bubble's share.
    assert ramp.gpu_hours == pytest.approx(exact, rel=4e-3)


def test_a_run_without_a_ramp_has_one_part(v3: ScheduleConfig) -> None:
    flat = replace(v3, batch_ramp_tokens=0)
    (part,) = pretraining(flat, sequence_length=LENGTH, world=8, step_s=lambda _: 2.0)
    steps = flat.total_tokens / (flat.batch_full_sequences * LENGTH)
    assert part.gpu_hours == pytest.approx(steps * 2.0 * 8 / HOUR_S, rel=1e-12)


def test_extension_follows_the_reports_run_only(v3: ScheduleConfig) -> None:
    each = {"sequence_length": LENGTH, "gpu_s_per_token": 6.0e-4, "attention_gpu_s_per_token": 9.0e-5}
    assert extension(replace(v3, total_tokens=15 * 10**12), **each) == []
    short, long = extension(v3, **each)
    # Both read the same tokens, 62.9 B; attention costs 8 and 32 times as much a token.
    assert short.tokens == long.tokens == 32768 * 1920 * 1000
    for part, longer in ((short, 8), (long, 32)):
        seconds = part.tokens * 4 / 3 * (6.0e-4 - 9.0e-5 + 9.0e-5 * longer)
        assert part.gpu_hours == pytest.approx(seconds / HOUR_S, rel=1e-12)


def test_the_effective_share_is_that_of_runs_played_out() -> None:
    """Failures at exponential times; each throws away what was done since the last checkpoint, and costs a restart."""
    reliability = Reliability(failures_per_gpu_hour=2e-5, restart_s=900.0, save_stall_s=20.0)
    every = 3600.0
    expected = effective_share(reliability, world=16384, save_every_s=every)
    drawn, rate = random.Random(0), 2e-5 * 16384 / HOUR_S
    spent = progress = 0.0
    next_failure = drawn.expovariate(rate)
    while progress < 4000 * every:
        # One interval of work and its save; a failure in it starts it again.
        if spent + every + 20.0 <= next_failure:
            spent += every + 20.0
            progress += every
        else:
            spent = next_failure + 900.0
            next_failure = spent + drawn.expovariate(rate)
    # Some 1,400 failures: 2.7 % of what they cost by chance, and half an interval is its mean to first order only
    # (a third of the intervals see a failure here; 1 % of the whole). For 2,048 GPUs both are eight times smaller.
    assert progress / spent == pytest.approx(expected, rel=0.03)
    assert effective_share(Reliability(0.0, 900.0, 0.0), world=16384, save_every_s=every) == 1.0


def test_gpu_hours_of_deepseeks_own_step() -> None:
    """19.93 s for 62.9 M tokens on 2,048 GPUs are the 180 K that DeepSeek publishes."""
    assert gpu_hours_per_trillion(19.926, world=2048, tokens=15360 * 4096) == pytest.approx(180e3, rel=2e-3)
