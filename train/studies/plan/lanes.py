"""A forward and a backward chunk that run together: computation on one lane, the exchange of tokens on the other.

arXiv:2412.19437 §3.2.1, figure 4. Phases of a chunk run in order; each lane takes them in a fixed order of issue, the
one in which a pair of `parallel.pipeline` would issue its kernels. Of one MoE layer in either direction:

    computation           F attend | B experts | W | F experts | B attend
    exchange     B combine | F dispatch | B dispatch | F combine

A phase starts when its lane is free and the phase before it in its chunk has ended. The order depends on names, not on
seconds, so the time of a pair is the longest path of a fixed graph: no phase that gets shorter makes it longer. Where
whoever is ready goes first, that is not so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal, NamedTuple

Lane = Literal["computation", "exchange"]
# Every other phase computes: attend (with routing), experts, a dense layer, a head.
EXCHANGES = ("dispatch", "combine")


class Phase(NamedTuple):
    """A part of a chunk: its name, its seconds, and in backward those of its weight gradients, which may run later."""

    name: str
    seconds: float
    weight_s: float = 0.0

    @property
    def lane(self) -> Lane:
        """Where it runs."""
        return "exchange" if self.name in EXCHANGES else "computation"


class PhaseSpan(NamedTuple):
    """When a phase ran; kind F, B or W."""

    lane: Lane
    start_s: float
    end_s: float
    kind: str
    name: str


@dataclass(frozen=True)
class Overlapped:
    """What a pair takes, and its phases in the order of issue."""

    seconds: float
    spans: tuple[PhaseSpan, ...]


def in_line(kind: str, chunk: Sequence[Phase]) -> float:
    """Seconds of an action (`orders.Action.kind`) that overlaps nothing, its exchange included."""
    phases = 0.0 if kind == "W" else sum(phase.seconds for phase in chunk)
    return phases + (sum(phase.weight_s for phase in chunk) if kind in "BW" else 0.0)


def overlapped(forward: Sequence[Phase], backward: Sequence[Phase]) -> Overlapped:
    """Run a forward and a whole backward chunk together; with one of them empty the other hides what it can alone.

    Args:
        forward: phases of a stage in order; layers of both chunks may differ in number and in kind.
        backward: the same in the order of backward, so that its combine precedes its dispatch.
    """
    free: dict[Lane, float] = {"computation": 0.0, "exchange": 0.0}
    ready = {"F": 0.0, "B": 0.0, "W": 0.0}
    spans = []
    for kind, phase in issue(forward, backward):
        # A weight gradient is behind its own phase on the same lane, so it waits for the lane only.
        start = max(free[phase.lane], ready[kind])
        end = free[phase.lane] = start + phase.seconds
        if kind != "W":
            ready[kind] = end
        spans.append(PhaseSpan(phase.lane, start, end, kind, phase.name))
    return Overlapped(max(free.values()), tuple(spans))


def issue(forward: Sequence[Phase], backward: Sequence[Phase]) -> list[tuple[str, Phase]]:
    """(kind, phase) of a pair in the order of issue: the chunks take turns, backward first.

    Weight gradients follow a forward turn that ends in an exchange, or the backward's dispatch where that is next, and
    any backward turn once forward has ended.
    """
    turns: list[tuple[list[Phase], list[Phase]]] = list(zip_longest(_turns(backward), _turns(forward), fillvalue=[]))
    forward_turns = sum(bool(forward_turn) for _, forward_turn in turns)
    order: list[tuple[str, Phase]] = []
    waiting: list[Phase] = []
    behind = [backward_turn for backward_turn, _ in turns[1:]] + [[]]
    both = False
    for index, (backward_turn, forward_turn) in enumerate(turns):
        order += [("B", phase) for phase in backward_turn]
        waiting += [Phase(phase.name, phase.weight_s) for phase in backward_turn if phase.weight_s]
        if both:
            order += [("W", phase) for phase in waiting]
            waiting = []
        order += [("F", phase) for phase in forward_turn]
        # Two dispatches, one behind the other, start before the weight gradients.
        both = [phase.name for phase in (*forward_turn[-1:], *behind[index][:1])] == ["dispatch", "dispatch"]
        if index >= forward_turns or (forward_turn[-1].lane == "exchange" and not both):
            order += [("W", phase) for phase in waiting]
            waiting = []
    return order + [("W", phase) for phase in waiting]


def _turns(chunk: Sequence[Phase]) -> list[list[Phase]]:
    """Cut a chunk before and after each dispatch and after each combine; a layer without exchange cuts nothing."""
    turns: list[list[Phase]] = [[]]
    for phase in chunk:
        if phase.name == "dispatch" and turns[-1]:
            turns.append([])
        turns[-1].append(phase)
        if phase.lane == "exchange":
            turns.append([])
    return [turn for turn in turns if turn]
