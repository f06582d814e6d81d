"""FP8 rows by slot, row by row in plain Python: what a token was quantised to, once for each of its experts."""

from __future__ import annotations

import pytest
import torch

from kernels.formats import ceil_div
from kernels.gather import gather_quantize_both, gather_requantize_transposed, gather_tiles
from kernels.quantize import (
    dequantize_tiles,
    quantize_tiles,
    quantize_tiles_both,
    quantize_tiles_transposed,
    requantize_transposed,
)
from kernels.tiles import decode_e4m3
from tests.kernels.expert_layouts import KINDS, choices, layout_of
from tests.kernels.gemm_inputs import assert_same_bits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tokens", "cols", "which"), [(1, 129, "whole"), (63, 300, "partial"), (129, 1, "whole")])
def test_a_row_is_its_token_and_padding_is_zero_with_scale_one(tokens: int, cols: int, which: str, kind: str) -> None:
    x = torch.randn(tokens, cols) * torch.randn(tokens, 1).exp()
    _, layout = layout_of(choices(kind, tokens, 3), which)
    slots, token_rows = layout.slot_of_row, quantize_tiles(x, power_of_two=True)
    rows = gather_tiles(token_rows, slots, 3)
    assert rows.payload.shape == (len(slots), cols)
    assert rows.scale.shape == (ceil_div(cols, 128), len(slots))
    values = dequantize_tiles(token_rows)
    for row, slot in enumerate(slots.tolist()):
        if slot < 0:
            assert not decode_e4m3(rows.payload[row]).any()
            assert bool((rows.scale[:, row] == 1).all())
        else:
            assert torch.equal(rows.scale[:, row], token_rows.scale[:, slot // 3])
    copies = torch.stack([values[slot // 3] if slot >= 0 else torch.zeros(cols) for slot in slots.tolist()])
    assert torch.equal(dequantize_tiles(rows), copies)
    by_column = gather_requantize_transposed(token_rows, slots, 3, power_of_two=True)
    for found, wanted in (
        (by_column, requantize_transposed(rows, power_of_two=True)),
        (by_column, quantize_tiles_transposed(copies, power_of_two=True)),
        *zip(
            gather_quantize_both(values, slots, 3, power_of_two=True),
            quantize_tiles_both(copies, power_of_two=True),
            strict=True,
        ),
    ):
        assert_same_bits((found.payload, found.scale), (wanted.payload, wanted.scale))
