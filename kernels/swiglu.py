"""SwiGLU: silu(gate) * up, the activation of every dense and expert FFN.

arXiv:2412.19437 §2.1.2 (FFN of eq. 12) and §3.3.1 (only the input is kept, the output is recomputed). One
GEMM makes gate and up side by side, so both arrive as one tensor.

Shapes: gate_up [rows, 2 * inter], gate first; output [rows, inter]. Rows may be sharded on any axis.
It does not know about expert groups: zero rows stay zero, so padding passes through.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.bench_entry import Bench


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """silu(gate) * up in fp32, rounded once. Same arguments as `swiglu`."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


class _SwiGlu(torch.autograd.Function):
    """Keeps gate_up, which the GEMM made anyway; silu is computed again in backward."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)  # [rows, inter]
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad = torch.empty_like(gate_up)  # [rows, 2 * inter]
        grad_gate, grad_up = grad.chunk(2, dim=-1)
        torch.mul(grads[0], F.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grads[0] * up, gate, grad_input=grad_gate)
        return grad


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, each operation computed in fp32 and rounded to the input's dtype.

    Args:
        gate_up: [rows, 2 * inter], any float dtype; the first half is the gate.
    Returns:
        [rows, inter] in gate_up.dtype.
    Source: arXiv:2002.05202 eq. 6.
    """
    assert gate_up.shape[-1] % 2 == 0, gate_up.shape
    y: Tensor = _SwiGlu.apply(gate_up)  # type: ignore[no-untyped-call]
    return y


def _bench_inputs(device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(4096, 512, generator=generator).to(device, torch.bfloat16)
    grad = torch.randn(4096, 256, generator=generator).to(device, torch.bfloat16)
    return gate_up.requires_grad_(), grad


def _run(gate_up: Tensor, grad: Tensor) -> Tensor:
    return torch.autograd.grad(swiglu(gate_up), gate_up, grad)[0]


def _peer(gate_up: Tensor, grad: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.autograd.grad(F.silu(gate) * up, gate_up, grad)[0]


BENCH = (
    Bench(
        name="swiglu forward+backward",
        make_inputs=_bench_inputs,
        run=_run,
        peer=_peer,
        peer_name="F.silu(gate) * up, autograd",
        # The same bf16 operations in the same order; one bf16 rounding (2^-8) for another way to silu.
        tolerance=2**-8,
        flops=12.0 * 4096 * 256,
        bytes=9 * 2.0 * 4096 * 256,
    ),
)
