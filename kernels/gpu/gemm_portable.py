"""Matrix products in plain Triton: FP8 where `kernels.gpu.gemm_hopper` cannot serve, BF16 and FP32 by group anywhere.

One program computes one [128, 128] tile of the output with `tl.dot`, FP8 by the rule of `kernels.gemm_fp8`: a fresh
FP32 partial sum for every 128 of the contraction, times both scales, added to the total. Any GPU with FP8 tensor
cores, any size and alignment: it is here to be right. An earlier prototype of it reached 0.39 to 0.47 of DeepGEMM on an
H100; this code has not run on a GPU.

    rows          one B per group of rows; the group of a tile is the number of ends at or before its first row
    contraction   one output per group, contracted over its rows; programs of a group without rows store zeros

Group ends are multiples of 128 and are read on the device. Shapes: a [M, K], b [N, K] or [groups, N, K], K contiguous.

Grouped BF16 fprop and dgrad are torch's `grouped_mm` on Hopper (CUTLASS, measured at 620 to 680 TFLOP/s on an H100),
unless `kernels.backend=portable`. It leaves padding rows undefined: they are cleared. It has no FP32 result: wgrad is
ours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import multiprocessors, shared_memory_bytes, use_gluon
from kernels.formats import TILE, Quantized

# The prototype ran at half the speed with 4 warps, on an H100.
WARPS = 8
# Pipeline stages where four of them fit, 128 KB with Triton's own use of shared memory, and elsewhere (99 KB on 8.9).
STAGES, STAGES_SMALL, SHARED_BYTES_WANTED = 4, 3, 136 * 1024
SQUARE = 128
# FP32 is multiplied in FP32 ("ieee"), without tensor cores: for oracles and proofs.
DEPTH_BF16, DEPTH_FP32 = 64, 16
# Output tiles of one column that follow each other before the next column, for the L2 cache.
ORDER = 8


@triton.jit
def _place(tile, num_m, num_n, ORDER: tl.constexpr):
    per_strip = ORDER * num_n
    strip = tile // per_strip
    height = tl.minimum(num_m - strip * ORDER, ORDER)
    inside = tile - strip * per_strip
    return strip * ORDER + inside % height, inside // height


@triton.jit
def _group_of_row(ends_ptr, row, groups, GROUPS: tl.constexpr):
    """How many groups end at or before this row; `groups` for a padding row."""
    index = tl.arange(0, GROUPS)
    ends = tl.load(ends_ptr + index, mask=index < groups, other=2147483647)
    return tl.sum((ends <= row).to(tl.int32), axis=0)


@triton.jit
def _rows_kernel(
    a_ptr, a_scale_ptr, b_ptr, b_scale_ptr, out_ptr, ends_ptr, M, N, K, b_stride_n, b_stride_k,
    scale_stride_g, scale_stride_n, scale_stride_k, groups,
    SCALED: tl.constexpr, GROUPS: tl.constexpr, BK: tl.constexpr, SQUARE: tl.constexpr, ORDER: tl.constexpr
):  # fmt: skip
    """out = a @ b.T, of each group of rows its own b; GROUPS is 0 for one b, else a power of two >= groups."""
    pm, pn = _place(tl.program_id(0), tl.cdiv(M, SQUARE), tl.cdiv(N, SQUARE), ORDER)
    group = 0
    depth = K
    if GROUPS:
        group = _group_of_row(ends_ptr, pm * SQUARE, groups, GROUPS)
        depth = tl.where(group == groups, 0, K)
    row = pm.to(tl.int64) * SQUARE + tl.arange(0, SQUARE)
    col = pn * SQUARE + tl.arange(0, SQUARE)
    inner = tl.arange(0, BK)
    a_ptrs = a_ptr + row[:, None] * K + inner[None, :]
    b_base = b_ptr + tl.cast(group, tl.int64) * N * K
    b_ptrs = b_base + col[None, :].to(tl.int64) * b_stride_n + inner[:, None].to(tl.int64) * b_stride_k
    total = tl.zeros((SQUARE, SQUARE), tl.float32)
    for start in range(0, depth, BK):
        a = tl.load(a_ptrs, mask=(row < M)[:, None] & (start + inner < K)[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=(start + inner < K)[:, None] & (col < N)[None, :], other=0.0)
        if SCALED:
            block = tl.cast(start // 128, tl.int64)
            row_scale = tl.load(a_scale_ptr + block * M + row, mask=row < M, other=0.0)
            scale_ptr = b_scale_ptr + group * scale_stride_g + pn * SQUARE // 128 * scale_stride_n
            col_scale = tl.load(scale_ptr + block * scale_stride_k)
            total += tl.dot(a, b) * (row_scale * col_scale)[:, None]
        else:
            total = tl.dot(a, b, total, input_precision="ieee")
        a_ptrs += BK
        b_ptrs += BK * b_stride_k
    inside = (row < M)[:, None] & (col < N)[None, :]
    tl.store(out_ptr + row[:, None] * N + col[None, :], total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _contraction_kernel(
    a_ptr, a_scale_ptr, b_ptr, b_scale_ptr, out_ptr, ends_ptr, M, N, K,
    a_stride_m, a_stride_k, b_stride_n, b_stride_k,
    SCALED: tl.constexpr, GROUPED: tl.constexpr, ACCUMULATE: tl.constexpr, BK: tl.constexpr, SQUARE: tl.constexpr,
    ORDER: tl.constexpr
):  # fmt: skip
    """out[g] = or += a[:, rows of g] @ b[:, rows of g].T in FP32; group g is the second program axis."""
    pm, pn = _place(tl.program_id(0), tl.cdiv(M, SQUARE), tl.cdiv(N, SQUARE), ORDER)
    group = tl.program_id(1).to(tl.int64)
    first = 0
    end = K
    if GROUPED:
        # That ends are multiples of 128 makes the loads below 16 bytes wide instead of one.
        first = tl.multiple_of(tl.load(ends_ptr + group - 1, mask=group > 0, other=0), 128)
        end = tl.multiple_of(tl.load(ends_ptr + group), 128)
    row = pm.to(tl.int64) * SQUARE + tl.arange(0, SQUARE)
    col = pn.to(tl.int64) * SQUARE + tl.arange(0, SQUARE)
    total = tl.zeros((SQUARE, SQUARE), tl.float32)
    for start in range(first, end, BK):
        inner = (start + tl.arange(0, BK)).to(tl.int64)
        a_ptrs = a_ptr + row[:, None] * a_stride_m + inner[None, :] * a_stride_k
        b_ptrs = b_ptr + col[None, :] * b_stride_n + inner[:, None] * b_stride_k
        a = tl.load(a_ptrs, mask=(row < M)[:, None] & (inner < end)[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=(inner < end)[:, None] & (col < N)[None, :], other=0.0)
        if SCALED:
            block = tl.cast(start // 128, tl.int64)
            row_scale = tl.load(a_scale_ptr + block * M + row, mask=row < M, other=0.0)
            col_scale = tl.load(b_scale_ptr + block * N + col, mask=col < N, other=0.0)
            total += tl.dot(a, b) * row_scale[:, None] * col_scale[None, :]
        else:
            total = tl.dot(a, b, total, input_precision="ieee")
    place = out_ptr + group * M * N + row[:, None] * N + col[None, :]
    inside = (row < M)[:, None] & (col < N)[None, :]
    if ACCUMULATE:
        total += tl.load(place, mask=inside, other=0.0)
    tl.store(place, total, mask=inside)


@triton.jit
def _clear_rows_kernel(tail_ptr, ends_ptr, first, M, N, groups, programs, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Zeros from the last end on; tail_ptr is at row `first`, which may be before or behind that end."""
    last = tl.load(ends_ptr + groups - 1)
    for start in range(last + tl.program_id(0) * ROWS, M, programs * ROWS):
        row = start + tl.arange(0, ROWS)
        place = tail_ptr + (row - first).to(tl.int64)[:, None] * N
        for column in range(0, N, COLS):
            col = column + tl.arange(0, COLS)
            inside = (row < M)[:, None] & (col < N)[None, :]
            tl.store(place + col[None, :], tl.zeros((ROWS, COLS), tail_ptr.dtype.element_ty), mask=inside)


