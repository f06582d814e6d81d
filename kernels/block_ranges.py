"""Quantisation of a weight to 128x128 blocks by ranks that hold a range of its elements each (ZeRO-1).

A range of a flattened weight cuts blocks anywhere. So each rank takes the largest magnitude of its part of every block,
the maximum over ranks gives the blocks' scales, and each rank quantises its own elements:

    range_amax -> maximum over ranks -> block_scales -> quantize_range -> all-gather of bytes -> transpose_blocks

Together bit for bit `kernels.quantize.quantize_blocks` of the whole weight (arXiv:2412.19437 §3.3.2).

Shapes: weight [..., rows, cols]; values and payload [elements], the flattened weight's from `start` on; amax and scale
[..., ceil(rows/128), ceil(cols/128)].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.formats import E4M3_MAX, TILE, ceil_div
from kernels.operators import operator
from kernels.quantize import scale_of, to_e4m3


def blocks_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Of the scales of a weight [..., rows, cols]."""
    *experts, rows, cols = shape
    return (*experts, ceil_div(rows, TILE), ceil_div(cols, TILE))


def _block_ids(values: Tensor, shape: Sequence[int], start: int) -> Tensor:
    """The block of each value, counted through the flattened scales: [elements] int64."""
    *_, rows, cols = shape
    *_, row_blocks, col_blocks = blocks_shape(shape)
    place = torch.arange(start, start + len(values), device=values.device)
    expert, row = place // (rows * cols), place // cols % rows
    return (expert * row_blocks + row // TILE) * col_blocks + place % cols // TILE


def range_amax_reference(values: Tensor, shape: Sequence[int], start: int) -> Tensor:
    """Element by element. Same arguments as `range_amax`."""
    bits = values.float().view(torch.int32) & 0x7FFFFFFF
    amax = bits.new_zeros(blocks_shape(shape))
    amax.view(-1).scatter_reduce_(0, _block_ids(values, shape, start), bits, "amax")
    return amax


def quantize_range_reference(values: Tensor, scale: Tensor, shape: Sequence[int], start: int) -> Tensor:
    """Element by element. Same arguments as `quantize_range`."""
    return to_e4m3(values.float() / scale.flatten()[_block_ids(values, shape, start)])


def transpose_blocks_reference(payload: Tensor) -> Tensor:
    """A copy of bytes. Same arguments as `transpose_blocks`."""
    return payload.view(torch.uint8).mT.contiguous().view(payload.dtype)


_range_amax = operator(
    "range_amax",
    range_amax_reference,
    fake=lambda values, shape, start: values.new_empty(blocks_shape(shape), dtype=torch.int32),
    gpu="block_ranges",
)
_quantize_range = operator(
    "quantize_range",
    quantize_range_reference,
    fake=lambda values, scale, shape, start: values.new_empty(values.shape, dtype=torch.float8_e4m3fn),
    gpu="block_ranges",
)
_transpose_blocks = operator(
    "transpose_blocks",
    transpose_blocks_reference,
    fake=lambda payload: payload.new_empty(payload.mT.shape),
    gpu="block_ranges",
)


def range_amax(values: Tensor, shape: Sequence[int], start: int) -> Tensor:
    """Bits of the largest magnitude of each block, int32: ordered like |x| with NaN on top; 0 outside the range.

    Args:
        values: fp32 or bf16.
        shape: of the weight.
        start: of the range in the flattened weight.
    """
    return _range_amax(values, shape, start)


def block_scales(amax: Tensor, *, power_of_two: bool) -> Tensor:
    """fp32 scales from the bits of `range_amax`, of one rank that holds all or the maximum over ranks."""
    return scale_of(amax.view(torch.float32), largest=E4M3_MAX, power_of_two=power_of_two)


def quantize_range(values: Tensor, scale: Tensor, shape: Sequence[int], start: int) -> Tensor:
    """Payload of values / scale of their block, float8_e4m3fn; `values`, `shape`, `start` as `range_amax`."""
    return _quantize_range(values, scale, shape, start)


def transpose_blocks(payload: Tensor) -> Tensor:
    """Payload [..., rows, cols] -> the same bytes [..., cols, rows], contiguous."""
    return _transpose_blocks(payload)
