"""Scaled tiles made and taken apart, and the exact decoding from E4M3 to FP32 (arXiv:2412.19437 §3.3.2).

Shapes as in `kernels/formats.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.formats import TILE, Quantized, ceil_div


def rows_of_tiles(tiles: Quantized, rows: Tensor) -> Quantized:
    """Some rows [taken] int64 of a tensor in 1x128 tiles, copied as bytes."""
    payload = tiles.payload.view(torch.uint8).index_select(0, rows).view(tiles.payload.dtype)
    return Quantized(payload, tiles.scale.index_select(1, rows))


def empty_tiles(like: Tensor, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """Payload [rows, cols] and scales [ceil(cols/128), rows] of 1x128 tiles to be written, on `like`'s device."""
    payload = like.new_empty(rows, cols, dtype=torch.float8_e4m3fn)
    return payload, like.new_empty(ceil_div(cols, TILE), rows, dtype=torch.float32)


def decode_e4m3(payload: Tensor) -> Tensor:
    """Convert float8_e4m3fn of any shape and strides to FP32, exactly, keeping NaN."""
    # The 7 magnitude bits of E4M3, shifted to the top of FP16's exponent and mantissa, give value * 2^-8 (biases 7 and
    # 15), subnormals included. Only the NaN code has magnitude bits that are all ones: adding one to the lowest carries
    # into the top exponent bit, and copying that carry into the number makes an FP16 NaN. On a CPU seven times faster
    # than `payload.float()`, which converts element by element (`docs/numerics.md`).
    half = payload.view(torch.int8).to(torch.int16)
    # 0xBF80 as a signed 16-bit number: the sign and the seven shifted magnitude bits.
    half.bitwise_left_shift_(7).bitwise_and_(0xBF80 - 0x10000)
    half.bitwise_or_((half + 0x80).bitwise_and_(0x4000))
    return half.view(torch.float16).float().mul_(2.0**8)
