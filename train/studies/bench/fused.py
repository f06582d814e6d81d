"""Memory-bound rows of the fused kernels at DeepSeek-V3's sizes: norms, MLA's heads, gathers, SwiGLU both ways, AdamW.

As `traffic.py`, whose rows are one operation each. Bytes are those of an ideal call: every tensor once, a token that is
gathered eight times too. Sizes: norms [4096, 7168]; 128 heads of 128 plain and 64 rotary dims; 32,768 rows of experts
from 4,096 tokens. `small` divides every dim by 32, but not a head's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from kernels import adamw, gather, heads, quantize, rmsnorm, swiglu
from kernels.formats import TILE, Quantized
from train.studies.bench.cases import EXPERT_ROWS, TOKENS, reduced
from train.studies.bench.traffic import COLS, ROW_TILES, ROWS, WHOLE, MemoryBound, flat, kept, kept_gated

Normal = Callable[..., Tensor]
TOPK = EXPERT_ROWS // TOKENS
NOPE, ROPE = 128, 64
EPS = 1e-6
BOTH = (ROWS, COLS, COLS, ROW_TILES)
# Per element, the FP32 scale of 128.
SCALE = 4 / TILE
# Sums of another order move a BF16 number in a few thousand, and its E4M3 by 1/16: rmsnorm's rows have the same.
TIPPED = 2**-8
HYPER: adamw.AdamWHyper = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "step": 2}


def _norms(rows: int, cols: int) -> list[MemoryBound]:
    """In front of the linears: residual, norm and tiles; and back, from three readers and the stream."""

    def forward(rows: int, cols: int, normal: Normal) -> tuple[Tensor, ...]:
        return normal(rows, cols), normal(rows, cols), normal(cols)

    def backward(rows: int, cols: int, normal: Normal) -> tuple[Tensor, ...]:
        x, weight = normal(rows, cols), normal(cols)
        rstd = torch.rsqrt(x.float().square().mean(-1) + EPS)
        return *(normal(rows, cols) for _ in range(4)), x, weight, rstd

    def again(rows: int, cols: int, normal: Normal) -> tuple[Tensor, ...]:
        x, weight = normal(rows, cols), normal(cols)
        return x, weight, torch.rsqrt(x.float().square().mean(-1) + EPS)

    def gradient(run: Callable[..., Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
        out = torch.empty_like(tensors[0])
        run(*tensors, out)
        return (out,)

    def chosen(found: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        total, _, payload, scale, *_ = found
        return total, payload, scale

    return [MemoryBound(
        "add_norm_quantize", rows, cols, 7 + SCALE, forward,
        lambda x, d, w: chosen(rmsnorm.add_norm_quantize(x, d, w, EPS, True, True, False)),
        lambda x, d, w: chosen(rmsnorm.add_norm_quantize_reference(x, d, w, EPS, True, True, False)),
        (ROWS, ROWS, WHOLE), (ROWS, ROWS, COLS), tolerance=TIPPED,
    ), MemoryBound(
        "norm_backward", rows, cols, 12, backward,
        lambda *x: gradient(rmsnorm.norm_backward, *x),
        lambda *x: gradient(rmsnorm.norm_backward_reference, *x),
        (ROWS,) * 5 + (WHOLE, ROWS), (ROWS,), tolerance=TIPPED,
    ), MemoryBound(
        "norm_again", rows, cols, 3 + SCALE, again,
        lambda x, w, r: rmsnorm.norm_again(x, w, r, True, True, False)[:2],
        lambda x, w, r: rmsnorm.norm_again_reference(x, w, r, True, True, False)[:2],
        (ROWS, WHOLE, ROWS), (COLS, ROW_TILES),
    )]  # fmt: skip


def _heads(tokens: int, count: int) -> list[MemoryBound]:
    """MLA's heads, bytes for each token and head; every token is a position of its own."""
    tables = 2 * (ROPE // 2) * 4 / count

    def angles(tokens: int, normal: Normal) -> tuple[Tensor, Tensor]:
        turn = normal(tokens, ROPE // 2).float()
        return turn.cos(), turn.sin()

    def forward(tokens: int, count: int, normal: Normal) -> tuple[Tensor, ...]:
        wide = normal(tokens, count, NOPE + ROPE), normal(tokens, count, 2 * NOPE), normal(tokens, ROPE)
        return *wide, *angles(tokens, normal)

    def queries(tokens: int, count: int, normal: Normal) -> tuple[Tensor, ...]:
        return normal(tokens, count, NOPE + ROPE), *angles(tokens, normal)

    def keys(tokens: int, count: int, normal: Normal) -> tuple[Tensor, ...]:
        return normal(tokens, count, NOPE + ROPE), normal(tokens, count, NOPE)

    def joined(run: Callable[..., Tensor], q: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        return run(q, *rest), q

    def summed(run: Callable[..., None], dk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        out = dk.new_empty(len(dk), ROPE)
        run(dk, cos, sin, out)
        return (out,)

    return [MemoryBound(
        # The queries' rotary dims both ways, the keys' plain ones in, the keys out; one rotary key for all heads.
        "heads_forward", tokens, count, 2 * (2 * ROPE + NOPE + NOPE + ROPE) + 2 * ROPE / count + tables, forward,
        lambda *x: joined(heads.heads_forward, *x), lambda *x: joined(heads.heads_forward_reference, *x),
        (ROWS,) * 5, (ROWS, ROWS), in_place=True,
    ), MemoryBound(
        "turn_back_quantize_both", tokens, count, (2 + 2 + 2 * SCALE) * (NOPE + ROPE) + tables, queries,
        lambda q, cos, sin: heads.turn_back_quantize_both(q, cos, sin, True),
        lambda q, cos, sin: heads.turn_back_quantize_both_reference(q, cos, sin, True), (ROWS,) * 3, BOTH,
    ), MemoryBound(
        "heads_quantize_both", tokens, count, (2 + 2 + 2 * SCALE) * 2 * NOPE, keys,
        lambda k, v: heads.heads_quantize_both(k, v, NOPE, True),
        lambda k, v: heads.heads_quantize_both_reference(k, v, NOPE, True), (ROWS, ROWS), BOTH,
    ), MemoryBound(
        "rope_key_backward", tokens, count, 2 * ROPE + 2 * ROPE / count + tables, queries,
        lambda *x: summed(heads.rope_key_backward, *x), lambda *x: summed(heads.rope_key_backward_reference, *x),
        # The reference adds heads in FP32 in another order: one BF16 rounding.
        (ROWS,) * 3, (ROWS,), tolerance=TIPPED,
    )]  # fmt: skip


def _gathers(rows: int, cols: int) -> list[MemoryBound]:
    """Rows of experts from tokens, each token TOPK times."""
    slots = 8 / cols

    def numbers(rows: int, cols: int, normal: Normal) -> tuple[Tensor, ...]:
        x = normal(rows // TOPK, cols)
        # Some order of all slots.
        return x, normal(rows).argsort()

    def tiles(rows: int, cols: int, normal: Normal) -> tuple[Tensor, ...]:
        x, slot_of_row = numbers(rows, cols, normal)
        return *flat(quantize.quantize_tiles(x, power_of_two=True)), slot_of_row

    tokens = (WHOLE, WHOLE, ROWS)
    return [MemoryBound(
        "gather_tiles", rows, cols, (1 + SCALE) * (1 + 1 / TOPK) + slots, tiles,
        lambda p, s, i: flat(gather.gather_tiles(Quantized(p, s), i, TOPK)),
        lambda p, s, i: gather.gather_tiles_reference(p, s, i, TOPK), tokens, (ROWS, COLS),
    ), MemoryBound(
        "gather_requantize_transposed", rows, cols, (1 + SCALE) * (1 + 1 / TOPK) + slots, tiles,
        lambda p, s, i: flat(gather.gather_requantize_transposed(Quantized(p, s), i, TOPK, power_of_two=True)),
        lambda p, s, i: gather.gather_requantize_transposed_reference(p, s, i, TOPK, True), tokens, (COLS, ROW_TILES),
    ), MemoryBound(
        "gather_quantize_both", rows, cols, 2 / TOPK + 2 * (1 + SCALE) + slots, numbers,
        lambda x, i: flat(*gather.gather_quantize_both(x, i, TOPK, power_of_two=True)),
        lambda x, i: gather.gather_quantize_both_reference(x, i, TOPK, True), (WHOLE, ROWS), BOTH,
    )]  # fmt: skip


def _swiglus(rows: int, inter: int, *, gated: bool) -> list[MemoryBound]:
    """SwiGLU's output made again for wgrad, and its gradient quantised both ways, from the kept input."""
    gates = (ROWS,) if gated else ()

    def again(rows: int, inter: int, normal: Normal) -> tuple[Tensor, ...]:
        *found, _ = (kept_gated if gated else kept)(rows, inter, normal)
        return tuple(found)

    def both(p: Tensor, s: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        scales, dh = (rest[0] if gated else None), rest[-1]
        row, column, d_gates = swiglu.swiglu_backward_quantize_both(Quantized(p, s), scales, dh, power_of_two=True)
        return *flat(row, column), *([d_gates] if gated else [])

    def both_reference(p: Tensor, s: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        found = swiglu.swiglu_backward_quantize_both_reference(p, s, rest[0] if gated else None, rest[-1], True)
        return found if gated else found[:4]

    gate = " gated" if gated else ""
    # Of inter elements gate and up are twice as many.
    return [MemoryBound(
        f"swiglu_quantize_transposed{gate}", rows, inter, 3 * (1 + SCALE), again,
        lambda p, s, g=None: flat(
            swiglu.swiglu_quantize_transposed(Quantized(p, s), g, dtype=torch.bfloat16, power_of_two=True)
        ),
        lambda p, s, g=None: swiglu.swiglu_quantize_transposed_reference(p, s, g, torch.bfloat16, True),
        (ROWS, COLS, *gates), (COLS, ROW_TILES), tolerance=5e-3,
    ), MemoryBound(
        f"swiglu_backward_quantize_both{gate}", rows, inter, 2 + 6 * (1 + SCALE), kept_gated if gated else kept,
        # As `swiglu_quantize` in traffic.py: a GPU's exponential tips some numbers by one E4M3 step.
        both, both_reference, (ROWS, COLS, *gates, ROWS), (*BOTH, *gates), tolerance=5e-3,
    )]  # fmt: skip


def _adamw(rows: int, cols: int) -> MemoryBound:
    """A shard's step: FP32 gradient and master, BF16 moments and weight."""

    def state(rows: int, cols: int, normal: Normal) -> tuple[Tensor, ...]:
        master, grad, first = (normal(rows, cols) for _ in range(3))
        return master.float(), grad.float(), first, first.square(), master.clone()

    def stepped(run: Callable[..., None], *tensors: Tensor) -> tuple[Tensor, ...]:
        run(*tensors)
        master, _, first, second, weight = tensors
        return master, first, second, weight

    hyper = cast("list[float]", [HYPER["lr"], *HYPER["betas"], HYPER["eps"], HYPER["weight_decay"]])
    return MemoryBound(
        "adamw", rows, cols, 22, state,
        lambda *x: stepped(lambda *y: adamw.adamw_update(*y, **HYPER), *x),
        lambda *x: stepped(lambda p, g, m, v, w: adamw.adamw_reference(p, g, m, v, w, hyper, HYPER["step"]), *x),
        # FP32 roundings in another order tip a BF16 number now and then.
        (ROWS,) * 5, (ROWS,) * 4, tolerance=1e-4, in_place=True,
    )  # fmt: skip


def fused(*, small: bool) -> list[MemoryBound]:
    """Every fused kernel's case, in the order of the table."""
    hidden, tokens = reduced(7168, small=small), reduced(TOKENS, small=small)
    rows = reduced(EXPERT_ROWS, small=small)
    return [
        *_norms(tokens, hidden),
        *_heads(tokens, 128 // (32 if small else 1)),
        *_gathers(rows, hidden),
        *_swiglus(tokens, max(TILE, reduced(18432, small=small)), gated=False),
        *_swiglus(rows, max(TILE, reduced(2048, small=small)), gated=True),
        _adamw(tokens, hidden),
    ]
