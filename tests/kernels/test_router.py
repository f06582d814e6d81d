"""Routing: hand-computed choices, transformers' router, gates without bias, one operator, balance loss."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from kernels.router import (
    RouterOutput,
    expert_counts,
    gate_weights,
    route,
    select_experts,
    select_experts_reference,
    sequence_balance,
)


def test_hand_computed_choice_with_groups() -> None:
    # Experts 0-1, 2-3, 4-5, 6-7 are the groups; two groups stay, two experts are chosen.
    scores = torch.tensor([[0.9, 0.1, 0.6, 0.5, 0.2, 0.3, 0.7, 0.0]])
    # Group sums 1.0, 1.1, 0.5, 0.7: groups 1 and 0 stay; expert 6 (0.7) is out although it beats 2 (0.6).
    ids = select_experts(scores, torch.zeros(8), n_group=4, topk_group=2, topk=2)
    assert ids.tolist() == [[0, 2]]
    gates = gate_weights(scores, ids, scale=2.5, normalize=True)
    # 2.5 * 0.9 / 1.5 and 2.5 * 0.6 / 1.5; three fp32 roundings.
    torch.testing.assert_close(gates, torch.tensor([[1.5, 1.0]]), rtol=1e-6, atol=0)
    # The best expert of all is alone in its group when that group's sum decides against it.
    bias = torch.tensor([0.0, -0.5, 0.0, 0.0, 0.0, 0.0, 0.4, 0.0])
    # Biased sums 0.5, 1.1, 0.5, 1.1: groups 1 and 3; biased scores 6: 1.1, then 2: 0.6.
    ids = select_experts(scores, bias, n_group=4, topk_group=2, topk=2)
    assert ids.tolist() == [[6, 2]]
    gates = gate_weights(scores, ids, scale=1.0, normalize=True)
    torch.testing.assert_close(gates, torch.tensor([[0.7 / 1.3, 0.6 / 1.3]]), rtol=1e-6, atol=0)


def test_excluded_groups_are_masked_by_minus_infinity_not_zero() -> None:
    scores = torch.tensor([[0.6, 0.5, 0.1, 0.1]])
    bias = torch.tensor([-1.0, -1.0, -2.0, -2.0])
    # Group 0 stays with biased scores -0.4 and -0.5; a mask of 0 would choose the excluded experts 2 and 3.
    assert select_experts(scores, bias, n_group=2, topk_group=1, topk=2).tolist() == [[0, 1]]


def test_bias_changes_the_choice_never_the_gates() -> None:
    scores, bias = torch.rand(129, 16), 3 * torch.randn(16)
    plain = select_experts(scores, torch.zeros(16), n_group=4, topk_group=2, topk=3)
    biased = select_experts(scores, bias, n_group=4, topk_group=2, topk=3)
    assert not torch.equal(plain.sort(-1).values, biased.sort(-1).values)
    gates = gate_weights(scores, biased, scale=2.5, normalize=True)
    for token in range(129):
        chosen = [float(scores[token, i]) for i in biased[token]]
        expected = torch.tensor([2.5 * s / sum(chosen) for s in chosen])
        # Sum, quotient and product in fp32: three roundings.
        torch.testing.assert_close(gates[token], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("n_group", "topk_group"), [(1, 1), (4, 2), (4, 4), (8, 4)])
@pytest.mark.parametrize("topk", [1, 2, 4])
@pytest.mark.parametrize("normalize", [True, False])
def test_ids_gates_and_gradient_are_those_of_transformers(
    n_group: int, topk_group: int, topk: int, normalize: bool
) -> None:
    config = DeepseekV3Config(
        hidden_size=24,
        n_routed_experts=16,
        num_experts_per_tok=topk,
        n_group=n_group,
        topk_group=topk_group,
        norm_topk_prob=normalize,
        routed_scaling_factor=2.5,
    )
    router = DeepseekV3TopkRouter(config)
    with torch.no_grad():
        router.weight.normal_()
        router.e_score_correction_bias.normal_(std=0.2)
    theirs = torch.randn(63, 24, requires_grad=True)
    x = theirs.detach().clone().requires_grad_()
    _, expected_gates, expected_ids = router(theirs)
    scores = (x @ router.weight.detach().T).sigmoid()
    ids = select_experts(scores, router.e_score_correction_bias, n_group=n_group, topk_group=topk_group, topk=topk)
    gates = gate_weights(scores, ids, scale=2.5, normalize=normalize)
    dense = torch.zeros(63, 16).scatter(1, ids, gates)
    expected = torch.zeros(63, 16).scatter(1, expected_ids, expected_gates)
    assert torch.equal(ids.sort(-1).values, expected_ids.sort(-1).values)
    # A GEMM of 24 terms, a sigmoid and the normalisation in fp32: a few 2^-24.
    torch.testing.assert_close(dense, expected, rtol=1e-5, atol=1e-6)
    weights = torch.randn(63, 16)
    (dense * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(x.grad, theirs.grad, rtol=1e-5, atol=1e-5)


@given(
    seed=st.integers(0, 2**16),
    groups=st.sampled_from([(1, 1, 8), (2, 1, 4), (4, 2, 2), (4, 3, 1), (3, 2, 5)]),
    topk=st.integers(1, 2),
)
def test_choice_equals_a_python_loop_also_with_ties(seed: int, groups: tuple[int, int, int], topk: int) -> None:
    n_group, topk_group, size = groups
    generator = torch.Generator().manual_seed(seed)
    # Multiples of 1/4: ties are common, and sums of two are exact.
    scores = torch.randint(0, 4, (33, n_group * size), generator=generator) / 4
    bias = torch.randint(-2, 3, (n_group * size,), generator=generator) / 4
    ids = select_experts(scores, bias, n_group=n_group, topk_group=topk_group, topk=topk)
    expected = select_experts_reference(scores, bias, n_group=n_group, topk_group=topk_group, topk=topk)
    assert torch.equal(ids, expected)


def test_of_equal_scores_the_lowest_id_wins() -> None:
    ids = select_experts(torch.full((3, 64), 0.5), torch.zeros(64), n_group=8, topk_group=3, topk=5)
    assert ids.tolist() == [[0, 1, 2, 3, 4]] * 3


def test_gate_gradient_in_fp64_and_ids_carry_none() -> None:
    scores = torch.rand(5, 8, dtype=torch.float64, requires_grad=True)
    ids = select_experts(scores, torch.zeros(8, dtype=torch.float64), n_group=4, topk_group=2, topk=3)
    assert not ids.requires_grad
    for normalize in (True, False):
        assert torch.autograd.gradcheck(lambda s, n=normalize: gate_weights(s, ids, scale=2.5, normalize=n), scores)


def test_gates_of_scores_that_are_all_zero_stay_finite() -> None:
    scores = torch.zeros(1, 4, requires_grad=True)
    gates = gate_weights(scores, torch.tensor([[0, 1]]), scale=2.5, normalize=True)
    assert gates.tolist() == [[0.0, 0.0]]


def composed(logits: Tensor, bias: Tensor, *, normalize: bool) -> RouterOutput:
    """What `route` computes, each step an operation of torch that autograd differentiates."""
    scores = logits.sigmoid()
    ids = select_experts(scores.detach(), bias, n_group=4, topk_group=2, topk=3)
    gates = gate_weights(scores, ids, scale=2.5, normalize=normalize)
    return RouterOutput(scores, ids, gates, expert_counts(ids, logits.shape[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("tokens", [0, 1, 63, 129])
def test_route_is_the_four_steps_to_the_bit_and_so_is_its_gradient(
    tokens: int, normalize: bool, dtype: torch.dtype
) -> None:
    logits = torch.randn(tokens, 16, dtype=dtype, requires_grad=True)
    bias = 0.1 * torch.randn(16, dtype=dtype)
    actual = route(logits, bias, n_group=4, topk_group=2, topk=3, scale=2.5, normalize=normalize)
    expected = composed(logits, bias, normalize=normalize)
    for name in ("scores", "ids", "gates", "counts"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    assert not actual.ids.requires_grad
    assert not actual.counts.requires_grad
    weights = torch.randn(tokens, 16, dtype=dtype), torch.randn(tokens, 3, dtype=dtype)
    for share_of_scores, share_of_gates in ((1, 1), (1, 0), (0, 1)):
        grads = []
        for routed in (actual, expected):
            # A share of 0 takes the output out of the graph: its gradient is absent, not zero.
            loss = (weights[0] * routed.scores).sum() if share_of_scores else torch.zeros((), dtype=dtype)
            loss = loss + (weights[1] * routed.gates).sum() if share_of_gates else loss
            grads += torch.autograd.grad(loss, logits, retain_graph=True)
        assert torch.equal(*grads)


@pytest.mark.parametrize("normalize", [True, False])
def test_gradient_of_route_in_fp64(normalize: bool) -> None:
    # Far enough from ties that the finite differences of gradcheck change no choice.
    logits = torch.rand(5, 8).argsort(-1).double().div(4).requires_grad_()
    bias = torch.zeros(8, dtype=torch.float64)

    def values(logits: Tensor) -> tuple[Tensor, Tensor]:
        routed = route(logits, bias, n_group=4, topk_group=2, topk=3, scale=2.5, normalize=normalize)
        return routed.scores, routed.gates

    assert torch.autograd.gradcheck(values, logits)


@pytest.mark.parametrize("tokens", [0, 1, 63, 129])
def test_counts_are_those_of_a_loop(tokens: int) -> None:
    ids = torch.rand(tokens, 8)[:, :7].argsort(-1)[:, :2]
    counts = expert_counts(ids, 8)
    assert counts.dtype == torch.int64
    assert counts.tolist() == [sum(i in row for row in ids.tolist()) for i in range(8)]
    # Expert 7 is never among the seven columns sorted above.
    assert counts[7] == 0


def test_hand_computed_balance_loss() -> None:
    # Two tokens, four experts, top-1. Token 0 chooses 0, token 1 chooses 2.
    scores = torch.tensor([[[0.8, 0.4, 0.4, 0.4], [0.1, 0.1, 0.5, 0.3]]])
    # f = 4 / (1 * 2) * (1, 0, 1, 0); s' = (.4 .2 .2 .2) and (.1 .1 .5 .3); P = (.25, .15, .35, .25).
    expected = 2 * 0.25 + 2 * 0.35
    # Six fp32 operations.
    assert float(sequence_balance(scores, 1)) == pytest.approx(expected, rel=1e-6)


def test_balance_loss_is_one_per_sequence_when_balanced_and_sums_over_sequences() -> None:
    one_hot = torch.eye(8).repeat(4, 1)
    # Each of 8 experts is chosen equally often, with equal mean scores: f_i = 1, P_i = 1/8.
    scores = (one_hot + 0.5)[None].expand(3, -1, -1)
    assert float(sequence_balance(scores, 1)) == pytest.approx(3.0, rel=1e-6)
    # All tokens to one expert: f = 8 and P = 1.5 / 5 for it.
    skewed = (torch.eye(8)[:1].repeat(32, 1) + 0.5)[None]
    assert float(sequence_balance(skewed, 1)) == pytest.approx(8 * 1.5 / 5, rel=1e-6)


def test_balance_loss_and_gradient_equal_the_equations_written_out() -> None:
    scores = torch.rand(3, 21, 10, dtype=torch.float64, requires_grad=True)
    topk = 3
    total = torch.zeros((), dtype=torch.float64)
    for sequence in scores:
        for i in range(10):
            # Eq. 18: the indicator is a constant, only P carries a gradient.
            chosen = sum(i in sorted(range(10), key=lambda j, r=row: -r[j])[:topk] for row in sequence.tolist())
            f = 10 / (topk * 21) * chosen
            p = sum(row[i] / row.sum() for row in sequence) / 21
            total = total + f * p
    loss = sequence_balance(scores, topk)
    (got,) = torch.autograd.grad(loss, scores)
    (want,) = torch.autograd.grad(total, scores)
    # fp64 sums of 630 terms.
    torch.testing.assert_close(loss, total, rtol=1e-12, atol=0)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)


def test_gradients_repeat_to_the_bit() -> None:
    scores = torch.rand(4, 129, 16, requires_grad=True)
    ids = select_experts(scores.flatten(0, 1), torch.zeros(16), n_group=4, topk_group=2, topk=4)
    grads = []
    for _ in range(3):
        gates = gate_weights(scores.flatten(0, 1), ids, scale=2.5, normalize=True)
        grads += torch.autograd.grad(gates.square().sum() + sequence_balance(scores, 4), scores)
    assert all(torch.equal(grads[0], again) for again in grads[1:])
