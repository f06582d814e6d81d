"""Each ablation changes the operand it names and no other; changing nothing is the shipped FP8 linear, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from kernels import fp8_linear as fp8
from kernels.formats import TILE, Quantized, ceil_div
from kernels.quantize import quantize_blocks, quantize_tiles, quantize_tiles_transposed
from train.studies.ablation.linear import AblatedLinears, Ablation, gradient_operands, product_reference

ENDS = torch.tensor([128, 128, 384], dtype=torch.int32)
ROWS, INNER, OUTER = 200, 300, 129


def results(call: Callable[..., Tensor], *leaves: Tensor) -> list[Tensor]:
    """The output and every gradient of one forward and backward, seeded."""
    for tensor in leaves:
        tensor.grad = None
    y = call(*leaves)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y.dtype))
    return [y.detach(), *(tensor.grad.clone() for tensor in leaves)]


W, GROUPED_W = (OUTER, INNER), (3, OUTER, INNER)
# Name -> shipped linear, ablated linear, shapes of the leaves.
CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "linear": (fp8.fp8_linear, lambda linears, x, w: linears.linear(x, w), [(ROWS, INNER), W]),
    "kept": (fp8.fp8_linear_of_kept, lambda linears, x, w: linears.linear_of_kept(x, w), [(ROWS, INNER), W]),
    "grouped": (
        lambda x, w, **options: fp8.grouped_fp8_linear(x, w, ENDS, **options),
        lambda linears, x, w: linears.linear(x, w, ENDS),
        [(512, INNER), GROUPED_W],
    ),
    "swiglu": (
        fp8.fp8_swiglu_linear,
        lambda linears, g, w: linears.swiglu_linear(g, None, w),
        [(2, ROWS // 2, 2 * INNER), W],
    ),
    "grouped swiglu": (
        lambda g, gates, w, **options: fp8.grouped_fp8_swiglu_linear(g, gates, w, ENDS, **options),
        lambda linears, g, gates, w: linears.swiglu_linear(g, gates, w, ENDS),
        [(512, 2 * INNER), (512,), GROUPED_W],
    ),
}


def outcomes(name: str, first: AblatedLinears | None, second: AblatedLinears) -> Iterator[tuple[Tensor, Tensor]]:
    """Output and gradients of one linear twice, on the same leaves; None: as shipped."""
    shipped, ablated, shapes = CASES[name]
    # Gates of experts are fp32.
    inputs = [torch.rand(shape) if len(shape) == 1 else torch.randn(shape).bfloat16() for shape in shapes]
    leaves = [tensor.requires_grad_() for tensor in inputs]
    as_shipped = partial(shipped, power_of_two=second.power_of_two)
    before = results(as_shipped if first is None else partial(ablated, first), *leaves)
    return zip(before, results(partial(ablated, second), *leaves), strict=True)


@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_changing_nothing_gives_the_bits_of_the_shipped_linear(name: str, power_of_two: bool) -> None:
    for expected, actual in outcomes(name, None, AblatedLinears(Ablation(), power_of_two)):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("ablation", [Ablation(gradient_format="e5m2"), Ablation(gradient_tile="128x128")])
def test_a_changed_gradient_moves_gradients_and_leaves_the_output(name: str, ablation: Ablation) -> None:
    recipe, changed = (AblatedLinears(each, power_of_two=False) for each in (Ablation(), ablation))
    equal = [torch.equal(*pair) for pair in outcomes(name, recipe, changed)]
    assert equal == [True, *[False] * (len(equal) - 1)]


@pytest.mark.parametrize("name", CASES)
def test_another_accumulation_moves_everything_a_little(name: str) -> None:
    recipe, hopper = (AblatedLinears(Ablation(accumulation=sums), power_of_two=True) for sums in ("fp32", "hopper"))
    for before, after in outcomes(name, recipe, hopper):
        error = float((after.double() - before.double()).norm() / before.double().norm())
        # Measured 7e-4 to 9e-4, mostly one rounding to BF16 that tips; an operand rounded again costs 2.6e-2.
        assert 0 < error < 2e-3


def values(q: Quantized) -> Tensor:
    """fp64, decoded by torch."""
    scale = q.scale.double().repeat_interleave(TILE, 0)[: q.payload.shape[1]].t()
    return q.payload.double() * scale


@pytest.mark.parametrize("power_of_two", [True, False])
def test_gradients_of_the_recipe_are_those_of_the_shipped_quantisers(power_of_two: bool) -> None:
    dy = (torch.randn(ROWS, OUTER) * torch.exp2(6 * torch.randn(ROWS, 1))).index_fill_(1, torch.arange(128), 0.0)
    # A scale that is a power of two already is not rounded up to the next one.
    dy[:2, 128] = torch.tensor([448.0, 448.0 * 2**-30])
    found = gradient_operands(dy, Ablation(), power_of_two=power_of_two)
    for ours, quantize in zip(found, (quantize_tiles, quantize_tiles_transposed), strict=True):
        theirs = quantize(dy, power_of_two=power_of_two)
        assert torch.equal(ours.payload.view(torch.uint8), theirs.payload.view(torch.uint8))
        assert torch.equal(ours.scale, theirs.scale)


@pytest.mark.parametrize("power_of_two", [True, False])
def test_blocks_of_gradients_are_those_of_weights_and_serve_both_products(power_of_two: bool) -> None:
    dy = torch.randn(ROWS, OUTER) * torch.exp2(3 * torch.randn(ROWS, 1))
    by_row, by_channel = gradient_operands(dy, Ablation(gradient_tile="128x128"), power_of_two=power_of_two)
    blocks = quantize_blocks(dy, power_of_two=power_of_two)
    assert torch.equal(by_row.payload.view(torch.uint8), blocks.payload.view(torch.uint8))
    assert torch.equal(by_row.scale[:, ::TILE], blocks.scale.t())
    assert torch.equal(values(by_row), values(by_channel).t())
    assert by_channel.scale.shape == (ceil_div(ROWS, TILE), OUTER)


@pytest.mark.parametrize("power_of_two", [True, False])
def test_e5m2_rounds_to_the_nearest_of_its_numbers_under_its_own_scale(power_of_two: bool) -> None:
    dy = torch.randn(5, OUTER)
    q, _ = gradient_operands(dy, Ablation("e5m2"), power_of_two=power_of_two)
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e5m2).double()
    grid = codes[codes.isfinite()].unique()
    for row in range(5):
        for tile, cols in enumerate((slice(0, 128), slice(128, OUTER))):
            scale = float(dy[row, cols].abs().max()) / 57344
            if power_of_two:
                scale = 2.0 ** float(torch.tensor(scale).double().log2().ceil())
            assert float(q.scale[tile, row]) == pytest.approx(scale, rel=2**-23)
            wanted = dy[row, cols].double() / float(q.scale[tile, row])
            nearest = (wanted[:, None] - grid).abs().amin(dim=1)
            actual = (wanted - q.payload[row, cols].double()).abs()
            # The quotient is rounded to FP32 before it is rounded to E5M2.
            assert bool((actual <= nearest + 2**-23 * wanted.abs()).all())


@pytest.mark.parametrize("interval", [128, 256, None])
def test_hoppers_sums_change_products_only_within_their_own_error(interval: int | None) -> None:
    a, b = torch.randn(64, 512), torch.randn(96, 512)
    aq, bq = (quantize_tiles(t, power_of_two=True) for t in (a, b))
    exact = values(aq) @ values(bq).t()
    y = product_reference(aq, bq, Ablation(accumulation="hopper", promotion_interval=interval))
    error = float((y.double() - exact).norm() / exact.norm())
    # Measured 1.3e-4 (128), 2.1e-4 (256), 3.3e-4 (none): as test_hopper_accumulation.py at this length.
    assert 5e-5 < error < 6e-4


def test_wgrad_sees_the_input_regrouped() -> None:
    # dW of the recipe is the product of the shipped operands: dy by channel, x rounded twice.
    x, w = torch.randn(256, 64), torch.nn.Parameter(torch.randn(32, 64))
    dy = torch.randn(256, 32)
    AblatedLinears(Ablation("e5m2"), power_of_two=True).linear(x, w).backward(dy)
    _, by_channel = gradient_operands(dy, Ablation("e5m2"), power_of_two=True)
    cached = values(quantize_tiles(x, power_of_two=True)).float()
    xq = quantize_tiles_transposed(cached, power_of_two=True)
    expected = values(by_channel) @ values(xq).t()
    # FP32 sums over 256 terms.
    assert float((w.grad.double() - expected).norm() / expected.norm()) < 16 * 2**-24


def test_a_frozen_weight_gets_no_gradient() -> None:
    x, w = torch.randn(130, 64, requires_grad=True), torch.nn.Parameter(torch.randn(32, 64), requires_grad=False)
    AblatedLinears(Ablation(), power_of_two=True).linear(x, w).sum().backward()
    assert w.grad is None
    assert x.grad is not None


def test_nan_in_a_gradient_is_seen() -> None:
    dy = torch.randn(3, 200)
    dy[1, 150] = float("nan")
    for ablation in (Ablation(), Ablation("e5m2"), Ablation(gradient_tile="128x128")):
        by_row, _ = gradient_operands(dy, ablation, power_of_two=True)
        assert bool(values(by_row)[1, 128:].isnan().all())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ablation(promotion_interval=256), "does nothing while partial sums are FP32"),
        (lambda: Ablation(accumulation="hopper", promotion_interval=100), "must be a positive multiple of 32"),
        (lambda: AblatedLinears(Ablation(accumulation="hopper"), power_of_two=False), "set power_of_two_scales=true"),
    ],
)
def test_what_does_not_go_together_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
