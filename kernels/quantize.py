"""Online quantisation to E4M3 in 1x128 tiles and 128x128 blocks (arXiv:2412.19437 §3.3.2, §3.5.2, figure 7a).

    scale   = amax(tile) / 448, optionally rounded up to a power of two; 1 for a tile of zeros
    payload = round_to_e4m3(clamp(x / scale, -448, 448))

Scales come from the tensor at hand, never from earlier steps. A last tile may be short (576 = 4*128 + 64); its scale
covers the elements there are. NaN or infinity in a tile makes its scale non-finite, hence the whole tile NaN after
dequantising: guards see it. Error bounds are derived in `docs/numerics.md`.

Shapes: rows = tokens (or output features), cols = the contraction dim; x and w are fp32 or bf16.
`quantize_tiles_transposed` groups along rows instead, for wgrad, whose contraction runs over tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.formats import E4M3_MAX, TILE, CarriedTiles, GradientTiles, Quantized, ceil_div
from kernels.operators import operator
from kernels.tiles import decode_e4m3, empty_tiles

# No amax floor such as 1e-4, which would erase small gradients: only the scale itself is kept a normal FP32 number.
SMALLEST_SCALE = 2.0**-126


def scale_of(amax: Tensor, *, largest: float, power_of_two: bool) -> Tensor:
    """fp32 scale per tile from the tile's largest magnitude, fp32, any shape, and the format's `largest` number."""
    scale = (amax / largest).clamp_min(SMALLEST_SCALE)
    if power_of_two:
        # Rounded *up*, so that every payload stays within the format; it costs at most one bit of range below. Adding
        # all mantissa bits carries into the exponent unless they were zero.
        rounded = (scale.view(torch.int32) + 0x007FFFFF).bitwise_and_(0x7F800000).view(torch.float32)
        scale = torch.where(scale.isfinite(), rounded, scale)
    return torch.where(amax == 0, 1.0, scale)


def to_e4m3(scaled: Tensor) -> Tensor:
    """Round to nearest even, in place up to the cast; the clamp is for torch 2.11, where overflow is NaN."""
    return scaled.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def quantize_tiles_reference(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """Tile by tile. Same arguments as `quantize_tiles`; returns payload and scale."""
    x = x.float()
    tiles = x.split(TILE, dim=1)
    amax = torch.stack([tile.abs().amax(dim=1) for tile in tiles])  # [col_tiles, rows]
    scale = scale_of(amax, largest=E4M3_MAX, power_of_two=power_of_two)
    scaled = torch.empty_like(x, memory_format=torch.contiguous_format)
    for tile, out, tile_scale in zip(tiles, scaled.split(TILE, dim=1), scale, strict=True):
        torch.div(tile, tile_scale[:, None], out=out)
    return to_e4m3(scaled), scale


def quantize_tiles_transposed_reference(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """Tile by tile. Same arguments as `quantize_tiles_transposed`; returns payload and scale."""
    x = x.float()
    rows, cols = x.shape
    tiles = x.split(TILE, dim=0)[: ceil_div(rows, TILE)]
    amax = torch.stack([tile.abs().amax(dim=0) for tile in tiles]) if tiles else x.new_zeros(0, cols)
    scale = scale_of(amax, largest=E4M3_MAX, power_of_two=power_of_two)  # [row_tiles, cols]
    scaled = torch.empty_like(x, memory_format=torch.contiguous_format)
    for tile, out, tile_scale in zip(tiles, scaled.split(TILE, dim=0), scale, strict=False):
        torch.div(tile, tile_scale, out=out)
    payload = to_e4m3(scaled).view(torch.uint8).t().contiguous()  # [cols, rows]
    return payload.view(torch.float8_e4m3fn), scale


def requantize_transposed_reference(payload: Tensor, scale: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """Through FP32. Same arguments as `requantize_transposed`; returns payload and scale."""
    values = dequantize_tiles_reference(payload, scale, torch.float32)
    return quantize_tiles_transposed_reference(values, power_of_two)


def quantize_tiles_both_reference(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One after the other. Same arguments as `quantize_tiles_both`; payload and scale by row, then by column."""
    return *quantize_tiles_reference(x, power_of_two), *quantize_tiles_transposed_reference(x, power_of_two)


