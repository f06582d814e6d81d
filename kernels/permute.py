"""Rows grouped by expert for the grouped GEMMs, and the weighted sum back to tokens.

arXiv:2412.19437 §2.1.2 eq. 12 (the sum over chosen experts). A token with topk experts has topk *slots*;
slot token * topk + k goes to one row. Rows of one expert are contiguous, in token order (stable), and each
expert's segment is padded with zero rows to a multiple of 128, the row tile of the grouped GEMM. The number
of rows is a static bound, so the host never waits for counts; rows after the last segment are zero as well.

Shapes: ids, gates [tokens, topk]; x [tokens, hidden]; rows [num_rows, hidden]. Tokens may be sharded; the
experts counted here are the local ones. Every sum has a fixed order: gathers and copies, no atomic addition.
It does not move tokens between ranks (parallel.expert does).
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
    """Where each token-slot goes.

    Args:
        rows_of_slot: [tokens * topk] int64, destination row of each slot; distinct.
        group_ends: [experts] int32, exclusive end row of each expert's padded segment.
        num_rows: static bound of rows, a multiple of 128.
    """

    rows_of_slot: Tensor
    group_ends: Tensor
    num_rows: int


@torch.no_grad()
def grouping(ids: Tensor, experts: int) -> Grouping:
    """Lay out one row per token-slot, grouped by expert.

    Args:
        ids: [tokens, topk] int64, chosen experts.
        experts: number of experts; unused ones get empty segments.
    Returns:
        The Grouping.
    Source: ours; the alignment is DeepGEMM's M-grouped contiguous layout.
    """
    slots = ids.numel()
    flat = ids.flatten()  # [slots]
    counts = expert_counts(ids, experts)  # [experts]
    padded = (counts + TILE - 1) // TILE * TILE
    ends = padded.cumsum(0)
    # Shift from a slot's place in the sorted order to its row: the padding of all earlier experts.
    shift = (ends - padded) - (counts.cumsum(0) - counts)  # [experts]
    experts_sorted, order = flat.sort(stable=True)
    rows_sorted = torch.arange(slots, device=ids.device) + shift.index_select(0, experts_sorted)
    rows_of_slot = torch.empty_like(flat).index_copy_(0, order, rows_sorted)
    # Each non-empty segment wastes at most 127 rows, and the sum of segments is itself a multiple of 128.
    num_rows = (slots + min(experts, slots) * (TILE - 1)) // TILE * TILE
    return Grouping(rows_of_slot, ends.to(torch.int32), num_rows)


def group_tokens_reference(x: Tensor, grouping: Grouping) -> Tensor:
    """Product with a dense one-hot matrix. Same arguments as `group_tokens`."""
    topk = grouping.rows_of_slot.numel() // x.shape[0]
    slots = x.repeat_interleave(topk, dim=0)  # [tokens * topk, hidden]
    places = torch.arange(grouping.num_rows, device=x.device)[:, None] == grouping.rows_of_slot
    return places.to(x.dtype) @ slots  # [num_rows, hidden]


def combine_tokens_reference(rows: Tensor, gates: Tensor, grouping: Grouping) -> Tensor:
    """Product with a dense matrix of gates. Same arguments as `combine_tokens`."""
    tokens, topk = gates.shape
    places = grouping.rows_of_slot[:, None] == torch.arange(grouping.num_rows, device=rows.device)
    weights = (places.to(gates.dtype) * gates.flatten()[:, None]).view(tokens, topk, -1).sum(1)
    return (weights @ rows.to(gates.dtype)).to(rows.dtype)  # [tokens, hidden]


class _GroupTokens(torch.autograd.Function):
    """Works one choice (column of ids) at a time, so that no [tokens, topk, hidden] copy is made."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows_of_token: Tensor, num_rows: int) -> Tensor:
        ctx.save_for_backward(rows_of_token)
        grouped = x.new_zeros(num_rows, x.shape[1])
        for rows in rows_of_token.unbind(1):
            grouped.index_copy_(0, rows, x)
        return grouped

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (rows_of_token,) = ctx.saved_tensors
        wide = torch.promote_types(grads[0].dtype, torch.float32)
        parts = [grads[0].index_select(0, rows) for rows in rows_of_token.unbind(1)]
        grad_x = parts[0].to(wide)
        for part in parts[1:]:
            grad_x = grad_x + part
        return grad_x.to(grads[0].dtype), None, None


