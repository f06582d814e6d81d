"""Rows grouped by expert for the grouped GEMMs, and the sum back to tokens.

arXiv:2412.19437 §2.1.2 eq. 12 (the sum over chosen experts; the gates are in the rows already, see
`kernels.swiglu`). A token with topk experts has topk *slots*, and each slot goes to one row. Rows of one expert
are contiguous, in token order (stable), and each expert's segment is padded with zero rows to a multiple of
128, the row tile of the grouped GEMM (DeepGEMM's M-grouped contiguous layout).

Shapes: ids, gates [tokens, topk]; x [tokens, hidden]; rows [num_rows, hidden]; columns = min(topk, experts).
Tokens may be sharded; the experts counted here are the local ones. A token's rows are summed in order of expert,
in fp32: gathers and copies, no atomic addition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.formats import TILE, CarriedTiles, GradientTiles, Quantized
from kernels.operators import operator
from kernels.router import expert_counts


@dataclass(frozen=True)
class Grouping:
    """Which slot fills each row, and which rows belong to each token."""

    slot_of_row: Tensor  # [num_rows] int64, token * topk + k of the slot that fills the row; -1 in padding rows
    rows_of_token: Tensor  # [tokens, columns] int64, ascending; num_rows where a token has fewer rows
    group_ends: Tensor  # [experts] int32, exclusive end row of each expert's padded segment
    topk: int  # slots per token
    partial: bool  # whether some entries of rows_of_token may be num_rows

    @property
    def num_rows(self) -> int:
        """Number of rows, a multiple of 128."""
        return self.slot_of_row.shape[0]


@dataclass(frozen=True)
class Dispatched:
    """Tokens on the rank of their experts, as a dispatcher hands them to the experts, who make the rows."""

    tokens: Tensor | CarriedTiles  # [tokens, hidden], each once, however many experts it has here
    gates: Tensor  # [rows] fp32, the router's gate of each row; 0 in padding rows
    grouping: Grouping  # of these tokens
    # Where the dispatcher leaves the gradient of the experts' sums, if it arrives in tiles.
    gradient: GradientTiles[Quantized] | None
    handle: object  # what the same dispatcher needs to bring the results home; opaque to others


@torch.no_grad()
def grouping(ids: Tensor, experts: int) -> Grouping:
    """One row per slot of `ids` [tokens, topk] int64, distinct within a token; unused experts get empty segments."""
    slots = ids.numel()
    # A static bound, so the host never waits for counts; rows after the last segment are zero as well.
    # Each non-empty segment wastes at most 127 rows, and the sum of segments is itself a multiple of 128.
    num_rows = (slots + min(experts, slots) * (TILE - 1)) // TILE * TILE
    return Grouping(*_lay_out(ids, experts, num_rows), topk=ids.shape[1], partial=False)


@torch.no_grad()
def partial_grouping(ids: Tensor, experts: int, *, num_rows: int) -> Grouping:
    """One row per slot that has its expert here (else id -1); `num_rows` holds every segment, each padded."""
    return Grouping(*_lay_out(ids, experts, num_rows), topk=ids.shape[1], partial=True)


def lay_out_reference(ids: Tensor, experts: int, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """slot_of_row, rows_of_token and group_ends of a Grouping, by a stable sort; id -1: no expert here."""
    flat = ids.flatten().long()  # [slots]
    # Slots without an expert form one more group after the last; they all get the row after the last.
    groups = torch.where(flat < 0, experts, flat)
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
    # Copies, so that nothing beside the results stays alive.
    return slot_of_row[:num_rows].clone(), rows_of_token.contiguous(), ends.to(torch.int32)


def copy_tokens_reference(x: Tensor, slot_of_row: Tensor, topk: int) -> Tensor:
    """Rows of x [tokens, ...] by slot, zeros where there is none (-1): [rows, ...]."""
    token_of_row = slot_of_row.div(topk, rounding_mode="floor")
    # A zero row behind the last stands for "none": on CPU a tenth of the time of masking afterwards.
    padded = _with_zero_row(x)
    return padded.index_select(0, torch.where(token_of_row < 0, x.shape[0], token_of_row))


def _with_zero_row(x: Tensor) -> Tensor:
    return torch.cat((x, x.new_zeros(1, *x.shape[1:])))


def sum_rows_reference(rows: Tensor, rows_of_token: Tensor, partial: bool, out_dtype: torch.dtype) -> Tensor:
    """Column by column of rows_of_token. Same arguments as `sum_rows`."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    total = rows.new_zeros(rows_of_token.shape[0], rows.shape[1], dtype=wide)
    rows = _with_zero_row(rows) if partial else rows
    for column in rows_of_token.unbind(1):
        total.add_(rows.index_select(0, column))
    return total.to(out_dtype)


