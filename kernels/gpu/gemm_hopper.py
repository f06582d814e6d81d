"""The FP8 GEMM of Hopper in Gluon: TMA, a ring of mbarriers, asynchronous wgmma, specialised warps (sm_90a).

One program per multiprocessor works through output tiles. Its warps have three roles and meet at barriers only:

    producer, 1 warp      waits until a stage is `empty`, announces its bytes, sends for A, B and their scales by TMA
    consumers, 2 x 4 warps  wait until the stage is `full`, multiply, promote, hand the stage back

A stage holds `BLOCKS` contraction blocks of 128: A [BM, 128], B [BN, 128] (and [BN2, 128]), one scale per row of A
and, for wgrad, one per row of B. Each consumer owns half the rows of a tile and, per block, does what
arXiv:2412.19437 §3.3.2 asks for: a fresh FP32 partial sum of 128 products, times both scales, added to a total that
stays in registers.

    two_waves    256 x 128          two halves of 64 rows one after another: 128 registers of totals, 64 of partials
    two_blocks   128 x 128          two blocks in flight: the first is promoted while the second is multiplied
    wide         128 x (128 + 64)   two widths in flight; three quarters of a round of 256 x 128

With `halves`, two_waves also computes tiles of 256 x 64 (both halves of the rows in flight): the tiles of a last round
that would leave half of the programs idle, and columns behind the last multiple of 128. On 132 multiprocessors N = 2112
takes 1 round and 2 halves of one for 4,096 rows, N = 1536 1 and 1.

- A stage is handed back only after the promotion has used its scales (`_pin`): no load of it can be outstanding then.
- A finished partial is the accumulator of the next product with `use_acc=False`: one register range serves both.
- `_pin(total)` before the second product keeps its FMAs above it: else both partials are in registers and they spill.
- Every tensor map is made on the host and passed by value, offsets of groups are read on the device: nothing waits for
  the host, and a launch can be captured in a CUDA graph.

Groups (`GROUPED`), rows sorted by expert, ends multiples of 128 (DeepGEMM's layout):

    "rows"          one B per group (fprop, dgrad). A tile starts at its group's first row + i * BM; the last one of a
                    group may reach into the next, and stores only its own rows, 64 at a time. Padding rows behind the
                    last group are one more group without contraction: it stores zeros.
    "contraction"   one output per group, contracted over its rows (wgrad); a group without rows contracts nothing.

Tiles are numbered along strips of ORDER tile rows, column by column, so that tiles which are computed at the same time
share operands in the L2 cache. Groups of rows have any number of tiles, which only the device knows; each program finds
the group of its next tile by going on from the group of its last one.
Shapes: a [M, K], b [N, K] or [groups * N, K], K contiguous in both.

Past 600 lines, but one idea: the parts of one kernel share its buffers, its barriers and the order of its tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.formats import TILE, Quantized, ceil_div

Schedule = Literal["two_waves", "two_blocks", "wide"]
Grouped = Literal["", "rows", "contraction"]

BM = {"two_waves": 256, "two_blocks": 128, "wide": 128}
BN, BN2 = 128, 64

# What a wgmma of 64 x 128 and of 64 x 64 leaves in the registers of a warpgroup, and scales beside it.
LAYOUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32]))
LAYOUT2 = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32]))
BY_ROW = gl.constexpr(gl.SliceLayout(1, LAYOUT.value))
BY_ROW2 = gl.constexpr(gl.SliceLayout(1, LAYOUT2.value))
BY_COL = gl.constexpr(gl.SliceLayout(0, LAYOUT.value))


@dataclass(frozen=True)
class Config:
    """One way to run the GEMM."""

    schedule: Schedule  # what a consumer does, and with it the tile
    stages: int  # of the ring
    blocks: int = 1  # contraction blocks of 128 in a stage; 1 where groups cut the contraction
    order: int = 8  # tiles of one column that follow each other before the next column, for the L2 cache
    # Of one product with a BF16 output, two_waves: some tiles in halves (`split_last_round`).
    halves: bool = False

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns of an output tile."""
        return BM[self.schedule], BN + BN2 if self.schedule == "wide" else BN


