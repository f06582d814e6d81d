"""FP8 matrix products with promotion to FP32 every 128 terms (arXiv:2412.19437 §3.3.2, figure 7b).

For each tile t of 128 contraction elements:

    partial = payload_a[:, t] @ payload_b[:, t].T       products of unscaled E4M3 numbers, summed in FP32
    out    += partial * (scale_a[t] * scale_b[t])       the promotion: both scales, then one FP32 addition

`gemm_tile_block` is fprop and dgrad, `gemm_tile_tile` wgrad. Operands are contracted over their last dim, [m, k] and
[n, k]; m, n and k need not be multiples of 128. Scales are [ceil(k/128), m] of tiles, [ceil(n/128), ceil(k/128)] of
blocks. The MMA of a GPU keeps about 14 bits inside a partial sum; here it is a full FP32 one (`docs/numerics.md`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.formats import TILE, Quantized, ceil_div
from kernels.operators import operator
from kernels.tiles import decode_e4m3


def add_tile_block(out: Tensor, a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> None:
    """Add the tile-by-block product of decoded payloads, fp32 and unscaled, to `out`, [m, n] fp32."""
    n = b.shape[0]
    whole_blocks = n // TILE
    whole = whole_blocks * TILE
    partial = torch.empty_like(out, memory_format=torch.contiguous_format)
    for t in range(len(a_scale)):
        tile = slice(t * TILE, (t + 1) * TILE)
        torch.mm(a[:, tile], b[:, tile].t(), out=partial)
        scale = a_scale[t][:, None] * b_scale[:, t]  # [m, n_blocks]
        if whole:
            blocks = partial[:, :whole].unflatten(1, (whole_blocks, TILE))
            out_blocks = out[:, :whole].unflatten(1, (whole_blocks, TILE))
            out_blocks.addcmul_(blocks, scale[:, :whole_blocks, None])
        if whole < n:
            out[:, whole:].addcmul_(partial[:, whole:], scale[:, -1:])


def add_tile_tile(out: Tensor, a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> None:
    """Add the tile-by-tile product of decoded payloads, fp32 and unscaled, to `out`, [m, n] fp32."""
    partial = torch.empty_like(out, memory_format=torch.contiguous_format)
    scale = torch.empty_like(partial)
    for t in range(len(a_scale)):
        tile = slice(t * TILE, (t + 1) * TILE)
        torch.mm(a[:, tile], b[:, tile].t(), out=partial)
        torch.mul(a_scale[t][:, None], b_scale[t], out=scale)
        out.addcmul_(partial, scale)


def gemm_tile_block_reference(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Decode, then tile by tile. Same arguments as `gemm_tile_block`, payloads and scales apart."""
    out = a_scale.new_zeros(a.shape[0], b.shape[0])
    add_tile_block(out, decode_e4m3(a), a_scale, decode_e4m3(b), b_scale)
    return out.to(out_dtype)


def gemm_tile_tile_reference(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out: Tensor, accumulate: bool
) -> None:
    """Decode, then tile by tile. Same arguments as `gemm_tile_tile`, payloads and scales apart."""
    product = a_scale.new_zeros(out.shape)
    add_tile_tile(product, decode_e4m3(a), a_scale, decode_e4m3(b), b_scale)
    write_product(out, product, accumulate=accumulate)


def write_product(out: Tensor, product: Tensor, *, accumulate: bool) -> None:
    """out = product or out += product: the finished sum is added once, not tile by tile, as the kernels do."""
    (out.add_ if accumulate else out.copy_)(product)


def product_flops(a: Sequence[int], a_scale: object, b: Sequence[int], *_: object, out_shape: object) -> int:
    """Of [m, k] x [n, k]."""
    return 2 * a[0] * b[0] * a[1]


_gemm_tile_block = operator(
    "gemm_tile_block",
    gemm_tile_block_reference,
    fake=lambda a, a_scale, b, b_scale, out_dtype: a.new_empty(a.shape[0], b.shape[0], dtype=out_dtype),
    flops=product_flops,
    gpu="gemm_fp8",
)
_gemm_tile_tile = operator(
    "gemm_tile_tile",
    gemm_tile_tile_reference,
    fake=lambda a, a_scale, b, b_scale, out, accumulate: None,
    flops=product_flops,
    gpu="gemm_fp8",
    mutates=["out"],
)


def gemm_tile_block(a: Quantized, b: Quantized, *, out_dtype: torch.dtype) -> Tensor:
    """a @ b.T for activations in 1x128 tiles and a weight in 128x128 blocks: [m, n] out_dtype, summed in fp32."""
    _check_contraction(a, b)
    return _gemm_tile_block(a.payload, a.scale, b.payload, b.scale, out_dtype)


def gemm_tile_tile(a: Quantized, b: Quantized, *, out: Tensor | None = None, accumulate: bool = False) -> Tensor:
    """a @ b.T for two operands in 1x128 tiles: a weight gradient, which stays FP32.

    `out` [m, n] fp32, contiguous, is written, or added to with `accumulate`, and returned; None: a new one.
    """
    _check_contraction(a, b)
    assert out is not None or not accumulate, "nothing to add to"
    if out is None:
        out = a.payload.new_empty(a.payload.shape[0], b.payload.shape[0], dtype=torch.float32)
    _gemm_tile_tile(a.payload, a.scale, b.payload, b.scale, out, accumulate)
    return out


def _check_contraction(a: Quantized, b: Quantized) -> None:
    k_a, k_b = a.payload.shape[-1], b.payload.shape[-1]
    if k_a != k_b:
        raise ValueError(f"a and b contract their last dims, got {k_a} and {k_b}; transpose one operand")
    assert a.scale.shape == (ceil_div(k_a, TILE), a.payload.shape[0]), (a.payload.shape, a.scale.shape)
