"""Grouping by expert: stable layout, zeroed padding, an exact identity, gradients against one-hot FP64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.permute import (
    combine_tokens,
    combine_tokens_reference,
    group_tokens,
    group_tokens_reference,
    grouping,
)

EXPERTS = 5


def route(kind: str, tokens: int, topk: int) -> Tensor:
    """Ids [tokens, topk], distinct within a row."""
    if kind == "random":
        return torch.rand(tokens, EXPERTS).argsort(-1)[:, :topk]
    if kind == "an empty expert":
        # Expert 2 is never chosen.
        return torch.tensor([0, 1, 3, 4])[torch.rand(tokens, 4).argsort(-1)[:, :topk]]
    assert kind == "all to the same"
    return torch.arange(3, 3 - topk, -1).expand(tokens, topk)


CASES = [
    (kind, tokens, topk)
    for kind in ("random", "an empty expert", "all to the same")
    for tokens in (1, 63, 129)
    for topk in (1, 2, 3)
]


@pytest.mark.parametrize(("kind", "tokens", "topk"), CASES)
def test_layout_is_stable_padded_to_128_and_inside_its_bound(kind: str, tokens: int, topk: int) -> None:
    ids = route(kind, tokens, topk)
    layout = grouping(ids, EXPERTS)
    expected_rows, ends, end = {}, [], 0
    for expert in range(EXPERTS):
        slots = [s for s, e in enumerate(ids.flatten().tolist()) if e == expert]
        expected_rows |= {slot: end + n for n, slot in enumerate(slots)}
        end += (len(slots) + 127) // 128 * 128
        ends.append(end)
    assert layout.rows_of_slot.tolist() == [expected_rows[slot] for slot in range(tokens * topk)]
    assert layout.group_ends.tolist() == ends
    assert layout.group_ends.dtype == torch.int32
    assert layout.num_rows % 128 == 0
    assert end <= layout.num_rows


def test_bound_of_rows_is_reached_by_the_worst_routing() -> None:
    # One token to each of five experts: five segments of 128 rows.
    layout = grouping(torch.arange(EXPERTS)[:, None], EXPERTS)
    assert layout.group_ends[-1] == layout.num_rows == EXPERTS * 128
    # 129 tokens to expert 0 and one to each of the others.
    layout = grouping(torch.tensor([0] * 129 + [1, 2, 3, 4])[:, None], EXPERTS)
    assert layout.group_ends[-1] == layout.num_rows == 256 + 4 * 128


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "tokens", "topk"), CASES)
def test_group_then_combine_is_identity_for_unit_gates(kind: str, tokens: int, topk: int, dtype: torch.dtype) -> None:
    x = torch.randn(tokens, 24).to(dtype)
    layout = grouping(route(kind, tokens, topk), EXPERTS)
    rows = group_tokens(x, layout)
    # The gate of one choice is 1, of the others 0: any of a token's rows gives the token back, to the bit.
    for choice in range(topk):
        gates = torch.zeros(tokens, topk)
        gates[:, choice] = 1.0
        assert torch.equal(combine_tokens(rows, gates, layout), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_rows_are_zero_even_where_memory_was_poisoned(dtype: torch.dtype) -> None:
    assert bool(torch.empty(4096, 24, dtype=dtype).isnan().all()), "torch.empty must be poisoned by conftest"
    layout = grouping(route("an empty expert", 63, 2), EXPERTS)
    x = torch.ones(63, 24, dtype=dtype, requires_grad=True)
    rows = group_tokens(x, layout)
    used = torch.zeros(layout.num_rows, dtype=torch.bool).index_fill_(0, layout.rows_of_slot, True)
    assert torch.equal(rows[~used], torch.zeros(layout.num_rows - 126, 24, dtype=dtype))
    leaf = rows.detach().requires_grad_()
    combine_tokens(leaf, torch.ones(63, 2), layout).sum().backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad[~used], torch.zeros(layout.num_rows - 126, 24, dtype=dtype))


@pytest.mark.parametrize(("kind", "tokens", "topk"), CASES)
def test_outputs_and_gradients_equal_dense_one_hot_products_in_fp64(kind: str, tokens: int, topk: int) -> None:
    layout = grouping(route(kind, tokens, topk), EXPERTS)
    x = torch.randn(tokens, 24, requires_grad=True)
    gates = torch.rand(tokens, topk, requires_grad=True)
    scale = torch.randn(layout.num_rows, 1)
    y = combine_tokens(group_tokens(x, layout) * scale, gates, layout)
    exact_x, exact_gates = (t.detach().double().requires_grad_() for t in (x, gates))
    rows = group_tokens_reference(exact_x, layout) * scale.double()
    expected = combine_tokens_reference(rows, exact_gates, layout)
    grad = torch.randn_like(y)
    got = torch.autograd.grad(y, (x, gates), grad)
    want = torch.autograd.grad(expected, (exact_x, exact_gates), grad.double())
    # At most 3 products per element of y and x, 24 per gate: 24 * 2^-24 = 1.4e-6.
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_gradients_in_fp64() -> None:
    layout = grouping(route("random", 4, 2), EXPERTS)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(layout.num_rows, 3, dtype=torch.float64, requires_grad=True)
    gates = torch.rand(4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: group_tokens(t, layout), x)
    assert torch.autograd.gradcheck(lambda r, g: combine_tokens(r, g, layout), (rows, gates))


def test_bf16_rows_are_summed_in_fp32_and_rounded_once() -> None:
    # 1 + 2^-9 + 2^-9 = 1 + 2^-8: summed in bf16 (step 2^-7 above 1) both small terms vanish twice over;
    # with a third, 1 + 3 * 2^-9 rounds to 1 + 2^-7.
    layout = grouping(torch.tensor([[0, 1, 2, 3]]), EXPERTS)
    rows = torch.zeros(layout.num_rows, 1, dtype=torch.bfloat16)
    rows[layout.rows_of_slot] = torch.tensor([1.0, 2**-9, 2**-9, 2**-9], dtype=torch.bfloat16)[:, None]
    assert float(combine_tokens(rows, torch.ones(1, 4), layout)) == 1 + 2**-7
    x = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    group_tokens(x, layout).backward(rows)
    assert x.grad is not None
    assert float(x.grad) == 1 + 2**-7


def test_everything_repeats_to_the_bit() -> None:
    ids = route("random", 129, 3)
    x = torch.randn(129, 64).bfloat16().requires_grad_()
    gates = torch.rand(129, 3, requires_grad=True)
    results = []
    for _ in range(3):
        layout = grouping(ids, EXPERTS)
        y = combine_tokens(group_tokens(x, layout), gates, layout)
        grads = torch.autograd.grad(y.float().square().sum(), (x, gates))
        results.append(torch.cat([t.float().flatten() for t in (y, *grads)]))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