def split_last_round(m: int, n: int, *, programs: int) -> tuple[int, int, int]:
    """Whole tiles (256x128), half tiles (256x64), and programs at work, at most `programs`, of `Config.halves`.

    Columns behind the last multiple of 128 are halves if there are 64 or fewer. A last round is done in halves if these
    and the others together are no more than the programs.
    """
    rows, cols = ceil_div(m, BM["two_waves"]), (n + 63) // BN
    whole, half = rows * cols, rows if cols * BN < n else 0
    last = whole % programs
    if 2 * last + half <= programs:
        whole, half = whole - last, half + 2 * last
    return whole, half, min(programs, whole + half)


def rounds_of_halves(whole: int, half: int, *, programs: int, half_cost: float) -> float:
    """When the last program is done, in times of a whole tile: `halves_tile`'s order in closed form."""
    rounds, last = divmod(whole, programs)
    # Programs without a whole tile in the last round take two halves before the others take one.
    free = programs - last
    behind = half - 2 * free
    of_free = min(ceil_div(half, free), 2) + ceil_div(max(behind - last, 0), programs)
    of_others = ceil_div(max(behind, 0), programs)
    return max(rounds + of_free * half_cost, (rounds + 1 + of_others * half_cost) if last else 0)


@gluon.jit
def place(tile, num_m, num_n, ORDER: gl.constexpr):
    """Row and column of a tile: columns of ORDER tiles, so that neighbours in time share operands in the L2 cache."""
    per_strip = ORDER * num_n
    strip = tile // per_strip
    first_m = strip * ORDER
    height = gl.minimum(num_m - first_m, ORDER)
    inside = tile - strip * per_strip
    return first_m + inside % height, inside // height


@gluon.jit
def group_of(tile, group, first_tile, start, end, ends_ptr, rows, groups, num_n, BM: gl.constexpr):
    """Go on from a group to the one that holds `tile`; group number `groups` holds the padding rows."""
    tiles = gl.cdiv(end - start, BM) * num_n
    while (group < groups) & (tile >= first_tile + tiles):
        first_tile += tiles
        group += 1
        start = end
        end = gl.where(group == groups, rows, gl.load(ends_ptr + gl.minimum(group, groups - 1)))
        tiles = gl.cdiv(end - start, BM) * num_n
    return group, first_tile, start, end


@gluon.jit
def columns(pn, WIDE: gl.constexpr):
    """First column of the 128 and of the 64 columns of a tile, each within one 128-column block of scales."""
    if WIDE:
        # A tile of 192 starts on a block's edge or in its middle; the 64 columns come last or first.
        odd = pn % 2
        return pn * 192 + odd * 64, pn * 192 + (1 - odd) * 128
    else:
        return pn * 128, pn * 128


@gluon.jit
def rows_tile(
    tile, group, first_tile, start, end, ends_ptr, M, num_n, groups, steps, BM: gl.constexpr, ORDER: gl.constexpr
):
    """The group's state of a tile of "rows", its first row and column number, and how many stages it contracts."""
    group, first_tile, start, end = group_of(tile, group, first_tile, start, end, ends_ptr, M, groups, num_n, BM)
    num_m = gl.cdiv(end - start, BM)
    # Tiles behind the last one have no rows: they contract nothing and store nothing.
    behind = tile >= first_tile + num_m * num_n
    pm, pn = place(gl.where(behind, 0, tile - first_tile), gl.maximum(num_m, 1), num_n, ORDER)
    m0 = gl.where(behind, end, start + pm * BM)
    return group, first_tile, start, end, m0, pn, gl.where(behind | (group == groups), 0, steps)


@gluon.jit
def contraction_tile(tile, ends_ptr, num_m, num_n, BM: gl.constexpr, ORDER: gl.constexpr):
    """Group, first row, tile column, first block of the contraction and their number, of "contraction"."""
    group = tile // (num_m * num_n)
    pm, pn = place(tile - group * (num_m * num_n), num_m, num_n, ORDER)
    start = gl.where(group == 0, 0, gl.load(ends_ptr + gl.maximum(group - 1, 0)))
    return group, pm * BM, pn, start // 128, (gl.load(ends_ptr + group) - start) // 128


