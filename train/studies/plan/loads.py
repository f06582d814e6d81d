"""How unevenly a run used its experts, as the planner's one number for any number of ranks that share them.

    in time     an exchange waits for its fullest rank: rows of that rank over the mean, averaged over layers and steps
    in memory   a rank holds the rows of all its layers: mean over layers, of the fullest rank in the worst step

The loads are those of whole steps (`read_loads.py`): micro-batches are more uneven than their sum.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean


# Compared by identity: plans of thousands of layouts look their answers up by it.
@dataclass(frozen=True, eq=False)
class ExpertLoads:
    """Loads over the layer's mean, [steps][layers][experts], of a run."""

    run: str
    first_step: int
    last_step: int
    loads: Sequence[Sequence[Sequence[float]]]


@functools.cache
def in_time(found: ExpertLoads, ep: int) -> float:
    """What the fullest of `ep` ranks computes in a layer, over the mean of the ranks."""
    return fmean(max(_of_ranks(layer, ep)) for step in found.loads for layer in step)


@functools.cache
def in_memory(found: ExpertLoads, ep: int) -> float:
    """What the fullest of `ep` ranks holds of all layers, over the mean of the ranks, in the worst step."""
    return max(
        max(fmean(of_layers) for of_layers in zip(*(_of_ranks(layer, ep) for layer in step), strict=True))
        for step in found.loads
    )


def _of_ranks(layer: Sequence[float], ep: int) -> list[float]:
    """Load of each rank over the mean: the mean of its experts, which lie side by side."""
    local = len(layer) // ep
    return [fmean(layer[first : first + local]) for first in range(0, len(layer), local)]
