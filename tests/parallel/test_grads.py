"""Division and clipping of gradients against torch.nn.utils.clip_grad_norm_."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kernels import deferred
from parallel.grads import reduce_and_clip

SHAPES = ((1,), (63,), (5, 129), (3, 7, 11), (0, 4))


def make_params(*, scale: float, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    params = []
    for shape in SHAPES:
        parameter = nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16))
        parameter.main_grad = torch.randn(shape, generator=generator) * scale  # type: ignore[attr-defined]
        params.append(parameter)
    return params


def main_grad(parameter: nn.Parameter) -> Tensor:
    gradient: Tensor = parameter.main_grad  # type: ignore[attr-defined]
    return gradient


def clipped_by_torch(params: list[nn.Parameter], *, num_targets: int, max_norm: float) -> tuple[Tensor, list[Tensor]]:
    copies = [nn.Parameter(torch.zeros(p.shape)) for p in params]
    for copy, parameter in zip(copies, params, strict=True):
        copy.grad = main_grad(parameter) / num_targets
    norm = torch.nn.utils.clip_grad_norm_(copies, max_norm)
    return norm, [copy.grad for copy in copies if copy.grad is not None]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6], ids=["below", "near", "above"])
@pytest.mark.parametrize("num_targets", [1, 37, torch.tensor(4099)])
def test_division_norm_and_clipping_agree_with_torch(scale: float, num_targets: int | Tensor) -> None:
    params = make_params(scale=scale)
    norm, expected = clipped_by_torch(params, num_targets=int(num_targets), max_norm=1.0)
    result = reduce_and_clip(params, num_targets=num_targets, max_norm=1.0)
    # 1e-6: one division and one multiplication in another order, 6e-8 each, and a sum of 940 squares.
    torch.testing.assert_close(result.norm, norm, rtol=1e-6, atol=0.0)
    assert bool(result.finite)
    for parameter, gradient in zip(params, expected, strict=True):
        torch.testing.assert_close(main_grad(parameter), gradient, rtol=1e-6, atol=0.0)


def test_global_norm_is_one_after_clipping() -> None:
    params = make_params(scale=50.0)
    reduce_and_clip(params, num_targets=3, max_norm=1.0)
    squares = sum(float(main_grad(p).double().square().sum()) for p in params)
    # The guard 1e-6 in the denominator and fp32 roundings.
    assert squares**0.5 == pytest.approx(1.0, abs=1e-5)


def test_norm_agrees_with_float64_on_a_million_elements() -> None:
    parameter = nn.Parameter(torch.zeros(1000, 1000))
    parameter.main_grad = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(3))  # type: ignore[attr-defined]
    exact = float(main_grad(parameter).double().norm())
    result = reduce_and_clip([parameter], num_targets=1, max_norm=1e9)
    # Measured 1.0e-7 (rows of 1000); one fp32 sum over the million is off by 1.1e-5.
    assert float(result.norm) == pytest.approx(exact, rel=1e-6)


def test_a_repeated_parameter_counts_and_is_divided_once() -> None:
    once, twice = make_params(scale=1.0), make_params(scale=1.0)
    expected = reduce_and_clip(once, num_targets=10, max_norm=1.0)
    result = reduce_and_clip([*twice, twice[2], twice[0]], num_targets=10, max_norm=1.0)
    assert torch.equal(result.norm, expected.norm)
    assert all(torch.equal(main_grad(a), main_grad(b)) for a, b in zip(once, twice, strict=True))


def test_frozen_parameters_are_passed_over() -> None:
    params = make_params(scale=1.0)
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    expected = reduce_and_clip(make_params(scale=1.0), num_targets=1, max_norm=1.0)
    assert torch.equal(reduce_and_clip([frozen, *params], num_targets=1, max_norm=1.0).norm, expected.norm)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_gradient_is_flagged_and_all_gradients_stay_bit_for_bit(poison: float) -> None:
    params = make_params(scale=1.0)
    main_grad(params[2])[1, 5] = poison
    before = [main_grad(p).view(torch.int32).clone() for p in params]
    result = reduce_and_clip(params, num_targets=10, max_norm=1.0)
    assert not bool(result.finite)
    for parameter, bits in zip(params, before, strict=True):
        assert torch.equal(main_grad(parameter).view(torch.int32), bits)


def test_no_targets_counts_as_one() -> None:
    params = make_params(scale=0.0)
    result = reduce_and_clip(params, num_targets=torch.tensor(0), max_norm=1.0)
    assert float(result.norm) == 0.0
    assert bool(result.finite)
    assert all(torch.equal(main_grad(p), torch.zeros(p.shape)) for p in params)


def test_waiting_weight_gradients_are_an_error() -> None:
    params = make_params(scale=1.0)
    with deferred.deferred():
        deferred.push(lambda: None)
        with pytest.raises(RuntimeError):
            reduce_and_clip(params, num_targets=1, max_norm=1.0)
        deferred.take()()
    reduce_and_clip(params, num_targets=1, max_norm=1.0)
