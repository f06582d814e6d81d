"""Rows grouped by expert for the grouped GEMMs, and the sum back to tokens.

arXiv:2412.19437 §2.1.2 eq. 12 (the sum over chosen experts; the gates are in the rows already, see
`kernels.swiglu`). A token with topk experts has topk *slots*, and each slot goes to one row. Rows of one expert
are contiguous, in token order (stable), and each expert's segment is padded with zero rows to a multiple of
128, the row tile of the grouped GEMM.

- `grouping`: every slot has its expert here. The number of rows is a static bound, so the host never waits for
  counts; rows after the last segment are zero as well.
- `partial_grouping`: the id -1 marks a slot whose expert lives elsewhere; the host knows the number of rows.

Shapes: ids, gates [tokens, topk]; x [tokens, hidden]; rows [num_rows, hidden]; columns = min(topk, experts).
Tokens may be sharded; the experts counted here are the local ones. A token's rows are summed in order of expert,
in fp32: gathers and copies, no atomic addition. It does not move tokens between ranks (parallel.expert does).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.bench_entry import Bench
from kernels.formats import TILE
from kernels.router import expert_counts


@dataclass(frozen=True)
class Grouping:
    """Which slot fills each row, and which rows belong to each token.

    Args:
        slot_of_row: [num_rows] int64, token * topk + k of the slot that fills the row; -1 in padding rows.
        rows_of_token: [tokens, columns] int64, ascending; num_rows where a token has fewer rows.
        group_ends: [experts] int32, exclusive end row of each expert's padded segment.
        topk: slots per token.
        partial: whether some entries of rows_of_token may be num_rows.
    """

    slot_of_row: Tensor
    rows_of_token: Tensor
    group_ends: Tensor
    topk: int
    partial: bool

    @property
    def num_rows(self) -> int:
        """Number of rows, a multiple of 128."""
        return self.slot_of_row.shape[0]

    @property
    def token_of_row(self) -> Tensor:
        """[num_rows] int64, the token that fills the row; -1 in padding rows."""
        return self.slot_of_row.div(self.topk, rounding_mode="floor")


@dataclass(frozen=True)
class Dispatched:
    """Token copies where their experts live, as a dispatcher hands them to the experts.

    Args:
        rows: [rows, hidden], grouped by local expert, each group padded with zeros to a multiple of 128 rows.
        gates: [rows] fp32, the router's gate of each row; 0 in padding rows.
        group_ends: [local_experts] int32, exclusive end row of each expert's group.
        handle: what the same dispatcher needs to bring the results home; opaque to everybody else.
    """

    rows: Tensor
    gates: Tensor
    group_ends: Tensor
    handle: object


@torch.no_grad()
def grouping(ids: Tensor, experts: int) -> Grouping:
    """Lay out one row per slot, grouped by expert.

    Args:
        ids: [tokens, topk] int64, chosen experts, distinct within a token.
        experts: number of experts; unused ones get empty segments.
    Returns:
        The Grouping.
    Source: ours; the alignment is DeepGEMM's M-grouped contiguous layout.
    """
    slots = ids.numel()
    # Each non-empty segment wastes at most 127 rows, and the sum of segments is itself a multiple of 128.
    num_rows = (slots + min(experts, slots) * (TILE - 1)) // TILE * TILE
    return _lay_out(ids, experts, num_rows=num_rows, partial=False)


@torch.no_grad()
def partial_grouping(ids: Tensor, experts: int, *, num_rows: int) -> Grouping:
    """Lay out one row per slot that has its expert here.

    Args:
        ids: [tokens, topk] integers, local experts, distinct within a token; -1 where a slot has none.
        experts: number of local experts; unused ones get empty segments.
        num_rows: at least the sum over experts of their slots, each rounded up to 128.
    Returns:
        The Grouping.
    """
    return _lay_out(ids.long(), experts, num_rows=num_rows, partial=True)


def _lay_out(ids: Tensor, experts: int, *, num_rows: int, partial: bool) -> Grouping:
    flat = ids.flatten()  # [slots]
    # Slots without an expert form one more group after the last; they all get the row after the last.
    groups = torch.where(flat < 0, experts, flat) if partial else flat
    counts = expert_counts(groups, experts + 1)[:experts]
    padded = (counts + TILE - 1) // TILE * TILE
    ends = padded.cumsum(0)
    # Shift from a slot's place in the sorted order to its row: the padding of all earlier experts.
    shift = (ends - padded) - (counts.cumsum(0) - counts)  # [experts]
    groups_sorted, order = groups.sort(stable=True)
    places = torch.arange(flat.shape[0], device=ids.device)
    rows_sorted = places + shift.index_select(0, groups_sorted.clamp_max(experts - 1))
    rows_sorted = torch.where(groups_sorted < experts, rows_sorted, num_rows)
    slot_of_row = torch.full((num_rows + 1,), -1, dtype=torch.int64, device=ids.device)
    slot_of_row.index_copy_(0, rows_sorted, order)
    rows_of_slot = torch.empty_like(flat).index_copy_(0, order, rows_sorted)
    rows_of_token = rows_of_slot.view_as(ids).sort(dim=1).values[:, : min(ids.shape[1], experts)]
    return Grouping(slot_of_row[:num_rows], rows_of_token, ends.to(torch.int32), ids.shape[1], partial)


def group_tokens_reference(x: Tensor, grouping: Grouping) -> Tensor:
    """Product with a dense one-hot matrix. Same arguments as `group_tokens`."""
    return _one_hot(grouping, x.dtype) @ x  # [num_rows, hidden]


def group_gates_reference(gates: Tensor, grouping: Grouping) -> Tensor:
    """Product with a dense one-hot matrix of slots. Same arguments as `group_gates`."""
    slots = torch.arange(gates.numel(), device=gates.device)
    return (grouping.slot_of_row[:, None] == slots).to(gates.dtype) @ gates.flatten()  # [num_rows]


def combine_tokens_reference(rows: Tensor, grouping: Grouping) -> Tensor:
    """Product with the transposed one-hot matrix. Same arguments as `combine_tokens`."""
    return _one_hot(grouping, rows.dtype).t() @ rows  # [tokens, hidden]


def _one_hot(grouping: Grouping, dtype: torch.dtype) -> Tensor:
    """[num_rows, tokens]: 1 where the row belongs to the token."""
    rows = torch.arange(grouping.num_rows, device=grouping.slot_of_row.device)
    return (grouping.rows_of_token[None] == rows[:, None, None]).any(-1).to(dtype)


def copy_tokens(x: Tensor, token_of_row: Tensor) -> Tensor:
    """Rows of x by index, zeros where the index is -1; not differentiable.

    Args:
        x: [tokens, ...].
        token_of_row: [rows] int64.
    Returns:
        [rows, ...] in x.dtype.
    """
    # A zero row behind the last stands for "none": on CPU a tenth of the time of masking afterwards.
    padded = _with_zero_row(x)
    return padded.index_select(0, torch.where(token_of_row < 0, x.shape[0], token_of_row))


def _with_zero_row(x: Tensor) -> Tensor:
    return torch.cat((x, x.new_zeros(1, *x.shape[1:])))


def sum_rows(rows: Tensor, rows_of_token: Tensor, *, partial: bool) -> Tensor:
    """Each token's rows added up from left to right in fp32; not differentiable.

    Args:
        rows: [rows, hidden].
        rows_of_token: [tokens, columns] int64; the number of rows stands for "no row" where `partial`.
        partial: whether such entries occur; a token without any row gets zeros.
    Returns:
        [tokens, hidden] fp32 (fp64 for fp64 rows).
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    total = rows.new_zeros(rows_of_token.shape[0], rows.shape[1], dtype=wide)
    rows = _with_zero_row(rows) if partial else rows
    for column in rows_of_token.unbind(1):
        total.add_(rows.index_select(0, column))
    return total