def quantize_blocks_reference(w: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor, Tensor]:
    """All blocks at once. Same arguments as `quantize_blocks`; payload, scale, transposed payload."""
    blocks = _as_blocks(w.float())  # [..., row_blocks, 128, col_blocks, 128]
    scale = scale_of(blocks.abs().amax(dim=(-3, -1)), largest=E4M3_MAX, power_of_two=power_of_two)
    scaled = (blocks / scale[..., :, None, :, None]).flatten(-2).flatten(-3, -2)
    payload = to_e4m3(scaled)[..., : w.shape[-2], : w.shape[-1]].contiguous()
    payload_t = payload.view(torch.uint8).mT.contiguous().view(torch.float8_e4m3fn)
    return payload, scale, payload_t


def dequantize_tiles_reference(payload: Tensor, scale: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Tile by tile. Same arguments as `dequantize_tiles`."""
    values = decode_e4m3(payload)
    for tile, tile_scale in zip(values.split(TILE, dim=1), scale, strict=False):
        tile.mul_(tile_scale[:, None])
    return values.to(out_dtype)


def _allocate_tiles(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    return empty_tiles(x, *x.shape)


def _allocate_tiles_transposed(x: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    return empty_tiles(x, *x.shape[::-1])


def _allocate_blocks(w: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor, Tensor]:
    *experts, rows, cols = w.shape
    payload = w.new_empty(w.shape, dtype=torch.float8_e4m3fn)
    scale = w.new_empty(*experts, ceil_div(rows, TILE), ceil_div(cols, TILE), dtype=torch.float32)
    return payload, scale, w.new_empty(*experts, cols, rows, dtype=torch.float8_e4m3fn)


_quantize_tiles = operator("quantize_tiles", quantize_tiles_reference, fake=_allocate_tiles, gpu="quantize")
_quantize_tiles_transposed = operator(
    "quantize_tiles_transposed", quantize_tiles_transposed_reference, fake=_allocate_tiles_transposed, gpu="quantize"
)
_quantize_tiles_both = operator(
    "quantize_tiles_both",
    quantize_tiles_both_reference,
    fake=lambda x, power_of_two: (*_allocate_tiles(x, power_of_two), *_allocate_tiles_transposed(x, power_of_two)),
    gpu="quantize",
)
_requantize_transposed = operator(
    "requantize_transposed",
    requantize_transposed_reference,
    fake=lambda payload, scale, power_of_two: empty_tiles(payload, *payload.shape[::-1]),
    gpu="quantize",
)
_quantize_blocks = operator("quantize_blocks", quantize_blocks_reference, fake=_allocate_blocks, gpu="quantize")
_dequantize_tiles = operator(
    "dequantize_tiles",
    dequantize_tiles_reference,
    fake=lambda payload, scale, out_dtype: payload.new_empty(payload.shape, dtype=out_dtype),
    gpu="quantize",
)


def quantize_tiles(x: Tensor, *, power_of_two: bool) -> Quantized:
    """One scale per row and 128 columns: x [rows, cols] -> payload [rows, cols], scale [ceil(cols/128), rows]."""
    _check_matrix("x", x)
    return Quantized(*_quantize_tiles(x.detach(), power_of_two))


def quantize_tiles_transposed(x: Tensor, *, power_of_two: bool) -> Quantized:
    """One scale per 128 rows and column, stored transposed: both operands of wgrad (§3.5.2).

    x [rows, cols] -> payload [cols, rows], scale [ceil(rows/128), cols]: the 1x128 tiles of x transposed.
    """
    _check_matrix("x", x)
    return Quantized(*_quantize_tiles_transposed(x.detach(), power_of_two))


def quantize_tiles_both(x: Tensor, *, power_of_two: bool) -> tuple[Quantized, Quantized]:
    """`quantize_tiles` and `quantize_tiles_transposed` of one tensor, read once: a gradient, for dgrad and wgrad."""
    _check_matrix("x", x)
    payload, scale, payload_t, scale_t = _quantize_tiles_both(x.detach(), power_of_two)
    return Quantized(payload, scale), Quantized(payload_t, scale_t)


def requantize_transposed(q: Quantized, *, power_of_two: bool) -> Quantized:
    """Regroup 1x128 tiles as 128x1: dequantise, transpose, quantise again (§3.5.2, the cached activation for wgrad).

    With power-of-two scales the second rounding is exact for every element that does not fall below the normal range
    of its new tile (`docs/numerics.md`); with FP32 scales it is one more rounding.
    """
    return Quantized(*_requantize_transposed(q.payload, q.scale, power_of_two))


def quantize_blocks(w: Tensor, *, power_of_two: bool) -> Quantized:
    """One scale per 128x128 block: weights, with the transposed copy that dgrad multiplies.

    w [..., rows, cols] -> payload, scale [..., ceil(rows/128), ceil(cols/128)], payload_t [..., cols, rows].
    """
    if w.dim() < 2:
        raise ValueError(f"w must be [..., rows, cols], got shape {list(w.shape)}")
    return Quantized(*_quantize_blocks(w.detach(), power_of_two))


def dequantize_tiles(q: Quantized, *, out_dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of a tensor in 1x128 tiles: [rows, cols], multiplied in fp32 and rounded once to `out_dtype`."""
    return _dequantize_tiles(q.payload, q.scale, out_dtype)


class _Dequantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, carrier: Tensor, tiles: Quantized) -> Tensor:
        return dequantize_tiles(tiles, out_dtype=carrier.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _DequantizeGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, gradient: GradientTiles[Quantized]) -> Tensor:
        ctx.gradient = gradient
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return dequantize_tiles(ctx.gradient.take(), out_dtype=grads[0].dtype), None


