"""The Triton kernels of `kernels/gpu/router.py`, interpreted, choose and count as the reference and agree in value.

Choices are compared where the reference's margins are wider than the rounding of a score, or where ties are exact.
Tolerances are in FP32 epsilons, 2^-23. A score: e^y, 1 + e^y and the quotient round once each here and in torch, and
the reduced argument costs at most one more: 4 (measured 1.4). A gate: beside its score the sum of topk scores, a
quotient and a product. Outputs are NaN before the kernel writes them (tests/conftest.py).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from kernels import router
from kernels.gpu import router as gpu

EPSILON = 2.0**-23
SCORE_TOLERANCE = 4 * EPSILON


class Size(NamedTuple):
    tokens: int
    n_group: int
    group_size: int
    topk_group: int
    topk: int

    @property
    def experts(self) -> int:
        return self.n_group * self.group_size

    @property
    def how(self) -> tuple[int, int, int, float]:
        """The routing's arguments behind the bias, `normalize` aside."""
        return self.n_group, self.topk_group, self.topk, 2.5


SIZES = [
    # DeepSeek-V3's, at an odd number of tokens, and at one.
    Size(63, 8, 32, 4, 8),
    Size(1, 8, 32, 4, 8),
    # The smallest model of this repository's tests.
    Size(128, 4, 2, 2, 2),
    Size(4097, 4, 2, 2, 2),
    # Neither groups nor their size nor topk a power of two.
    Size(129, 3, 5, 2, 3),
    # No groups, all groups kept, groups of one expert, every expert chosen.
    Size(129, 1, 7, 1, 3),
    Size(63, 4, 4, 4, 5),
    Size(63, 5, 1, 3, 2),
    Size(63, 1, 4, 1, 4),
]


def spread(size: Size) -> tuple[Tensor, Tensor]:
    """Logits and bias with a clear choice: no two biased scores, or sums of two in different groups, come close.

    Scores are a shuffled grid of step 1 / (experts + 2), the bias rises with the id by less than half a step in all: of
    equal sums the later group wins by at least half a step over `experts`.
    """
    experts, step = size.experts, 1 / (size.experts + 2)
    scores = (torch.rand(size.tokens, experts).argsort(-1) + 1.0) * step
    bias = torch.arange(experts) * step / (2 * experts)
    assert step / (2 * experts) > 40 * EPSILON, "a margin must exceed the rounding of two scores and their sum"
    return scores.double().logit().float(), bias


def routed(logits: Tensor, bias: Tensor, size: Size, *, normalize: bool = True) -> tuple[Tensor, ...]:
    return gpu.route(logits, bias, *size.how, normalize)


def reference(logits: Tensor, bias: Tensor, size: Size, *, normalize: bool = True) -> tuple[Tensor, ...]:
    return router.route_reference(logits, bias, *size.how, normalize)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_scores_choice_gates_and_counts(size: Size, normalize: bool) -> None:
    logits, bias = spread(size)
    actual, expected = (f(logits, bias, size, normalize=normalize) for f in (routed, reference))
    assert [(t.shape, t.dtype) for t in actual] == [(t.shape, t.dtype) for t in expected]
    assert torch.equal(actual[1], expected[1])
    assert torch.equal(actual[3], expected[3])
    assert int(actual[3].sum()) == size.tokens * size.topk
    torch.testing.assert_close(actual[0], expected[0], rtol=SCORE_TOLERANCE, atol=0)
    tolerance = SCORE_TOLERANCE + (size.topk + 2) * EPSILON
    torch.testing.assert_close(actual[2], expected[2], rtol=tolerance, atol=0)


