"""AdamW on FP32 masters, with moments stored in BF16 or FP32.

arXiv:2412.19437 §3.3.3 (BF16 moments, FP32 masters and gradients). Computed in fp32; a BF16 moment is rounded once,
when it is stored. All four tensors share one shape and may be sharded on any axis: the update is elementwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict, Unpack

import torch
from torch import Tensor

from kernels.operators import operator


class AdamWHyper(TypedDict):
    """Keyword arguments of one update; `step` counts from 1, decay is decoupled: master *= 1 - lr * weight_decay."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    step: int


def adamw_update_reference(
    master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, **hyper: Unpack[AdamWHyper]
) -> tuple[Tensor, Tensor, Tensor]:
    """Decoupled decay and bias correction written out in fp64, out of place: (master, exp_avg, exp_avg_sq)."""
    lr, (beta1, beta2), step = hyper["lr"], hyper["betas"], hyper["step"]
    g, w = grad.double(), master.double()
    m = beta1 * exp_avg.double() + (1 - beta1) * g
    v = beta2 * exp_avg_sq.double() + (1 - beta2) * g * g
    m_hat, v_hat = m / (1 - beta1**step), v / (1 - beta2**step)
    return w - lr * hyper["weight_decay"] * w - lr * m_hat / (v_hat.sqrt() + hyper["eps"]), m, v


def adamw_reference(
    master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, weight: Tensor, hyper: Sequence[float], step: int
) -> None:
    """One step in place, fp32, operator by operator; `weight` gets the new master, rounded.

    hyper: lr, beta1, beta2, eps, weight_decay.
    """
    lr, beta1, beta2, eps, weight_decay = hyper
    m, v = exp_avg.float(), exp_avg_sq.float()
    m.lerp_(grad, 1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = v.sqrt().div_((1 - beta2**step) ** 0.5).add_(eps)
    master.mul_(1 - lr * weight_decay).addcdiv_(m, denominator, value=-lr / (1 - beta1**step))
    # For fp32 moments m and v are the stored tensors themselves, and this copies nothing.
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)
    weight.copy_(master)


_adamw = operator(
    "adamw", adamw_reference, fake=lambda *_: None, gpu="adamw", mutates=("master", "exp_avg", "exp_avg_sq", "weight")
)


@torch.no_grad()
def adamw_update(
    master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, weight: Tensor | None = None,
    **hyper: Unpack[AdamWHyper],
) -> None:  # fmt: skip
    """One AdamW step in place on fp32 master and fp32 or bf16 moments; arXiv:1711.05101 Algorithm 2.

    `weight`, of any dtype and as many elements, gets the new master rounded, and its version is raised.
    """
    assert hyper["step"] >= 1, hyper["step"]
    assert master.dtype == grad.dtype == torch.float32, (master.dtype, grad.dtype)
    written = master if weight is None else weight
    numbers = hyper["lr"], *hyper["betas"], hyper["eps"], hyper["weight_decay"]
    _adamw(master, grad, exp_avg, exp_avg_sq, written, numbers, hyper["step"])
    # A kernel writes through an address, which raises none: cached FP8 copies would stay.
    torch.autograd.graph.increment_version(written)
