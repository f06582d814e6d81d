"""Output head and softmax cross entropy in one, a sum over the rows that have a target (arXiv:2412.19437 §2.2 eq. 24).

    per chunk of rows    logits = x W.T                          in x's dtype, into one buffer
                         loss   = log sum exp(logits) - logits[label]          FP32; the logits become their gradient
                         dx = d_logits W,   dW += d_logits.T x                 dW straight into FP32 `main_grad`

So there are never more logits than those of a chunk, and backward only hands dx on: the gradient of a sum is a number
that is known beforehand, `scale` (docs/decisions/0012-chunked-loss.md). The sum is returned, not the mean: gradients
are divided once by the global number of targets, after they are reduced.
Shapes: x [rows, in]; weight [vocab, in]; labels [rows] int64, IGNORE without a target. Rows may be sharded, vocab not.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.deferred import accumulate_product, expect_backwards, keep_weight, kept_weight
from kernels.formats import ceil_div
from kernels.fp8_linear import wgrad
from kernels.operators import operator

IGNORE = -100
# Rows of a chunk. At an H100's 2.98 TB/s (a copy) and some 700 TFLOP/s in BF16, adding to dW in FP32, 8 bytes an
# element, takes as long as multiplying 940 rows. With twice as many it hides behind the product. Not measured.
CHUNK_ROWS = 2048
# Elements of one FP32 temporary of the reference: 1 MiB on a CPU, which stays in a core's L2 cache; 256 MiB on a GPU.
_CPU_ELEMENTS, _GPU_ELEMENTS = 1 << 18, 1 << 26


def cross_entropy_reference(logits: Tensor, labels: Tensor, gradient: float | None) -> Tensor:
    """-log softmax(logits)[label] of each row, FP32, nats; 0 without a target.

    With a gradient of these losses the logits become theirs, in place.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    rows = max(1, (_GPU_ELEMENTS if logits.is_cuda else _CPU_ELEMENTS) // logits.shape[1])
    valid = labels != IGNORE
    target = labels.where(valid, 0)[:, None]  # [rows, 1]
    losses = logits.new_empty(len(logits), dtype=wide)
    for chunk, chosen, known, out in zip(*(t.split(rows) for t in (logits, target, valid, losses)), strict=True):
        log_sum = chunk.to(wide).logsumexp(-1)
        out.copy_((log_sum - chunk.gather(1, chosen)[:, 0]).where(known, 0.0))
        if gradient is not None:
            probability = (chunk - log_sum[:, None]).exp_()
            probability.scatter_add_(1, chosen, torch.full_like(log_sum, -1.0)[:, None])
            chunk.copy_(probability.mul_((gradient * known.to(wide))[:, None]))
    return losses


cross_entropy = operator(
    "cross_entropy",
    cross_entropy_reference,
    fake=lambda logits, labels, gradient: logits.new_empty(
        len(logits), dtype=torch.promote_types(logits.dtype, torch.float32)
    ),
    gpu="cross_entropy",
    mutates=["logits"],
)


def chunk_rows(rows: int) -> int:
    """Rows of the largest chunk: chunks are as even as they can be."""
    return ceil_div(rows, max(1, ceil_div(rows, CHUNK_ROWS)))


def _loss_sum(x: Tensor, weight: Tensor, labels: Tensor, scale: float | None, dx: Tensor | None) -> Tensor:
    """The sum; with a scale also dx, if it is wanted, and the weight's gradient."""
    rows = max(1, chunk_rows(len(x)))
    buffer = x.new_empty(rows, len(weight))
    losses = []
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        logits = torch.mm(x[part], weight.t(), out=buffer[: len(x) - start])
        losses.append(cross_entropy(logits, labels[part], scale))
        if scale is not None and dx is not None:
            torch.mm(logits, weight, out=dx[part])
        if scale is not None and weight.requires_grad:
            accumulate_product(weight, partial(wgrad, logits, x[part]))
    return torch.cat(losses).sum() if losses else x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        dx = torch.empty_like(x) if x.requires_grad else None
        loss = _loss_sum(x, weight, labels, scale, dx)
        ctx.save_for_backward(dx)
        keep_weight(ctx, weight)
        expect_backwards(weight, 1)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        (dx,) = ctx.saved_tensors
        expect_backwards(kept_weight(ctx), -1)
        torch._assert_async(
            grad == ctx.scale, "linear_cross_entropy_sum: the loss was weighted otherwise than `scale` said"
        )
        return dx, None, None, None


def linear_cross_entropy_sum(x: Tensor, weight: Tensor, labels: Tensor, *, scale: float = 1.0) -> Tensor:
    """Sum of -log softmax(x @ weight.T)[label] over rows whose label is not IGNORE: FP32 scalar, nats; 0 without any.

    Where gradients are enabled this call adds `scale` times the weight's gradient to `main_grad` or `.grad`, and
    backward must come once, with `scale` as the gradient of the result: another one is an assertion, after which a
    process can't use its GPU; none, one where the step's gradients are reduced.

    Args:
        x: [rows, in], of the weight's dtype.
        weight: [vocab, in].
        labels: [rows] int64.
        scale: the factor of this sum in what is differentiated.
    """
    valid = labels != IGNORE
    in_range = (labels >= 0) & (labels < len(weight))
    # Our own invariant (the store checks ids against the vocabulary); this form does not synchronise a GPU.
    torch._assert_async((in_range | ~valid).all(), "linear_cross_entropy_sum: a label lies outside the vocabulary")
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _LinearCrossEntropy.apply(x, weight, labels, scale)  # type: ignore[no-any-return, no-untyped-call]
    return _loss_sum(x, weight, labels, None, None)
