"""Device code of `kernels.quantize`: E4M3 payloads and scales, bit-equal to the references.

    bits(x) & 0x7fffffff    ordered like |x|, with NaN above infinity above every number
    amax  = the largest of a tile, so one NaN makes the tile's scale NaN, as the reference does
    scale = amax / 448, at least 2^-126, optionally with its mantissa rounded up and away; 1 for zeros
    y     = x / scale; for a power of two x * (1/scale), which is the same number

All kernels here are bound by memory. Each program loads a tile once, in 16-byte accesses (counted by
`tests/kernels/test_hopper_codegen.py`), and writes every layout from registers: per element from BF16 `quantize_tiles`
and `quantize_tiles_transposed` move 3 bytes, `quantize_tiles_both` and `quantize_blocks` 4, `requantize_transposed` 2,
`dequantize_tiles` 3. Offsets are int64. Source: arXiv:2412.19437 §3.3.2, §3.5.2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.formats import TILE, ceil_div
from kernels.tiles import empty_tiles

# An earlier prototype of the next two kernels reached 0.96 and 0.93 of copy bandwidth on an H100; this code has not run
# on a GPU.
# Rows and tiles of a program of the row-wise kernels, and its warps.
ROWS, TILES, WARPS = 8, 8, 8
# Columns and warps of a program of `quantize_tiles_transposed`.
COLUMNS_TRANSPOSED, WARPS_TRANSPOSED = 64, 4
# A program of the kernels that hold 128x128 elements: 64 a thread.
WARPS_SQUARE = 8


@triton.jit
def _magnitude_bits(x):
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(amax_bits, POWER_OF_TWO: tl.constexpr, LARGEST: tl.constexpr = 448.0):
    """FP32 scale of a tile from the bits of its largest magnitude, any shape; LARGEST is the format's."""
    amax = amax_bits.to(tl.float32, bitcast=True)
    # A multiplication by 1 / LARGEST would round twice.
    scale = tl.div_rn(amax, tl.full(amax.shape, LARGEST, tl.float32))
    scale = tl.maximum(scale, 1.1754943508222875e-38, propagate_nan=tl.PropagateNan.ALL)
    if POWER_OF_TWO:
        # Adding all mantissa bits carries into the exponent unless they were zero: rounded up.
        rounded = ((scale.to(tl.int32, bitcast=True) + 0x007FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
        scale = tl.where(amax_bits < 0x7F800000, rounded, scale)
    return tl.where(amax_bits == 0, 1.0, scale)


@triton.jit
def to_e4m3(x, scale, POWER_OF_TWO: tl.constexpr):
    """round_to_e4m3(clamp(x / scale)); both of one shape, fp32."""
    if POWER_OF_TWO:
        # The reciprocal of a power of two: exact unless the scale is NaN or infinite, which it stays.
        y = x * (1.0 / scale)
    else:
        y = tl.div_rn(x, scale)
    return tl.clamp(y, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv)


@triton.jit
def _quantize_tiles_kernel(
    x_ptr, payload_ptr, scale_ptr, rows, cols, POWER_OF_TWO: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * (TILES * 128) + tl.arange(0, TILES * 128)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    place = row[:, None] * cols + col[None, :]
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    x = tl.reshape(x, (ROWS, TILES, 128))
    scale = scale_of(tl.max(_magnitude_bits(x), axis=2), POWER_OF_TWO)  # [ROWS, TILES]
    y = to_e4m3(x, tl.broadcast_to(scale[:, :, None], (ROWS, TILES, 128)), POWER_OF_TWO)
    tl.store(payload_ptr + place, tl.reshape(y, (ROWS, TILES * 128)), mask=inside)
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    inside = (row < rows)[:, None] & (tile * 128 < cols)[None, :]
    tl.store(scale_ptr + tile[None, :].to(tl.int64) * rows + row[:, None], scale, mask=inside)


@triton.jit
def store_tiles_of_rows(x, payload_ptr, scale_ptr, row, col, rows, cols, POWER_OF_TWO: tl.constexpr):
    """Quantise and store a [ROWS, 128] tile of a matrix in 1x128 tiles; `col` is its 128 columns."""
    scale = scale_of(tl.max(_magnitude_bits(x), axis=1), POWER_OF_TWO)  # [ROWS]
    y = to_e4m3(x, tl.broadcast_to(scale[:, None], x.shape), POWER_OF_TWO)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    tl.store(payload_ptr + row[:, None] * cols + col[None, :], y, mask=inside)
    tile = (tl.min(col, axis=0) // 128).to(tl.int64)
    tl.store(scale_ptr + tile * rows + row, scale, mask=row < rows)


@triton.jit
def store_tiles_of_cols(x, payload_ptr, scale_ptr, row, col, rows, cols, POWER_OF_TWO: tl.constexpr):
    """Quantise and store a [128, COLUMNS] tile of a matrix in 128x1 tiles, transposed; `row` is its 128 rows."""
    scale = scale_of(tl.max(_magnitude_bits(x), axis=0), POWER_OF_TWO)  # [COLUMNS]
    y = to_e4m3(x, tl.broadcast_to(scale[None, :], x.shape), POWER_OF_TWO)
    inside = (col < cols)[:, None] & (row < rows)[None, :]
    tl.store(payload_ptr + col[:, None].to(tl.int64) * rows + row[None, :], y.T, mask=inside)
    tile = tl.min(row, axis=0) // 128
    tl.store(scale_ptr + tile * cols + col, scale, mask=col < cols)


@triton.jit
def _quantize_tiles_transposed_kernel(
    x_ptr, payload_ptr, scale_ptr, rows, cols, POWER_OF_TWO: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * 128 + tl.arange(0, 128)
    col = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    x = tl.load(x_ptr + row[:, None] * cols + col[None, :], mask=inside, other=0.0).to(tl.float32)
    store_tiles_of_cols(x, payload_ptr, scale_ptr, row, col, rows, cols, POWER_OF_TWO)


@triton.jit
def _quantize_tiles_both_kernel(
    x_ptr, payload_ptr, scale_ptr, payload_t_ptr, scale_t_ptr, rows, cols, POWER_OF_TWO: tl.constexpr
):
    """A 128x128 square, first by rows, then by columns: read once from memory, then from the L1 cache."""
    # Held in registers for both, the square takes 182 of them at 8 warps, and a multiprocessor then has one program and
    # nothing to do while that program waits; in these chunks three programs of 4 warps fit.
    first_row = tl.program_id(0).to(tl.int64) * 128
    first_col = tl.program_id(1) * 128
    col = first_col + tl.arange(0, 128)
    for chunk in tl.static_range(4):
        row = first_row + chunk * 32 + tl.arange(0, 32)
        inside = (row < rows)[:, None] & (col < cols)[None, :]
        x = tl.load(x_ptr + row[:, None] * cols + col[None, :], mask=inside, other=0.0).to(tl.float32)
        store_tiles_of_rows(x, payload_ptr, scale_ptr, row, col, rows, cols, POWER_OF_TWO)
    row = first_row + tl.arange(0, 128)
    for chunk in tl.static_range(2):
        col = first_col + chunk * 64 + tl.arange(0, 64)
        inside = (row < rows)[:, None] & (col < cols)[None, :]
        x = tl.load(x_ptr + row[:, None] * cols + col[None, :], mask=inside, other=0.0).to(tl.float32)
        store_tiles_of_cols(x, payload_t_ptr, scale_t_ptr, row, col, rows, cols, POWER_OF_TWO)


@triton.jit
def _requantize_transposed_kernel(
    payload_ptr, scale_ptr, payload_t_ptr, scale_t_ptr, rows, cols, POWER_OF_TWO: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * 128 + tl.arange(0, 128)
    col = tl.program_id(1) * 128 + tl.arange(0, 128)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    x = tl.load(payload_ptr + row[:, None] * cols + col[None, :], mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + tl.program_id(1).to(tl.int64) * rows + row, mask=row < rows, other=1.0)
    store_tiles_of_cols(x * scale[:, None], payload_t_ptr, scale_t_ptr, row, col, rows, cols, POWER_OF_TWO)


@triton.jit
def _quantize_blocks_kernel(w_ptr, payload_ptr, scale_ptr, payload_t_ptr, rows, cols, POWER_OF_TWO: tl.constexpr):
    """One 128x128 block of one expert's matrix."""
    expert = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * 128 + tl.arange(0, 128)
    col = tl.program_id(1).to(tl.int64) * 128 + tl.arange(0, 128)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    place = expert * rows * cols + row[:, None] * cols + col[None, :]
    w = tl.load(w_ptr + place, mask=inside, other=0.0).to(tl.float32)
    scale = scale_of(tl.max(tl.max(_magnitude_bits(w), axis=1), axis=0), POWER_OF_TWO)
    y = to_e4m3(w, tl.broadcast_to(scale, w.shape), POWER_OF_TWO)
    tl.store(payload_ptr + place, y, mask=inside)
    inside = (col < cols)[:, None] & (row < rows)[None, :]
    tl.store(payload_t_ptr + expert * rows * cols + col[:, None] * rows + row[None, :], y.T, mask=inside)
    block = (expert * tl.num_programs(0) + tl.program_id(0)) * tl.num_programs(1) + tl.program_id(1)
    tl.store(scale_ptr + block, scale)


@triton.jit
def _dequantize_tiles_kernel(payload_ptr, scale_ptr, out_ptr, rows, cols, ROWS: tl.constexpr, TILES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * (TILES * 128) + tl.arange(0, TILES * 128)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    place = row[:, None] * cols + col[None, :]
    y = tl.load(payload_ptr + place, mask=inside, other=0.0).to(tl.float32)
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    has_scale = (row < rows)[:, None] & (tile * 128 < cols)[None, :]
    scale = tl.load(scale_ptr + tile[None, :].to(tl.int64) * rows + row[:, None], mask=has_scale, other=1.0)
    x = tl.reshape(tl.reshape(y, (ROWS, TILES, 128)) * scale[:, :, None], (ROWS, TILES * 128))
    tl.store(out_ptr + place, x.to(out_ptr.dtype.element_ty), mask=inside)


def quantize_tiles(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """[rows, cols] -> payload [rows, cols], scale [ceil(cols/128), rows]."""
    x = x.contiguous()
    rows, cols = x.shape
    payload, scale = empty_tiles(x, rows, cols)
    if x.numel():
        grid = (triton.cdiv(rows, ROWS), triton.cdiv(cols, TILES * TILE))
        _quantize_tiles_kernel[grid](x, payload, scale, rows, cols, power_of_two, ROWS, TILES, num_warps=WARPS)
    return payload, scale


def quantize_tiles_transposed(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """[rows, cols] -> payload [cols, rows], scale [ceil(rows/128), cols]."""
    x = x.contiguous()
    rows, cols = x.shape
    payload, scale = empty_tiles(x, cols, rows)
    if x.numel():
        grid = (triton.cdiv(rows, TILE), triton.cdiv(cols, COLUMNS_TRANSPOSED))
        _quantize_tiles_transposed_kernel[grid](
            x, payload, scale, rows, cols, power_of_two, COLUMNS_TRANSPOSED, num_warps=WARPS_TRANSPOSED
        )
    return payload, scale


def quantize_tiles_both(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[rows, cols] -> payload and scale of `quantize_tiles`, then those of `quantize_tiles_transposed`."""
    x = x.contiguous()
    rows, cols = x.shape
    payload, scale = empty_tiles(x, rows, cols)
    payload_t, scale_t = empty_tiles(x, cols, rows)
    if x.numel():
        grid = (triton.cdiv(rows, TILE), triton.cdiv(cols, TILE))
        _quantize_tiles_both_kernel[grid](
            x, payload, scale, payload_t, scale_t, rows, cols, power_of_two, num_warps=WARPS_TRANSPOSED
        )
    return payload, scale, payload_t, scale_t


def requantize_transposed(payload: Tensor, scale: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """Payload [rows, cols], scale [ceil(cols/128), rows] -> payload [cols, rows], scale [ceil(rows/128), cols]."""
    payload, scale = payload.contiguous(), scale.contiguous()
    rows, cols = payload.shape
    payload_t, scale_t = empty_tiles(payload, cols, rows)
    if payload.numel():
        grid = (triton.cdiv(rows, TILE), triton.cdiv(cols, TILE))
        _requantize_transposed_kernel[grid](
            payload, scale, payload_t, scale_t, rows, cols, power_of_two, num_warps=WARPS_SQUARE
        )
    return payload_t, scale_t


def quantize_blocks(w: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor, Tensor]:
    """[..., rows, cols] -> payload [..., rows, cols], scale per 128x128 block, payload [..., cols, rows]."""
    w = w.contiguous()
    *experts, rows, cols = w.shape
    payload = torch.empty_like(w, dtype=torch.float8_e4m3fn)
    payload_t = w.new_empty(*experts, cols, rows, dtype=torch.float8_e4m3fn)
    scale = w.new_empty(*experts, ceil_div(rows, TILE), ceil_div(cols, TILE), dtype=torch.float32)
    if w.numel():
        grid = (scale.shape[-2], scale.shape[-1], w.numel() // (rows * cols))
        _quantize_blocks_kernel[grid](w, payload, scale, payload_t, rows, cols, power_of_two, num_warps=WARPS_SQUARE)
    return payload, scale, payload_t


def dequantize_tiles(payload: Tensor, scale: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Payload [rows, cols] times scale [ceil(cols/128), rows], rounded once: [rows, cols] out_dtype."""
    payload, scale = payload.contiguous(), scale.contiguous()
    rows, cols = payload.shape
    out = torch.empty_like(payload, dtype=out_dtype)
    if payload.numel():
        grid = (triton.cdiv(rows, ROWS), triton.cdiv(cols, TILES * TILE))
        _dequantize_tiles_kernel[grid](payload, scale, out, rows, cols, ROWS, TILES, num_warps=WARPS)
    return out
