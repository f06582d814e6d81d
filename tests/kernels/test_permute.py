"""Grouping by expert: stable layout, zeroed padding, an exact identity, gradients against one-hot FP64."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from kernels.formats import TILE, ceil_div
from kernels.permute import (
    combine_tokens,
    combine_tokens_reference,
    group_gates,
    group_gates_reference,
    group_tokens,
    group_tokens_reference,
    grouping,
    partial_grouping,
)
from tests.kernels.expert_layouts import EXPERTS, KINDS, LOCAL, choices, layout_of
from tests.kernels.gemm_inputs import beside_reference

CASES = list(product(KINDS, (1, 63, 129), (1, 2, 3)))


@pytest.mark.parametrize("which", ["whole", "partial"])
@pytest.mark.parametrize(("kind", "tokens", "topk"), CASES)
def test_layout_is_stable_padded_to_128_and_inside_its_bound(kind: str, tokens: int, topk: int, which: str) -> None:
    ids, layout = layout_of(choices(kind, tokens, topk), which)
    expected, ends = [-1] * layout.num_rows, []
    rows_of_token: dict[int, list[int]] = {token: [] for token in range(tokens)}
    end = 0
    for expert in range(EXPERTS if which == "whole" else LOCAL):
        slots = [s for s, e in enumerate(ids.flatten().tolist()) if e == expert]
        for n, slot in enumerate(slots):
            expected[end + n] = slot
            rows_of_token[slot // topk].append(end + n)
        end += ceil_div(len(slots), TILE) * TILE
        ends.append(end)
    assert layout.slot_of_row.tolist() == expected
    padded = [(rows + [layout.num_rows] * topk)[:topk] for rows in rows_of_token.values()]
    assert layout.rows_of_token.tolist() == padded
    assert layout.group_ends.tolist() == ends
    assert layout.group_ends.dtype == torch.int32
    assert layout.num_rows % 128 == 0
    assert end <= layout.num_rows
    assert which == "whole" or end == layout.num_rows


def test_bound_of_rows_is_reached_by_the_worst_routing() -> None:
    # One token to each expert: as many segments of 128 rows.
    layout = grouping(torch.arange(EXPERTS)[:, None], EXPERTS)
    assert layout.group_ends[-1] == layout.num_rows == EXPERTS * 128
    # 129 tokens to expert 0 and one to each of the others.
    layout = grouping(torch.tensor([0] * 129 + list(range(1, EXPERTS)))[:, None], EXPERTS)
    assert layout.group_ends[-1] == layout.num_rows == 256 + (EXPERTS - 1) * 128


def test_a_token_has_no_more_columns_than_there_are_experts() -> None:
    ids = torch.tensor([[1, -1, -1, -1, 0, -1], [-1, -1, -1, 1, -1, -1], [-1] * 6])
    layout = partial_grouping(ids, 2, num_rows=256)
    assert layout.rows_of_token.tolist() == [[0, 128], [129, 256], [256, 256]]
    x = torch.tensor([[1.0], [2.0], [4.0]])
    assert combine_tokens(group_tokens(x, layout), layout).tolist() == [[2.0], [2.0], [0.0]]


@pytest.mark.parametrize("experts_here", [0, 1])
def test_no_token_or_no_local_slot_gives_empty_rows_and_zero_sums(experts_here: int) -> None:
    for tokens in (0, 3):
        ids = torch.full((tokens, 2), -1)
        layout = partial_grouping(ids, experts_here + 1, num_rows=0)
        x, gates = torch.ones(tokens, 4, requires_grad=True), torch.ones(tokens, 2, requires_grad=True)
        rows, row_gates = group_tokens(x, layout), group_gates(gates, layout)
        assert rows.shape == (0, 4)
        y = combine_tokens(rows * row_gates[:, None], layout)
        assert torch.equal(y, torch.zeros(tokens, 4))
        # A process without tokens still takes part in backward: the graph reaches the inputs.
        grads = torch.autograd.grad(y.sum(), (x, gates))
        assert all(map(torch.equal, grads, (torch.zeros(tokens, 4), torch.zeros(tokens, 2))))
    whole = grouping(torch.zeros(0, 2, dtype=torch.int64), EXPERTS)
    assert combine_tokens(group_tokens(torch.ones(0, 4), whole), whole).shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "tokens", "topk"), CASES)
def test_group_then_combine_is_identity_for_unit_gates(kind: str, tokens: int, topk: int, dtype: torch.dtype) -> None:
    x = torch.randn(tokens, 24).to(dtype)
    layout = grouping(choices(kind, tokens, topk), EXPERTS)
    rows = group_tokens(x, layout)
    # The gate of one choice is 1, of the others 0: any of a token's rows gives the token back, to the bit.
    for choice in range(topk):
        gates = torch.zeros(tokens, topk)
        gates[:, choice] = 1.0
        gated = rows * group_gates(gates, layout)[:, None].to(dtype)
        assert torch.equal(combine_tokens(gated, layout), x)


@pytest.mark.parametrize("which", ["whole", "partial"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_rows_are_zero_even_where_memory_was_poisoned(dtype: torch.dtype, which: str) -> None:
    assert bool(torch.empty(4096, 24, dtype=dtype).isnan().all()), "torch.empty must be poisoned by conftest"
    ids, layout = layout_of(choices("empty experts", 63, 2), which)
    used = layout.slot_of_row >= 0
    assert int(used.sum()) == int((ids >= 0).sum()) > 0
    zeros = torch.zeros(layout.num_rows - int(used.sum()), 24, dtype=dtype)
    assert len(zeros) > 0
    assert torch.equal(group_tokens(torch.ones(63, 24, dtype=dtype), layout)[~used], zeros)
    assert torch.equal(group_gates(torch.ones(63, 2), layout), used.float())
    leaf = torch.randn(layout.num_rows, 24).to(dtype).requires_grad_()
    combine_tokens(leaf, layout).sum().backward()
    assert torch.equal(leaf.grad[~used], zeros)
    assert torch.equal(leaf.grad[used], torch.ones(int(used.sum()), 24, dtype=dtype))


def test_a_nan_in_padding_or_in_a_foreign_row_reaches_no_token() -> None:
    ids, layout = layout_of(choices("random", 63, 2), "partial")
    lonely = int((ids[:, 0] < 0).nonzero()[0])
    rows = torch.ones(layout.num_rows, 4)
    rows[layout.slot_of_row < 0] = float("nan")
    rows[layout.slot_of_row // layout.topk != lonely] = float("nan")
    assert torch.equal(combine_tokens(rows, layout)[lonely], torch.full((4,), float((ids[lonely] >= 0).sum())))


@pytest.mark.parametrize("which", ["whole", "partial"])
@pytest.mark.parametrize(("kind", "tokens", "topk"), CASES)
def test_outputs_and_gradients_equal_dense_one_hot_products_in_fp64(
    kind: str, tokens: int, topk: int, which: str
) -> None:
    _, layout = layout_of(choices(kind, tokens, topk), which)
    x = torch.randn(tokens, 24, requires_grad=True)
    gates = torch.rand(tokens, topk, requires_grad=True)
    scale = torch.randn(layout.num_rows, 1)

    def ours(x: Tensor, gates: Tensor) -> Tensor:
        return combine_tokens(group_tokens(x, layout) * scale * group_gates(gates, layout)[:, None], layout)

    def reference(x: Tensor, gates: Tensor) -> Tensor:
        rows = group_tokens_reference(x, layout) * scale.double()
        return combine_tokens_reference(rows * group_gates_reference(gates, layout)[:, None], layout)

    for a, b in beside_reference(ours, reference, x, gates):
        # At most 3 products per element of y and x, 24 per gate: 24 * 2^-24 = 1.4e-6.
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("which", ["whole", "partial"])
def test_gradients_in_fp64(which: str) -> None:
    _, layout = layout_of(choices("random", 4, 2), which)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(layout.num_rows, 3, dtype=torch.float64, requires_grad=True)
    gates = torch.rand(4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: group_tokens(t, layout), x)
    assert torch.autograd.gradcheck(lambda t: group_gates(t, layout), gates)
    assert torch.autograd.gradcheck(lambda t: combine_tokens(t, layout), rows)


def test_bf16_rows_are_summed_in_fp32_and_rounded_once() -> None:
    # 1 + 2^-9 + 2^-9 = 1 + 2^-8: summed in bf16 (step 2^-7 above 1) both small terms vanish twice over;
    # with a third, 1 + 3 * 2^-9 rounds to 1 + 2^-7.
    layout = grouping(torch.tensor([[0, 1, 2, 3]]), EXPERTS)
    rows = torch.zeros(layout.num_rows, 1, dtype=torch.bfloat16)
    rows[layout.rows_of_token[0]] = torch.tensor([1.0, 2**-9, 2**-9, 2**-9], dtype=torch.bfloat16)[:, None]
    assert float(combine_tokens(rows, layout)) == 1 + 2**-7
    x = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    group_tokens(x, layout).backward(rows)
    assert float(x.grad) == 1 + 2**-7


@pytest.mark.parametrize("which", ["whole", "partial"])
def test_everything_repeats_to_the_bit(which: str) -> None:
    ids = choices("random", 129, 3)
    x = torch.randn(129, 64).bfloat16().requires_grad_()
    gates = torch.rand(129, 3, requires_grad=True)
    results = []
    for _ in range(3):
        _, layout = layout_of(ids, which)
        gated = group_tokens(x, layout) * group_gates(gates, layout)[:, None]
        y = combine_tokens(gated.to(x.dtype), layout)
        grads = torch.autograd.grad(y.float().square().sum(), (x, gates))
        results.append(torch.cat([t.float().flatten() for t in (y, *grads)]))
    assert all(torch.equal(results[0], again) for again in results[1:])