@pytest.mark.parametrize("given", ["both", "scores", "gates"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_backward(size: Size, normalize: bool, given: str) -> None:
    scores, ids, gates, _ = reference(*spread(size), size, normalize=normalize)
    grads: tuple[Any, Any] = (torch.randn_like(scores), torch.randn_like(gates))
    grads = (None if given == "gates" else grads[0], None if given == "scores" else grads[1])
    actual = gpu.route_backward(scores, ids, *grads, 2.5, normalize)
    expected = router.route_backward_reference(scores, ids, *grads, 2.5, normalize)
    # A difference of sums of topk terms: their rounding is measured by the largest, not by what is left.
    tolerance = (size.topk + 4) * EPSILON * float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def test_the_sigmoid_is_as_exact_far_from_zero() -> None:
    logits = torch.linspace(-100, 100, 4096)[None]
    scores = gpu.route(logits, torch.zeros(4096), 1, 1, 1, 1.0, True)[0]
    exact = logits.double().sigmoid()
    # Below -88 the score stays at 1 / (1 + e^88) = 6.1e-39.
    torch.testing.assert_close(scores.double(), exact, rtol=SCORE_TOLERANCE, atol=6.1e-39)
    odd = torch.tensor([[float("inf"), float("-inf"), float("nan"), 0.0]])
    scores = gpu.route(odd, torch.zeros(4), 1, 1, 1, 1.0, True)[0]
    assert scores[0, 0] == 1
    assert 0 <= float(scores[0, 1]) < 6.1e-39
    assert scores[0].isnan().tolist() == [False, False, True, False]
    assert scores[0, 3] == 0.5


@pytest.mark.parametrize("size", [size for size in SIZES if size.tokens == 63], ids=str)
def test_of_equal_scores_and_equal_groups_the_lowest_id_wins(size: Size) -> None:
    # The scores of 0 and 200 are exactly 1/2 and 1, so sums with quarters are exact and ties are common.
    logits = 200.0 * torch.randint(0, 2, (size.tokens, size.experts))
    for bias in (torch.zeros(size.experts), torch.randint(-2, 3, (size.experts,)) / 4):
        assert torch.equal(routed(logits, bias, size)[1], reference(logits, bias, size)[1])
    alike = routed(torch.zeros_like(logits), torch.zeros(size.experts), size)[1]
    assert torch.equal(alike, torch.arange(size.topk).expand(size.tokens, -1))


def test_the_bias_decides_the_choice_and_leaves_the_gates_alone() -> None:
    size = Size(63, 8, 32, 4, 8)
    logits, bias = spread(size)
    bias[-size.topk :] += torch.arange(size.topk) + 10.0
    _, ids, gates, counts = routed(logits, bias, size)
    assert torch.equal(ids, torch.arange(255, 247, -1).expand(63, -1))
    chosen = logits.sigmoid()[:, 248:].flip(-1)
    torch.testing.assert_close(gates, 2.5 * chosen / chosen.sum(-1, keepdim=True), rtol=14 * EPSILON, atol=0)
    assert counts.tolist() == [0] * 248 + [63] * 8


def test_all_tokens_to_one_expert() -> None:
    size = Size(4097, 4, 2, 2, 1)
    bias = torch.zeros(8)
    bias[5] = 100.0
    _, ids, gates, counts = routed(torch.randn(4097, 8), bias, size)
    assert bool((ids == 5).all())
    assert counts.tolist() == [0, 0, 0, 0, 0, 4097, 0, 0]
    assert torch.equal(gates, torch.full((4097, 1), 2.5))


def test_excluded_groups_are_masked_by_minus_infinity_not_zero() -> None:
    # Group 0 stays with negative biased scores; a mask of 0 would choose experts 2 and 3.
    bias = torch.tensor([-3.0, -3.25, -4.0, -4.0])
    assert routed(torch.zeros(1, 4), bias, Size(1, 2, 2, 1, 2))[1].tolist() == [[0, 1]]


def test_experts_that_a_bias_of_minus_infinity_switches_off_come_last_and_are_real() -> None:
    # Group 0 is dead; two experts live in each of the others. The rest is of equal rank, in order of id.
    bias = torch.full((20,), float("-inf"))
    bias[[6, 7, 11, 14, 16, 17]] = torch.arange(6.0)
    ids = routed(torch.zeros(3, 20), bias, Size(3, 4, 5, 3, 13))[1]
    assert ids.tolist() == [[17, 16, 14, 11, 7, 6, 0, 1, 2, 3, 4, 5, 8]] * 3


@pytest.mark.parametrize("size", [Size(63, 8, 32, 4, 8), Size(63, 3, 5, 2, 3), Size(63, 5, 1, 3, 2)], ids=str)
def test_nan_and_infinite_logits_choose_as_the_reference_and_spoil_their_own_token_only(size: Size) -> None:
    logits, bias = spread(size)
    clean = routed(logits, bias, size)
    logits[3] = float("nan")
    logits[5, 1] = float("nan")
    logits[6, 2] = float("-nan")
    logits[7, 0], logits[7, 1] = float("inf"), float("-inf")
    scores, ids, gates, counts = routed(logits, bias, size)
    assert torch.equal(ids, reference(logits, bias, size)[1])
    assert torch.equal(counts, reference(logits, bias, size)[3])
    assert all(len(set(row)) == size.topk for row in ids.tolist())
    others = [token for token in range(63) if token not in (3, 5, 6, 7)]
    for got, wanted in zip((scores, ids, gates), clean, strict=False):
        assert torch.equal(got[others], wanted[others])


@pytest.mark.parametrize(
    ("sequences", "tokens", "experts", "topk"), [(1, 4097, 8, 2), (3, 63, 15, 4), (2, 1, 256, 8), (1, 129, 8, 8)]
)
def test_balance_loss_and_gradient(sequences: int, tokens: int, experts: int, topk: int) -> None:
    # Quarters: ties are common, and the choice is exact.
    scores = torch.randint(1, 5, (sequences, tokens, experts)) / 4
    (loss, f), grad = gpu.sequence_balance(scores, topk), torch.tensor(-0.75)
    want, want_f = router.sequence_balance_reference(scores.double(), topk)
    # A whole number times one rounded quotient.
    assert torch.allclose(f.double(), want_f, rtol=2 * EPSILON, atol=0)
    assert torch.equal(f == 0, want_f == 0)
    # Sums of positive terms: a block's 16 steps of log2 ELEMENTS additions, 64 parts, quotients; 2^-17 is 64 roundings.
    assert float(loss) == pytest.approx(float(want), rel=2**-17)
    actual = gpu.sequence_balance_backward(grad, scores, f)
    expected = router.sequence_balance_backward_reference(grad.double(), scores.double(), want_f)
    # A difference of g / S and a sum of up to 256 terms, none larger than g / S of the largest g.
    error = (actual.double() - expected).abs().amax()
    assert float(error) <= 16 * EPSILON * float((grad * f).abs().max()) / tokens / float(scores.sum(-1).min())
    assert torch.equal(gpu.sequence_balance(scores, topk)[0], loss)


def test_a_nan_score_makes_the_balance_loss_nan() -> None:
    scores = torch.rand(2, 63, 15)
    scores[1, 60, 3] = float("nan")
    loss, f = gpu.sequence_balance(scores, 4)
    assert bool(loss.isnan())
    assert torch.equal(f[0], gpu.sequence_balance(scores[:1], 4)[1][0])


def test_no_tokens() -> None:
    scores, ids, gates, counts = routed(torch.empty(0, 8), torch.zeros(8), Size(0, 4, 2, 2, 2))
    assert (scores.shape, ids.shape, gates.shape) == ((0, 8), (0, 2), (0, 2))
    assert counts.tolist() == [0] * 8
    assert gpu.route_backward(scores, ids, None, gates, 2.5, True).shape == (0, 8)
    assert gpu.sequence_balance_backward(torch.ones(()), torch.empty(2, 0, 8), torch.empty(2, 8)).shape == (2, 0, 8)
