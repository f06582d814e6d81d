"""E5M6: every code, every midpoint, tiles at their edges; the Triton kernels, interpreted, give the references' bits.

The oracle of one number is no arithmetic on bits: it is the nearest in the sorted list of all values that the twelve
bits mean, found in FP64. Outputs are NaN, or 255, before they are written (tests/conftest.py).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.e5m6 import (
    E5M6_MAX,
    E5M6_NAN,
    decode_e5m6_reference,
    encode_e5m6_reference,
    pack_e5m6,
    pack_e5m6_reference,
    quantize_pack_reference,
    unpack_e5m6,
    unpack_e5m6_reference,
    unpack_quantize_transposed_reference,
)
from kernels.gpu import e5m6 as gpu
from kernels.quantize import quantize_tiles_reference, quantize_tiles_transposed_reference
from tests.kernels.gemm_inputs import assert_same_bits, relative_error

BF16, FP32 = torch.bfloat16, torch.float32
# 576 and 62: a last tile of half the length, and one short tile with an odd number of pairs.
SHAPES = [(1, 128), (63, 576), (128, 256), (129, 62), (4097, 62)]

scales = pytest.mark.parametrize("power_of_two", [True, False], ids=["power of two", "FP32 scales"])


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes a millisecond an operation and program, however large the program is."""
    monkeypatch.setattr(gpu, "ROWS", 512)


def values_by_definition() -> Tensor:
    """fp64 values of codes 0 ... 0x7bf, rising: (-1)^s 2^(e - 15) (1 + m/64), or 2^-14 m/64 with e = 0."""
    code = torch.arange(0x7C0)
    exponent, mantissa = code >> 6, (code & 63).double() / 64
    return torch.where(exponent == 0, 2.0**-14 * mantissa, torch.exp2((exponent - 15).double()) * (1 + mantissa))


def nearest_code(x: Tensor) -> Tensor:
    """The code nearest to fp64 magnitudes, of two as near the even one."""
    values = values_by_definition()
    above = torch.searchsorted(values, x).clamp(1, len(values) - 1)
    down, up = x - values[above - 1], values[above] - x
    take_up = (up < down) | ((up == down) & (above % 2 == 0))
    return torch.where(take_up, above, above - 1)


