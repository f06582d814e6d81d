"""FP8 linears with one piece of the recipe changed, to see what that piece is for (arXiv:2412.19437 §3.3.2, App. B.2).

    gradient_format     dy in E4M3 (the recipe) or in E5M2, scale amax / 57344
    gradient_tile       dy in 1x128 tiles for dgrad and 128x1 for wgrad (the recipe), or one 128x128 block for both
    accumulation        FP32 partial sums, or those of Hopper's tensor cores (`hopper_accumulation.py`)
    promotion_interval  products between two promotions to FP32 under `hopper`; None: one sum over all of them
    defect              none, or a mistake to be found: a weight's scales stay those of its first use in this process
                        (`stale_scale`); weight gradients lack their first 128 tokens (`dropped_tile`)

Quantisers and the weight cache are the shipped ones (`kernels/quantize.py`, `kernels/fp8_linear.py`). The products are
references in plain torch: clear and slow, for studies on a CPU. With nothing changed every result has the bits of
`kernels/fp8_linear.py` on a CPU.

Shapes: x [rows, in], weight [out, in]; grouped: weight [groups, out, in], rows sorted by expert with group_ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from kernels import deferred
from kernels.formats import E4M3_MAX, TILE, Quantized, ceil_div
from kernels.fp8_linear import weight_fp8
from kernels.gemm_fp8 import add_tile_tile
from kernels.gemm_grouped import group_rows
from kernels.quantize import (
    quantize_blocks,
    quantize_tiles,
    quantize_tiles_both,
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
from train.studies.ablation.hopper_accumulation import check_interval, decode, factors, hopper_matmul_reference

E5M2_MAX = 57344.0


@dataclass(frozen=True)
class Ablation:
    """What differs from the recipe; the defaults are the recipe."""

    gradient_format: Literal["e4m3", "e5m2"] = "e4m3"
    gradient_tile: Literal["1x128", "128x128"] = "1x128"
    accumulation: Literal["fp32", "hopper"] = "fp32"
    promotion_interval: int | None = TILE
    defect: Literal["none", "stale_scale", "dropped_tile"] = "none"

    def __post_init__(self) -> None:
        check_interval(self.promotion_interval)
        if self.accumulation == "fp32" and self.promotion_interval != TILE:
            raise ValueError(
                f"promotion_interval={self.promotion_interval} does nothing while partial sums are FP32: "
                "set accumulation=hopper"
            )


def gradient_operands(dy: Tensor, ablation: Ablation, *, power_of_two: bool) -> tuple[Quantized, Quantized]:
    """A gradient for dgrad and for wgrad, in the ablation's gradient_format and gradient_tile.

    Returns:
        of dy [rows, out]: payload [rows, out], scale [ceil(out/128), rows]; payload [out, rows], scale
        [ceil(rows/128), out].
    """
    e5m2 = ablation.gradient_format == "e5m2"
    # The formats' largest numbers differ by 2^7, so the quantiser's amax / 448 becomes amax / 57344 to the bit
    # (and 1 for a tile below 2^-142, whose payload is zero).
    x = dy.float() * (E4M3_MAX / E5M2_MAX) if e5m2 else dy
    if ablation.gradient_tile == "1x128":
        by_row, by_channel = quantize_tiles_both(x, power_of_two=power_of_two)
    else:
        blocks = quantize_blocks(x, power_of_two=power_of_two)
        by_row, by_channel = _as_tiles(blocks), _as_tiles(blocks.transposed_blocks())
    return (_to_e5m2(dy, by_row.scale), _to_e5m2(dy.t(), by_channel.scale)) if e5m2 else (by_row, by_channel)


def _to_e5m2(x: Tensor, scale: Tensor) -> Quantized:
    scaled = x.float() / scale.t().repeat_interleave(TILE, dim=1)[:, : x.shape[1]]
    return Quantized(scaled.clamp(-E5M2_MAX, E5M2_MAX).to(torch.float8_e5m2).contiguous(), scale)


def product_reference(a: Quantized, b: Quantized, ablation: Ablation) -> Tensor:
    """a [m, k] @ b.T [k, n] under the ablation's accumulation, both in 1x128 tiles: [m, n] fp32."""
    if ablation.accumulation == "hopper":
        return hopper_matmul_reference(factors(a), factors(b), promotion_interval=ablation.promotion_interval)
    out = a.scale.new_zeros(a.payload.shape[0], b.payload.shape[0])
    add_tile_tile(out, decode(a.payload), a.scale, decode(b.payload), b.scale)
    return out


def _weight(weight: Tensor, ablation: Ablation, *, power_of_two: bool) -> Quantized:
    blocks = weight_fp8(weight, power_of_two=power_of_two)
    if ablation.defect != "stale_scale":
        return blocks
    scale: Tensor = weight.__dict__.setdefault("_first_scale", blocks.scale)
    return Quantized(blocks.payload, scale)


def _as_tiles(blocks: Quantized) -> Quantized:
    """One 128x128-block matrix with its scales repeated for each row: [ceil(k/128), rows]."""
    rows = blocks.payload.shape[0]
    return Quantized(blocks.payload, blocks.scale.t().repeat_interleave(TILE, dim=1)[:, :rows])


