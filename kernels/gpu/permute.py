"""Device code of `kernels.permute`: the layout without a sort, copies of rows, ordered sums of rows. Bit-equal.

An expert occurs at most once in a token, so a block of tokens is a table [TOKENS, EXPERTS] that says which slot of the
token chose the expert, if any, and everything that a sort would find is a running sum of that table:

    1. `_count`     tokens of each expert in each block of tokens                     [blocks, experts]
    2. `_prefix`    the same of all earlier blocks, and the totals                    [blocks, experts], [experts]
    3. `_place`     row    = padded rows of all earlier experts + of earlier blocks + earlier in this block
                    column = earlier experts of this token: rows ascend with the expert, so the column does too

Sizes do not depend on values and nothing is read back: a CUDA graph can hold all of it. Row numbers are int32 in
registers, for `group_ends` is int32 by contract; offsets are int64. No row is written twice: no atomic additions.
Copies move 4 bytes an element of BF16, sums 2 (columns + 1).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Numbers of tokens and rows differ from call to call under expert parallelism, so no kernel below is compiled again for
# a number that happens to be 1 or a multiple of 16 (`do_not_specialize`).
# Entries of a block's table of (token, expert), tokens of it at most, and warps. None of these measured on a GPU.
TABLE, TOKENS_MAX, TABLE_WARPS = 2048, 512, 8
# Blocks and experts of one step of `_prefix_kernel`.
PREFIX_BLOCKS, PREFIX_EXPERTS = 128, 8
# Elements of a program that copies or sums rows: columns at most, all of them, rows at most; 16 elements a thread.
COLUMNS, ELEMENTS, ROWS_MAX, WARPS = 1024, 4096, 256, 8


@triton.jit
def slots_of_experts(ids_ptr, token, expert, tokens, TOPK: tl.constexpr):
    """Which slot k of a token chose an expert, -1 if none: [TOKENS, EXPERTS] int32."""
    slot = tl.full((token.shape[0], expert.shape[0]), -1, tl.int32)
    # Not unrolled: the ids of all slots at once would not fit in registers.
    for k in range(TOPK):
        chosen = tl.load(ids_ptr + token * TOPK + k, mask=token < tokens, other=-1).to(tl.int32)
        slot = tl.where(chosen[:, None] == expert[None, :], k, slot)
    return slot


@triton.jit(do_not_specialize=["tokens"])
def _count_kernel(
    ids_ptr, counts_ptr, tokens, experts, TOPK: tl.constexpr, TOKENS: tl.constexpr, EXPERTS: tl.constexpr
):
    block = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, EXPERTS)
    slot = slots_of_experts(ids_ptr, block * TOKENS + tl.arange(0, TOKENS), expert, tokens, TOPK)
    count = tl.sum((slot >= 0).to(tl.int32), axis=0)
    tl.store(counts_ptr + block * experts + expert, count, mask=expert < experts)


@triton.jit(do_not_specialize=["blocks"])
def _prefix_kernel(counts_ptr, before_ptr, totals_ptr, blocks, experts, BLOCKS: tl.constexpr, EXPERTS: tl.constexpr):
    expert = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    total = tl.zeros((EXPERTS,), tl.int32)
    for first in range(0, blocks, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        inside = (block < blocks)[:, None] & (expert < experts)[None, :]
        where = block[:, None].to(tl.int64) * experts + expert[None, :]
        count = tl.load(counts_ptr + where, mask=inside, other=0)
        tl.store(before_ptr + where, total[None, :] + tl.cumsum(count, axis=0) - count, mask=inside)
        total += tl.sum(count, axis=0)
    tl.store(totals_ptr + expert, total, mask=expert < experts)


@triton.jit(do_not_specialize=["tokens", "num_rows"])
def _place_kernel(
    ids_ptr, before_ptr, totals_ptr, slot_of_row_ptr, rows_of_token_ptr, group_ends_ptr, tokens, experts, num_rows,
    TOPK: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, EXPERTS)
    padded = (tl.load(totals_ptr + expert, mask=expert < experts, other=0) + 127) // 128 * 128
    ends = tl.cumsum(padded, axis=0)
    tl.store(group_ends_ptr + expert, ends, mask=(expert < experts) & (block == 0))

    before = ends - padded + tl.load(before_ptr + block * experts + expert, mask=expert < experts, other=0)
    token = block * TOKENS + tl.arange(0, TOKENS)
    slot = slots_of_experts(ids_ptr, token, expert, tokens, TOPK)
    chosen = (slot >= 0) & (expert < experts)[None, :]
    one = chosen.to(tl.int32)
    row = before[None, :] + tl.cumsum(one, axis=0) - one
    tl.store(slot_of_row_ptr + row, token[:, None] * TOPK + slot, mask=chosen)
    rows_of_token_ptr += token[:, None] * COLUMNS
    column = tl.cumsum(one, axis=1) - one
    tl.store(rows_of_token_ptr + column, row.to(tl.int64), mask=chosen)
    # The columns that are left stand for "no row".
    used = tl.sum(one, axis=1)
    for column in tl.static_range(COLUMNS):
        unused = (token < tokens) & (used <= column)
        last = tl.full((TOKENS, 1), 0, tl.int64) + num_rows
        tl.store(rows_of_token_ptr + column, last, mask=unused[:, None])


@triton.jit(do_not_specialize=["num_rows"])
def _copy_tokens_kernel(
    x_ptr, slot_of_row_ptr, rows_ptr, num_rows, hidden, TOPK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    slot = tl.load(slot_of_row_ptr + row, mask=row < num_rows, other=-1)
    filled = (slot >= 0)[:, None] & (col < hidden)[None, :]
    x = tl.load(x_ptr + (slot // TOPK)[:, None] * hidden + col[None, :], mask=filled, other=0.0)
    tl.store(
        rows_ptr + row[:, None] * hidden + col[None, :], x, mask=(row < num_rows)[:, None] & (col < hidden)[None, :]
    )


@triton.jit(do_not_specialize=["tokens", "num_rows"])
def _sum_rows_kernel(
    rows_ptr, rows_of_token_ptr, out_ptr, tokens, num_rows, hidden, SUMMANDS: tl.constexpr, TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    col = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for summand in tl.static_range(SUMMANDS):
        row = tl.load(rows_of_token_ptr + token * SUMMANDS + summand, mask=token < tokens, other=num_rows)
        exists = (row < num_rows)[:, None] & (col < hidden)[None, :]
        total += tl.load(rows_ptr + row[:, None] * hidden + col[None, :], mask=exists, other=0.0).to(tl.float32)
    inside = (token < tokens)[:, None] & (col < hidden)[None, :]
    tl.store(out_ptr + token[:, None] * hidden + col[None, :], total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _scatter_gates_kernel(by_row_ptr, slot_of_row_ptr, by_slot_ptr, num_rows, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    slot = tl.load(slot_of_row_ptr + row, mask=row < num_rows, other=-1)
    gate = tl.load(by_row_ptr + row, mask=row < num_rows, other=0.0)
    tl.store(by_slot_ptr + slot, gate, mask=slot >= 0)


def lay_out(ids: Tensor, experts: int, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids [tokens, topk] -> slot_of_row [num_rows], rows_of_token [tokens, columns], group_ends [experts]."""
    ids = ids.contiguous()
    tokens, topk = ids.shape
    width = triton.next_power_of_2(experts)
    tokens_per_block = max(1, min(TOKENS_MAX, TABLE // width))
    # One block even without tokens: group_ends and totals are written all the same.
    blocks = max(1, triton.cdiv(tokens, tokens_per_block))
    counts, before = ids.new_empty(2, blocks, experts, dtype=torch.int32)
    totals = ids.new_empty(experts, dtype=torch.int32)
    slot_of_row = ids.new_full((num_rows,), -1, dtype=torch.int64)
    rows_of_token = ids.new_empty(tokens, min(topk, experts), dtype=torch.int64)
    group_ends = ids.new_empty(experts, dtype=torch.int32)
    sizes = {"TOPK": topk, "TOKENS": tokens_per_block, "EXPERTS": width, "num_warps": TABLE_WARPS}
    _count_kernel[(blocks,)](ids, counts, tokens, experts, **sizes)
    _prefix_kernel[(triton.cdiv(experts, PREFIX_EXPERTS),)](
        counts, before, totals, blocks, experts, PREFIX_BLOCKS, PREFIX_EXPERTS
    )
    _place_kernel[(blocks,)](
        ids, before, totals, slot_of_row, rows_of_token, group_ends, tokens, experts, num_rows,
        COLUMNS=rows_of_token.shape[1], **sizes,
    )  # fmt: skip
    return slot_of_row, rows_of_token, group_ends


def _block_of_rows(hidden: int) -> tuple[int, int]:
    """Rows and columns of a program that copies or sums rows."""
    columns = min(COLUMNS, triton.next_power_of_2(hidden))
    return min(ROWS_MAX, ELEMENTS // columns), columns


def copy_tokens(x: Tensor, slot_of_row: Tensor, topk: int) -> Tensor:
    """x [tokens, ...] -> [rows, ...]: x[slot // topk], zeros where the slot is -1."""
    x, slot_of_row = x.contiguous(), slot_of_row.contiguous()
    hidden = x.shape[1:].numel()
    out = x.new_empty(slot_of_row.shape[0], *x.shape[1:])
    if out.numel():
        rows, columns = _block_of_rows(hidden)
        grid = (triton.cdiv(out.shape[0], rows), triton.cdiv(hidden, columns))
        _copy_tokens_kernel[grid](x, slot_of_row, out, out.shape[0], hidden, topk, rows, columns, num_warps=WARPS)
    return out


def sum_rows(rows: Tensor, rows_of_token: Tensor, partial: bool, out_dtype: torch.dtype) -> Tensor:
    """Rows [rows, hidden] -> [tokens, hidden] out_dtype. The kernel always looks for "no row", so `partial` is moot."""
    assert rows.dtype != torch.float64, "fp64 rows are summed by the reference alone"
    rows, rows_of_token = rows.contiguous(), rows_of_token.contiguous()
    tokens, summands = rows_of_token.shape
    num_rows, hidden = rows.shape
    out = rows.new_empty(tokens, hidden, dtype=out_dtype)
    if out.numel():
        block, columns = _block_of_rows(hidden)
        grid = (triton.cdiv(tokens, block), triton.cdiv(hidden, columns))
        _sum_rows_kernel[grid](
            rows, rows_of_token, out, tokens, num_rows, hidden, summands, block, columns, num_warps=WARPS
        )
    return out


def scatter_gates(by_row: Tensor, slot_of_row: Tensor, tokens: int, topk: int) -> Tensor:
    """by_row [rows] -> [tokens, topk]; 0 where a slot has no row."""
    by_row, slot_of_row = by_row.contiguous(), slot_of_row.contiguous()
    by_slot = by_row.new_zeros(tokens, topk)
    if by_row.numel():
        grid = (triton.cdiv(by_row.numel(), ROWS_MAX),)
        _scatter_gates_kernel[grid](by_row, slot_of_row, by_slot, by_row.numel(), ROWS_MAX, num_warps=WARPS)
    return by_slot
