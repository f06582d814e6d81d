"""Split-K in the Gluon interpreter, its parts added in Triton's: FP64 results, and the same bits in any order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels import gemm_inputs, gemm_split_k
from tests.kernels.gemm_inputs import BF16_TOLERANCE, Problem, relative_error
from tests.kernels.gluon_interpreter import interpret
from tests.kernels.test_gemm_hopper import ORDERS


def run(problem: Problem, splits: int, *, count: int, **options: Any) -> Tensor:
    out = torch.full(problem.expected.shape, float("nan"), dtype=torch.bfloat16)
    ends = gemm_split_k.split_ends(problem.quantized[0].payload.shape[1], splits)
    with interpret(**options):
        gemm_split_k.gemm(*problem.quantized, out, ends=ends, programs=count)
    return out


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("m", "n", "k", "splits"),
    [
        (300, 256, 1024, 2),
        # Ragged in all three, the contraction in parts of one and of two blocks, fewer programs than tiles.
        (129, 200, 576, 3),
        # A part without a block.
        (63, 8, 128, 2),
    ],
)
def test_parts_add_up_to_the_product(m: int, n: int, k: int, splits: int, order: str) -> None:
    problem = gemm_inputs.tile_block(m, n, k)
    assert relative_error(run(problem, splits, count=3, **ORDERS[order]), problem.expected) < BF16_TOLERANCE


def test_the_order_of_programs_changes_no_bit() -> None:
    problem = gemm_inputs.tile_block(300, 256, 1152)
    tiles = 3 * 2 * 2
    orders = [list(range(tiles)), list(reversed(range(tiles))), torch.randperm(tiles).tolist()]
    results = [run(problem, 3, count=tiles, programs=order, races=False) for order in orders]
    assert all(torch.equal(result, results[0]) for result in results)
    assert relative_error(results[0], problem.expected) < BF16_TOLERANCE


@pytest.mark.parametrize(
    ("k", "splits", "ends"), [(32768, 2, [16384, 32768]), (576, 3, [128, 384, 640]), (1, 2, [0, 128])]
)
def test_parts_are_as_equal_as_blocks_of_128_allow(k: int, splits: int, ends: list[int]) -> None:
    assert gemm_split_k.split_ends(k, splits).tolist() == ends
