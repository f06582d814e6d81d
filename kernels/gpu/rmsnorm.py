"""Device code of `kernels.rmsnorm`: add, RMSNorm and 1x128 tiles in one launch; its backward with the gradient adds.

    sum  = x + delta                       rounded
    rstd = 1 / sqrt(mean(sum^2) + eps)     FP32, correctly rounded operations, as on a CPU
    y    = weight * round(sum * rstd)      rounded; quantised from registers, stored only if asked for

    again: y from sum and rstd, quantised as in forward and regrouped as 128x1 from registers; y stored if asked for

    dy   = (dy + dy1) + dy2                rounded after each addition, as autograd adds
    p    = sum(dy norm weight) / dim       norm = x rstd
    dx   = round((dy weight - norm p) rstd) + d_sum
    dw   = sum over rows of dy norm        each program its rows in order, then the programs in order: no atomics

BF16 in, given rstd everything of forward has the reference's bits: squares and weight * norm are products of two BF16
numbers, exact in FP32, so a fused multiply-add changes nothing. rstd depends on the order of its sum (2 units in the
last place seen); dx and dw on that of theirs, and on the fused multiply-add.

Bytes an element from BF16: forward 7.03 (x, delta, sum, payload, scale), again 3.03 (sum, payload, scale), 2 more with
y; backward 2 for each of dy, x, d_sum and dx, and 0.5 for the partial sums of dw. Two launches. Rows of x and dx may
lie apart: latents are slices.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.formats import TILE
from kernels.gpu.quantize import WARPS_SQUARE, scale_of, store_tiles_of_cols, to_e4m3
from kernels.tiles import empty_tiles

# A program holds whole rows in registers. Elements of a program of narrow rows (16 a thread; at 32 some spill), most
# elements of a row, and warps. Compiled, not measured: 64 registers at 7168 columns.
ELEMENTS, ELEMENTS_MAX, WARPS = 4096, 32768, 8
# Backward: elements of a thread in one step, and rows of a program, a constant: were it chosen by the number of
# multiprocessors, the bits of dw would depend on the GPU. A row of 7168 takes 16 warps: 110 registers, one program a
# multiprocessor with 43 kB of loads in flight; 8 warps take 176 registers, one program still.
ELEMENTS_OF_THREAD, ROWS_OF_PROGRAM = 16, 16
# Columns and partial rows that a program of the sum over programs adds at once, by one warp: 2 columns a thread.
COLUMNS, PARTS = 64, 32


@triton.jit
def _rounded(x, DTYPE: tl.constexpr):
    return x.to(DTYPE).to(tl.float32)


@triton.jit(do_not_specialize=["rows", "eps"])
def _add_norm_quantize_kernel(
    x_ptr, delta_ptr, weight_ptr, sum_ptr, y_ptr, payload_ptr, scale_ptr, rstd_ptr, nan_ptr, rows, cols, x_stride, eps,
    POWER_OF_TWO: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """delta_ptr and sum_ptr, y_ptr, payload_ptr and scale_ptr may be None. COLS is a power of two, at least 128."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, COLS)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    place = row[:, None] * cols + col[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
    if delta_ptr is not None:
        x = _rounded(x + tl.load(delta_ptr + place, mask=inside, other=0.0).to(tl.float32), DTYPE)
        tl.store(sum_ptr + place, x.to(DTYPE), mask=inside)
    square = tl.sum(x * x, axis=1)
    mean = tl.div_rn(square, tl.full(square.shape, 0.0, tl.float32) + cols)
    rstd = tl.div_rn(tl.full(square.shape, 1.0, tl.float32), tl.sqrt_rn(mean + eps))
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    weight = tl.load(weight_ptr + col, mask=col < cols, other=0.0).to(tl.float32)
    y = _rounded(_rounded(x * rstd[:, None], DTYPE) * weight[None, :], DTYPE)
    if y_ptr is not None:
        tl.store(y_ptr + place, y.to(DTYPE), mask=inside)
    if payload_ptr is not None:
        tiles = tl.reshape(y, (ROWS, COLS // 128, 128))
        amax = tl.max(tiles.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=2)
        scale = scale_of(amax, POWER_OF_TWO)  # [ROWS, tiles]
        q = to_e4m3(tiles, tl.broadcast_to(scale[:, :, None], tiles.shape), POWER_OF_TWO)
        tl.store(payload_ptr + place, tl.reshape(q, (ROWS, COLS)), mask=inside)
        tile = tl.arange(0, COLS // 128)
        has_tile = (row < rows)[:, None] & (tile * 128 < cols)[None, :]
        tl.store(scale_ptr + tile[None, :].to(tl.int64) * rows + row[:, None], scale, mask=has_tile)
        if tl.program_id(0) == 0:
            tl.store(nan_ptr, float("nan"))


@triton.jit
def _norm_again_kernel(
    x_ptr, weight_ptr, rstd_ptr, payload_t_ptr, scale_t_ptr, y_ptr, rows, cols, x_stride, POWER_OF_TWO: tl.constexpr
):  # fmt: skip
    """A 128x128 square. payload_t_ptr and scale_t_ptr, or y_ptr, may be None."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * 128 + tl.arange(0, 128)
    col = tl.program_id(1) * 128 + tl.arange(0, 128)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
    weight = tl.load(weight_ptr + col, mask=col < cols, other=0.0).to(tl.float32)
    y = _rounded(_rounded(x * rstd[:, None], DTYPE) * weight[None, :], DTYPE)
    if y_ptr is not None:
        tl.store(y_ptr + row[:, None] * cols + col[None, :], y.to(DTYPE), mask=inside)
    if payload_t_ptr is not None:
        scale = scale_of(tl.max(y.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1), POWER_OF_TWO)  # [rows]
        q = to_e4m3(y, tl.broadcast_to(scale[:, None], y.shape), POWER_OF_TWO).to(tl.float32)
        store_tiles_of_cols(q * scale[:, None], payload_t_ptr, scale_t_ptr, row, col, rows, cols, POWER_OF_TWO)


@triton.jit(do_not_specialize=["rows"])
def _norm_backward_kernel(
    dy_ptr, dy1_ptr, dy2_ptr, d_sum_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, parts_ptr, rows, cols, x_stride,
    dx_stride, STEPS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """dy1_ptr, dy2_ptr and d_sum_ptr may be None; parts is [programs, cols]."""
    DTYPE: tl.constexpr = dx_ptr.dtype.element_ty
    col = tl.arange(0, COLS)
    weight = tl.load(weight_ptr + col, mask=col < cols, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros((ROWS, COLS), tl.float32)
    for step in range(STEPS):
        row = (tl.program_id(0).to(tl.int64) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (col < cols)[None, :]
        place = row[:, None] * cols + col[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + place, mask=inside, other=0.0).to(tl.float32)
        if dy1_ptr is not None:
            dy = _rounded(dy + tl.load(dy1_ptr + place, mask=inside, other=0.0).to(tl.float32), DTYPE)
        if dy2_ptr is not None:
            dy = _rounded(dy + tl.load(dy2_ptr + place, mask=inside, other=0.0).to(tl.float32), DTYPE)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)[:, None]
        norm = x * rstd
        products = dy * norm
        total += products
        dot = tl.sum(products * weight, axis=1)
        projection = tl.div_rn(dot, tl.full(dot.shape, 0.0, tl.float32) + cols)[:, None]
        dx = (dy * weight - norm * projection) * rstd
        if d_sum_ptr is not None:
            dx = _rounded(dx, DTYPE) + tl.load(d_sum_ptr + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row[:, None] * dx_stride + col[None, :], dx.to(DTYPE), mask=inside)
    part = tl.sum(total, axis=0)
    tl.store(parts_ptr + tl.program_id(0).to(tl.int64) * cols + col, part, mask=col < cols)


@triton.jit(do_not_specialize=["parts"])
def _sum_parts_kernel(
    parts_ptr, out_ptr, parts, cols, ROUND: tl.constexpr, ACCUMULATE: tl.constexpr, PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROUND: to BF16, before it is added."""
    col = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((PARTS, COLUMNS), tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        inside = (part < parts)[:, None] & (col < cols)[None, :]
        total += tl.load(parts_ptr + part[:, None].to(tl.int64) * cols + col[None, :], mask=inside, other=0.0)
    found = tl.sum(total, axis=0)
    if ROUND:
        found = _rounded(found, tl.bfloat16)
    if ACCUMULATE:
        found += tl.load(out_ptr + col, mask=col < cols, other=0.0).to(tl.float32)
    tl.store(out_ptr + col, found.to(out_ptr.dtype.element_ty), mask=col < cols)


def _width(cols: int) -> int:
    width = max(128, triton.next_power_of_2(cols))
    assert width <= ELEMENTS_MAX, f"rows of {cols} do not fit in registers"
    return int(width)


def add_norm_quantize(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, power_of_two: bool, quantized: bool, plain: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x [rows, cols], rows at any distance -> sum, y, payload, scale, rstd, NaN; empty where not asked for."""
    x = x if x.stride(1) == 1 else x.contiguous()
    delta = None if delta is None else delta.contiguous()
    rows, cols = x.shape
    total = x.new_empty(rows, cols) if delta is not None else x.new_empty(0, 0)
    y = x.new_empty(rows, cols) if plain else x.new_empty(0, 0)
    payload, scale = empty_tiles(x, rows, cols) if quantized else empty_tiles(x, 0, 0)
    rstd, nan = x.new_empty(rows, dtype=torch.float32), x.new_empty(1, dtype=torch.float32)
    if x.numel():
        width = _width(cols)
        height = max(1, ELEMENTS // width)
        _add_norm_quantize_kernel[(triton.cdiv(rows, height),)](
            x, delta, weight, None if delta is None else total, y if plain else None,
            *((payload, scale) if quantized else (None, None)), rstd, nan, rows, cols, x.stride(0), eps, power_of_two,
            height, width, num_warps=WARPS,
        )  # fmt: skip
    return total, y, payload, scale, rstd, nan


def norm_again(
    total: Tensor, weight: Tensor, rstd: Tensor, power_of_two: bool, quantized: bool, plain: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """total [rows, cols], rows at any distance -> payload [cols, rows], scale, y; empty where not asked for."""
    total = total if total.stride(1) == 1 else total.contiguous()
    rows, cols = total.shape
    payload, scale = empty_tiles(total, cols, rows) if quantized else empty_tiles(total, 0, 0)
    y = total.new_empty(rows, cols) if plain else total.new_empty(0, 0)
    if total.numel():
        _norm_again_kernel[(triton.cdiv(rows, TILE), triton.cdiv(cols, TILE))](
            total, weight, rstd, *((payload, scale) if quantized else (None, None)), y if plain else None, rows, cols,
            total.stride(0), power_of_two, num_warps=WARPS_SQUARE,
        )  # fmt: skip
    return payload, scale, y


def norm_backward(
    dy: Tensor, dy1: Tensor | None, dy2: Tensor | None, d_sum: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor,
    out: Tensor,
) -> Tensor:  # fmt: skip
    """dx [rows, cols] into `out`; returns parts [programs, cols] of dweight. Rows of x and out may lie apart."""
    x = x if x.stride(1) == 1 else x.contiguous()
    assert out.stride(1) == 1, out.stride()
    # A gradient may come expanded, with strides of 0.
    grads = [None if each is None else each.contiguous() for each in (dy, dy1, dy2, d_sum)]
    rows, cols = x.shape
    width = _width(cols)
    warps = max(WARPS, min(32, width // (32 * ELEMENTS_OF_THREAD)))
    height = max(1, 32 * warps * ELEMENTS_OF_THREAD // width)
    steps = max(1, ROWS_OF_PROGRAM // height)
    programs = triton.cdiv(rows, height * steps)
    parts = x.new_empty(programs, cols, dtype=torch.float32)
    if x.numel():
        _norm_backward_kernel[(programs,)](
            *grads, x, weight, rstd, out, parts, rows, cols, x.stride(0), out.stride(0), steps, height, width,
            num_warps=warps,
        )  # fmt: skip
    return parts


def norm_gain_gradient(parts: Tensor, out: Tensor, dtype: torch.dtype, accumulate: bool) -> None:
    """The sum of parts [parts, cols], rounded to `dtype`, into `out` [cols], or added to it."""
    assert out.is_contiguous()
    num_parts, cols = parts.shape
    if cols:
        _sum_parts_kernel[(triton.cdiv(cols, COLUMNS),)](
            parts, out, num_parts, cols, dtype == torch.bfloat16, accumulate, PARTS, COLUMNS, num_warps=1
        )
