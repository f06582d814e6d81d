"""The router's linear: FP32 logits, and both gradients, from an FP32 weight (arXiv:2412.19437 §2.1.2, eq. 15, §3.3.1).

    logits = x @ W.T          dx = dy @ W, rounded to x's dtype          dW = or += dy.T @ x, FP32

An x in FP32 is multiplied in FP32. On a GPU, a BF16 x meets the FP32 operand a on BF16 tensor cores, as hi + mid + lo:
its first 8 bits, the first 8 of the rest, and what is left. From 2^-110 on these are a exactly, 24 bits. Products are
exact as well, so only sums round. Every BLOCK terms of the contraction are summed apart, lo first and hi last, then
added to the total. With T the sum of |a x| over all terms, the error is at most T times

    `sum_error` = (1 + 2^-6) (17/16 BLOCK 2^-23 + terms / BLOCK 2^-24)        2^-16.0 for 7,168 terms

for a tensor core adds 16 products and the sum so far, each cut at 2^-23 of the largest, and cuts the result. (FP32
products added one by one: terms 2^-24, 2^-11.2.) dx rounds to BF16 at the end: there dy and W are two BF16 numbers
each, to nearest, without the product of the second ones: `DGRAD_ERROR` T at most. An infinite a becomes NaN.

Shapes: x [tokens, hidden] fp32 or bf16; weight [experts, hidden] fp32; logits, dy [tokens, experts] fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import deferred
from kernels.deferred import keep_weight, kept_weight
from kernels.operators import operator
from kernels.rmsnorm import KeptNorm, NormAgain

# Terms of the contraction that are summed apart.
BLOCK = 64
# The second number is up to 2^-8 of its operand, what is left 2^-17: 2^-16 + 2 * 2^-17, and products of small ones.
DGRAD_ERROR = 2**-15 * (1 + 2**-6)


def sum_error(terms: int) -> float:
    """Bound of the rounding of a sum of so many products on a GPU, relative to the sum of their magnitudes."""
    return (1 + 2**-6) * (17 / 16 * BLOCK * 2**-23 + terms / BLOCK * 2**-24)


def router_logits_reference(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T in FP32."""
    return x.float() @ weight.float().t()


def router_dgrad_reference(dy: Tensor, weight: Tensor, out_dtype: torch.dtype) -> Tensor:
    """dy @ weight in FP32, rounded once."""
    return (dy @ weight.float()).to(out_dtype)


def router_wgrad_reference(dy: Tensor, x: Tensor, out: Tensor, accumulate: bool) -> None:
    """out = or += dy.T @ x in FP32."""
    (out.add_ if accumulate else out.copy_)(dy.t() @ x.float())


_router_logits = operator(
    "router_logits",
    router_logits_reference,
    fake=lambda x, weight: x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32),
    flops=lambda x, weight, *, out_shape: 2 * x[0] * x[1] * weight[0],
    gpu="router_linear",
)
_router_dgrad = operator(
    "router_dgrad",
    router_dgrad_reference,
    fake=lambda dy, weight, out_dtype: dy.new_empty(dy.shape[0], weight.shape[1], dtype=out_dtype),
    flops=lambda dy, weight, *_, out_shape: 2 * dy[0] * dy[1] * weight[1],
    gpu="router_linear",
)
_router_wgrad = operator(
    "router_wgrad",
    router_wgrad_reference,
    fake=lambda dy, x, out, accumulate: None,
    flops=lambda dy, x, *_, out_shape: 2 * dy[0] * dy[1] * x[1],
    gpu="router_linear",
    mutates=["out"],
)


class _RouterLinear(torch.autograd.Function):
    """Keeps x, or what its norm makes x of again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, norm: KeptNorm | None) -> Tensor:
        ctx.save_for_backward(*((x,) if norm is None else norm.tensors))
        ctx.again = None if norm is None else norm.again
        ctx.dtype = x.dtype
        if norm is not None and weight.requires_grad:
            norm.again.reads_numbers()
        keep_weight(ctx, weight)
        return _router_logits(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        kept, weight = ctx.saved_tensors, kept_weight(ctx)
        again: NormAgain | None = ctx.again

        def product(out: Tensor, accumulate: bool) -> None:
            x = kept[0] if again is None else again.numbers(*kept)
            _router_wgrad(dy, x, out, accumulate)

        if weight.requires_grad:
            deferred.push(lambda: deferred.accumulate_product(weight, product))
        return _router_dgrad(dy, weight, ctx.dtype), None, None


def router_linear(x: Tensor, weight: Tensor, norm: KeptNorm | None = None) -> Tensor:
    """x [..., hidden] @ weight.T, FP32 whatever x is, with a deferred FP32 wgrad. With x's `norm`, x is not kept."""
    logits: Tensor = _RouterLinear.apply(x.flatten(0, -2), weight, norm)  # type: ignore[no-untyped-call]
    return logits.view(*x.shape[:-1], weight.shape[0])
