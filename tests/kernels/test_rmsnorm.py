"""RMSNorm equals transformers' DeepseekV3RMSNorm, both ways, and keeps only x and one root a row.

With the addition before it and readers after it, its bits are those of the separate operations under autograd.
"""

from __future__ import annotations

import weakref
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm

from kernels import deferred
from kernels.formats import CarriedTiles
from kernels.fp8_linear import LinearInput, fp8_linear, linear
from kernels.quantize import quantize_tiles, requantize_transposed
from kernels.rmsnorm import add_rmsnorm, rmsnorm, rmsnorm_reference
from kernels.router_linear import router_linear
from tests.kernels.gemm_inputs import assert_same_bits, beside_reference, kept_for_backward, relative_error
from tests.operator_calls import OperatorCalls

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


def test_only_x_and_one_number_per_row_are_kept_for_backward() -> None:
    x, weight = torch.randn(129, 64, requires_grad=True), torch.ones(64, requires_grad=True)
    kept = kept_for_backward(lambda: rmsnorm(x, weight, EPS))
    assert sorted(tuple(tensor.shape) for tensor in kept) == [(129,), (129, 64)]


def test_a_gain_with_main_grad_gets_its_gradient_there_to_the_bits_of_autograds() -> None:
    """The first of a step replaces what is there, the next is added in FP32; a frozen gain gets none."""
    x, grads = torch.randn(129, 64).bfloat16(), torch.randn(2, 129, 64).bfloat16()
    weight = torch.rand(64).bfloat16().requires_grad_()
    alone = [torch.autograd.grad(rmsnorm(x, weight, EPS), weight, grad)[0].float() for grad in grads]
    weight.main_grad = torch.full((64,), float("nan"))  # type: ignore[attr-defined]
    deferred.forget(weight)
    for grad in grads:
        rmsnorm(x, weight, EPS).backward(grad)
    assert weight.grad is None
    assert torch.equal(weight.main_grad, alone[0] + alone[1])  # type: ignore[attr-defined]
    weight.requires_grad_(requires_grad=False)
    rmsnorm(x.requires_grad_(), weight, EPS).backward(grads[0])
    assert torch.equal(weight.main_grad, alone[0] + alone[1])  # type: ignore[attr-defined]


def separate(x: Tensor, delta: Tensor | None, weight: Tensor, count: int) -> tuple[Tensor, list[LinearInput]]:
    """The addition and the norm as operations of their own, one output for all readers: autograd adds gradients."""
    total = x.clone() if delta is None else x + delta
    return total, [rmsnorm(total, weight, EPS)] * count


def fused(x: Tensor, delta: Tensor | None, weight: Tensor, plain: int, tiles: int) -> tuple[Tensor, list[LinearInput]]:
    total, numbers, carried = add_rmsnorm(x, delta, weight, EPS, plain=plain, tiles=tiles, power_of_two=True)
    return total, [*numbers, *carried]


@pytest.mark.parametrize("added", [True, False], ids=["sum", "slice"])
@pytest.mark.parametrize(("plain", "tiles"), [(0, 1), (1, 0), (1, 2), (2, 1), (3, 0)])
def test_bits_are_those_of_separate_operations_whose_gradients_autograd_adds(
    plain: int, tiles: int, added: bool
) -> None:
    """Readers as in a MoE block: an FP32 linear, BF16 ones, FP8 ones; then another reader of the sum."""
    readers = [torch.randn(32, 192) for _ in range(plain + tiles)]
    inputs = torch.randn(2, 65, 192).bfloat16(), torch.randn(2, 65, 192).bfloat16() if added else None, torch.rand(192)
    results = []
    for run in (partial(separate, count=plain + tiles), partial(fused, plain=plain, tiles=tiles)):
        whole = torch.cat((inputs[0], inputs[0]), -1).requires_grad_()
        delta = None if inputs[1] is None else inputs[1].clone().requires_grad_()
        weight = inputs[2].bfloat16().requires_grad_()
        # One of two slices, as a latent is.
        total, outputs = run(whole[..., :192], delta, weight)
        weights = [reader.bfloat16().requires_grad_() for reader in readers]
        ys = [
            fp8_linear(x, w, power_of_two=True) if nth >= plain else (linear if nth else router_linear)(x, w)  # type: ignore[arg-type]
            for nth, (x, w) in enumerate(zip(outputs, weights, strict=True))
        ]
        generator = torch.Generator().manual_seed(1)
        ys.append(total)
        torch.autograd.backward(ys, [torch.randn(y.shape, generator=generator).to(y.dtype) for y in ys])
        given = [whole, weight, *weights, *([] if delta is None else [delta])]
        results.append([*ys, *(each.grad for each in given)])
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


