"""SwiGLU: silu(gate) * up, the activation of every dense and expert FFN; for experts times the router's gate.

arXiv:2002.05202 eq. 6; arXiv:2412.19437 §2.1.2 (FFN of eq. 12) and §3.3.3 (only the input is kept, in FP8; the output
is recomputed). The router's gate g of eq. 12 enters here and not where expert outputs are summed. W_down is linear, so
g * (W_down h) = W_down (g * h): the gradient that reaches down_proj is unscaled, the expert's output is needed by no
backward, and the gradient of g is a dot product over inter (2048) instead of hidden (7168).

Around an FP8 down_proj, h = silu(gate) * up * g is never in memory at full width:

    fprop:  gate_up -> gate_up in 1x128 tiles, to be kept; h in 1x128 tiles        `swiglu_quantize`
    wgrad:  kept    -> h in 128x1 tiles                                            `swiglu_quantize_transposed`
    dgrad:  kept, dh -> gradients of gate_up and of the gates                      `[gated_]swiglu_backward_kept`
    both:   kept, dh -> the gradient of gate_up in 1x128 and in 128x1 tiles        `swiglu_backward_quantize_both`

h is rounded to the input's dtype before it is quantised: the numbers are those of the separate calls.

Shapes: gate_up [rows, 2 * inter], gate first, fp32 or bf16, on a CPU any float dtype; gates [rows] fp32, 0 in padding
rows, None where not gated; dh and output [rows, inter]. Rows may be sharded on any axis; zero rows stay zero.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.formats import Quantized
from kernels.operators import operator
from kernels.quantize import (
    dequantize_tiles_reference,
    quantize_tiles_both_reference,
    quantize_tiles_reference,
    quantize_tiles_transposed_reference,
)
from kernels.tiles import empty_tiles


def _wide(dtype: torch.dtype) -> torch.dtype:
    """FP32, or FP64 for FP64: what arithmetic and the gates' gradient are in."""
    return torch.promote_types(dtype, torch.float32)


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """silu and product, each rounded to the input's dtype. Same arguments as `swiglu`."""
    gate, up = gate_up.contiguous().chunk(2, dim=-1)  # [rows, inter]
    return F.silu(gate).mul_(up)


def swiglu_backward_reference(gate_up: Tensor, dh: Tensor) -> Tensor:
    """Gradient of gate_up from that of the output; silu is computed again, products are rounded to the dtype."""
    gate, up = gate_up.contiguous().chunk(2, dim=-1)
    grad = torch.empty_like(gate_up, memory_format=torch.contiguous_format)  # [rows, 2 * inter]
    grad_gate, grad_up = grad.chunk(2, dim=-1)
    torch.mul(dh, F.silu(gate), out=grad_up)
    torch.ops.aten.silu_backward.grad_input(dh * up, gate, grad_input=grad_gate)
    return grad


def gated_swiglu_reference(gate_up: Tensor, gates: Tensor) -> Tensor:
    """silu(gate) * up * gates in fp32, rounded once. Same arguments as `gated_swiglu`."""
    gate, up = gate_up.contiguous().to(_wide(gate_up.dtype)).chunk(2, dim=-1)
    return F.silu(gate).mul_(up).mul_(gates[:, None]).to(gate_up.dtype)


