"""SwiGLU equals transformers' MLP activation, gate first, and backward recomputes from its input; gated as well."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MLP

from kernels.swiglu import gated_swiglu, gated_swiglu_reference, swiglu, swiglu_reference
from tests.kernels.gemm_inputs import beside_reference, kept_for_backward, relative_error


@pytest.mark.parametrize("rows", [1, 63, 129])
def test_fp32_output_and_gradient_are_those_of_transformers_mlp(rows: int) -> None:
    mlp = DeepseekV3MLP(DeepseekV3Config(hidden_size=48, intermediate_size=96))
    # With an identity for down_proj the MLP returns the activation itself.
    mlp.down_proj = torch.nn.Identity()
    gate_up = torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight))
    x = torch.randn(rows, 48, requires_grad=True)
    for found, expected in beside_reference(lambda x: swiglu(x @ gate_up.T), mlp, x, dtype=torch.float32):
        # GEMMs over 48 and 192 terms in another order: about 200 * 2^-24 = 1.2e-5 at worst.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 63, 129])
def test_bf16_stays_within_its_roundings_of_fp64(rows: int) -> None:
    gate_up = torch.randn(rows, 192).bfloat16().requires_grad_()
    for found, exact in beside_reference(swiglu, swiglu_reference, gate_up):
        # Two bf16 roundings (silu or product, then result), each at most 2^-8: 2^-7.
        assert relative_error(found, exact) < 2**-7


# Each with the shape of its inputs behind the rows.
BOTH = pytest.mark.parametrize(
    ("activation", "shapes"), [(swiglu, [(64,)]), (gated_swiglu, [(64,), ()])], ids=["plain", "gated"]
)


@BOTH
def test_gradients_in_fp64(activation: Callable[..., torch.Tensor], shapes: list[tuple[int, ...]]) -> None:
    inputs = tuple(torch.randn(3, *shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    assert torch.autograd.gradcheck(activation, inputs)


@BOTH
def test_zero_rows_stay_zero_both_ways_and_only_inputs_are_kept(
    activation: Callable[..., torch.Tensor], shapes: list[tuple[int, ...]]
) -> None:
    inputs = [torch.zeros(128, *shape, requires_grad=True) for shape in shapes]
    assert [tuple(kept.shape) for kept in kept_for_backward(lambda: activation(*inputs))] == [(128, *s) for s in shapes]
    y = activation(*inputs)
    y.backward(torch.zeros_like(y))
    assert torch.equal(y, torch.zeros(128, 32))
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in inputs)


@pytest.mark.parametrize("rows", [1, 63, 129])
def test_a_gate_before_down_proj_equals_a_gate_after_it(rows: int) -> None:
    """Against transformers' MLP times the gate, as eq. 12 is written; outputs and every gradient, FP32."""
    mlp = DeepseekV3MLP(DeepseekV3Config(hidden_size=48, intermediate_size=96))
    x = torch.randn(rows, 48, requires_grad=True)
    gates = torch.rand(rows, requires_grad=True)
    expected = mlp(x) * gates[:, None]
    gate_up = torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight))
    y = gated_swiglu(x @ gate_up.T, gates) @ mlp.down_proj.weight.T
    grad = torch.randn_like(y)
    inputs = (x, gates, mlp.down_proj.weight, mlp.gate_proj.weight, mlp.up_proj.weight)
    want = torch.autograd.grad(expected, inputs, grad)
    got = torch.autograd.grad(y, inputs, grad)
    # Sums of up to 192 terms in another order: about 200 * 2^-24 = 1.2e-5 of the whole at worst.
    for a, b in zip((y, *got), (expected, *want), strict=True):
        assert relative_error(a, b.double()) < 1e-5


@pytest.mark.parametrize("rows", [1, 63, 129])
def test_gated_bf16_is_rounded_once_and_its_gates_have_fp32_gradients(rows: int) -> None:
    gate_up = torch.randn(rows, 192).bfloat16().requires_grad_()
    gates = torch.rand(rows, requires_grad=True)
    *rounded, (of_gates, exact_of_gates) = beside_reference(gated_swiglu, gated_swiglu_reference, gate_up, gates)
    # One bf16 rounding: at most 2^-8 of each element. (Two of them would exceed it somewhere.)
    for found, exact in rounded:
        assert bool(((found.double() - exact).abs() <= 1.001 * 2**-8 * exact.abs() + 1e-30).all())
    assert of_gates.dtype == torch.float32
    # 96 products and their sum in FP32: sqrt(96) * 2^-24 = 6e-7; the sum may cancel, hence the norm over all rows.
    assert relative_error(of_gates, exact_of_gates) < 5e-6
