"""Blocks from ranges of elements: whoever holds which, the bits of `quantize_blocks`; references and device code."""

from __future__ import annotations

import pytest
import torch

from kernels import block_ranges
from kernels.gpu import block_ranges as gpu
from kernels.quantize import quantize_blocks
from tests.kernels.gemm_inputs import assert_same_bits


@pytest.mark.parametrize(
    ("shape", "cuts", "power_of_two"),
    [
        ((1, 128), (128,), True),
        ((63, 130), (1, 129), False),
        ((129, 192), (128 * 65, 128 * 129), True),
        ((2, 130, 62), (129, 8060, 8061), False),
    ],
)
def test_ranges_that_cut_blocks_have_the_bits_of_the_whole(
    shape: tuple[int, ...], cuts: tuple[int, ...], power_of_two: bool
) -> None:
    w = torch.randn(shape).bfloat16()
    w[..., :3, -1] = torch.tensor([0.0, 1e-38, 1e30]).bfloat16()[: w.shape[-2]]
    whole = quantize_blocks(w, power_of_two=power_of_two)
    parts = w.flatten().tensor_split(cuts)
    starts = (0, *cuts)
    for code in (block_ranges, gpu):
        amax = [code.range_amax(part, shape, start) for part, start in zip(parts, starts, strict=True)]
        scale = block_ranges.block_scales(torch.stack(amax).amax(0), power_of_two=power_of_two)
        payload = [code.quantize_range(p, scale, shape, start) for p, start in zip(parts, starts, strict=True)]
        payloads = torch.cat([each.view(torch.uint8) for each in payload]).view(shape)
        assert_same_bits((scale, payloads), (whole.scale, whole.payload.view(torch.uint8)))
        assert_same_bits(code.transpose_blocks(whole.payload), whole.payload_t)


def test_a_nan_that_another_rank_holds_makes_its_block_nan() -> None:
    w = torch.ones(128, 256).bfloat16()
    w[127, 3] = float("nan")
    first, second = (block_ranges.range_amax(part, w.shape, 64 * i * 256) for i, part in enumerate(w.view(2, -1)))
    scale = block_ranges.block_scales(torch.maximum(first, second), power_of_two=True)
    values = block_ranges.quantize_range(w[:1].flatten(), scale, w.shape, 0).float()
    assert bool(values[:128].isnan().all())
    assert not bool(values[128:].isnan().any())
