"""What a pipeline rank holds at each action of its schedule: micro-batches, weight gradients that wait, late messages.

Read from action lists (arXiv:2412.19437 §3.2.1). An action is (kind, stage, micro-batch): F forward, B backward,
I its input part, W its weight part; a step is one action or several that overlap.

Messages. A hidden state that goes forward is held by its own micro-batch until the gradient has come back, which proves
that it arrived. A gradient that goes back is held until it is sent: ours counts as under way until something that this
rank has used was sent after the neighbour had used it, and no more of them than `MOST_MESSAGES`, beyond which the rank
waits. A message to this rank counts as arrived as soon as its sender can have sent it, given what this rank has sent so
far. Both are the worst that messages between two neighbours allow; what other ranks would hold back besides is not
looked at.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import NamedTuple

from parallel.schedules import MOST_MESSAGES
from train.studies.plan.candidate import Candidate
from train.studies.plan.orders import SCHEDULES, Orders, Step, fallback, orders, refusal


class Moment(NamedTuple):
    """Before a step: stage -> micro-batches held for backward, and for weight gradients; then what the step runs."""

    live: tuple[tuple[int, int], ...]
    waiting: tuple[tuple[int, int], ...]
    messages: int  # hidden states and gradients from and to other ranks, beyond those that micro-batches hold
    runs: tuple[tuple[str, int], ...]  # kinds and stages


def moments(orders: Orders, *, max_waiting_wgrads: int | None) -> list[list[Moment]]:
    """Of each rank, the moments that can be the fullest."""
    found = []
    for order, neighbours in zip(orders, _messages(orders), strict=True):
        most: dict[Moment, int] = {}
        for moment, count in zip(_walk(order, max_waiting_wgrads), _in_flight(len(order), neighbours), strict=True):
            most[moment] = max(most.get(moment, 0), count)
        found.append(_fullest(moment._replace(messages=count) for moment, count in most.items()))
    return found


def moments_of(candidate: Candidate, micro_batches: int, *, at_first: int) -> list[list[Moment]]:
    """Those of a candidate's steps with so many micro-batches and, from `at_first` on, of the ramp before them.

    The rounds of a full pipeline repeat themselves.
    """
    name, pp, chunks = candidate.schedule, candidate.pp, candidate.chunks
    few = fallback(name, pp, chunks, at_first) or name
    count = min(micro_batches, 2 * pp)
    count = micro_batches if refusal(name, pp, chunks, count) else count
    steps = ((name, count),) if few == name else ((name, count), (few, SCHEDULES[name].fewest(pp) - 1))
    return _moments_of(steps, pp, chunks, candidate.max_waiting_wgrads)


@cache
def _moments_of(steps: tuple[tuple[str, int], ...], pp: int, chunks: int, waiting: int | None) -> list[list[Moment]]:
    found = [moments(orders(name, pp, chunks, count), max_waiting_wgrads=waiting) for name, count in steps]
    return [_fullest(moment for moments in of_rank for moment in moments) for of_rank in zip(*found, strict=True)]


def _fullest(moments: Iterable[Moment]) -> list[Moment]:
    """Those of the same actions that no other holds as much as; a micro-batch holds two hidden states or more."""
    groups: dict[tuple[tuple[str, int], ...], list[tuple[Counter[tuple[str, int]], int, Moment]]] = {}
    for moment in moments:
        held = Counter({("live", stage): count for stage, count in moment.live})
        held.update({("waiting", stage): count for stage, count in moment.waiting})
        states = moment.messages + 2 * sum(count for _, count in moment.live)
        group = groups.setdefault(moment.runs, [])
        if not any(held <= other and states <= most for other, most, _ in group):
            group[:] = [each for each in group if not (each[0] <= held and each[1] <= states)]
            group.append((held, states, moment))
    return [moment for group in groups.values() for _, _, moment in group]


def _walk(order: Sequence[Step], limit: int | None) -> Iterator[Moment]:
    live: Counter[int] = Counter()
    waiting: deque[tuple[int, int]] = deque()
    for step in order:
        waits = Counter(stage for stage, _ in waiting)
        runs = tuple((kind, stage) for kind, stage, _ in step)
        yield Moment(tuple(sorted((+live).items())), tuple(sorted(waits.items())), 0, runs)
        for kind, stage, micro_batch in step:
            live[stage] += (kind == "F") - (kind in "BI")
            if kind == "I":
                waiting.append((stage, micro_batch))
                # Beyond the limit the oldest runs at once.
                if limit is not None and len(waiting) > limit:
                    waiting.popleft()
            elif kind == "W" and (stage, micro_batch) in waiting:
                waiting.remove((stage, micro_batch))


class _Message(NamedTuple):
    """Between this rank and a neighbour: the steps of both that make it and use it."""

    gradient: bool
    comes: bool
    ours: int
    theirs: int


def _in_flight(steps: int, neighbours: Mapping[int, Sequence[_Message]]) -> list[int]:
    """Before each step of a rank: gradients that it has sent and messages that it can have got, not used yet."""
    sent, arrived = [0] * steps, [0] * steps
    for messages in neighbours.values():
        goes = sorted((each for each in messages if not each.comes), key=lambda each: each.theirs)
        comes = sorted((each for each in messages if each.comes), key=lambda each: each.theirs)
        used = Counter(each.ours for each in comes)
        latest = {each.ours: each.theirs for each in comes}
        under_way: list[_Message] = []
        free = made = taken = 0
        proven = -1
        by_step: dict[int, list[_Message]] = {}
        for each in goes:
            by_step.setdefault(each.ours, []).append(each)
        for step in range(steps):
            # The neighbour runs up to the first step that needs what we have not made.
            while free < len(goes) and goes[free].ours < step:
                free += 1
            while made < len(comes) and (free == len(goes) or comes[made].theirs < goes[free].theirs):
                made += 1
            under_way = [each for each in under_way if each.theirs > proven]
            sent[step] += len(under_way)
            arrived[step] += made - taken
            taken += used[step]
            proven = max(proven, latest.get(step, -1))
            under_way += [each for each in by_step.get(step, ()) if each.gradient]
    return [min(ours, MOST_MESSAGES) + theirs for ours, theirs in zip(sent, arrived, strict=True)]


def _messages(orders: Orders) -> list[dict[int, list[_Message]]]:
    """Of each rank, by neighbour."""
    place = {
        ("F" if kind == "F" else "B", stage, micro_batch): (owner, index)
        for owner, order in enumerate(orders)
        for index, step in enumerate(order)
        for kind, stage, micro_batch in step
        if kind != "W"
    }
    found: list[dict[int, list[_Message]]] = [{} for _ in orders]
    for (kind, stage, micro_batch), (user, used) in place.items():
        maker, made = place.get((kind, stage - 1 if kind == "F" else stage + 1, micro_batch), (user, 0))
        if maker != user:
            found[user].setdefault(maker, []).append(_Message(kind == "B", True, used, made))
            found[maker].setdefault(user, []).append(_Message(kind == "B", False, made, used))
    return found
