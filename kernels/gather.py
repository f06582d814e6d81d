"""FP8 rows of experts, gathered from tokens that were quantised once; gradients gathered and quantised both ways.

arXiv:2412.19437 §3.3.2 (tiles), §3.3.3 (dispatch in FP8) and §3.5.2 (regrouped for wgrad). A token goes to up to eight
experts; its copies exist in FP8 only, for the length of a product:

    fprop   tokens in 1x128 tiles  -> rows in 1x128 tiles                           `gather_tiles`
    wgrad   the same tokens        -> rows in 128x1 tiles, stored transposed        `gather_requantize_transposed`
    dgrad, wgrad   gradients of tokens, BF16 -> rows in both                        `gather_quantize_both`

Bit for bit what a copy of the tokens (`kernels.permute`) followed by a quantiser gives; rows of no slot are zero, with
scale 1. Tiles may lie at any distance, as they do in the packets of expert parallelism.

Shapes: tokens in tiles: payload [tokens, cols], scale [ceil(cols/128), tokens]; slot_of_row [rows] int64, token * topk
+ k, -1 for none; rows in 128x1 tiles: payload [cols, rows], scale [ceil(rows/128), cols]. Rows may not be sharded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.formats import Quantized
from kernels.operators import operator
from kernels.permute import copy_tokens_reference
from kernels.quantize import quantize_tiles_both_reference, requantize_transposed_reference
from kernels.tiles import empty_tiles


def gather_tiles_reference(payload: Tensor, scale: Tensor, slot_of_row: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Copies of payload and scales. Same arguments as `gather_tiles`."""
    rows = copy_tokens_reference(payload.view(torch.uint8), slot_of_row, topk).view(payload.dtype)
    scales = copy_tokens_reference(scale.t(), slot_of_row, topk)  # [rows, tiles]
    return rows, torch.where(slot_of_row < 0, 1.0, scales.t()).contiguous()


def gather_requantize_transposed_reference(
    payload: Tensor, scale: Tensor, slot_of_row: Tensor, topk: int, power_of_two: bool
) -> tuple[Tensor, Tensor]:
    """Copies, regrouped. Same arguments as `gather_requantize_transposed`."""
    return requantize_transposed_reference(*gather_tiles_reference(payload, scale, slot_of_row, topk), power_of_two)


def gather_quantize_both_reference(
    x: Tensor, slot_of_row: Tensor, topk: int, power_of_two: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Copies, quantised. Same arguments as `gather_quantize_both`; payload and scale by row, then by column."""
    return quantize_tiles_both_reference(copy_tokens_reference(x, slot_of_row, topk), power_of_two)


_gather_tiles = operator(
    "gather_tiles",
    gather_tiles_reference,
    fake=lambda payload, scale, slot_of_row, topk: empty_tiles(payload, len(slot_of_row), payload.shape[1]),
    gpu="gather",
)
_gather_requantize_transposed = operator(
    "gather_requantize_transposed",
    gather_requantize_transposed_reference,
    fake=lambda payload, scale, slot_of_row, *_: empty_tiles(payload, payload.shape[1], len(slot_of_row)),
    gpu="gather",
)
_gather_quantize_both = operator(
    "gather_quantize_both",
    gather_quantize_both_reference,
    fake=lambda x, slot_of_row, *_: (
        *empty_tiles(x, len(slot_of_row), x.shape[1]),
        *empty_tiles(x, x.shape[1], len(slot_of_row)),
    ),
    gpu="gather",
)


def gather_tiles(tokens: Quantized, slot_of_row: Tensor, topk: int) -> Quantized:
    """Rows of tokens in 1x128 tiles, by slot: for fprop, or dgrad of a gradient that came in FP8."""
    return Quantized(*_gather_tiles(tokens.payload, tokens.scale, slot_of_row, topk))


def gather_requantize_transposed(tokens: Quantized, slot_of_row: Tensor, topk: int, *, power_of_two: bool) -> Quantized:
    """The same rows regrouped as 128x1 tiles, payload [cols, rows]: for wgrad."""
    return Quantized(*_gather_requantize_transposed(tokens.payload, tokens.scale, slot_of_row, topk, power_of_two))


def gather_quantize_both(
    x: Tensor, slot_of_row: Tensor, topk: int, *, power_of_two: bool
) -> tuple[Quantized, Quantized]:
    """Rows of x [tokens, cols] by slot, in 1x128 and in 128x1 tiles: a gradient, for dgrad and wgrad."""
    payload, scale, payload_t, scale_t = _gather_quantize_both(x.detach(), slot_of_row, topk, power_of_two)
    return Quantized(payload, scale), Quantized(payload_t, scale_t)
