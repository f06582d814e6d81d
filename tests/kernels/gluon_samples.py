"""Two small Gluon kernels for Hopper, right in the two usual styles, for the tests of the interpreter.

- `ring_gemm`: a producer partition copies stages of a ring by TMA, a consumer multiplies and releases them. It is
  D[m, n] = sum_k (A[m, k] @ B[n, k]^T) * row_scales[k, m] * weights[k] in FP8, persistent over its tiles.
- `ahead_gemm`: one partition, copies issued one step ahead, the wgmma of a step left in flight through the next one.
  It is D[g] = A[:, tokens of g] @ B[:, tokens of g]^T in BF16, for groups of tokens of different lengths.

Shapes: m and n in rows of A and B, k in blocks of BLOCK_K. Not for use: no tile is tuned, and neither was run on a GPU.
"""

from __future__ import annotations

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

from kernels.gpu.gemm_hopper import _matrix, _vector

BLOCK_M = gl.constexpr(64)
BLOCK_N = gl.constexpr(64)
BLOCK_K = gl.constexpr(128)
AHEAD_K = gl.constexpr(64)


@gluon.jit
def tile_origin(tile, columns):
    tiles_n = gl.cdiv(columns, BLOCK_N)
    return tile // tiles_n * BLOCK_M, tile % tiles_n * BLOCK_N


@gluon.jit
def produce(inputs, ring, rows, columns, blocks, padded_rows, STAGES: gl.constexpr):
    a_desc, b_desc, scale_desc = inputs
    a_ring, b_ring, scale_ring, full, empty = ring
    stage = 0
    parity = 1
    for tile in range(gl.program_id(0), gl.cdiv(rows, BLOCK_M) * gl.cdiv(columns, BLOCK_N), gl.num_programs(0)):
        row, column = tile_origin(tile, columns)
        for k in range(blocks):
            mbarrier.wait(empty.index(stage), parity)
            landed = full.index(stage)
            mbarrier.expect(landed, (BLOCK_M + BLOCK_N) * BLOCK_K + BLOCK_M * 4)
            tma.async_copy_global_to_shared(a_desc, [row, k * BLOCK_K], landed, a_ring.index(stage))
            tma.async_copy_global_to_shared(scale_desc, [k * padded_rows + row], landed, scale_ring.index(stage))
            tma.async_copy_global_to_shared(b_desc, [column, k * BLOCK_K], landed, b_ring.index(stage))
            stage += 1
            if stage == STAGES:
                stage = 0
                parity ^= 1


@gluon.jit
def consume(d_desc, weights, ring, out, rows, columns, blocks, STAGES: gl.constexpr):
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 32])
    a_ring, b_ring, scale_ring, full, empty = ring
    product = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout)
    stage = 0
    parity = 0
    for tile in range(gl.program_id(0), gl.cdiv(rows, BLOCK_M) * gl.cdiv(columns, BLOCK_N), gl.num_programs(0)):
        row, column = tile_origin(tile, columns)
        total = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout)
        for k in range(blocks):
            weight = gl.load(weights + k)
            mbarrier.wait(full.index(stage), parity)
            scale = scale_ring.index(stage).load(gl.SliceLayout(1, layout))
            b = b_ring.index(stage).permute((1, 0))
            product = warpgroup_mma(a_ring.index(stage), b, product, use_acc=False, is_async=True)
            product = warpgroup_mma_wait(0, deps=(product,))
            total += product * (scale * weight)[:, None]
            mbarrier.arrive(empty.index(stage), count=1)
            stage += 1
            if stage == STAGES:
                stage = 0
                parity ^= 1
        tma.store_wait(0)
        out.store(total.to(gl.bfloat16))
        fence_async_shared()
        tma.async_copy_shared_to_global(d_desc, [row, column], out)
    tma.store_wait(0)


@gluon.jit
def ring_gemm(
    a_desc, b_desc, scale_desc, d_desc, weights, rows, columns, blocks, padded_rows, STAGES: gl.constexpr
):  # fmt: skip
    a_ring = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, BLOCK_M, BLOCK_K], a_desc.layout)
    b_ring = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, BLOCK_N, BLOCK_K], b_desc.layout)
    scale_ring = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], scale_desc.layout)
    out = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_M, BLOCK_N], d_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    ring = (a_ring, b_ring, scale_ring, full, empty)
    gl.warp_specialize(
        [
            (consume, (d_desc, weights, ring, out, rows, columns, blocks, STAGES)),
            (produce, ((a_desc, b_desc, scale_desc), ring, rows, columns, blocks, padded_rows, STAGES)),
        ],
        [1],
        [24],
    )


