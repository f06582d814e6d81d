"""Device code of `kernels.heads`: queries turned where they are, keys joined; gradients turned back and quantised.

Every turn is two products and a sum, each rounded in FP32, and then one rounding: a fused multiply-add would round once
less and move results over rounding edges, so it is switched off (`EXACT`; it costs nothing). Everything has the bits of
the references but the shared key's gradient, a sum over heads in another order.

Rotary pairs are split and joined in registers. Bytes a token and head at 128 + 64 + 128 dims from BF16: forward 896;
`turn_back_quantize_both` 768, `heads_quantize_both` 1024, `turn_back` 768, `rope_key_backward` 128. Gradients are read
in the strides that attention gave them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.formats import TILE
from kernels.gpu.quantize import store_tiles_of_cols, store_tiles_of_rows
from kernels.tiles import empty_tiles

EXACT = {"enable_fp_fusion": False}
# Tokens and heads of a program, and its warps. Compiled, not measured: 48 registers and no shared memory.
TOKENS, HEADS, WARPS = 1, 32, 4
# Of a 128x128 square, so many rows or columns are in registers at once; compiled: 146 and 156 registers, none spilled.
# 64 columns of queries' gradients would spill: their turn needs cos and sin beside them.
ROWS, COLS_OF_Q, COLS_OF_KV = 32, 32, 64
# Of the shared key's gradient: tokens of a program, two numbers a thread in its result, and heads at once.
KEY_TOKENS, KEY_HEADS = 4, 16


@triton.jit
def _turned(x, cos, sin, DTYPE: tl.constexpr):
    """Each pair of x [N, ROPE] turned, cos and sin [N, ROPE / 2], fp32; rounded to DTYPE."""
    first, second = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    pairs = tl.join(first * cos - second * sin, first * sin + second * cos)
    return tl.reshape(pairs, (x.shape[0], x.shape[1])).to(DTYPE)


@triton.jit
def _of_each_head(x, HEADS: tl.constexpr):
    """[TOKENS, N] -> [TOKENS * HEADS, N]."""
    wide = tl.broadcast_to(x[:, None, :], (x.shape[0], HEADS, x.shape[1]))
    return tl.reshape(wide, (x.shape[0] * HEADS, x.shape[1]))


@triton.jit(do_not_specialize=["tokens", "positions"])
def _heads_forward_kernel(
    q_ptr, kv_ptr, k_rope_ptr, k_ptr, cos_ptr, sin_ptr, tokens, positions, heads, k_rope_stride, NOPE: tl.constexpr,
    ROPE: tl.constexpr, V: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, NOPE_WIDE: tl.constexpr,
    ROPE_WIDE: tl.constexpr,
):  # fmt: skip
    """q_ptr: the first rotary dim. NOPE_WIDE and ROPE_WIDE: the next powers of two."""
    DTYPE: tl.constexpr = k_ptr.dtype.element_ty
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    pair, rope, nope = tl.arange(0, ROPE_WIDE // 2), tl.arange(0, ROPE_WIDE)[None, :], tl.arange(0, NOPE_WIDE)[None, :]
    angle = (token % positions)[:, None] * (ROPE // 2) + pair[None, :]
    has_pair = (token < tokens)[:, None] & (pair < ROPE // 2)[None, :]
    cos, sin = tl.load(cos_ptr + angle, mask=has_pair, other=1.0), tl.load(sin_ptr + angle, mask=has_pair, other=0.0)
    has_key = (token < tokens)[:, None] & (rope < ROPE)
    key = tl.load(k_rope_ptr + token[:, None] * k_rope_stride + rope, mask=has_key, other=0.0).to(tl.float32)
    key = _of_each_head(_turned(key, cos, sin, DTYPE), HEADS)  # [TOKENS * HEADS, ROPE]

    nth = tl.arange(0, TOKENS * HEADS)
    row, head = tl.program_id(0).to(tl.int64) * TOKENS + nth // HEADS, tl.program_id(1) * HEADS + nth % HEADS
    exists, place = ((row < tokens) & (head < heads))[:, None], (row * heads + head)[:, None]
    out = place * (NOPE + ROPE)
    tl.store(k_ptr + out + NOPE + rope, key, mask=exists & (rope < ROPE))
    plain = tl.load(kv_ptr + place * (NOPE + V) + nope, mask=exists & (nope < NOPE), other=0.0)
    tl.store(k_ptr + out + nope, plain, mask=exists & (nope < NOPE))
    query = tl.load(q_ptr + out + rope, mask=exists & (rope < ROPE), other=0.0).to(tl.float32)
    query = _turned(query, _of_each_head(cos, HEADS), _of_each_head(sin, HEADS), DTYPE)
    tl.store(q_ptr + out + rope, query, mask=exists & (rope < ROPE))


@triton.jit(do_not_specialize=["tokens", "positions"])
def _turn_back_kernel(
    dq_ptr, out_ptr, cos_ptr, sin_ptr, tokens, positions, heads, q_token, q_head, out_token, NOPE: tl.constexpr,
    ROPE: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, NOPE_WIDE: tl.constexpr, ROPE_WIDE: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    pair, rope, nope = tl.arange(0, ROPE_WIDE // 2), tl.arange(0, ROPE_WIDE)[None, :], tl.arange(0, NOPE_WIDE)[None, :]
    angle = (token % positions)[:, None] * (ROPE // 2) + pair[None, :]
    has_pair = (token < tokens)[:, None] & (pair < ROPE // 2)[None, :]
    cos, sin = tl.load(cos_ptr + angle, mask=has_pair, other=1.0), tl.load(sin_ptr + angle, mask=has_pair, other=0.0)

    nth = tl.arange(0, TOKENS * HEADS)
    row, head = tl.program_id(0).to(tl.int64) * TOKENS + nth // HEADS, tl.program_id(1) * HEADS + nth % HEADS
    exists = ((row < tokens) & (head < heads))[:, None]
    place = dq_ptr + (row * q_token + head.to(tl.int64) * q_head)[:, None]
    out = out_ptr + (row * out_token + head * (NOPE + ROPE))[:, None]
    plain = tl.load(place + nope, mask=exists & (nope < NOPE), other=0.0)
    tl.store(out + nope, plain, mask=exists & (nope < NOPE))
    x = tl.load(place + NOPE + rope, mask=exists & (rope < ROPE), other=0.0).to(tl.float32)
    x = _turned(x, _of_each_head(cos, HEADS), _of_each_head(-sin, HEADS), DTYPE)
    tl.store(out + NOPE + rope, x, mask=exists & (rope < ROPE))


@triton.jit(do_not_specialize=["tokens", "positions"])
def _rope_key_backward_kernel(
    dk_ptr, out_ptr, cos_ptr, sin_ptr, tokens, positions, heads, k_token, k_head, out_token, ROPE: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, ROPE_WIDE: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    rope, pair = tl.arange(0, ROPE_WIDE), tl.arange(0, ROPE_WIDE // 2)
    inside = (token < tokens)[:, None] & (rope < ROPE)[None, :]
    place = dk_ptr + (token * k_token)[:, None, None] + rope[None, None, :]
    total = tl.zeros((TOKENS, HEADS, ROPE_WIDE), tl.float32)
    for first in range(0, heads, HEADS):
        head = (first + tl.arange(0, HEADS)).to(tl.int64)
        mask = inside[:, None, :] & (head < heads)[None, :, None]
        total += tl.load(place + (head * k_head)[None, :, None], mask=mask, other=0.0).to(tl.float32)
    # Rounded before it is turned back, as the sum of the reference is.
    key = tl.sum(total, axis=1).to(DTYPE).to(tl.float32)  # [TOKENS, ROPE]
    angle = (token % positions)[:, None] * (ROPE // 2) + pair[None, :]
    has_pair = (token < tokens)[:, None] & (pair < ROPE // 2)[None, :]
    cos, sin = tl.load(cos_ptr + angle, mask=has_pair, other=1.0), tl.load(sin_ptr + angle, mask=has_pair, other=0.0)
    tl.store(out_ptr + (token * out_token)[:, None] + rope[None, :], _turned(key, cos, -sin, DTYPE), mask=inside)


@triton.jit
def _load_turned_back(
    dq_ptr, cos_ptr, sin_ptr, row, first_col, rows, positions, q_token, q_head, NOPE: tl.constexpr, ROPE: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """[rows, COLS] of q_b_proj's gradient. COLS divides 64, hence a head's plain and its rotary dims: of one kind."""
    DTYPE: tl.constexpr = dq_ptr.dtype.element_ty
    head = (first_col // (NOPE + ROPE)).to(tl.int64)
    dim = tl.multiple_of(first_col % (NOPE + ROPE), COLS)
    inside = (row < rows)[:, None]
    place = dq_ptr + row[:, None] * q_token + head * q_head + dim + tl.arange(0, COLS)[None, :]
    x = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    # A real branch: two thirds of V3's columns are just loaded.
    if dim >= NOPE:
        pair = (dim - NOPE) // 2 + tl.arange(0, COLS // 2)
        angle = (row % positions)[:, None] * (ROPE // 2) + pair[None, :]
        cos = tl.load(cos_ptr + angle, mask=inside, other=1.0)
        sin = -tl.load(sin_ptr + angle, mask=inside, other=0.0)
        x = _turned(x, cos, sin, DTYPE).to(tl.float32)
    return x


@triton.jit(do_not_specialize=["positions"])
def _turn_back_quantize_both_kernel(
    dq_ptr, cos_ptr, sin_ptr, payload_ptr, scale_ptr, payload_t_ptr, scale_t_ptr, rows, cols, positions, q_token,
    q_head, POWER_OF_TWO: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A 128x128 square, as `quantize_tiles_both`; a 1x128 tile is joined of two halves, each within one head."""
    first_row = tl.program_id(0).to(tl.int64) * 128
    first_col = tl.program_id(1) * 128
    for chunk in tl.static_range(128 // ROWS):
        row = first_row + chunk * ROWS + tl.arange(0, ROWS)
        left = _load_turned_back(
            dq_ptr, cos_ptr, sin_ptr, row, first_col, rows, positions, q_token, q_head, NOPE, ROPE, 64
        )
        right = _load_turned_back(
            dq_ptr, cos_ptr, sin_ptr, row, first_col + 64, rows, positions, q_token, q_head, NOPE, ROPE, 64
        )
        x = tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), (ROWS, 128))
        col = first_col + tl.arange(0, 128)
        store_tiles_of_rows(x, payload_ptr, scale_ptr, row, col, rows, cols, POWER_OF_TWO)
    row = first_row + tl.arange(0, 128)
    for chunk in tl.static_range(128 // COLS):
        col = first_col + chunk * COLS
        x = _load_turned_back(dq_ptr, cos_ptr, sin_ptr, row, col, rows, positions, q_token, q_head, NOPE, ROPE, COLS)
        store_tiles_of_cols(x, payload_t_ptr, scale_t_ptr, row, col + tl.arange(0, COLS), rows, cols, POWER_OF_TWO)


@triton.jit
def _heads_quantize_both_kernel(
    dk_ptr, dv_ptr, payload_ptr, scale_ptr, payload_t_ptr, scale_t_ptr, rows, cols, k_token, k_head, v_token, v_head,
    POWER_OF_TWO: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """nope = v = 128: an even tile of kv_b_proj's gradient is of one head's key, an odd one of its value."""
    first_row = tl.program_id(0).to(tl.int64) * 128
    tile = tl.program_id(1)
    head = (tile // 2).to(tl.int64)
    if tile % 2 == 0:
        base = dk_ptr + head * k_head
        stride = k_token
    else:
        base = dv_ptr + head * v_head
        stride = v_token
    for chunk in tl.static_range(128 // ROWS):
        row, dim = first_row + chunk * ROWS + tl.arange(0, ROWS), tl.arange(0, 128)
        x = tl.load(base + row[:, None] * stride + dim[None, :], mask=(row < rows)[:, None], other=0.0).to(tl.float32)
        store_tiles_of_rows(x, payload_ptr, scale_ptr, row, tile * 128 + dim, rows, cols, POWER_OF_TWO)
    row = first_row + tl.arange(0, 128)
    for chunk in tl.static_range(128 // COLS):
        dim = chunk * COLS + tl.arange(0, COLS)
        x = tl.load(base + row[:, None] * stride + dim[None, :], mask=(row < rows)[:, None], other=0.0).to(tl.float32)
        store_tiles_of_cols(x, payload_t_ptr, scale_t_ptr, row, tile * 128 + dim, rows, cols, POWER_OF_TWO)


def _readable(x: Tensor) -> Tensor:
    """A head's dims side by side; a gradient may come expanded."""
    return x if x.stride(-1) == 1 else x.contiguous()


def heads_forward(q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the rotary dims of q [tokens, heads, nope + rope]; k from kv [tokens, heads, nope + v] and k_rope."""
    assert q.is_contiguous(), q.stride()
    assert k_rope.stride(1) == 1, k_rope.stride()
    kv = kv.contiguous()
    (tokens, heads, width), rope = q.shape, k_rope.shape[1]
    k = torch.empty_like(q)
    if q.numel():
        block = min(HEADS, triton.next_power_of_2(heads))
        _heads_forward_kernel[(triton.cdiv(tokens, TOKENS), triton.cdiv(heads, block))](
            q[..., width - rope :], kv[..., : width - rope], k_rope, k, cos, sin, tokens, len(cos), heads,
            k_rope.stride(0), width - rope, rope,
            kv.shape[2] - width + rope, TOKENS, block, triton.next_power_of_2(width - rope),
            triton.next_power_of_2(rope), num_warps=WARPS, **EXACT,
        )  # fmt: skip
    return k


def turn_back(dq: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """dq [tokens, heads, nope + rope], its rotary dims turned back, into `out` [tokens, heads * (nope + rope)]."""
    dq = _readable(dq)
    assert out.stride(1) == 1, out.stride()
    (tokens, heads, width), rope = dq.shape, 2 * cos.shape[1]
    if dq.numel():
        block = min(HEADS, triton.next_power_of_2(heads))
        _turn_back_kernel[(triton.cdiv(tokens, TOKENS), triton.cdiv(heads, block))](
            dq, out, cos, sin, tokens, len(cos), heads, *dq.stride()[:2], out.stride(0), width - rope, rope, TOKENS,
            block, triton.next_power_of_2(width - rope), triton.next_power_of_2(rope), num_warps=WARPS, **EXACT,
        )  # fmt: skip


def rope_key_backward(dk: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """The rotary dims of dk [tokens, heads, nope + rope] summed over heads and turned back, into [tokens, rope]."""
    dk = _readable(dk)
    assert out.stride(1) == 1, out.stride()
    (tokens, heads, width), rope = dk.shape, 2 * cos.shape[1]
    if dk.numel():
        _rope_key_backward_kernel[(triton.cdiv(tokens, KEY_TOKENS),)](
            dk[..., width - rope :], out, cos, sin, tokens, len(cos), heads, *dk.stride()[:2], out.stride(0), rope,
            KEY_TOKENS, KEY_HEADS, triton.next_power_of_2(rope), num_warps=WARPS, **EXACT,
        )  # fmt: skip


def turn_back_quantize_both(
    dq: Tensor, cos: Tensor, sin: Tensor, power_of_two: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`quantize_tiles_both` of the rows of `turn_back`: payload and scale in 1x128 tiles, then in 128x1."""
    dq = _readable(dq)
    (rows, heads, width), rope = dq.shape, 2 * cos.shape[1]
    cols = heads * width
    assert rope % 64 == 0, rope
    assert (width - rope) % 64 == 0, width
    assert cols % TILE == 0, cols
    payload, scale = empty_tiles(dq, rows, cols)
    payload_t, scale_t = empty_tiles(dq, cols, rows)
    if dq.numel():
        _turn_back_quantize_both_kernel[(triton.cdiv(rows, TILE), cols // TILE)](
            dq, cos, sin, payload, scale, payload_t, scale_t, rows, cols, len(cos), *dq.stride()[:2], power_of_two,
            width - rope, rope, ROWS, COLS_OF_Q, num_warps=WARPS, **EXACT,
        )  # fmt: skip
    return payload, scale, payload_t, scale_t


def heads_quantize_both(dk: Tensor, dv: Tensor, nope: int, power_of_two: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dk [tokens, heads, 128 + rope] without its rotary dims, and dv [tokens, heads, 128], as one gradient."""
    dk, dv = _readable(dk), _readable(dv)
    rows, heads, v = dv.shape
    assert nope == v == TILE, (nope, v)
    cols = heads * 2 * TILE
    payload, scale = empty_tiles(dk, rows, cols)
    payload_t, scale_t = empty_tiles(dk, cols, rows)
    if dv.numel():
        _heads_quantize_both_kernel[(triton.cdiv(rows, TILE), cols // TILE)](
            dk[..., :nope], dv, payload, scale, payload_t, scale_t, rows, cols, *dk.stride()[:2], *dv.stride()[:2],
            power_of_two, ROWS, COLS_OF_KV, num_warps=WARPS,
        )  # fmt: skip
    return payload, scale, payload_t, scale_t
