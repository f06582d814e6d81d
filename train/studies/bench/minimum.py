"""The fewest bytes that one layer has to move, by operation: what a ledger is read beside.

A tensor that lies between two kernels is written once and read once by each kernel that needs it. Only these kernels
are assumed: a GEMM with operands in its own precision, attention as one call each way, and one pass each for

    norm          sum of residual and delta, its norm, and the norm's FP8 form; a BF16 copy where the router reads it;
                  backward all gradients of one place and the residual's together, and the FP8 form again for wgrad
    heads         q turned in place, k put together; backward dq and dkv straight to both FP8 groupings
    SwiGLU        with both quantisations, as it is now; backward straight to both groupings
    permute       FP8 rows gathered from FP8 tokens, again for wgrad; gradients gathered and quantised both ways
    quantise      what is left: attention's output, gradients into linears

A weight gradient is written, not added to (as the first micro-batch may). Padding rows, statistics of rows, indices,
gates and RoPE's tables are left out: under 1 % of a layer. In BF16 nothing is quantised. A kernel that did two of
these at once, such as a GEMM with SwiGLU behind it, would need less.

Names: t tokens, r rows of experts, h hidden, act and w bytes of an operand's and a weight's element with its scales.
"""

from __future__ import annotations

from kernels.formats import TILE
from train.model.config import ModelConfig

BF16, FP32 = 2, 4


def minimum_bytes(config: ModelConfig, tokens: int, *, moe: bool, fp8: bool) -> dict[str, float]:
    """Bytes read and written by one layer, forward and backward, by the ledger's operations."""
    t, h, heads = tokens, config.hidden_size, config.num_attention_heads
    nope, rope, v = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    latents = config.q_width + config.kv_lora_rank
    down_width = latents + rope
    act = 1 + FP32 / TILE if fp8 else BF16
    # (rows, in, out, experts) of each linear; (rows, width) of each SwiGLU.
    linears = [
        (t, h, down_width, 1),
        (t, config.q_width, heads * (nope + rope), 1),
        (t, config.kv_lora_rank, heads * (nope + v), 1),
        (t, heads * v, h, 1),
    ]
    activations = [(t, config.n_shared_experts * config.moe_intermediate_size if moe else config.intermediate_size)]
    rows = t * config.num_experts_per_tok if moe else 0
    linears += [(t, h, 2 * activations[0][1], 1), (t, activations[0][1], h, 1)]
    if moe:
        inter, experts = config.moe_intermediate_size, config.n_routed_experts
        linears += [(rows, h, 2 * inter, experts), (rows, inter, h, experts)]
        activations.append((rows, inter))

    found = {
        "GEMM": sum(_gemm_bytes(*linear, fp8=fp8) for linear in linears),
        # q, k, v, o and the log-sums; then the same and do, against dq, dk, dv.
        "attention core": t * heads * (3 * BF16 * (2 * (nope + rope) + v) + 3 * BF16 * v + 2 * FP32),
        "norm": _norm_bytes(t, h, act, readers=3 if moe else 1, copy=moe and fp8)
        # Of latents: x in, y out; dy and x in, dx out.
        + t * latents * (BF16 + act + 3 * BF16)
        # In FP8 also the sums and latents in, inputs of q_kv_a, gate_up and the up-projections out, for wgrad.
        + fp8 * t * (2 * h + latents) * (BF16 + act),
        "RoPE and head layout": _head_bytes(t, heads, nope, rope, v, fp8=fp8),
        "SwiGLU": sum(_swiglu_bytes(m, width, fp8=fp8) for m, width in activations),
    }
    if fp8:
        both = BF16 + 2 * act
        # o for fprop and for wgrad; gradients of o_proj's and the FFN's outputs and of the latents.
        found["quantise"] = t * (heads * v * 2 * (BF16 + act) + (2 * h + down_width) * both)
    if moe:
        # Copies of tokens forward and their gradients backward; sums of rows each way.
        gathered = 2 * (t + rows) * h * act + t * h * BF16 + rows * h * 2 * act if fp8 else 2 * (t + rows) * h * BF16
        found["permute"] = gathered + 2 * (t + rows) * h * BF16
        # x, and again for wgrad; dx.
        found["router"] = 3 * t * h * BF16
    return found


def _gemm_bytes(m: int, k: int, n: int, experts: int, *, fp8: bool) -> float:
    act, w = (1 + FP32 / TILE, 1 + FP32 / TILE**2) if fp8 else (BF16, BF16)
    x, y, weight = m * k, m * n, experts * n * k
    fprop, dgrad = x * act + weight * w + y * BF16, y * act + weight * w + x * BF16
    return fprop + dgrad + (x + y) * act + weight * FP32


def _norm_bytes(t: int, h: int, act: float, *, readers: int, copy: bool) -> float:
    """Of a layer's two wide norms: before attention with one reader, before the FFN with `readers`."""
    # Residual and delta in, their sum and its norm out; then the readers' gradients, the residual's and x in, dx out.
    forward = 2 * (3 * BF16 + act) + BF16 * copy
    return t * h * (forward + BF16 * (1 + 3 + readers + 3))


def _head_bytes(t: int, heads: int, nope: int, rope: int, v: int, *, fp8: bool) -> float:
    qk = nope + rope
    # The part of q that turns, in and out; k's own part and the common key in, k out; and the key's gradient out.
    forward = heads * (2 * rope + nope + qk) * BF16 + rope * BF16
    if fp8:
        backward = heads * (qk + qk + v) * BF16 + heads * (qk + nope + v) * 2 * (1 + FP32 / TILE)
    else:
        backward = heads * (2 * rope + qk + v + nope + v) * BF16
    return t * (forward + backward + rope * BF16)


def _swiglu_bytes(m: int, width: int, *, fp8: bool) -> float:
    if not fp8:
        # gate and up in, h out; gate, up and dh in, two gradients out.
        return m * width * BF16 * (3 + 5)
    act = 1 + FP32 / TILE
    # gate and up in, both kept and h out; both and dh in, two gradients out both ways; both in, h out for wgrad.
    return m * width * (2 * BF16 + 3 * act + 2 * act + BF16 + 4 * act + 3 * act)
