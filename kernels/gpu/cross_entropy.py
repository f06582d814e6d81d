"""Device code of `kernels.cross_entropy`: loss and gradient of rows of logits, in place, in one launch.

A program holds whole rows' sums and reads its rows twice: first for the largest logit and the sum of exponentials, kept
apart for each column of a step and joined at the end, then for the gradient. The second reading finds a row of 129,280
BF16 logits, 259 kB, in the L2 cache if it is there; else it is 6 bytes an element instead of 4.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cross_entropy import IGNORE

# Elements of a program in one step, and its warps: 16 a thread. Not measured on a GPU.
ELEMENTS, WARPS = 4096, 8


@triton.jit
def _cross_entropy_kernel(
    logits_ptr, labels_ptr, losses_ptr, rows, vocab, gradient, IGNORE: tl.constexpr, DIFFERENTIATED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    label = tl.load(labels_ptr + row, mask=exists, other=IGNORE)
    valid = label != IGNORE
    # Read before the sums below: behind their barriers another warp may write it.
    target = tl.load(logits_ptr + row * vocab + label, mask=valid, other=0.0).to(tl.float32)
    largest = tl.full((ROWS, COLUMNS), -3.4028234663852886e38, tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, vocab, COLUMNS):
        col = first + tl.arange(0, COLUMNS)
        inside = exists[:, None] & (col < vocab)[None, :]
        place = row[:, None] * vocab + col[None, :]
        x = tl.load(logits_ptr + place, mask=inside, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, x)
        total = total * tl.exp(largest - larger) + tl.exp(x - larger)
        largest = larger
    top = tl.max(largest, axis=1)
    both = tl.sum(total * tl.exp(largest - top[:, None]), axis=1)
    # A row that does not exist has neither.
    log_sum = tl.where(exists, top, 0.0) + tl.log(tl.where(exists, both, 1.0))
    tl.store(losses_ptr + row, tl.where(valid, log_sum - target, 0.0), mask=exists)
    if DIFFERENTIATED:
        scale = tl.where(valid, gradient, 0.0)
        for first in range(0, vocab, COLUMNS):
            col = first + tl.arange(0, COLUMNS)
            inside = exists[:, None] & (col < vocab)[None, :]
            place = row[:, None] * vocab + col[None, :]
            x = tl.load(logits_ptr + place, mask=inside, other=0.0).to(tl.float32)
            hit = tl.where(col[None, :] == label[:, None], 1.0, 0.0)
            out = (tl.exp(x - log_sum[:, None]) - hit) * scale[:, None]
            tl.store(logits_ptr + place, out.to(logits_ptr.dtype.element_ty), mask=inside)


def cross_entropy(logits: Tensor, labels: Tensor, gradient: float | None) -> Tensor:
    """[rows] FP32 losses of logits [rows, vocab], which become their gradient if one is given."""
    assert logits.is_contiguous(), logits.stride()
    rows, vocab = logits.shape
    losses = logits.new_empty(rows, dtype=torch.float32)
    if rows:
        columns = min(ELEMENTS, triton.next_power_of_2(vocab))
        height = max(1, ELEMENTS // columns)
        _cross_entropy_kernel[(triton.cdiv(rows, height),)](
            logits, labels.contiguous(), losses, rows, vocab, gradient or 0.0, IGNORE, gradient is not None, height,
            columns, num_warps=WARPS,
        )  # fmt: skip
    return losses