def _depth(x: Tensor) -> int:
    """Contraction elements of one step of an unscaled product."""
    return DEPTH_FP32 if x.dtype == torch.float32 else DEPTH_BF16


def _launch(x: Tensor) -> dict[str, int]:
    """Warps and stages for operands of x's type on x's device."""
    roomy = shared_memory_bytes(x) >= SHARED_BYTES_WANTED and x.dtype != torch.float32
    return {"num_warps": WARPS, "num_stages": STAGES if roomy else STAGES_SMALL}


def _rows_grid(m: int, n: int) -> tuple[int]:
    return (triton.cdiv(m, SQUARE) * triton.cdiv(n, SQUARE),)


def tile_block(a: Quantized, b: Quantized, out: Tensor, *, group_ends: Tensor | None = None) -> None:
    """out = a @ b.T in FP8; a in 1x128 tiles, b in 128x128 blocks, one b or one per group of rows."""
    (m, k), n = a.payload.shape, out.shape[1]
    groups = 0 if group_ends is None else len(group_ends)
    *_, stride_n, stride_k = b.scale.stride()
    _rows_kernel[_rows_grid(m, n)](
        a.payload, a.scale, b.payload, b.scale, out, a.scale if group_ends is None else group_ends,
        m, n, k, b.payload.stride(-2), b.payload.stride(-1), b.scale.stride(0) if groups else 0, stride_n, stride_k,
        groups, True, triton.next_power_of_2(groups) if groups else 0, 128, SQUARE, ORDER, **_launch(a.payload),
    )  # fmt: skip


