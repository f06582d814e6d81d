"""The loads of a run's experts, from the table `moe/expert_load` of its metrics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from train.observe.sinks import read_run
from train.studies.plan.loads import ExpertLoads

TABLE = "moe/expert_load"
# The newest steps of a run, which say how its bias has settled.
STEPS = 100


def read_loads(run: Path, *, experts: int) -> ExpertLoads:
    """The loads of a run's newest steps.

    Args:
        experts: of a layer of the model that is planned.
    Raises:
        ValueError: no run, a run without experts, or with another number of them.
    """
    steps = [record for record in read_run(run) if TABLE in record][-STEPS:]
    if not steps:
        raise ValueError(f"{run} has no {TABLE} in its metrics.jsonl: name a run of a model with experts")
    loads = [step[TABLE] for step in steps]
    if {len(layer) for layer in _layers(run, loads)} != {experts}:
        found = len(loads[0][0])
        raise ValueError(
            f"{run} trained {found} experts a layer, this plan has {experts}: name a run with as many experts"
        )
    return ExpertLoads(str(run), steps[0]["step"], steps[-1]["step"], loads)


def _layers(run: Path, steps: Iterable[Any]) -> Iterator[Sequence[float]]:
    for step in steps:
        right = isinstance(step, list) and step and all(isinstance(layer, list) and layer for layer in step)
        numbers = right and all(type(load) in (int, float) for layer in step for load in layer)
        if not numbers:
            raise ValueError(f"{run} has a damaged {TABLE} in its metrics.jsonl: its rows are no lists of numbers")
        yield from step
