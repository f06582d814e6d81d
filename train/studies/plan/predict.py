"""A step of a candidate in seconds: costs of its stages, order of its schedule, and the update, joined.

A step of the batch ramp (arXiv:2412.19437 §4.2) with too few micro-batches for DualPipeV runs on the same V under
ZBVZeroBubble, without overlapped pairs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from train.studies.plan.candidate import Candidate
from train.studies.plan.costs import StageCosts, p2p_s
from train.studies.plan.orders import Step, fallback, num_stages, orders, refusal, stages_of_rank
from train.studies.plan.products import Setup
from train.studies.plan.timeline import Linked, Timeline, link, pace, simulate
from train.studies.plan.update import update_s

# A pipeline is full after this many micro-batches a rank; the others only repeat the same round.
FILLED = 4


@dataclass(frozen=True)
class Prediction:
    """A simulated step.

    update_s: of the rank whose update takes longest, by part.
    """

    setup: Setup
    micro_batches: int
    timeline: Timeline
    update_s: Mapping[str, float]

    @property
    def step_s(self) -> float:
        """Pipeline and update."""
        return self.timeline.step_s + sum(self.update_s.values())

    @property
    def bubble(self) -> float:
        """Idle share of the pipeline's time, mean over ranks."""
        return sum(self.timeline.bubble_s) / len(self.timeline.bubble_s) / self.timeline.step_s


def predict(setup: Setup, *, micro_batches: int, slow: Mapping[int, float] | None = None) -> Prediction:
    """Simulate a whole step.

    Args:
        slow: pipeline rank -> factor on its steps, of stragglers.
    Raises:
        ValueError: no schedule on the candidate's stages takes so many micro-batches.
    """
    setup = _with_fallback(setup, micro_batches)
    costs = StageCosts(setup)
    linked = _linked(setup.candidate, micro_batches)
    timeline = simulate(linked, time=_time(costs), p2p_s=_transfer_s(costs), slow=slow)
    return Prediction(setup, micro_batches, timeline, _longest_update(costs))


class Quick(NamedTuple):
    """Seconds of a step, and the idle share of its pipeline's time."""

    step_s: float
    bubble: float


def quick(setup: Setup, *, micro_batches: int) -> Quick:
    """A step whose pipeline is simulated until it is full; the busiest rank sets the pace of the rest."""
    setup = _with_fallback(setup, micro_batches)
    candidate, costs = setup.candidate, StageCosts(setup)
    fewer = min(micro_batches, FILLED * candidate.pp)
    if refusal(candidate.schedule, candidate.pp, candidate.chunks, fewer):
        fewer = micro_batches
    found = pace(_linked(candidate, fewer), time=_time(costs), p2p_s=_transfer_s(costs))
    pipeline_s = found.step_s + (micro_batches - fewer) * max(found.busy_s) / fewer
    busy_s = sum(found.busy_s) / candidate.pp * micro_batches / fewer
    return Quick(pipeline_s + sum(_longest_update(costs).values()), 1 - busy_s / pipeline_s)


def _with_fallback(setup: Setup, micro_batches: int) -> Setup:
    candidate = setup.candidate
    name = fallback(candidate.schedule, candidate.pp, candidate.chunks, micro_batches)
    if name is None:
        reason = refusal(candidate.schedule, candidate.pp, candidate.chunks, micro_batches)
        assert reason is not None
        raise ValueError(reason)
    if name == candidate.schedule:
        return setup
    return replace(setup, candidate=replace(candidate, schedule=name, overlap=False))


def _linked(candidate: Candidate, micro_batches: int) -> Linked:
    return _linked_orders(candidate.schedule, candidate.pp, candidate.chunks, micro_batches)


@functools.cache  # a search runs the same orders under many splits and precisions
def _linked_orders(name: str, pp: int, chunks: int, micro_batches: int) -> Linked:
    return link(orders(name, pp, chunks, micro_batches), num_stages(name, pp, chunks))


def _time(costs: StageCosts) -> Callable[[int, Step], float]:
    return lambda _, step: costs.time(step)


def _transfer_s(costs: StageCosts) -> float:
    return p2p_s(costs.setup) if costs.setup.candidate.pp > 1 else 0.0


def _longest_update(costs: StageCosts) -> dict[str, float]:
    candidate = costs.setup.candidate
    stages = (stages_of_rank(candidate.schedule, candidate.pp, candidate.chunks, rank) for rank in range(candidate.pp))
    ranks = {costs.held(each) for each in stages}
    return max((update_s(costs.setup, held) for held in ranks), key=lambda parts: sum(parts.values()))
