"""Bytes that one micro-batch of a pipeline stage holds, and the peaks of its actions, in closed form.

A stage is a row of parts: blocks, and on the last stage the final norm, MTP depths (arXiv:2412.19437 §2.2) and losses.
Forward adds what each part keeps; backward replaces it from the last part on by what its weight gradients wait for.

    forward    rises above what earlier parts keep
    backward   rises above what earlier parts keep and what the weight gradients of later ones wait for

Of a layer that runs again (`run.recompute=layers`) a part keeps the input, and its backward is all of the layer.

Peaks are of the operators that are largest at V3's sizes: attention's core with its operands made again, SwiGLU, the
rows of the experts and the exchange, a chunk of logits. Shapes as in `kept.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate

from kernels.formats import TILE, ceil_div
from train.model.sizes import FP32_BYTES
from train.studies.plan.kept import (
    HEAD_ROWS,
    Storages,
    Work,
    again,
    attention_kept,
    attention_waiting,
    heads,
    kept_output,
    moe_kept,
    moe_waiting,
    swiglu_kept,
    swiglu_waiting,
)


@dataclass(frozen=True)
class StageShape:
    """Layers of each kind; the first stage has the embedding, the last one norm, head and MTP layers besides."""

    dense: int
    moe: int
    is_first: bool
    is_last: bool


@dataclass(frozen=True)
class StageBytes:
    """Of one micro-batch: held from forward to backward, then to the weight gradients; peaks are above what was held.

    dispatch: what one exchange sends and receives, in the peaks too.
    """

    kept: float
    waiting: float
    forward: float
    backward: float
    wgrad: float
    dispatch: float


@dataclass(frozen=True)
class _Part:
    kept: float
    waiting: float
    forward: float
    backward: float
    # Its backward runs the weight gradients that wait.
    runs_wgrads: bool = False


@cache
def stage_bytes(work: Work, shape: StageShape) -> StageBytes:
    """Add up the parts of a stage."""
    parts = [*_parts(work, shape)]
    routes = shape.moe > 0 or (shape.is_last and any(map(work.model.is_moe, work.model.mtp_layer_ids)))
    # What leaves the stage is held as long as what it was made of; a loss is a number.
    out = 0.0 if shape.is_last else work.hidden
    before = [*accumulate((part.kept for part in parts), initial=0.0)]
    after = [*accumulate(reversed(parts), lambda waits, part: _waits(work, waits, part), initial=0.0)][::-1]
    # Two scalars of the balance loss.
    kept = before[-1] + 2 * FP32_BYTES * routes
    # The embedding waits for its output's gradient; without FP8 the first layer's input outlives backward.
    # Of layers that run again the loss, which stays, holds the last stage's input.
    outlives = shape.is_first or (shape.is_last if work.layers_again else not work.fp8)
    waiting = after[0] + (work.hidden if work.deferred and outlives else 0.0)
    forward = max(held + part.forward for held, part in zip(before, parts, strict=False))
    backward = max(held + part.backward + waits for held, part, waits in zip(before, parts, after[1:], strict=False))
    exchanged = _sum(work.plain(work.sent, work.model.hidden_size)) if work.ep > 1 and routes else 0.0
    return StageBytes(
        kept=kept + out,
        waiting=waiting,
        forward=max(forward, kept + out),
        backward=backward - kept + work.hidden * (not shape.is_last),
        wgrad=_wgrad_peak(work, shape, routes),
        dispatch=exchanged * (1 + work.received / work.sent),
    )


def _waits(work: Work, waits: float, part: _Part) -> float:
    """What weight gradients hold after a part's backward, of what they held before it."""
    return waits * (not part.runs_wgrads) + part.waiting * work.deferred


def _sum(sizes: Sequence[float]) -> float:
    return float(sum(sizes))


def _bytes(storages: Storages) -> float:
    return float(sum(map(sum, storages.values())))


def _parts(work: Work, shape: StageShape) -> Iterator[_Part]:
    yield from [_block(work, moe=False)] * shape.dense
    yield from [_block(work, moe=True)] * shape.moe
    if shape.is_last:
        yield from _ending(work)


def _ending(work: Work) -> Iterator[_Part]:
    """Final norm, MTP depths, losses."""
    model, hidden = work.model, work.hidden
    depths = [replace(work, length=work.length - k) for k, _ in enumerate(model.mtp_layer_ids, start=1)]
    depths = [depth for depth in depths if depth.length > 0]
    root = work.tokens * FP32_BYTES
    # Without MTP nothing but the head reads the norm's output, and the head keeps its gradient instead.
    yield _Part(hidden * (1 + bool(depths)) + root, 0.0, 3 * hidden, 3 * hidden)
    for layer_id, depth in zip(model.mtp_layer_ids, depths, strict=False):
        block = _block(depth, moe=model.is_moe(layer_id))
        # Embedded tokens, both norms' outputs side by side, the last norm's sum, and its output for a next depth.
        kept = (4 + (depth is not depths[-1])) * depth.hidden + 3 * depth.tokens * FP32_BYTES
        # The two outputs, the gradient of their product and that of the embedding.
        rise = 3 * depth.hidden + block.forward
        waiting = 4 * depth.hidden + block.waiting
        yield _Part(kept + block.kept, waiting, rise, block.backward, block.runs_wgrads)
    gradients = hidden + sum(depth.hidden for depth in depths)
    chunk = ceil_div(work.tokens, ceil_div(work.tokens, HEAD_ROWS))
    logits = _sum(work.plain(chunk, model.vocab_size))
    yield _Part(gradients, 0.0, 2 * gradients + logits, gradients)


