"""What a whole run costs: GPU-hours by part, and the share of the time in which it trains.

    batch ramp     few micro-batches fill a pipeline badly: seconds of a step are asked for at points of the ramp
    full batch     the rest of `schedule.total_tokens`
    extension      32K, then 128K tokens a sequence, 1,000 steps each (arXiv:2412.19437 §4.3), after the report's run

    time of a run / time in which it trains = (1 + stall / interval) x (1 + failures x (interval / 2 + restart))

The trainer has no stage of context extension; its time is that of the full batch with longer attention and one more
forward, because nothing but boundaries would be kept. Its memory is another matter (docs/planner.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from train.schedules import ScheduleConfig, scheduled_values

# Points of the ramp at which a step is asked for; its cost a token falls smoothly.
RAMP_POINTS = 12
# §4.3: (tokens a sequence, sequences a step, steps); §4.2: the run that they follow.
EXTENSION = ((32768, 1920, 1000), (131072, 480, 1000))
REPORT_TOKENS = 14.8e12
# Backward is two forwards (dgrad and wgrad); recomputing everything adds one to three.
RECOMPUTED = 4 / 3
HOUR_S = 3600.0


def gpu_hours_per_trillion(step_s: float, *, world: int, tokens: int) -> float:
    """Of a step over so many tokens."""
    return step_s * world / HOUR_S / tokens * 1e12


@dataclass(frozen=True)
class RunPart:
    """One part of a run."""

    what: str
    tokens: float
    gpu_hours: float


def pretraining(
    schedule: ScheduleConfig, *, sequence_length: int, world: int, step_s: Callable[[int], float]
) -> list[RunPart]:
    """The batch ramp, if there is one, and the rest; `step_s` has the seconds of a step of so many sequences."""

    def hours(tokens: float, batch: int) -> float:
        return tokens / (batch * sequence_length) * step_s(batch) * world / HOUR_S

    ramp, parts = float(schedule.batch_ramp_tokens), []
    if ramp:
        width = ramp / RAMP_POINTS
        middles = [round((point + 0.5) * width) for point in range(RAMP_POINTS)]
        batches = [scheduled_values(schedule, step=0, tokens_seen=seen).batch_sequences for seen in middles]
        what = f"batch ramp, {schedule.batch_start_sequences:,} to {schedule.batch_full_sequences:,} sequences"
        parts.append(RunPart(what, ramp, sum(hours(width, batch) for batch in batches)))
    rest = schedule.total_tokens - ramp
    if rest:
        full = schedule.batch_full_sequences
        parts.append(RunPart(f"full batch, {full:,} sequences", rest, hours(rest, full)))
    return parts


def extension(
    schedule: ScheduleConfig, *, sequence_length: int, gpu_s_per_token: float, attention_gpu_s_per_token: float
) -> list[RunPart]:
    """Both stages of context extension; none where the run is not the report's.

    Args:
        gpu_s_per_token: of a step of the full batch, all GPUs together.
        attention_gpu_s_per_token: of that the attention core at `sequence_length`, which grows in proportion to it.
    """
    if schedule.total_tokens != REPORT_TOKENS:
        return []
    parts = []
    for length, sequences, steps in EXTENSION:
        tokens = float(length * sequences * steps)
        longer = attention_gpu_s_per_token * (length / sequence_length - 1)
        seconds = tokens * RECOMPUTED * (gpu_s_per_token + longer)
        parts.append(RunPart(f"context extension to {length // 1024}K, {steps:,} steps", tokens, seconds / HOUR_S))
    return parts


@dataclass(frozen=True)
class Reliability:
    """What interrupts a run: failures of any GPU, the restart after one, and saving."""

    failures_per_gpu_hour: float
    restart_s: float
    save_stall_s: float  # in which training waits for a checkpoint


def effective_share(reliability: Reliability, *, world: int, save_every_s: float) -> float:
    """Share of the time that makes progress: a failure costs half an interval of saving and a restart."""
    saving = 1 + reliability.save_stall_s / save_every_s
    per_second = reliability.failures_per_gpu_hour * world / HOUR_S
    return 1 / (saving * (1 + per_second * (save_every_s / 2 + reliability.restart_s)))
