"""The routed experts of a rank with more rows than there is memory for: the same bits as `fp8_experts`, in parts.

No token is dropped, so nothing bounds how many a router sends to one rank (arXiv:2412.19437 §2.1.2). Here a row, which
is a token at one expert, costs little: from forward to backward only its slot and gate are kept, and what is as wide as
`hidden` exists for a part of the rows, or of the channels, at a time.

    forward    by chunk of rows       gather -> gate_up -> SwiGLU -> h, FP8               all of h [rows, inter] is held
               by slice of channels   h @ W_down -> sum of each token's rows
    backward   by chunk of rows       gate_up again, dh, d_gate_up in FP8 both ways       [rows, 2 inter] twice, h.T
               by slice of channels   d_gate_up @ W_gate_up -> sum of each token's rows
    wgrad      by slice of channels   the operand as wide as `hidden` is gathered out of the tokens' tiles

Chunks are whole tiles of 128 rows, slices whole tiles of 128 channels, so a part has the tiles of the whole. No sum is
cut: not a product's, nor a token's over its rows, nor a weight gradient's over rows. So one expert may have any number
of them. The price: gate and up are multiplied twice. Probes of FP8 health see none of it.

Shapes: tokens [tokens, hidden] in tiles; rows as in `kernels.permute`; weights [groups, out, in].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from kernels import deferred
from kernels.formats import TILE, CarriedTiles, GradientTiles, Quantized
from kernels.fp8_linear import weight_fp8
from kernels.gather import gather_quantize_both, gather_requantize_transposed, gather_tiles
from kernels.gemm_grouped import grouped_gemm_tile_block, grouped_gemm_tile_tile
from kernels.permute import Dispatched, sum_rows
from kernels.quantize import quantize_tiles
from kernels.swiglu import swiglu_backward_quantize_both, swiglu_quantize, swiglu_quantize_transposed
from kernels.tiles import empty_tiles


@dataclass(frozen=True)
class _Parts:
    """The rows of one call, and how they and the tokens' channels are cut."""

    slot_of_row: Tensor
    group_ends: Tensor
    rows_of_token: Tensor
    topk: int
    partial: bool
    max_rows: int
    power_of_two: bool

    @property
    def num_rows(self) -> int:
        return len(self.slot_of_row)

    def chunks(self) -> Iterator[slice]:
        """Rows, at most `max_rows` at a time."""
        step = self.max_rows // TILE * TILE
        for start in range(0, self.num_rows, step):
            yield slice(start, min(start + step, self.num_rows))

    def slices(self, hidden: int) -> Iterator[slice]:
        """Channels: all rows of a slice, or its FP32 weight gradient, are no larger than a chunk; 128 at least."""
        step = min(hidden * self.max_rows // self.num_rows, self.max_rows // (2 * len(self.group_ends)))
        step = max(step // TILE, 1) * TILE
        for start in range(0, hidden, step):
            yield slice(start, min(start + step, hidden))

    def times(self, rows: Quantized, weight: Quantized, dtype: torch.dtype, chunk: slice | None = None) -> Tensor:
        """Rows, those of a chunk or all, times each expert's weight."""
        ends = self.group_ends
        if chunk is not None:
            ends = (ends - chunk.start).clamp(0, chunk.stop - chunk.start)
        return grouped_gemm_tile_block(rows, weight, ends, out_dtype=dtype)

    def gathered(self, tokens: Quantized, chunk: slice) -> Quantized:
        """The tokens of a chunk's rows."""
        return gather_tiles(tokens, self.slot_of_row[chunk], self.topk)

    def sums(self, rows: Quantized, weight: Quantized, dtype: torch.dtype) -> Tensor:
        """Each token's sum of its rows times its experts' weights [groups, hidden, in]: [tokens, hidden]."""
        tokens, hidden = len(self.rows_of_token), weight.payload.shape[1]
        total = rows.payload.new_empty(tokens, hidden, dtype=dtype)
        for part in self.slices(hidden):
            y = self.times(rows, Quantized(weight.payload[:, part], weight.scale[:, _tiles(part)]), dtype)
            total[:, part] = sum_rows(y, self.rows_of_token, partial=self.partial, out_dtype=dtype)
            del y
        return total


class _Fp8ExpertsInChunks(torch.autograd.Function):
    """As `_Fp8Experts`, without probes; keeps of its input the tokens' tiles, and nothing that was computed."""

    @staticmethod
    def forward(
        ctx: Any, carrier: Tensor, gates: Tensor, gate_up_weight: Tensor, down_weight: Tensor, tokens: Quantized,
        parts: _Parts, gradient: GradientTiles[Quantized] | None,
    ) -> Tensor:  # fmt: skip
        ctx.parts, ctx.gradient, ctx.gate_up, ctx.down = parts, gradient, SimpleNamespace(), SimpleNamespace()
        deferred.keep_weight(ctx.gate_up, gate_up_weight)
        deferred.keep_weight(ctx.down, down_weight)
        ctx.save_for_backward(tokens.payload, tokens.scale, gates)
        power_of_two, dtype = parts.power_of_two, carrier.dtype
        wide = weight_fp8(gate_up_weight, power_of_two=power_of_two)
        h = Quantized(*empty_tiles(tokens.payload, parts.num_rows, down_weight.shape[2]))
        for chunk in parts.chunks():
            gate_up = parts.times(parts.gathered(tokens, chunk), wide, dtype, chunk)
            _put_rows(h, chunk, swiglu_quantize(gate_up, gates[chunk], power_of_two=power_of_two)[1])
            del gate_up
        return parts.sums(h, weight_fp8(down_weight, power_of_two=power_of_two), dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        payload, scale, gates = ctx.saved_tensors
        tokens, parts, dtype = Quantized(payload, scale), ctx.parts, dy.dtype
        gradient = _TokensGradient.of(dy, ctx.gradient, parts)
        h_t, d_gate_up, d_gate_up_t, d_gates = _differentiate(ctx, tokens, gates, gradient.tiles, dtype)
        _push_wgrads(ctx, tokens, gradient, h_t, d_gate_up_t)
        weight = weight_fp8(deferred.kept_weight(ctx.gate_up), power_of_two=parts.power_of_two).transposed_blocks()
        return parts.sums(d_gate_up, weight, dtype), d_gates, None, None, None, None, None


@dataclass(frozen=True)
class _TokensGradient:
    """The gradient of the tokens' sums in 1x128 tiles, and a slice of its rows in 128x1 tiles, [channels, rows]."""

    tiles: Quantized
    by_channel: Callable[[slice], Quantized]

    @classmethod
    def of(cls, dy: Tensor, arrived: GradientTiles[Quantized] | None, parts: _Parts) -> _TokensGradient:
        """Of numbers, or of what has arrived in their place."""
        slots, topk, power_of_two = parts.slot_of_row, parts.topk, parts.power_of_two
        if arrived is None:

            def quantized(part: slice) -> Quantized:
                return gather_quantize_both(dy[:, part], slots, topk, power_of_two=power_of_two)[1]

            return cls(quantize_tiles(dy, power_of_two=power_of_two), quantized)
        tiles = arrived.take()

        def regrouped(part: slice) -> Quantized:
            return gather_requantize_transposed(_channels(tiles, part), slots, topk, power_of_two=power_of_two)

        return cls(tiles, regrouped)


def _differentiate(
    ctx: Any, tokens: Quantized, gates: Tensor, gradient: Quantized, dtype: torch.dtype
) -> tuple[Quantized, Quantized, Quantized, Tensor]:
    """All rows: h in 128x1 tiles, the gradient of gate_up in 1x128 and 128x1 tiles, and that of the gates."""
    parts, gate_up_weight, down_weight = ctx.parts, deferred.kept_weight(ctx.gate_up), deferred.kept_weight(ctx.down)
    power_of_two: bool = parts.power_of_two
    wide = weight_fp8(gate_up_weight, power_of_two=power_of_two)
    down = weight_fp8(down_weight, power_of_two=power_of_two).transposed_blocks()
    rows, inter = parts.num_rows, down_weight.shape[2]
    h_t = Quantized(*empty_tiles(gradient.payload, inter, rows))
    d_gate_up = Quantized(*empty_tiles(gradient.payload, rows, 2 * inter))
    d_gate_up_t = Quantized(*empty_tiles(gradient.payload, 2 * inter, rows))
    d_gates = torch.empty_like(gates)
    for chunk in parts.chunks():
        gate_up = parts.times(parts.gathered(tokens, chunk), wide, dtype, chunk)
        kept, _ = swiglu_quantize(gate_up, gates[chunk], power_of_two=power_of_two)
        del gate_up, _
        dh = parts.times(parts.gathered(gradient, chunk), down, dtype, chunk)
        by_row, by_channel, d_gates[chunk] = swiglu_backward_quantize_both(
            kept, gates[chunk], dh, power_of_two=power_of_two
        )
        del dh
        _put_rows(d_gate_up, chunk, by_row)
        _put_columns(d_gate_up_t, chunk, by_channel)
        del by_row, by_channel
        again = swiglu_quantize_transposed(kept, gates[chunk], dtype=dtype, power_of_two=power_of_two)
        _put_columns(h_t, chunk, again)
        del kept, again
    return h_t, d_gate_up, d_gate_up_t, d_gates


def _push_wgrads(
    ctx: Any, tokens: Quantized, gradient: _TokensGradient, h_t: Quantized, d_gate_up_t: Quantized
) -> None:
    """Hand over both weights' gradients, down's first; each gathers its wide operand slice by slice when it runs."""
    parts, gate_up_weight, down_weight = ctx.parts, deferred.kept_weight(ctx.gate_up), deferred.kept_weight(ctx.down)
    by_channel, hidden = gradient.by_channel, tokens.payload.shape[1]

    def of_down(out: Tensor, accumulate: bool) -> None:
        for part in parts.slices(hidden):
            _add(out[:, part], grouped_gemm_tile_tile(by_channel(part), h_t, parts.group_ends), accumulate=accumulate)

    def of_gate_up(out: Tensor, accumulate: bool) -> None:
        for part in parts.slices(hidden):
            rows = gather_requantize_transposed(
                _channels(tokens, part), parts.slot_of_row, parts.topk, power_of_two=parts.power_of_two
            )
            product = grouped_gemm_tile_tile(d_gate_up_t, rows, parts.group_ends)
            del rows
            _add(out[:, :, part], product, accumulate=accumulate)
            del product

    if down_weight.requires_grad:
        deferred.push(lambda: deferred.accumulate_product(down_weight, of_down))
    if gate_up_weight.requires_grad:
        deferred.push(lambda: deferred.accumulate_product(gate_up_weight, of_gate_up))


def _add(out: Tensor, product: Tensor, *, accumulate: bool) -> None:
    (out.add_ if accumulate else out.copy_)(product)


def _tiles(channels: slice) -> slice:
    """The scales of a slice of channels, which begins with a tile."""
    return slice(channels.start // TILE, -(-channels.stop // TILE))


def _channels(tokens: Quantized, part: slice) -> Quantized:
    """A slice of the channels of tokens in 1x128 tiles, views."""
    return Quantized(tokens.payload[:, part], tokens.scale[_tiles(part)])


def _put_rows(tiles: Quantized, rows: slice, part: Quantized) -> None:
    """Write some rows of 1x128 tiles."""
    tiles.payload[rows] = part.payload
    tiles.scale[:, rows] = part.scale


def _put_columns(tiles: Quantized, rows: slice, part: Quantized) -> None:
    """Write some rows, which are columns, of 128x1 tiles."""
    tiles.payload[:, rows] = part.payload
    tiles.scale[_tiles(rows)] = part.scale


def fp8_experts_in_chunks(
    dispatched: Dispatched, gate_up_weight: Tensor, down_weight: Tensor, *, max_rows: int, power_of_two: bool
) -> Tensor:
    """`fp8_experts`, bit for bit, with temporaries as wide as a row for `max_rows` rows at a time, 128 or more."""
    assert max_rows >= TILE, max_rows
    tokens, grouping = dispatched.tokens, dispatched.grouping
    if isinstance(tokens, CarriedTiles):
        carrier, tiles = tokens.carrier, tokens.tiles
    else:
        carrier, tiles = tokens, quantize_tiles(tokens.detach(), power_of_two=power_of_two)
    parts = _Parts(
        grouping.slot_of_row, grouping.group_ends, grouping.rows_of_token, grouping.topk, grouping.partial, max_rows,
        power_of_two,
    )  # fmt: skip
    return _Fp8ExpertsInChunks.apply(  # type: ignore[no-any-return, no-untyped-call]
        carrier, dispatched.gates, gate_up_weight, down_weight, tiles, parts, dispatched.gradient
    )
