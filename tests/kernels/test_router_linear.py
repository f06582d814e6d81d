"""The router's products on BF16 tensor cores, interpreted: split weights are exact, sums stay inside their bound.

A tensor core is modelled (`cut_dot`): 16 products and the sum so far, each cut at 2^-23 of the largest.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels import deferred
from kernels.rmsnorm import add_rmsnorm
from kernels.router import select_experts
from kernels.router_linear import BLOCK, DGRAD_ERROR, router_linear, sum_error

pytest.importorskip("triton", reason="Triton exists on Linux only; CI runs this file")

from triton.runtime import interpreter

from kernels.gpu import router_linear as gpu
from tests.kernels.triton_interpreter import _as_fp32

# Two or three tiles, the last ragged, and two blocks of the contraction.
TOKENS, EXPERTS, HIDDEN = 33, 17, 80


def cut_dot(self: Any, a: Any, b: Any, c: Any, *_: Any) -> Any:
    """a @ b + c as a tensor core that truncates adds it."""
    left, right, total = (_as_fp32(each).astype(np.float64) for each in (a, b, c))
    for k in range(0, left.shape[1], 16):
        terms = np.concatenate([total[:, None], left[:, k : k + 16, None] * right[None, k : k + 16]], axis=1)
        for _ in range(2):  # the terms, then their sum
            unit = np.exp2(np.frexp(np.abs(terms).max(axis=1))[1] - 24.0)
            total = np.trunc(terms / unit[:, None]).sum(axis=1) * unit
            terms = total[:, None]
    return interpreter.TensorHandle(total.astype(np.float32), c.dtype.scalar)


@pytest.fixture
def tensor_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", cut_dot)
    for name, value in {"ROWS": 16, "TOKENS": 16, "CHANNELS": 64}.items():
        monkeypatch.setattr(gpu, name, value)


def awkward(*shape: int) -> Tensor:
    """FP32 numbers with all bits set somewhere, of very different size, and every kind of carry."""
    bits = torch.randint(-(2**31), 2**31, shape).bitwise_and(~0x7F800000).int()
    numbers = (bits | ((torch.randint(-40, 40, shape) + 127) << 23).int()).view(torch.float32)
    special = torch.tensor([0.0, -1.0, 1 + 2**-8, 1 - 2**-24, 2 - 2**-23, -(1 + 2**-16 + 2**-23), 2.0**-110, 3e38])
    numbers.view(-1)[: len(special)] = special
    return numbers


@pytest.mark.usefixtures("tensor_core")
def test_three_terms_are_the_number_itself() -> None:
    """x = 1 at one place of each row: what comes out is the FP32 operand, bit for bit."""
    a, x = awkward(EXPERTS, HIDDEN), torch.eye(HIDDEN).bfloat16()
    assert torch.equal(gpu.router_logits(x, a), a.t())
    dw = torch.empty(EXPERTS, HIDDEN)
    gpu.router_wgrad(a.t(), x, dw, False)
    assert torch.equal(dw, a)


def same_sign(*shape: int) -> Tensor:
    """Nothing cancels, and every cut goes the same way."""
    return 1 + torch.rand(shape)


def cancelling(*shape: int) -> Tensor:
    """Pairs of nearly opposite numbers of very different size."""
    numbers = torch.randn(shape) * torch.exp2(torch.randint(-12, 12, shape))
    numbers[..., 1::2] = -numbers[..., : shape[-1] // 2 * 2 : 2] * (1 + 2**-14)
    return numbers


def share_of_bound(found: Tensor, a: Tensor, b: Tensor, bound: float, rounding: float) -> float:
    exact, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    return float(((found.double() - exact).abs() / (bound * size + rounding * exact.abs())).max())


@pytest.mark.usefixtures("tensor_core")
@pytest.mark.parametrize("make", [same_sign, cancelling])
def test_errors_stay_inside_the_bound(make: Any) -> None:
    x, weight, dy = make(TOKENS, HIDDEN).bfloat16(), make(EXPERTS, HIDDEN), make(TOKENS, EXPERTS)
    before = torch.randn(EXPERTS, HIDDEN)
    added, written = before.clone(), torch.full_like(before, float("nan"))
    gpu.router_wgrad(dy, x, added, True)
    gpu.router_wgrad(dy, x, written, False)
    logits = share_of_bound(gpu.router_logits(x, weight), x, weight.t(), sum_error(HIDDEN), 0)
    assert logits < 1
    # A bound far from what happens would prove nothing: one block of 64, where all is cut the same way.
    assert make is not same_sign or logits > 2**-6
    assert share_of_bound(written, dy.t(), x, sum_error(TOKENS), 0) < 1
    # The last addition, and BF16's last rounding.
    assert float((added - before - written).abs().max()) <= 2**-23 * float(added.abs().max() + before.abs().max())
    dx = gpu.router_dgrad(dy, weight, torch.bfloat16)
    assert share_of_bound(dx, dy, weight, (sum_error(EXPERTS) + DGRAD_ERROR) * (1 + 2**-8), 2**-8) < 1


@pytest.mark.usefixtures("tensor_core")
def test_long_sums_stay_inside_it_too() -> None:
    """2,048 terms in one sum are cut by twice the bound."""
    x, weight = same_sign(16, 2048).bfloat16(), same_sign(16, 2048)
    assert share_of_bound(gpu.router_logits(x, weight), x, weight.t(), sum_error(2048), 0) < 1


def test_outside_the_margin_experts_are_those_of_fp32() -> None:
    """A score moves by a quarter of its logit at most: a choice can differ where two come closer than both errors."""
    experts, groups, hidden, how = 64, 8, 320, {"n_group": 8, "topk_group": 4, "topk": 8}
    x, weight, bias = (
        torch.randn(128, hidden).bfloat16(),
        0.05 * torch.randn(experts, hidden),
        0.1 * torch.rand(experts),
    )
    size = (x.double().abs() @ weight.double().abs().t()).amax(-1)  # [tokens]
    # FP32's own products, ours, and four FP32 operations from logit to biased score of each.
    error = (hidden * 2**-24 + sum_error(hidden)) * size / 4 + 2 * 4 * 2**-23
    biased = (x.double() @ weight.double().t()).sigmoid() + bias
    best = biased.view(-1, groups, experts // groups).topk(2).values.sum(-1).sort(-1, descending=True)
    kept = torch.zeros_like(best.values).scatter_(1, best.indices[:, :4], 1.0).repeat_interleave(experts // groups, 1)
    allowed = biased.masked_fill(kept == 0, -1.0).sort(-1, descending=True).values
    clear = (best.values[:, 3] - best.values[:, 4] > 4 * error) & (allowed[:, 7] - allowed[:, 8] > 2 * error)
    assert float(clear.double().mean()) > 0.9

    def chosen(logits: Tensor) -> Tensor:
        return select_experts(logits.sigmoid(), bias, **how)[clear].sort(-1).values

    expected = chosen(x.float() @ weight.t())
    assert torch.equal(chosen(gpu.router_logits(x, weight)), expected)
    # Weights of one term choose otherwise there.
    assert not torch.equal(chosen(x.float() @ weight.bfloat16().float().t()), expected)


def test_nan_stays_nan() -> None:
    x, weight, dy = torch.randn(5, 40).bfloat16(), torch.randn(7, 40), torch.randn(5, 7)
    # All bits set, as a GPU makes it.
    weight[2, 3], dy[1, 4] = torch.tensor([-1], dtype=torch.int32).view(torch.float32), float("nan")
    assert gpu.router_logits(x, weight).isnan().nonzero().tolist() == [[token, 2] for token in range(5)]
    dx = gpu.router_dgrad(dy, weight, torch.bfloat16)
    assert bool(dx[1].isnan().all())
    assert bool(dx[:, 3].isnan().all())
    dw = torch.empty(7, 40)
    gpu.router_wgrad(dy, x, dw, False)
    assert dw.isnan().nonzero()[:, 0].unique().tolist() == [4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_linear_is_fp32_and_its_first_weight_gradient_replaces(dtype: torch.dtype) -> None:
    weight = torch.nn.Parameter(torch.randn(9, 40))
    weight.main_grad = torch.full((9, 40), float("nan"))  # type: ignore[attr-defined]
    deferred.forget(weight)
    expected = torch.zeros(9, 40)
    for _ in range(2):
        x, dy = torch.randn(3, 21, 40).to(dtype).requires_grad_(), torch.randn(3, 21, 9)
        logits = router_linear(x, weight)
        logits.backward(dy)
        wide, flat = x.detach().float().flatten(0, 1), dy.flatten(0, 1)
        assert torch.equal(logits.flatten(0, 1), wide @ weight.t())
        assert x.grad is not None
        assert torch.equal(x.grad.flatten(0, 1), (flat @ weight).to(dtype))
        expected += flat.t() @ wide
        assert torch.equal(weight.main_grad, expected)


def test_an_input_that_its_norm_makes_again_gives_the_same_bits() -> None:
    x, gain = torch.randn(2, 65, 40).bfloat16().requires_grad_(), torch.rand(40).bfloat16()
    grads = []
    for again in (True, False):
        weight = torch.nn.Parameter(torch.ones(9, 40).cumsum(0) / 7)
        _, (y,), (tiles,) = add_rmsnorm(x, None, gain, 1e-6, plain=1, tiles=1, power_of_two=True)
        logits = router_linear(y, weight, tiles.norm if again else None)
        (dx,) = torch.autograd.grad(logits, x, torch.ones_like(logits).cumsum(0))
        grads.append((logits, dx, weight.grad))
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


def test_no_tokens() -> None:
    x, weight, dy, dw = torch.empty(0, 40).bfloat16(), torch.randn(7, 40), torch.empty(0, 7), torch.empty(7, 40)
    assert gpu.router_logits(x, weight).shape == (0, 7)
    assert gpu.router_dgrad(dy, weight, torch.bfloat16).shape == (0, 40)
    gpu.router_wgrad(dy, x, dw, False)
    assert not dw.any()
    assert BLOCK % 16 == 0