class _GroupTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, token_of_row: Tensor, rows_of_token: Tensor, partial: bool) -> Tensor:
        ctx.save_for_backward(rows_of_token)
        ctx.partial = partial
        return copy_tokens(x, token_of_row)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (rows_of_token,) = ctx.saved_tensors
        grad_x = sum_rows(grads[0], rows_of_token, partial=ctx.partial)
        return grad_x.to(grads[0].dtype), None, None, None


class _GroupGates(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gates: Tensor, slot_of_row: Tensor) -> Tensor:
        ctx.save_for_backward(slot_of_row)
        ctx.shape = gates.shape
        return copy_tokens(gates.flatten(), slot_of_row)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (slot_of_row,), slots = ctx.saved_tensors, ctx.shape.numel()
        # All padding rows write to one place behind the last slot, which is cut off.
        places = torch.where(slot_of_row < 0, slots, slot_of_row)
        grad_gates = grads[0].new_zeros(slots + 1).index_copy_(0, places, grads[0])
        return grad_gates[:slots].view(ctx.shape), None


class _CombineTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, token_of_row: Tensor, rows_of_token: Tensor, partial: bool) -> Tensor:
        ctx.save_for_backward(token_of_row)
        return sum_rows(rows, rows_of_token, partial=partial).to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (token_of_row,) = ctx.saved_tensors
        return copy_tokens(grads[0], token_of_row), None, None, None


