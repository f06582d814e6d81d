"""The quantisers round to the nearest E4M3 number, with the scale of the tile itself, at every edge."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.formats import E4M3_MAX, TILE, Quantized
from kernels.quantize import (
    dequantize_blocks,
    dequantize_tiles,
    quantize_blocks,
    quantize_blocks_reference,
    quantize_tiles,
    quantize_tiles_reference,
    quantize_tiles_transposed,
    quantize_tiles_transposed_reference,
    requantize_transposed,
)
from tests.kernels.gemm_inputs import assert_same_bits, relative_error

SIZES = st.sampled_from([1, 63, 127, 128, 129, 300, 576])


@st.composite
def matrices(draw: st.DrawFn, spread: int = 12) -> Tensor:
    """Normal numbers whose tiles differ by factors up to 2^(2 spread), some exactly zero."""
    rows, cols, seed = draw(SIZES), draw(SIZES), draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cols, generator=generator)
    row_exponents = torch.randint(-spread, spread + 1, (rows, 1), generator=generator)
    col_exponents = torch.randint(-spread, spread + 1, (1, cols), generator=generator)
    x = torch.ldexp(x, row_exponents + draw(st.sampled_from([0, 1])) * col_exponents)
    return x * (torch.rand(rows, cols, generator=generator) > 0.1)


def e4m3_numbers() -> Tensor:
    """All finite E4M3 magnitudes, ascending, fp64, from the format's definition."""
    subnormals = [m * 2.0**-9 for m in range(8)]
    normals = [(1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8)]
    return torch.tensor((subnormals + normals)[:-1], dtype=torch.float64)


def expected_scale(amax: Tensor, power_of_two: bool) -> Tensor:
    """amax / 448 rounded to FP32, then up to a power of two; 1 where amax is 0. fp64."""
    scale = (amax.double() / E4M3_MAX).float().double()
    if power_of_two:
        mantissa, exponent = torch.frexp(scale)
        scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
    return torch.where(amax == 0, 1.0, scale)


def assert_same_quantized(actual: Quantized, expected: Quantized) -> None:
    assert_same_bits((actual.payload, actual.scale), (expected.payload, expected.scale))


def repeat_tiles(scale: Tensor, cols: int) -> Tensor:
    """[tiles, rows] scales as [rows, cols], fp64."""
    return scale.double().repeat_interleave(TILE, 0)[:cols].t()


def assert_nearest(x: Tensor, payload: Tensor, scale: Tensor) -> None:
    """Payload is the E4M3 number nearest to x / scale, `scale` fp64 of x's shape."""
    quotient = x.double() / scale
    distance = (payload.double() - quotient).abs()
    numbers = e4m3_numbers()
    above = torch.searchsorted(numbers, quotient.abs().contiguous()).clamp(max=len(numbers) - 1)
    below = (above - 1).clamp(min=0)
    nearest = torch.minimum((numbers[above] - quotient.abs()).abs(), (numbers[below] - quotient.abs()).abs())
    # The quotient is rounded to FP32 before it is rounded to E4M3, which moves it by 2^-24 of itself.
    assert bool((distance <= nearest + 2.0**-23 * quotient.abs()).all())


@pytest.mark.parametrize("power_of_two", [False, True])
@settings(max_examples=25)
@given(x=matrices())
def test_tiles_hold_the_nearest_number_under_the_tiles_own_scale(x: Tensor, power_of_two: bool) -> None:
    q = quantize_tiles(x, power_of_two=power_of_two)
    amax = torch.stack([tile.abs().amax(1) for tile in x.split(TILE, 1)])
    # FP32 division of the same two numbers: no tolerance.
    assert torch.equal(q.scale.double(), expected_scale(amax, power_of_two))
    assert_nearest(x, q.payload, repeat_tiles(q.scale, x.shape[1]))


@pytest.mark.parametrize("power_of_two", [False, True])
@settings(max_examples=15)
@given(x=matrices())
def test_transposed_tiles_are_the_tiles_of_the_transposed_matrix(x: Tensor, power_of_two: bool) -> None:
    q = quantize_tiles_transposed(x, power_of_two=power_of_two)
    expected = quantize_tiles(x.t().contiguous(), power_of_two=power_of_two)
    assert_same_quantized(q, expected)


@pytest.mark.parametrize("power_of_two", [False, True])
@settings(max_examples=15)
@given(w=matrices())
def test_blocks_hold_the_nearest_number_under_the_blocks_own_scale(w: Tensor, power_of_two: bool) -> None:
    q = quantize_blocks(w, power_of_two=power_of_two)
    amax = torch.stack([torch.stack([b.abs().max() for b in rows.split(TILE, 1)]) for rows in w.split(TILE, 0)])
    assert torch.equal(q.scale.double(), expected_scale(amax, power_of_two))
    scale = q.scale.double().repeat_interleave(TILE, 0).repeat_interleave(TILE, 1)
    assert_nearest(w, q.payload, scale[: w.shape[0], : w.shape[1]])


