"""The Triton kernels of `kernels/gpu/quantize.py`, interpreted, give the bits of the references.

Sizes are those where something ends: one row, an odd one, a whole tile, one more, many tiles and one row. Outputs are
NaN before the kernel writes them (tests/conftest.py).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import quantize
from kernels.gpu import quantize as gpu
from tests.kernels.gemm_inputs import assert_same_bits

# 2112 and 576 are DeepSeek-V3's widths that are no multiples of 128.
SHAPES = [(1, 128), (63, 576), (128, 256), (129, 2112), (4097, 128)]

pytestmark = pytest.mark.parametrize("power_of_two", [True, False], ids=["power of two", "FP32 scales"])


@pytest.fixture(autouse=True)
def few_programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes a millisecond an operation and program, however large the program is."""
    if request.node.callspec.params.get("rows", 0) > 1000:
        monkeypatch.setattr(gpu, "ROWS", 512)
        monkeypatch.setattr(gpu, "TILES", 1)


def example(rows: int, cols: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Rows of very different size, a tile of zeros, a subnormal tile, and amax on either side of a power of two."""
    x = torch.randn(rows, cols) * torch.randn(rows, 1).mul(4).exp()
    x[0, :128] = 0
    if rows > 2:
        x[1, :128] = 1e-39
        x[2, :128] = 448 * 2.0**-3
    return x.to(dtype)


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_tiles_by_row_and_by_column(rows: int, cols: int, power_of_two: bool) -> None:
    x = example(rows, cols, torch.float32 if rows == 129 else torch.bfloat16)
    by_row = quantize.quantize_tiles_reference(x, power_of_two)
    by_column = quantize.quantize_tiles_transposed_reference(x, power_of_two)
    assert_same_bits(gpu.quantize_tiles(x, power_of_two), by_row)
    assert_same_bits(gpu.quantize_tiles_transposed(x, power_of_two), by_column)
    assert_same_bits(gpu.quantize_tiles_both(x, power_of_two), by_row + by_column)


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_regrouping_and_decoding(rows: int, cols: int, power_of_two: bool) -> None:
    q = quantize.quantize_tiles_reference(example(rows, cols), power_of_two)
    assert_same_bits(
        gpu.requantize_transposed(*q, power_of_two), quantize.requantize_transposed_reference(*q, power_of_two)
    )
    values = quantize.dequantize_tiles_reference(*q, torch.bfloat16)
    assert_same_bits(gpu.dequantize_tiles(*q, torch.bfloat16), values)


@pytest.mark.parametrize("shape", [(1, 128), (129, 576), (3, 256, 192)])
def test_blocks_and_their_transposed_copy(shape: tuple[int, ...], power_of_two: bool) -> None:
    w = torch.randn(shape).bfloat16()
    payload, scale, payload_t = gpu.quantize_blocks(w, power_of_two)
    assert_same_bits((payload, scale, payload_t), quantize.quantize_blocks_reference(w, power_of_two))
    assert_same_bits(payload_t, payload.mT)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_number_makes_its_whole_tile_bad_and_no_other(bad: float, power_of_two: bool) -> None:
    x = torch.randn(130, 256).bfloat16()
    x[3, 5] = bad
    payload, scale, payload_t, scale_t = gpu.quantize_tiles_both(x, power_of_two)
    rows = gpu.dequantize_tiles(payload, scale, torch.float32).isnan()
    cols = gpu.dequantize_tiles(payload_t, scale_t, torch.float32).isnan()
    assert bool((rows[3, :128] & cols[5, :128]).all())
    assert int(rows.sum()) == int(cols.sum()) == 128


def test_a_matrix_without_rows(power_of_two: bool) -> None:
    payload, scale = gpu.quantize_tiles(torch.empty(0, 256, dtype=torch.bfloat16), power_of_two)
    assert (payload.shape, scale.shape) == ((0, 256), (2, 0))
