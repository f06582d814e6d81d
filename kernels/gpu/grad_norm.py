"""Device code of `kernels.grad_norm`: one launch, which reads each element once and squares it in FP64.

A product of two FP32 numbers is exact in FP64. Two FP64 operations and a conversion an element: a Hopper GPU has 16
conversions a cycle and multiprocessor, some 3.6e12 a second, and reads 0.8e12 FP32 elements.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.grad_norm import PART

# Elements of one step, and warps: 16 bytes of FP32 a thread and access. Not measured on a GPU.
ELEMENTS, WARPS = 2048, 4


@triton.jit
def _sums_of_squares_kernel(x_ptr, out_ptr, elements, PART: tl.constexpr, ELEMENTS: tl.constexpr):
    total = tl.zeros((ELEMENTS,), tl.float64)
    first = tl.program_id(0).to(tl.int64) * PART
    for start in range(0, PART, ELEMENTS):
        place = first + start + tl.arange(0, ELEMENTS)
        x = tl.load(x_ptr + place, mask=place < elements, other=0.0).to(tl.float64)
        total += x * x
    tl.store(out_ptr + tl.program_id(0), tl.sum(total, axis=0))


def sums_of_squares(x: Tensor) -> Tensor:
    """[ceil(elements / PART)] FP64."""
    assert x.dtype == torch.float32, x.dtype
    assert x.is_contiguous(), x.stride()
    parts = triton.cdiv(x.numel(), PART)
    out = x.new_empty(parts, dtype=torch.float64)
    if parts:
        _sums_of_squares_kernel[(parts,)](x, out, x.numel(), PART, ELEMENTS, num_warps=WARPS)
    return out