@gluon.jit
def issue(a_desc, b_desc, a_ring, b_ring, landed, step, token, STAGES: gl.constexpr):
    stage = step % STAGES
    mbarrier.expect(landed.index(stage), (2 * BLOCK_M + BLOCK_N) * AHEAD_K * 2)
    tma.async_copy_global_to_shared(a_desc, [0, token], landed.index(stage), a_ring.index(stage))
    tma.async_copy_global_to_shared(b_desc, [0, token], landed.index(stage), b_ring.index(stage))


@gluon.jit
def store_rows(d, values, row, rows, columns, layout: gl.constexpr):
    m = row + gl.arange(0, BLOCK_M, gl.SliceLayout(1, layout))
    n = gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
    mask = (m[:, None] < rows) & (n[None, :] < columns)
    gl.store(d + m.to(gl.int64)[:, None] * columns + n[None, :], values, mask=mask)


@gluon.jit
def ahead_gemm(a_desc, b_desc, d, group_starts, rows, columns, STAGES: gl.constexpr):
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    a_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 2 * BLOCK_M, AHEAD_K], a_desc.layout)
    b_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_N, AHEAD_K], b_desc.layout)
    landed = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(landed.index(i), count=1)
    fence_async_shared()
    group = gl.program_id(0)
    start = gl.load(group_starts + group)
    steps = (gl.load(group_starts + group + 1) - start) // AHEAD_K
    upper = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout)
    lower = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout)
    if steps > 0:
        issue(a_desc, b_desc, a_ring, b_ring, landed, 0, start, STAGES)
    step = 0
    while step < steps:
        if step + 1 < steps:
            issue(a_desc, b_desc, a_ring, b_ring, landed, step + 1, start + (step + 1) * AHEAD_K, STAGES)
        stage = step % STAGES
        mbarrier.wait(landed.index(stage), step // STAGES & 1)
        b = b_ring.index(stage).permute((1, 0))
        upper = warpgroup_mma(a_ring.index(stage).slice(0, BLOCK_M), b, upper, is_async=True)
        lower = warpgroup_mma(a_ring.index(stage).slice(BLOCK_M, BLOCK_M), b, lower, is_async=True)
        upper, lower = warpgroup_mma_wait(2, deps=(upper, lower))
        step += 1
    upper, lower = warpgroup_mma_wait(0, deps=(upper, lower))
    first = d + group.to(gl.int64) * rows * columns
    store_rows(first, upper, 0, rows, columns, layout)
    store_rows(first, lower, BLOCK_M, rows, columns, layout)


def launch_ring_gemm(
    a: Tensor, b: Tensor, *, row_scales: Tensor, weights: Tensor, programs: int = 2, stages: int = 2
) -> Tensor:
    """D of `ring_gemm`: a [m, k * 128], b [n, k * 128], n a multiple of 8, row_scales [k, padded m], weights [k]."""
    rows, columns = a.shape[0], b.shape[0]
    d = a.new_empty(rows, columns, dtype=torch.bfloat16)
    ring_gemm[(programs,)](
        _matrix(a, 64), _matrix(b, 64), _vector(row_scales.view(-1), 64), _matrix(d, 64, cols=64), weights, rows,
        columns, weights.numel(), row_scales.shape[1], STAGES=stages, num_warps=4,
    )  # fmt: skip
    return d


def launch_ahead_gemm(a: Tensor, b: Tensor, *, group_starts: Tensor, stages: int = 3) -> Tensor:
    """D of `ahead_gemm`: a [m <= 128, tokens], b [n <= 64, tokens] bfloat16, group_starts [groups + 1] int32."""
    groups, rows, columns = group_starts.numel() - 1, a.shape[0], b.shape[0]
    d = a.new_empty(groups, rows, columns, dtype=torch.float32)
    ahead_gemm[(groups,)](
        _matrix(a, 128, cols=64), _matrix(b, 64, cols=64), d, group_starts, rows, columns, STAGES=stages, num_warps=4
    )
    return d
