"""Device code of `kernels.swiglu`: SwiGLU, its gradients, and both next to the quantisers of an FP8 down projection.

    h      = silu(gate) * up * g              silu(x) = x / (1 + e^-x)
    d_gate = dh * g * up * silu'(gate)        silu'(x) = s + x s (1 - s),  s = 1 / (1 + e^-x)
    d_up   = dh * g * silu(gate)
    d_g    = sum over inter of dh * silu(gate) * up

in FP32 registers, rounded where the references round: gated once, plain after each product. All are bound by memory;
per element of h in BF16 swiglu moves 6 bytes, its backward 10, `swiglu_quantize` 7, `swiglu_quantize_transposed` 3,
the backward from a kept input 8, and the same quantised both ways 8 instead of 20 in two launches.

The exponential is a GPU's approximate one, two units in the last place and |x| 2^-24 of its argument's rounding, so a
result may fall on the other side of a rounding than the reference's. Quantising the same values gives the same bits.
d_g is summed by one program for its rows, always in the same order, another one in `swiglu_backward_quantize_both`.
Where inter is no multiple of 128, a tile of gate_up holds gates and ups at once: then launchers of quantised tensors
call the separate kernels one after the other.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.formats import TILE
from kernels.gpu.quantize import (
    dequantize_tiles,
    quantize_tiles,
    quantize_tiles_both,
    quantize_tiles_transposed,
    store_tiles_of_cols,
    store_tiles_of_rows,
)
from kernels.tiles import empty_tiles

# Rows of a program, each of 128 columns, and its warps: 16 elements a thread of the gate, of up and of h.
ROWS, WARPS = 16, 4
# A program of `swiglu_quantize_transposed` holds 128 rows of so many columns.
COLUMNS_TRANSPOSED, WARPS_TRANSPOSED = 64, 4
# A program of `swiglu_backward_quantize_both` takes squares of 128x128 of each half, in chunks of so many rows, then of
# so many columns. In chunks of 32 the compiler takes 255 registers (at 3 programs a multiprocessor it may have 168) or
# spills.
ROWS_BOTH, COLUMNS_BOTH, WARPS_BOTH, REGISTERS_BOTH = 16, 16, 4, 168
# Tiles of 128 columns that a program of a plain backward walks through; a gated one walks through all.
SPAN = 4


@triton.jit
def _rounded(x, DTYPE: tl.constexpr):
    return x.to(DTYPE).to(tl.float32)


@triton.jit
def _load_half(ptr, scale_ptr, row, col, inside, rows, cols, DTYPE: tl.constexpr):
    """A [ROWS, COLUMNS] chunk of gate_up as fp32; with scales it is dequantised and `col` is within one tile."""
    x = tl.load(ptr + row[:, None] * cols + col[None, :], mask=inside, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        tile = (tl.min(col, axis=0) // 128).to(tl.int64)
        scale = tl.load(scale_ptr + tile * rows + row, mask=row < rows, other=1.0)
        x = _rounded(x * scale[:, None], DTYPE)
    return x


@triton.jit
def _activation(gate, up, gates_ptr, row, rows, DTYPE: tl.constexpr):
    """h as fp32, holding numbers of DTYPE."""
    silu = gate / (1.0 + tl.exp(-gate))
    if gates_ptr is None:
        h = _rounded(silu, DTYPE) * up
    else:
        gates = tl.load(gates_ptr + row, mask=row < rows, other=0.0).to(tl.float32)
        h = silu * up * gates[:, None]
    return _rounded(h, DTYPE)


@triton.jit
def _swiglu_kernel(gate_up_ptr, gates_ptr, h_ptr, rows, inter, ROWS: tl.constexpr):
    DTYPE: tl.constexpr = h_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * 128 + tl.arange(0, 128)
    inside = (row < rows)[:, None] & (col < inter)[None, :]
    gate = _load_half(gate_up_ptr, None, row, col, inside, rows, 2 * inter, DTYPE)
    up = _load_half(gate_up_ptr, None, row, col + inter, inside, rows, 2 * inter, DTYPE)
    h = _activation(gate, up, gates_ptr, row, rows, DTYPE)
    tl.store(h_ptr + row[:, None] * inter + col[None, :], h.to(DTYPE), mask=inside)


@triton.jit
def _swiglu_quantize_kernel(
    gate_up_ptr, gates_ptr, kept_ptr, kept_scale_ptr, payload_ptr, scale_ptr, rows, inter, POWER_OF_TWO: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """One tile of gates, one of ups and the tile of h that they make; inter is a multiple of 128."""
    DTYPE: tl.constexpr = gate_up_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * 128 + tl.arange(0, 128)
    inside = (row < rows)[:, None] & (col < inter)[None, :]
    gate = _load_half(gate_up_ptr, None, row, col, inside, rows, 2 * inter, DTYPE)
    up = _load_half(gate_up_ptr, None, row, col + inter, inside, rows, 2 * inter, DTYPE)
    store_tiles_of_rows(gate, kept_ptr, kept_scale_ptr, row, col, rows, 2 * inter, POWER_OF_TWO)
    store_tiles_of_rows(up, kept_ptr, kept_scale_ptr, row, col + inter, rows, 2 * inter, POWER_OF_TWO)
    h = _activation(gate, up, gates_ptr, row, rows, DTYPE)
    store_tiles_of_rows(h, payload_ptr, scale_ptr, row, col, rows, inter, POWER_OF_TWO)


@triton.jit
def _swiglu_quantize_transposed_kernel(
    kept_ptr, kept_scale_ptr, gates_ptr, payload_ptr, scale_ptr, rows, inter, DTYPE: tl.constexpr,
    POWER_OF_TWO: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * 128 + tl.arange(0, 128)
    col = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (col < inter)[None, :]
    gate = _load_half(kept_ptr, kept_scale_ptr, row, col, inside, rows, 2 * inter, DTYPE)
    up = _load_half(kept_ptr, kept_scale_ptr, row, col + inter, inside, rows, 2 * inter, DTYPE)
    h = _activation(gate, up, gates_ptr, row, rows, DTYPE)
    store_tiles_of_cols(h, payload_ptr, scale_ptr, row, col, rows, inter, POWER_OF_TWO)


@triton.jit
def _gradients(gate, up, dh, gates_ptr, row, rows, DTYPE: tl.constexpr):
    """d_gate and d_up as fp32, to be rounded to DTYPE, and the terms of d_g (anything where gates_ptr is None)."""
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    derivative = sigmoid * (1.0 + gate * (1.0 - sigmoid))
    silu = gate * sigmoid
    terms = silu
    if gates_ptr is None:
        d_gate = _rounded(dh * up, DTYPE) * derivative
        d_up = dh * _rounded(silu, DTYPE)
    else:
        gates = tl.load(gates_ptr + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
        terms = silu * up * dh
        d_gate = dh * gates * up * derivative
        d_up = silu * (dh * gates)
    return d_gate, d_up, terms


@triton.jit
def _swiglu_backward_kernel(
    gate_up_ptr, scale_ptr, gates_ptr, dh_ptr, d_gate_up_ptr, d_gates_ptr, rows, inter, SPAN: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """SPAN tiles of some rows, one after the other: all of them where gates want their gradient."""
    # scale_ptr is None unless gate_up is kept in FP8, gates_ptr and d_gates_ptr are None unless it is gated.
    DTYPE: tl.constexpr = dh_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    if gates_ptr is not None:
        terms = tl.zeros((ROWS, 128), tl.float32)
    for chunk in range(SPAN):
        col = (tl.program_id(1) * SPAN + chunk) * 128 + tl.arange(0, 128)
        inside = (row < rows)[:, None] & (col < inter)[None, :]
        gate = _load_half(gate_up_ptr, scale_ptr, row, col, inside, rows, 2 * inter, DTYPE)
        up = _load_half(gate_up_ptr, scale_ptr, row, col + inter, inside, rows, 2 * inter, DTYPE)
        dh = tl.load(dh_ptr + row[:, None] * inter + col[None, :], mask=inside, other=0.0).to(tl.float32)
        d_gate, d_up, of_gates = _gradients(gate, up, dh, gates_ptr, row, rows, DTYPE)
        if gates_ptr is not None:
            terms += of_gates
        place = row[:, None] * (2 * inter) + col[None, :]
        tl.store(d_gate_up_ptr + place, d_gate.to(DTYPE), mask=inside)
        tl.store(d_gate_up_ptr + place + inter, d_up.to(DTYPE), mask=inside)
    if gates_ptr is not None:
        tl.store(d_gates_ptr + row, tl.sum(terms, axis=1), mask=row < rows)


@triton.jit
def _gradients_of_kept(
    kept_ptr, kept_scale_ptr, gates_ptr, dh_ptr, row, col, rows, inter, DTYPE: tl.constexpr
):  # fmt: skip
    """`_gradients` of a chunk within one tile of columns, rounded."""
    inside = (row < rows)[:, None] & (col < inter)[None, :]
    gate = _load_half(kept_ptr, kept_scale_ptr, row, col, inside, rows, 2 * inter, DTYPE)
    up = _load_half(kept_ptr, kept_scale_ptr, row, col + inter, inside, rows, 2 * inter, DTYPE)
    dh = tl.load(dh_ptr + row[:, None] * inter + col[None, :], mask=inside, other=0.0).to(tl.float32)
    d_gate, d_up, terms = _gradients(gate, up, dh, gates_ptr, row, rows, DTYPE)
    return _rounded(d_gate, DTYPE), _rounded(d_up, DTYPE), terms


@triton.jit
def _swiglu_backward_quantize_both_kernel(
    kept_ptr, kept_scale_ptr, gates_ptr, dh_ptr, payload_ptr, scale_ptr, payload_t_ptr, scale_t_ptr, d_gates_ptr, rows,
    inter, POWER_OF_TWO: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """SPAN squares of 128 rows, first by rows, then by columns: read once from memory, then from the L1 cache."""
    DTYPE: tl.constexpr = dh_ptr.dtype.element_ty
    first_row = tl.program_id(0).to(tl.int64) * 128
    square_row = first_row + tl.arange(0, 128)
    total = tl.zeros((128,), tl.float32)
    for square in range(SPAN):
        first_col = (tl.program_id(1) * SPAN + square) * 128
        square_col = first_col + tl.arange(0, 128)
        for chunk in range(128 // ROWS):
            row = first_row + chunk * ROWS + tl.arange(0, ROWS)
            d_gate, d_up, _ = _gradients_of_kept(
                kept_ptr, kept_scale_ptr, gates_ptr, dh_ptr, row, square_col, rows, inter, DTYPE
            )
            store_tiles_of_rows(d_gate, payload_ptr, scale_ptr, row, square_col, rows, 2 * inter, POWER_OF_TWO)
            store_tiles_of_rows(d_up, payload_ptr, scale_ptr, row, square_col + inter, rows, 2 * inter, POWER_OF_TWO)
        for chunk in range(128 // COLUMNS):
            col = first_col + chunk * COLUMNS + tl.arange(0, COLUMNS)
            d_gate, d_up, terms = _gradients_of_kept(
                kept_ptr, kept_scale_ptr, gates_ptr, dh_ptr, square_row, col, rows, inter, DTYPE
            )
            if gates_ptr is not None:
                total += tl.sum(terms, axis=1)
            store_tiles_of_cols(d_gate, payload_t_ptr, scale_t_ptr, square_row, col, rows, 2 * inter, POWER_OF_TWO)
            store_tiles_of_cols(
                d_up, payload_t_ptr, scale_t_ptr, square_row, col + inter, rows, 2 * inter, POWER_OF_TWO
            )
    if gates_ptr is not None:
        tl.store(d_gates_ptr + square_row, total, mask=square_row < rows)
    elif tl.program_id(0) + tl.program_id(1) == 0:
        tl.store(d_gates_ptr, float("nan"))


def swiglu(gate_up: Tensor) -> Tensor:
    """[..., 2 * inter] -> [..., inter]."""
    return _activate(gate_up, None)


def gated_swiglu(gate_up: Tensor, gates: Tensor) -> Tensor:
    """[rows, 2 * inter], gates [rows] -> [rows, inter]."""
    return _activate(gate_up, gates)


def swiglu_backward(gate_up: Tensor, dh: Tensor) -> Tensor:
    """[..., 2 * inter], gradient [..., inter] -> [..., 2 * inter]."""
    return _differentiate(gate_up, None, None, dh)[0]


def gated_swiglu_backward(gate_up: Tensor, gates: Tensor, dh: Tensor) -> tuple[Tensor, Tensor]:
    """[rows, 2 * inter], gates [rows], gradient [rows, inter] -> [rows, 2 * inter], [rows] fp32."""
    return _differentiate(gate_up, None, gates, dh)


def swiglu_quantize(gate_up: Tensor, gates: Tensor | None, power_of_two: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[rows, 2 * inter] -> payload and scale of itself, then those of h, all in 1x128 tiles."""
    rows, inter = gate_up.shape[0], gate_up.shape[1] // 2
    if inter % TILE:
        return *quantize_tiles(gate_up, power_of_two), *quantize_tiles(_activate(gate_up, gates), power_of_two)
    gate_up, gates = gate_up.contiguous(), _contiguous(gates)
    kept, kept_scale = empty_tiles(gate_up, rows, 2 * inter)
    payload, scale = empty_tiles(gate_up, rows, inter)
    if gate_up.numel():
        grid = (triton.cdiv(rows, ROWS), inter // TILE)
        _swiglu_quantize_kernel[grid](
            gate_up, gates, kept, kept_scale, payload, scale, rows, inter, power_of_two, ROWS, num_warps=WARPS
        )
    return kept, kept_scale, payload, scale


def swiglu_quantize_transposed(
    payload: Tensor, scale: Tensor, gates: Tensor | None, dtype: torch.dtype, power_of_two: bool
) -> tuple[Tensor, Tensor]:
    """Payload [rows, 2 * inter] in 1x128 tiles -> h in 128x1 tiles, payload [inter, rows], scale."""
    rows, inter = payload.shape[0], payload.shape[1] // 2
    if inter % TILE:
        h = _activate(dequantize_tiles(payload, scale, dtype), gates)
        return quantize_tiles_transposed(h, power_of_two)
    payload, scale, gates = payload.contiguous(), scale.contiguous(), _contiguous(gates)
    payload_t, scale_t = empty_tiles(payload, inter, rows)
    if payload.numel():
        grid = (triton.cdiv(rows, TILE), inter // COLUMNS_TRANSPOSED)
        _swiglu_quantize_transposed_kernel[grid](
            payload, scale, gates, payload_t, scale_t, rows, inter, _TRITON_TYPES[dtype], power_of_two,
            COLUMNS_TRANSPOSED, num_warps=WARPS_TRANSPOSED,
        )  # fmt: skip
    return payload_t, scale_t


def swiglu_backward_kept(payload: Tensor, scale: Tensor, dh: Tensor) -> Tensor:
    """Payload [rows, 2 * inter] in 1x128 tiles, gradient [rows, inter] -> [rows, 2 * inter] in dh's dtype."""
    return _differentiate_kept(payload, scale, None, dh)[0]


def gated_swiglu_backward_kept(payload: Tensor, scale: Tensor, gates: Tensor, dh: Tensor) -> tuple[Tensor, Tensor]:
    """The same with gates [rows], and their gradient [rows] fp32."""
    return _differentiate_kept(payload, scale, gates, dh)


def swiglu_backward_quantize_both(
    payload: Tensor, scale: Tensor, gates: Tensor | None, dh: Tensor, power_of_two: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Payload [rows, 2 * inter] in 1x128 tiles, gradient [rows, inter] -> d_gate_up in both tiles, d_gates or NaN."""
    rows, inter = dh.shape
    if inter % TILE:
        d_gate_up, d_gates = _differentiate_kept(payload, scale, gates, dh)
        d_gates = d_gates.new_full((1,), float("nan")) if gates is None else d_gates
        return *quantize_tiles_both(d_gate_up, power_of_two), d_gates
    payload, scale, gates, dh = payload.contiguous(), scale.contiguous(), _contiguous(gates), dh.contiguous()
    by_row, by_row_scale = empty_tiles(dh, rows, 2 * inter)
    by_column, by_column_scale = empty_tiles(dh, 2 * inter, rows)
    d_gates = dh.new_empty(1 if gates is None else rows, dtype=torch.float32)
    if dh.numel():
        span = 1 if gates is None else inter // TILE
        grid = (triton.cdiv(rows, TILE), inter // TILE // span)
        _swiglu_backward_quantize_both_kernel[grid](
            payload, scale, gates, dh, by_row, by_row_scale, by_column, by_column_scale, d_gates, rows, inter,
            power_of_two, span, ROWS_BOTH, COLUMNS_BOTH, num_warps=WARPS_BOTH, maxnreg=REGISTERS_BOTH,
        )  # fmt: skip
    return by_row, by_row_scale, by_column, by_column_scale, d_gates


_TRITON_TYPES: dict[torch.dtype, Any] = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def _contiguous(gates: Tensor | None) -> Tensor | None:
    return None if gates is None else gates.contiguous()


def _activate(gate_up: Tensor, gates: Tensor | None) -> Tensor:
    gate_up = gate_up.contiguous()
    *leading, cols = gate_up.shape
    h = gate_up.new_empty(*leading, cols // 2)
    if h.numel():
        rows, inter = h.numel() // (cols // 2), cols // 2
        grid = (triton.cdiv(rows, ROWS), triton.cdiv(inter, TILE))
        _swiglu_kernel[grid](gate_up, _contiguous(gates), h, rows, inter, ROWS, num_warps=WARPS)
    return h


def _differentiate_kept(payload: Tensor, scale: Tensor, gates: Tensor | None, dh: Tensor) -> tuple[Tensor, Tensor]:
    if payload.shape[1] // 2 % TILE:
        return _differentiate(dequantize_tiles(payload, scale, dh.dtype), None, gates, dh)
    return _differentiate(payload, scale.contiguous(), gates, dh)


def _differentiate(gate_up: Tensor, scale: Tensor | None, gates: Tensor | None, dh: Tensor) -> tuple[Tensor, Tensor]:
    """d_gate_up and, of no elements without gates, d_gates."""
    gate_up, dh = gate_up.contiguous(), dh.contiguous()
    inter = dh.shape[-1]
    d_gate_up = torch.empty_like(gate_up, dtype=dh.dtype)
    d_gates = dh.new_empty(0 if gates is None else len(gates), dtype=torch.float32)
    if dh.numel():
        rows, tiles = dh.numel() // inter, triton.cdiv(inter, TILE)
        span = SPAN if gates is None else tiles
        grid = (triton.cdiv(rows, ROWS), triton.cdiv(tiles, span))
        _swiglu_backward_kernel[grid](
            gate_up, scale, _contiguous(gates), dh, d_gate_up, None if gates is None else d_gates, rows, inter, span,
            ROWS, num_warps=WARPS,
        )  # fmt: skip
    return d_gate_up, d_gates