@gluon.jit
def halves_tile(tile, whole, num_m, N, steps, BM: gl.constexpr, ORDER: gl.constexpr):
    """First row and column of a slot, whether it is half a tile, and how many stages it contracts.

    `whole` tiles come first. A program that has one less of them than others takes two halves in their place:
    the slots of the others next to its first half stay empty.
    """
    programs = gl.num_programs(0)
    num_n = (N + 63) // 128
    free = programs - whole % programs
    behind = tile - whole
    half = gl.where(behind < free, behind, behind - (programs - free))
    # Halves of a last column that has no more than 64 columns, then left and right halves of the last tiles.
    edges = gl.where(num_n * 128 < N, num_m, 0)
    of_tile = half - edges
    is_edge = (behind >= 0) & (of_tile < 0)
    split = gl.where(is_edge, 0, whole + of_tile // 2)
    pm, pn = place(gl.where(behind < 0, tile, split), num_m, gl.maximum(num_n, 1), ORDER)
    m0 = gl.where(is_edge, half, pm) * BM
    n0 = gl.where(is_edge, num_n * 128, pn * 128 + gl.where(behind < 0, 0, of_tile % 2 * 64))
    is_empty = (behind >= free) & (behind < programs)
    return gl.where(is_empty, num_m * BM, m0), n0, behind >= 0, gl.where(is_empty, 0, steps)


@gluon.jit
def _pin(value):
    """Have `value` computed here: an empty wait that it passes through, which Triton moves nothing across.

    ptxas does: of a second wave's 64 multiply-adds it leaves 23 before the arrive. By then they read registers only.
    """
    return warpgroup_mma_wait(0, deps=(value,))


@gluon.jit
def _produce(
    a_desc, b_desc, b2_desc, a_scale_desc, b_scale_desc, a_bufs, b_bufs, b2_bufs, a_scales, b_scales, full, empty,
    ends_ptr, M, N, K, a_scale_stride, b_scale_stride, groups, whole, tiles,
    TILE_TILE: gl.constexpr, GROUPED: gl.constexpr, BM: gl.constexpr, WIDE: gl.constexpr, STAGES: gl.constexpr,
    BLOCKS: gl.constexpr, HALVES: gl.constexpr, ORDER: gl.constexpr
):  # fmt: skip
    WIDTH: gl.constexpr = 192 if WIDE else 128
    BYTES: gl.constexpr = BLOCKS * ((BM + WIDTH) * 128 + BM * 4 + (WIDTH * 4 if TILE_TILE else 0))
    HALF_BYTES: gl.constexpr = BYTES - 64 * 128
    num_m = gl.cdiv(M, BM)
    num_n = gl.cdiv(N, WIDTH)
    stage = 0
    # The parity of the phase before the first: all stages start out empty.
    phase = 1
    group = 0
    first_tile = 0
    start = 0
    end = M
    if GROUPED == "rows":
        end = gl.load(ends_ptr)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        first_block = 0
        steps = gl.cdiv(K, 128 * BLOCKS)
        b_row = 0
        if GROUPED == "rows":
            group, first_tile, start, end, m0, pn, steps = rows_tile(
                tile, group, first_tile, start, end, ends_ptr, M, num_n, groups, steps, BM, ORDER
            )
            b_row = group * N
        elif GROUPED == "contraction":
            group, m0, pn, first_block, steps = contraction_tile(tile, ends_ptr, num_m, num_n, BM, ORDER)
        elif not HALVES:
            pm, pn = place(tile, num_m, num_n, ORDER)
            m0 = pm * BM
        if HALVES:
            m0, n0, is_half, steps = halves_tile(tile, whole, num_m, N, steps, BM, ORDER)
        else:
            n0, n2 = columns(pn, WIDE)
        for step in range(steps):
            mbarrier.wait(empty.index(stage), phase)
            bar = full.index(stage)
            if HALVES and is_half:
                mbarrier.expect(bar, HALF_BYTES)
            else:
                mbarrier.expect(bar, BYTES)
            for j in gl.static_range(BLOCKS):
                buffer = stage * BLOCKS + j
                block = first_block + step * BLOCKS + j
                tma.async_copy_global_to_shared(a_desc, [m0, block * 128], bar, a_bufs.index(buffer))
                tma.async_copy_global_to_shared(
                    a_scale_desc, [block * a_scale_stride + m0], bar, a_scales.index(buffer)
                )
                if HALVES and is_half:
                    tma.async_copy_global_to_shared(b2_desc, [n0, block * 128], bar, b_bufs.index(buffer).slice(0, 64))
                else:
                    tma.async_copy_global_to_shared(b_desc, [b_row + n0, block * 128], bar, b_bufs.index(buffer))
                if WIDE:
                    tma.async_copy_global_to_shared(b2_desc, [b_row + n2, block * 128], bar, b2_bufs.index(buffer))
                if TILE_TILE:
                    tma.async_copy_global_to_shared(
                        b_scale_desc, [block * b_scale_stride + n0], bar, b_scales.index(buffer)
                    )
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1


@gluon.jit
def _promote(total, partial, row_scale, col_scale, TILE_TILE: gl.constexpr):
    """total + partial * scales; `col_scale` is one per column for wgrad, else one number for the whole block."""
    if TILE_TILE:
        return total + (partial * row_scale[:, None]) * col_scale[None, :]
    else:
        return total + partial * (row_scale * col_scale)[:, None]


@gluon.jit
def _two_waves(a, b, row_scales, col_scale, total, total2, partial, FIRST: gl.constexpr, TILE_TILE: gl.constexpr):
    """One block of 128 rows of a consumer: two halves, one after another, with one partial sum."""
    b = b.permute((1, 0))
    row_scale = row_scales.slice(FIRST, 64).load(BY_ROW)
    partial = warpgroup_mma(a.slice(FIRST, 64), b, partial, use_acc=False, is_async=True)
    row_scale2 = row_scales.slice(FIRST + 64, 64).load(BY_ROW)
    partial = warpgroup_mma_wait(0, deps=(partial,))
    total = _pin(_promote(total, partial, row_scale, col_scale, TILE_TILE))
    partial = warpgroup_mma(a.slice(FIRST + 64, 64), b, partial, use_acc=False, is_async=True)
    partial = warpgroup_mma_wait(0, deps=(partial,))
    total2 = _pin(_promote(total2, partial, row_scale2, col_scale, TILE_TILE))
    return total, total2, partial


@gluon.jit
def _store_bf16(out_desc, buffer, total, m0, n0):
    """Through shared memory; the copy to global memory goes on while the next tile is computed."""
    # One copy may be on its way: that of the other buffer of this consumer.
    tma.store_wait(1)
    buffer.store(total.to(gl.bfloat16))
    fence_async_shared()
    tma.async_copy_shared_to_global(out_desc, [m0, n0], buffer)


@gluon.jit
def _store_bf16_halves(out_desc, buffer, total, m0, n0):
    """The same 64 columns at a time, through a buffer of half the size."""
    left, right = gl.split(gl.permute(gl.reshape(total.to(gl.bfloat16), [64, 2, 64]), (0, 2, 1)))
    tma.store_wait(0)
    buffer.store(left)
    fence_async_shared()
    tma.async_copy_shared_to_global(out_desc, [m0, n0], buffer)
    tma.store_wait(0)
    buffer.store(right)
    fence_async_shared()
    tma.async_copy_shared_to_global(out_desc, [m0, n0 + 64], buffer)


@gluon.jit
def _store_fp32(out_ptr, total, m0, n0, M, N, ACCUMULATE: gl.constexpr):
    row = m0 + gl.arange(0, 64, BY_ROW)
    col = n0 + gl.arange(0, 128, BY_COL)
    places = out_ptr + row.to(gl.int64)[:, None] * N + col[None, :]
    inside = (row[:, None] < M) & (col[None, :] < N)
    if ACCUMULATE:
        total += gl.load(places, mask=inside, other=0.0)
    gl.store(places, total, mask=inside)


@gluon.jit
def _half_tile(
    out2_desc, out_buf, out_buf2, scale_ptr, a_bufs, b_bufs, a_scales, full, empty, stage, phase, m0, n0, M,
    last_block, b_scale_stride_k, steps, FIRST: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """128 rows of 64 columns: two products of 64 rows in flight, the first is promoted during the second."""
    partial = gl.zeros([64, 64], gl.float32, LAYOUT2)
    partial2 = gl.zeros([64, 64], gl.float32, LAYOUT2)
    total = gl.zeros([64, 64], gl.float32, LAYOUT2)
    total2 = gl.zeros([64, 64], gl.float32, LAYOUT2)
    next_scale = gl.load(scale_ptr)
    for step in range(steps):
        col_scale = next_scale
        next_scale = gl.load(scale_ptr + gl.minimum(step + 1, last_block) * b_scale_stride_k)
        mbarrier.wait(full.index(stage), phase)
        a = a_bufs.index(stage)
        b = b_bufs.index(stage).slice(0, 64).permute((1, 0))
        row_scale = a_scales.index(stage).slice(FIRST, 64).load(BY_ROW2)
        row_scale2 = a_scales.index(stage).slice(FIRST + 64, 64).load(BY_ROW2)
        partial = warpgroup_mma(a.slice(FIRST, 64), b, partial, use_acc=False, is_async=True)
        partial2 = warpgroup_mma(a.slice(FIRST + 64, 64), b, partial2, use_acc=False, is_async=True)
        partial = warpgroup_mma_wait(1, deps=(partial,))
        total = _promote(total, partial, row_scale, col_scale, False)
        partial2 = warpgroup_mma_wait(0, deps=(partial2,))
        total2 = _pin(_promote(total2, partial2, row_scale2, col_scale, False))
        mbarrier.arrive(empty.index(stage), count=1)
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1
    if m0 < M:
        _store_bf16(out2_desc, out_buf.slice(0, 64, 1), total, m0, n0)
        _store_bf16(out2_desc, out_buf2.slice(0, 64, 1), total2, m0 + 64, n0)
    return stage, phase


@gluon.jit
def _consume(
    out_desc, out2_desc, out_ptr, b_scale_ptr, a_bufs, b_bufs, b2_bufs, a_scales, b_scales, out_bufs, out2_bufs,
    full, empty, ends_ptr, M, N, K, b_scale_stride_n, b_scale_stride_k, b_scale_stride_group, groups, whole, tiles,
    HALF: gl.constexpr, TILE_TILE: gl.constexpr, GROUPED: gl.constexpr, ACCUMULATE: gl.constexpr, BM: gl.constexpr,
    WIDE: gl.constexpr, STAGES: gl.constexpr, BLOCKS: gl.constexpr, HALVES: gl.constexpr, ORDER: gl.constexpr
):  # fmt: skip
    WIDTH: gl.constexpr = 192 if WIDE else 128
    FIRST: gl.constexpr = HALF * (BM // 2)
    num_m = gl.cdiv(M, BM)
    num_n = gl.cdiv(N, WIDTH)
    blocks_n = gl.cdiv(N, 128)
    blocks_k = gl.cdiv(K, 128)
    stage = 0
    phase = 0
    group = 0
    first_tile = 0
    start = 0
    end = M
    if GROUPED == "rows":
        end = gl.load(ends_ptr)
    partial = gl.zeros([64, 128], gl.float32, LAYOUT)
    if WIDE:
        partial2 = gl.zeros([64, 64], gl.float32, LAYOUT2)
    elif BM == 128 and BLOCKS == 2:
        partial2 = gl.zeros([64, 128], gl.float32, LAYOUT)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        steps = gl.cdiv(K, 128 * BLOCKS)
        first_scale = 0
        if GROUPED == "rows":
            group, first_tile, start, end, m0, pn, steps = rows_tile(
                tile, group, first_tile, start, end, ends_ptr, M, num_n, groups, steps, BM, ORDER
            )
            # Padding rows have no weight; any scale does.
            first_scale = gl.minimum(group, groups - 1) * b_scale_stride_group
        elif GROUPED == "contraction":
            group, m0, pn, _, steps = contraction_tile(tile, ends_ptr, num_m, num_n, BM, ORDER)
        elif not HALVES:
            pm, pn = place(tile, num_m, num_n, ORDER)
            m0 = pm * BM
        if HALVES:
            m0, n0, is_half, steps = halves_tile(tile, whole, num_m, N, steps, BM, ORDER)
            if is_half:
                stage, phase = _half_tile(
                    out2_desc, out_bufs.index(HALF * 2), out_bufs.index(HALF * 2 + 1),
                    b_scale_ptr + n0 // 128 * b_scale_stride_n, a_bufs, b_bufs, a_scales, full, empty, stage, phase,
                    m0 + FIRST, n0, M, blocks_k - 1, b_scale_stride_k, steps, FIRST, STAGES,
                )  # fmt: skip
                # Nothing is left of this tile.
                steps = 0
                m0 = M
        else:
            n0, n2 = columns(pn, WIDE)
        m0 += FIRST
        total = gl.zeros([64, 128], gl.float32, LAYOUT)
        if BM == 256:
            total2 = gl.zeros([64, 128], gl.float32, LAYOUT)
        if WIDE:
            total2 = gl.zeros([64, 64], gl.float32, LAYOUT2)
        if not TILE_TILE:
            # A wide tile may begin or end behind the last column.
            scale_ptr = b_scale_ptr + first_scale + gl.minimum(n0 // 128, blocks_n - 1) * b_scale_stride_n
            next_scale = gl.load(scale_ptr)
            if WIDE:
                scale2_ptr = b_scale_ptr + first_scale + gl.minimum(n2 // 128, blocks_n - 1) * b_scale_stride_n
                next_scale2 = gl.load(scale2_ptr)
            if BLOCKS == 2:
                next_scale2 = gl.load(scale_ptr + gl.minimum(1, blocks_k - 1) * b_scale_stride_k)
        for step in range(steps):
            if not TILE_TILE:
                # Asked for one stage ahead; behind the last block A is zero, and any scale does.
                col_scale = next_scale
                ahead = gl.minimum((step + 1) * BLOCKS, blocks_k - 1) * b_scale_stride_k
                next_scale = gl.load(scale_ptr + ahead)
                if WIDE:
                    col_scale2 = next_scale2
                    next_scale2 = gl.load(scale2_ptr + ahead)
                if BLOCKS == 2:
                    col_scale2 = next_scale2
                    next_scale2 = gl.load(
                        scale_ptr + gl.minimum((step + 1) * BLOCKS + 1, blocks_k - 1) * b_scale_stride_k
                    )
            mbarrier.wait(full.index(stage), phase)
            buffer = stage * BLOCKS
            if BM == 256:
                for j in gl.static_range(BLOCKS):
                    if TILE_TILE:
                        col_scale = b_scales.index(buffer + j).load(BY_COL)
                    elif j == 1:
                        col_scale = col_scale2
                    total, total2, partial = _two_waves(
                        a_bufs.index(buffer + j), b_bufs.index(buffer + j), a_scales.index(buffer + j), col_scale,
                        total, total2, partial, FIRST, TILE_TILE,
                    )  # fmt: skip
            else:
                a = a_bufs.index(buffer).slice(FIRST, 64)
                b = b_bufs.index(buffer).permute((1, 0))
                row_scale = a_scales.index(buffer).slice(FIRST, 64).load(BY_ROW)
                if TILE_TILE:
                    col_scale = b_scales.index(buffer).load(BY_COL)
                partial = warpgroup_mma(a, b, partial, use_acc=False, is_async=True)
                if WIDE:
                    row_scale2 = a_scales.index(buffer).slice(FIRST, 64).load(BY_ROW2)
                    b2 = b2_bufs.index(buffer).permute((1, 0))
                    partial2 = warpgroup_mma(a, b2, partial2, use_acc=False, is_async=True)
                    partial = warpgroup_mma_wait(1, deps=(partial,))
                    total = _promote(total, partial, row_scale, col_scale, TILE_TILE)
                    partial2 = warpgroup_mma_wait(0, deps=(partial2,))
                    total2 = _pin(_promote(total2, partial2, row_scale2, col_scale2, TILE_TILE))
                elif BLOCKS == 2:
                    a2 = a_bufs.index(buffer + 1).slice(FIRST, 64)
                    b2 = b_bufs.index(buffer + 1).permute((1, 0))
                    row_scale2 = a_scales.index(buffer + 1).slice(FIRST, 64).load(BY_ROW)
                    if TILE_TILE:
                        col_scale2 = b_scales.index(buffer + 1).load(BY_COL)
                    partial2 = warpgroup_mma(a2, b2, partial2, use_acc=False, is_async=True)
                    partial = warpgroup_mma_wait(1, deps=(partial,))
                    total = _promote(total, partial, row_scale, col_scale, TILE_TILE)
                    partial2 = warpgroup_mma_wait(0, deps=(partial2,))
                    total = _pin(_promote(total, partial2, row_scale2, col_scale2, TILE_TILE))
                else:
                    partial = warpgroup_mma_wait(0, deps=(partial,))
                    total = _pin(_promote(total, partial, row_scale, col_scale, TILE_TILE))
            mbarrier.arrive(empty.index(stage), count=1)
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        if TILE_TILE:
            matrix = out_ptr
            if GROUPED == "contraction":
                matrix = out_ptr + gl.cast(group, gl.int64) * M * N
            _store_fp32(matrix, total, m0, n0, M, N, ACCUMULATE)
            if BM == 256:
                _store_fp32(matrix, total2, m0 + 64, n0, M, N, ACCUMULATE)
        else:
            # Groups end at multiples of 128, so 64 rows belong to one of them; behind M the tensor map cuts off.
            if m0 < end:
                if WIDE:
                    _store_bf16(out_desc, out_bufs.index(HALF), total, m0, n0)
                    _store_bf16(out2_desc, out2_bufs.index(HALF), total2, m0, n2)
                elif BM == 256 and BLOCKS == 1:
                    _store_bf16(out_desc, out_bufs.index(HALF * 2), total, m0, n0)
                    _store_bf16(out_desc, out_bufs.index(HALF * 2 + 1), total2, m0 + 64, n0)
                else:
                    _store_bf16_halves(out2_desc, out2_bufs.index(HALF), total, m0, n0)
                    if BM == 256:
                        _store_bf16_halves(out2_desc, out2_bufs.index(HALF), total2, m0 + 64, n0)
    if not TILE_TILE:
        tma.store_wait(0)


@gluon.jit
def _gemm_kernel(
    a_desc, b_desc, b2_desc, a_scale_desc, b_scale_desc, out_desc, out2_desc, out_ptr, b_scale_ptr, ends_ptr,
    M, N, K, a_scale_stride, b_scale_stride_n, b_scale_stride_k, b_scale_stride_group, groups, whole, tiles,
    TILE_TILE: gl.constexpr, GROUPED: gl.constexpr, ACCUMULATE: gl.constexpr, BM: gl.constexpr, WIDE: gl.constexpr,
    STAGES: gl.constexpr, BLOCKS: gl.constexpr, HALVES: gl.constexpr, ORDER: gl.constexpr,
):  # fmt: skip
    BUFFERS: gl.constexpr = STAGES * BLOCKS
    a_bufs = gl.allocate_shared_memory(gl.float8e4nv, [BUFFERS, BM, 128], a_desc.layout)
    b_bufs = gl.allocate_shared_memory(gl.float8e4nv, [BUFFERS, 128, 128], b_desc.layout)
    a_scales = gl.allocate_shared_memory(gl.float32, [BUFFERS, BM], a_scale_desc.layout)
    # Buffers that a configuration does not have get the name of others, and are not used.
    b2_bufs = b_bufs
    b_scales = a_scales
    out_bufs = a_bufs
    out2_bufs = a_bufs
    if WIDE:
        b2_bufs = gl.allocate_shared_memory(gl.float8e4nv, [BUFFERS, 64, 128], b2_desc.layout)
    if TILE_TILE:
        b_scales = gl.allocate_shared_memory(gl.float32, [BUFFERS, 128], b_scale_desc.layout)
    else:
        if WIDE:
            out_bufs = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 128], out_desc.layout)
        elif BM == 256 and BLOCKS == 1:
            out_bufs = gl.allocate_shared_memory(gl.bfloat16, [4, 64, 128], out_desc.layout)
        # Two blocks of 256 rows leave no room for more.
        if BM == 128 or BLOCKS == 2:
            out2_bufs = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], out2_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (
                out_desc, out2_desc, out_ptr, b_scale_ptr, a_bufs, b_bufs, b2_bufs, a_scales, b_scales, out_bufs,
                out2_bufs, full, empty, ends_ptr, M, N, K, b_scale_stride_n, b_scale_stride_k, b_scale_stride_group,
                groups, whole, tiles, 0, TILE_TILE, GROUPED, ACCUMULATE, BM, WIDE, STAGES, BLOCKS, HALVES,
                ORDER,
            )),
            (_consume, (
                out_desc, out2_desc, out_ptr, b_scale_ptr, a_bufs, b_bufs, b2_bufs, a_scales, b_scales, out_bufs,
                out2_bufs, full, empty, ends_ptr, M, N, K, b_scale_stride_n, b_scale_stride_k, b_scale_stride_group,
                groups, whole, tiles, 1, TILE_TILE, GROUPED, ACCUMULATE, BM, WIDE, STAGES, BLOCKS, HALVES,
                ORDER,
            )),
            (_produce, (
                a_desc, b_desc, b2_desc, a_scale_desc, b_scale_desc, a_bufs, b_bufs, b2_bufs, a_scales, b_scales,
                full, empty, ends_ptr, M, N, K, a_scale_stride, b_scale_stride_k, groups, whole,
                tiles, TILE_TILE, GROUPED, BM, WIDE, STAGES, BLOCKS, HALVES, ORDER,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def gemm(
    a: Quantized,
    b: Quantized,
    out: Tensor,
    *,
    config: Config,
    programs: int,
    group_ends: Tensor | None = None,
    accumulate: bool = False,
) -> None:
    """out = or += a @ b.T, once, by group of rows, or by group of the contraction; what it is follows from shapes.

    Args:
        a: payload [M, K], K contiguous, row stride a multiple of 16 bytes; tile scales [ceil(K/128), M].
        b: payload [N, K], or [groups, N, K] for rows in groups; for a bf16 `out` blocks, whose scales
            [..., ceil(N/128), ceil(K/128)] may have any strides; for an fp32 one tiles, scales [ceil(K/128), N].
        out: [M, N] bf16; fp32 [M, N], or [groups, M, N] for a contraction in groups; contiguous, written in place.
        config: schedule and ring.
        programs: most programs at work, one per multiprocessor.
        group_ends: [groups] int32, exclusive end rows, multiples of 128.
        accumulate: add to `out` (fp32 only).
    """
    tile_tile = out.dtype == torch.float32
    grouped: Grouped = "" if group_ends is None else "contraction" if tile_tile else "rows"
    (m, k), n = a.payload.shape, out.shape[-1]
    bm, width = config.tile
    groups = 1 if group_ends is None else len(group_ends)
    whole, tiles = 0, ceil_div(m, bm) * ceil_div(n, width)
    if config.halves:
        whole, half, programs = split_last_round(m, n, programs=programs)
        free = programs - whole % programs
        tiles = whole + half + (programs - free if half > free else 0)
    elif grouped == "contraction":
        tiles *= groups
    elif grouped == "rows":
        # Every group may waste the better part of a tile, and so may the padding rows.
        tiles = (m // bm + groups + 1) * ceil_div(n, width)
    assert not config.halves or (config.schedule == "two_waves" and config.blocks == 1), config
    assert not config.halves or not (grouped or tile_tile), "half tiles are for one product in BF16"
    assert config.blocks == 1 or (config.schedule != "wide" and grouped != "contraction"), config
    assert not (tile_tile and config.schedule == "wide"), "128x192 tiles store BF16 only"
    a_scale, weight = _padded_scale(a.scale), b.payload.flatten(0, -2)
    # Each map costs the host some microseconds: one that a configuration does not read is another of its maps.
    a_scale_desc, a_desc, b_desc = _vector(a_scale, bm), _matrix(a.payload, bm), _matrix(weight, BN)
    b2_desc = _matrix(weight, BN2) if config.schedule == "wide" or config.halves else b_desc
    if tile_tile:
        b_scale = _padded_scale(b.scale)
        b_scale_desc, out_desc, out2_desc = _vector(b_scale, BN), a_desc, a_desc
        stride_n, stride_k, stride_group = 0, b_scale.stride(0), 0
    else:
        b_scale = b.scale
        b_scale_desc, out_desc = a_scale_desc, _matrix(out, 64)
        in_halves = bm == 128 or config.blocks == 2 or config.halves
        out2_desc = _matrix(out, 64, cols=64) if in_halves else out_desc
        stride_group, stride_n, stride_k = b_scale.stride() if b_scale.dim() == 3 else (0, *b_scale.stride())
    _gemm_kernel[(min(programs, tiles),)](
        a_desc, b_desc, b2_desc, a_scale_desc, b_scale_desc, out_desc, out2_desc,
        out, b_scale, a_scale if group_ends is None else group_ends,
        m, n, k, a_scale.stride(0), stride_n, stride_k, stride_group, groups, whole, tiles,
        tile_tile, grouped, accumulate, bm, config.schedule == "wide", config.stages, config.blocks, config.halves,
        config.order, num_warps=4, maxnreg=168,
    )  # fmt: skip


GLUON_TYPES: dict[torch.dtype, Any] = {torch.float8_e4m3fn: gl.float8e4nv, torch.bfloat16: gl.bfloat16}


def _matrix(x: Tensor, rows: int, *, cols: int = TILE) -> TensorDescriptor:
    """A tensor map of [rows, cols] boxes, swizzled for wgmma; reading behind the edge gives zeros."""
    layout = gl.NVMMASharedLayout.get_default_for([rows, cols], GLUON_TYPES[x.dtype])
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, cols], layout)


def _vector(scale: Tensor, count: int) -> TensorDescriptor:
    """A tensor map of `count` scales in a row, over all of them as one line."""
    return TensorDescriptor(scale, [scale.numel()], [1], [count], gl.NVMMASharedLayout(0, 32, 1))


def _padded_scale(scale: Tensor) -> Tensor:
    """[blocks, rows] with a row stride that is a multiple of 16 bytes, which a bulk copy asks for."""
    rows = scale.shape[1]
    return torch.nn.functional.pad(scale, (0, -rows % 4)) if rows % 4 else scale.contiguous()
