"""E4M3 numbers, scaled tiles, and the exact decoding from E4M3 to FP32 (arXiv:2412.19437 §3.3.2).

E4M3 (`torch.float8_e4m3fn`) has 1 sign, 4 exponent and 3 mantissa bits: largest value 448, smallest normal
2^-6, smallest subnormal 2^-9, no infinity, one NaN per sign. A tensor is stored as a payload of E4M3 numbers
and FP32 scales, one per tile (1x128, activations and gradients) or per block (128x128, weights): value =
payload * scale.

This file computes no scale (`kernels.quantize`) and multiplies no matrix (`kernels.gemm_fp8`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

E4M3_MAX = 448.0
TILE = 128


@dataclass(frozen=True)
class Quantized:
    """A tensor in FP8: value = payload * scale, the scale broadcast over its tile or block.

    Args:
        payload: [rows, cols] float8_e4m3fn; blocks of weights may have leading dims, [experts, rows, cols].
        scale: fp32. Tiles: [ceil(cols/128), rows]. Blocks: [..., ceil(rows/128), ceil(cols/128)].
        payload_t: blocks only, the payload stored transposed, [..., cols, rows], for tensor cores that contract over
            contiguous elements; None where nobody asked for it.
    Source: arXiv:2412.19437 §3.3.2; rows are the fast axis of tile scales because a TMA load wants them so.
    """

    payload: Tensor
    scale: Tensor
    payload_t: Tensor | None = None

    def transposed_blocks(self) -> Quantized:
        """The same blocks as the transposed matrix: the transposed copy, or else a view; nothing is requantised.

        Only 128x128 blocks allow it: their scale does not care which way the contraction runs.
        """
        payload_t = self.payload.mT if self.payload_t is None else self.payload_t
        return Quantized(payload_t, self.scale.mT, self.payload)


def ceil_div(numerator: int, denominator: int) -> int:
    """Smallest integer not below numerator / denominator; `ceil_div(cols, TILE)` counts tiles."""
    return -(-numerator // denominator)


def decode_e4m3(payload: Tensor) -> Tensor:
    """Convert E4M3 to FP32, exactly, keeping NaN.

    Shifting the 7 magnitude bits of E4M3 to the top of FP16's exponent and mantissa gives value * 2^-8 (the
    biases are 7 and 15), subnormals included. The NaN code is the only one whose magnitude bits are all ones,
    so adding one to the lowest of them carries into the top exponent bit; copying that carry into the number
    makes an FP16 NaN. Seven times faster on CPU than `payload.float()`, which converts element by element
    (`docs/numerics.md`).

    Args:
        payload: any shape and strides, float8_e4m3fn.
    Returns:
        The same shape, fp32: unscaled values, at most 448 in magnitude, or NaN.
    """
    half = payload.view(torch.int8).to(torch.int16)
    # 0xBF80 as a signed 16-bit number: the sign and the seven shifted magnitude bits.
    half.bitwise_left_shift_(7).bitwise_and_(0xBF80 - 0x10000)
    half.bitwise_or_((half + 0x80).bitwise_and_(0x4000))
    return half.view(torch.float16).float().mul_(2.0**8)
