"""AdamW on FP32 masters, with moments stored in BF16 or FP32.

arXiv:2412.19437 §3.3.3 (BF16 moments, FP32 masters and gradients) and §4.2 (betas 0.9 and 0.95, decay 0.1).
Everything is computed in fp32; a BF16 moment is rounded once, when it is stored.

Shapes: all four tensors share one shape, any, and may be sharded on any axis: the update is elementwise.
It does not clip, does not choose which parameters decay and does not copy masters into model weights.
"""

from __future__ import annotations

from typing import TypedDict, Unpack

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from kernels.bench_entry import Bench


class AdamWHyper(TypedDict):
    """Keyword arguments of one update.

    Args:
        lr: learning rate of this step.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled, master *= 1 - lr * weight_decay.
        step: number of this step, counted from 1.
    """

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    step: int


def adamw_update_reference(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    **hyper: Unpack[AdamWHyper],
) -> tuple[Tensor, Tensor, Tensor]:
    """Decoupled decay and bias correction written out in fp64, out of place.

    Takes the arguments of `adamw_update`; returns (master, exp_avg, exp_avg_sq).
    """
    lr, (beta1, beta2), step = hyper["lr"], hyper["betas"], hyper["step"]
    g, w = grad.double(), master.double()
    m = beta1 * exp_avg.double() + (1 - beta1) * g
    v = beta2 * exp_avg_sq.double() + (1 - beta2) * g * g
    m_hat, v_hat = m / (1 - beta1**step), v / (1 - beta2**step)
    return w - lr * hyper["weight_decay"] * w - lr * m_hat / (v_hat.sqrt() + hyper["eps"]), m, v


@torch.no_grad()
def adamw_update(
    master: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    **hyper: Unpack[AdamWHyper],
) -> None:
    """One AdamW step, in place on `master` and both moments.

    Args:
        master: fp32 weights.
        grad: fp32 gradient.
        exp_avg: first moment, fp32 or bf16.
        exp_avg_sq: second moment, same dtype as exp_avg.
        hyper: lr, betas, eps, weight_decay and step, see `AdamWHyper`.
    Source: arXiv:1711.05101 Algorithm 2; arXiv:2412.19437 §3.3.3.
    """
    lr, (beta1, beta2), step = hyper["lr"], hyper["betas"], hyper["step"]
    assert step >= 1, step
    assert master.dtype == grad.dtype == torch.float32, (master.dtype, grad.dtype)
    m, v = exp_avg.float(), exp_avg_sq.float()
    m.lerp_(grad, 1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = v.sqrt().div_((1 - beta2**step) ** 0.5).add_(hyper["eps"])
    master.mul_(1 - lr * hyper["weight_decay"]).addcdiv_(m, denominator, value=-lr / (1 - beta1**step))
    # For fp32 moments m and v are the stored tensors themselves, and this copies nothing.
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)


def _bench_inputs(device: torch.device) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    master, grad, exp_avg = torch.randn(3, 1 << 20, generator=generator).to(device)
    return master, grad, exp_avg, exp_avg.square()


def _run(master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> Tensor:
    adamw_update(master, grad, exp_avg, exp_avg_sq, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, step=2)
    return master


def _peer(master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> Tensor:
    torch_adamw(
        [master], [grad], [exp_avg], [exp_avg_sq], [], [torch.tensor(1.0)], foreach=False, fused=True,
        amsgrad=False, beta1=0.9, beta2=0.95, lr=1e-3, weight_decay=0.1, eps=1e-8, maximize=False,
    )  # fmt: skip
    return master


BENCH = (
    Bench(
        name="adamw",
        make_inputs=_bench_inputs,
        run=_run,
        peer=_peer,
        peer_name="torch fused AdamW",
        # About eight fp32 roundings (2^-24 each) of an update that is itself small beside the weight.
        tolerance=2**-21,
        flops=14.0 * (1 << 20),
        bytes=7 * 4.0 * (1 << 20),
    ),
)