def test_experts_are_quantised_independently() -> None:
    w = torch.randn(3, 200, 129) * torch.tensor([1e-6, 1.0, 1e6])[:, None, None]
    q = quantize_blocks(w, power_of_two=False)
    parts = [Quantized(*part) for part in zip(q.payload, q.scale, strict=True)]
    for part, expert in zip(parts, w, strict=True):
        assert_same_quantized(part, quantize_blocks(expert, power_of_two=False))
    assert torch.equal(dequantize_blocks(q), torch.stack([dequantize_blocks(part) for part in parts]))


@pytest.mark.parametrize("power_of_two", [False, True])
@settings(max_examples=15)
@given(x=matrices())
def test_round_trip_stays_within_the_bound_of_numerics_md(x: Tensor, power_of_two: bool) -> None:
    q = quantize_tiles(x, power_of_two=power_of_two)
    error = (dequantize_tiles(q).double() - x.double()).abs()
    # Half an E4M3 ulp: 2^-4 relative, 2^-10 scales absolute among subnormals; 1.0001 covers FP32 roundings.
    bound = torch.maximum(2.0**-4 * x.double().abs(), 2.0**-10 * repeat_tiles(q.scale, x.shape[1]))
    assert bool((error <= 1.0001 * bound).all())


def test_relative_error_of_normal_data_is_the_expected_one() -> None:
    x = torch.randn(512, 1024)
    error = relative_error(dequantize_tiles(quantize_tiles(x, power_of_two=False)), x)
    # docs/numerics.md expects 0.0257; 0.02567 to 0.02573 over 12 seeds. E5M2 would give 0.05.
    assert error == pytest.approx(0.0257, abs=0.0003)


@pytest.mark.parametrize("power_of_two", [False, True])
def test_a_tile_of_zeros_has_scale_one_and_stays_zero(power_of_two: bool) -> None:
    x = torch.randn(130, 300)
    x[5, :128] = 0
    x[:128, 7] = 0
    tiles = quantize_tiles(x, power_of_two=power_of_two)
    assert tiles.scale[0, 5].item() == 1
    assert quantize_tiles_transposed(x, power_of_two=power_of_two).scale[0, 7].item() == 1
    assert dequantize_tiles(tiles)[5, :128].abs().max().item() == 0
    blocks = quantize_blocks(torch.zeros(2, 130, 129), power_of_two=power_of_two)
    assert blocks.scale.unique().tolist() == [1]
    assert dequantize_blocks(blocks).abs().max().item() == 0


class LargestCast(TorchDispatchMode):
    """Records the largest magnitude that is ever converted to E4M3."""

    largest = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.float8_e4m3fn:
            self.largest = max(self.largest, args[0].abs().max().item())
        return func(*args, **kwargs)


def test_nothing_above_448_reaches_the_cast() -> None:
    # Where fl(amax / 448) rounds down, amax / scale exceeds 448 by an ulp: torch 2.11 would make it NaN.
    x = torch.rand(4096, 2) + 1
    quotient = x.amax(1) / (x.amax(1) / E4M3_MAX)
    assert bool((quotient > E4M3_MAX).any()), "the data must contain a quotient that needs the clamp"
    # The references themselves: an operator hides its insides from a dispatch mode.
    with LargestCast() as cast:  # type: ignore[no-untyped-call]
        payload, _ = quantize_tiles_reference(x, False)
        quantize_tiles_transposed_reference(x.t(), False)
        quantize_blocks_reference(x, False)
    assert cast.largest == E4M3_MAX
    assert payload.double().amax(1).unique().tolist() == [E4M3_MAX]


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_non_finite_number_turns_its_tile_and_only_its_tile_into_nan(poison: float, power_of_two: bool) -> None:
    x = torch.randn(130, 200)
    x[3, 150] = poison
    tiles = dequantize_tiles(quantize_tiles(x, power_of_two=power_of_two)).isnan()
    assert bool(tiles[3, 128:].all())
    assert int(tiles.sum()) == 200 - 128
    columns = dequantize_tiles(quantize_tiles_transposed(x, power_of_two=power_of_two)).t().isnan()
    assert bool(columns[:128, 150].all())
    assert int(columns.sum()) == 128
    blocks = dequantize_blocks(quantize_blocks(x, power_of_two=power_of_two)).isnan()
    assert bool(blocks[:128, 128:].all())
    assert int(blocks.sum()) == 128 * (200 - 128)
    again = requantize_transposed(quantize_tiles(x, power_of_two=power_of_two), power_of_two=power_of_two)
    assert bool(dequantize_tiles(again).t()[:128, 128:].isnan().all())


