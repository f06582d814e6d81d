"""Layers of each pipeline stage, balanced by their costs (arXiv:2412.19437 §3.2.1); no torch, so that plans share it.

balanced_split    the most expensive stage is as cheap as it can be
balanced_v        the most expensive rank of a V, which owns a stage near either end
balanced_loop     the most expensive rank that owns every pp-th stage: no single move of a layer makes it cheaper
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate, pairwise, permutations

from parallel.layout import Layout


def balanced_split(costs: Sequence[float], stages: int) -> tuple[int, ...]:
    """Cut a row of layers into consecutive stages so as to minimise the most expensive stage.

    Args:
        costs: of each layer, any unit; embedding, head and MTP are counted into the first and the last.
        stages: at most one per layer.
    Returns:
        layers of each stage, at least one each; of equally good cuts the one with the least sum of squared costs.
    """
    assert 1 <= stages <= len(costs), (stages, len(costs))
    sums = [*accumulate(costs, initial=0.0)]

    def best_cut(join: Callable[[float, float], float], limit: float) -> tuple[float, tuple[int, ...]]:
        # Dynamic programming: best[layers] = (joined costs, cut) of the first `layers` layers in the stages so far.
        best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
        for stage in range(stages):
            candidates: dict[int, list[tuple[float, tuple[int, ...]]]] = {}
            for start, (joined, cut) in best.items():
                for end in range(start + 1, len(costs) - (stages - stage - 1) + 1):
                    cost = sums[end] - sums[start]
                    if cost <= limit:
                        candidates.setdefault(end, []).append((join(joined, cost), (*cut, end - start)))
            best = {end: min(found) for end, found in candidates.items()}
        return best[len(costs)]

    # In two passes: the prefix of the evenest cut need not have the least maximum itself.
    most_expensive, _ = best_cut(max, math.inf)
    return best_cut(lambda squares, cost: squares + cost * cost, most_expensive)[1]


def balanced_v(costs: Sequence[float], ranks: int) -> tuple[int, ...]:
    """Cut a row of layers into 2 x ranks consecutive stages so as to minimise the most expensive *rank* of a V.

    Args as for `balanced_split`; of equally good cuts the one with the least sum of squared stages.
    """
    assert 1 <= ranks <= len(costs) // 2, (ranks, len(costs))
    sums = [*accumulate(costs, initial=0.0)]

    def best_cut(join: Callable[[float, float, float], float], limit: float) -> tuple[float, tuple[int, ...]] | None:
        # Dynamic programming: best[front, back] = (joined costs, fronts, backs) with so many layers dealt at each end.
        best: dict[tuple[int, int], tuple[float, tuple[int, ...], tuple[int, ...]]] = {(0, 0): (0.0, (), ())}
        for rank in range(ranks):
            found: dict[tuple[int, int], list[tuple[float, tuple[int, ...], tuple[int, ...]]]] = {}
            for (front, back), (joined, fronts, backs) in best.items():
                # Every rank further in needs two layers; the innermost takes all that is left.
                most = len(costs) - front - back - 2 * (ranks - 1 - rank)
                for ahead in range(1, most):
                    first = sums[front + ahead] - sums[front]
                    if first > limit:
                        break
                    for behind in range(most - ahead if rank == ranks - 1 else 1, most - ahead + 1):
                        last = sums[len(costs) - back] - sums[len(costs) - back - behind]
                        if first + last > limit:
                            break
                        cut = (join(joined, first, last), (*fronts, ahead), (*backs, behind))
                        found.setdefault((front + ahead, back + behind), []).append(cut)
            best = {dealt: min(cuts) for dealt, cuts in found.items()}
        if not best:
            return None
        joined, fronts, backs = min(best.values())
        return joined, (*fronts, *reversed(backs))

    # Rank r owns stages r and 2 ranks - 1 - r: layers are dealt from both ends inwards, each rank taking one stage of
    # either. Balanced stages would give the first rank, which ends with head and MTP, a full first stage besides.
    limit = sums[-1] / ranks
    while (least := best_cut(lambda joined, first, last: max(joined, first + last), limit)) is None:
        limit *= 1.25
    # As in `balanced_split`, evenness is sought in a second pass, among the cuts that the first one allows.
    evenest = best_cut(lambda joined, first, last: joined + first**2 + last**2, least[0])
    assert evenest is not None
    return evenest[1]


def balanced_loop(costs: Sequence[float], ranks: int, chunks: int) -> tuple[int, ...]:
    """Cut a row of layers into ranks x chunks consecutive stages, stage s on rank s mod ranks, by the costs of ranks.

    Args as for `balanced_split`, whose cut it begins with. One layer at a time then moves from a stage to another while
    that makes the most expensive rank cheaper or, at the same cost of it, the stages more even.
    """
    sums = [*accumulate(costs, initial=0.0)]
    stages = ranks * chunks

    def price(cut: tuple[int, ...]) -> tuple[float, float]:
        ends = [*accumulate(cut, initial=0)]
        each = [sums[end] - sums[start] for start, end in pairwise(ends)]
        return max(sum(each[rank::ranks]) for rank in range(ranks)), sum(cost * cost for cost in each)

    best = balanced_split(costs, stages)
    while True:
        moved = [
            tuple(count + (stage == taker) - (stage == giver) for stage, count in enumerate(best))
            for giver, taker in permutations(range(stages), 2)
            if best[giver] > 1
        ]
        cheapest = min(moved, key=price, default=best)
        if price(cheapest) >= price(best):
            return best
        best = cheapest


@cache  # asked for by the plan and by the model
def balanced_layers(costs: tuple[float, ...], layout: Layout) -> tuple[int, ...]:
    """Layers of each stage that minimise the cost of the most expensive pipeline rank."""
    if layout.pp > 1 and layout.facts.placement == "v":
        return balanced_v(costs, layout.pp)
    return balanced_loop(costs, layout.pp, layout.chunks) if layout.chunks > 1 else balanced_split(costs, layout.pp)
