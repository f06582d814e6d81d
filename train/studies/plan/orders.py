"""What each rank of a pipeline does in one step, in order, under every schedule that the planner compares.

arXiv:2412.19437 §3.2.1. `SCHEDULES` are those of `torch.distributed.pipelining` under its names, whose lists `orders`
gives action by action, and two that torch lacks: ZB-H1 (arXiv:2401.10241) and DeepSeek's own DualPipe.

    kind     F forward, B backward, I its input part, W its weight part
    stage    numbered along the forward pass
    step     one action, or a forward and a backward chunk whose exchange and computation overlap

Placement of stages and what each schedule takes are those of `parallel/schedules.py`.
DualPipe runs two copies of every stage in opposite directions, each on half the micro-batches: stage pp + s is the
second copy of stage s, on rank pp - 1 - s, which is a "v" too, and the second half of the micro-batches is its own.
"""

from __future__ import annotations

import difflib
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from parallel.layout import either, nearest
from parallel.schedules import SCHEDULES as TORCHS
from parallel.schedules import ScheduleFacts


class Action(NamedTuple):
    """One stage's work on one micro-batch."""

    kind: str  # "F", "B", "I" or "W"
    stage: int
    micro_batch: int


Step = tuple[Action, ...]
Orders = tuple[tuple[Step, ...], ...]  # of each rank


@dataclass(frozen=True)
class ScheduleRule(ScheduleFacts):
    """What a schedule fixes and takes, and what a simulated step needs besides.

    Args:
        pairs: a forward and a backward chunk run overlapped.
        copies: of each parameter; with two, pp and the micro-batches are even.
    """

    pairs: bool = False
    copies: int = 1

    def takes(self, pp: int, micro_batches: int) -> bool:
        """Whether so many micro-batches are legal on so many ranks."""
        even = pp == 1 or self.copies == 1 or (pp % 2 == 0 and micro_batches % 2 == 0)
        return even and super().takes(pp, micro_batches)

    def wanted(self, pp: int, micro_batches: int) -> str:
        """What it takes, in words, where it does not take so many micro-batches."""
        return f"an even number of {self.fewest(pp)} or more" if self.copies > 1 else super().wanted(pp, micro_batches)


SCHEDULES = {
    **{name: ScheduleRule(**vars(facts), pairs=name == "DualPipeV") for name, facts in TORCHS.items()},
    "ZB-H1": ScheduleRule("ZB-H1", chunks=1, placement="loop", micro_batches_per_rank=1),
    "DualPipe": ScheduleRule("DualPipe", 2, "v", micro_batches_per_rank=2, pairs=True, copies=2),
}


def num_stages(name: str, pp: int, chunks: int) -> int:
    """Stages that one micro-batch passes; DualPipe has twice as many, half of them copies."""
    return pp * chunks // SCHEDULES[name].copies if pp > 1 else 1


def rank_of_stage(name: str, pp: int, chunks: int, stage: int) -> int:
    """The pipeline rank that owns a stage."""
    assert 0 <= stage < pp * chunks, (stage, pp, chunks)
    return SCHEDULES[name].rank_of_stage(pp, stage)


def stages_of_rank(name: str, pp: int, chunks: int, rank: int) -> list[int]:
    """The stages of one pipeline rank, ascending."""
    return [stage for stage in range(pp * chunks) if rank_of_stage(name, pp, chunks, stage) == rank]


def refusal(name: str, pp: int, chunks: int, micro_batches: int) -> str | None:
    """Why a schedule cannot run so many micro-batches, in one sentence with the nearest that can; None if it can."""
    if name not in SCHEDULES:
        (near,) = difflib.get_close_matches(name, SCHEDULES, n=1, cutoff=0.0)
        return f"layout.schedule={name} is not a pipeline schedule: did you mean {near}? ({', '.join(SCHEDULES)})"
    rule = SCHEDULES[name]
    # One rank has one stage whatever the schedule, as in `Layout.chunks`.
    wanted = 1 if pp == 1 else rule.chunks
    if chunks < 1 or chunks != (wanted or chunks):
        return (
            f"chunks={chunks} stages on each rank do not fit layout.schedule={name} on layout.pp={pp}: "
            f"use chunks={wanted or '1 or more'}"
        )
    if pp > 1 and rule.copies > 1 and pp % 2:
        return f"layout.schedule={name} mirrors ranks, but layout.pp={pp} is odd: use layout.pp={pp - 1} or {pp + 1}"
    return None if rule.takes(pp, micro_batches) else _refused_count(rule, pp, micro_batches)


