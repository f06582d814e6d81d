"""RMSNorm of a residual stream: add, divide by the root mean square, times a learned gain (arXiv:1910.07467 eq. 4).

arXiv:2412.19437 §2.1 (before attention and FFN, on the latents c_Q and c_KV, and in MTP eq. 21), §3.2.3 (only the sum
and one root a row are kept) and §3.3.2 (tiles). One call computes

    sum = x + delta    rstd = 1 / sqrt(mean(sum^2) + eps)    y = weight * round(sum * rstd)    tiles = y in 1x128 tiles

in the rounding order of transformers 5.23 `DeepseekV3RMSNorm`. y itself is written only for readers of plain numbers.
Every reader has an output of its own, so that their gradients arrive apart and are added in the backward kernel.

Of y nothing is kept: in backward one launch makes again, from sum and rstd, the tiles of forward regrouped as 128x1 for
wgrad, to the same bits, and y itself for a reader that multiplies in plain numbers (§3.2.3; `NormAgain`).

Shapes: x, delta, y [..., dim], in operators [rows, dim]; weight [dim]; dim may not be sharded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from kernels.deferred import accumulate_product, keep_weight, kept_weight
from kernels.formats import CarriedTiles, Quantized
from kernels.operators import operator
from kernels.quantize import quantize_tiles_reference, requantize_transposed_reference
from kernels.tiles import empty_tiles

# Gradients that the backward kernel adds.
MAX_READERS = 3


def _wide(dtype: torch.dtype) -> torch.dtype:
    """FP32, or FP64 for FP64: what arithmetic and rstd are in."""
    return torch.promote_types(dtype, torch.float32)


def rmsnorm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm in plain torch, differentiable by autograd. Same arguments as `rmsnorm`."""
    wide = x.to(_wide(x.dtype))
    norm = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (weight * norm.to(x.dtype)).to(x.dtype)


