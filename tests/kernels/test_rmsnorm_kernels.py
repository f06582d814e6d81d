"""The device code of the norm in Triton's interpreter: bit-equal given rstd, which is within its sum's roundings.

A sum of n squares in any order and the root behind it are within a few units in the last place of each other; 2 were
seen over 20,000 rows, 4 are allowed. All else of forward is exact given rstd, with or without fused multiply-adds.

Sizes are those where something ends: one row, an odd one, a whole tile, one more, many programs and one row; widths of
V3, of its latents and of `tiny`. Outputs are NaN before they are written (tests/conftest.py).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import quantize, rmsnorm
from kernels.gpu import rmsnorm as gpu
from tests.kernels.gemm_inputs import assert_same_bits

BF16, FP32 = torch.bfloat16, torch.float32
EPS = 1e-6
SIZES = [(1, 7168), (63, 576), (128, 96), (129, 320), (4097, 128)]

sizes = pytest.mark.parametrize(("rows", "cols"), SIZES)


@pytest.fixture(autouse=True)
def few_programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes a millisecond an operation and program, however large the program is."""
    rows = getattr(request.node, "callspec", None) and request.node.callspec.params.get("rows", 0)
    other = {1: {"ROWS_OF_PROGRAM": 2}, 4097: {"ELEMENTS": 1 << 16, "ELEMENTS_OF_THREAD": 256}}
    # Four steps a program, and several over the programs' sums.
    other[129] = {"ELEMENTS_OF_THREAD": 8, "PARTS": 4}
    for name, value in {"COLUMNS": 1024, **other.get(rows, {})}.items():
        monkeypatch.setattr(gpu, name, value)


def example(rows: int, cols: int, dtype: torch.dtype = BF16) -> Tensor:
    """Rows of different size, one of zeros."""
    x = torch.randn(rows, cols) * torch.randn(rows, 1).mul(2).exp()
    x[1:2] = 0
    return x.to(dtype)


def apart(rows: int, cols: int, dtype: torch.dtype = BF16) -> tuple[Tensor, Tensor]:
    """A slice of wider rows, as a latent is one, and the whole."""
    whole = example(rows, 64 + cols + 512, dtype)
    return whole[:, 64 : 64 + cols], whole


