"""Balanced splits of layers against every cut there is, and by hand for V3."""

from __future__ import annotations

import itertools
import random

import pytest

from parallel.balance import balanced_layers, balanced_loop, balanced_split, balanced_v
from parallel.layout import Layout
from train.config import compose
from train.model.sizes import layer_costs


def every_cut(layers: int, stages: int) -> list[tuple[int, ...]]:
    """All ways to give each stage at least one of so many layers."""
    ends = [(0, *inner, layers) for inner in itertools.combinations(range(1, layers), stages - 1)]
    return [tuple(end - start for start, end in itertools.pairwise(cut)) for cut in ends]


def stage_costs(costs: list[float], cut: tuple[int, ...]) -> list[float]:
    rest = iter(costs)
    return [sum(itertools.islice(rest, layers)) for layers in cut]


@pytest.mark.parametrize("stages", range(1, 6))
def test_a_balanced_split_is_the_best_of_all_cuts(stages: int) -> None:
    """Least maximum of a stage, then least sum of squares, then the first: whole costs, so that every sum is exact."""
    rng = random.Random(stages)
    for layers, spread, _ in itertools.product(range(stages, 10), (1, 3, 1000), range(8)):
        costs = [float(rng.randint(1, spread)) for _ in range(layers)]
        rated = {}
        for cut in every_cut(layers, stages):
            parts = stage_costs(costs, cut)
            rated[cut] = (max(parts), sum(part * part for part in parts), cut)
        assert balanced_split(costs, stages) == min(rated, key=rated.__getitem__), costs


def test_a_split_keeps_the_most_expensive_stage_cheap_and_evens_out_the_others() -> None:
    # By hand. The head adds to the last layer; of (3, 1, 2, 1, 2) and (4, 1, 1, 1, 2), both bound by 13, the first.
    assert balanced_split([1, 1, 1, 5, 8, 1, 13, 2, 2], 5) == (3, 1, 2, 1, 2)
    assert balanced_split([1.0] * 61, 16) == (3, 3, 3) + (4,) * 13
    # A layer more expensive than all others together is alone, and no stage is empty for it.
    assert balanced_split([1, 1, 1, 100], 3) == (1, 2, 1)


@pytest.mark.parametrize("ranks", range(1, 4))
def test_a_balanced_v_is_the_best_of_all_cuts_for_the_ranks(ranks: int) -> None:
    """Least maximum of a rank, then least sum of squared stages: whole costs, so that every sum is exact."""
    rng = random.Random(ranks)
    for layers, spread, _ in itertools.product(range(2 * ranks, 10), (1, 3, 1000), range(6)):
        costs = [float(rng.randint(1, spread)) for _ in range(layers)]

        def rating(cut: tuple[int, ...], costs: list[float] = costs) -> tuple[float, float]:
            parts = stage_costs(costs, cut)
            pairs = [first + last for first, last in zip(parts, reversed(parts), strict=True)]
            return max(pairs[:ranks]), sum(part * part for part in parts)

        found = balanced_v(costs, ranks)
        assert min(found) >= 1
        assert rating(found) == min(map(rating, every_cut(layers, 2 * ranks))), costs


def test_a_v_relieves_the_rank_that_also_ends() -> None:
    # By hand: the last layer with its head costs as much as eight others; with two more its rank has 10 of 19.
    assert balanced_v([1.0] * 11 + [8.0], 2) == (2, 4, 5, 1)
    assert balanced_split([1.0] * 11 + [8.0], 4) == (3, 4, 4, 1), "which would leave rank 0 with 11"


@pytest.mark.parametrize(("ranks", "chunks"), [(2, 2), (2, 3), (3, 2)])
def test_a_balanced_loop_is_within_a_layer_of_the_best_cut_for_the_ranks(ranks: int, chunks: int) -> None:
    """Equal layers under a head: the best of all cuts. Any layers: above it by the most expensive layer at most."""
    rng = random.Random(10 * ranks + chunks)
    for layers in range(ranks * chunks, 11):
        heavy_end = [1.0] * (layers - 1) + [float(rng.randint(1, 6))]
        uneven = [float(rng.randint(1, 9)) for _ in range(layers)]
        for costs, slack in ((heavy_end, 0.0), (uneven, max(uneven))):

            def rating(cut: tuple[int, ...], costs: list[float] = costs) -> float:
                parts = stage_costs(costs, cut)
                return max(sum(parts[rank::ranks]) for rank in range(ranks))

            found = balanced_loop(costs, ranks, chunks)
            assert min(found) >= 1
            assert rating(found) <= min(map(rating, every_cut(layers, ranks * chunks))) + slack, costs


def test_v3_is_cut_by_what_its_layers_multiply_with() -> None:
    """By hand, from the sizes of V3 in millions of weights that a token meets.

    MLA 187.11, dense FFN 396.36, nine experts 396.36, router 1.84, head 926.68. The last layer also carries the head
    and MTP: one more layer, eh_proj 102.76, and a head.
    """
    model = compose(["model=v3_671b"]).model
    moe = 187.11 + 396.36 + 1.84
    expected = [187.11 + 396.36] * 3 + [moe] * 57 + [moe + 926.68 + moe + 102.76 + 926.68]
    assert [cost / 1e6 for cost in layer_costs(model)] == pytest.approx(expected, abs=0.03)
    assert balanced_layers(layer_costs(model), Layout(pp=16, schedule="ZBVZeroBubble")) == (1, 2, 1, *[2] * 28, 1)
    assert balanced_layers(layer_costs(model), Layout(pp=16)) == (4,) * 15 + (1,)
