"""The GEMMs at the sizes of DeepSeek-V3, each configuration that one of them gets, for `hopper_codegen.py`.

On a CPU `kernels.gpu.gemm_fp8` takes the portable kernels; so the Gluon kernel is called with the configuration that a
GPU of 132 multiprocessors would give the shape.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kernels.formats import TILE, Quantized, ceil_div
from kernels.gpu import gemm_fp8, gemm_hopper, gemm_portable
from kernels.gpu.gemm_fp8 import tile_block_config, tile_tile_config
from kernels.gpu.gemm_hopper import Config
from tests.kernels import gemm_split_k

TOKENS = 4096
PROGRAMS = 132
# Rows of this rank's experts, and how many experts it has.
ROWS, GROUPS = 32768, 8

bf16 = partial(torch.empty, dtype=torch.bfloat16)
fp8 = partial(torch.empty, dtype=torch.float8_e4m3fn)


def tiles(rows: int, cols: int) -> tuple[Tensor, Tensor]:
    return fp8(rows, cols), torch.empty(ceil_div(cols, TILE), rows)


def blocks(*shape: int) -> tuple[Tensor, Tensor]:
    *groups, rows, cols = shape
    return fp8(shape), torch.empty(*groups, ceil_div(rows, TILE), ceil_div(cols, TILE))


def ends(groups: int) -> Tensor | None:
    return torch.empty(groups, dtype=torch.int32) if groups else None


def describe(config: Config) -> str:
    rows, cols = config.tile
    halves = f" and {rows}x{cols // 2}" if config.halves else ""
    return f"{config.schedule} {rows}x{cols}{halves}, {config.stages} x {config.blocks * TILE}"


def product(
    m: int, n: int, k: int, groups: int = 0, *, config: Config | None = None
) -> tuple[str, Callable[[], object]]:
    """fprop or dgrad on Hopper, in the shape's own configuration or in another."""
    config = config or tile_block_config(m, n, programs=PROGRAMS, groups=groups)
    weight = blocks(groups, n, k) if groups else blocks(n, k)
    call = partial(
        gemm_hopper.gemm, Quantized(*tiles(m, k)), Quantized(*weight), bf16(m, n), config=config, programs=PROGRAMS,
        group_ends=ends(groups),
    )  # fmt: skip
    by_group = f", {groups} groups of rows" if groups else ""
    return f"{m} x {n} x {k}{by_group}: {describe(config)}", call


def gradient(
    m: int, n: int, k: int, groups: int = 0, *, accumulate: bool, config: Config | None = None
) -> tuple[str, Callable[[], object]]:
    """wgrad on Hopper."""
    config = config or tile_tile_config()
    out = torch.empty(groups, m, n) if groups else torch.empty(m, n)
    call = partial(
        gemm_hopper.gemm, Quantized(*tiles(m, k)), Quantized(*tiles(n, k)), out, config=config, programs=PROGRAMS,
        group_ends=ends(groups), accumulate=accumulate,
    )  # fmt: skip
    by_group = f", {groups} groups" if groups else ""
    return f"wgrad {'+=' if accumulate else '='} {m} x {n} x {k}{by_group}: {describe(config)}", call


def split_product(m: int, n: int, k: int, splits: int) -> tuple[str, Callable[[], object]]:
    """fprop or dgrad in parts of the contraction."""
    call = partial(
        gemm_split_k.gemm, Quantized(*tiles(m, k)), Quantized(*blocks(n, k)), bf16(m, n),
        ends=gemm_split_k.split_ends(k, splits), programs=PROGRAMS,
    )  # fmt: skip
    return f"{m} x {n} x {k}: split-K in {splits}, two_waves 256x128, {gemm_split_k.STAGES} x {TILE}", call


