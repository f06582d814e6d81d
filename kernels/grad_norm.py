"""Sums of squares of flat FP32 gradients, for their global norm (arXiv:2412.19437 §4.2: clipping).

Each gradient is read once; what is left are partial sums of 16,384 squares each, in FP64. Shapes: x [elements], any
shard whose length is a multiple of 128.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.formats import TILE, ceil_div
from kernels.operators import operator

# Elements of a partial sum, whatever the device: were it chosen by the number of multiprocessors, the bits of the norm
# would depend on the GPU. A ZeRO shard of half a million elements still has 32 programs.
PART = 16384


def sums_of_squares_reference(x: Tensor) -> Tensor:
    """[ceil(elements / PART)] FP64."""
    # Norms of short rows first: one long fp32 vector norm on a CPU loses digits. Measured on 30 M elements, 1.7e-3 of
    # the norm; 4e-8 by rows of 128. Sums of their squares in fp64 make their order, and so the layout, count for less.
    squares = torch.linalg.vector_norm(x.view(-1, TILE), dim=-1).square().double()  # [rows]
    return F.pad(squares, (0, -len(squares) % (PART // TILE))).view(-1, PART // TILE).sum(1)


sums_of_squares = operator(
    "sums_of_squares",
    sums_of_squares_reference,
    fake=lambda x: x.new_empty(ceil_div(x.numel(), PART), dtype=torch.float64),
    gpu="grad_norm",
)
