"""Device code of `kernels.e5m6`: 12 bits an element, two values in three bytes; bit-equal to the references.

    scale = amax / 65024 per 1x128, at least 2^-126, optionally rounded up to a power of two; 1 for zeros
    code  = the upper 12 bits of FP16, rounded from FP32 in integers: there is no instruction for it
    row   = upper 8 bits of every code, then lower 4 bits of two columns a byte

All are bound by memory, per element from or to BF16: packing and unpacking 3.5 bytes, 4.5 with E4M3 tiles beside, by
row forward and by column backward. Each tile goes through registers once. Offsets are int64. Source: arXiv:2412.19437
§3.3.3.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.formats import TILE, ceil_div
from kernels.gpu.quantize import scale_of, store_tiles_of_cols, store_tiles_of_rows
from kernels.tiles import empty_tiles

# Rows of a program, each one tile of 128 columns, and its warps: 32 elements a thread.
ROWS, WARPS = 32, 4
# Columns of a program that groups 128 rows by column, and its warps: 32 elements a thread. With 4 warps it has 164
# registers a thread, and a multiprocessor 12 warps instead of 16.
COLUMNS, WARPS_BY_COLUMN = 64, 8


@triton.jit
def _encode(x):
    """Codes of fp32 numbers, saturating, int32."""
    x = tl.clamp(x, -65024.0, 65024.0, propagate_nan=tl.PropagateNan.ALL)
    bits = x.to(tl.int32, bitcast=True)
    # FP32 loses its last 17 mantissa bits to the nearest even; below 2^-14, where steps are 2^-20, adding 8 does it.
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0xFFFF + ((magnitude >> 17) & 1)) >> 17) - (112 << 6)
    subnormal = (tl.abs(x) + 8.0).to(tl.int32, bitcast=True) & 0x7F
    code = tl.where(magnitude < 0x38800000, subnormal, normal) | ((bits >> 20) & 0x800)
    return tl.where(magnitude > 0x7F800000, 0x7E0, code)


@triton.jit
def _store_e5m6(x, payload_ptr, scale_ptr, row, tile, rows, cols, row_bytes, POWER_OF_TWO: tl.constexpr):
    """Encode and store [ROWS, 128] fp32 numbers, the columns of a tile."""
    col = tile * 128 + tl.arange(0, 128)
    pair = cols + tile * 64 + tl.arange(0, 64)
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    scale = scale_of(tl.max(magnitude, axis=1), POWER_OF_TWO, 65024.0)  # [ROWS]
    if POWER_OF_TWO:
        # The reciprocal of a power of two: exact unless the scale is NaN or infinite, which it stays.
        y = x * tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)[:, None]
    else:
        y = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
    code = _encode(y)
    place = payload_ptr + row[:, None] * row_bytes
    tl.store(place + col[None, :], (code >> 4).to(tl.uint8), mask=(row < rows)[:, None] & (col < cols)[None, :])
    even, odd = tl.split(tl.reshape(code & 0xF, (x.shape[0], 64, 2)))
    inside = (row < rows)[:, None] & (pair < row_bytes)[None, :]
    tl.store(place + pair[None, :], (even | (odd << 4)).to(tl.uint8), mask=inside)
    tl.store(scale_ptr + tile.to(tl.int64) * rows + row, scale, mask=row < rows)


@triton.jit
def _load_e5m6(payload_ptr, scale_ptr, row, first_col, rows, cols, row_bytes, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] fp32 numbers of one tile of columns; zeros outside."""
    col = first_col + tl.arange(0, COLUMNS)
    pair = cols + first_col // 2 + tl.arange(0, COLUMNS // 2)
    place = payload_ptr + row[:, None] * row_bytes
    inside = (row < rows)[:, None] & (pair < row_bytes)[None, :]
    pairs = tl.load(place + pair[None, :], mask=inside, other=0).to(tl.int32)
    low = tl.reshape(tl.join(pairs & 0xF, pairs >> 4), (row.shape[0], COLUMNS))
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    high = tl.load(place + col[None, :], mask=inside, other=0).to(tl.int32)
    values = ((high << 8) | (low << 4)).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    scale = tl.load(scale_ptr + (first_col // 128).to(tl.int64) * rows + row, mask=row < rows, other=1.0)
    return values * scale[:, None]


@triton.jit
def _pack_e5m6_kernel(
    x_ptr, payload_ptr, scale_ptr, rows, cols, row_bytes, POWER_OF_TWO: tl.constexpr, ROWS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * 128 + tl.arange(0, 128)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    x = tl.load(x_ptr + row[:, None] * cols + col[None, :], mask=inside, other=0.0).to(tl.float32)
    _store_e5m6(x, payload_ptr, scale_ptr, row, tl.program_id(1), rows, cols, row_bytes, POWER_OF_TWO)


@triton.jit
def _unpack_e5m6_kernel(payload_ptr, scale_ptr, out_ptr, rows, cols, row_bytes, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * 128 + tl.arange(0, 128)
    values = _load_e5m6(payload_ptr, scale_ptr, row, tl.program_id(1) * 128, rows, cols, row_bytes, 128)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    tl.store(out_ptr + row[:, None] * cols + col[None, :], values.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _quantize_pack_kernel(
    x_ptr, payload_ptr, scale_ptr, packed_ptr, packed_scale_ptr, rows, cols, row_bytes,
    POWER_OF_TWO: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * 128 + tl.arange(0, 128)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    x = tl.load(x_ptr + row[:, None] * cols + col[None, :], mask=inside, other=0.0).to(tl.float32)
    store_tiles_of_rows(x, payload_ptr, scale_ptr, row, col, rows, cols, POWER_OF_TWO)
    _store_e5m6(x, packed_ptr, packed_scale_ptr, row, tl.program_id(1), rows, cols, row_bytes, True)


@triton.jit
def _unpack_quantize_transposed_kernel(
    packed_ptr, packed_scale_ptr, out_ptr, payload_t_ptr, scale_t_ptr, rows, cols, row_bytes,
    POWER_OF_TWO: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * 128 + tl.arange(0, 128)
    col = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    values = _load_e5m6(packed_ptr, packed_scale_ptr, row, tl.program_id(1) * COLUMNS, rows, cols, row_bytes, COLUMNS)
    out = values.to(out_ptr.dtype.element_ty)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    tl.store(out_ptr + row[:, None] * cols + col[None, :], out, mask=inside)
    store_tiles_of_cols(out.to(tl.float32), payload_t_ptr, scale_t_ptr, row, col, rows, cols, POWER_OF_TWO)


def pack_e5m6(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """[rows, cols] -> payload [rows, cols * 3/2], scale [ceil(cols/128), rows]."""
    x = x.contiguous()
    rows, cols = x.shape
    payload = x.new_empty(rows, cols // 2 * 3, dtype=torch.uint8)
    scale = x.new_empty(ceil_div(cols, TILE), rows, dtype=torch.float32)
    if x.numel():
        grid = (triton.cdiv(rows, ROWS), triton.cdiv(cols, TILE))
        _pack_e5m6_kernel[grid](x, payload, scale, rows, cols, payload.shape[1], power_of_two, ROWS, num_warps=WARPS)
    return payload, scale


def unpack_e5m6(payload: Tensor, scale: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Payload [rows, cols * 3/2] times scale [ceil(cols/128), rows], rounded once: [rows, cols] out_dtype."""
    payload, scale = payload.contiguous(), scale.contiguous()
    rows, row_bytes = payload.shape
    cols = row_bytes * 2 // 3
    out = payload.new_empty(rows, cols, dtype=out_dtype)
    if out.numel():
        grid = (triton.cdiv(rows, ROWS), triton.cdiv(cols, TILE))
        _unpack_e5m6_kernel[grid](payload, scale, out, rows, cols, row_bytes, ROWS, num_warps=WARPS)
    return out


def quantize_pack(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[rows, cols] -> payload and scale of `quantize_tiles`, then those of `pack_e5m6` with powers of two."""
    x = x.contiguous()
    rows, cols = x.shape
    payload, scale = empty_tiles(x, rows, cols)
    packed = x.new_empty(rows, cols // 2 * 3, dtype=torch.uint8)
    packed_scale = torch.empty_like(scale)
    if x.numel():
        grid = (triton.cdiv(rows, ROWS), triton.cdiv(cols, TILE))
        _quantize_pack_kernel[grid](
            x, payload, scale, packed, packed_scale, rows, cols, packed.shape[1], power_of_two, ROWS, num_warps=WARPS
        )
    return payload, scale, packed, packed_scale


def unpack_quantize_transposed(
    payload: Tensor, scale: Tensor, out_dtype: torch.dtype, power_of_two: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What `unpack_e5m6` makes, [rows, cols], then payload and scale of `quantize_tiles_transposed` of that."""
    payload, scale = payload.contiguous(), scale.contiguous()
    rows, row_bytes = payload.shape
    cols = row_bytes * 2 // 3
    out = payload.new_empty(rows, cols, dtype=out_dtype)
    payload_t, scale_t = empty_tiles(payload, cols, rows)
    if out.numel():
        grid = (triton.cdiv(rows, TILE), triton.cdiv(cols, COLUMNS))
        _unpack_quantize_transposed_kernel[grid](
            payload, scale, out, payload_t, scale_t, rows, cols, row_bytes, power_of_two, COLUMNS,
            num_warps=WARPS_BY_COLUMN,
        )  # fmt: skip
    return out, payload_t, scale_t
