"""Device code of `kernels.router_linear`: FP32 operands on BF16 tensor cores, as sums of BF16 numbers.

One program computes one tile of the output. FP32 tiles are split in registers, where they are loaded: no split copy
exists in memory. Not measured on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import shared_memory_bytes
from kernels.router_linear import BLOCK, router_dgrad_reference, router_logits_reference, router_wgrad_reference

# Rows of a tile of the output: experts, of dgrad tokens; its columns in fprop, tokens. V3's 256 experts and 4,096
# tokens are 128 programs forward and 112 of wgrad.
ROWS, TOKENS = 128, 64
WARPS = 8
# Columns of a tile in both gradients, channels, and pipeline stages: where 160 KB fit, and elsewhere (99 KB on 8.9).
CHANNELS, STAGES = 128, 3
CHANNELS_SMALL, STAGES_SMALL, SHARED_BYTES_WANTED = 64, 2, 160 * 1024


@triton.jit
def split(a):
    """The first 8 bits of FP32 a, a number of BF16, and the rest, both FP32. The rest of NaN is NaN."""
    hi = (a.to(tl.int32, bitcast=True) & -0x10000).to(tl.float32, bitcast=True)
    return hi, a - hi


@triton.jit
def nearest(a):
    """The BF16 number nearest to FP32 a, and that nearest to the rest."""
    hi = a.to(tl.bfloat16)
    return hi, (a - hi.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _split_product_kernel(
    a_ptr, b_ptr, out_ptr, M, N, K, a_stride_m, a_stride_k, b_stride_k, b_stride_n, out_stride_m, out_stride_n,
    ACCUMULATE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out = or += a @ b in FP32; a [M, K] FP32, b [K, N] BF16."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    col = tl.program_id(1).to(tl.int64) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        inner = (start + tl.arange(0, BK)).to(tl.int64)
        a_ptrs = a_ptr + row[:, None] * a_stride_m + inner[None, :] * a_stride_k
        b_ptrs = b_ptr + inner[:, None] * b_stride_k + col[None, :] * b_stride_n
        a = tl.load(a_ptrs, mask=(row < M)[:, None] & (inner < K)[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=(inner < K)[:, None] & (col < N)[None, :], other=0.0)
        hi, rest = split(a)
        mid, lo = split(rest)
        small = tl.dot(mid.to(tl.bfloat16), b, tl.dot(lo.to(tl.bfloat16), b))
        total += tl.dot(hi.to(tl.bfloat16), b, small)
    place = out_ptr + row[:, None] * out_stride_m + col[None, :] * out_stride_n
    inside = (row < M)[:, None] & (col < N)[None, :]
    if ACCUMULATE:
        total += tl.load(place, mask=inside, other=0.0)
    tl.store(place, total, mask=inside)


@triton.jit
def _router_dgrad_kernel(
    dy_ptr, weight_ptr, out_ptr, tokens, experts, hidden, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """out = dy @ weight, both FP32, of two numbers each; three of the four products."""
    token = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    channel = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, experts, BK):
        expert = start + tl.arange(0, BK)
        inside = (token < tokens)[:, None] & (expert < experts)[None, :]
        dy = tl.load(dy_ptr + token[:, None] * experts + expert[None, :], mask=inside, other=0.0)
        inside = (expert < experts)[:, None] & (channel < hidden)[None, :]
        weight = tl.load(weight_ptr + expert.to(tl.int64)[:, None] * hidden + channel[None, :], mask=inside, other=0.0)
        dy_hi, dy_rest = nearest(dy)
        weight_hi, weight_rest = nearest(weight)
        total += tl.dot(dy_hi, weight_hi, tl.dot(dy_hi, weight_rest, tl.dot(dy_rest, weight_hi)))
    inside = (token < tokens)[:, None] & (channel < hidden)[None, :]
    out = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token[:, None] * hidden + channel[None, :], out, mask=inside)


def _tile(x: Tensor) -> tuple[int, int]:
    """Channels and stages on x's device."""
    roomy = shared_memory_bytes(x) >= SHARED_BYTES_WANTED
    return (CHANNELS, STAGES) if roomy else (CHANNELS_SMALL, STAGES_SMALL)


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """x [tokens, hidden], weight [experts, hidden] fp32 -> [tokens, experts] fp32."""
    if x.dtype != torch.bfloat16:
        return router_logits_reference(x, weight)
    assert weight.dtype == torch.float32, weight.dtype
    x, weight = x.contiguous(), weight.contiguous()
    (tokens, hidden), experts = x.shape, len(weight)
    logits = torch.empty(tokens, experts, dtype=torch.float32, device=x.device)
    if tokens:
        _split_product_kernel[(triton.cdiv(experts, ROWS), triton.cdiv(tokens, TOKENS))](
            weight, x, logits, experts, tokens, hidden, hidden, 1, 1, hidden, 1, experts, ACCUMULATE=False, BM=ROWS,
            BN=TOKENS, BK=BLOCK, num_warps=WARPS, num_stages=_tile(x)[1],
        )  # fmt: skip
    return logits


def router_dgrad(dy: Tensor, weight: Tensor, out_dtype: torch.dtype) -> Tensor:
    """dy [tokens, experts] fp32, weight [experts, hidden] fp32 -> [tokens, hidden]."""
    if out_dtype != torch.bfloat16:
        return router_dgrad_reference(dy, weight, out_dtype)
    assert dy.dtype == weight.dtype == torch.float32, (dy.dtype, weight.dtype)
    dy, weight = dy.contiguous(), weight.contiguous()
    (tokens, experts), hidden = dy.shape, weight.shape[1]
    out = dy.new_empty(tokens, hidden, dtype=out_dtype)
    if tokens:
        channels, stages = _tile(dy)
        _router_dgrad_kernel[(triton.cdiv(tokens, ROWS), triton.cdiv(hidden, channels))](
            dy, weight, out, tokens, experts, hidden, BM=ROWS, BN=channels, BK=BLOCK, num_warps=WARPS,
            num_stages=stages,
        )  # fmt: skip
    return out


def router_wgrad(dy: Tensor, x: Tensor, out: Tensor, accumulate: bool) -> None:
    """out [experts, hidden] fp32 = or += dy.T @ x; dy [tokens, experts] fp32, x [tokens, hidden]."""
    if x.dtype != torch.bfloat16:
        router_wgrad_reference(dy, x, out, accumulate)
        return
    assert dy.dtype == out.dtype == torch.float32, (dy.dtype, out.dtype)
    assert out.is_contiguous()
    dy, x = dy.contiguous(), x.contiguous()
    (tokens, hidden), experts = x.shape, dy.shape[1]
    channels, stages = _tile(x)
    _split_product_kernel[(triton.cdiv(experts, ROWS), triton.cdiv(hidden, channels))](
        dy, x, out, experts, hidden, tokens, 1, experts, hidden, 1, hidden, 1, ACCUMULATE=accumulate, BM=ROWS,
        BN=channels, BK=BLOCK, num_warps=WARPS, num_stages=stages,
    )  # fmt: skip
