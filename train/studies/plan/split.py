"""Layers of each stage by simulated time: the numbers of `layout.stage_layers`.

Balancing FLOPs, as `parallel/pipeline.py` does, sees neither that MTP and the heads are BF16 nor which pairs of chunks
hide an exchange. Here even deals of layers by their own seconds come first, and the best of them is then changed one
layer at a time. The search is bounded and deterministic; it finds a good split, not surely the best one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

Split = tuple[int, ...]
# The last stage's own work in layers, unknown to a deal: it is tried at these multiples of its seconds.
SCALES = (0.0, 0.5, 0.75, 1.0, 1.25, 1.5)


def deals(num_layers: int, rank_of_stage: Sequence[int], *, last_stage_layers: float) -> list[Split]:
    """Splits that give every rank the same number of layers, the last stage's own work counted as so many of them.

    Args:
        num_layers: main layers of the model, at least one for each stage but the last.
        rank_of_stage: the rank of each stage.
        last_stage_layers: seconds of MTP and heads over seconds of a layer; that stage needs no other layer.
    """
    return list(dict.fromkeys(_deal(num_layers, rank_of_stage, scale * last_stage_layers) for scale in SCALES))


def _deal(num_layers: int, rank_of_stage: Sequence[int], fixed: float) -> Split:
    layers = [1] * len(rank_of_stage)
    layers[-1] = 0
    load = [0.0] * (max(rank_of_stage) + 1)
    for stage, rank in enumerate(rank_of_stage):
        load[rank] += layers[stage]
    load[rank_of_stage[-1]] += fixed
    for _ in range(num_layers - sum(layers)):
        rank = load.index(min(load))
        # Of a rank's stages the shortest, of equal ones the first.
        stage = min((s for s, r in enumerate(rank_of_stage) if r == rank), key=lambda s: layers[s])
        layers[stage] += 1
        load[rank] += 1
    return tuple(layers)


def best_split(first: Sequence[Split], seconds: Callable[[Split], float], *, tries: int, seed: int = 0) -> Split:
    """The fastest of `first`, then of `tries` changes by one layer, each kept if it is faster."""
    best = min(first, key=seconds)
    least, chosen = seconds(best), random.Random(seed)
    stages = len(best)
    ends = [*range(min(3, stages)), *range(max(0, stages - 3), stages)]
    for _ in range(tries if stages > 1 else 0):
        giver, taker = (chosen.choice([*ends, chosen.randrange(stages)]) for _ in range(2))
        changed = list(best)
        changed[giver] -= 1
        changed[taker] += 1
        split = tuple(changed)
        if giver == taker or min(split[:-1]) < 1 or split[-1] < 0:
            continue
        if (now := seconds(split)) < least:
            best, least = split, now
    return best
