"""FP8 linears with one piece of the recipe changed, to see what that piece is for (arXiv:2412.19437 §3.3.2, App. B.2).

    gradient_format     dy in E4M3 (the recipe) or in E5M2, scale amax / 57344
    gradient_tile       dy in 1x128 tiles for dgrad and 128x1 for wgrad (the recipe), or one 128x128 block for both
    accumulation        FP32 partial sums, or those of Hopper's tensor cores (`hopper_accumulation.py`)
    promotion_interval  products between two promotions to FP32 under `hopper`; None: one sum over all of them

With nothing changed every result has the bits of `kernels/fp8_linear.py` on a CPU, whose quantisers of x and W and
whose weight cache are used here. The quantiser of dy and the products are references of their own: clear and slow, for
studies on a CPU. On a GPU the same torch operations run; no kernel of the shipped path is changed or asked.

Shapes: x [rows, in], weight [out, in]; grouped: weight [groups, out, in], rows sorted by expert with group_ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import deferred
from kernels.formats import E4M3_MAX, TILE, Quantized, ceil_div, decode_e4m3
from kernels.fp8_linear import weight_fp8
from kernels.gemm_fp8 import add_tile_tile
from kernels.gemm_grouped import group_rows
from kernels.quantize import (
    SMALLEST_SCALE,
    quantize_tiles,
    quantize_tiles_transposed,
    requantize_transposed,
)
from kernels.swiglu import (
    gated_swiglu,
    gated_swiglu_backward_kept,
    swiglu,
    swiglu_backward_kept,
    swiglu_quantize,
    swiglu_quantize_transposed,
)
from train.studies.ablation.hopper_accumulation import GROUP, factors, hopper_matmul_reference

E5M2_MAX = 57344.0
_FORMATS = {"e4m3": (torch.float8_e4m3fn, E4M3_MAX), "e5m2": (torch.float8_e5m2, E5M2_MAX)}


@dataclass(frozen=True)
class Ablation:
    """What differs from the recipe; the defaults are the recipe.

    Raises:
        ValueError: an interval that is no multiple of 32, or that FP32 sums would not notice.
    """

    gradient_format: Literal["e4m3", "e5m2"] = "e4m3"
    gradient_tile: Literal["1x128", "128x128"] = "1x128"
    accumulation: Literal["fp32", "hopper"] = "fp32"
    promotion_interval: int | None = TILE

    def __post_init__(self) -> None:
        interval = self.promotion_interval
        if interval is not None and (interval < GROUP or interval % GROUP):
            raise ValueError(f"promotion_interval={interval} must be a positive multiple of {GROUP}, or null for none")
        if self.accumulation == "fp32" and interval != TILE:
            raise ValueError(
                f"promotion_interval={interval} does nothing while partial sums are FP32: set accumulation=hopper"
            )


def quantize_gradient_reference(
    x: Tensor, ablation: Ablation, *, tile: tuple[int, int], power_of_two: bool
) -> Quantized:
    """Quantise a matrix with one scale for each `tile` of it.

    Args:
        x: [rows, cols] fp32 or bf16.
        ablation: its gradient_format is used.
        tile: rows and cols that share a scale.
        power_of_two: round scales up to powers of two.
    Returns:
        payload [rows, cols], scale [ceil(cols/128), rows]: repeated over the rows that share it. tile[1] must be 128.
    """
    dtype, largest = _FORMATS[ablation.gradient_format]
    rows, cols = x.shape
    height, width = tile
    padded = F.pad(x.float(), (0, -cols % width, 0, -rows % height))
    tiles = padded.unflatten(1, (-1, width)).unflatten(0, (-1, height))  # [row tiles, height, col tiles, width]
    amax = tiles.abs().amax(dim=(1, 3)) if x.numel() else padded.new_zeros(tiles.shape[0], tiles.shape[2])
    scale = (amax / largest).clamp_min(SMALLEST_SCALE)
    if power_of_two:
        fraction, exponent = torch.frexp(scale)
        rounded = torch.ldexp(torch.ones_like(scale), exponent - (fraction == 0.5).int())
        scale = torch.where(scale.isfinite(), rounded, scale)
    scale = torch.where(amax == 0, 1.0, scale)
    scaled = (tiles / scale[:, None, :, None]).flatten(2).flatten(0, 1)[:rows, :cols]
    payload = scaled.clamp(-largest, largest).to(dtype).contiguous()
    return Quantized(payload, scale.repeat_interleave(height, dim=0)[:rows].t().contiguous())


def gradient_operands_reference(dy: Tensor, ablation: Ablation, *, power_of_two: bool) -> tuple[Quantized, Quantized]:
    """A gradient for dgrad and for wgrad.

    Args:
        dy: [rows, out] fp32 or bf16.
        ablation: gradient_format and gradient_tile are used.
        power_of_two: round scales up to powers of two.
    Returns:
        payload [rows, out], scale [ceil(out/128), rows]; payload [out, rows], scale [ceil(rows/128), out].
    """
    if ablation.gradient_tile == "1x128":
        by_row = quantize_gradient_reference(dy, ablation, tile=(1, TILE), power_of_two=power_of_two)
        return by_row, quantize_gradient_reference(dy.t(), ablation, tile=(1, TILE), power_of_two=power_of_two)
    by_row = quantize_gradient_reference(dy, ablation, tile=(TILE, TILE), power_of_two=power_of_two)
    blocks = by_row.scale[:, ::TILE]  # [col blocks, row blocks]
    by_channel = by_row.payload.view(torch.uint8).t().contiguous().view(by_row.payload.dtype)
    return by_row, Quantized(by_channel, blocks.t().repeat_interleave(TILE, dim=1)[:, : dy.shape[1]].contiguous())


def product_reference(a: Quantized, b: Quantized, ablation: Ablation) -> Tensor:
    """a @ b.T, both operands in 1x128 tiles, summed as the ablation says.

    Args:
        a: payload [m, k], scale [ceil(k/128), m].
        b: payload [n, k], scale [ceil(k/128), n].
        ablation: accumulation and promotion_interval are used.
    Returns:
        [m, n] fp32.
    """
    if ablation.accumulation == "hopper":
        return hopper_matmul_reference(factors(a), factors(b), promotion_interval=ablation.promotion_interval)
    out = a.scale.new_zeros(a.payload.shape[0], b.payload.shape[0])
    add_tile_tile(out, _decode(a.payload), a.scale, _decode(b.payload), b.scale)
    return out


def _decode(payload: Tensor) -> Tensor:
    return decode_e4m3(payload) if payload.dtype == torch.float8_e4m3fn else payload.float()


def _as_tiles(blocks: Quantized) -> Quantized:
    """One 128x128-block matrix with its scales repeated for each row: [ceil(k/128), rows]."""
    rows = blocks.payload.shape[0]
    return Quantized(blocks.payload, blocks.scale.t().repeat_interleave(TILE, dim=1)[:, :rows])


def _groups(q: Quantized, index: int) -> Quantized:
    return Quantized(q.payload[index], q.scale[index])


def _rows_times(rows: Quantized, blocks: Quantized, group_ends: Tensor | None, ablation: Ablation) -> Tensor:
    """rows @ W.T, of each group its own W: fp32; rows of no group are zero."""
    if group_ends is None:
        return product_reference(rows, _as_tiles(blocks), ablation)
    out = rows.scale.new_zeros(rows.payload.shape[0], blocks.payload.shape[1])
    for g, part in enumerate(group_rows(group_ends, groups=len(blocks.payload), rows=len(out))):
        mine = Quantized(rows.payload[part], rows.scale[:, part])
        out[part] = product_reference(mine, _as_tiles(_groups(blocks, g)), ablation)
    return out


def _wgrad(dy: Quantized, x: Quantized, group_ends: Tensor | None, ablation: Ablation) -> Tensor:
    """dy [out, rows] times x [in, rows], over each group's rows: fp32."""
    if group_ends is None:
        return product_reference(dy, x, ablation)

    def of(q: Quantized, part: slice) -> Quantized:
        tiles = slice(part.start // TILE, ceil_div(part.stop, TILE))
        return Quantized(q.payload[:, part], q.scale[tiles])

    parts = group_rows(group_ends, groups=len(group_ends), rows=dy.payload.shape[1])
    return torch.stack([product_reference(of(dy, part), of(x, part), ablation) for part in parts])


@dataclass(frozen=True)
class _Input:
    """x as fprop multiplies it, and a way to make it again for wgrad."""

    by_row: Quantized
    by_channel: Callable[[], Quantized]


class _AblatedLinear(torch.autograd.Function):
    """x only carries the gradient: what is multiplied stands in `quantized`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        group_ends: Tensor | None,
        quantized: _Input,
        ablation: Ablation,
        power_of_two: bool,
    ) -> Tensor:
        ctx.weight, ctx.group_ends, ctx.quantized = weight, group_ends, quantized
        ctx.ablation, ctx.power_of_two = ablation, power_of_two
        blocks = weight_fp8(weight, power_of_two=power_of_two)
        return _rows_times(quantized.by_row, blocks, group_ends, ablation).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        weight, group_ends, quantized, ablation = ctx.weight, ctx.group_ends, ctx.quantized, ctx.ablation
        blocks = weight_fp8(weight, power_of_two=ctx.power_of_two).transposed_blocks()
        by_row, by_channel = gradient_operands_reference(dy, ablation, power_of_two=ctx.power_of_two)
        if weight.requires_grad:
            deferred.push(
                lambda: deferred.accumulate_grad(
                    weight, _wgrad(by_channel, quantized.by_channel(), group_ends, ablation)
                )
            )
        return _rows_times(by_row, blocks, group_ends, ablation).to(dy.dtype), None, None, None, None, None


class _KeptSwiglu(torch.autograd.Function):
    """SwiGLU whose gradient is taken at the input as it was kept in FP8."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, gates: Tensor | None, kept: Quantized) -> Tensor:
        ctx.gates, ctx.kept = gates, kept
        return swiglu(gate_up) if gates is None else gated_swiglu(gate_up, gates)

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, Tensor | None, None]:
        if ctx.gates is None:
            return swiglu_backward_kept(ctx.kept, dh), None, None
        return *gated_swiglu_backward_kept(ctx.kept, ctx.gates, dh), None


