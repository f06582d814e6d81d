"""SwiGLU equals transformers' MLP activation, gate first, and backward recomputes from its input."""

from __future__ import annotations

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MLP

from kernels.swiglu import swiglu, swiglu_reference


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).detach().norm() / expected.detach().norm())


@pytest.mark.parametrize("rows", [1, 63, 129])
def test_fp32_output_and_gradient_are_those_of_transformers_mlp(rows: int) -> None:
    mlp = DeepseekV3MLP(DeepseekV3Config(hidden_size=48, intermediate_size=96))
    # With an identity for down_proj the MLP returns the activation itself.
    mlp.down_proj = torch.nn.Identity()
    x = torch.randn(rows, 48, requires_grad=True)
    ours = x.detach().clone().requires_grad_()
    expected = mlp(x)
    y = swiglu(ours @ torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)).T)
    grad = torch.randn_like(y)
    expected.backward(grad)
    y.backward(grad)
    # GEMMs over 48 and 192 terms in another order: about 200 * 2^-24 = 1.2e-5 at worst.
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.grad, x.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 63, 129])
def test_bf16_stays_within_its_roundings_of_fp64(rows: int) -> None:
    gate_up = torch.randn(rows, 192).bfloat16().requires_grad_()
    y = swiglu(gate_up)
    grad = torch.randn_like(y)
    y.backward(grad)
    exact = gate_up.detach().double().requires_grad_()
    expected = swiglu_reference(exact)
    expected.backward(grad.double())
    assert gate_up.grad is not None
    assert exact.grad is not None
    # Two bf16 roundings (silu or product, then result), each at most 2^-8: 2^-7.
    assert relative_error(y, expected) < 2**-7
    assert relative_error(gate_up.grad, exact.grad) < 2**-7


def test_gradient_in_fp64() -> None:
    gate_up = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(swiglu, gate_up)


def test_zero_rows_stay_zero_both_ways() -> None:
    gate_up = torch.zeros(128, 64, requires_grad=True)
    y = swiglu(gate_up)
    y.backward(torch.zeros_like(y))
    assert torch.equal(y, torch.zeros(128, 32))
    assert gate_up.grad is not None
    assert torch.equal(gate_up.grad, torch.zeros(128, 64))


def test_only_the_input_is_kept_for_backward() -> None:
    kept: list[tuple[int, ...]] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    gate_up = torch.randn(7, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        swiglu(gate_up)
    assert kept == [(7, 64)]
