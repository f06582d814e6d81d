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


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def tiles(rows: int, cols: int) -> tuple[Tensor, Tensor]:
    return empty(rows, cols, dtype=torch.float8_e4m3fn), empty(ceil_div(cols, TILE), rows)


def blocks(*shape: int) -> tuple[Tensor, Tensor]:
    *groups, rows, cols = shape
    return empty(*shape, dtype=torch.float8_e4m3fn), empty(*groups, ceil_div(rows, TILE), ceil_div(cols, TILE))


def ends(groups: int) -> Tensor:
    return empty(groups, dtype=torch.int32)


def describe(config: Config) -> str:
    rows, cols = config.tile
    return f"{config.schedule} {rows}x{cols}, {config.stages} x {config.blocks * TILE}"


def product(
    m: int, n: int, k: int, groups: int = 0, *, config: Config | None = None
) -> tuple[str, Callable[[], object]]:
    """fprop or dgrad on Hopper, in the shape's own configuration or in another."""
    config = config or tile_block_config(m, n, programs=PROGRAMS, groups=groups)
    weight = blocks(groups, n, k) if groups else blocks(n, k)
    call = partial(
        gemm_hopper.gemm, Quantized(*tiles(m, k)), Quantized(*weight), empty(m, n, dtype=torch.bfloat16), config=config,
        programs=PROGRAMS, group_ends=ends(groups) if groups else None,
    )  # fmt: skip
    by_group = f", {groups} groups of rows" if groups else ""
    return f"{m} x {n} x {k}{by_group}: {describe(config)}", call


def gradient(
    m: int, n: int, k: int, groups: int = 0, *, accumulate: bool, config: Config | None = None
) -> tuple[str, Callable[[], object]]:
    """wgrad on Hopper."""
    config = config or tile_tile_config()
    call = partial(
        gemm_hopper.gemm, Quantized(*tiles(m, k)), Quantized(*tiles(n, k)),
        empty(groups, m, n) if groups else empty(m, n), config=config, programs=PROGRAMS,
        group_ends=ends(groups) if groups else None, accumulate=accumulate,
    )  # fmt: skip
    by_group = f", {groups} groups" if groups else ""
    return f"wgrad {'+=' if accumulate else '='} {m} x {n} x {k}{by_group}: {describe(config)}", call


def split_product(m: int, n: int, k: int, splits: int) -> tuple[str, Callable[[], object]]:
    """fprop or dgrad in parts of the contraction."""
    call = partial(
        gemm_split_k.gemm, Quantized(*tiles(m, k)), Quantized(*blocks(n, k)), empty(m, n, dtype=torch.bfloat16),
        ends=gemm_split_k.split_ends(k, splits), programs=PROGRAMS,
    )  # fmt: skip
    return f"{m} x {n} x {k}: split-K in {splits}, two_waves 256x128, {gemm_split_k.STAGES} x {TILE}", call


def _portable() -> dict[str, Callable[[], object]]:
    x, expert, dense = tiles(TOKENS, 7168), blocks(GROUPS, 4096, 7168), blocks(4096, 7168)
    bf16, group_ends = torch.bfloat16, ends(GROUPS)
    return {
        "portable fprop": partial(gemm_fp8.gemm_tile_block, *x, *dense, bf16),
        "portable fprop, groups": partial(gemm_fp8.grouped_gemm_tile_block, *x, *expert, group_ends, bf16),
        "portable wgrad": partial(
            gemm_fp8.gemm_tile_tile, *tiles(7168, TOKENS), *tiles(2048, TOKENS), empty(7168, 2048), True
        ),
        "portable wgrad, groups": partial(
            gemm_fp8.grouped_gemm_tile_tile, *tiles(4096, TOKENS), *tiles(7168, TOKENS), group_ends,
            empty(GROUPS, 4096, 7168), True,
        ),
        "BF16 fprop, groups": partial(
            gemm_portable.grouped_matmul, empty(TOKENS, 7168, dtype=bf16), empty(GROUPS, 4096, 7168, dtype=bf16).mT,
            group_ends,
        ),
        "BF16 dgrad, groups": partial(
            gemm_portable.grouped_matmul, empty(TOKENS, 4096, dtype=bf16), empty(GROUPS, 4096, 7168, dtype=bf16),
            group_ends,
        ),
        "BF16 wgrad, groups": partial(
            gemm_portable.grouped_wgrad, empty(TOKENS, 4096, dtype=bf16), empty(TOKENS, 7168, dtype=bf16), group_ends
        ),
        "FP32 fprop, groups": partial(
            gemm_portable.grouped_matmul, empty(TOKENS, 7168), empty(GROUPS, 4096, 7168).mT, group_ends
        ),
        "FP32 wgrad, groups": partial(
            gemm_portable.grouped_wgrad, empty(TOKENS, 4096), empty(TOKENS, 7168), group_ends
        ),
    }  # fmt: skip


PORTABLE_CASES = _portable()
HOPPER_CASES = dict(
    [
        product(TOKENS, 7168, 2048),
        product(TOKENS, 7168, 2112),
        product(TOKENS, 2112, 7168),
        product(TOKENS, 1536, 24576),
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
# Configurations that were tried and are not shipped, for the evidence; the first must spill, or spills are not read.
TRIED_CASES = dict(
    [
        gradient(7168, 2048, TOKENS, config=gemm_fp8.TWO_BLOCKS, accumulate=True),
        product(TOKENS, 512, 32768, config=Config("two_blocks", stages=6)),
        product(TOKENS, 2112, 7168, config=gemm_fp8.TWO_BLOCKS),
        product(TOKENS, 7168, 2048, config=Config("two_waves", stages=2, blocks=2)),
        gradient(7168, 2048, TOKENS, config=Config("two_waves", stages=2, blocks=2), accumulate=True),
        split_product(TOKENS, 512, 32768, 2),
    ]
)