def _columns(gates: Tensor) -> tuple[Tensor, ...]:
    """Each choice's gates, [tokens, 1]; contiguous, for a strided broadcast takes twice as long on a CPU."""
    return gates.t().contiguous().unsqueeze(-1).unbind(0)


class _CombineTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grouped: Tensor, gates: Tensor, rows_of_token: Tensor) -> Tensor:
        ctx.save_for_backward(grouped, gates, rows_of_token)
        y = gates.new_zeros(gates.shape[0], grouped.shape[1])  # [tokens, hidden]
        for rows, gate in zip(rows_of_token.unbind(1), _columns(gates), strict=True):
            y.addcmul_(grouped.index_select(0, rows).to(gates.dtype), gate)
        return y.to(grouped.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        grouped, gates, rows_of_token = ctx.saved_tensors
        grad_y = grads[0].to(gates.dtype)  # [tokens, hidden]
        grad_grouped, grad_gates = torch.zeros_like(grouped), []
        for rows, gate in zip(rows_of_token.unbind(1), _columns(gates), strict=True):
            grad_grouped.index_copy_(0, rows, (grad_y * gate).to(grouped.dtype))
            grad_gates.append((grouped.index_select(0, rows).to(gates.dtype) * grad_y).sum(-1))
        return grad_grouped, torch.stack(grad_gates, dim=1), None


def group_tokens(x: Tensor, grouping: Grouping) -> Tensor:
    """Copy each token to the rows of its experts; all other rows are zero.

    Args:
        x: [tokens, hidden].
        grouping: from `grouping(ids, experts)`.
    Returns:
        [num_rows, hidden] in x.dtype. Its backward adds the topk row gradients of a token in fp32.
    """
    rows_of_token = grouping.rows_of_slot.unflatten(0, (x.shape[0], -1))  # [tokens, topk]
    rows: Tensor = _GroupTokens.apply(x, rows_of_token, grouping.num_rows)  # type: ignore[no-untyped-call]
    return rows


def combine_tokens(rows: Tensor, gates: Tensor, grouping: Grouping) -> Tensor:
    """Gate-weighted sum of each token's expert rows, eq. 12 without residual and shared expert.

    Args:
        rows: [num_rows, hidden] outputs of the experts.
        gates: [tokens, topk] fp32.
        grouping: the one that grouped the tokens.
    Returns:
        [tokens, hidden] in rows.dtype, summed in gates.dtype.
    Source: arXiv:2412.19437 eq. 12.
    """
    assert rows.shape[0] == grouping.num_rows, (rows.shape, grouping.num_rows)
    assert gates.numel() == grouping.rows_of_slot.numel(), (gates.shape, grouping.rows_of_slot.shape)
    rows_of_token = grouping.rows_of_slot.view_as(gates)  # [tokens, topk]
    y: Tensor = _CombineTokens.apply(rows, gates, rows_of_token)  # type: ignore[no-untyped-call]
    return y


def _bench_inputs(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, 2048, 256, generator=generator).to(device, torch.bfloat16)
    ids = torch.rand(2048, 8, generator=generator).topk(2, dim=-1).indices.to(device)
    gates = torch.rand(2048, 2, generator=generator).to(device)
    return x.requires_grad_(), gates.requires_grad_(), ids, grad


def _run(x: Tensor, gates: Tensor, ids: Tensor, grad: Tensor) -> Tensor:
    layout = grouping(ids, 8)
    y = combine_tokens(group_tokens(x, layout), gates, layout)
    return torch.autograd.grad(y, (x, gates), grad)[0]


def _peer(x: Tensor, gates: Tensor, ids: Tensor, grad: Tensor) -> Tensor:
    order = ids.flatten().argsort(stable=True)
    tokens = order // ids.shape[1]
    weighted = x.index_select(0, tokens) * gates.flatten().index_select(0, order)[:, None]
    y = torch.zeros(x.shape, device=x.device).index_add(0, tokens, weighted).to(x.dtype)
    return torch.autograd.grad(y, (x, gates), grad)[0]


BENCH = (
    Bench(
        name="group+combine forward+backward",
        make_inputs=_bench_inputs,
        run=_run,
        peer=_peer,
        peer_name="index_select + index_add, no padding",
        # Two bf16 roundings (row gradients, sum), each 2^-8 / sqrt(3) in the mean square: below 2^-8.
        tolerance=2**-8,
        flops=0.0,
        bytes=2.0 * 256 * (4 * 2048 + 6 * 4096),
    ),
)
