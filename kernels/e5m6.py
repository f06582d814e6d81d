"""E5M6: an activation kept for backward in 12 bits an element, 1 sign, 5 exponent and 6 mantissa bits.

arXiv:2412.19437 §3.3.3 (1) keeps the input of the linear after attention in 12 bits, with power-of-two scales, without
a layout or a bias; ours:

    code     the upper 12 bits of an FP16 number: bias 15, largest 65024, smallest normal 2^-14, subnormals to 2^-20
    scale    = amax(tile) / 65024, optionally rounded up to a power of two; 1 for a tile of zeros; one per 1x128
    code(x)  = x / scale to the nearest, ties to even, saturating at the largest finite code
    payload  a row holds the upper 8 bits of each code, then the lower 4 bits, two to a byte, the even column low

|decoded - x| <= 2^-7 |x| down to 2^-14 scale, and 2^-21 scale below; 2^-14 scale is between 2^-30 and 2^-28 of amax. A
power-of-two scale drops the last mantissa bit of a BF16 number.

`quantize_pack` and `unpack_quantize_transposed` are what a linear needs that keeps its input so (`fp8_linear_e5m6` of
`kernels/fp8_linear.py`): each reads once and writes both. Shapes: x [rows, cols], rows = tokens, may be sharded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.formats import TILE, Quantized, ceil_div
from kernels.operators import operator
from kernels.quantize import quantize_tiles_reference, quantize_tiles_transposed_reference, scale_of
from kernels.tiles import empty_tiles

# The largest finite code: all six mantissa bits set below 2^16.
E5M6_MAX = 65024.0
# Codes with all exponent bits set mean what they mean in FP16. Infinity is never written, and NaN only as this one. NaN
# or infinity in a tile makes the whole tile NaN, as in `kernels.quantize`.
E5M6_NAN = 0x7E0
# Bits of the FP32 numbers 2^-14, the smallest normal, and infinity.
_NORMAL_BITS, _INFINITY_BITS = 0x38800000, 0x7F800000


def encode_e5m6_reference(x: Tensor) -> Tensor:
    """int32 codes of unscaled fp32 values, rounded to nearest even and saturating, any shape."""
    x = x.clamp(-E5M6_MAX, E5M6_MAX)
    bits = x.contiguous().view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    # Half of the last place that stays, less one unless that place is odd; then the exponent's bias of 127 becomes 15.
    normal = ((magnitude + 0xFFFF + ((magnitude >> 17) & 1)) >> 17) - (112 << 6)
    # FP32 numbers from 8 to 16 are multiples of 2^-20, so the sum is rounded and counts them in its lowest bits.
    subnormal = (x.abs() + 8.0).view(torch.int32) & 0x7F
    code = torch.where(magnitude < _NORMAL_BITS, subnormal, normal) | ((bits >> 20) & 0x800)
    return torch.where(magnitude > _INFINITY_BITS, E5M6_NAN, code)


def decode_e5m6_reference(code: Tensor) -> Tensor:
    """fp32 values of int32 codes, any shape; exact: FP16 has the same exponent."""
    return (code << 4).to(torch.uint16).view(torch.float16).float()


def pack_e5m6_reference(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """Tile by tile. Same arguments as `pack_e5m6`; returns payload and scale."""
    tiles = x.float().split(TILE, dim=1)
    amax = torch.stack([tile.abs().amax(dim=1) for tile in tiles])  # [col_tiles, rows]
    scale = scale_of(amax, largest=E5M6_MAX, power_of_two=power_of_two)
    scaled = torch.cat([tile / one[:, None] for tile, one in zip(tiles, scale, strict=True)], dim=1)
    code = encode_e5m6_reference(scaled)  # [rows, cols]
    low = code & 0xF
    pairs = low[:, 0::2] | (low[:, 1::2] << 4)  # [rows, cols / 2]
    return torch.cat((code >> 4, pairs), dim=1).to(torch.uint8), scale


def unpack_e5m6_reference(payload: Tensor, scale: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Tile by tile. Same arguments as `unpack_e5m6`."""
    cols = payload.shape[1] * 2 // 3
    high, pairs = payload.int().split((cols, cols // 2), dim=1)
    low = torch.stack((pairs & 0xF, pairs >> 4), dim=2).flatten(1)  # [rows, cols]
    values = decode_e5m6_reference((high << 4) | low)
    for tile, tile_scale in zip(values.split(TILE, dim=1), scale, strict=True):
        tile.mul_(tile_scale[:, None])
    return values.to(out_dtype)


def quantize_pack_reference(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One after the other. Same arguments as `quantize_pack`; payload and scale in E4M3, then in E5M6."""
    return *quantize_tiles_reference(x, power_of_two), *pack_e5m6_reference(x, True)


def unpack_quantize_transposed_reference(
    payload: Tensor, scale: Tensor, out_dtype: torch.dtype, power_of_two: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """One after the other. Same arguments as `unpack_quantize_transposed`; values, then E4M3 payload and scale."""
    values = unpack_e5m6_reference(payload, scale, out_dtype)
    return values, *quantize_tiles_transposed_reference(values, power_of_two)


def _allocate_payload(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    rows, cols = x.shape
    payload = x.new_empty(rows, cols // 2 * 3, dtype=torch.uint8)
    return payload, x.new_empty(ceil_div(cols, TILE), rows, dtype=torch.float32)


def _allocate_values(payload: Tensor, scale: Tensor, out_dtype: torch.dtype) -> Tensor:
    rows, row_bytes = payload.shape
    return payload.new_empty(rows, row_bytes * 2 // 3, dtype=out_dtype)


def _allocate_both(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *empty_tiles(x, *x.shape), *_allocate_payload(x, True)


def _allocate_restored(
    payload: Tensor, scale: Tensor, out_dtype: torch.dtype, power_of_two: bool
) -> tuple[Tensor, Tensor, Tensor]:
    values = _allocate_values(payload, scale, out_dtype)
    return values, *empty_tiles(values, *values.shape[::-1])


_pack = operator("pack_e5m6", pack_e5m6_reference, fake=_allocate_payload, gpu="e5m6")
_unpack = operator("unpack_e5m6", unpack_e5m6_reference, fake=_allocate_values, gpu="e5m6")
_quantize_pack = operator("quantize_pack", quantize_pack_reference, fake=_allocate_both, gpu="e5m6")
_unpack_quantize_transposed = operator(
    "unpack_quantize_transposed", unpack_quantize_transposed_reference, fake=_allocate_restored, gpu="e5m6"
)


def pack_e5m6(x: Tensor, *, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """x [rows, cols] -> payload [rows, cols * 3/2] uint8, scale [ceil(cols/128), rows] fp32; cols must be even."""
    _check_columns(x)
    return _pack(x.detach(), power_of_two)


def quantize_pack(x: Tensor, *, power_of_two: bool) -> tuple[Quantized, tuple[Tensor, Tensor]]:
    """`quantize_tiles` of x [rows, cols], and `pack_e5m6` of it, whose scales are powers of two in any case."""
    _check_columns(x)
    payload, scale, *packed = _quantize_pack(x.detach(), power_of_two)
    return Quantized(payload, scale), (packed[0], packed[1])


def unpack_e5m6(payload: Tensor, scale: Tensor, *, out_dtype: torch.dtype) -> Tensor:
    """Values of what `pack_e5m6` returned, multiplied in fp32 and rounded once: [rows, cols] in fp32 or bf16."""
    _check_packed(payload, scale)
    return _unpack(payload, scale, out_dtype)


def unpack_quantize_transposed(
    payload: Tensor, scale: Tensor, *, out_dtype: torch.dtype, power_of_two: bool
) -> tuple[Tensor, Quantized]:
    """`unpack_e5m6`, and `quantize_tiles_transposed` of what it gives, for wgrad."""
    _check_packed(payload, scale)
    values, payload_t, scale_t = _unpack_quantize_transposed(payload, scale, out_dtype, power_of_two)
    return values, Quantized(payload_t, scale_t)


def _check_columns(x: Tensor) -> None:
    if x.dim() != 2 or x.shape[1] % 2 or not x.shape[1]:
        raise ValueError(
            f"x must be [rows, cols] with an even number of columns, for two E5M6 values share three bytes; got "
            f"shape {list(x.shape)}; flatten leading dims, pad odd columns"
        )


def _check_packed(payload: Tensor, scale: Tensor) -> None:
    fits = payload.dim() == 2 and payload.shape[1] % 3 == 0
    if not fits or scale.shape != (ceil_div(payload.shape[1] // 3 * 2, TILE), payload.shape[0]):
        raise ValueError(
            f"payload and scale must be [rows, cols * 3/2] and [ceil(cols/128), rows], got {list(payload.shape)} "
            f"and {list(scale.shape)}; give what pack_e5m6 returned"
        )
