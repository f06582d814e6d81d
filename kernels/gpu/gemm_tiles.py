"""Where an output tile lies: its place in the matrix, and in its group of rows (device code of `gemm_hopper`).

Tiles are numbered along strips of ORDER tile rows, column by column, so that tiles which are computed at the same time
share operands in the L2 cache. Groups of rows have any number of tiles, which only the device knows; each program finds
the group of its next tile by going on from the group of its last one.

Groups end at multiples of 128 rows, tiles have 128 or 256: a group's last tile may reach into the next group, and its
caller stores the rows before `end` only. All numbers are int32 scalars. The layout of groups is DeepGEMM's.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


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
    """Go on from a group to the one that holds `tile`; group number `groups` holds the rows of nobody."""
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
    """First column of the 128 and of the 64 columns of a tile; each lies within one 128-column block of scales.

    A tile of 192 starts on a block's edge or in its middle; the 64 columns come last or first.
    """
    if WIDE:
        odd = pn % 2
        return pn * 192 + odd * 64, pn * 192 + (1 - odd) * 128
    else:
        return pn * 128, pn * 128


@gluon.jit
def rows_tile(
    tile, group, first_tile, start, end, ends_ptr, M, num_n, groups, steps, BM: gl.constexpr, ORDER: gl.constexpr
):
    """Where a tile of "rows" lies: the group's state, tile row and column, and how many stages it contracts."""
    group, first_tile, start, end = group_of(tile, group, first_tile, start, end, ends_ptr, M, groups, num_n, BM)
    num_m = gl.cdiv(end - start, BM)
    # Tiles behind the last one have no rows: they contract nothing and store nothing.
    behind = tile >= first_tile + num_m * num_n
    pm, pn = place(gl.where(behind, 0, tile - first_tile), gl.maximum(num_m, 1), num_n, ORDER)
    m0 = gl.where(behind, end, start + pm * BM)
    return group, first_tile, start, end, m0, pn, gl.where(behind | (group == groups), 0, steps)


@gluon.jit
def contraction_tile(tile, ends_ptr, num_m, num_n, BM: gl.constexpr, ORDER: gl.constexpr):
    """Where a tile of "contraction" lies: group, first row, tile column, first block of the contraction, how many."""
    group = tile // (num_m * num_n)
    pm, pn = place(tile - group * (num_m * num_n), num_m, num_n, ORDER)
    start = gl.where(group == 0, 0, gl.load(ends_ptr + gl.maximum(group - 1, 0)))
    return group, pm * BM, pn, start // 128, (gl.load(ends_ptr + group) - start) // 128
