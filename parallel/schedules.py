"""Facts about pipeline schedules by name: how many stages a rank owns, which ones, how many micro-batches it takes.

A pipeline (arXiv:2412.19437 §3.2.1) cuts the layers into stages, numbered along the forward pass. A schedule orders the
forwards and backwards of the stages; the orders themselves are those of `torch.distributed.pipelining`, whose names
are used here. What a layout must know about a schedule is little:

    placement "loop"   stage s lives on rank s mod pp                 1F1B: rank r owns stage r
    placement "v"      rank r owns stages r and 2 pp - 1 - r          the first and the last stage share rank 0

With one pipeline rank there is no pipeline: one stage, whatever the schedule.

It builds no schedule, moves no tensor and imports no torch; `SCHEDULES` is the list of names a layout may choose.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ScheduleFacts:
    """What a layout must know about one schedule.

    Args:
        name: as `torch.distributed.pipelining` calls it.
        stages_per_rank: stages that each rank owns.
        placement: 'loop' or 'v', see the module's head.
        waits_for_all_stages: torch refuses fewer micro-batches than stages.
    """

    name: str
    stages_per_rank: int
    placement: Literal["loop", "v"]
    waits_for_all_stages: bool

    def min_micro_batches(self, pp: int) -> int:
        """The smallest legal number of micro-batches of one step on `pp` ranks."""
        return num_stages(self.name, pp) if self.waits_for_all_stages else 1


SCHEDULES = {
    facts.name: facts
    for facts in (
        # Schedule1F1B raises below one micro-batch a stage: its warm-up hands one to every stage.
        ScheduleFacts("1F1B", stages_per_rank=1, placement="loop", waits_for_all_stages=True),
        # ScheduleZBVZeroBubble plans for 2 pp - 1 micro-batches or more and strikes out those that do not exist:
        # any number from one is legal, below 2 pp - 1 the pipeline does not fill.
        ScheduleFacts("ZBVZeroBubble", stages_per_rank=2, placement="v", waits_for_all_stages=False),
    )
}


def schedule_facts(name: str) -> ScheduleFacts:
    """Look a schedule up.

    Raises:
        ValueError: no such schedule; the message names the nearest one.
    """
    if name not in SCHEDULES:
        (near,) = difflib.get_close_matches(name, SCHEDULES, n=1, cutoff=0.0)
        names = ", ".join(SCHEDULES)
        raise ValueError(
            f"layout.schedule={name} is not a pipeline schedule: did you mean layout.schedule={near}? ({names})"
        )
    return SCHEDULES[name]


def num_stages(schedule: str, pp: int) -> int:
    """Stages of the whole pipeline on `pp` ranks."""
    facts = schedule_facts(schedule)
    return facts.stages_per_rank * pp if pp > 1 else 1


def stage_ids(schedule: str, pp: int, pp_rank: int) -> tuple[int, ...]:
    """The stages of one pipeline rank, ascending.

    Args:
        schedule: a name of `SCHEDULES`.
        pp: pipeline ranks.
        pp_rank: 0 <= pp_rank < pp.
    Returns:
        Every stage belongs to exactly one rank.
    """
    assert 0 <= pp_rank < pp, (pp_rank, pp)
    return tuple(stage for stage in range(num_stages(schedule, pp)) if rank_of_stage(schedule, pp, stage) == pp_rank)


def rank_of_stage(schedule: str, pp: int, stage: int) -> int:
    """The pipeline rank that owns a stage."""
    stages = num_stages(schedule, pp)
    assert 0 <= stage < stages, (stage, stages)
    if schedule_facts(schedule).placement == "v":
        return min(stage, stages - 1 - stage)
    return stage % pp
