"""What the linears of FFN and attention output keep for backward: SwiGLU's input in FP8, or nothing of their own.

Errors are relative Frobenius norms against FP64 on normal data, power-of-two scales. One E4M3 rounding leaves 2.6 %, a
product of two rounded operands 3.7 % (docs/numerics.md). SwiGLU's input rounded once more adds its two halves, gate and
up: sqrt(2) * 2.6 % in its output and in its derivative. So dx has sqrt(3.7^2 + 3.7^2) = 5.2 %, and so has dW, whose
operand is rounded once again from there; the limit leaves a sixth above.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.deferred import deferred, pending, take
from kernels.fp8_linear import (
    fp8_linear,
    fp8_linear_of_kept,
    fp8_swiglu_linear,
    grouped_fp8_linear,
    grouped_fp8_swiglu_linear,
)
from kernels.swiglu import gated_swiglu, swiglu

LIMIT = 0.06
ENDS = torch.tensor([128, 128, 512], dtype=torch.int32)


def weight_of(*shape: int) -> nn.Parameter:
    weight = nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(1)))
    weight.main_grad = torch.zeros(*shape)  # type: ignore[attr-defined]
    return weight


def main_grad(weight: nn.Parameter) -> Tensor:
    gradient: Tensor = weight.main_grad  # type: ignore[attr-defined]
    return gradient


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def kept_bytes(run: Callable[[], Tensor]) -> int:
    """Bytes of the tensors that autograd keeps, each storage once."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storages.values())


@pytest.mark.parametrize("inter", [256, 72])
@pytest.mark.parametrize("rows", [384, 37])
def test_a_dense_ffn_gives_the_same_bits_and_gradients_of_fp8_accuracy(rows: int, inter: int) -> None:
    gate_up, dy = torch.randn(rows, 2 * inter), torch.randn(rows, 96)
    weight = weight_of(96, inter)
    leaf = gate_up.clone().requires_grad_()
    y = fp8_swiglu_linear(leaf, weight, power_of_two=True)
    assert torch.equal(y, fp8_linear(swiglu(gate_up), weight.detach(), power_of_two=True))
    y.backward(dy)
    exact, exact_weight = gate_up.double().requires_grad_(), weight.detach().double().requires_grad_()
    gate, up = exact.chunk(2, -1)
    ((F.silu(gate) * up) @ exact_weight.t()).backward(dy.double())
    assert exact.grad is not None
    assert exact_weight.grad is not None
    assert leaf.grad is not None
    assert 0.02 < relative(leaf.grad, exact.grad) < LIMIT
    assert 0.02 < relative(main_grad(weight), exact_weight.grad) < LIMIT


def test_experts_give_the_same_bits_and_gradients_of_fp8_accuracy_an_empty_one_included() -> None:
    rows, inter = 640, 256
    gate_up, gates, dy = torch.randn(rows, 2 * inter), torch.rand(rows), torch.randn(rows, 96)
    for tensor in (gate_up, gates, dy):
        tensor[500:] = 0
    weight = weight_of(3, 96, inter)
    leaf, own_gates = gate_up.clone().requires_grad_(), gates.clone().requires_grad_()
    y = grouped_fp8_swiglu_linear(leaf, own_gates, weight, ENDS, power_of_two=True)
    expected = grouped_fp8_linear(gated_swiglu(gate_up, gates), weight.detach(), ENDS, power_of_two=True)
    assert torch.equal(y, expected)
    y.backward(dy)
    exact, exact_gates = gate_up.double().requires_grad_(), gates.double().requires_grad_()
    exact_weight = weight.detach().double().requires_grad_()
    gate, up = exact.chunk(2, -1)
    h = F.silu(gate) * up * exact_gates[:, None]
    torch.cat((h[:128] @ exact_weight[0].t(), h[128:512] @ exact_weight[2].t())).backward(dy[:512].double())
    pairs = ((leaf, exact), (own_gates, exact_gates))
    for ours, theirs in pairs:
        assert ours.grad is not None
        assert theirs.grad is not None
        assert 0.02 < relative(ours.grad, theirs.grad) < LIMIT
    assert exact_weight.grad is not None
    assert 0.02 < relative(main_grad(weight), exact_weight.grad) < LIMIT
    assert not main_grad(weight)[1].any(), "an expert without tokens"


def test_only_the_input_of_swiglu_is_kept_in_one_byte_an_element() -> None:
    rows, inter = 512, 256
    gate_up = torch.randn(rows, 2 * inter, dtype=torch.bfloat16, requires_grad=True)
    gates = torch.rand(rows, requires_grad=True)
    dense, experts = weight_of(96, inter), weight_of(3, 96, inter)
    payload_and_scales = rows * 2 * inter + rows * 4 * 4
    assert kept_bytes(lambda: fp8_swiglu_linear(gate_up, dense, power_of_two=True)) == payload_and_scales
    grouped = kept_bytes(lambda: grouped_fp8_swiglu_linear(gate_up, gates, experts, ENDS, power_of_two=True))
    assert grouped == payload_and_scales + rows * 4 + 3 * 4
    two_calls = kept_bytes(lambda: fp8_linear(swiglu(gate_up), dense, power_of_two=True))
    assert two_calls == rows * 2 * inter * 2 + rows * inter + rows * 2 * 4


def test_an_input_that_is_kept_anyway_is_not_kept_twice() -> None:
    x, dy = torch.randn(384, 256), torch.randn(384, 96)
    weight, other = weight_of(96, 256), weight_of(96, 256)
    leaf, twin = x.clone().requires_grad_(), x.clone().requires_grad_()
    assert kept_bytes(lambda: fp8_linear_of_kept(leaf, weight, power_of_two=True)) == x.nbytes
    y, plain = fp8_linear_of_kept(leaf, weight, power_of_two=True), fp8_linear(twin, other, power_of_two=True)
    assert torch.equal(y, plain)
    y.backward(dy)
    plain.backward(dy)
    assert leaf.grad is not None
    assert twin.grad is not None
    assert torch.equal(leaf.grad, twin.grad)
    exact = dy.double().t() @ x.double()
    # Power-of-two scales: rounding once or twice is the same outside underflow.
    assert relative(main_grad(weight), exact) == pytest.approx(relative(main_grad(other), exact), rel=1e-3)


def test_weight_gradients_wait_in_the_queue_and_are_the_same_bits() -> None:
    gate_up, gates, dy = torch.randn(512, 512), torch.rand(512), torch.randn(512, 96)
    runs: list[tuple[nn.Parameter, Callable[[nn.Parameter], Tensor]]] = [
        (weight_of(96, 256), lambda w: fp8_swiglu_linear(gate_up.clone().requires_grad_(), w, power_of_two=True)),
        (
            weight_of(3, 96, 256),
            lambda w: grouped_fp8_swiglu_linear(
                gate_up.clone().requires_grad_(), gates.clone().requires_grad_(), w, ENDS, power_of_two=True
            ),
        ),
        (
            weight_of(96, 512),
            lambda w: fp8_linear_of_kept(gate_up.clone().requires_grad_(), w, power_of_two=True),
        ),
    ]
    for weight, run in runs:
        run(weight).backward(dy)
        at_once = main_grad(weight).clone()
        main_grad(weight).zero_()
        with deferred():
            run(weight).backward(dy)
            assert not main_grad(weight).any()
            assert pending() == 1
            take()()
        assert torch.equal(main_grad(weight), at_once)
