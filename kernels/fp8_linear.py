"""The linear layer and its three GEMMs, in FP8 or in the input's precision (arXiv:2412.19437 §3.3.1, figure 6).

    fprop:  y  = x @ W.T          x in 1x128 tiles (one token, 128 channels),    W in 128x128 blocks
    dgrad:  dx = dy @ W           dy in 1x128 tiles (one token, 128 channels),   the same blocks, transposed
    wgrad:  dW = dy.T @ x         dy and x in 128x1 tiles (128 tokens, one channel), FP32 result

The FP8 linears keep x's E4M3 payload and scales for backward, if not said otherwise, and regroup them for wgrad. What a
norm has quantised they do not keep: the norm makes it again (`kernels/rmsnorm.py`). Backward computes dgrad and hands
wgrad to `kernels.deferred`; the weight gradient reaches `weight.main_grad` there, and autograd sees None.

Shapes: x [..., in], weight [out, in]; grouped: x [rows, in] sorted by expert with zeros in padding rows, weight
[groups, out, in], group_ends [groups] int32, exclusive end rows, multiples of 128; results are zero from the last end
on. Inputs and weights are fp32 or bf16; results have the input's dtype unless said otherwise. Wrong shapes are a
ValueError; so are bad group_ends on a CPU, while a GPU kernel reads them unchecked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from kernels import deferred, probe
from kernels.e5m6 import quantize_pack, unpack_e5m6, unpack_quantize_transposed
from kernels.formats import CarriedTiles, GradientTiles, Quantized
from kernels.gather import gather_quantize_both, gather_requantize_transposed, gather_tiles
from kernels.gemm_fp8 import gemm_tile_block, gemm_tile_tile
from kernels.gemm_grouped import group_rows, grouped_gemm_tile_block, grouped_gemm_tile_tile
from kernels.operators import operator
from kernels.permute import Dispatched, sum_rows
from kernels.quantize import (
    dequantize_tiles,
    quantize_blocks,
    quantize_tiles,
    quantize_tiles_both,
    quantize_tiles_transposed,
    requantize_transposed,
)
from kernels.rmsnorm import NormedTiles
from kernels.swiglu import (
    gated_swiglu,
    gated_swiglu_backward_kept,
    swiglu,
    swiglu_backward_kept,
    swiglu_backward_quantize_both,
    swiglu_quantize,
    swiglu_quantize_transposed,
)
from kernels.tiles import rows_of_tiles

# What an FP8 linear reads: numbers, or what a norm has quantised for it.
LinearInput = Tensor | CarriedTiles


def weight_fp8(weight: Tensor, *, power_of_two: bool) -> Quantized:
    """The FP8 copy of a weight, 128x128 blocks, also transposed: made at first use after each in-place update."""
    # `weight.copy_(...)` under `torch.no_grad()` raises the version counter. Writing through `weight.data` does not,
    # and would leave a stale copy: do not. The storage's address, for a fake tensor has no data pointer.
    key = (weight._version, weight.untyped_storage()._cdata, power_of_two)
    cached: tuple[tuple[int, int, bool] | None, Quantized] | None = getattr(weight, "_fp8_copy", None)
    # Without a key the copy is all there is of the weight.
    if cached is None or cached[0] not in (None, key):
        cached = (key, quantize_blocks(weight, power_of_two=power_of_two))
        weight._fp8_copy = cached  # type: ignore[attr-defined]
    return cached[1]


def keep_only_fp8(weight: Tensor, copy: Quantized) -> None:
    """Make `copy` all that there is of a weight, at each of its updates; its own numbers read as NaN from then on."""
    if has_numbers(weight):
        # Expanded, as carriers are: two bytes, and torch refuses to write into it. The version counter stays.
        weight.data = weight.new_full((), torch.nan).expand(weight.shape)
    weight._fp8_copy = (None, copy)  # type: ignore[attr-defined]


def has_numbers(weight: Tensor) -> bool:
    """Whether a weight has values of its own; False after `keep_only_fp8`."""
    return weight.untyped_storage().nbytes() >= weight.numel() * weight.element_size()


def wgrad_reference(dy: Tensor, x: Tensor, out: Tensor, accumulate: bool) -> None:
    """dy.T @ x in FP32, written or added to `out`."""
    # On CUDA the tensor cores take BF16 operands and add in FP32; CPUs have no such GEMM.
    if not (dy.is_cuda and dy.dtype == torch.bfloat16):
        (out.add_ if accumulate else out.copy_)(dy.t().float() @ x.float())
    elif accumulate:
        torch.addmm(out, dy.t(), x, out_dtype=torch.float32, out=out)
    else:
        torch.mm(dy.t(), x, out_dtype=torch.float32, out=out)


def grouped_matmul_reference(x: Tensor, weight: Tensor, group_ends: Tensor) -> Tensor:
    """x[rows of g] @ weight[g], weight [groups, in, out]; rows of no group are zero."""
    out = x.new_zeros(x.shape[0], weight.shape[-1])
    for w, rows in zip(weight, group_rows(group_ends, groups=len(weight), rows=len(x)), strict=True):
        torch.mm(x[rows], w, out=out[rows])
    return out


def grouped_wgrad_reference(dy: Tensor, x: Tensor, group_ends: Tensor) -> Tensor:
    """dy[rows of g].T @ x[rows of g] in FP32: [groups, out, in]."""
    out = dy.new_empty(len(group_ends), dy.shape[1], x.shape[1], dtype=torch.float32)
    for dw, rows in zip(out, group_rows(group_ends, groups=len(group_ends), rows=len(dy)), strict=True):
        wgrad_reference(dy[rows], x[rows], dw, False)
    return out


def _wgrad_flops(dy: Sequence[int], x: Sequence[int], *_: object, out_shape: object) -> int:
    return 2 * dy[0] * dy[1] * x[1]


wgrad = operator(
    "wgrad", wgrad_reference, fake=lambda dy, x, out, accumulate: None, flops=_wgrad_flops, mutates=["out"]
)
_grouped_matmul = operator(
    "grouped_matmul",
    grouped_matmul_reference,
    fake=lambda x, weight, group_ends: x.new_empty(x.shape[0], weight.shape[-1]),
    flops=lambda x, weight, *_, out_shape: 2 * x[0] * x[1] * weight[-1],
    gpu="gemm_portable",
)
_grouped_wgrad = operator(
    "grouped_wgrad",
    grouped_wgrad_reference,
    fake=lambda dy, x, group_ends: dy.new_empty(len(group_ends), dy.shape[1], x.shape[1], dtype=torch.float32),
    flops=_wgrad_flops,
    gpu="gemm_portable",
)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        deferred.keep_weight(ctx, weight)
        return x @ weight.to(x.dtype).t()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (x,), weight = ctx.saved_tensors, deferred.kept_weight(ctx)
        if weight.requires_grad:
            deferred.push(lambda: deferred.accumulate_product(weight, partial(wgrad, dy, x)))
        return dy @ weight.to(dy.dtype), None


@dataclass(frozen=True)
class _KeptInput:
    """What a call keeps of its input, and what makes 128x1 tiles of it for wgrad."""

    tensors: tuple[Tensor, ...]
    by_channel: Callable[..., Quantized]


class _Fp8Linear(torch.autograd.Function):
    """The carrier takes x's gradient and is not read; nor is dy where its reader leaves it in tiles."""

    @staticmethod
    def forward(
        ctx: Any, carrier: Tensor, x: CarriedTiles, weight: Tensor, group_ends: Tensor | None, power_of_two: bool,
        kept: _KeptInput, gradient: GradientTiles[Fp8Gradient] | None,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(group_ends, *kept.tensors)
        ctx.by_channel, ctx.gradient = kept.by_channel, gradient
        y = _fprop(ctx, x.tiles, x.rows, weight, group_ends, power_of_two=power_of_two, dtype=carrier.dtype)
        if gradient is not None:
            gradient.watched = ctx.watch is not None
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        group_ends, *kept = ctx.saved_tensors
        by_channel = partial(ctx.by_channel, *kept)
        if ctx.gradient is None:
            dx = _dgrad_and_push_wgrad(ctx, dy, group_ends, by_channel)
        else:
            assert dy.untyped_storage().nbytes() <= 8, "something else reads the output of this linear"
            dx = _multiply(ctx, ctx.gradient.take(), group_ends, by_channel, dy.dtype)
        return dx, None, None, None, None, None, None


class _Fp8LinearE5M6(torch.autograd.Function):
    """Keeps x in E5M6. Backward gives x back as it was kept, in dy's dtype; dW's operand is made of the same."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, power_of_two: bool, give_back: Callable[[Tensor], object]
    ) -> Tensor:
        tiles, packed = quantize_pack(x, power_of_two=power_of_two)
        ctx.save_for_backward(*packed)
        ctx.give_back = give_back
        rows = partial(x.index_select, 0)
        return _fprop(ctx, tiles, rows, weight, None, power_of_two=power_of_two, dtype=x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        packed, operand = ctx.saved_tensors, []
        if deferred.kept_weight(ctx).requires_grad:
            # Now and not when dW runs: it may wait, and in this form x is smallest.
            x, by_channel = unpack_quantize_transposed(*packed, out_dtype=dy.dtype, power_of_two=ctx.power_of_two)
            operand.append(by_channel)
        else:
            x = unpack_e5m6(*packed, out_dtype=dy.dtype)
        ctx.give_back(x)
        return _dgrad_and_push_wgrad(ctx, dy, None, operand.pop), None, None, None


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, group_ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, group_ends)
        deferred.keep_weight(ctx, weight)
        return _grouped_matmul(x, weight.to(x.dtype).mT, group_ends)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (x, group_ends), weight = ctx.saved_tensors, deferred.kept_weight(ctx)
        if weight.requires_grad:
            deferred.push(lambda: deferred.accumulate_grad(weight, _grouped_wgrad(dy, x, group_ends)))
        return _grouped_matmul(dy, weight.to(dy.dtype), group_ends), None, None


class _Fp8SwigluLinear(torch.autograd.Function):
    """Keeps SwiGLU's input in FP8 only; its output is computed again for dx and for dW. Dense: no gates, no ends."""

    @staticmethod
    def forward(
        ctx: Any, gate_up: Tensor, gates: Tensor | None, weight: Tensor, group_ends: Tensor | None, power_of_two: bool,
        gradient: GradientTiles[Fp8Gradient] | None,
    ) -> Tensor:  # fmt: skip
        kept, hq = swiglu_quantize(gate_up, gates, power_of_two=power_of_two)
        ctx.save_for_backward(kept.payload, kept.scale, gates, group_ends)
        ctx.gradient = gradient

        # Only for a probe: the activation itself is never made.
        def activation(rows: Tensor) -> Tensor:
            taken = gate_up.index_select(0, rows)
            return swiglu(taken) if gates is None else gated_swiglu(taken, gates.index_select(0, rows))

        return _fprop(ctx, hq, activation, weight, group_ends, power_of_two=power_of_two, dtype=gate_up.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        payload, scale, gates, group_ends = ctx.saved_tensors
        power_of_two: bool = ctx.power_of_two
        kept = Quantized(payload, scale)
        # Not dy.dtype below: the waiting closure would keep all of dy alive.
        dtype = dy.dtype

        def activation() -> Quantized:
            return swiglu_quantize_transposed(kept, gates, dtype=dtype, power_of_two=power_of_two)  # [inter, rows]

        dh = _dgrad_and_push_wgrad(ctx, dy, group_ends, activation)
        if ctx.gradient is not None:
            by_row, by_channel, nan = swiglu_backward_quantize_both(kept, None, dh, power_of_two=power_of_two)
            rows = partial(_differentiated_rows, kept, None, dh) if ctx.gradient.watched else _unwatched
            ctx.gradient.put(Fp8Gradient(by_row, by_channel, rows))
            # The upper half of an FP32 NaN is a BF16 NaN.
            return nan.view(dtype)[-1:].expand(payload.shape), None, None, None, None, None
        if gates is None:
            return swiglu_backward_kept(kept, dh), None, None, None, None, None
        return *gated_swiglu_backward_kept(kept, gates, dh), None, None, None, None


class _Fp8Experts(torch.autograd.Function):
    """The routed experts from tokens in tiles to the sum of each token's rows; a token's copies exist in FP8 only.

    Keeps the tokens' tiles and SwiGLU's input in FP8. Carriers are not read: the tokens', nor, where the dispatcher
    leaves the gradient of the sums in tiles, that gradient's.
    """

    @staticmethod
    def forward(
        ctx: Any, carrier: Tensor, gates: Tensor, gate_up_weight: Tensor, down_weight: Tensor, x: CarriedTiles,
        dispatched: Dispatched, power_of_two: bool,
    ) -> Tensor:  # fmt: skip
        tokens, grouping = x.tiles, dispatched.grouping
        slots, ends, topk = grouping.slot_of_row, grouping.group_ends, grouping.topk
        ctx.gate_up, ctx.down, ctx.gradient = SimpleNamespace(), SimpleNamespace(), dispatched.gradient
        ctx.topk, ctx.partial, ctx.power_of_two = topk, grouping.partial, power_of_two
        options: Any = {"power_of_two": power_of_two, "dtype": carrier.dtype}
        rows = gather_tiles(tokens, slots, topk)
        by_slot = partial(_rows_by_slot, x.rows, slots, topk)
        gate_up = _fprop(ctx.gate_up, rows, by_slot, gate_up_weight, ends, **options)
        # Each is deleted after its last use: they are larger than all that the experts keep.
        del rows
        kept, hq = swiglu_quantize(gate_up, gates, power_of_two=power_of_two)
        by_row = partial(_activated_rows, gate_up, gates)
        y = _fprop(ctx.down, hq, by_row, down_weight, ends, **options)
        del gate_up, hq, by_row
        ctx.save_for_backward(
            tokens.payload, tokens.scale, kept.payload, kept.scale, gates, slots, grouping.rows_of_token, ends
        )
        return sum_rows(y, grouping.rows_of_token, partial=grouping.partial, out_dtype=y.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        payload, scale, kept_payload, kept_scale, gates, slots, rows_of_token, ends = ctx.saved_tensors
        tokens, kept, topk = Quantized(payload, scale), Quantized(kept_payload, kept_scale), ctx.topk
        power_of_two: bool = ctx.power_of_two
        # Not dy.dtype in the closures: a waiting one would keep all of dy alive.
        dtype = dy.dtype

        def activation() -> Quantized:
            return swiglu_quantize_transposed(kept, gates, dtype=dtype, power_of_two=power_of_two)  # [inter, rows]

        gradient = _gather_gradient(dy, ctx.gradient, slots, topk, power_of_two=power_of_two)
        dh = _multiply(ctx.down, gradient, ends, activation, dtype)
        del gradient
        by_row, by_channel, d_gates = swiglu_backward_quantize_both(kept, gates, dh, power_of_two=power_of_two)

        def rows() -> Quantized:
            return gather_requantize_transposed(tokens, slots, topk, power_of_two=power_of_two)  # [hidden, rows]

        watched = _unwatched if ctx.gate_up.watch is None else partial(_differentiated_rows, kept, gates, dh)
        gradient = Fp8Gradient(by_row, by_channel, watched)
        del dh, by_row, by_channel, watched
        d_rows = _multiply(ctx.gate_up, gradient, ends, rows, dtype)
        del gradient
        d_tokens = sum_rows(d_rows, rows_of_token, partial=ctx.partial, out_dtype=dtype)
        return d_tokens, d_gates, None, None, None, None, None


def _gather_gradient(
    dy: Tensor, arrived: GradientTiles[Quantized] | None, slots: Tensor, topk: int, *, power_of_two: bool
) -> Fp8Gradient:
    """The gradient of each row: of dy [tokens, hidden], or of what has arrived in its place."""
    if arrived is None:
        both = gather_quantize_both(dy, slots, topk, power_of_two=power_of_two)
        return Fp8Gradient(*both, partial(_rows_by_slot, partial(dy.index_select, 0), slots, topk))
    tiles = arrived.take()
    by_channel = gather_requantize_transposed(tiles, slots, topk, power_of_two=power_of_two)
    by_slot = partial(_rows_by_slot, partial(dequantized_rows, tiles, dy.dtype), slots, topk)
    return Fp8Gradient(gather_tiles(tiles, slots, topk), by_channel, by_slot)


def _rows_by_slot(rows_of_tokens: probe.Rows, slot_of_row: Tensor, topk: int, rows: Tensor) -> Tensor:
    """Some gathered rows before quantisation, zeros in padding rows: for a probe."""
    slots = slot_of_row.index_select(0, rows)
    found = rows_of_tokens(slots.clamp_min(0).div(topk, rounding_mode="floor"))
    return found.masked_fill((slots < 0)[:, None], 0.0)


def _activated_rows(gate_up: Tensor, gates: Tensor, rows: Tensor) -> Tensor:
    """Some rows of the activation before quantisation: for a probe."""
    return gated_swiglu(gate_up.index_select(0, rows), gates.index_select(0, rows))


def _differentiated_rows(kept: Quantized, gates: Tensor | None, dh: Tensor, rows: Tensor) -> Tensor:
    """Some rows of the gradient of SwiGLU's input before quantisation: for a probe."""
    taken, of_output = rows_of_tiles(kept, rows), dh.index_select(0, rows)
    if gates is None:
        return swiglu_backward_kept(taken, of_output)
    return gated_swiglu_backward_kept(taken, gates.index_select(0, rows), of_output)[0]


def _unwatched(rows: Tensor) -> Tensor:
    raise AssertionError("no probe looks at this call")


def dequantized_rows(tiles: Quantized, dtype: torch.dtype, rows: Tensor) -> Tensor:
    """Some rows of a tensor that came in tiles, as numbers: for a probe."""
    return dequantize_tiles(rows_of_tiles(tiles, rows), out_dtype=dtype)


def _fprop(
    ctx: Any, xq: Quantized, rows_of_x: probe.Rows, weight: Tensor, group_ends: Tensor | None, *, power_of_two: bool,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """x @ W.T, of each group its own W; leaves on ctx what backward needs besides x. A probe asks for rows of x."""
    w = weight_fp8(weight, power_of_two=power_of_two)
    # A rank whose experts got no token has no row to show.
    watch = probe.watch(weight) if len(xq.payload) else None
    ctx.power_of_two, ctx.watch, ctx.x_sample = power_of_two, watch, None
    deferred.keep_weight(ctx, weight)
    if watch is not None:
        ctx.x_sample = probe.sample(rows_of_x, xq.payload, group_ends, num_blocks=watch.num_blocks)
        watch.rows("x.fprop", ctx.x_sample, xq)
        watch.weight("w.fprop", weight, w)
    return _rows_times(xq, w, group_ends, dtype)


def _rows_times(rows: Quantized, weight: Quantized, group_ends: Tensor | None, dtype: torch.dtype) -> Tensor:
    if group_ends is None:
        return gemm_tile_block(rows, weight, out_dtype=dtype)
    return grouped_gemm_tile_block(rows, weight, group_ends, out_dtype=dtype)


def _dgrad_and_push_wgrad(
    ctx: Any, dy: Tensor, group_ends: Tensor | None, input_by_channel: Callable[[], Quantized]
) -> Tensor:
    """Return dy @ W, of each group its own W; hand over dy.T @ x. x is regrouped only when wgrad runs."""
    rows = partial(dy.index_select, 0)
    if deferred.kept_weight(ctx).requires_grad:
        gradient = Fp8Gradient(*quantize_tiles_both(dy, power_of_two=ctx.power_of_two), rows)
    else:
        gradient = Fp8Gradient(quantize_tiles(dy, power_of_two=ctx.power_of_two), None, rows)
    return _multiply(ctx, gradient, group_ends, input_by_channel, dy.dtype)


def _multiply(
    call: Any,
    gradient: Fp8Gradient,
    group_ends: Tensor | None,
    input_by_channel: Callable[[], Quantized],
    dtype: torch.dtype,
) -> Tensor:
    weight, dyq, dyq_t = deferred.kept_weight(call), gradient.by_row, gradient.by_channel
    watch: probe.Watch | None = call.watch
    x_sample: probe.Sample | None = call.x_sample
    w = weight_fp8(weight, power_of_two=call.power_of_two).transposed_blocks()
    if watch is not None:
        sample = probe.sample(gradient.rows, dyq.payload, group_ends, num_blocks=watch.num_blocks)
        watch.rows("dy.dgrad", sample, dyq)
        if dyq_t is not None:
            watch.columns("dy.wgrad", sample, dyq_t)
        watch.weight("w.dgrad", weight, w)

    def product(out: Tensor, accumulate: bool) -> None:
        xq_t = input_by_channel()
        if watch is not None and x_sample is not None:
            watch.columns("x.wgrad", x_sample, xq_t)
        assert dyq_t is not None
        if group_ends is None:
            gemm_tile_tile(dyq_t, xq_t, out=out, accumulate=accumulate)
        else:
            grouped_gemm_tile_tile(dyq_t, xq_t, group_ends, out=out, accumulate=accumulate)

    if dyq_t is not None and weight.requires_grad:
        deferred.push(lambda: deferred.accumulate_product(weight, product))
    return _rows_times(dyq, w, group_ends, dtype)


@dataclass(frozen=True)
class Fp8Gradient:
    """The gradient of an FP8 linear's output, quantised for dgrad and, where the weight has a gradient, for wgrad."""

    by_row: Quantized  # 1x128 tiles
    by_channel: Quantized | None  # 128x1 tiles
    rows: probe.Rows  # before quantisation, for a probe


class Fp8Call:
    """One call of an FP8 linear inside a larger autograd Function: what its backward needs besides the input's tiles.

    In forward the linear is called with `reads(x)`; backward hands over a gradient that is quantised already.
    """

    weight: Tensor
    power_of_two: bool

    def reads(self, x: CarriedTiles) -> CarriedTiles:
        """x for the linear, which then leaves here what backward needs."""
        return _PartTiles(x.carrier, x.tiles, x.rows, self)

    def backward(self, gradient: Fp8Gradient, input_by_channel: Callable[[], Quantized], dtype: torch.dtype) -> Tensor:
        """Return dy @ W [rows, in]; hand dy.T @ x over to `kernels.deferred`."""
        return _multiply(self, gradient, None, input_by_channel, dtype)


@dataclass(frozen=True)
class _PartTiles(CarriedTiles):
    call: Fp8Call


def carried(x: Tensor, *, power_of_two: bool) -> CarriedTiles:
    """x [..., cols] quantised for one reader; x itself carries the gradient and is not read."""
    rows = x.detach().flatten(0, -2)
    return CarriedTiles(x, quantize_tiles(rows, power_of_two=power_of_two), partial(rows.index_select, 0))


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T in x's dtype, with a deferred FP32 wgrad."""
    _check_features(x, weight, grouped=False)
    y: Tensor = _Linear.apply(x.flatten(0, -2), weight)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], weight.shape[0])


def fp8_linear(
    x: LinearInput, weight: Tensor, *, power_of_two: bool, gradient: GradientTiles[Fp8Gradient] | None = None
) -> Tensor:
    """x @ weight.T with all three GEMMs in FP8; of tiles, bit-equal, where the operation before has quantised.

    With `gradient` its only reader is an `fp8_swiglu_linear`, which leaves the gradient there.
    """
    return _fp8_linear(x, weight, None, power_of_two=power_of_two, x_is_kept=False, gradient=gradient)


def fp8_linear_of_kept(x: Tensor, weight: Tensor, *, power_of_two: bool) -> Tensor:
    """`fp8_linear`, bit-equal, of an input that another operation keeps for its own backward: no FP8 copy is kept.

    The output of attention is one. x must not be changed before backward.
    """
    return _fp8_linear(x, weight, None, power_of_two=power_of_two, x_is_kept=True)


def fp8_linear_e5m6(x: Tensor, weight: Tensor, *, power_of_two: bool, give_back: Callable[[Tensor], object]) -> Tensor:
    """`fp8_linear` of an input that is kept once, in 12 bits, also for the operation that made it (§3.3.3).

    The output of attention is one. The product is bit-equal; dW sees x rounded to E5M6 and then to E4M3.

    Args:
        give_back: called in backward, before dx is there, with x [rows, in] as it was kept.
    Raises:
        ValueError: an odd number of columns.
    """
    _check_features(x, weight, grouped=False)
    y: Tensor = _Fp8LinearE5M6.apply(x.flatten(0, -2), weight, power_of_two, give_back)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], weight.shape[0])


