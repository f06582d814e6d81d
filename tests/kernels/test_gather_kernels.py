"""The Triton kernels of `kernels/gpu/gather.py`, interpreted: the bits of a copy of tokens followed by a quantiser.

Sizes are those where something ends: no token, one, an odd number, a tile of rows, one more, many blocks and one; a
last tile of 62 and of 64 columns. Outputs are NaN before the kernel writes them (tests/conftest.py).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import gather, quantize
from kernels.gpu import gather as gpu
from kernels.permute import copy_tokens_reference
from kernels.tiles import decode_e4m3
from tests.kernels.expert_layouts import choices, layout_of
from tests.kernels.gemm_inputs import assert_same_bits

# Tokens, columns, topk, the experts that are here, whether scales are powers of two.
CASES = [
    (0, 128, 3, "whole", True),
    (1, 576, 3, "partial", False),
    (63, 62, 3, "whole", False),
    (128, 192, 1, "partial", True),
    (129, 320, 2, "whole", True),
    (4097, 64, 1, "partial", False),
]
E4M3, FP32 = torch.float8_e4m3fn, torch.float32


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes a millisecond an operation and program, however large the program is."""
    monkeypatch.setattr(gpu, "ROWS", 256)
    monkeypatch.setattr(gpu, "TILES", 2)


def example(tokens: int, cols: int) -> Tensor:
    """BF16 rows of different size, one of zeros."""
    x = torch.randn(tokens, cols) * torch.randn(tokens, 1).mul(2).exp()
    x[1:2] = 0
    return x.bfloat16()


@pytest.mark.parametrize(("tokens", "cols", "topk", "which", "power_of_two"), CASES)
def test_rows_have_the_bits_of_copies_that_are_quantised(
    tokens: int, cols: int, topk: int, which: str, power_of_two: bool
) -> None:
    x = example(tokens, cols)
    _, layout = layout_of(choices("random", tokens, topk), which)
    slots = layout.slot_of_row
    copies = copy_tokens_reference(x, slots, topk)
    by_row = quantize.quantize_tiles_reference(copies, power_of_two)
    by_column = quantize.quantize_tiles_transposed_reference(copies, power_of_two)
    regrouped = quantize.requantize_transposed_reference(*by_row, power_of_two)
    tokens_in_tiles = quantize.quantize_tiles_reference(x, power_of_two)
    found = gpu.gather_quantize_both(x, slots, topk, power_of_two)
    assert_same_bits(found, (*by_row, *by_column))
    assert_same_bits(gather.gather_quantize_both_reference(x, slots, topk, power_of_two), found)
    sources = [tokens_in_tiles]
    if cols % 4 == 0:
        # As tokens arrive over the wire.
        scales = tokens_in_tiles[1].t().clone(memory_format=torch.contiguous_format)
        packets = torch.cat((tokens_in_tiles[0].view(torch.uint8), scales.view(torch.uint8)), dim=1)
        sources.append((packets[:, :cols].view(E4M3), packets[:, cols:].view(FP32).t()))
    for source in sources:
        assert_same_bits(gpu.gather_tiles(*source, slots, topk), by_row)
        assert_same_bits(gpu.gather_requantize_transposed(*source, slots, topk, power_of_two), regrouped)
        assert_same_bits(gather.gather_tiles_reference(*source, slots, topk), by_row)
        assert_same_bits(gather.gather_requantize_transposed_reference(*source, slots, topk, power_of_two), regrouped)


def test_regrouping_is_exact_outside_underflow_for_every_code_and_scale_exponent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each of the 246 tokens has all finite codes and one exponent of a scale; 63 blocks of 128 exponents in a row.

    Exact is what the new tile can hold: 4 bits above 2^-6 of its scale, multiples of 2^-9 below.
    """
    monkeypatch.setattr(gpu, "COLUMNS_TRANSPOSED", 128)
    # 448 * 2^119 is the largest that FP32 holds.
    exponents = torch.arange(-126, 120)
    codes = (torch.arange(256) + 37 * torch.arange(len(exponents))[:, None]) % 256
    codes[(codes & 0x7F) == 0x7F] = 0
    payload = codes.to(torch.uint8).view(E4M3)
    scale = torch.ldexp(torch.ones(len(exponents)), exponents).expand(2, -1)
    slots = ((torch.arange(0, 4 * 63, 4)[:, None] + torch.arange(128)) % len(exponents)).flatten()
    payload_t, scale_t = gpu.gather_requantize_transposed(payload, scale, slots, 1, True)
    before = (decode_e4m3(payload).double() * scale[0].double()[:, None])[slots]  # [rows, 256]
    new_scale = scale_t.double().repeat_interleave(128, 0)
    amax = before.view(63, 128, 256).abs().amax(1)
    assert torch.equal(scale_t.double(), (amax / 448).log2().ceil().clamp_min(-126).exp2())
    after = decode_e4m3(payload_t.t()).double() * new_scale
    scaled = before / new_scale
    held = (scaled.abs() >= 2**-6) | (scaled * 2**9 == (scaled * 2**9).round())
    assert torch.equal(after[held], before[held])
    assert bool(((after - before).abs() <= 2**-10 * new_scale).all())
    # Neither side of the condition is empty.
    assert 100_000 < int((held & (before != 0)).sum()) < before.numel() - 100_000


def test_a_bad_number_makes_its_tiles_bad_and_no_others() -> None:
    x = torch.randn(5, 256).bfloat16()
    x[2, 3] = float("nan")
    slots = torch.arange(5)
    by_row = gpu.gather_tiles(*quantize.quantize_tiles_reference(x, True), slots, 1)
    values = quantize.dequantize_tiles_reference(*by_row, FP32)
    assert bool(values[2, :128].isnan().all())
    assert int(values.isnan().sum()) == 128
    by_column = gpu.gather_quantize_both(x, slots, 1, True)[2:]
    values = quantize.dequantize_tiles_reference(*by_column, FP32)
    assert bool(values[3].isnan().all())
    assert int(values.isnan().sum()) == 5