def _block(work: Work, *, moe: bool) -> _Part:
    if not work.layers_again:
        return _whole_block(work, moe=moe)
    # Both passes in one, beside the gradient that came. Forward alone needs no more. No weight gradient waits.
    layer, again = (_whole_block(replace(work, deferred=False), moe=moe, combines=first) for first in (True, False))
    backward = max(again.forward, again.backward) + work.hidden
    return _Part(kept=work.hidden, waiting=0.0, forward=layer.forward, backward=backward, runs_wgrads=True)


@cache
def _whole_block(work: Work, *, moe: bool, combines: bool = True) -> _Part:
    attention, inner = _bytes(attention_kept(work)), work.model.intermediate_size
    waits = attention_waiting(work)
    if moe:
        ffn, ffn_waits = _bytes(moe_kept(work)), moe_waiting(work)
        forward, backward = _moe_peaks(work, combines=combines)
    else:
        ffn, ffn_waits = _sum(swiglu_kept(work, work.tokens, inner)), swiglu_waiting(work, work.tokens, inner)
        forward, backward = _swiglu_peaks(work, work.tokens, inner)
    normed = _sum(work.tiles(work.tokens, work.model.hidden_size)) if work.fp8 else 0.0
    up, down = _core_peaks(work)
    return _Part(
        kept=attention + ffn,
        waiting=waits + ffn_waits,
        # With attention's output, which is not added yet.
        forward=max(up, attention + normed + work.hidden + forward),
        backward=max(attention + backward, attention + ffn_waits * work.deferred + down),
    )


def _core_peaks(work: Work) -> tuple[float, float]:
    """Above the layer's beginning: attention forward. Above what attention keeps: its backward."""
    model, tokens = work.model, work.tokens
    made, output = _sum(heads(work)), _sum(work.plain(tokens, model.num_attention_heads * model.v_head_dim))
    wide = _sum(work.plain(tokens, model.num_attention_heads * model.qk_head_dim))
    packed = _sum(kept_output(work)) if work.e5m6 else 0.0
    latents = attention_kept(work)["latents and RoPE key"]
    forward = 2 * work.hidden + _sum(latents) + made + output + packed
    if not work.fp8:
        forward += work.hidden
    # Gradients of queries, keys, values and output; what a checkpoint makes again; what waits of o_proj.
    backward = 2 * wide + 2 * output + work.hidden * work.fp8
    backward += made if work.recompute else 0.0
    if work.e5m6:
        backward += output - packed + _sum(work.gradient(tokens, model.num_attention_heads * model.v_head_dim))
    waits = _sum(work.gradient(tokens, model.hidden_size)) if work.deferred else 0.0
    return forward, backward + waits


def _swiglu_peaks(work: Work, rows: int, inter: int) -> tuple[float, float]:
    """Above what comes before: forward with its output; backward of one FFN."""
    kept, wide = _sum(swiglu_kept(work, rows, inter)), _sum(work.plain(rows, 2 * inter))
    out = _sum(work.plain(rows, work.model.hidden_size))
    if not (work.fp8 and work.swiglu_input):
        return kept + wide / 2 * work.fp8 + out, kept + 1.5 * wide
    forward = kept + max(wide + _sum(work.tiles(rows, inter)), out)
    return forward + out, kept + wide / 2 + 2 * _sum(work.tiles(rows, 2 * inter))


def _moe_peaks(work: Work, *, combines: bool) -> tuple[float, float]:
    """The same of a MoE layer: rows of the experts, their sums, and, where forward `combines`, those on their way."""
    model, inter = work.model, work.model.moe_intermediate_size
    kept = _bytes(moe_kept(work)) - _sum(moe_kept(work).get("gate and up of the shared expert", (0.0,)))
    sums = _sum(work.plain(work.received, model.hidden_size))
    # With two hops the sums of a node are there with what they were made of; they become a token's sums after that.
    home = _sum(work.plain(work.sent, model.hidden_size)) + max(
        work.hidden, _sum(work.plain(work.crossing, model.hidden_size))
    )
    home = home if work.ep > 1 else 0.0
    shared = _sum(swiglu_kept(work, work.tokens, model.n_shared_experts * inter)) if model.n_shared_experts else 0.0
    done = swiglu_waiting(work, work.tokens, model.n_shared_experts * inter) if shared and work.deferred else 0.0
    rows_of = _rows_in_parts if work.again and work.regroups else _rows_at_once
    up, backward = rows_of(work, kept, sums)
    backward = max(backward, _gradients_on_their_way(work, sums + home))
    # A forward that does not combine adds the shared expert to nothing.
    return max(up, kept + sums + (home if combines else work.hidden)), kept + done + backward


