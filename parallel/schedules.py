"""What a layout must know about each pipeline schedule of `torch.distributed.pipelining` (arXiv:2412.19437 §3.2.1).

Placement of stages, numbered along the forward pass:

    "loop"   stage s is on rank s mod pp                 1F1B: rank r owns stage r; interleaved: also pp + r, ...
    "v"      rank r owns stages r and 2 pp - 1 - r       the first and the last stage share rank 0

A step of the batch ramp (§4.2) may have too few micro-batches for a schedule. `when_few` then names one on the same
stages of the same ranks, so that no weight moves.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

# Stages of a rank under a schedule that takes any number, unless the layout says how many.
INTERLEAVED_CHUNKS = 2
# Hidden states and gradients of a rank on their way to other stages. A chunk sends one, an overlapped pair two: each
# then has until the end of the next pair before its rank waits for it. Any number is free of deadlocks
# (`pipeline_stage.MessagesUnderWay`).
MOST_MESSAGES = 4


@dataclass(frozen=True)
class ScheduleFacts:
    """What a schedule fixes, and what it takes.

    Args:
        name: torch's.
        chunks: stages that one rank owns; None: any number.
        placement: of stages.
        micro_batches_per_rank: it takes at least so many times pp; 0: any number.
        whole_rounds: the micro-batches are a multiple of their rounds, m // pp of them, or one.
        when_few: the schedule on the same stages of the same ranks that takes fewer micro-batches.
    """

    name: str
    chunks: int | None
    placement: Literal["loop", "v"]
    micro_batches_per_rank: int = 0
    whole_rounds: bool = False
    when_few: str | None = None

    def rank_of_stage(self, pp: int, stage: int) -> int:
        """The pipeline rank that owns a stage."""
        return min(stage, 2 * pp - 1 - stage) if self.placement == "v" else stage % pp

    def fewest(self, pp: int) -> int:
        """The smallest legal number of micro-batches of one step on `pp` ranks."""
        return max(1, self.micro_batches_per_rank * pp) if pp > 1 else 1

    def takes(self, pp: int, micro_batches: int) -> bool:
        """Whether so many micro-batches are legal on so many ranks."""
        rounds = max(1, micro_batches // pp) if self.whole_rounds and pp > 1 else 1
        return micro_batches % rounds == 0 and micro_batches >= self.fewest(pp)

    def wanted(self, pp: int, micro_batches: int) -> str:
        """What it takes, in words, where it does not take so many micro-batches."""
        least = self.fewest(pp)
        if self.whole_rounds and micro_batches >= least:
            return f"a multiple of {micro_batches} // {pp} = {micro_batches // pp}"
        return f"{least} or more"

    def of_step(self, pp: int, micro_batches: int) -> ScheduleFacts | None:
        """The schedule of a step with so many micro-batches: this one, else the one for few, or None."""
        if self.takes(pp, micro_batches):
            return self
        few = SCHEDULES[self.when_few] if self.when_few else None
        return few if few and few.takes(pp, micro_batches) else None


SCHEDULES = {
    facts.name: facts
    for facts in (
        # Its warm-up hands a micro-batch to every stage.
        ScheduleFacts("1F1B", chunks=1, placement="loop", micro_batches_per_rank=1),
        ScheduleFacts("Interleaved1F1B", chunks=None, placement="loop", whole_rounds=True),
        ScheduleFacts("InterleavedZeroBubble", chunks=None, placement="loop", whole_rounds=True),
        # It plans for 2 pp - 1 micro-batches or more and strikes out those that do not exist: any number from one is
        # legal, below 2 pp - 1 the pipeline does not fill.
        ScheduleFacts("ZBVZeroBubble", chunks=2, placement="v"),
        ScheduleFacts("DualPipeV", chunks=2, placement="v", micro_batches_per_rank=2, when_few="ZBVZeroBubble"),
    )
}


def schedule_facts(name: str) -> ScheduleFacts:
    """The entry of `SCHEDULES`, or a ValueError that names the nearest one."""
    if name not in SCHEDULES:
        (near,) = difflib.get_close_matches(name, SCHEDULES, n=1, cutoff=0.0)
        names = ", ".join(SCHEDULES)
        raise ValueError(
            f"layout.schedule={name} is not a pipeline schedule: did you mean layout.schedule={near}? ({names})"
        )
    return SCHEDULES[name]
