"""RMSNorm equals transformers' DeepseekV3RMSNorm, both ways, and keeps only x and one root a row."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.func import functional_call
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm

from kernels.rmsnorm import rmsnorm, rmsnorm_reference
from tests.kernels.gemm_inputs import beside_reference, kept_for_backward, relative_error

EPS = 1e-6


@pytest.mark.parametrize("rows", [1, 63, 129])
@pytest.mark.parametrize("dim", [96, 576])
def test_fp32_output_and_gradients_are_those_of_transformers(rows: int, dim: int) -> None:
    norm = DeepseekV3RMSNorm(dim, eps=EPS)
    x, weight = torch.randn(2, rows, dim, requires_grad=True), torch.randn(dim, requires_grad=True)
    output, of_x, of_weight = beside_reference(
        partial(rmsnorm, eps=EPS), lambda x, w: functional_call(norm, {"weight": w}, x), x, weight, dtype=torch.float32
    )
    # A mean of `dim` squares and a few products, 2^-24 each: 1e-6 relative to values up to about 5.
    torch.testing.assert_close(*output, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(*of_x, rtol=1e-5, atol=1e-5)
    # A sum over up to 258 rows of products of size 1-10: 258 * 2^-24 * 10 = 1.5e-4 at worst, 1e-5 typical.
    torch.testing.assert_close(*of_weight, rtol=1e-5, atol=5e-5)


def test_bf16_output_is_bit_equal_to_transformers_and_gradients_are_within_a_rounding() -> None:
    norm = DeepseekV3RMSNorm(256, eps=EPS).bfloat16()
    with torch.no_grad():
        norm.weight.normal_()
    x = torch.randn(129, 256).bfloat16().requires_grad_()
    weight = norm.weight.detach().clone().requires_grad_()
    # The rounding order is Hugging Face's, so nothing may differ.
    assert torch.equal(rmsnorm(x, weight, EPS), norm(x))
    _, *gradients = beside_reference(partial(rmsnorm, eps=EPS), partial(rmsnorm_reference, eps=EPS), x, weight)
    for got, want in gradients:
        assert got.dtype == torch.bfloat16
        # fp32 inside and one rounding to bf16, 2^-8 relative at most.
        assert relative_error(got, want) < 2**-8


def test_gradients_in_fp64() -> None:
    x = torch.randn(3, 2, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: rmsnorm(a, b, 1e-3), (x, weight))


def test_a_zero_row_gives_zero_and_a_finite_gradient() -> None:
    x = torch.zeros(1, 8, requires_grad=True)
    y = rmsnorm(x, torch.ones(8), EPS)
    y.backward(torch.ones(1, 8))
    assert torch.equal(y, torch.zeros(1, 8))
    # 1/sqrt(eps) = 1000 exactly enough: one fp32 root and division.
    torch.testing.assert_close(x.grad, torch.full((1, 8), 1000.0), rtol=1e-5, atol=0)


def test_only_x_the_gain_and_one_number_per_row_are_kept_for_backward() -> None:
    x, weight = torch.randn(129, 64, requires_grad=True), torch.ones(64, requires_grad=True)
    kept = kept_for_backward(lambda: rmsnorm(x, weight, EPS))
    assert sorted(tuple(tensor.shape) for tensor in kept) == [(64,), (129, 1), (129, 64)]
