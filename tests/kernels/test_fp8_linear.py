"""The linears quantise, keep, defer and refuse what they should; accuracy has a file of its own."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels import deferred, fp8_linear
from kernels.fp8_linear import fp8_linear as fp8
from kernels.fp8_linear import grouped_fp8_linear, grouped_linear, linear, weight_fp8


@pytest.fixture(autouse=True)
def drained() -> Iterator[None]:
    """No test leaves weight gradients behind."""
    yield
    deferred.check_drained()


def test_a_bf16_weight_serves_an_fp32_input_in_fp32() -> None:
    x, weight = torch.randn(3, 64), torch.nn.Parameter(torch.randn(5, 64).bfloat16())
    y = linear(x, weight)
    assert y.dtype == torch.float32
    assert torch.equal(y, linear(x, weight.detach().float()))


def test_leading_dims_and_input_dtype_are_kept() -> None:
    x, weight = torch.randn(2, 3, 64, dtype=torch.bfloat16), torch.nn.Parameter(torch.randn(5, 64))
    y = fp8(x, weight, power_of_two=False)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, fp8(x.view(6, 64), weight, power_of_two=False).view(2, 3, 5))
    assert torch.equal(linear(x, weight), linear(x.view(6, 64), weight).view(2, 3, 5))


def test_autograd_gets_no_weight_gradient_and_micro_batches_add_up() -> None:
    weight = torch.nn.Parameter(torch.randn(64, 128))
    weight.main_grad = torch.zeros(64, 128)  # type: ignore[attr-defined]
    x, dy = torch.randn(256, 128), torch.randn(256, 64)
    parts = []
    for rows in (slice(0, 128), slice(128, 256)):
        alone = torch.nn.Parameter(weight.detach().clone())
        fp8(x[rows], alone, power_of_two=False).backward(dy[rows])
        assert alone.grad is not None
        parts.append(alone.grad)
        fp8(x[rows], weight, power_of_two=False).backward(dy[rows])
    assert weight.grad is None
    assert torch.equal(weight.main_grad, parts[0] + parts[1])  # type: ignore[attr-defined]


class Calls:
    """Counts calls of functions of kernels.fp8_linear."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
        self.order: list[str] = []
        for name in names:
            monkeypatch.setattr(fp8_linear, name, self._counted(name, getattr(fp8_linear, name)))

    def _counted(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.order.append(name)
            return original(*args, **kwargs)

        return counted


def test_a_weight_is_quantised_once_per_optimizer_step(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch, "quantize_blocks")
    weight = torch.nn.Parameter(torch.randn(64, 128))
    x = torch.randn(5, 128, requires_grad=True)
    outputs = []
    for step in range(1, 4):
        for _ in range(3):
            y = fp8(x, weight, power_of_two=False)
            y.sum().backward()
        assert len(calls.order) == step
        outputs.append(y.detach())
        with torch.no_grad():
            weight.copy_(2 * weight)
    # Doubling a weight doubles scales and outputs exactly: the second and third copies are fresh.
    assert torch.equal(outputs[1], 2 * outputs[0])
    assert torch.equal(outputs[2], 4 * outputs[0])


def test_the_copy_follows_new_storage_and_the_kind_of_scale() -> None:
    weight = torch.nn.Parameter(torch.randn(64, 128))
    first = weight_fp8(weight, power_of_two=False)
    assert weight_fp8(weight, power_of_two=False) is first
    version = weight._version
    weight.data = 3 * weight.data
    assert weight._version == version, "the version alone would not tell"
    assert weight_fp8(weight, power_of_two=False).scale.item() == (weight.abs().max() / 448).item()
    mantissa, _ = torch.frexp(weight_fp8(weight, power_of_two=True).scale)
    assert mantissa.item() == 0.5


def bytes_saved(layer: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Bytes of every tensor that autograd keeps for backward."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sum(tensor.nbytes for tensor in kept)


def test_backward_keeps_one_byte_per_input_element_and_the_scales() -> None:
    rows, inputs = 256, 576
    x = torch.randn(rows, inputs, dtype=torch.bfloat16, requires_grad=True)
    weight, experts = (
        torch.nn.Parameter(torch.randn(64, inputs)),
        torch.nn.Parameter(torch.randn(2, 64, inputs)),
    )
    ends = torch.tensor([128, 256], dtype=torch.int32)
    expected = rows * inputs + 4 * rows * 5
    assert bytes_saved(lambda x: fp8(x, weight, power_of_two=False), x) == expected
    assert bytes_saved(lambda x: grouped_fp8_linear(x, experts, ends, power_of_two=False), x) == expected + ends.nbytes


def test_the_input_itself_is_freed_after_forward() -> None:
    weight = torch.nn.Parameter(torch.randn(64, 128))
    x = torch.randn(5, 128, requires_grad=True) * 2
    reference = weakref.ref(x)
    y = fp8(x, weight, power_of_two=False)
    del x
    assert reference() is None
    y.sum().backward()


GEMMS = ("gemm_tile_block", "gemm_tile_tile", "grouped_gemm_tile_block", "grouped_gemm_tile_tile")


@pytest.mark.parametrize("grouped", [False, True])
def test_under_deferred_each_gemm_runs_once_and_wgrad_waits(grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch, *GEMMS)
    ends = torch.tensor([128, 256], dtype=torch.int32)
    weight = torch.nn.Parameter(torch.randn(2, 64, 128) if grouped else torch.randn(64, 128))
    x = torch.randn(256, 128, requires_grad=True)
    with deferred.deferred():
        y = grouped_fp8_linear(x, weight, ends, power_of_two=False) if grouped else fp8(x, weight, power_of_two=False)
        y.sum().backward()
    tile_block, tile_tile = GEMMS[2:] if grouped else GEMMS[:2]
    assert calls.order == [tile_block, tile_block]
    assert x.grad is not None
    assert weight.grad is None
    deferred.take()()
    assert calls.order == [tile_block, tile_block, tile_tile]
    assert weight.grad is not None


@pytest.mark.parametrize("layer", [linear, lambda x, w: fp8(x, w, power_of_two=False)])
def test_deferred_weight_gradients_equal_immediate_ones_bit_for_bit(layer: Callable[[Tensor, Tensor], Tensor]) -> None:
    first, second = torch.randn(64, 128), torch.randn(32, 64)
    x = torch.randn(129, 128)
    grads = []
    for defer in (False, True):
        w1, w2 = torch.nn.Parameter(first.clone()), torch.nn.Parameter(second.clone())
        leaf = x.clone().requires_grad_()
        if defer:
            with deferred.deferred():
                layer(layer(leaf, w1), w2).square().sum().backward()
            assert deferred.pending() == 2
            deferred.take()()
        else:
            layer(layer(leaf, w1), w2).square().sum().backward()
        grads.append((w1.grad, w2.grad, leaf.grad))
    for immediate, late in zip(*grads, strict=True):
        assert immediate is not None
        assert late is not None
        assert torch.equal(immediate, late)


def test_a_frozen_weight_gets_no_wgrad(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch, *GEMMS)
    x = torch.randn(128, 128, requires_grad=True)
    ends = torch.tensor([128], dtype=torch.int32)
    with deferred.deferred():
        fp8(x, torch.randn(64, 128), power_of_two=False).sum().backward()
        linear(x, torch.randn(64, 128)).sum().backward()
        grouped_fp8_linear(x, torch.randn(1, 64, 128), ends, power_of_two=False).sum().backward()
        grouped_linear(x, torch.randn(1, 64, 128), ends).sum().backward()
        assert deferred.pending() == 0
    assert calls.order == ["gemm_tile_block"] * 2 + ["grouped_gemm_tile_block"] * 2


def test_an_activation_checkpoint_changes_nothing() -> None:
    x, start = torch.randn(129, 128), torch.randn(128, 128)
    results = []
    for recompute in (False, True):
        leaf, weight = x.clone().requires_grad_(), torch.nn.Parameter(start.clone())
        weight.main_grad = torch.zeros(128, 128)  # type: ignore[attr-defined]

        def layer(x: Tensor, weight: Tensor = weight) -> Tensor:
            return fp8(x, weight, power_of_two=False)

        y = checkpoint(layer, leaf, use_reentrant=False) if recompute else layer(leaf)
        y.square().sum().backward()
        results.append((leaf.grad, weight.main_grad))  # type: ignore[attr-defined]
    for plain, recomputed in zip(*results, strict=True):
        assert int(plain.count_nonzero()) > 0
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("layer", [linear, lambda x, w: fp8(x, w, power_of_two=False)])
def test_changing_a_weight_between_forward_and_backward_is_an_error(layer: Callable[[Tensor, Tensor], Tensor]) -> None:
    weight = torch.nn.Parameter(torch.randn(64, 128))
    y = layer(torch.randn(5, 128, requires_grad=True), weight)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(AssertionError, match="changed between forward and backward"):
        y.sum().backward()


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_non_finite_number_reaches_every_gradient_it_enters(poison: float, power_of_two: bool) -> None:
    weight = torch.nn.Parameter(torch.randn(64, 128))
    x = torch.randn(5, 128, requires_grad=True)
    dy = torch.randn(5, 64)
    dy[2, 3] = poison
    fp8(x, weight, power_of_two=power_of_two).backward(dy)
    assert x.grad is not None
    assert weight.grad is not None
    assert x.grad.isfinite().all(1).tolist() == [True, True, False, True, True]
    assert (~weight.grad.isfinite()).any(1).nonzero().flatten().tolist() == [3]
    with torch.no_grad():
        x[1, 1] = poison
    assert fp8(x, weight, power_of_two=power_of_two).isfinite().all(1).tolist() == [
        True,
        False,
        True,
        True,
        True,
    ]


def test_misfitting_shapes_are_refused_with_both() -> None:
    ends = torch.tensor([128], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"got \[3, 64\] and \[5, 65\]"):
        linear(torch.zeros(3, 64), torch.zeros(5, 65))
    with pytest.raises(ValueError, match=r"must be \[..., in\] and \[out, in\], got \[3, 64\] and \[1, 5, 64\]"):
        fp8(torch.zeros(3, 64), torch.zeros(1, 5, 64), power_of_two=False)
    with pytest.raises(ValueError, match=r"must be \[rows, in\] and \[groups, out, in\]"):
        grouped_linear(torch.zeros(2, 64, 8), torch.zeros(1, 5, 8), ends)
    with pytest.raises(ValueError, match="group_ends must be 2"):
        grouped_fp8_linear(torch.zeros(128, 64), torch.zeros(2, 5, 64), ends, power_of_two=False)
    with pytest.raises(ValueError, match="group_ends must be 2"):
        grouped_linear(torch.zeros(128, 64), torch.zeros(2, 5, 64), ends)