def tile_tile(a: Quantized, b: Quantized, out: Tensor, *, accumulate: bool, group_ends: Tensor | None = None) -> None:
    """out = or += a @ b.T in FP8, both in 1x128 tiles; one [M, N] or one per group of the contraction, fp32."""
    (m, k), n = a.payload.shape, b.payload.shape[0]
    groups = 1 if group_ends is None else len(group_ends)
    _contraction_kernel[(*_rows_grid(m, n), groups)](
        a.payload, a.scale, b.payload, b.scale, out, a.scale if group_ends is None else group_ends,
        m, n, k, *a.payload.stride(), *b.payload.stride(),
        True, group_ends is not None, accumulate, 128, SQUARE, ORDER, **_launch(a.payload),
    )  # fmt: skip


def grouped_matmul(x: Tensor, weight: Tensor, group_ends: Tensor) -> Tensor:
    """x[rows of g] @ weight[g] in x's dtype: x [rows, in], weight [groups, in, out] with any strides."""
    x = x.contiguous()
    rows, n, groups = x.shape[0], weight.shape[-1], len(group_ends)
    if not rows * n:
        return x.new_empty(rows, n)
    # Matrices of two experts are apart by in * out elements, whichever way they are stored.
    assert weight.stride(0) == weight.shape[1] * n, weight.stride()
    if use_gluon(x) and x.dtype == torch.bfloat16 and x.shape[1] % 8 == 0 and n % 8 == 0:
        return cleared(F.grouped_mm(x, weight, offs=group_ends), group_ends)
    out = x.new_empty(rows, n)
    _rows_kernel[_rows_grid(rows, n)](
        x, x, weight, x, out, group_ends, rows, n, x.shape[1], weight.stride(2), weight.stride(1), 0, 0, 0, groups,
        False, triton.next_power_of_2(groups), _depth(x), SQUARE, ORDER, **_launch(x),
    )  # fmt: skip
    return out


def cleared(out: Tensor, group_ends: Tensor) -> Tensor:
    """out [rows, n] with zeros from the last end on."""
    (rows, n), groups, programs = out.shape, len(group_ends), multiprocessors(out)
    # The view is what a run touches, for a group wastes at most 127 rows; rows before it are cleared all the same.
    first = max(0, rows - groups * (TILE - 1))
    _clear_rows_kernel[(programs,)](out[first:], group_ends, first, rows, n, groups, programs, 8, 1024)
    return out


def grouped_wgrad(dy: Tensor, x: Tensor, group_ends: Tensor) -> Tensor:
    """dy[rows of g].T @ x[rows of g] in FP32: [groups, out, in]."""
    (rows, m), n = dy.shape, x.shape[1]
    out = torch.empty(len(group_ends), m, n, dtype=torch.float32, device=x.device)
    if out.numel():
        _contraction_kernel[(*_rows_grid(m, n), len(group_ends))](
            dy, dy, x, dy, out, group_ends, m, n, rows, dy.stride(1), dy.stride(0), x.stride(1), x.stride(0),
            False, True, False, _depth(x), SQUARE, ORDER, **_launch(x),
        )  # fmt: skip
    return out
