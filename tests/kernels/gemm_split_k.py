"""Split-K for fprop and dgrad: written and compiled for the evidence, not shipped (`docs/kernels.md` says why).

N = 512 on 4,096 rows gives 64 tiles of 256x128, half of what fills 132 multiprocessors. Here each tile is computed in
`splits` parts of the contraction by as many programs, each part an FP32 matrix of its own, and a second kernel adds
the parts from the first to the last and rounds once to BF16. No atomic additions: the same bits in every run, however
programs are scheduled. The parts' room in memory is splits * M * N * 4 bytes, written once and read once.

The parts are a product in groups of the contraction, as in wgrad, but with one scale per block of B: the producer, the
place of a tile, what is done with a block, and the store are the shipped kernel's; the consumer is its own. Without
BF16 buffers a fourth stage fits. Shapes: a [M, K], b [N, K], K contiguous in both.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from kernels.formats import TILE, Quantized, ceil_div
from kernels.gpu.gemm_hopper import (
    BN,
    LAYOUT,
    _matrix,
    _padded_scale,
    _produce,
    _store_fp32,
    _two_waves,
    _vector,
    contraction_tile,
)

BM, STAGES, ORDER = 256, 4, 8
# Elements of a program that adds parts, and its warps.
ELEMENTS, WARPS = 4096, 8


@gluon.jit
def _consume(
    parts_ptr, b_scale_ptr, a_bufs, b_bufs, a_scales, full, empty, ends_ptr,
    M, N, K, b_scale_stride_n, b_scale_stride_k, tiles,
    HALF: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr, ORDER: gl.constexpr
):  # fmt: skip
    FIRST: gl.constexpr = HALF * (BM // 2)
    num_m = gl.cdiv(M, BM)
    num_n = gl.cdiv(N, 128)
    last_block = gl.cdiv(K, 128) - 1
    stage = 0
    phase = 0
    partial = gl.zeros([64, 128], gl.float32, LAYOUT)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        split, m0, pn, first_block, steps = contraction_tile(tile, ends_ptr, num_m, num_n, BM, ORDER)
        m0 += FIRST
        total = gl.zeros([64, 128], gl.float32, LAYOUT)
        total2 = gl.zeros([64, 128], gl.float32, LAYOUT)
        scale_ptr = b_scale_ptr + pn * b_scale_stride_n
        next_scale = gl.load(scale_ptr + gl.minimum(first_block, last_block) * b_scale_stride_k)
        for step in range(steps):
            # Asked for one block ahead; what is behind a part's last block is not used.
            col_scale = next_scale
            next_scale = gl.load(scale_ptr + gl.minimum(first_block + step + 1, last_block) * b_scale_stride_k)
            mbarrier.wait(full.index(stage), phase)
            total, total2, partial = _two_waves(
                a_bufs.index(stage), b_bufs.index(stage), a_scales.index(stage), col_scale,
                total, total2, partial, FIRST, False,
            )  # fmt: skip
            mbarrier.arrive(empty.index(stage), count=1)
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        part_ptr = parts_ptr + gl.cast(split, gl.int64) * M * N
        _store_fp32(part_ptr, total, m0, pn * 128, M, N, False)
        _store_fp32(part_ptr, total2, m0 + 64, pn * 128, M, N, False)


@gluon.jit
def _split_gemm_kernel(
    a_desc, b_desc, a_scale_desc, parts_ptr, b_scale_ptr, ends_ptr,
    M, N, K, a_scale_stride, b_scale_stride_n, b_scale_stride_k, splits, tiles,
    BM: gl.constexpr, STAGES: gl.constexpr, ORDER: gl.constexpr,
):  # fmt: skip
    a_bufs = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, BM, 128], a_desc.layout)
    b_bufs = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, 128, 128], b_desc.layout)
    a_scales = gl.allocate_shared_memory(gl.float32, [STAGES, BM], a_scale_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (
                parts_ptr, b_scale_ptr, a_bufs, b_bufs, a_scales, full, empty, ends_ptr,
                M, N, K, b_scale_stride_n, b_scale_stride_k, tiles, 0, BM, STAGES, ORDER,
            )),
            (_consume, (
                parts_ptr, b_scale_ptr, a_bufs, b_bufs, a_scales, full, empty, ends_ptr,
                M, N, K, b_scale_stride_n, b_scale_stride_k, tiles, 1, BM, STAGES, ORDER,
            )),
            # Columns 129 to 192 and scales per column do not exist here: others are passed for them, and not used.
            (_produce, (
                a_desc, b_desc, b_desc, a_scale_desc, a_scale_desc, a_bufs, b_bufs, b_bufs, a_scales, a_scales,
                full, empty, ends_ptr, M, N, K, a_scale_stride, b_scale_stride_k, splits, 0, tiles,
                False, "contraction", BM, False, STAGES, 1, False, ORDER,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@triton.jit
def _add_parts_kernel(parts_ptr, out_ptr, numel, SPLITS: tl.constexpr, ELEMENTS: tl.constexpr):
    element = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = element < numel
    total = tl.zeros((ELEMENTS,), tl.float32)
    for _ in tl.static_range(SPLITS):
        total += tl.load(parts_ptr + element, mask=inside, other=0.0)
        parts_ptr += numel
    tl.store(out_ptr + element, total.to(out_ptr.dtype.element_ty), mask=inside)


def split_ends(k: int, splits: int, *, device: torch.device | None = None) -> Tensor:
    """Exclusive end of each part of a contraction of k, multiples of 128, parts as equal as they can be: [splits]."""
    blocks = ceil_div(k, TILE)
    return torch.tensor([blocks * (i + 1) // splits * TILE for i in range(splits)], dtype=torch.int32, device=device)


def gemm(a: Quantized, b: Quantized, out: Tensor, *, ends: Tensor, programs: int) -> None:
    """out = a @ b.T in parts of the contraction.

    Args:
        a: payload [M, K], tile scales [ceil(K/128), M].
        b: payload [N, K], block scales [ceil(N/128), ceil(K/128)].
        out: [M, N] bf16, contiguous, written in place.
        ends: [splits] int32 of `split_ends`; made once, for it comes from the host.
        programs: most programs at work, one per multiprocessor.
    """
    (m, k), n, splits = a.payload.shape, out.shape[1], len(ends)
    tiles = splits * ceil_div(m, BM) * ceil_div(n, BN)
    parts = out.new_empty(splits, m, n, dtype=torch.float32)
    a_scale = _padded_scale(a.scale)
    _split_gemm_kernel[(min(programs, tiles),)](
        _matrix(a.payload, BM), _matrix(b.payload, BN), _vector(a_scale, BM), parts, b.scale, ends,
        m, n, k, a_scale.stride(0), *b.scale.stride(), splits, tiles,
        BM, STAGES, ORDER, num_warps=4, maxnreg=168,
    )  # fmt: skip
    _add_parts_kernel[(ceil_div(out.numel(), ELEMENTS),)](
        parts, out, out.numel(), SPLITS=splits, ELEMENTS=ELEMENTS, num_warps=WARPS
    )
