"""Device code of `kernels.gather`: FP8 rows by slot, regrouped rows, gradients quantised both ways. Bit-equal.

    gather_tiles                    2.06 bytes an element of the rows
    gather_requantize_transposed    2.04
    gather_quantize_both            4.04, the second read from the L1 cache

A token is read once for each of its rows; the L2 cache may hold it. Offsets are int64. Payloads and scales of tokens
may lie at any distance: packets of expert parallelism are read where they arrived, in 16-byte accesses where rows are
multiples of 16 bytes. Source: arXiv:2412.19437 §3.3.3, §3.5.2.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.formats import TILE
from kernels.gpu.quantize import store_tiles_of_cols, store_tiles_of_rows
from kernels.tiles import empty_tiles

# Rows and tiles of a program of `gather_tiles`: 32 bytes a thread. None of these measured on a GPU.
ROWS, TILES, WARPS = 8, 8, 8
# A program that makes 128x1 tiles holds 128 rows of so many columns.
COLUMNS_TRANSPOSED, WARPS_TRANSPOSED = 64, 4


# The number of rows differs from call to call under expert parallelism. Below it is specialised: it is a multiple of
# 128 and the distance of a transposed payload's rows, which must be known to be a multiple of 16.
@triton.jit(do_not_specialize=["num_rows"])
def _gather_tiles_kernel(
    payload_ptr, scale_ptr, slot_of_row_ptr, rows_ptr, scale_of_rows_ptr, num_rows, cols, token_stride, scale_tile,
    scale_token, TOPK: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * (TILES * 128) + tl.arange(0, TILES * 128)
    slot = tl.load(slot_of_row_ptr + row, mask=row < num_rows, other=-1)
    token = slot // TOPK
    filled = (slot >= 0)[:, None] & (col < cols)[None, :]
    # 0.0, not 0: the compiler casts no integer to FP8, the interpreter does.
    payload = tl.load(payload_ptr + token[:, None] * token_stride + col[None, :], mask=filled, other=0.0)
    inside = (row < num_rows)[:, None] & (col < cols)[None, :]
    tl.store(rows_ptr + row[:, None] * cols + col[None, :], payload, mask=inside)
    tile = (tl.program_id(1) * TILES + tl.arange(0, TILES)).to(tl.int64)
    filled = (slot >= 0)[:, None] & (tile * 128 < cols)[None, :]
    scale = tl.load(scale_ptr + tile[None, :] * scale_tile + token[:, None] * scale_token, mask=filled, other=1.0)
    inside = (row < num_rows)[:, None] & (tile * 128 < cols)[None, :]
    tl.store(scale_of_rows_ptr + tile[None, :] * num_rows + row[:, None], scale, mask=inside)


@triton.jit
def _gather_requantize_transposed_kernel(
    payload_ptr, scale_ptr, slot_of_row_ptr, payload_t_ptr, scale_t_ptr, num_rows, cols, token_stride, scale_tile,
    scale_token, TOPK: tl.constexpr, POWER_OF_TWO: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * 128 + tl.arange(0, 128)
    col = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    slot = tl.load(slot_of_row_ptr + row, mask=row < num_rows, other=-1)
    token = slot // TOPK
    filled = (slot >= 0)[:, None] & (col < cols)[None, :]
    x = tl.load(payload_ptr + token[:, None] * token_stride + col[None, :], mask=filled, other=0.0).to(tl.float32)
    tile = (tl.program_id(1) * COLUMNS // 128).to(tl.int64)
    scale = tl.load(scale_ptr + tile * scale_tile + token * scale_token, mask=slot >= 0, other=1.0)
    store_tiles_of_cols(x * scale[:, None], payload_t_ptr, scale_t_ptr, row, col, num_rows, cols, POWER_OF_TWO)


@triton.jit
def _gather_quantize_both_kernel(
    x_ptr, slot_of_row_ptr, payload_ptr, scale_ptr, payload_t_ptr, scale_t_ptr, num_rows, cols, TOPK: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
):  # fmt: skip
    """A 128x128 square in the chunks of `quantize_tiles_both`, whose reason holds here too."""
    first_row = tl.program_id(0).to(tl.int64) * 128
    first_col = tl.program_id(1) * 128
    col = first_col + tl.arange(0, 128)
    for chunk in tl.static_range(4):
        row = first_row + chunk * 32 + tl.arange(0, 32)
        slot = tl.load(slot_of_row_ptr + row, mask=row < num_rows, other=-1)
        filled = (slot >= 0)[:, None] & (col < cols)[None, :]
        x = tl.load(x_ptr + (slot // TOPK)[:, None] * cols + col[None, :], mask=filled, other=0.0).to(tl.float32)
        store_tiles_of_rows(x, payload_ptr, scale_ptr, row, col, num_rows, cols, POWER_OF_TWO)
    row = first_row + tl.arange(0, 128)
    slot = tl.load(slot_of_row_ptr + row, mask=row < num_rows, other=-1)
    for chunk in tl.static_range(2):
        col = first_col + chunk * 64 + tl.arange(0, 64)
        filled = (slot >= 0)[:, None] & (col < cols)[None, :]
        x = tl.load(x_ptr + (slot // TOPK)[:, None] * cols + col[None, :], mask=filled, other=0.0).to(tl.float32)
        store_tiles_of_cols(x, payload_t_ptr, scale_t_ptr, row, col, num_rows, cols, POWER_OF_TWO)


def gather_tiles(payload: Tensor, scale: Tensor, slot_of_row: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Payload [tokens, cols], scale [ceil(cols/128), tokens] -> [rows, cols], [ceil(cols/128), rows]."""
    payload, slot_of_row = _readable(payload), slot_of_row.contiguous()
    num_rows, cols = len(slot_of_row), payload.shape[1]
    rows, scale_of_rows = empty_tiles(payload, num_rows, cols)
    if rows.numel():
        grid = (triton.cdiv(num_rows, ROWS), triton.cdiv(cols, TILES * TILE))
        _gather_tiles_kernel[grid](
            payload, scale, slot_of_row, rows, scale_of_rows, num_rows, cols, payload.stride(0), *scale.stride(), topk,
            ROWS, TILES, num_warps=WARPS,
        )  # fmt: skip
    return rows, scale_of_rows


