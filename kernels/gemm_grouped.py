"""Grouped FP8 products: one GEMM per expert over rows sorted by expert (arXiv:2412.19437 §3.3.2).

`group_ends[g]` is the exclusive end row of group g; its rows start where group g-1 ends. Ends are multiples
of 128 (rows between a group's tokens and its end are zeros): no 1x128 tile along rows straddles two experts. A group
may be empty. Rows from `group_ends[-1]` on are padding: their outputs are zero. The layout is DeepGEMM's: contiguous
along M for fprop and dgrad, grouped along K for wgrad.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from kernels.formats import TILE, Quantized
from kernels.gemm_fp8 import add_tile_block, add_tile_tile, product_flops, write_product
from kernels.operators import operator
from kernels.tiles import decode_e4m3


def group_rows(group_ends: Tensor, *, groups: int, rows: int) -> list[slice]:
    """The rows of each group, one slice each, read on the host: free on CPU, a synchronisation elsewhere.

    Raises:
        ValueError: not one end per group, or an end is not a multiple of 128, decreases, or exceeds `rows`.
    """
    ends = group_ends.tolist()
    slices = [slice(start, end) for start, end in pairwise([0, *ends])]
    misplaced = any(s.stop % TILE or s.stop < s.start or s.stop > rows for s in slices)
    if misplaced or len(slices) != groups:
        raise ValueError(
            f"group_ends must be {groups} non-decreasing multiples of {TILE} up to {rows} rows, got {ends}; "
            f"pad every group to {TILE} rows with zeros"
        )
    return slices


def grouped_gemm_tile_block_reference(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, group_ends: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """Group by group. Same arguments as `grouped_gemm_tile_block`, payloads and scales apart."""
    rows, groups, n = a.shape[0], b.shape[0], b.shape[1]
    out = a_scale.new_zeros(rows, n)
    a_values, b_values = decode_e4m3(a), decode_e4m3(b)
    for g, part in enumerate(group_rows(group_ends, groups=groups, rows=rows)):
        add_tile_block(out[part], a_values[part], a_scale[:, part], b_values[g], b_scale[g])
    return out.to(out_dtype)


def grouped_gemm_tile_tile_reference(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, group_ends: Tensor, out: Tensor, accumulate: bool
) -> None:
    """Group by group. Same arguments as `grouped_gemm_tile_tile`, payloads and scales apart."""
    groups, rows = len(group_ends), a.shape[1]
    product = a_scale.new_zeros(out.shape)
    a_values, b_values = decode_e4m3(a), decode_e4m3(b)
    for g, part in enumerate(group_rows(group_ends, groups=groups, rows=rows)):
        tiles = slice(part.start // TILE, part.stop // TILE)
        add_tile_tile(product[g], a_values[:, part], a_scale[tiles], b_values[:, part], b_scale[tiles])
    write_product(out, product, accumulate=accumulate)


_grouped_gemm_tile_block = operator(
    "grouped_gemm_tile_block",
    grouped_gemm_tile_block_reference,
    fake=lambda a, a_scale, b, b_scale, group_ends, out_dtype: a.new_empty(a.shape[0], b.shape[1], dtype=out_dtype),
    flops=lambda a, a_scale, b, *_, out_shape: 2 * a[0] * b[1] * a[1],
    gpu="gemm_fp8",
)
_grouped_gemm_tile_tile = operator(
    "grouped_gemm_tile_tile",
    grouped_gemm_tile_tile_reference,
    fake=lambda a, a_scale, b, b_scale, group_ends, out, accumulate: None,
    flops=product_flops,
    gpu="gemm_fp8",
    mutates=["out"],
)


def grouped_gemm_tile_block(a: Quantized, b: Quantized, group_ends: Tensor, *, out_dtype: torch.dtype) -> Tensor:
    """a[rows of g] @ b[g].T, a [rows, k] in 1x128 tiles, b [groups, n, k] in 128x128 blocks: [rows, n]."""
    k, k_b = a.payload.shape[-1], b.payload.shape[-1]
    if k != k_b:
        raise ValueError(f"a and b contract their last dims, got {k} and {k_b}; transpose one operand")
    return _grouped_gemm_tile_block(a.payload, a.scale, b.payload, b.scale, group_ends, out_dtype)


def grouped_gemm_tile_tile(
    a: Quantized, b: Quantized, group_ends: Tensor, *, out: Tensor | None = None, accumulate: bool = False
) -> Tensor:
    """a[:, rows of g] @ b[:, rows of g].T, a [m, rows] and b [n, rows] in 1x128 tiles: [groups, m, n] fp32.

    `out` as in `gemm_tile_tile`; an empty group writes zeros, or adds them.
    """
    rows, rows_b = a.payload.shape[-1], b.payload.shape[-1]
    if rows != rows_b:
        raise ValueError(f"a and b contract their last dims, got {rows} and {rows_b} rows; they must agree")
    assert out is not None or not accumulate, "nothing to add to"
    if out is None:
        out = a.payload.new_empty(len(group_ends), len(a.payload), len(b.payload), dtype=torch.float32)
    _grouped_gemm_tile_tile(a.payload, a.scale, b.payload, b.scale, group_ends, out, accumulate)
    return out