def test_tiles_are_no_differentiable_output_and_a_carrier_takes_no_memory() -> None:
    """Nor is one reader's the other's; rows for a probe are those that were quantised."""
    x, delta = torch.randn(2, 3, 130, 192).bfloat16().requires_grad_()
    weight = torch.rand(192).bfloat16().requires_grad_()
    _, (y,), (one, other) = add_rmsnorm(x, delta, weight, EPS, plain=1, tiles=2, power_of_two=True)
    assert isinstance(one, CarriedTiles)
    expected = quantize_tiles(y.flatten(0, -2), power_of_two=True)
    for reader in (one, other):
        assert not reader.tiles.payload.requires_grad
        assert not reader.tiles.scale.requires_grad
        assert reader.carrier.requires_grad
        assert (reader.shape, reader.carrier.dtype) == (x.shape, x.dtype)
        assert reader.carrier.untyped_storage().nbytes() == 4
        assert bool(reader.carrier.isnan().all())
        assert torch.equal(reader.tiles.payload.view(torch.uint8), expected.payload.view(torch.uint8))
        assert torch.equal(reader.tiles.scale, expected.scale)
    assert one.carrier is not other.carrier
    rows = torch.tensor([5, 0, 389])
    assert torch.equal(one.rows(rows), y.flatten(0, -2)[rows])


def test_readers_of_tiles_keep_what_the_norm_keeps_and_one_launch_makes_it_again_for_all() -> None:
    """To the bits of forward's tiles regrouped; what was made goes with its last reader."""
    x, delta = torch.randn(2, 3, 130, 192).bfloat16().requires_grad_()
    weight = torch.rand(192).bfloat16().requires_grad_()
    read = torch.randn(64, 192).bfloat16().requires_grad_()
    norms = []

    def run() -> None:
        total, (y,), tiles = add_rmsnorm(x, delta, weight, EPS, plain=1, tiles=2, power_of_two=True)
        norms.append((total, y, tiles))
        for each in tiles:
            fp8_linear(each, read, power_of_two=True)

    storages = {each.untyped_storage().data_ptr() for each in kept_for_backward(run)}
    ((total, y, (one, other)),) = norms
    norm = one.norm
    assert other.norm is norm
    assert storages == {each.untyped_storage().data_ptr() for each in (total, norm.rstd)}

    norm.again.reads_numbers()
    regrouped = requantize_transposed(one.tiles, power_of_two=True)
    # Of a graph that is kept, backward may run twice.
    for _ in range(2):
        with OperatorCalls() as calls:
            first = norm.again.tiles(*norm.tensors)
            numbers = norm.again.numbers(*norm.tensors)
            second = norm.again.tiles(*norm.tensors)
        assert calls.counts == {"norm_again": 1}
        assert_same_bits((first.payload, first.scale), (regrouped.payload, regrouped.scale))
        assert torch.equal(numbers, y.flatten(0, -2))
        assert second.payload is first.payload
        made = [weakref.ref(each) for each in (first.payload, numbers)]
        del first, numbers, second
        assert [each() for each in made] == [None, None]


def test_a_sum_that_alone_is_read_hands_its_gradient_on() -> None:
    x, delta, weight = (torch.randn(3, 8, requires_grad=True) for _ in range(3))
    total, _, _ = add_rmsnorm(x, delta, weight[0], EPS, plain=1)
    grad = torch.randn(3, 8)
    for found in torch.autograd.grad(total, (x, delta), grad):
        assert torch.equal(found, grad)
