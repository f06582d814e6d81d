"""Rotary position embedding with interleaved pairs, and YaRN's stretched frequency table.

arXiv:2412.19437 §2.1.1 (eq. 3 and 8) and §4.3 (YaRN, arXiv:2309.00071). Pair i of a vector holds dims (2i, 2i+1) and
turns by the angle position * theta^(-2i/dim). YaRN divides the slow frequencies by `factor`, keeps the fast ones, and
blends linearly between; it also sharpens the softmax. Released DeepSeek-V3 weights use the interleaved pair order.

Shapes: x [..., tokens, dim]; cos and sin [tokens, dim / 2] fp32. Leading dims may be sharded on any axis.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kernels.config import YarnScaling


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0


def yarn_softmax_factor(yarn: YarnScaling) -> float:
    """Factor m * m on the attention scale, m = 0.1 * mscale_all_dim * ln(factor) + 1; 1 without stretching."""
    return _mscale(yarn.factor, yarn.mscale_all_dim) ** 2


def _yarn_table_factor(yarn: YarnScaling) -> float:
    if yarn.mscale and yarn.mscale_all_dim:
        return _mscale(yarn.factor, yarn.mscale) / _mscale(yarn.factor, yarn.mscale_all_dim)
    return _mscale(yarn.factor, 1.0)


def _yarn_frequencies(frequencies: Tensor, theta: float, yarn: YarnScaling) -> Tensor:
    """Blend plain and slowed frequencies along the pair index, [dim / 2] fp32."""
    pairs = frequencies.numel()

    def pair_of(turns: float) -> float:
        wavelengths = yarn.original_max_position_embeddings / (turns * 2 * math.pi)
        return pairs * math.log(wavelengths) / math.log(theta)

    first = max(math.floor(pair_of(yarn.beta_fast)), 0)
    # transformers clamps to dim - 1, not to the last pair: kept, since released weights were served so.
    last = min(math.ceil(pair_of(yarn.beta_slow)), 2 * pairs - 1)
    # A ramp of zero length becomes a step.
    ramp = (torch.arange(pairs, dtype=torch.float32) - first) / max(last - first, 0.001)
    slowed = ramp.clamp(0, 1)
    return frequencies / yarn.factor * slowed + frequencies * (1 - slowed)


def rope_tables(positions: int, dim: int, theta: float, *, yarn: YarnScaling | None) -> tuple[Tensor, Tensor]:
    """Cosine and sine of positions 0 to `positions` - 1, each [positions, dim / 2] fp32 (arXiv:2104.09864 eq. 15)."""
    if dim % 2:
        raise ValueError(f"qk_rope_head_dim={dim} is odd: dims rotate in pairs, use an even value")
    frequencies = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    table_factor = 1.0
    if yarn is not None:
        frequencies = _yarn_frequencies(frequencies, theta, yarn)
        table_factor = _yarn_table_factor(yarn)
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * frequencies  # [positions, dim / 2]
    return angles.cos() * table_factor, angles.sin() * table_factor


def apply_rope_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotation written out: (a, b) -> (a cos - b sin, a sin + b cos). Same arguments as `apply_rope`."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    first, second = wide[..., 0::2], wide[..., 1::2]  # [..., tokens, dim / 2]
    turned = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)  # [..., tokens, dim]


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Multiply each pair of x, read as a complex number, by its turn [..., tokens, dim / 2]; not differentiable."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
    if wide.storage_offset() % 2:
        # Some columns of a wider row may be contiguous (one token) and yet begin in the middle of a pair.
        wide = wide.clone()
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))  # [..., tokens, dim / 2] complex
    return torch.view_as_real(pairs * turns).flatten(-2).to(x.dtype)


class _ApplyRope(torch.autograd.Function):
    """Backward is the opposite turn: nothing of x needs to be kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotate(x, torch.complex(cos, sin))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return rotate(grads[0], torch.complex(cos, -sin)), None, None


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn every adjacent pair of x [..., tokens, dim] by its position's angle, in fp32 (fp64 stays fp64)."""
    assert x.shape[-2:] == (cos.shape[0], 2 * cos.shape[1]), (x.shape, cos.shape)
    return _ApplyRope.apply(x, cos, sin)  # type: ignore[no-any-return, no-untyped-call]