@dataclass(frozen=True)
class AblatedLinears:
    """The linears of `kernels/fp8_linear.py` under an ablation; shapes and results as there.

    Raises:
        ValueError: Hopper's sums are asked for with scales that are no powers of two.
    """

    ablation: Ablation
    power_of_two: bool

    def __post_init__(self) -> None:
        if self.ablation.accumulation == "hopper" and not self.power_of_two:
            raise ValueError("accumulation=hopper needs scales that are powers of two: set power_of_two_scales=true")

    def linear(self, x: Tensor, weight: Tensor, group_ends: Tensor | None = None) -> Tensor:
        """`fp8_linear`, or `grouped_fp8_linear` with group_ends: x is kept in FP8 and regrouped for wgrad.

        Args:
            x: [..., in], grouped [rows, in], fp32 or bf16.
            weight: [out, in], grouped [groups, out, in].
            group_ends: [groups] int32, exclusive end rows, multiples of 128; None: one weight.
        Returns:
            [..., out] in x's dtype.
        """
        rows = x.flatten(0, -2)
        xq = quantize_tiles(rows, power_of_two=self.power_of_two)
        kept = _Input(xq, lambda: requantize_transposed(xq, power_of_two=self.power_of_two))
        return self._apply(rows, weight, group_ends, kept).view(*x.shape[:-1], weight.shape[-2])

    def linear_of_kept(self, x: Tensor, weight: Tensor) -> Tensor:
        """`fp8_linear_of_kept`: x [..., in] is quantised for wgrad from itself; [..., out] in its dtype."""
        rows = x.flatten(0, -2)
        still = rows.detach()
        xq = quantize_tiles(still, power_of_two=self.power_of_two)
        kept = _Input(xq, lambda: quantize_tiles_transposed(still, power_of_two=self.power_of_two))
        return self._apply(rows, weight, None, kept).view(*x.shape[:-1], weight.shape[0])

    def swiglu_linear(
        self, gate_up: Tensor, gates: Tensor | None, weight: Tensor, group_ends: Tensor | None = None
    ) -> Tensor:
        """`fp8_swiglu_linear`, or `grouped_fp8_swiglu_linear` with gates and group_ends.

        Args:
            gate_up: [..., 2 * inter], grouped [rows, 2 * inter], fp32 or bf16, gate first; kept in FP8.
            gates: [rows] fp32; None: not gated.
            weight: [out, inter], grouped [groups, out, inter].
            group_ends: as in `linear`.
        Returns:
            [..., out] in gate_up's dtype.
        """
        rows, dtype, power_of_two = gate_up.flatten(0, -2), gate_up.dtype, self.power_of_two
        kept, hq = swiglu_quantize(rows, gates, power_of_two=power_of_two)
        still = None if gates is None else gates.detach()
        again = _Input(hq, lambda: swiglu_quantize_transposed(kept, still, dtype=dtype, power_of_two=power_of_two))
        h: Tensor = _KeptSwiglu.apply(rows, gates, kept)  # type: ignore[no-untyped-call]
        return self._apply(h, weight, group_ends, again).view(*gate_up.shape[:-1], weight.shape[-2])

    def _apply(self, x: Tensor, weight: Tensor, group_ends: Tensor | None, quantized: _Input) -> Tensor:
        y: Tensor = _AblatedLinear.apply(  # type: ignore[no-untyped-call]
            x, weight, group_ends, quantized, self.ablation, self.power_of_two
        )
        return y
