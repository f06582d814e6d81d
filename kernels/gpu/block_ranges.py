"""Device code of `kernels.block_ranges`: a program for each 128x128 block of the weight, bit-equal to the references.

A rank's range of the flattened weight is a mask: blocks outside it load nothing. Per element of the range from BF16
`range_amax` reads 2 bytes and `quantize_range` moves 3; `transpose_blocks` moves 2 of the whole weight. Offsets are
int64. Not measured on a GPU. Source: arXiv:2412.19437 §3.3.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.formats import TILE, ceil_div
from kernels.gpu.quantize import WARPS_SQUARE, to_e4m3


@triton.jit
def _block(rows, cols, start, stop):
    """Places in the flattened weight of this program's block, which of them are in the range, and the block's id."""
    expert = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * 128 + tl.arange(0, 128)
    col = tl.program_id(1).to(tl.int64) * 128 + tl.arange(0, 128)
    place = expert * rows * cols + row[:, None] * cols + col[None, :]
    inside = (row < rows)[:, None] & (col < cols)[None, :] & (place >= start) & (place < stop)
    block = (expert * tl.num_programs(0) + tl.program_id(0)) * tl.num_programs(1) + tl.program_id(1)
    return place, inside, block


@triton.jit
def _range_amax_kernel(values_ptr, amax_ptr, rows, cols, start, stop):
    place, inside, block = _block(rows, cols, start, stop)
    w = tl.load(values_ptr + (place - start), mask=inside, other=0.0).to(tl.float32)
    bits = w.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    tl.store(amax_ptr + block, tl.max(tl.max(bits, axis=1), axis=0))


@triton.jit
def _quantize_range_kernel(values_ptr, scale_ptr, payload_ptr, rows, cols, start, stop):
    place, inside, block = _block(rows, cols, start, stop)
    w = tl.load(values_ptr + (place - start), mask=inside, other=0.0).to(tl.float32)
    y = to_e4m3(w, tl.full(w.shape, 1.0, tl.float32) * tl.load(scale_ptr + block), False)
    tl.store(payload_ptr + (place - start), y, mask=inside)


@triton.jit
def _transpose_blocks_kernel(payload_ptr, payload_t_ptr, rows, cols):
    expert = tl.program_id(2).to(tl.int64) * rows * cols
    row = tl.program_id(0).to(tl.int64) * 128 + tl.arange(0, 128)
    col = tl.program_id(1).to(tl.int64) * 128 + tl.arange(0, 128)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    y = tl.load(payload_ptr + expert + row[:, None] * cols + col[None, :], mask=inside, other=0)
    inside = (col < cols)[:, None] & (row < rows)[None, :]
    tl.store(payload_t_ptr + expert + col[:, None] * rows + row[None, :], y.T, mask=inside)


def _grid(shape: Sequence[int]) -> tuple[int, int, int]:
    *experts, rows, cols = shape
    return ceil_div(rows, TILE), ceil_div(cols, TILE), experts[0] if experts else 1


def range_amax(values: Tensor, shape: Sequence[int], start: int) -> Tensor:
    """Bits of the largest magnitude of each block, int32; values [elements] of a weight [..., rows, cols]."""
    values = values.contiguous()
    *experts, rows, cols = shape
    grid = _grid(shape)
    amax = values.new_empty(*experts, *grid[:2], dtype=torch.int32)
    _range_amax_kernel[grid](values, amax, rows, cols, start, start + values.numel(), num_warps=WARPS_SQUARE)
    return amax


def quantize_range(values: Tensor, scale: Tensor, shape: Sequence[int], start: int) -> Tensor:
    """Payload [elements] of values / scale of their block."""
    values, scale = values.contiguous(), scale.contiguous()
    *_, rows, cols = shape
    payload = torch.empty_like(values, dtype=torch.float8_e4m3fn)
    _quantize_range_kernel[_grid(shape)](
        values, scale, payload, rows, cols, start, start + values.numel(), num_warps=WARPS_SQUARE
    )
    return payload


def transpose_blocks(payload: Tensor) -> Tensor:
    """Payload [..., rows, cols] -> [..., cols, rows]."""
    payload = payload.contiguous()
    *_, rows, cols = payload.shape
    payload_t = payload.new_empty(payload.mT.shape)
    _transpose_blocks_kernel[_grid(payload.shape)](
        payload.view(torch.uint8), payload_t.view(torch.uint8), rows, cols, num_warps=WARPS_SQUARE
    )
    return payload_t