def _gradients_on_their_way(work: Work, sums: float) -> float:
    """Sums of the rows' gradients, in the exchange, with what waits of the experts."""
    model, inter, rows = work.model, work.model.moe_intermediate_size, work.rows
    if not work.fp8:
        return sums + _sum(work.plain(rows, model.hidden_size)) + _sum(work.plain(rows, 2 * inter))
    if work.again and work.regroups:
        return sums + _sum(again(work, gradient=True)) * work.deferred
    of_down = work.gradient if work.deferred else work.tiles
    return sums + _sum(work.gradient(rows, 2 * inter)) + _sum(of_down(rows, model.hidden_size))


def _rows_at_once(work: Work, kept: float, sums: float) -> tuple[float, float]:
    """Forward with `kept`, what is kept in the end; backward above that."""
    model, inter, rows = work.model, work.model.moe_intermediate_size, work.rows
    of_rows, tiles = _sum(work.plain(rows, model.hidden_size)), _sum(work.tiles(rows, model.hidden_size))
    wide, swiglu = _sum(work.plain(rows, 2 * inter)), _sum(swiglu_kept(work, rows, inter))
    # Gate and up, kept and activated, go with the last product; beyond a limit so does what would be kept.
    up = kept + swiglu * work.again + of_rows + wide / 2 * work.fp8
    if work.regroups:
        up = kept - swiglu + wide + _sum(work.tiles(rows, 2 * inter)) + _sum(work.tiles(rows, inter)) + of_rows
    up = max(up, kept + of_rows + sums)
    if work.fp8:
        of_down = _sum(work.gradient(rows, model.hidden_size)) if work.deferred else tiles
        of_up = _sum(work.gradient(rows, 2 * inter))
        backward = max(
            sums + tiles + of_down,
            tiles + of_down + wide / 2,
            wide / 2 + 2 * of_up + of_down,
            2 * of_up + of_down + of_rows,
            of_up + of_down + of_rows + sums,
        )
    else:
        # Without a pipeline weight gradients run at once, each a product of its own that is added afterwards. SwiGLU
        # has let go of what it kept by then.
        product = 0.0 if work.deferred else _expert_products(work)
        backward = max(of_rows + 1.5 * wide, 2 * of_rows + wide + sums, product - wide / 2)
    # Beyond a limit all that is not kept is made again first.
    return up, backward + (swiglu + of_rows) * work.again


def _rows_in_parts(work: Work, kept: float, sums: float) -> tuple[float, float]:
    """The same beyond a limit (`kernels/experts_in_chunks.py`): of all rows only what is FP8 and as wide as SwiGLU."""
    model, inter, rows = work.model, work.model.moe_intermediate_size, work.rows
    assert work.max_rows is not None
    chunk = work.max_rows // TILE * TILE
    width = min(model.hidden_size * work.max_rows // rows, work.max_rows // (2 * work.local_experts))
    width = max(width // TILE, 1) * TILE
    wide, half = _sum(work.plain(chunk, 2 * inter)), _sum(work.plain(chunk, inter))
    tiles = _sum(work.tiles(chunk, model.hidden_size))
    of_wide, of_half = _sum(work.tiles(chunk, 2 * inter)), _sum(work.tiles(chunk, inter))
    activate = wide + max(tiles, of_wide + of_half)
    of_slice = _sum(work.plain(rows, width)) + _sum(work.plain(work.received, width))
    up = kept + _sum(again(work, gradient=False)) + max(activate, sums + of_slice)
    # The gradient by row, besides what weight gradients read.
    by_row, both = _sum(work.tiles(rows, 2 * inter)), _sum(again(work, gradient=True))
    differentiate = max(activate, of_wide + half + max(tiles, 2 * of_wide))
    products = 2 * inter * width * FP32_BYTES * work.local_experts + _sum(work.gradient(rows, width))
    backward = by_row + both + max(differentiate, products * (not work.deferred), sums + of_slice)
    return up, backward + _sum(work.tiles(work.received, model.hidden_size))


def _wgrad_peak(work: Work, shape: StageShape, routes: bool) -> float:
    """A normed input made again, or an FP32 product that is added afterwards."""
    model = work.model
    embedded = work.tokens * model.hidden_size * FP32_BYTES if shape.is_first else 0.0
    if work.fp8 or work.layers_again or not routes:
        return max(embedded, work.hidden)
    return max(embedded, _expert_products(work))


def _expert_products(work: Work) -> float:
    """FP32 gradient of the experts' first matrices."""
    model = work.model
    return 2.0 * model.moe_intermediate_size * model.hidden_size * FP32_BYTES * work.local_experts