def _rows_times(rows: Quantized, blocks: Quantized, group_ends: Tensor | None, ablation: Ablation) -> Tensor:
    """rows @ W.T, each group with its own W: fp32; rows of no group are zero."""
    if group_ends is None:
        return product_reference(rows, _as_tiles(blocks), ablation)
    out = rows.scale.new_zeros(rows.payload.shape[0], blocks.payload.shape[1])
    for g, group in enumerate(group_rows(group_ends, groups=len(blocks.payload), rows=len(out))):
        mine = Quantized(rows.payload[group], rows.scale[:, group])
        out[group] = product_reference(mine, _as_tiles(Quantized(blocks.payload[g], blocks.scale[g])), ablation)
    return out


def _wgrad(dy: Quantized, x: Quantized, group_ends: Tensor | None, ablation: Ablation) -> Tensor:
    """dy [out, rows] times x [in, rows], over each group's rows: fp32."""
    if ablation.defect == "dropped_tile":
        scale = x.scale.clone()
        scale[0] = 0.0
        x = Quantized(x.payload, scale)
    if group_ends is None:
        return product_reference(dy, x, ablation)

    def of(q: Quantized, group: slice) -> Quantized:
        return Quantized(q.payload[:, group], q.scale[group.start // TILE : ceil_div(group.stop, TILE)])

    groups = group_rows(group_ends, groups=len(group_ends), rows=dy.payload.shape[1])
    return torch.stack([product_reference(of(dy, group), of(x, group), ablation) for group in groups])


class _AblatedLinear(torch.autograd.Function):
    """x only carries the gradient: fprop multiplies `by_row`, wgrad what `x_by_channel` makes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        group_ends: Tensor | None,
        by_row: Quantized,
        x_by_channel: Callable[[], Quantized],
        linears: AblatedLinears,
    ) -> Tensor:
        ctx.weight, ctx.group_ends, ctx.x_by_channel = weight, group_ends, x_by_channel
        ctx.ablation, ctx.power_of_two = linears.ablation, linears.power_of_two
        blocks = _weight(weight, linears.ablation, power_of_two=linears.power_of_two)
        return _rows_times(by_row, blocks, group_ends, linears.ablation).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        weight, group_ends, x_by_channel, ablation = ctx.weight, ctx.group_ends, ctx.x_by_channel, ctx.ablation
        blocks = _weight(weight, ablation, power_of_two=ctx.power_of_two).transposed_blocks()
        by_row, by_channel = gradient_operands(dy, ablation, power_of_two=ctx.power_of_two)
        if weight.requires_grad:
            deferred.push(
                lambda: deferred.accumulate_grad(weight, _wgrad(by_channel, x_by_channel(), group_ends, ablation))
            )
        return _rows_times(by_row, blocks, group_ends, ablation).to(dy.dtype), None, None, None, None, None


class _KeptSwiglu(torch.autograd.Function):
    """SwiGLU with the gradient at its input as kept in FP8."""

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
    """The linears of `kernels/fp8_linear.py` under an ablation, with their shapes and dtypes."""

    ablation: Ablation
    power_of_two: bool

    def __post_init__(self) -> None:
        if self.ablation.accumulation == "hopper" and not self.power_of_two:
            raise ValueError("accumulation=hopper needs scales that are powers of two: set power_of_two_scales=true")

    def linear(self, x: Tensor, weight: Tensor, group_ends: Tensor | None = None) -> Tensor:
        """`fp8_linear`, or `grouped_fp8_linear` with group_ends: x is kept in FP8 and regrouped for wgrad."""
        power_of_two, rows = self.power_of_two, x.flatten(0, -2)
        xq = quantize_tiles(rows, power_of_two=power_of_two)
        y = self._apply(rows, weight, group_ends, xq, lambda: requantize_transposed(xq, power_of_two=power_of_two))
        return y.view(*x.shape[:-1], weight.shape[-2])

    def linear_of_kept(self, x: Tensor, weight: Tensor) -> Tensor:
        """`fp8_linear_of_kept`: x is quantised for wgrad from itself."""
        power_of_two, rows = self.power_of_two, x.flatten(0, -2)
        still = rows.detach()
        xq = quantize_tiles(still, power_of_two=power_of_two)
        y = self._apply(rows, weight, None, xq, lambda: quantize_tiles_transposed(still, power_of_two=power_of_two))
        return y.view(*x.shape[:-1], weight.shape[0])

    def swiglu_linear(
        self, gate_up: Tensor, gates: Tensor | None, weight: Tensor, group_ends: Tensor | None = None
    ) -> Tensor:
        """`fp8_swiglu_linear`, or `grouped_fp8_swiglu_linear` with gates and group_ends; gate_up is kept in FP8."""
        rows, dtype, power_of_two = gate_up.flatten(0, -2), gate_up.dtype, self.power_of_two
        kept, hq = swiglu_quantize(rows, gates, power_of_two=power_of_two)
        still = None if gates is None else gates.detach()
        h: Tensor = _KeptSwiglu.apply(rows, gates, kept)  # type: ignore[no-untyped-call]

        def again() -> Quantized:
            return swiglu_quantize_transposed(kept, still, dtype=dtype, power_of_two=power_of_two)

        return self._apply(h, weight, group_ends, hq, again).view(*gate_up.shape[:-1], weight.shape[-2])

    def _apply(self, *arguments: object) -> Tensor:
        y: Tensor = _AblatedLinear.apply(*arguments, self)  # type: ignore[no-untyped-call]
        return y