def normed_rows(x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """y of rows of the sum, [rows, dim], and their rstd [rows]."""
    return (weight * (x.to(rstd.dtype) * rstd[:, None]).to(x.dtype)).to(x.dtype)


def add_norm_quantize_reference(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, power_of_two: bool, quantized: bool, plain: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One operation after the other.

    Args:
        x: [rows, dim]; its rows may lie apart.
        delta: [rows, dim] or None.
        quantized, plain: whether tiles, and y, are wanted.
    Returns:
        sum, y, payload, scale, rstd [rows], and one NaN [1] in rstd's dtype, of which carriers are made. What is not
        asked for, and the sum without delta, has no elements.
    """
    total = x if delta is None else x + delta
    wide = total.to(_wide(x.dtype))
    rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    y = normed_rows(total, weight, rstd)
    payload, scale = quantize_tiles_reference(y, power_of_two) if quantized else empty_tiles(x, 0, 0)
    total = x.new_empty(0, 0) if delta is None else total
    return total, y if plain else x.new_empty(0, 0), payload, scale, rstd, rstd.new_full((1,), float("nan"))


def norm_again_reference(
    total: Tensor, weight: Tensor, rstd: Tensor, power_of_two: bool, quantized: bool, plain: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What `add_norm_quantize` has made, again.

    Args:
        total: [rows, dim], the sum; its rows may lie apart.
        rstd: [rows], of forward.
        quantized, plain: whether tiles, and y, are wanted.
    Returns:
        Payload [dim, rows] and scale [ceil(rows/128), dim] of the tiles of forward, regrouped as 128x1; y [rows, dim].
        What is not asked for has no elements.
    """
    y = normed_rows(total, weight, rstd)
    if quantized:
        tiles = requantize_transposed_reference(*quantize_tiles_reference(y, power_of_two), power_of_two)
    else:
        tiles = empty_tiles(total, 0, 0)
    return *tiles, y if plain else total.new_empty(0, 0)


def norm_backward_reference(
    dy: Tensor, dy1: Tensor | None, dy2: Tensor | None, d_sum: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor,
    out: Tensor,
) -> Tensor:  # fmt: skip
    """The gradient of sum, and with it of x and delta, into `out`; returns parts of the weight's, [parts, dim].

    Args:
        dy, dy1, dy2: [rows, dim], of each reader of y; added in this order, each sum rounded.
        d_sum: [rows, dim], of the sum where others read it; added last.
        x: [rows, dim], the sum of forward; its rows may lie apart.
        rstd: [rows], of forward.
        out: [rows, dim], its rows may lie apart.
    """
    for each in (dy1, dy2):
        dy = dy if each is None else dy + each
    wide_weight, grad_y, root = weight.to(rstd.dtype), dy.to(rstd.dtype), rstd[:, None]
    norm = x.to(rstd.dtype) * root  # [rows, dim]
    products = grad_y * norm
    parts = products.sum(0, keepdim=True)  # [1, dim]; as many as a GPU has programs
    projection = (products @ wide_weight / weight.numel())[:, None]  # [rows, 1]
    grad = (torch.addcmul(grad_y * wide_weight, norm, projection, value=-1) * root).to(x.dtype)
    out.copy_(grad if d_sum is None else grad + d_sum)
    return parts


def norm_gain_gradient_reference(parts: Tensor, out: Tensor, dtype: torch.dtype, accumulate: bool) -> None:
    """The sum of parts [parts, dim], rounded to `dtype`, into `out` [dim] of any dtype, or added to it."""
    (out.add_ if accumulate else out.copy_)(parts.sum(0).to(dtype))


def _allocate(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, power_of_two: bool, quantized: bool, plain: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, dim = x.shape
    total = x.new_empty(rows, dim) if delta is not None else x.new_empty(0, 0)
    y = x.new_empty(rows, dim) if plain else x.new_empty(0, 0)
    tiles = empty_tiles(x, rows, dim) if quantized else empty_tiles(x, 0, 0)
    rstd = x.new_empty(rows, dtype=_wide(x.dtype))
    return total, y, *tiles, rstd, rstd.new_empty(1)


def _allocate_again(
    total: Tensor, weight: Tensor, rstd: Tensor, power_of_two: bool, quantized: bool, plain: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows, dim = total.shape
    tiles = empty_tiles(total, dim, rows) if quantized else empty_tiles(total, 0, 0)
    return *tiles, total.new_empty(rows, dim) if plain else total.new_empty(0, 0)


add_norm_quantize = operator("add_norm_quantize", add_norm_quantize_reference, fake=_allocate, gpu="rmsnorm")
norm_again = operator("norm_again", norm_again_reference, fake=_allocate_again, gpu="rmsnorm")
norm_backward = operator(
    "norm_backward",
    norm_backward_reference,
    fake=lambda dy, dy1, dy2, d_sum, x, weight, rstd, out: rstd.new_empty(1, len(weight)),
    gpu="rmsnorm",
    mutates=("out",),
)
norm_gain_gradient = operator(
    "norm_gain_gradient", norm_gain_gradient_reference, fake=lambda *_: None, gpu="rmsnorm", mutates=("out",)
)


def differentiate(
    dys: Sequence[Tensor], d_sum: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, out: Tensor
) -> Tensor | None:
    """`norm_backward` of one to three gradients `dys`, and the weight's straight into its `main_grad`.

    Args:
        weight: [dim], the parameter itself.
    Returns:
        The weight's gradient, for autograd, where there is no `main_grad`.
    """
    dy, dy1, dy2 = (*dys, None, None)[:MAX_READERS]
    assert dy is not None
    parts = norm_backward(dy, dy1, dy2, d_sum, x, weight.detach(), rstd, out)
    if weight.requires_grad and getattr(weight, "main_grad", None) is not None:
        accumulate_product(weight, lambda into, accumulate: norm_gain_gradient(parts, into, weight.dtype, accumulate))
        return None
    d_weight = torch.empty_like(weight, requires_grad=False)
    norm_gain_gradient(parts, d_weight, weight.dtype, False)
    return d_weight


class NormAgain:
    """Makes a norm's output again in backward, in one launch for all of its readers that ask for it.

    A reader announces itself in forward. In backward the first one that asks has made what all of them need; the last
    reader of each kind takes it away. Readers keep `KeptNorm.tensors` themselves, so that autograd lets go of them.
    """

    def __init__(self, weight: Tensor, power_of_two: bool) -> None:
        keep_weight(self, weight)
        self._power_of_two = power_of_two
        self._readers, self._left = Counter[str](), Counter[str]()
        self._made: dict[str, Any] = {}

    def reads_tiles(self) -> None:
        """In forward: there is one more reader of `tiles`."""
        self._readers["tiles"] += 1

    def reads_numbers(self) -> None:
        """In forward: there is one more reader of `numbers`."""
        self._readers["numbers"] += 1

    def tiles(self, total: Tensor, rstd: Tensor) -> Quantized:
        """The tiles of forward regrouped as 128x1, payload [dim, rows]: for wgrad."""
        found: Quantized = self._take("tiles", total, rstd)
        return found

    def numbers(self, total: Tensor, rstd: Tensor) -> Tensor:
        """y, [rows, dim]."""
        found: Tensor = self._take("numbers", total, rstd)
        return found

    def _take(self, kind: Literal["tiles", "numbers"], total: Tensor, rstd: Tensor) -> Any:
        assert self._readers[kind], f"no reader of {kind} was announced in forward"
        if not self._left[kind]:
            self._left = self._readers.copy()
            quantized, plain = self._readers["tiles"] > 0, self._readers["numbers"] > 0
            flat, weight = total.flatten(0, -2), kept_weight(self).detach()
            payload, scale, y = norm_again(flat, weight, rstd, self._power_of_two, quantized, plain)
            self._made = {"tiles": Quantized(payload, scale), "numbers": y}
        self._left[kind] -= 1
        return self._made[kind] if self._left[kind] else self._made.pop(kind)


@dataclass(frozen=True)
class KeptNorm:
    """What a norm keeps for backward, and makes its output of again."""

    total: Tensor  # [..., dim]
    rstd: Tensor  # [rows]
    again: NormAgain

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """For a reader to keep and hand to `again`."""
        return self.total, self.rstd

    def rows(self, rows: Tensor) -> Tensor:
        """Some rows of y, which may never have been written: for a probe."""
        total = self.total.flatten(0, -2).index_select(0, rows)
        return normed_rows(total, kept_weight(self.again).detach(), self.rstd.index_select(0, rows))


@dataclass(frozen=True)
class NormedTiles(CarriedTiles):
    """What a norm has quantised for one reader, which need not keep it."""

    norm: KeptNorm


class _AddNorm(torch.autograd.Function):
    """sum, payload, scale, rstd; then y for each plain reader and a carrier for each reader of tiles."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, plain: int, tiles: int,
        power_of_two: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        flat = None if delta is None else delta.flatten(0, -2)
        total, y, payload, scale, rstd, nan = add_norm_quantize(
            x.flatten(0, -2), flat, weight, eps, power_of_two, tiles > 0, plain > 0
        )
        total = x if delta is None else total.view(x.shape)
        ctx.save_for_backward(total, rstd)
        keep_weight(ctx, weight)
        ctx.has_delta = delta is not None
        ctx.mark_non_differentiable(payload, scale, rstd)
        ctx.set_materialize_grads(False)
        # The upper half of an FP32 NaN is a BF16 NaN.
        carrier = nan.view(x.dtype)[-1:]
        # Views of one tensor, each an output of its own.
        readers = (*(y.view(x.shape) for _ in range(plain)), *(carrier.expand(x.shape) for _ in range(tiles)))
        return total, payload, scale, rstd, *readers

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (total, rstd), weight = ctx.saved_tensors, kept_weight(ctx)
        d_sum = grads[0]
        # Autograd's own order: the reader that ran last in forward comes first; (a + b) + c is not a + (b + c) in BF16.
        dys = [each.flatten(0, -2) for each in reversed(grads[4:]) if each is not None]
        if not dys:
            return d_sum, d_sum if ctx.has_delta else None, None, None, None, None, None
        x = total.flatten(0, -2)
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        d_weight = differentiate(dys, None if d_sum is None else d_sum.flatten(0, -2), x, weight, rstd, dx)
        # Of both summands, the same tensor: autograd adds in place only to what it alone holds.
        dx = dx.view(total.shape)
        return dx, dx if ctx.has_delta else None, d_weight, None, None, None, None


def add_rmsnorm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, *, plain: int = 0, tiles: int = 0,
    power_of_two: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[NormedTiles, ...]]:  # fmt: skip
    """RMSNorm of x + delta, for up to three readers, named in the order in which they run: plain ones first.

    Args:
        x, delta: [..., dim]; without delta the sum is x.
        plain: readers of y, [..., dim] in x's dtype.
        tiles: readers of y in 1x128 tiles.
        power_of_two: of the tiles' scales.
    Returns:
        x + delta, rounded to x's dtype; y for each plain reader; tiles for each other one.
    """
    assert x.shape[-1:] == weight.shape, (x.shape, weight.shape)
    assert delta is None or delta.shape == x.shape, (x.shape, delta)
    assert 1 <= plain + tiles <= MAX_READERS, (plain, tiles)
    total, payload, scale, rstd, *readers = _AddNorm.apply(x, delta, weight, eps, plain, tiles, power_of_two)  # type: ignore[no-untyped-call]
    norm = KeptNorm(total.detach(), rstd, NormAgain(weight, power_of_two))
    carried = (NormedTiles(carrier, Quantized(payload, scale), norm.rows, norm) for carrier in readers[plain:])
    return total, tuple(readers[:plain]), tuple(carried)


def norm_for_linear(x: Tensor, weight: Tensor, eps: float, *, power_of_two: bool) -> NormedTiles:
    """RMSNorm of x [rows, dim] in tiles for one reader, for a Function: not differentiable."""
    _, _, payload, scale, rstd, nan = add_norm_quantize(x, None, weight, eps, power_of_two, True, False)
    norm = KeptNorm(x, rstd, NormAgain(weight, power_of_two))
    return NormedTiles(nan.view(x.dtype)[-1:].expand(x.shape), Quantized(payload, scale), norm.rows, norm)


def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise x [..., dim] by its root mean square, computed in fp32 (fp64 stays fp64), times weight [dim]."""
    _, (y,), _ = add_rmsnorm(x, None, weight, eps, plain=1)
    return y