def dequantize_carried(x: CarriedTiles) -> Tensor:
    """The values of tiles [rows, cols] for a reader of numbers, whose gradient goes back as it is."""
    return _Dequantize.apply(x.carrier, x.tiles)  # type: ignore[no-any-return, no-untyped-call]


def dequantize_gradient(y: Tensor, gradient: GradientTiles[Quantized]) -> Tensor:
    """y [rows, cols] for a reader that leaves y's gradient in tiles; whoever made y gets numbers."""
    return _DequantizeGradient.apply(y, gradient)  # type: ignore[no-any-return, no-untyped-call]


def dequantize_blocks(q: Quantized) -> Tensor:
    """fp32 values of a tensor in 128x128 blocks: [..., rows, cols]. For checks: training never needs them."""
    blocks = _as_blocks(decode_e4m3(q.payload))
    values = (blocks * q.scale[..., :, None, :, None]).flatten(-2).flatten(-3, -2)
    return values[..., : q.payload.shape[-2], : q.payload.shape[-1]].contiguous()


def _as_blocks(w: Tensor) -> Tensor:
    """View [..., rows, cols] as [..., row_blocks, 128, col_blocks, 128], zero-padded where ragged."""
    rows, cols = w.shape[-2:]
    row_blocks, col_blocks = ceil_div(rows, TILE), ceil_div(cols, TILE)
    if rows % TILE or cols % TILE:
        w = F.pad(w, (0, col_blocks * TILE - cols, 0, row_blocks * TILE - rows))
    return w.reshape(*w.shape[:-2], row_blocks, TILE, col_blocks, TILE)


def _check_matrix(name: str, x: Tensor) -> None:
    if x.dim() != 2:
        raise ValueError(f"{name} must be [rows, cols], got shape {list(x.shape)}; flatten leading dims first")