def scatter_gates_reference(by_row: Tensor, slot_of_row: Tensor, tokens: int, topk: int) -> Tensor:
    """From rows back to slots: [rows] -> [tokens, topk]; 0 where a slot has no row."""
    slots = tokens * topk
    # All padding rows write to one place behind the last slot, which is cut off.
    places = torch.where(slot_of_row < 0, slots, slot_of_row)
    by_slot = by_row.new_zeros(slots + 1).index_copy_(0, places, by_row)
    return by_slot[:slots].clone().view(tokens, topk)


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


def _allocate_layout(ids: Tensor, experts: int, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    tokens, topk = ids.shape
    slot_of_row = ids.new_empty(num_rows, dtype=torch.int64)
    rows_of_token = ids.new_empty(tokens, min(topk, experts), dtype=torch.int64)
    return slot_of_row, rows_of_token, ids.new_empty(experts, dtype=torch.int32)


def _allocate_sums(rows: Tensor, rows_of_token: Tensor, partial: bool, out_dtype: torch.dtype) -> Tensor:
    return rows.new_empty(rows_of_token.shape[0], rows.shape[1], dtype=out_dtype)


_lay_out = operator("lay_out", lay_out_reference, fake=_allocate_layout, gpu="permute")
_copy_tokens = operator(
    "copy_tokens",
    copy_tokens_reference,
    fake=lambda x, slot_of_row, topk: x.new_empty(slot_of_row.shape[0], *x.shape[1:]),
    gpu="permute",
)
_sum_rows = operator("sum_rows", sum_rows_reference, fake=_allocate_sums, gpu="permute")
_scatter_gates = operator(
    "scatter_gates",
    scatter_gates_reference,
    fake=lambda by_row, slot_of_row, tokens, topk: by_row.new_empty(tokens, topk),
    gpu="permute",
)


def sum_rows(rows: Tensor, rows_of_token: Tensor, *, partial: bool, out_dtype: torch.dtype) -> Tensor:
    """Each token's rows added up from left to right in fp32 (fp64 in fp64), rounded once; not differentiable.

    [rows, hidden], [tokens, columns] -> [tokens, hidden]. Where `partial`, the number of rows stands for "no row".
    """
    return _sum_rows(rows.detach(), rows_of_token, partial, out_dtype)


class _GroupTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, grouping: Grouping) -> Tensor:
        ctx.save_for_backward(grouping.rows_of_token)
        ctx.partial = grouping.partial
        return _copy_tokens(x, grouping.slot_of_row, grouping.topk)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (rows_of_token,) = ctx.saved_tensors
        return _sum_rows(grads[0], rows_of_token, ctx.partial, grads[0].dtype), None


class _GroupGates(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gates: Tensor, slot_of_row: Tensor) -> Tensor:
        ctx.save_for_backward(slot_of_row)
        ctx.shape = gates.shape
        return _copy_tokens(gates.flatten(), slot_of_row, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (slot_of_row,), (tokens, topk) = ctx.saved_tensors, ctx.shape
        return _scatter_gates(grads[0], slot_of_row, tokens, topk), None


class _CombineTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, grouping: Grouping) -> Tensor:
        ctx.save_for_backward(grouping.slot_of_row)
        ctx.topk = grouping.topk
        return _sum_rows(rows, grouping.rows_of_token, grouping.partial, rows.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (slot_of_row,) = ctx.saved_tensors
        return _copy_tokens(grads[0], slot_of_row, ctx.topk), None


def group_tokens(x: Tensor, grouping: Grouping) -> Tensor:
    """Copy each token of x [tokens, hidden] to the rows of its experts, the rest zeros; backward adds in fp32."""
    assert x.shape[0] == grouping.rows_of_token.shape[0], (x.shape, grouping.rows_of_token.shape)
    return _GroupTokens.apply(x, grouping)  # type: ignore[no-any-return, no-untyped-call]


def group_gates(gates: Tensor, grouping: Grouping) -> Tensor:
    """The gate of each row's slot, [num_rows]; 0 in padding rows. A slot that has no row gets gradient 0."""
    assert gates.shape == (grouping.rows_of_token.shape[0], grouping.topk), (gates.shape, grouping.topk)
    return _GroupGates.apply(gates, grouping.slot_of_row)  # type: ignore[no-any-return, no-untyped-call]


def combine_tokens(rows: Tensor, grouping: Grouping) -> Tensor:
    """Sum of each token's expert rows in fp32, rounded once: eq. 12 without residual and shared expert."""
    assert rows.shape[0] == grouping.num_rows, (rows.shape, grouping.num_rows)
    return _CombineTokens.apply(rows, grouping)  # type: ignore[no-any-return, no-untyped-call]
