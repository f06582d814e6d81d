"""The points of the batch ramp at which a pipeline changes: the first step, the first full pipeline, the last batch.

A step's share of one pipeline is batch / dp sequences, cut into micro-batches. While there are fewer of them than the
schedule can hold in flight, ranks idle; from the threshold on a longer batch only makes the bubble relatively smaller
(arXiv:2412.19437 §4.2 for the ramp, §3.2.1 for the pipeline).

Not here: time. Nothing is measured, and nothing is claimed about it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from parallel.layout import Layout
from train.schedules import ScheduleConfig, at


@dataclass(frozen=True)
class RampPoint:
    """One point of the ramp.

    what: why it is shown. tokens_seen: before the step. micro_batches: of each pipeline. in_flight: the most of them
    that one rank holds between forward and backward, counted by stage.
    """

    what: str
    tokens_seen: int
    batch_sequences: int
    micro_batches: int
    in_flight: int


def ramp_points(
    schedule: ScheduleConfig, layout: Layout, micro_batch_sequences: int, most_in_flight: Callable[[int], int]
) -> list[RampPoint]:
    """First step, first step whose micro-batches fill the pipeline, first step of the full batch, in that order.

    Args:
        schedule: of the run.
        layout: gives the data ranks.
        micro_batch_sequences: sequences of one micro-batch.
        most_in_flight: micro-batches of a step -> the most that a rank holds (`Pipeline.most_in_flight`).
    Returns:
        one to three points; points that coincide are one.
    """

    def point(what: str, tokens_seen: int) -> RampPoint:
        batch = at(schedule, step=0, tokens_seen=tokens_seen).batch_sequences
        count = batch // layout.dp // micro_batch_sequences
        return RampPoint(what, tokens_seen, batch, count, most_in_flight(count))

    first, last = point("first step", 0), point("full batch", schedule.batch_ramp_tokens)
    fills = last.in_flight
    points = [first]
    if first.in_flight < fills:
        # The batch grows with tokens, so the first token count with enough micro-batches is found by halving.
        low, high = 0, schedule.batch_ramp_tokens
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if point("", middle).in_flight >= fills else (middle, high)
        points.append(point("pipeline full from here", high))
    if last.batch_sequences > points[-1].batch_sequences:
        points.append(last)
    return points
