"""One step of a pipeline in seconds: every rank runs its steps in order, each as soon as what it needs has arrived.

Sends and receives do not block a rank: sent in groups that do, as in DeepSeek's published DualPipe code, they add 0.1 %
to a step of V3 (modelled). An overlapped pair waits for the messages of both chunks and sends when both have ended, as
torch's schedules do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from train.studies.plan.orders import Action, Orders, Step

# What one action makes and another needs: the output of a stage (F) or the gradient of its input (B).
_Result = tuple[str, int, int]
_MAKES = {"F": "F", "B": "B", "I": "B", "W": "W"}


class StepSpan(NamedTuple):
    """When a rank ran one of its steps."""

    start_s: float
    end_s: float
    step: Step


@dataclass(frozen=True)
class Timeline:
    """A simulated step, without the update: the last rank's end, and of each rank its spans, busy and idle seconds."""

    step_s: float
    busy_s: list[float]
    bubble_s: list[float]
    spans: list[list[StepSpan]]


@dataclass(frozen=True, eq=False)
class Linked:
    """Orders whose steps know who sends what they need: made once, simulated under many seconds.

    Args:
        ranks: of the pipeline.
        steps: of all ranks, each after those that it needs.
        samples: (rank, step), one of each kind; micro-batches do not differ.
    """

    ranks: int
    steps: tuple[_LinkedStep, ...]
    samples: tuple[tuple[int, Step], ...]


class _LinkedStep(NamedTuple):
    """A step of a rank, the places in `steps` of those that send what it needs, and its kind's sample."""

    rank: int
    step: Step
    senders: tuple[int, ...]
    sample: int


def link(orders: Orders, num_stages: int) -> Linked:
    """Find a sequence in which the steps of all ranks can run: a rank goes as far as it can, then those it lets go on.

    Args:
        num_stages: that one micro-batch passes; copies of them (DualPipe) are numbered on from there.
    Raises:
        RuntimeError: ranks wait for each other, or for what nobody makes.
    """
    maker: dict[_Result, int] = {}
    blocked: dict[_Result, int] = {}
    linked: list[_LinkedStep] = []
    samples: dict[tuple[int, tuple[tuple[str, int], ...]], tuple[int, Step]] = {}
    done = [0] * len(orders)
    runnable = list(range(len(orders)))
    while runnable:
        rank = runnable.pop()
        for step in orders[rank][done[rank] :]:
            needs = [need for action in step for need in _needs(action, num_stages)]
            missing = next((need for need in needs if need not in maker), None)
            if missing is not None:
                blocked[missing] = rank
                break
            senders = {maker[need] for need in needs if linked[maker[need]].rank != rank}
            for kind, stage, micro_batch in step:
                made = (_MAKES[kind], stage, micro_batch)
                maker[made] = len(linked)
                if made in blocked:
                    runnable.append(blocked.pop(made))
            alike = rank, tuple((action.kind, action.stage) for action in step)
            samples.setdefault(alike, (len(samples), step))
            linked.append(_LinkedStep(rank, step, tuple(senders), samples[alike][0]))
            done[rank] += 1
    if stuck := {rank: orders[rank][at] for rank, at in enumerate(done) if at < len(orders[rank])}:
        raise RuntimeError(f"the pipeline deadlocks: these ranks wait before these steps: {stuck}")
    return Linked(len(orders), tuple(linked), tuple((rank, step) for (rank, _), (_, step) in samples.items()))


class Pace(NamedTuple):
    """Seconds of a step without its update, and those in which each rank is busy."""

    step_s: float
    busy_s: list[float]


Seconds = Callable[[int, Step], float]


def pace(linked: Linked, *, time: Seconds, p2p_s: float = 0.0) -> Pace:
    """What `simulate` finds, without its spans."""
    return _run(linked, _seconds(linked, time, {}), p2p_s)[0]


def simulate(linked: Linked, *, time: Seconds, p2p_s: float = 0.0, slow: Mapping[int, float] | None = None) -> Timeline:
    """Run the steps of all ranks.

    Args:
        time: seconds of a step on a rank, the same for all micro-batches.
        p2p_s: from the end of a step to the arrival of what it sends to another rank.
        slow: rank -> factor on its steps, of stragglers.
    """
    seconds = _seconds(linked, time, slow or {})
    (step_s, busy), starts = _run(linked, seconds, p2p_s)
    spans: list[list[StepSpan]] = [[] for _ in busy]
    for (rank, step, _, sample), start in zip(linked.steps, starts, strict=True):
        spans[rank].append(StepSpan(start, start + seconds[sample], step))
    return Timeline(step_s, busy, [step_s - each for each in busy], spans)


def _seconds(linked: Linked, time: Seconds, slow: Mapping[int, float]) -> list[float]:
    return [time(rank, step) * slow.get(rank, 1.0) for rank, step in linked.samples]


def _run(linked: Linked, seconds: list[float], p2p_s: float) -> tuple[Pace, list[float]]:
    """The pace, and the start of each step."""
    starts: list[float] = []
    ends: list[float] = []
    free = [0.0] * linked.ranks
    busy = [0.0] * linked.ranks
    for rank, _, senders, sample in linked.steps:
        start = free[rank]
        for sender in senders:
            arrived = ends[sender] + p2p_s
            if arrived > start:
                start = arrived
        took = seconds[sample]
        free[rank] = end = start + took
        busy[rank] += took
        starts.append(start)
        ends.append(end)
    return Pace(max(free), busy), starts


def _needs(action: Action, num_stages: int) -> list[_Result]:
    kind, stage, micro_batch = action
    position = stage % num_stages
    if kind == "F":
        return [("F", stage - 1, micro_batch)] if position else []
    if kind == "W":
        return [("B", stage, micro_batch)]
    own = ("F", stage, micro_batch)
    return [own, ("B", stage + 1, micro_batch)] if position < num_stages - 1 else [own]


def seconds_by_class(timeline: Timeline) -> dict[str, float]:
    """Mean over ranks of the seconds of each class, which add up to the step.

    Returns:
        "1F", "1B" (whole or its input part), "1W", "1F1B" (an overlapped pair), "bubble"; names of DeepSeek's profile.
    """
    totals = dict.fromkeys(("1F", "1B", "1W", "1F1B"), 0.0)
    for ran in timeline.spans:
        for start, end, step in ran:
            totals["1F1B" if len(step) > 1 else f"1{_MAKES[step[0].kind]}"] += end - start
    means = {name: total / len(timeline.spans) for name, total in totals.items()}
    return {**means, "bubble": sum(timeline.bubble_s) / len(timeline.spans)}