@sizes
@pytest.mark.parametrize("added", [True, False], ids=["sum", "slice"])
def test_given_rstd_all_bits_of_forward_are_the_references(rows: int, cols: int, added: bool) -> None:
    dtype = FP32 if rows == 128 else BF16
    weight = (1 + 0.1 * torch.randn(cols)).to(dtype)
    x, delta = (
        (example(rows, cols, dtype), example(rows, cols, dtype)) if added else (apart(rows, cols, dtype)[0], None)
    )
    power_of_two = rows != 63
    total, y, payload, scale, rstd, nan = gpu.add_norm_quantize(x, delta, weight, EPS, power_of_two, True, True)
    expected = rmsnorm.add_norm_quantize_reference(x, delta, weight, EPS, power_of_two, True, True)
    assert_same_bits(total, expected[0])
    assert int((rstd.view(torch.int32) - expected[4].view(torch.int32)).abs().max()) <= 4
    assert bool(nan.isnan())
    assert_same_bits(y, rmsnorm.normed_rows(x if delta is None else total, weight, rstd))
    assert_same_bits((payload, scale), quantize.quantize_tiles_reference(y, power_of_two))
    # Again, of a slice: squares of 128 columns do not know of each other.
    width = min(cols, 384)
    kept = (x if delta is None else total)[:, :width], weight[:width], rstd, power_of_two
    again = quantize.requantize_transposed_reference(payload[:, :width], scale[: -(-width // 128)], power_of_two)
    assert_same_bits(gpu.norm_again(*kept, True, True), (*again, y[:, :width].contiguous()))
    if rows == 1:
        assert_same_bits(gpu.norm_again(*kept, True, False), (*again, y[:0, :0]))
        *tiles, plain = gpu.norm_again(*kept, False, True)
        assert_same_bits(plain, y[:, :width])
        assert [each.numel() for each in tiles] == [0, 0]
        # What is not asked for is not written, and the rest is the same.
        tiles_only = gpu.add_norm_quantize(x, delta, weight, EPS, power_of_two, True, False)
        assert_same_bits(tiles_only[2:5], (payload, scale, rstd))
        y_only = gpu.add_norm_quantize(x, delta, weight, EPS, power_of_two, False, True)
        assert_same_bits(y_only[1], y)
        assert (tiles_only[1].numel(), y_only[2].numel(), y_only[3].numel()) == (0, 0, 0)


# Gradients of readers, whether the sum has one, whether rows lie apart.
@sizes
@pytest.mark.parametrize(("readers", "of_sum"), [(2, False), (3, True)])
def test_gradients_are_within_their_roundings_of_fp64_and_rounded_where_the_reference_is(
    rows: int, cols: int, readers: int, of_sum: bool
) -> None:
    dtype = FP32 if rows == 128 else BF16
    weight = (1 + 0.1 * torch.randn(cols)).to(dtype)
    x = example(rows, cols, dtype) if of_sum else apart(rows, cols, dtype)[0]
    dys = [example(rows, cols, dtype) for _ in range(readers)]
    dys += [None] * (3 - readers)  # type: ignore[list-item]
    d_sum = example(rows, cols, dtype) if of_sum else None
    rstd = rmsnorm.add_norm_quantize_reference(x, None, weight, EPS, True, False, False)[4]
    whole = torch.empty(rows, 128 + cols + 64, dtype=dtype)
    out, again, wanted = whole[:, 128 : 128 + cols], torch.empty(rows, cols, dtype=dtype), torch.empty(rows, cols)
    wanted = wanted.to(dtype)
    parts, d_weight = gpu.norm_backward(*dys, d_sum, x, weight, rstd, out), torch.empty(cols, dtype=dtype)
    gpu.norm_gain_gradient(parts, d_weight, dtype, accumulate=False)
    assert bool(whole[:, :128].isnan().all())
    assert bool(whole[:, 128 + cols :].isnan().all())
    if rows == 129:
        assert_same_bits(gpu.norm_backward(*dys, d_sum, x, weight, rstd, again), parts)
        assert_same_bits(again, out)
        # Added in FP32 to what was there, rounded as if it stood alone.
        sums = torch.randn(cols)
        expected = sums + d_weight
        gpu.norm_gain_gradient(parts, sums, dtype, accumulate=True)
        assert_same_bits(sums, expected)
    rmsnorm.norm_backward_reference(*dys, d_sum, x, weight, rstd, wanted)
    # A result whose FP32 value, off by some ten roundings of 2^-24, is that near to a rounding edge of BF16, in each of
    # its roundings; a rounding left out moves a quarter of them.
    if dtype == BF16:
        assert int((out != wanted).sum()) <= max(2, 2 * 10 * 2**-15 * out.numel())

    # The gradients of readers, added as autograd adds them, are exact numbers from here on.
    dy = dys[0]
    for each in dys[1:readers]:
        dy = dy + each
    wide_x, wide_dy, wide_weight, root = x.double(), dy.double(), weight.double(), rstd.double()[:, None]
    norm = wide_x * root
    products = wide_dy * norm
    projection = norm * (products @ wide_weight)[:, None] / cols
    exact = (wide_dy * wide_weight - projection) * root
    # Up to 32 roundings of 2^-24 on the way: of the projection's sum, as large as its terms are, 16 in a thread.
    in_projection = norm.abs() * (products.abs() @ wide_weight.abs())[:, None] / cols
    terms = ((wide_dy * wide_weight).abs() + in_projection) * root
    step, size = 2**-8 if dtype == BF16 else 2**-24, exact.abs()
    if d_sum is not None:
        exact = exact + d_sum.double()
        size = size + exact.abs()
    assert bool(((out.double() - exact).abs() <= 1.01 * step * size + 2**-19 * terms + 1e-38).all())
    of_weight = products.sum(0)
    bound = step * of_weight.abs() + 2**-20 * products.abs().sum(0) + 1e-38
    assert bool(((d_weight.double() - of_weight).abs() <= bound).all())


def test_a_bad_number_makes_its_row_bad_and_no_other() -> None:
    x = example(5, 512)
    x[2, 300] = float("nan")
    _, y, payload, scale, _, _ = gpu.add_norm_quantize(x, None, torch.ones(512, dtype=BF16), EPS, True, True, True)
    values = quantize.dequantize_tiles_reference(payload, scale, FP32)
    for found in (y, values):
        assert bool(found[2].isnan().all())
        assert int(found.isnan().sum()) == 512


def test_an_expanded_gradient_is_read_as_what_it_shows() -> None:
    x, weight, rstd = example(5, 96), torch.ones(96, dtype=BF16), torch.rand(5)
    one = torch.ones(1, 1, dtype=BF16).expand(5, 96)
    found, wanted = torch.empty(5, 96, dtype=BF16), torch.empty(5, 96, dtype=BF16)
    gpu.norm_backward(one, None, None, one, x, weight, rstd, found)
    gpu.norm_backward(one.contiguous(), None, None, one.contiguous(), x, weight, rstd, wanted)
    assert_same_bits(found, wanted)


def test_matrices_without_rows() -> None:
    x, weight = torch.empty(0, 512, dtype=BF16), torch.ones(512, dtype=BF16)
    found = gpu.add_norm_quantize(x, x, weight, EPS, True, True, True)
    assert [tuple(t.shape) for t in found[:5]] == [(0, 512), (0, 512), (0, 512), (4, 0), (0,)]
    again = gpu.norm_again(x, weight, torch.empty(0), True, True, True)
    assert [tuple(t.shape) for t in again] == [(512, 0), (0, 512), (0, 512)]
    parts, d_weight = gpu.norm_backward(x, None, None, None, x, weight, torch.empty(0), x), torch.empty(512)
    for accumulate in (False, True):
        gpu.norm_gain_gradient(parts, d_weight, BF16, accumulate)
        assert_same_bits(d_weight, torch.zeros(512))
