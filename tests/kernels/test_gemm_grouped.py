"""Grouped FP8 products are one exact product per expert, whatever the experts' loads."""

from __future__ import annotations

import math
import re

import pytest
import torch

from kernels.formats import TILE, Quantized
from kernels.gemm_fp8 import gemm_tile_block, gemm_tile_tile
from kernels.gemm_grouped import grouped_gemm_tile_block, grouped_gemm_tile_tile
from tests.kernels.gemm_inputs import (
    assert_exact_up_to_accumulation,
    exact_blocks,
    exact_tiles,
    random_blocks,
    random_tiles,
    slices,
)

# Ends of four groups within 640 rows: an empty expert and spare rows; one expert takes all; none has any.
ENDS = [[128, 128, 384, 512], [0, 0, 640, 640], [0, 0, 0, 0], [128, 256, 384, 640]]
ROWS = 640


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize(("n", "k"), [(129, 576), (256, 128), (1, 2112)])
def test_each_experts_rows_meet_its_own_weight(n: int, k: int, ends: list[int]) -> None:
    a, b = random_tiles(ROWS, k), random_blocks(4, n, k)
    out = grouped_gemm_tile_block(a, b, torch.tensor(ends, dtype=torch.int32), out_dtype=torch.float32)
    for g, rows in enumerate(slices(ends)):
        assert_exact_up_to_accumulation(out[rows], exact_tiles(a)[rows], exact_blocks(b)[g])
    assert int(out[ends[-1] :].count_nonzero()) == 0


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize(("m", "n"), [(129, 63), (576, 1)])
def test_each_experts_weight_gradient_contracts_its_own_rows(m: int, n: int, ends: list[int]) -> None:
    a, b = random_tiles(m, ROWS), random_tiles(n, ROWS)
    out = grouped_gemm_tile_tile(a, b, torch.tensor(ends, dtype=torch.int32))
    for g, rows in enumerate(slices(ends)):
        assert_exact_up_to_accumulation(out[g], exact_tiles(a)[:, rows], exact_tiles(b)[:, rows])


@pytest.mark.parametrize("shift", [1, -1])
def test_the_check_sees_a_neighbouring_experts_rows(shift: int) -> None:
    a, b, ends = random_tiles(ROWS, 128), random_blocks(4, 64, 128), [128, 256, 384, 640]
    wrong = Quantized(b.payload.roll(shift, 0), b.scale.roll(shift, 0))
    out = grouped_gemm_tile_block(a, wrong, torch.tensor(ends, dtype=torch.int32), out_dtype=torch.float32)
    with pytest.raises(AssertionError):
        assert_exact_up_to_accumulation(out[:128], exact_tiles(a)[:128], exact_blocks(b)[0])


def test_a_group_equals_the_dense_product_bit_for_bit() -> None:
    a, b, ends = random_tiles(ROWS, 576), random_blocks(4, 129, 576), torch.tensor(ENDS[0], dtype=torch.int32)
    out = grouped_gemm_tile_block(a, b, ends, out_dtype=torch.bfloat16)
    columns = random_tiles(65, ROWS)
    dw = grouped_gemm_tile_tile(columns, columns, ends)
    for g, rows in enumerate(slices(ENDS[0])):
        part = Quantized(a.payload[rows], a.scale[:, rows])
        dense = gemm_tile_block(part, Quantized(b.payload[g], b.scale[g]), out_dtype=torch.bfloat16)
        assert torch.equal(out[rows], dense)
        k_tiles = slice(rows.start // TILE, rows.stop // TILE)
        part = Quantized(columns.payload[:, rows], columns.scale[k_tiles])
        assert torch.equal(dw[g], gemm_tile_tile(part, part))


def test_transposed_experts_serve_dgrad() -> None:
    dy, weight, ends = random_tiles(ROWS, 129), random_blocks(4, 129, 200), ENDS[0]
    dx = grouped_gemm_tile_block(
        dy, weight.transposed_blocks(), torch.tensor(ends, dtype=torch.int32), out_dtype=torch.float32
    )
    for g, rows in enumerate(slices(ends)):
        assert_exact_up_to_accumulation(dx[rows], exact_tiles(dy)[rows], exact_blocks(weight)[g].t())


def test_spare_rows_stay_zero_even_if_they_hold_nan() -> None:
    a, b = random_tiles(ROWS, 128), random_blocks(2, 64, 128)
    a.scale[:, 256:] = math.nan
    out = grouped_gemm_tile_block(a, b, torch.tensor([128, 256]), out_dtype=torch.float32)
    assert bool(out.isfinite().all())
    assert int(out[256:].count_nonzero()) == 0


@pytest.mark.parametrize("ends", [[100, 256], [256, 128], [128, 768], [-128, 128], [128, 256, 384], [128]])
def test_bad_group_ends_are_refused_with_their_values(ends: list[int]) -> None:
    a, b = random_tiles(ROWS, 128), random_blocks(2, 64, 128)
    with pytest.raises(ValueError, match=re.escape(f"multiples of 128 up to 640 rows, got {ends}")):
        grouped_gemm_tile_block(a, b, torch.tensor(ends, dtype=torch.int32), out_dtype=torch.float32)


def test_different_contraction_lengths_are_refused_with_both() -> None:
    ends = torch.tensor([128, 256], dtype=torch.int32)
    with pytest.raises(ValueError, match="got 256 and 128"):
        grouped_gemm_tile_block(random_tiles(256, 256), random_blocks(2, 256, 128), ends, out_dtype=torch.float32)
    with pytest.raises(ValueError, match="got 256 and 384"):
        grouped_gemm_tile_tile(random_tiles(8, 256), random_tiles(8, 384), ends)