def _fp8_linear(
    x: LinearInput, weight: Tensor, group_ends: Tensor | None, *, power_of_two: bool, x_is_kept: bool,
    gradient: GradientTiles[Fp8Gradient] | None = None,
) -> Tensor:  # fmt: skip
    _check_features(x, weight, grouped=group_ends is not None)
    x = carried(x, power_of_two=power_of_two) if isinstance(x, Tensor) else x
    carrier = x.carrier.flatten(0, -2)
    if isinstance(x, _PartTiles):
        y: Tensor = _fprop(x.call, x.tiles, x.rows, weight, group_ends, power_of_two=power_of_two, dtype=carrier.dtype)
    else:
        if x_is_kept:
            # dW sees x rounded once.
            again: Callable[..., Quantized] = partial(quantize_tiles_transposed, power_of_two=power_of_two)
            kept = _KeptInput((carrier.detach(),), again)
        elif isinstance(x, NormedTiles):
            kept = _KeptInput(x.norm.tensors, x.norm.again.tiles)
            if weight.requires_grad:
                x.norm.again.reads_tiles()
        else:
            kept = _KeptInput((x.tiles.payload, x.tiles.scale), partial(_regrouped, power_of_two=power_of_two))
        y = _Fp8Linear.apply(carrier, x, weight, group_ends, power_of_two, kept, gradient)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], weight.shape[-2])