def _portable() -> dict[str, Callable[[], object]]:
    x, expert, dense = tiles(TOKENS, 7168), blocks(GROUPS, 4096, 7168), blocks(4096, 7168)
    weights, group_ends = (GROUPS, 4096, 7168), ends(GROUPS)
    calls = {
        "portable fprop": (gemm_fp8.gemm_tile_block, *x, *dense, torch.bfloat16),
        "portable fprop, groups": (gemm_fp8.grouped_gemm_tile_block, *x, *expert, group_ends, torch.bfloat16),
        "portable wgrad": (
            gemm_fp8.gemm_tile_tile, *tiles(7168, TOKENS), *tiles(2048, TOKENS), torch.empty(7168, 2048), True,
        ),
        "portable wgrad, groups": (
            gemm_fp8.grouped_gemm_tile_tile, *tiles(4096, TOKENS), *tiles(7168, TOKENS), group_ends,
            torch.empty(weights), True,
        ),
        "BF16 fprop, groups": (gemm_portable.grouped_matmul, bf16(TOKENS, 7168), bf16(weights).mT, group_ends),
        "BF16 dgrad, groups": (gemm_portable.grouped_matmul, bf16(TOKENS, 4096), bf16(weights), group_ends),
        "BF16 on Hopper, groups: padding rows": (gemm_portable.cleared, bf16(TOKENS, 4096), group_ends),
        "BF16 wgrad, groups": (gemm_portable.grouped_wgrad, bf16(TOKENS, 4096), bf16(TOKENS, 7168), group_ends),
        "FP32 fprop, groups": (
            gemm_portable.grouped_matmul, torch.empty(TOKENS, 7168), torch.empty(weights).mT, group_ends,
        ),
        "FP32 wgrad, groups": (
            gemm_portable.grouped_wgrad, torch.empty(TOKENS, 4096), torch.empty(TOKENS, 7168), group_ends,
        ),
    }  # fmt: skip
    return {name: partial(*call) for name, call in calls.items()}


PORTABLE_CASES = _portable()
HOPPER_CASES = dict(
    [
        product(TOKENS, 7168, 2048),
        product(TOKENS, 7168, 2112),
        product(TOKENS, 2112, 7168),
        product(2048, 1536, 24576),
        product(TOKENS, 512, 32768),
        product(ROWS, 4096, 7168, GROUPS),
        product(ROWS, 1536, 7168, GROUPS),
        product(2048, 4096, 7168, GROUPS),
        gradient(2112, 7168, TOKENS, accumulate=False),
        gradient(7168, 2048, TOKENS, accumulate=True),
        gradient(4096, 7168, ROWS, GROUPS, accumulate=False),
        gradient(4096, 7168, ROWS, GROUPS, accumulate=True),
    ]
)
GEMM_CASES = HOPPER_CASES | PORTABLE_CASES
# Whose schedule and branches other cases have too.
GEMM_AGAIN = (
    product(TOKENS, 7168, 2112)[0],
    product(ROWS, 1536, 7168, GROUPS)[0],
    product(2048, 4096, 7168, GROUPS)[0],
    gradient(2112, 7168, TOKENS, accumulate=False)[0],
    gradient(7168, 2048, TOKENS, accumulate=True)[0],
    gradient(4096, 7168, ROWS, GROUPS, accumulate=False)[0],
    "portable fprop",
    "portable wgrad",
    "BF16 dgrad, groups",
    "FP32 wgrad, groups",
)
# Configurations that were tried and are not shipped, for the evidence; the first must spill, or spills are not read.
SPILLING_CASES = dict([gradient(7168, 2048, TOKENS, config=gemm_fp8.TWO_BLOCKS, accumulate=True)])
TRIED_CASES = SPILLING_CASES | dict(
    [
        product(TOKENS, 512, 32768, config=Config("two_blocks", stages=6)),
        product(TOKENS, 2112, 7168, config=gemm_fp8.TWO_BLOCKS),
        product(TOKENS, 7168, 2048, config=Config("two_waves", stages=2, blocks=2)),
        gradient(7168, 2048, TOKENS, config=Config("two_waves", stages=2, blocks=2), accumulate=True),
        split_product(TOKENS, 512, 32768, 2),
    ]
)
