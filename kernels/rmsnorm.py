"""RMSNorm: divide by the root mean square over the last dim, times a learned gain (arXiv:1910.07467 eq. 4).

arXiv:2412.19437 §2.1 (before attention and FFN, on the latents c_Q and c_KV, and in MTP eq. 21). The rounding order is
that of transformers 5.23 `DeepseekV3RMSNorm`: the normalised vector is rounded to x.dtype first, then multiplied by the
gain. Backward keeps x and one reciprocal root per row. Shapes: x [..., dim]; weight [dim]; dim may not be sharded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rmsnorm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm in plain torch, differentiable by autograd. Same arguments as `rmsnorm`."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    norm = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (weight * norm.to(x.dtype)).to(x.dtype)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)  # [..., 1]
        ctx.save_for_backward(x, weight, rstd)
        return (weight * (wide * rstd).to(x.dtype)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, rstd = ctx.saved_tensors
        wide_weight = weight.to(rstd.dtype)
        grad_y = grads[0].to(rstd.dtype)
        norm = x.to(rstd.dtype) * rstd  # [..., dim]
        products = grad_y * norm
        grad_weight = products.flatten(0, -2).sum(0)  # [dim]
        projection = (products @ wide_weight / weight.numel())[..., None]  # [..., 1]
        grad_x = torch.addcmul(grad_y * wide_weight, norm, projection, value=-1) * rstd
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise x [..., dim] by its root mean square, computed in fp32 (fp64 stays fp64), times weight [dim]."""
    assert x.shape[-1:] == weight.shape, (x.shape, weight.shape)
    y: Tensor = _RmsNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return y
