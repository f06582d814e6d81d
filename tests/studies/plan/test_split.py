"""A split by time: against every split of a small pipeline, and what a deal promises."""

from __future__ import annotations

from itertools import product

import pytest

from train.studies.plan.split import Split, best_split, deals

# Two ranks, four stages in a V; the last stage also does MTP and heads, 1.4 layers' work.
V = (0, 1, 1, 0)
FIXED = 1.4


def most_loaded(split: Split) -> float:
    """Seconds of the busiest rank; stages with several layers hide a little, so that the sums alone do not decide."""
    load = [0.0, 0.0]
    for stage, layers in enumerate(split):
        load[V[stage]] += layers - 0.01 * layers**2
    load[V[-1]] += FIXED
    return max(load) + 0.001 * min(load)


@pytest.mark.parametrize("num_layers", [4, 7, 11])
def test_the_split_is_the_fastest_of_all(num_layers: int) -> None:
    every = [
        split for split in product(range(num_layers + 1), repeat=4) if sum(split) == num_layers and min(split[:-1]) >= 1
    ]
    first = deals(num_layers, V, last_stage_layers=FIXED)
    found = best_split(first, most_loaded, tries=200)
    assert found in every
    assert most_loaded(found) == min(map(most_loaded, every))


def test_a_deal_is_even_and_leaves_no_other_stage_without_layers() -> None:
    ranks = [min(stage, 31 - stage) for stage in range(32)]
    for split in deals(61, ranks, last_stage_layers=3.0):
        assert sum(split) == 61
        assert min(split[:-1]) == 1
        loads = [split[rank] + split[31 - rank] for rank in range(1, 16)]
        # 61 layers on 16 ranks, where the first has other work: no other rank has two more than another.
        assert max(loads) - min(loads) <= 1


def test_the_same_search_finds_the_same_split() -> None:
    first = deals(11, V, last_stage_layers=FIXED)
    found = {best_split(first, most_loaded, tries=20) for _ in range(3)}
    assert len(found) == 1


def test_one_stage_has_all_layers() -> None:
    first = deals(5, [0], last_stage_layers=1.0)
    assert best_split(first, sum, tries=9) == (5,)