def group_tokens(x: Tensor, grouping: Grouping) -> Tensor:
    """Copy each token to the rows of its experts; all other rows are zero.

    Args:
        x: [tokens, hidden].
        grouping: of the tokens' expert ids.
    Returns:
        [num_rows, hidden] in x.dtype. Its backward adds the row gradients of a token in fp32.
    """
    assert x.shape[0] == grouping.rows_of_token.shape[0], (x.shape, grouping.rows_of_token.shape)
    rows: Tensor = _GroupTokens.apply(  # type: ignore[no-untyped-call]
        x, grouping.token_of_row, grouping.rows_of_token, grouping.partial
    )
    return rows


def group_gates(gates: Tensor, grouping: Grouping) -> Tensor:
    """The gate of each row's slot; 0 in padding rows.

    Args:
        gates: [tokens, topk] fp32.
        grouping: the one that grouped the tokens.
    Returns:
        [num_rows] in gates.dtype. A slot that has no row gets gradient 0.
    """
    assert gates.shape == (grouping.rows_of_token.shape[0], grouping.topk), (gates.shape, grouping.topk)
    row_gates: Tensor = _GroupGates.apply(gates, grouping.slot_of_row)  # type: ignore[no-untyped-call]
    return row_gates


def combine_tokens(rows: Tensor, grouping: Grouping) -> Tensor:
    """Sum of each token's expert rows, eq. 12 without residual and shared expert.

    Args:
        rows: [num_rows, hidden] outputs of the experts, gates included.
        grouping: the one that grouped the tokens.
    Returns:
        [tokens, hidden] in rows.dtype, summed in fp32 and rounded once.
    Source: arXiv:2412.19437 eq. 12.
    """
    assert rows.shape[0] == grouping.num_rows, (rows.shape, grouping.num_rows)
    y: Tensor = _CombineTokens.apply(  # type: ignore[no-untyped-call]
        rows, grouping.token_of_row, grouping.rows_of_token, grouping.partial
    )
    return y


def _bench_inputs(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, 2048, 256, generator=generator).to(device, torch.bfloat16)
    ids = torch.rand(2048, 8, generator=generator).topk(2, dim=-1).indices.to(device)
    return x.requires_grad_(), ids, grad


def _run(x: Tensor, ids: Tensor, grad: Tensor) -> Tensor:
    layout = grouping(ids, 8)
    return torch.autograd.grad(combine_tokens(group_tokens(x, layout), layout), x, grad)[0]


def _peer(x: Tensor, ids: Tensor, grad: Tensor) -> Tensor:
    tokens = ids.flatten().argsort(stable=True) // ids.shape[1]
    rows = x.index_select(0, tokens)
    y = torch.zeros(x.shape, device=x.device).index_add(0, tokens, rows.float()).to(x.dtype)
    return torch.autograd.grad(y, x, grad)[0]


BENCH = (
    Bench(
        name="group+combine forward+backward",
        make_inputs=_bench_inputs,
        run=_run,
        peer=_peer,
        peer_name="index_select + index_add, no padding",
        # The peer's index_select adds two bf16 gradients in bf16, ours in fp32: one bf16 rounding, at most 2^-8.
        tolerance=2**-8,
        flops=0.0,
        bytes=2.0 * 256 * (4 * 2048 + 6 * 4096),
    ),
)