@pytest.mark.parametrize("magnitude", [1e-30, 1e-12, 1e-5])
def test_small_gradients_keep_their_relative_precision(magnitude: float) -> None:
    x = torch.randn(4, 256) * magnitude
    error = relative_error(dequantize_tiles(quantize_tiles(x, power_of_two=False)), x.double())
    # The same 0.0257 as for magnitude 1, from 1024 samples: an amax floor of 1e-4 would give 1.
    assert error == pytest.approx(0.0257, abs=0.002)


@pytest.mark.parametrize("power_of_two", [False, True])
def test_subnormal_tiles_stay_finite(power_of_two: bool) -> None:
    x = torch.tensor([[1e-40, 0.0, -1e-45]])
    q = quantize_tiles(x, power_of_two=power_of_two)
    # amax / 448 would round to zero and 0 / 0 be NaN: the scale stops at 2^-126, E4M3 subnormals remain.
    assert q.scale.item() == 2.0**-126
    error = dequantize_tiles(q).double() - x.double()
    assert error.abs().max().item() <= 2.0**-10 * 2.0**-126


@settings(max_examples=25)
@given(x=matrices(spread=10))
def test_power_of_two_scales_regroup_exactly_above_the_underflow(x: Tensor) -> None:
    q = quantize_tiles(x, power_of_two=True)
    once = dequantize_tiles(q).double()
    regrouped = requantize_transposed(q, power_of_two=True)
    error = (dequantize_tiles(regrouped).double().t() - once).abs()
    scale = repeat_tiles(regrouped.scale, x.shape[0]).t()
    normal = once.abs() >= 2.0**-6 * scale
    # payload * 2^a is payload * 2^(a - b) under scale 2^b: the same four bits while the result is normal.
    assert bool((error[normal] == 0).all())
    # Below, half a subnormal step of the new tile.
    assert bool((error <= 2.0**-10 * scale).all())


def test_regrouping_with_power_of_two_scales_meets_exact_and_underflowing_numbers() -> None:
    x = torch.randn(256, 256) * torch.ldexp(torch.ones(256, 1), torch.randint(-10, 11, (256, 1)))
    q = quantize_tiles(x, power_of_two=True)
    error = dequantize_tiles(requantize_transposed(q, power_of_two=True)).t() - dequantize_tiles(q)
    inexact = (error != 0).float().mean().item()
    # Rows 2^20 apart against a normal range of 2^13.8 to 2^14.8: some underflow, most do not.
    assert 0.01 < inexact < 0.5


def test_fp32_scales_round_a_second_time_when_regrouped() -> None:
    x = torch.randn(512, 512)
    q = quantize_tiles(x, power_of_two=False)
    once, twice = dequantize_tiles(q), dequantize_tiles(requantize_transposed(q, power_of_two=False)).t()
    # An independent rounding of the same size as the first (docs/numerics.md).
    assert relative_error(twice, once) == pytest.approx(0.0257, abs=0.0006)
    pow2 = quantize_tiles(x, power_of_two=True)
    regrouped = dequantize_tiles(requantize_transposed(pow2, power_of_two=True)).t()
    # Only the few numbers below 2^-6 of their scale move, by at most 2^-10 of it.
    assert relative_error(regrouped, dequantize_tiles(pow2)) < 1e-4


def test_bf16_input_is_quantised_like_its_fp32_value() -> None:
    x = torch.randn(63, 300, dtype=torch.bfloat16)
    for quantise in (quantize_tiles, quantize_tiles_transposed, quantize_blocks):
        assert_same_quantized(quantise(x, power_of_two=False), quantise(x.float(), power_of_two=False))


def test_an_expanded_gradient_is_quantised_like_a_contiguous_one() -> None:
    x = torch.tensor(3.0).expand(130, 129)
    for quantise in (quantize_tiles, quantize_tiles_transposed):
        assert torch.equal(dequantize_tiles(quantise(x, power_of_two=True)).unique(), torch.tensor([3.0]))


def test_no_rows_give_no_tiles() -> None:
    x = torch.zeros(0, 256)
    assert quantize_tiles(x, power_of_two=False).scale.shape == (2, 0)
    transposed = quantize_tiles_transposed(x, power_of_two=False)
    assert (transposed.payload.shape, transposed.scale.shape) == ((256, 0), (0, 256))


def test_wrong_ranks_are_refused_with_the_shape() -> None:
    with pytest.raises(ValueError, match=r"x must be \[rows, cols\], got shape \[2, 3, 4\]"):
        quantize_tiles(torch.zeros(2, 3, 4), power_of_two=False)
    with pytest.raises(ValueError, match=r"got shape \[4\]"):
        quantize_tiles_transposed(torch.zeros(4), power_of_two=False)
    with pytest.raises(ValueError, match=r"w must be .* got shape \[4\]"):
        quantize_blocks(torch.zeros(4), power_of_two=False)
