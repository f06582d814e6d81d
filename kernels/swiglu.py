"""SwiGLU: silu(gate) * up, the activation of every dense and expert FFN; for experts times the router's gate.

arXiv:2412.19437 §2.1.2 (FFN of eq. 12) and §3.3.1 (only the input is kept, the output is recomputed). One
GEMM makes gate and up side by side, so both arrive as one tensor.

The router's gate g of eq. 12 enters here and not where expert outputs are summed. W_down is linear, so
g * (W_down h) = W_down (g * h): the gradient that reaches down_proj is the token's own, unscaled (in FP8 it is
rounded once, on its way here), the expert's output is needed by no backward, and the gradient of g is a dot
product over inter (2048) instead of hidden (7168).

Shapes: gate_up [rows, 2 * inter], gate first; gates [rows] fp32; output [rows, inter]. Rows may be sharded on
any axis. It does not know about expert groups: zero rows stay zero, so padding passes through.
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


def gated_swiglu_reference(gate_up: Tensor, gates: Tensor) -> Tensor:
    """silu(gate) * up * gates in fp32, rounded once. Same arguments as `gated_swiglu`."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, dim=-1)
    return (F.silu(gate) * up * gates[:, None]).to(gate_up.dtype)


class _GatedSwiGlu(torch.autograd.Function):
    """Keeps gate_up and the gates; everything else is computed again in backward, in fp32."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, gates: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up, gates)
        gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, dim=-1)
        return F.silu(gate).mul_(up).mul_(gates[:, None]).to(gate_up.dtype)  # [rows, inter]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate_up, gates = ctx.saved_tensors
        wide = torch.promote_types(gate_up.dtype, torch.float32)
        gate, up = gate_up.to(wide).chunk(2, dim=-1)
        grad, silu = grads[0].to(wide), F.silu(gate)  # [rows, inter]
        grad_gates = (silu * up).mul_(grad).sum(dim=-1)  # [rows]
        gated = grad * gates[:, None]
        grad_gate_up = torch.empty_like(gate_up)  # [rows, 2 * inter]
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        grad_up.copy_(silu.mul_(gated))
        grad_gate.copy_(torch.ops.aten.silu_backward(gated.mul_(up), gate))
        return grad_gate_up, grad_gates


def gated_swiglu(gate_up: Tensor, gates: Tensor) -> Tensor:
    """silu(gate) * up * gates, computed in fp32 and rounded once to the input's dtype.

    Args:
        gate_up: [rows, 2 * inter], any float dtype; the first half is the gate of SwiGLU.
        gates: [rows] fp32, the router's gate of each row; 0 in padding rows.
    Returns:
        [rows, inter] in gate_up.dtype. The gradient of `gates` is fp32.
    Source: arXiv:2412.19437 eq. 12 with g_i moved before W_down; arXiv:2002.05202 eq. 6.
    """
    assert gate_up.shape[-1] % 2 == 0, gate_up.shape
    assert gates.shape == gate_up.shape[:1], (gates.shape, gate_up.shape)
    y: Tensor = _GatedSwiGlu.apply(gate_up, gates)  # type: ignore[no-untyped-call]
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


def _gated_bench_inputs(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    gate_up, grad = _bench_inputs(device)
    gates = torch.rand(4096, generator=torch.Generator().manual_seed(1)).to(device)
    return gate_up, gates, grad


def _gated_run(gate_up: Tensor, gates: Tensor, grad: Tensor) -> Tensor:
    return torch.autograd.grad(gated_swiglu(gate_up, gates), gate_up, grad)[0]


def _gated_peer(gate_up: Tensor, gates: Tensor, grad: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    y = (F.silu(gate) * up * gates[:, None]).to(gate_up.dtype)
    return torch.autograd.grad(y, gate_up, grad)[0]


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
    Bench(
        name="gated_swiglu forward+backward",
        make_inputs=_gated_bench_inputs,
        run=_gated_run,
        peer=_gated_peer,
        peer_name="(F.silu(gate) * up * gates) in fp32, autograd",
        # Both compute in fp32 and round the gradient to bf16 once: equal but where fp32 sits on a bf16 tie.
        tolerance=2**-12,
        flops=14.0 * 4096 * 256,
        bytes=9 * 2.0 * 4096 * 256,
    ),
)
