"""The points of the batch ramp against a run's own walk over its steps, and against a walk over every token.

`ramp_points` halves intervals; here nothing is halved and nothing of `train/schedules.py` is asked: the batch is
computed again, linear in tokens and rounded down to whole micro-batches of every data rank.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest

from parallel.layout import Layout
from train.config import compose
from train.schedules import ScheduleConfig
from train.studies.plan.dry_run import ramp_points

BATCH = ["schedule.batch_start_sequences=4", "schedule.batch_full_sequences=24"]
SCHEDULE = compose([*BATCH, "run.micro_batch_sequences=2", "layout.dp=2"]).schedule


def stepped(schedule: ScheduleConfig, *, sequence_length: int) -> Iterator[tuple[int, int]]:
    """(tokens seen, sequences) of every step of the ramp, the first full one included: a run's own walk."""
    start, full, ramp = schedule.batch_start_sequences, schedule.batch_full_sequences, schedule.batch_ramp_tokens
    tokens = sequences = 0
    while sequences < full:
        exact = start + (full - start) * min(tokens, ramp) / ramp
        sequences = int(exact / schedule.batch_multiple_sequences) * schedule.batch_multiple_sequences
        yield tokens, sequences
        tokens += sequences * sequence_length


def test_the_ramp_of_v3_begins_fills_and_ends_where_a_run_would() -> None:
    """24, 31 and 120 micro-batches of each of 128 pipelines; the middle one is the first step with 31 or more."""
    config = compose(["+cluster=h800_2048"])

    def most_in_flight(count: int) -> int:
        return min(count + 1, 32)

    points = ramp_points(config.schedule, config.layout, 1, most_in_flight)
    assert [point.micro_batches for point in points] == [24, 31, 120]
    assert [point.batch_sequences for point in points] == [3072, 31 * 128, 15360]
    assert [point.in_flight for point in points] == [25, 32, 32]
    steps = list(stepped(config.schedule, sequence_length=4096))
    assert [count for _, count in steps] == sorted(count for _, count in steps)
    assert steps[0] == (points[0].tokens_seen, 3072) == (0, 3072)
    first_full_pipeline = next(index for index, (_, sequences) in enumerate(steps) if sequences >= 31 * 128)
    # The point is a number of tokens, which a run passes with its next step.
    assert steps[first_full_pipeline - 1][0] < points[1].tokens_seen <= steps[first_full_pipeline][0]
    assert steps[-2][0] < points[2].tokens_seen <= steps[-1][0]
    assert points[2].tokens_seen == 469 * 10**9


@pytest.mark.parametrize("fills", [1, 2, 3, 5, 6])
@pytest.mark.parametrize(("start", "full", "ramp"), [(4, 24, 997), (4, 24, 20), (12, 24, 1), (24, 24, 0), (8, 8, 50)])
def test_the_threshold_is_the_first_token_that_fills_the_pipeline(start: int, full: int, ramp: int, fills: int) -> None:
    """Against a walk over every single token; layout of two data ranks, micro-batches of two sequences."""
    schedule = replace(SCHEDULE, batch_start_sequences=start, batch_full_sequences=full, batch_ramp_tokens=ramp)

    def most_in_flight(count: int) -> int:
        return min(count, fills)

    points = ramp_points(schedule, Layout(dp=2), 2, most_in_flight)
    counts = [((start * ramp + (full - start) * t) // max(ramp, 1) if t < ramp else full) // 4 for t in range(ramp + 1)]
    reached = most_in_flight(counts[-1])
    wanted = [0, next(t for t, count in enumerate(counts) if most_in_flight(count) == reached), ramp]
    # Points with the same batch are one: the first of them.
    expected: list[int] = []
    for tokens in wanted:
        if not expected or counts[tokens] > counts[expected[-1]]:
            expected.append(tokens)
    assert [point.tokens_seen for point in points] == expected
    assert [point.micro_batches for point in points] == [counts[tokens] for tokens in expected]
    for before, after in itertools.pairwise(points):
        assert before.tokens_seen < after.tokens_seen
        assert before.micro_batches < after.micro_batches
        assert before.in_flight <= after.in_flight
