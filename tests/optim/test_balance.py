"""The bias update moves loads towards the mean and touches nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from train.optim.balance import max_violation, update_bias


def test_each_bias_moves_by_gamma_against_the_sign_of_its_excess() -> None:
    bias = torch.tensor([0.5, -0.25, 0.1, 2.0])
    before = bias.clone()
    # mean 5: one over, one under, two on it
    update_bias(bias, torch.tensor([9, 1, 5, 5]), 0.001)
    gamma = torch.tensor(0.001)
    expected = torch.stack([before[0] - gamma, before[1] + gamma, before[2], before[3]])
    assert torch.equal(bias, expected)


def test_a_mean_that_is_no_integer_is_compared_exactly() -> None:
    # 2**53 + 1 and 2**53 are one number to a float64, let alone to a float32.
    counts = torch.tensor([2**53 + 1, 2**53, 2**53])
    bias = torch.zeros(3)
    update_bias(bias, counts, 1.0)
    # Their sum is not zero: biases are not centred again.
    assert bias.tolist() == [-1.0, 1.0, 1.0]


def test_several_layers_update_as_if_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 100, (3, 7), generator=generator)
    together = torch.randn(3, 7, generator=generator)
    alone = together.clone()
    update_bias(together, counts, 0.01)
    for layer in range(3):
        update_bias(alone[layer], counts[layer], 0.01)
    assert torch.equal(together, alone)


def test_speed_zero_leaves_every_bit() -> None:
    bias = torch.tensor([-0.0, 0.0, 1e-45, -3.0])  # -0.0 + 0.0 would become 0.0
    before = bias.view(torch.int32).clone()
    update_bias(bias, torch.tensor([0, 5, 1, 9]), 0.0)
    assert torch.equal(bias.view(torch.int32), before)


@pytest.mark.parametrize(
    ("bias", "counts"),
    [
        (torch.zeros(2, dtype=torch.bfloat16), torch.tensor([1, 2])),
        (torch.zeros(2), torch.tensor([1.0, 2.0])),
        (torch.zeros(2), torch.tensor([1, 2], dtype=torch.int32)),
        (torch.zeros(2), torch.tensor([1, 2, 3])),
    ],
)
def test_low_precision_biases_and_counts_are_refused(bias: Tensor, counts: Tensor) -> None:
    with pytest.raises(AssertionError):
        update_bias(bias, counts, 0.001)


def test_max_violation_of_known_loads() -> None:
    counts = torch.tensor([[10, 10, 10, 10], [40, 0, 0, 0], [15, 5, 10, 10], [0, 0, 0, 0]])
    assert max_violation(counts).tolist() == [0.0, 3.0, 0.5, 0.0]


def test_skewed_router_is_balanced_by_the_bias() -> None:
    """Top-2 of 16 experts by score + bias, where some experts score higher than others by up to 0.4."""
    experts, tokens, steps = 16, 512, 400
    generator = torch.Generator().manual_seed(1)
    skew = torch.linspace(-0.2, 0.2, experts)
    bias = torch.zeros(experts)
    violations = []
    for _ in range(steps):
        scores = torch.rand(tokens, experts, generator=generator) * 0.5 + skew  # [tokens, experts]
        chosen = (scores + bias).topk(2, dim=-1).indices  # [tokens, 2]
        counts = torch.bincount(chosen.flatten(), minlength=experts)  # [experts]
        violations.append(float(max_violation(counts)))
        update_bias(bias, counts, 0.001)
    # Measured over four seeds: 2.46 to 2.56 on the first ten steps, 0.21 to 0.24 on the last ten; the noise
    # of 64 tokens per expert alone gives about 2/sqrt(64) = 0.25.
    assert sum(violations[:10]) / 10 > 2.0
    assert sum(violations[-10:]) / 10 < 0.5
