"""Temperature, top-p, ties, and drafts that leave the distribution as it is."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch

from train.generate.sampling import Sampling, draw, probabilities, verify


def test_temperature_divides_the_logits() -> None:
    got = probabilities(torch.tensor([0.0, 1.0, 3.0]), Sampling(temperature=0.5))
    expected = torch.tensor([math.exp(2 * x) for x in (0.0, 1.0, 3.0)], dtype=torch.float64)
    torch.testing.assert_close(got, expected / expected.sum(), rtol=1e-15, atol=0.0)
    # A tiny temperature does not overflow.
    got = probabilities(torch.tensor([-50.0, 80.0, 79.0]), Sampling(temperature=1e-300))
    assert got.tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(1.0, [0, 1, 2, 3]), (0.8, [0, 1, 2]), (0.76, [0, 1, 2]), (0.75, [1, 2]), (0.5, [1]), (0.01, [1])],
)
def test_top_p_keeps_the_fewest_tokens_that_weigh_enough(top_p: float, kept: list[int]) -> None:
    # Weights 1/8, 1/2, 1/4, 1/8; of the two equal ones the lower id is the heavier.
    weights = torch.tensor([1.0, 4.0, 2.0, 1.0], dtype=torch.float64)
    got = probabilities(weights.log(), Sampling(temperature=1.0, top_p=top_p))
    mask = torch.zeros(4, dtype=torch.float64).index_fill_(0, torch.tensor(kept), 1.0)
    torch.testing.assert_close(got, weights * mask / (weights * mask).sum(), rtol=1e-14, atol=0.0)


@pytest.mark.parametrize("width", [3, 61, 5000])
def test_of_equal_logits_the_lowest_ids_are_taken_by_top_p_and_greedily(width: int) -> None:
    logits = torch.zeros(4, width)
    logits[1, width // 2 :], logits[2, -1], logits[3, 0] = 1.0, 1.0, -1.0
    got = probabilities(logits, Sampling(temperature=0.0))
    assert got.argmax(-1).tolist() == [0, width // 2, width - 1, 1]
    assert torch.equal(got.sum(-1), torch.ones(4, dtype=torch.float64))
    half = probabilities(torch.zeros(4096), Sampling(temperature=1.0, top_p=0.5))
    assert half.nonzero().flatten().tolist() == list(range(2048))


def test_logits_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        probabilities(torch.tensor([0.0, math.nan]), Sampling(temperature=0.0))


WRONG = [("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("top_p", 0.0), ("top_p", 1.1)]


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_values_out_of_range_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{field}: "):
        Sampling(**{field: value})


def test_a_draw_splits_the_unit_interval_by_weight() -> None:
    weights = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0], dtype=torch.float64)
    edges = {0.0: 1, 0.2499: 1, 0.25: 3, 0.7499: 3, 0.75: 4, 1 - 2**-53: 4}
    assert {u: draw(weights, u) for u in edges} == edges
    # Unnormalised weights, and a sum that rounds: never an id without weight.
    thirds = torch.tensor([0.1, 0.2, 0.3, 0.0], dtype=torch.float64)
    assert draw(thirds, 1 - 2**-53) == 2


DISTRIBUTIONS = {
    "disjoint": ([5, 5, 0, 0], [0, 0, 5, 5]),
    "the same": ([2, 3, 5, 0], [2, 3, 5, 0]),
    "crossing": ([5, 3, 2, 0], [2, 3, 1, 4]),
    "greedy": ([0, 10, 0, 0], [4, 4, 1, 1]),
}


@pytest.mark.parametrize(("p", "q"), DISTRIBUTIONS.values(), ids=DISTRIBUTIONS.keys())
def test_the_token_after_a_draft_has_the_main_models_distribution_exactly(p: list[int], q: list[int]) -> None:
    # Weights in tenths. Both uniform numbers run over midpoints of a grid on which p/q and the rest are whole cells.
    cells = 40
    grid = [(i + 0.5) / cells for i in range(cells)]
    wanted = torch.tensor([p, p], dtype=torch.float64) / 10
    proposed = torch.tensor(q, dtype=torch.float64) / 10
    found = [Fraction(0)] * 4
    for token, weight in enumerate(q):
        for u, v in itertools.product(grid, grid) if weight else ():
            numbers = iter((u, v))
            first = verify([token], [proposed], wanted, lambda numbers=numbers: next(numbers))[0]
            found[first] += Fraction(weight, 10 * cells**2)
    assert found == [Fraction(weight, 10) for weight in p]


def test_after_a_rejected_draft_the_later_ones_are_rejected_too() -> None:
    one = torch.eye(5, dtype=torch.float64)
    drafts, proposed = [1, 2, 3], [*one[1:4]]
    assert verify(drafts, proposed, one[[1, 4, 3, 0]], lambda: 0.5) == [1, 4]
    assert verify(drafts, proposed, one[[1, 2, 3, 0]], lambda: 0.5) == [1, 2, 3, 0]
    assert verify([], [], one[2:3], lambda: 0.5) == [2]