def _refused_count(rule: ScheduleRule, pp: int, micro_batches: int) -> str:
    what, least = rule.wanted(pp, micro_batches), rule.fewest(pp)
    counts = nearest(micro_batches, [m for m in range(1, max(micro_batches, least) + 2 * pp) if rule.takes(pp, m)])
    pps = nearest(pp, [ranks for ranks in range(2, 2 * pp) if rule.takes(ranks, micro_batches)])
    choices = [f"{' or '.join(map(str, counts))} micro-batches"]
    choices += [either("layout.pp", pps)] if pps else []
    choices += [f"layout.schedule={rule.when_few}"] if rule.when_few and micro_batches > 0 else []
    return (
        f"{micro_batches} micro-batches do not fit layout.schedule={rule.name} on layout.pp={pp}, which takes {what}: "
        f"use {', or '.join(choices)}"
    )


def fallback(name: str, pp: int, chunks: int, micro_batches: int) -> str | None:
    """The schedule for a step of the batch ramp: this one, else one on the same stages that takes so few, or None."""
    facts = SCHEDULES[name].of_step(pp, micro_batches)
    return facts.name if facts and not refusal(facts.name, pp, chunks, micro_batches) else None


@cache  # a search asks for the same schedule under many splits and precisions
def orders(name: str, pp: int, chunks: int, micro_batches: int) -> Orders:
    """The steps of each pipeline rank, in the order in which it runs them.

    Raises:
        ValueError: with the sentence of `refusal`.
    """
    if reason := refusal(name, pp, chunks, micro_batches):
        raise ValueError(reason)
    if pp == 1:
        return (tuple(_one_forward_one_backward(0, 1, 1, micro_batches)),)
    return tuple(tuple(_WRITERS[name](rank, pp, chunks, micro_batches)) for rank in range(pp))


class _Writer:
    """Writes the steps of one rank from patterns such as "F0&B1 W": kind and chunk, & joins an overlapped pair.

    Each stage takes its micro-batches in order. W is the oldest weight part that waits, W1 the oldest of chunk 1.
    """

    def __init__(self, stages: list[int], first_micro_batches: tuple[int, ...] = ()) -> None:
        self.steps: list[Step] = []
        self._stages = stages
        self._next = Counter(
            {(part, stage): first for part in "FB" for stage, first in zip(stages, first_micro_batches, strict=False)}
        )
        self._weights: list[Action] = []

    def repeat(self, times: int, pattern: str) -> None:
        steps = [step.split("&") for step in pattern.split()]
        for _ in range(times):
            self.steps += [tuple(map(self._action, step)) for step in steps]

    def _action(self, mark: str) -> Action:
        kind, chunk = mark[0], mark[1:]
        if kind == "W":
            stages = [self._stages[int(chunk)]] if chunk else self._stages
            oldest = next(action for action in self._weights if action.stage in stages)
            self._weights.remove(oldest)
            return oldest
        part, stage = "F" if kind == "F" else "B", self._stages[int(chunk)]
        action = Action(kind, stage, self._next[part, stage])
        self._next[part, stage] += 1
        if kind == "I":
            self._weights.append(action._replace(kind="W"))
        return action


def _one_forward_one_backward(rank: int, pp: int, chunks: int, micro_batches: int) -> list[Step]:
    write = _Writer([rank])
    write.repeat(pp - rank, "F0")
    write.repeat(micro_batches - (pp - rank), "B0 F0")
    write.repeat(pp - rank, "B0")
    return write.steps


def _zb_h1(rank: int, pp: int, chunks: int, micro_batches: int) -> list[Step]:
    """1F1B whose weight parts lag by `rank` micro-batches, so that no rank holds more than 1F1B's first."""
    write = _Writer([rank])
    write.repeat(pp - rank, "F0")
    write.repeat(rank, "I0 F0")
    write.repeat(micro_batches - pp, "I0 W0 F0")
    write.repeat(pp - rank, "I0 W0")
    write.repeat(rank, "W0")
    return write.steps


