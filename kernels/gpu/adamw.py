"""Device code of `kernels.adamw`: one pass over gradient, master, moments and weight.

Of an element with BF16 moments 12 bytes are read and 10 written; the chain of torch operators moves about 110. Products
and sums round as there, one after the other: `enable_fp_fusion` is off. Source: arXiv:1711.05101, Algorithm 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a program, and its warps: 16 bytes of FP32 a thread and access. Not measured on a GPU.
ELEMENTS, WARPS = 1024, 4


# Specialised for a number of elements that 16 divides, or else no access is 16 bytes wide.
@triton.jit
def _adamw_kernel(
    master_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, weight_ptr, elements, beta1_rest, beta2, beta2_rest, decay, root,
    eps, rate, ELEMENTS: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = place < elements
    grad = tl.load(grad_ptr + place, mask=inside, other=0.0)
    m = tl.load(exp_avg_ptr + place, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(exp_avg_sq_ptr + place, mask=inside, other=0.0).to(tl.float32)
    master = tl.load(master_ptr + place, mask=inside, other=0.0)
    m += beta1_rest * (grad - m)
    v = v * beta2 + beta2_rest * (grad * grad)
    denominator = tl.div_rn(tl.sqrt_rn(v), tl.full((ELEMENTS,), root, tl.float32)) + eps
    master = master * decay - rate * tl.div_rn(m, denominator)
    tl.store(exp_avg_ptr + place, m.to(exp_avg_ptr.dtype.element_ty), mask=inside)
    tl.store(exp_avg_sq_ptr + place, v.to(exp_avg_sq_ptr.dtype.element_ty), mask=inside)
    tl.store(master_ptr + place, master, mask=inside)
    tl.store(weight_ptr + place, master.to(weight_ptr.dtype.element_ty), mask=inside)


def adamw(
    master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, weight: Tensor, hyper: Sequence[float], step: int
) -> None:
    """One step in place; `weight`, of as many elements, gets the new master rounded to its dtype."""
    lr, beta1, beta2, eps, weight_decay = hyper
    tensors = (master, grad, exp_avg, exp_avg_sq, weight)
    assert all(each.is_contiguous() and each.numel() == master.numel() for each in tensors)
    assert master.dtype == grad.dtype == torch.float32, (master.dtype, grad.dtype)
    if master.numel():
        _adamw_kernel[(triton.cdiv(master.numel(), ELEMENTS),)](
            *tensors, master.numel(), 1 - beta1, beta2, 1 - beta2, 1 - lr * weight_decay, (1 - beta2**step) ** 0.5, eps,
            lr / (1 - beta1**step), ELEMENTS=ELEMENTS, num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
