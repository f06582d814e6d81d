"""E4M3 decodes to exactly what the format's definition says, for every code."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kernels.formats import E4M3_MAX, TILE, Quantized, ceil_div
from kernels.quantize import dequantize_blocks, quantize_blocks
from kernels.tiles import decode_e4m3
from tests.kernels.gemm_inputs import assert_same_values


def value_of_code(code: int) -> float:
    """The OCP definition: sign, 4 exponent bits with bias 7, 3 mantissa bits, all ones is NaN."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code >> 3) & 0xF, code & 0x7
    if exponent == 15 and mantissa == 7:
        return math.nan
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def all_codes() -> Tensor:
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)


def test_every_code_decodes_to_its_definition() -> None:
    expected = torch.tensor([value_of_code(code) for code in range(256)])
    assert_same_values(decode_e4m3(all_codes()), expected)
    assert decode_e4m3(all_codes()).isnan().nonzero().flatten().tolist() == [0x7F, 0xFF]


def test_largest_number_is_the_constant() -> None:
    assert decode_e4m3(all_codes()).nan_to_num(0).max().item() == E4M3_MAX


def test_subnormals_survive_flush_to_zero_mode() -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no flush-to-zero mode; CI (x86) runs this")
    try:
        decoded = decode_e4m3(all_codes())
    finally:
        torch.set_flush_denormal(False)
    assert decoded[1].item() == 2.0**-9


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (63, 129), (2, 3, 7)])
def test_decoding_agrees_with_torch_on_any_shape(shape: tuple[int, ...]) -> None:
    payload = torch.randint(0, 256, shape, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert_same_values(decode_e4m3(payload), payload.float())


def test_decoding_a_transposed_view_is_the_transposed_decoding() -> None:
    payload = torch.randint(0, 256, (63, 129), dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert_same_values(decode_e4m3(payload.t()), decode_e4m3(payload).t())


@pytest.mark.parametrize("shape", [(200, 576), (3, 130, 129)])
def test_transposed_blocks_hold_the_transposed_values(shape: tuple[int, ...]) -> None:
    blocks = quantize_blocks(torch.randn(shape), power_of_two=False)
    transposed = blocks.transposed_blocks()
    assert torch.equal(dequantize_blocks(transposed), dequantize_blocks(blocks).mT)
    # The copy contracts over contiguous elements; without one it is a view.
    assert transposed.payload.is_contiguous()
    view = Quantized(blocks.payload, blocks.scale).transposed_blocks()
    assert view.payload.data_ptr() == blocks.payload.data_ptr()
    assert_same_values(decode_e4m3(view.payload), decode_e4m3(transposed.payload))
    assert transposed.transposed_blocks().payload is blocks.payload


def test_quantized_is_immutable() -> None:
    q = Quantized(all_codes(), torch.ones(1))
    with pytest.raises(AttributeError):
        q.scale = torch.zeros(1)  # type: ignore[misc]


@pytest.mark.parametrize(("numerator", "tiles"), [(0, 0), (1, 1), (128, 1), (129, 2), (576, 5), (2112, 17)])
def test_ceil_div_counts_tiles(numerator: int, tiles: int) -> None:
    assert ceil_div(numerator, TILE) == tiles