def gated_swiglu_backward_reference(gate_up: Tensor, gates: Tensor, dh: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate_up, computed in fp32 and rounded once, and of the gates, [rows] fp32."""
    wide = _wide(gate_up.dtype)
    gate, up = gate_up.contiguous().to(wide).chunk(2, dim=-1)
    grad, silu = dh.to(wide), F.silu(gate)  # [rows, inter]
    grad_gates = (silu * up).mul_(grad).sum(dim=-1)  # [rows]
    gated = grad * gates[:, None]
    grad_gate_up = torch.empty_like(gate_up, memory_format=torch.contiguous_format)  # [rows, 2 * inter]
    grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
    grad_up.copy_(silu.mul_(gated))
    grad_gate.copy_(torch.ops.aten.silu_backward(gated.mul_(up), gate))
    return grad_gate_up, grad_gates


def swiglu_quantize_reference(
    gate_up: Tensor, gates: Tensor | None, power_of_two: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The input and the output, quantised apart. Same arguments as `swiglu_quantize`; two payloads, each its scale."""
    kept = quantize_tiles_reference(gate_up, power_of_two)
    return *kept, *quantize_tiles_reference(_activate_reference(gate_up, gates), power_of_two)


def swiglu_quantize_transposed_reference(
    payload: Tensor, scale: Tensor, gates: Tensor | None, dtype: torch.dtype, power_of_two: bool
) -> tuple[Tensor, Tensor]:
    """Dequantise, activate, quantise. Same arguments as `swiglu_quantize_transposed`; payload and scale."""
    h = _activate_reference(dequantize_tiles_reference(payload, scale, dtype), gates)
    return quantize_tiles_transposed_reference(h, power_of_two)


def swiglu_backward_kept_reference(payload: Tensor, scale: Tensor, dh: Tensor) -> Tensor:
    """`swiglu_backward_reference` of the dequantised input. Same arguments as `swiglu_backward_kept`."""
    return swiglu_backward_reference(dequantize_tiles_reference(payload, scale, dh.dtype), dh)


def gated_swiglu_backward_kept_reference(
    payload: Tensor, scale: Tensor, gates: Tensor, dh: Tensor
) -> tuple[Tensor, Tensor]:
    """`gated_swiglu_backward_reference` of the dequantised input. Same arguments as `gated_swiglu_backward_kept`."""
    return gated_swiglu_backward_reference(dequantize_tiles_reference(payload, scale, dh.dtype), gates, dh)


def swiglu_backward_quantize_both_reference(
    payload: Tensor, scale: Tensor, gates: Tensor | None, dh: Tensor, power_of_two: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients, quantised. Same arguments as `swiglu_backward_quantize_both`; without gates d_gates is a NaN [1]."""
    if gates is None:
        d_gates = dh.new_full((1,), float("nan"), dtype=_wide(dh.dtype))
        d_gate_up = swiglu_backward_kept_reference(payload, scale, dh)
    else:
        d_gate_up, d_gates = gated_swiglu_backward_kept_reference(payload, scale, gates, dh)
    return *quantize_tiles_both_reference(d_gate_up, power_of_two), d_gates


def _activate_reference(gate_up: Tensor, gates: Tensor | None) -> Tensor:
    return swiglu_reference(gate_up) if gates is None else gated_swiglu_reference(gate_up, gates)


def _allocate_output(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


def _allocate_gated_gradients(gate_up: Tensor, gates: Tensor, dh: Tensor) -> tuple[Tensor, Tensor]:
    return gate_up.new_empty(gate_up.shape), gate_up.new_empty(gate_up.shape[:1], dtype=_wide(gate_up.dtype))


def _allocate_both(gate_up: Tensor, gates: Tensor | None, power_of_two: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, cols = gate_up.shape
    return *empty_tiles(gate_up, rows, cols), *empty_tiles(gate_up, rows, cols // 2)


def _allocate_gated_gradients_kept(payload: Tensor, scale: Tensor, gates: Tensor, dh: Tensor) -> tuple[Tensor, Tensor]:
    return dh.new_empty(payload.shape), dh.new_empty(payload.shape[:1], dtype=_wide(dh.dtype))


def _allocate_gradients_both(
    payload: Tensor, scale: Tensor, gates: Tensor | None, dh: Tensor, power_of_two: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    d_gates = dh.new_empty(1 if gates is None else len(gates), dtype=_wide(dh.dtype))
    return *empty_tiles(dh, *payload.shape), *empty_tiles(dh, *payload.shape[::-1]), d_gates


_swiglu = operator("swiglu", swiglu_reference, fake=_allocate_output, gpu="swiglu")
_swiglu_backward = operator(
    "swiglu_backward",
    swiglu_backward_reference,
    fake=lambda gate_up, dh: gate_up.new_empty(gate_up.shape),
    gpu="swiglu",
)
_gated_swiglu = operator(
    "gated_swiglu", gated_swiglu_reference, fake=lambda gate_up, gates: _allocate_output(gate_up), gpu="swiglu"
)
_gated_swiglu_backward = operator(
    "gated_swiglu_backward", gated_swiglu_backward_reference, fake=_allocate_gated_gradients, gpu="swiglu"
)
_swiglu_quantize = operator("swiglu_quantize", swiglu_quantize_reference, fake=_allocate_both, gpu="swiglu")
_swiglu_quantize_transposed = operator(
    "swiglu_quantize_transposed",
    swiglu_quantize_transposed_reference,
    fake=lambda payload, *_: empty_tiles(payload, payload.shape[1] // 2, payload.shape[0]),
    gpu="swiglu",
)
_swiglu_backward_kept = operator(
    "swiglu_backward_kept",
    swiglu_backward_kept_reference,
    fake=lambda payload, scale, dh: dh.new_empty(payload.shape),
    gpu="swiglu",
)
_gated_swiglu_backward_kept = operator(
    "gated_swiglu_backward_kept",
    gated_swiglu_backward_kept_reference,
    fake=_allocate_gated_gradients_kept,
    gpu="swiglu",
)
_swiglu_backward_quantize_both = operator(
    "swiglu_backward_quantize_both",
    swiglu_backward_quantize_both_reference,
    fake=_allocate_gradients_both,
    gpu="swiglu",
)


class _SwiGlu(torch.autograd.Function):
    """Keeps gate_up, which the GEMM made anyway, and the gates; all else is computed again in backward."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, gates: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate_up, gates)
        return _swiglu(gate_up.detach()) if gates is None else _gated_swiglu(gate_up.detach(), gates.detach())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None]:
        gate_up, gates = ctx.saved_tensors
        if gates is None:
            return _swiglu_backward(gate_up, grads[0]), None
        return _gated_swiglu_backward(gate_up, gates, grads[0])


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, [rows, inter], each operation computed in fp32 and rounded to the input's dtype."""
    assert gate_up.shape[-1] % 2 == 0, gate_up.shape
    return _SwiGlu.apply(gate_up, None)  # type: ignore[no-any-return, no-untyped-call]


def gated_swiglu(gate_up: Tensor, gates: Tensor) -> Tensor:
    """silu(gate) * up * gates, [rows, inter], computed in fp32 and rounded once; the gates' gradient is fp32."""
    assert gate_up.shape[-1] % 2 == 0, gate_up.shape
    assert gates.shape == gate_up.shape[:1], (gates.shape, gate_up.shape)
    return _SwiGlu.apply(gate_up, gates)  # type: ignore[no-any-return, no-untyped-call]


def swiglu_quantize(gate_up: Tensor, gates: Tensor | None, *, power_of_two: bool) -> tuple[Quantized, Quantized]:
    """gate_up in 1x128 tiles, to be kept, and its activation in 1x128 tiles, to be multiplied; one read."""
    assert gate_up.shape[-1] % 2 == 0, gate_up.shape
    gates = None if gates is None else gates.detach()
    kept_payload, kept_scale, payload, scale = _swiglu_quantize(gate_up.detach(), gates, power_of_two)
    return Quantized(kept_payload, kept_scale), Quantized(payload, scale)


def swiglu_quantize_transposed(
    kept: Quantized, gates: Tensor | None, *, dtype: torch.dtype, power_of_two: bool
) -> Quantized:
    """The activation again, rounded to `dtype` (gate_up's), in 128x1 tiles, payload [inter, rows]: for wgrad."""
    return Quantized(*_swiglu_quantize_transposed(kept.payload, kept.scale, gates, dtype, power_of_two))


def swiglu_backward_kept(kept: Quantized, dh: Tensor) -> Tensor:
    """Gradient of `swiglu` at the input as it was kept, [rows, 2 * inter] in dh's dtype."""
    return _swiglu_backward_kept(kept.payload, kept.scale, dh)


def gated_swiglu_backward_kept(kept: Quantized, gates: Tensor, dh: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `gated_swiglu` at the input as it was kept: gate_up's in dh's dtype, the gates' fp32."""
    return _gated_swiglu_backward_kept(kept.payload, kept.scale, gates, dh)


def swiglu_backward_quantize_both(
    kept: Quantized, gates: Tensor | None, dh: Tensor, *, power_of_two: bool
) -> tuple[Quantized, Quantized, Tensor]:
    """The gradient of gate_up, never written in dh's dtype, in 1x128 and in 128x1 tiles; that of the gates, fp32.

    Without gates the last is one NaN [1], of which a carrier is made.
    """
    payload, scale, payload_t, scale_t, d_gates = _swiglu_backward_quantize_both(
        kept.payload, kept.scale, gates, dh, power_of_two
    )
    return Quantized(payload, scale), Quantized(payload_t, scale_t), d_gates