def example(rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """Rows of very different size, elements over E5M6's whole range, zeros of both signs, subnormal and huge tiles."""
    x = torch.randn(rows, cols) * torch.randn(rows, cols).mul(5).exp() * torch.randn(rows, 1).mul(4).exp()
    x[0, :2] = torch.tensor([0.0, -0.0])
    if rows > 5:
        x[1], x[2], x[3], x[4] = 0, 1e-39, E5M6_MAX * 2.0**-3, 3e38
    return x.to(dtype)


def packed(code: Tensor) -> Tensor:
    """Two values in three bytes: upper eight bits of all, then lower four of two, the even column low."""
    return torch.cat((code >> 4, (code[:, ::2] & 15) | (code[:, 1::2] & 15) << 4), 1).to(torch.uint8)


def tile_of_codes() -> tuple[Tensor, Tensor]:
    """All 4096 codes in 32 rows of 128, as fp32, and the codes; NaN and infinity as zero, each row with 65024 in it."""
    code = torch.arange(4096).view(32, 128)
    code[~decode_e5m6_reference(code).isfinite()] = 0
    values = decode_e5m6_reference(code)
    # With amax 65024 the scale is one, and codes come back as they are.
    code[:, 0], values[:, 0] = 0x7BF, E5M6_MAX
    return values, code


def test_the_codes_mean_what_the_definition_says() -> None:
    values = values_by_definition()
    assert (float(values[-1]), float(values[1]), float(values[64])) == (E5M6_MAX, 2.0**-20, 2.0**-14)
    decoded = decode_e5m6_reference(torch.arange(4096))
    assert torch.equal(decoded[:0x7C0].double(), values)
    assert torch.equal(decoded[0x800:0xFC0].double(), -values)
    assert decoded[[0x7C0, 0xFC0]].tolist() == [float("inf"), float("-inf")]
    assert bool(decoded[0x7C1:0x800].isnan().all() & decoded[0xFC1:].isnan().all())


def test_every_code_is_its_own_nearest_and_ties_go_to_even() -> None:
    values = values_by_definition()
    middle = (values[1:] + values[:-1]) / 2
    ulp = torch.exp2(torch.floor(torch.log2(middle)) - 23)
    # A midpoint has one bit more than a code, so FP32 holds it and its neighbours.
    x = torch.cat((values, middle, middle - ulp, middle + ulp))
    assert torch.equal(x.float().double(), x)
    code = nearest_code(x)
    assert torch.equal(code[: len(values)], torch.arange(len(values)))
    assert bool((code[len(values) : len(values) + len(middle)] % 2 == 0).all())
    assert torch.equal(encode_e5m6_reference(x.float()).long(), code)
    assert torch.equal(encode_e5m6_reference(-x.float()).long(), code + 0x800)
    random = torch.randn(100_000).mul(8).exp().clamp(max=E5M6_MAX)
    assert torch.equal(encode_e5m6_reference(random).long(), nearest_code(random.double()))
    # From half a step above the largest number on, rounding alone would give infinity.
    too_large = torch.tensor([65279.0, 65280.0, 1e9, float("inf")])
    assert encode_e5m6_reference(torch.cat((too_large, -too_large))).tolist() == [0x7BF] * 4 + [0xFBF] * 4
    assert encode_e5m6_reference(torch.tensor([float("nan"), -float("nan")])).tolist() == [E5M6_NAN] * 2


@scales
def test_every_code_and_every_midpoint_in_the_kernels(power_of_two: bool) -> None:
    values, code = tile_of_codes()
    payload, scale = gpu.pack_e5m6(values, power_of_two)
    assert torch.equal(scale, torch.ones(1, 32))
    assert_same_bits(payload, pack_e5m6_reference(values, power_of_two)[0])
    back = gpu.unpack_e5m6(payload, scale, FP32)
    assert_same_bits(back, values)
    assert torch.equal(payload, packed(code))
    middle = ((values.abs() + torch.roll(values.abs(), 1, 1)) / 2).copysign(values)
    for x in (middle, torch.nextafter(middle, torch.zeros(())), -torch.nextafter(middle, torch.full((), 1e9))):
        x[:, 0] = E5M6_MAX
        found = gpu.unpack_e5m6(*gpu.pack_e5m6(x, power_of_two), FP32)
        expected = values_by_definition()[nearest_code(x.double().abs())].copysign(x)
        assert_same_bits(found, expected.float())


def test_codes_that_are_never_written_are_read_as_in_fp16() -> None:
    """A payload from elsewhere, or a damaged one: infinity and NaN stay what they are."""
    code = torch.cat((torch.arange(0x7C0, 0x800), torch.arange(0xFC0, 0x1000)))[None]
    payload = packed(code)
    found = gpu.unpack_e5m6(payload, torch.full((1, 1), 2.0), BF16)
    expected = unpack_e5m6_reference(payload, torch.full((1, 1), 2.0), BF16)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isinf(), expected.isinf())
    assert (int(found.isnan().sum()), int(found.isinf().sum())) == (126, 2)


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@scales
def test_kernels_give_the_bits_of_the_references(rows: int, cols: int, power_of_two: bool) -> None:
    x = example(rows, cols, FP32 if rows == 63 else BF16)
    payload, scale = gpu.pack_e5m6(x, power_of_two)
    assert (payload.shape, scale.shape) == ((rows, cols * 3 // 2), (-(-cols // 128), rows))
    assert_same_bits((payload, scale), pack_e5m6_reference(x, power_of_two))
    for dtype in (BF16, FP32):
        assert_same_bits(gpu.unpack_e5m6(payload, scale, dtype), unpack_e5m6_reference(payload, scale, dtype))


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_one_read_quantises_and_packs_and_one_unpacks_and_regroups(rows: int, cols: int) -> None:
    """The bits of two kernels each; E5M6 has powers of two whatever E4M3 has, and wgrad sees what attention sees."""
    x, power_of_two, dtype = example(rows, cols, BF16), rows != 63, FP32 if rows == 129 else BF16
    found, packed = gpu.quantize_pack(x, power_of_two), pack_e5m6_reference(x, True)
    assert_same_bits(found, (*quantize_tiles_reference(x, power_of_two), *packed))
    assert_same_bits(quantize_pack_reference(x, power_of_two), found)
    values = unpack_e5m6_reference(*packed, dtype)
    restored = gpu.unpack_quantize_transposed(*packed, dtype, power_of_two)
    assert_same_bits(restored, (values, *quantize_tiles_transposed_reference(values, power_of_two)))
    assert_same_bits(unpack_quantize_transposed_reference(*packed, dtype, power_of_two), restored)


@scales
def test_errors_are_within_half_a_step_of_fp64(power_of_two: bool) -> None:
    x = example(129, 576, FP32)
    payload, scale = pack_e5m6(x, power_of_two=power_of_two)
    found = unpack_e5m6(payload, scale, out_dtype=FP32).double()
    unit = scale.double().repeat_interleave(128, 0)[:576].t()
    error, size = (found - x.double()).abs(), x.double().abs()
    normal = size >= 2.0**-14 * unit
    assert 0.2 < float(normal.double().mean()) < 0.999
    # Six mantissa bits: half a step is 2^-7 of the number at most. FP32 scales round the quotient and the product,
    # 2^-24 each, and where amax / 65024 was rounded down saturating takes off as much.
    assert bool((error[normal] <= (2**-7 + 4 * 2**-24) * size[normal]).all())
    assert float((error[normal] / size[normal]).max()) > 0.9 * 2**-7
    # Below, steps of 2^-20; a tile of FP32 subnormals has its scale at 2^-126 and FP32's own step of 2^-149 in it.
    assert bool((error[~normal] <= 1.0001 * 2**-21 * unit[~normal] + 2.0**-149).all())


@scales
def test_an_activation_of_normal_numbers_loses_a_third_of_a_percent(power_of_two: bool) -> None:
    """E4M3 loses 2.6 %; three mantissa bits more leave an eighth of it. Subnormals count for nothing here."""
    x = torch.randn(256, 512)
    error = relative_error(unpack_e5m6(*pack_e5m6(x, power_of_two=power_of_two), out_dtype=FP32), x)
    # docs/numerics.md, for E4M3; an FP32 scale leaves the largest of each tile exact.
    assert error == pytest.approx((0.0265 if power_of_two else 0.0257) / 8, rel=0.03)


def test_power_of_two_scales_change_no_significant_bit() -> None:
    x = torch.randn(64, 256).bfloat16()
    once = unpack_e5m6(*pack_e5m6(x, power_of_two=True), out_dtype=BF16)
    assert torch.equal(unpack_e5m6(*pack_e5m6(once, power_of_two=True), out_dtype=BF16), once)
    _, scale = pack_e5m6(x, power_of_two=True)
    assert bool((scale.view(torch.int32) & 0x007FFFFF == 0).all())
    largest = x.float().abs().view(64, 2, 128).amax(-1).t() / scale
    assert bool(((largest <= E5M6_MAX) & (largest > E5M6_MAX / 2)).all())


@scales
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_number_makes_its_whole_tile_bad_and_no_other(bad: float, power_of_two: bool) -> None:
    x = torch.randn(3, 256).bfloat16()
    x[1, 200] = bad
    payload, scale = gpu.pack_e5m6(x, power_of_two)
    assert_same_bits(payload, pack_e5m6_reference(x, power_of_two)[0])
    values = gpu.unpack_e5m6(payload, scale, FP32)
    assert bool(values[1, 128:].isnan().all())
    assert int(values.isnan().sum()) == 128


def test_a_matrix_without_rows() -> None:
    found = gpu.unpack_quantize_transposed(*gpu.quantize_pack(torch.empty(0, 256, dtype=BF16), True)[2:], BF16, True)
    assert [each.shape for each in found] == [(0, 256), (256, 0), (0, 256)]
    for pack, unpack in ((gpu.pack_e5m6, gpu.unpack_e5m6), (pack_e5m6_reference, unpack_e5m6_reference)):
        payload, scale = pack(torch.empty(0, 256, dtype=BF16), True)
        assert (payload.shape, scale.shape) == ((0, 384), (2, 0))
        assert unpack(payload, scale, BF16).shape == (0, 256)


def test_odd_columns_and_foreign_payloads_are_refused() -> None:
    for shape in ((4, 127), (4, 1), (4,), (2, 3, 4)):
        with pytest.raises(ValueError, match=r"even number of columns.*got shape \["):
            pack_e5m6(torch.zeros(shape), power_of_two=True)
    payload, scale = pack_e5m6(torch.zeros(4, 256), power_of_two=True)
    for wrong in (payload[:, :-1], payload[:3], payload[:, : 3 * 64]):
        with pytest.raises(ValueError, match=r"give what pack_e5m6 returned"):
            unpack_e5m6(wrong, scale, out_dtype=BF16)
