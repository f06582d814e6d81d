"""The Triton kernels of `kernels/gpu/permute.py`, interpreted, give the bits of the references and of their gradients.

Sizes are those where something ends: no token, one, an odd number, a tile of rows, one more, many blocks and one token.
Outputs are NaN before the kernel writes them (tests/conftest.py).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import permute
from kernels.gpu import permute as gpu
from kernels.permute import combine_tokens, group_gates, group_tokens, grouping
from tests.kernels.expert_layouts import EXPERTS, KINDS, LOCAL, choices, here, layout_of, padded_rows
from tests.kernels.gemm_inputs import assert_same_bits

BF16, FP32 = torch.bfloat16, torch.float32
TOKENS = (0, 1, 63, 128, 129, 4097)


def assert_same_layout(ids: Tensor, experts: int, num_rows: int) -> None:
    assert_same_bits(gpu.lay_out(ids, experts, num_rows), permute.lay_out_reference(ids, experts, num_rows))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("topk", [1, 3])
@pytest.mark.parametrize("tokens", TOKENS)
def test_layout(tokens: int, topk: int, kind: str) -> None:
    ids = choices(kind, tokens, topk)
    assert_same_layout(ids, EXPERTS, grouping(ids, EXPERTS).num_rows)
    part = here(ids)
    assert_same_layout(part, LOCAL, padded_rows(part, LOCAL))
    # Room to spare stays empty.
    assert_same_layout(part, LOCAL, padded_rows(part, LOCAL) + 256)


def test_layout_at_the_experts_of_v3() -> None:
    ids = torch.rand(129, 256).argsort(-1)[:, :8].contiguous()
    assert_same_layout(ids, 256, grouping(ids, 256).num_rows)


def test_layout_with_fewer_experts_than_slots() -> None:
    ids = torch.tensor([[1, -1, -1, -1, 0, -1], [-1, -1, -1, 1, -1, -1], [-1] * 6])
    assert_same_layout(ids, 2, 256)
    assert_same_layout(torch.tensor([[-1, 0, -1]] * 129), 1, 256)


def test_blocks_of_tokens_are_added_up_in_several_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """33 blocks of 128 tokens, four at a time: what thousands of blocks are at the size of a run."""
    monkeypatch.setattr(gpu, "TOKENS_MAX", 128)
    monkeypatch.setattr(gpu, "PREFIX_BLOCKS", 4)
    ids = choices("random", 4097, 2)
    assert_same_layout(ids, EXPERTS, grouping(ids, EXPERTS).num_rows)


# More columns than one program takes, and fewer; neither a power of two.
WIDTHS = [(63, 1100, BF16), (129, 24, BF16), (129, 24, FP32), (4097, 16, FP32)]


@pytest.mark.parametrize("which", ["whole", "partial"])
@pytest.mark.parametrize(("tokens", "hidden", "dtype"), WIDTHS)
def test_copies_and_sums_are_those_of_the_reference_and_of_each_others_gradients(
    tokens: int, hidden: int, dtype: torch.dtype, which: str
) -> None:
    _, layout = layout_of(choices("random", tokens, 3), which)
    x = torch.randn(tokens, hidden).to(dtype).requires_grad_()
    # Padding rows are poisoned: no token may read one.
    rows = torch.randn(layout.num_rows, hidden).to(dtype)
    rows[layout.slot_of_row < 0] = float("nan")
    rows.requires_grad_()
    copied = gpu.copy_tokens(x.detach(), layout.slot_of_row, layout.topk)
    summed = gpu.sum_rows(rows.detach(), layout.rows_of_token, layout.partial, dtype)
    assert_same_bits(copied, group_tokens(x, layout).detach())
    assert_same_bits(summed, combine_tokens(rows, layout).detach())
    (grad_x,) = torch.autograd.grad(group_tokens(x, layout), x, rows.detach())
    (grad_rows,) = torch.autograd.grad(combine_tokens(rows, layout), rows, x.detach())
    assert_same_bits(summed, grad_x)
    assert_same_bits(copied, grad_rows)
    assert bool(summed.isfinite().all())
    assert bool((copied[layout.slot_of_row < 0] == 0).all())


@pytest.mark.parametrize("which", ["whole", "partial"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_gates_travel_to_rows_and_their_gradients_back(tokens: int, which: str) -> None:
    _, layout = layout_of(choices("random", tokens, 3), which)
    gates, grad = torch.rand(tokens, 3, requires_grad=True), torch.randn(layout.num_rows)
    by_row = group_gates(gates, layout)
    assert_same_bits(gpu.copy_tokens(gates.detach().flatten(), layout.slot_of_row, 1), by_row.detach())
    (expected,) = torch.autograd.grad(by_row, gates, grad)
    assert_same_bits(gpu.scatter_gates(grad, layout.slot_of_row, tokens, 3), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_without_rows_sums_to_zero_and_foreign_rows_stay_foreign(kind: str) -> None:
    _, layout = layout_of(choices(kind, 63, 2), "partial")
    lonely = (layout.rows_of_token == layout.num_rows).all(-1)
    rows = torch.full((layout.num_rows, 24), float("nan"))
    summed = gpu.sum_rows(rows, layout.rows_of_token, True, FP32)
    assert torch.equal(summed[lonely], torch.zeros(int(lonely.sum()), 24))
    assert bool(summed[~lonely].isnan().all())
    assert int(lonely.sum()) > 0 or kind == "all to the same"


@pytest.mark.parametrize(("dtype", "out_dtype"), [(BF16, FP32), (FP32, BF16)])
def test_sums_are_rounded_once_from_left_to_right(dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    # 2^24 + 1 + 1 is 2^24 from the left and 2^24 + 2 from the right.
    rows = torch.tensor([[2.0**24], [1.0], [1.0], [-0.0]], dtype=dtype)
    rows_of_token = torch.tensor([[0, 1, 2], [1, 2, 0], [3, 3, 3]])
    summed = gpu.sum_rows(rows, rows_of_token, False, out_dtype)
    assert summed.tolist() == [[2.0**24], [2.0**24 + 2 if out_dtype == FP32 else 2.0**24], [0.0]]
    assert_same_bits(summed, permute.sum_rows_reference(rows, rows_of_token, False, out_dtype))


def test_a_bf16_sum_is_not_rounded_on_the_way() -> None:
    # Above 1 BF16 steps by 2^-7: each 2^-9 would vanish, three of them round up.
    rows = torch.tensor([[1.0], [2**-9], [2**-9], [2**-9]], dtype=BF16)
    assert gpu.sum_rows(rows, torch.arange(4)[None], False, BF16).tolist() == [[1 + 2**-7]]


def test_nothing_to_do_gives_empty_or_zero_tensors() -> None:
    empty = torch.empty(0, dtype=torch.int64)
    assert gpu.copy_tokens(torch.empty(3, 24), empty, 2).shape == (0, 24)
    # Padding rows only, and nothing to copy.
    assert torch.equal(gpu.copy_tokens(torch.empty(0, 24), torch.full((128,), -1), 2), torch.zeros(128, 24))
    assert torch.equal(gpu.scatter_gates(torch.empty(0), empty, 3, 2), torch.zeros(3, 2))
    no_rows = torch.zeros(3, 2, dtype=torch.int64)
    assert torch.equal(gpu.sum_rows(torch.empty(0, 24), no_rows, True, BF16), torch.zeros(3, 24, dtype=BF16))