def gather_requantize_transposed(
    payload: Tensor, scale: Tensor, slot_of_row: Tensor, topk: int, power_of_two: bool
) -> tuple[Tensor, Tensor]:
    """Payload [tokens, cols], scale [ceil(cols/128), tokens] -> [cols, rows], [ceil(rows/128), cols]."""
    payload, slot_of_row = _readable(payload), slot_of_row.contiguous()
    num_rows, cols = len(slot_of_row), payload.shape[1]
    payload_t, scale_t = empty_tiles(payload, cols, num_rows)
    if payload_t.numel():
        grid = (triton.cdiv(num_rows, TILE), triton.cdiv(cols, COLUMNS_TRANSPOSED))
        _gather_requantize_transposed_kernel[grid](
            payload, scale, slot_of_row, payload_t, scale_t, num_rows, cols, payload.stride(0), *scale.stride(), topk,
            power_of_two, COLUMNS_TRANSPOSED, num_warps=WARPS_TRANSPOSED,
        )  # fmt: skip
    return payload_t, scale_t


def gather_quantize_both(
    x: Tensor, slot_of_row: Tensor, topk: int, power_of_two: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[tokens, cols] -> payload and scale of the rows in 1x128 tiles, then in 128x1 tiles."""
    x, slot_of_row = x.contiguous(), slot_of_row.contiguous()
    num_rows, cols = len(slot_of_row), x.shape[1]
    payload, scale = empty_tiles(x, num_rows, cols)
    payload_t, scale_t = empty_tiles(x, cols, num_rows)
    if payload.numel():
        grid = (triton.cdiv(num_rows, TILE), triton.cdiv(cols, TILE))
        _gather_quantize_both_kernel[grid](
            x, slot_of_row, payload, scale, payload_t, scale_t, num_rows, cols, topk, power_of_two,
            num_warps=WARPS_TRANSPOSED,
        )  # fmt: skip
    return payload, scale, payload_t, scale_t


def _readable(payload: Tensor) -> Tensor:
    """Rows may lie apart, their elements may not."""
    return payload if payload.stride(1) == 1 else payload.contiguous()
