"""FP8 products equal the exact product of their dequantised operands, up to FP32 accumulation."""

from __future__ import annotations

import math

import pytest
import torch

from kernels.formats import TILE, Quantized
from kernels.gemm_fp8 import gemm_tile_block, gemm_tile_tile
from tests.kernels.gemm_inputs import (
    assert_exact_up_to_accumulation,
    exact_blocks,
    exact_tiles,
    random_blocks,
    random_tiles,
    rolled,
    slices,
)

# (m, n, k): single elements, every dim ragged, DeepSeek-V3's 576 and 2112, whole tiles.
SHAPES = [(1, 1, 1), (63, 129, 576), (129, 200, 2112), (128, 256, 512), (1, 300, 127)]


def first_tiles(q: Quantized, count: int) -> Quantized:
    return Quantized(q.payload[:, : count * TILE], q.scale[:count])


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_tile_block_product_is_exact_up_to_fp32_accumulation(m: int, n: int, k: int) -> None:
    a, b = random_tiles(m, k), random_blocks(n, k)
    out = gemm_tile_block(a, b, out_dtype=torch.float32)
    assert_exact_up_to_accumulation(out, exact_tiles(a), exact_blocks(b))


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_transposed_blocks_serve_dgrad(m: int, n: int, k: int) -> None:
    a, weight = random_tiles(m, k), random_blocks(k, n)
    out = gemm_tile_block(a, weight.transposed_blocks(), out_dtype=torch.float32)
    assert_exact_up_to_accumulation(out, exact_tiles(a), exact_blocks(weight).t())


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_tile_tile_product_is_exact_up_to_fp32_accumulation(m: int, n: int, k: int) -> None:
    a, b = random_tiles(m, k), random_tiles(n, k)
    assert_exact_up_to_accumulation(gemm_tile_tile(a, b), exact_tiles(a), exact_tiles(b))


def test_the_accumulation_check_sees_a_neighbours_scale_and_a_dropped_tile() -> None:
    a, blocks, tiles = random_tiles(63, 576), random_blocks(300, 576), random_tiles(300, 576)
    wrong = [
        (gemm_tile_block(a, rolled(blocks, 1), out_dtype=torch.float32), exact_blocks(blocks)),
        (gemm_tile_block(a, rolled(blocks, 0), out_dtype=torch.float32), exact_blocks(blocks)),
        (gemm_tile_tile(a, rolled(tiles, 0)), exact_tiles(tiles)),
        (gemm_tile_tile(first_tiles(a, 4), first_tiles(tiles, 4)), exact_tiles(tiles)),
    ]
    for out, exact_b in wrong:
        with pytest.raises(AssertionError, match="times the bound"):
            assert_exact_up_to_accumulation(out, exact_tiles(a), exact_b)


def test_scales_multiply_the_partial_sum_of_128_products() -> None:
    # Partial sums of small integers are exact in FP32, so the promotion can be written out to the last bit.
    a = Quantized(torch.randint(-8, 9, (5, 256)).to(torch.float8_e4m3fn), torch.rand(2, 5) + 0.5)
    b = Quantized(torch.randint(-8, 9, (3, 256)).to(torch.float8_e4m3fn), torch.rand(2, 3) + 0.5)
    expected = torch.zeros(5, 3)
    for t, tile in enumerate(slices([TILE, 2 * TILE])):
        partial = (a.payload[:, tile].double() @ b.payload[:, tile].double().t()).float()
        scale = a.scale[t][:, None] * b.scale[t]
        # One FP32 rounding or two, depending on whether the processor fuses multiply and add.
        fused = (expected.double() + partial.double() * scale.double()).float()
        separate = expected + partial * scale
        expected = gemm_tile_tile(first_tiles(a, t + 1), first_tiles(b, t + 1))
        assert bool(((expected == fused) | (expected == separate)).all())


def test_bf16_output_is_the_rounded_fp32_output() -> None:
    a, b = random_tiles(63, 576), random_blocks(129, 576)
    exact = gemm_tile_block(a, b, out_dtype=torch.float32)
    assert torch.equal(gemm_tile_block(a, b, out_dtype=torch.bfloat16), exact.bfloat16())


def test_products_repeat_bit_for_bit() -> None:
    a, b, c = random_tiles(129, 2112), random_blocks(200, 2112), random_tiles(200, 2112)
    assert torch.equal(gemm_tile_block(a, b, out_dtype=torch.float32), gemm_tile_block(a, b, out_dtype=torch.float32))
    assert torch.equal(gemm_tile_tile(a, c), gemm_tile_tile(a, c))


def test_a_nan_in_the_payload_reaches_its_row_alone() -> None:
    a, b = random_tiles(5, 256), random_blocks(7, 256)
    a.payload.view(torch.uint8)[2, 200] = 0x7F
    out = gemm_tile_block(a, b, out_dtype=torch.float32)
    assert bool(out[2].isnan().all())
    assert int(out.isnan().sum()) == 7


def test_a_nan_scale_reaches_its_row_and_its_block() -> None:
    a, b = random_tiles(5, 256), random_blocks(200, 256)
    a.scale[1, 2] = math.nan
    b.scale[1, 0] = math.nan
    out = gemm_tile_block(a, b, out_dtype=torch.float32).isnan()
    assert bool(out[2].all())
    assert bool(out[:, 128:].all())
    assert int(out.sum()) == 128 + 5 * 72


def test_an_empty_contraction_is_zero() -> None:
    assert gemm_tile_tile(random_tiles(3, 0), random_tiles(2, 0)).tolist() == [[0.0, 0.0]] * 3
    assert gemm_tile_block(random_tiles(0, 64), random_blocks(2, 64), out_dtype=torch.float32).shape == (0, 2)


def test_different_contraction_lengths_are_refused_with_both() -> None:
    with pytest.raises(ValueError, match="got 256 and 128; transpose one operand"):
        gemm_tile_block(random_tiles(3, 256), random_blocks(256, 128), out_dtype=torch.float32)
    with pytest.raises(ValueError, match="got 256 and 128; transpose one operand"):
        gemm_tile_tile(random_tiles(3, 256), random_tiles(256, 128))