def _interleaved(rank: int, pp: int, chunks: int, micro_batches: int) -> list[Step]:
    write = _Writer(stages_of_rank("Interleaved1F1B", pp, chunks, rank))
    each_round = micro_batches // max(1, micro_batches // pp)
    total = micro_batches * chunks
    warm_up = min(total, (chunks - 1) * each_round + 2 * (pp - 1 - rank))
    for i in range(total + warm_up):
        if i < total:
            write.repeat(1, f"F{i // each_round % chunks}")
        if i >= warm_up:
            write.repeat(1, f"B{chunks - 1 - (i - warm_up) // each_round % chunks}")
    return write.steps


def _interleaved_zero_bubble(rank: int, pp: int, chunks: int, micro_batches: int) -> list[Step]:
    """Fewer forwards ahead than interleaved 1F1B; weight parts lag by `rank` backwards."""
    write = _Writer(stages_of_rank("InterleavedZeroBubble", pp, chunks, rank))
    each_round = micro_batches // max(1, micro_batches // pp)
    total = micro_batches * chunks
    warm_up = min(total, (chunks - 1) * each_round + pp - 1 - rank)
    for i in range(total + warm_up):
        if i < total:
            write.repeat(1, f"F{i // each_round % chunks}")
        if i >= warm_up:
            write.repeat(1, f"I{chunks - 1 - (i - warm_up) // each_round % chunks}")
        if i >= warm_up + rank:
            write.repeat(1, "W")
    write.repeat(min(rank, total), "W")
    return write.steps


def _zbv(rank: int, pp: int, chunks: int, micro_batches: int) -> list[Step]:
    """Written for as many micro-batches as fill the pipeline; those that do not exist are struck out."""
    write = _Writer([rank, 2 * pp - 1 - rank])
    filled = max(2 * pp - 1, micro_batches)
    write.repeat(2 * (pp - rank) - 1, "F0")
    write.repeat(rank, "F1 F0")
    write.repeat(pp - rank, "F1 I1 W1")
    write.repeat(filled - (2 * pp - 1 - rank), "F0 I0 W0 F1 I1 W1")
    write.repeat(pp - 1 - rank, "I0 W0 F1 I1 W1")
    write.repeat(rank, "I0 I1")
    write.repeat(pp - rank, "I0 W0")
    write.repeat(rank, "W1")
    write.repeat(rank, "W0")
    return [step for step in write.steps if step[0].micro_batch < micro_batches]


def _dual_pipe_v(rank: int, pp: int, chunks: int, micro_batches: int) -> list[Step]:
    write = _Writer([rank, 2 * pp - 1 - rank])
    _both_ways(write, depth=pp, place=rank, each_way=micro_batches)
    return write.steps


def _dual_pipe(rank: int, pp: int, chunks: int, micro_batches: int) -> list[Step]:
    """Chunk 0 is the copy that begins nearer to this rank; both halves of the ranks do the same, mirrored."""
    each_way = micro_batches // 2
    copies = [(rank, 0), (2 * pp - 1 - rank, each_way)]
    (near, first), (far, other_first) = copies if rank < pp // 2 else reversed(copies)
    write = _Writer([near, far], (first, other_first))
    _both_ways(write, depth=pp // 2, place=min(rank, pp - 1 - rank), each_way=each_way)
    return write.steps


def _both_ways(write: _Writer, *, depth: int, place: int, each_way: int) -> None:
    """The eight phases of DeepSeek's DualPipe code, from the rank at place 0 inwards; chunk 0 runs inwards, 1 out."""
    inner = depth - 1 - place
    write.repeat(2 * inner, "F0")
    write.repeat(place + 1, "F0 F1")
    write.repeat(inner, "I1 W F1")
    # The innermost rank's first pair would wait for its own forward chunk.
    begun = int(inner == 0)
    write.repeat(begun, "F0 B1 F1&B0")
    write.repeat(each_way - 2 * depth + place + 1 - begun, "F0&B1 F1&B0")
    write.repeat(inner, "B1 F1&B0")
    # From here on nothing waits for a whole backward: input parts first, weight parts fill the gaps.
    half = (place + 1) // 2
    write.repeat(half, "B1 B0")
    write.repeat((place + 1) % 2, "B1 I0")
    write.repeat(half, "I1 I0")
    write.repeat(inner, "W I0")
    write.repeat(place + 1, "W")


_WRITERS = {
    "1F1B": _one_forward_one_backward,
    "Interleaved1F1B": _interleaved,
    "InterleavedZeroBubble": _interleaved_zero_bubble,
    "ZBVZeroBubble": _zbv,
    "DualPipeV": _dual_pipe_v,
    "ZB-H1": _zb_h1,
    "DualPipe": _dual_pipe,
}
