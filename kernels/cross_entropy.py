"""Softmax cross entropy, fp32, as a sum over the rows that have a target (arXiv:2412.19437 §2.2 eq. 24).

The sum is returned, not the mean: gradients are divided once by the global number of targets, after they are reduced.
Rows are taken in chunks, and there is never an fp32 copy of all logits; backward recomputes the softmax from one
log-sum-exp per row. Shapes: logits [rows, vocab]; labels [rows] int64. Rows may be sharded, vocab not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.operators import operator

IGNORE = -100
# Elements of one fp32 chunk: 1 MiB on a CPU, which stays in a core's L2 cache; 256 MiB on a GPU, where each chunk costs
# launches (not measured on one).
_CPU_CHUNK_ELEMENTS, _GPU_CHUNK_ELEMENTS = 1 << 18, 1 << 26


def cross_entropy_sum_reference(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy from an fp32 log-softmax of everything. Same arguments as `cross_entropy_sum`."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    valid = labels != IGNORE
    picked = wide.log_softmax(-1).gather(1, labels.where(valid, 0)[:, None])[:, 0]  # [rows]
    return -picked.where(valid, 0.0).sum()


def _chunk_rows(logits: Tensor) -> int:
    elements = _GPU_CHUNK_ELEMENTS if logits.is_cuda else _CPU_CHUNK_ELEMENTS
    return max(1, elements // logits.shape[1])


def chunked_forward(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The sum and one log-sum-exp per row."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_sums = [chunk.to(wide).logsumexp(-1) for chunk in logits.split(_chunk_rows(logits))]
    log_sum = torch.cat(log_sums) if log_sums else logits.new_zeros(0, dtype=wide)  # [rows]
    valid = labels != IGNORE
    picked = logits.gather(1, labels.where(valid, 0)[:, None])[:, 0]  # [rows]
    return (log_sum - picked).where(valid, 0.0).sum(), log_sum


def chunked_backward(grad_sum: Tensor, logits: Tensor, labels: Tensor, log_sum: Tensor) -> Tensor:
    """The gradient of the logits, the softmax made again chunk by chunk."""
    rows = _chunk_rows(logits)
    row_grad = grad_sum * (labels != IGNORE)[:, None]  # [rows, 1]
    target = labels.where(labels != IGNORE, 0)[:, None]
    grad = torch.empty_like(logits)  # [rows, vocab]
    chunks = (t.split(rows) for t in (logits, log_sum, target, row_grad, grad))
    for chunk, chunk_sum, chunk_target, chunk_grad, out in zip(*chunks, strict=True):
        probability = (chunk - chunk_sum[:, None]).exp_()
        probability.scatter_add_(1, chunk_target, torch.full_like(chunk_sum, -1.0)[:, None])
        torch.mul(probability, chunk_grad, out=probability)
        out.copy_(probability)
    return grad


def _allocate_sums(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty((), dtype=wide), logits.new_empty(logits.shape[0], dtype=wide)


_cross_entropy = operator("cross_entropy", chunked_forward, fake=_allocate_sums)
_cross_entropy_backward = operator(
    "cross_entropy_backward", chunked_backward, fake=lambda grad_sum, logits, labels, log_sum: torch.empty_like(logits)
)


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        loss, log_sum = _cross_entropy(logits, labels)
        ctx.save_for_backward(logits, labels, log_sum)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _cross_entropy_backward(grads[0], *ctx.saved_tensors), None


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of -log softmax(logits)[label] over rows whose label is not IGNORE: fp32 scalar, nats; 0 without any."""
    valid = labels != IGNORE
    in_range = (labels >= 0) & (labels < logits.shape[1])
    # Our own invariant (the store checks ids against the vocabulary); this form does not synchronise a GPU.
    torch._assert_async((in_range | ~valid).all(), "cross_entropy_sum: a label lies outside the vocabulary")
    loss: Tensor = _CrossEntropySum.apply(logits, labels)  # type: ignore[no-untyped-call]
    return loss
