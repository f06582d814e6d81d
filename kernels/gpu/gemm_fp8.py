"""Launchers of `kernels.gemm_fp8` and `kernels.gemm_grouped`: which kernel, in which configuration, a shape gets.

On an H100 or H800 the Gluon kernel serves whatever a tensor map can describe: rows of 16 bytes, BF16 out for fprop and
dgrad. Everything else takes plain Triton. The choice is a function of shapes and of the device: the same in every run.
With `kernels.backend=deepgemm` it is DeepGEMM for the products that were measured to be faster there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import deepgemm
from kernels.backend import multiprocessors, use_gluon
from kernels.deepgemm import Product
from kernels.formats import Quantized, ceil_div
from kernels.gpu import gemm_hopper, gemm_portable
from kernels.gpu.gemm_hopper import Config, rounds_of_halves, split_last_round

TWO_WAVES = Config("two_waves", stages=3)
TWO_BLOCKS = Config("two_blocks", stages=3, blocks=2)
WIDE = Config("wide", stages=4)
HALVES = Config("two_waves", stages=3, halves=True)
# Speed per FLOP of a tile relative to 256x128's, all multiprocessors busy. 128x128 was measured on an H100 with an
# earlier prototype (959 of 1205 TFLOP/s after accounting for idle multiprocessors), 128x192 is an assumption between
# the two. The half tiles of HALVES get 128x128's: alone at N = 2112, which 256x64 fills, the prototype reached 966
# TFLOP/s, 0.82 of 256x128's at N = 4096. The kernels of this repository have not run on a GPU.
RELATIVE_SPEED = {TWO_WAVES: 1.0, TWO_BLOCKS: 0.8, WIDE: 0.9, HALVES: 0.8}
# With fewer rows in the mean group than this, half a 256-row tile of each is lost too often.
FEW_ROWS = 512


def tile_block_config(m: int, n: int, *, programs: int, groups: int = 0) -> Config:
    """The configuration of fprop and dgrad for m rows of all groups, 0 groups for one product, n columns."""
    if groups and m < groups * FEW_ROWS:
        return TWO_BLOCKS
    # The time of a launch is that of its rounds (tiles over programs, rounded up) times a tile's work over its speed.
    # So N = 2112 on 4,096 rows takes 256 whole tiles and 16 halves (2.25 rounds where whole ones take 3, and 128x192
    # the time of 2.5), N = 1536 132 and 120 (1.63 for 2 and 1.67), and N = 512 takes 128x128.

    def cost(config: Config) -> float:
        rows, cols = config.tile
        if config.halves:
            whole, half, busy = split_last_round(m, n, programs=programs)
            rounds = rounds_of_halves(whole, half, programs=busy, half_cost=0.5 / RELATIVE_SPEED[config])
            return rounds * rows * cols
        rounds = ceil_div(ceil_div(m, rows) * ceil_div(n, cols), programs)
        return rounds * rows * cols / RELATIVE_SPEED[config]

    return min([TWO_WAVES, WIDE, TWO_BLOCKS] + [HALVES] * (not groups), key=cost)


def tile_tile_config() -> Config:
    """The configuration of wgrad: the others hold column scales besides and spill (`docs/kernels.md`)."""
    return TWO_WAVES


def gemm_tile_block(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out_dtype: torch.dtype) -> Tensor:
    """a [m, k] @ b [n, k].T -> [m, n] out_dtype."""
    return grouped_gemm_tile_block(a, a_scale, b, b_scale, None, out_dtype)


def grouped_gemm_tile_block(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, group_ends: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """a [rows of g, k] @ b[g] [n, k].T -> [rows, n] out_dtype; zeros from the last end on. Without ends, one b."""
    (m, k), n = a.shape, b.shape[-2]
    out = a.new_empty(m, n, dtype=out_dtype)
    if not out.numel():
        return out
    aq, bq = _contiguous(a, a_scale), Quantized(b.contiguous(), b_scale)
    if use_gluon(out) and out_dtype == torch.bfloat16 and k % 16 == 0 and n % 8 == 0:
        programs, groups = multiprocessors(out), 0 if group_ends is None else len(group_ends)
        if deepgemm.takes(Product("rows", n, k, groups)):
            deepgemm.tile_block(aq, bq, out, None if group_ends is None else deepgemm.rows_to_groups(group_ends, m))
            return out
        config = tile_block_config(m, n, programs=programs, groups=groups)
        gemm_hopper.gemm(aq, bq, out, config=config, programs=programs, group_ends=group_ends)
    else:
        gemm_portable.tile_block(aq, bq, out, group_ends=group_ends)
    return out


def gemm_tile_tile(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, out: Tensor, accumulate: bool) -> None:
    """out [m, n] fp32 = or += a [m, k] @ b [n, k].T."""
    grouped_gemm_tile_tile(a, a_scale, b, b_scale, None, out, accumulate)


def grouped_gemm_tile_tile(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, group_ends: Tensor | None, out: Tensor, accumulate: bool
) -> None:
    """out [groups, m, n] fp32 = or += a[:, rows of g] @ b[:, rows of g].T. Without ends, one product."""
    assert out.is_contiguous(), out.stride()
    assert out.dtype == torch.float32, out.dtype
    if not out.numel():
        return
    aq, bq, k = _contiguous(a, a_scale), _contiguous(b, b_scale), a.shape[1]
    if not (use_gluon(out) and k % 16 == 0 and k):
        gemm_portable.tile_tile(aq, bq, out, accumulate=accumulate, group_ends=group_ends)
    elif accumulate and group_ends is None and deepgemm.takes(Product("wgrad", len(a), len(b))):
        deepgemm.add_tile_tile(aq, bq, out)
    else:
        config, programs = tile_tile_config(), multiprocessors(out)
        gemm_hopper.gemm(aq, bq, out, config=config, programs=programs, group_ends=group_ends, accumulate=accumulate)


def _contiguous(payload: Tensor, scale: Tensor) -> Quantized:
    return Quantized(payload.contiguous(), scale.contiguous())