def _regrouped(payload: Tensor, scale: Tensor, *, power_of_two: bool) -> Quantized:
    return requantize_transposed(Quantized(payload, scale), power_of_two=power_of_two)


def grouped_linear(x: Tensor, weight: Tensor, group_ends: Tensor) -> Tensor:
    """x[rows of g] @ weight[g].T for every expert g in x's dtype, with a deferred FP32 wgrad."""
    _check_features(x, weight, grouped=True)
    return _GroupedLinear.apply(x, weight, group_ends)  # type: ignore[no-any-return, no-untyped-call]


def grouped_fp8_linear(x: Tensor, weight: Tensor, group_ends: Tensor, *, power_of_two: bool) -> Tensor:
    """x[rows of g] @ weight[g].T for every expert g with all three GEMMs in FP8."""
    return _fp8_linear(x, weight, group_ends, power_of_two=power_of_two, x_is_kept=False)


def fp8_swiglu_linear(
    gate_up: Tensor, weight: Tensor, *, power_of_two: bool, gradient: GradientTiles[Fp8Gradient] | None = None
) -> Tensor:
    """fp8_linear(swiglu(gate_up), weight), keeping only gate_up, [..., 2 * inter] gate first, in FP8 (§3.3.3).

    The same bits as the two calls; gradients see gate_up rounded to E4M3. With `gradient` that of gate_up is left
    there, quantised both ways, for the `fp8_linear` that made gate_up; autograd gets a NaN.
    """
    _check_features(gate_up[..., : gate_up.shape[-1] // 2], weight, grouped=False)
    y: Tensor = _Fp8SwigluLinear.apply(gate_up.flatten(0, -2), None, weight, None, power_of_two, gradient)  # type: ignore[no-untyped-call]
    return y.view(*gate_up.shape[:-1], weight.shape[0])


def grouped_fp8_swiglu_linear(
    gate_up: Tensor, gates: Tensor, weight: Tensor, group_ends: Tensor, *, power_of_two: bool
) -> Tensor:
    """`fp8_swiglu_linear` of `gated_swiglu(gate_up, gates)` for every expert; gates [rows] fp32 are kept too."""
    _check_features(gate_up[..., : gate_up.shape[-1] // 2], weight, grouped=True)
    return _Fp8SwigluLinear.apply(gate_up, gates, weight, group_ends, power_of_two, None)  # type: ignore[no-any-return, no-untyped-call]


def fp8_experts(dispatched: Dispatched, gate_up_weight: Tensor, down_weight: Tensor, *, power_of_two: bool) -> Tensor:
    """Each token's sum of gate * W_down swiglu(W_gate_up token) over its experts here, [tokens, hidden].

    Bit for bit `group_tokens`, `grouped_fp8_linear`, `grouped_fp8_swiglu_linear` and `combine_tokens`.
    """
    tokens = dispatched.tokens
    _check_features(tokens, gate_up_weight, grouped=True)
    tokens = carried(tokens, power_of_two=power_of_two) if isinstance(tokens, Tensor) else tokens
    return _Fp8Experts.apply(  # type: ignore[no-any-return, no-untyped-call]
        tokens.carrier, dispatched.gates, gate_up_weight, down_weight, tokens, dispatched, power_of_two
    )


def _check_features(x: LinearInput, weight: Tensor, *, grouped: bool) -> None:
    fits = (x.dim() == 2 and weight.dim() == 3) if grouped else (x.dim() >= 2 and weight.dim() == 2)
    if not fits or x.shape[-1] != weight.shape[-1]:
        expected = "[rows, in] and [groups, out, in]" if grouped else "[..., in] and [out, in]"
        raise ValueError(f"x and weight must be {expected}, got {list(x.shape)} and {list(weight.shape)}")
