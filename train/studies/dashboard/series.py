"""A metric over a run of any length in bounded memory: buckets of equal width that keep every extreme.

    bucket k of width w   the steps w k .. w k + w - 1: their mean, their least and greatest value, and where
    w = 1                 while there are few steps: every point exactly as logged
    w doubles             when there are more than `2 * limit` buckets: neighbours are merged, in place

Widths are powers of two and buckets begin at multiples of their width, so that runs of different length can be
compared by merging the finer one. A minimum or maximum moves from bucket to bucket with its own step and is
never averaged away (min/max decimation, as in the level-of-detail pyramid of audio editors). Tables (layers x
experts, layers x FP8 operands) are bucketed likewise, each cell reduced by the table's own rule. Both take numbers
in chunks and cost O(1) a record.

Shapes: [values] one per step given; [buckets] at most 2 * limit; [cells] experts (or operands) of all layers.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from itertools import chain, groupby
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Json = dict[str, Any]
Floats = npt.NDArray[np.float64]
Steps = npt.NDArray[np.int64]
Cells = npt.NDArray[np.float32]
Reduction = Literal["mean", "last", "max", "min"]

# Buckets that a series holds, and cells of a table over all its columns: 1024 points are more than a screen shows.
MAX_BUCKETS = 1024
MAX_COLUMNS = 160
MAX_CELLS = 1_200_000

_INTEGERS, _FLOATS = ("key", "count", "at_low", "at_high"), ("total", "low", "high")
_BUCKET = np.dtype([(name, "i8") for name in _INTEGERS] + [(name, "f8") for name in _FLOATS])


class Series:
    """One scalar over the steps, in `limit` buckets, or up to twice as many before neighbours are merged."""

    def __init__(self, limit: int = MAX_BUCKETS) -> None:
        assert limit > 0
        self.limit = limit
        # Steps per bucket.
        self.width = 1
        self.buckets = np.zeros(0, _BUCKET)
        # The last values as logged, at most 256, for averages over recent steps.
        self.tail: list[float] = []

    def add(self, steps: Steps, values: Floats) -> None:
        """Take more values: strictly increasing steps beyond all earlier ones; a value not finite leaves a hole."""
        known = np.isfinite(values)
        single = np.zeros(len(steps), _BUCKET)
        single["key"] = steps // self.width
        single["count"] = known
        single["total"] = np.where(known, values, 0.0)
        single["low"] = np.where(known, values, np.inf)
        single["high"] = np.where(known, values, -np.inf)
        single["at_low"] = single["at_high"] = steps
        grown = _merged(np.concatenate([self.buckets[-1:], single]))
        self.buckets = np.concatenate([self.buckets[:-1], grown])
        self._shrink(2 * self.limit)
        self.tail = (self.tail + values[-256:].tolist())[-256:]

    @property
    def means(self) -> Floats:
        """[buckets] mean of each; NaN where no value was finite."""
        with np.errstate(invalid="ignore", divide="ignore"):
            means: Floats = self.buckets["total"] / self.buckets["count"]
        return np.where(self.buckets["count"] > 0, means, np.nan)

    def _shrink(self, limit: int) -> None:
        """Merge neighbours until there are at most `limit` buckets."""
        while len(self.buckets) > limit:
            self.width *= 2
            wider = self.buckets.copy()
            wider["key"] //= 2
            self.buckets = _merged(wider)

    def _coarse(self, limit: int) -> Series:
        """The same series in at most `limit` buckets."""
        coarse = Series(limit)
        coarse.width, coarse.buckets = self.width, self.buckets
        coarse._shrink(limit)
        return coarse

    def to_json(self, limit: int) -> Json:
        """Width, key and mean of each bucket; with width above 1 also both extremes and their steps.

        Numbers are little-endian arrays in base64: u32 for steps, f32 (seven digits) for values.
        """
        series = self._coarse(limit)
        buckets = series.buckets
        packed = {"width": series.width, "key": _packed(buckets["key"], "<u4"), "mean": _packed(series.means, "<f4")}
        if series.width > 1:
            for name in ("low", "high"):
                extreme = np.where(buckets["count"] > 0, buckets[name], np.nan)
                packed |= {name: _packed(extreme, "<f4"), f"at_{name}": _packed(buckets[f"at_{name}"], "<u4")}
        return packed

    def knots(self, limit: int) -> Json:
        """A quantity that grows with the steps, as (step, value) pairs to interpolate between; f64."""
        buckets = self._coarse(limit).buckets
        buckets = buckets[buckets["count"] > 0]
        steps = np.stack([buckets["at_low"], buckets["at_high"]], axis=1).ravel()
        values = np.stack([buckets["low"], buckets["high"]], axis=1).ravel()
        # A bucket of one step gives the same knot twice; a clock that was set back would give steps out of order.
        steps, first = np.unique(steps, return_index=True)
        return {"step": _packed(steps, "<u4"), "value": _packed(np.maximum.accumulate(values[first]), "<f8")}


class TableSeries:
    """One table ([layers][cells of the layer]) over the steps, in columns of neighbouring steps.

    Args:
        reduction: of one cell over the steps of a column: its mean, its last value, or its worst.
    """

    def __init__(self, reduction: Reduction) -> None:
        self.reduction = reduction
        self._restart(())

    def add(self, steps: Sequence[int], tables: Sequence[list[list[float]]]) -> list[tuple[Steps, Cells]]:
        """Take more tables, steps strictly increasing; one that is not rows of numbers is left out.

        Returns:
            What was taken: ([tables] steps, [tables, cells] values) for each stretch of one shape.
        """
        blocks = []
        shaped = [(shape, step, table) for step, table in zip(steps, tables, strict=True) if (shape := _shape(table))]
        for shape, group in groupby(shaped, key=lambda entry: entry[0]):
            if shape != self.shape:
                self._restart(shape)
            entries = list(group)
            block = _flat([table for _, _, table in entries])
            if block is not None:
                blocks.append((np.array([step for _, step, _ in entries], np.int64), block))
                self._add_block(*blocks[-1])
        return blocks

    def limited(self, limit: int) -> tuple[Steps, Cells]:
        """([columns, 3] spans, [columns, cells] reduced values) in at most `limit` columns."""
        spans, cells, width = self.spans, self.cells, self.width
        while len(spans) > max(1, limit):
            width *= 2
            spans, cells = self._merged(spans, cells, width)
        if self.reduction == "mean":
            cells = (cells / spans[:, 2:]).astype(np.float32)
        return spans, cells

    def to_json(self, limit: int) -> Json:
        """Shape, spans and cells; cells are BF16 (the upper half of an f32, within 0.4 %), column by column."""
        spans, cells = self.limited(limit)
        bits = np.ascontiguousarray(cells, "<f4").view("<u4")
        # Half of the dropped part is added, so that values are rounded and not cut; NaN keeps its bits.
        rounded = np.where(np.isnan(cells), np.uint32(0x7FC00000), bits + np.uint32(0x8000)) >> 16
        return {
            "shape": list(self.shape),
            "reduction": self.reduction,
            "first": spans[:, 0].tolist(),
            "last": spans[:, 1].tolist(),
            "cells": _packed(rounded, "<u2"),
        }

    def _restart(self, shape: tuple[int, ...]) -> None:
        # Cells in each layer, of the newest table: another shape begins again.
        self.shape = shape
        self.width = 1
        size = sum(shape)
        self._limit = max(8, min(MAX_COLUMNS, MAX_CELLS // max(1, size)))
        self.spans = np.zeros((0, 3), np.int64)  # [columns, 3] first step, last step, number of tables
        self.cells = np.zeros((0, size), np.float32)  # [columns, cells], sums where the reduction is mean

    def _add_block(self, steps: Steps, cells: Cells) -> None:
        spans = np.stack([steps, steps, np.ones_like(steps)], axis=1)
        spans, cells = np.concatenate([self.spans[-1:], spans]), np.concatenate([self.cells[-1:], cells])
        spans, cells = self._merged(spans, cells, self.width)
        self.spans, self.cells = np.concatenate([self.spans[:-1], spans]), np.concatenate([self.cells[:-1], cells])
        while len(self.spans) > 2 * self._limit:
            self.width *= 2
            self.spans, self.cells = self._merged(self.spans, self.cells, self.width)

    def _merged(self, spans: Steps, cells: Cells, width: int) -> tuple[Steps, Cells]:
        starts = _starts(spans[:, 0] // width)
        ends = np.append(starts[1:], len(spans)) - 1
        counts = np.add.reduceat(spans[:, 2], starts)
        merged = np.stack([spans[starts, 0], spans[ends, 1], counts], axis=1)
        if self.reduction == "last":
            return merged, cells[ends]
        reduce = {"mean": np.add, "max": np.fmax, "min": np.fmin}[self.reduction]
        return merged, reduce.reduceat(cells, starts, axis=0)


def _shape(table: object) -> tuple[int, ...]:
    """Lengths of the rows; () for what is no list of rows."""
    if not isinstance(table, list) or not all(isinstance(row, list) for row in table):
        return ()
    return tuple(len(row) for row in table) if any(table) else ()


def _flat(tables: Sequence[list[list[float]]]) -> Cells | None:
    """[tables, cells] of tables of one shape; None where a cell is no number."""
    try:
        # A double beyond FP32's range becomes infinite, as in `_packed`.
        with np.errstate(over="ignore"):
            return np.array([list(chain.from_iterable(table)) for table in tables], np.float32)
    except (TypeError, ValueError, OverflowError):
        return None


def _starts(keys: Steps) -> npt.NDArray[np.intp]:
    """Where each group of equal neighbours begins."""
    return np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))


def _merged(parts: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
    """Join neighbours of one key; an extreme keeps the first step at which it was reached."""
    starts = _starts(parts["key"])
    if len(starts) == len(parts):
        return parts
    merged = parts[starts]
    for name in ("count", "total"):
        merged[name] = np.add.reduceat(parts[name], starts)
    group = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(parts))))
    for name, reduce in (("low", np.minimum), ("high", np.maximum)):
        merged[name] = reduce.reduceat(parts[name], starts)
        reached = np.flatnonzero(parts[name] == merged[name][group])[::-1]
        # Assigned from the back: the first of each group is written last and stays.
        merged[f"at_{name}"][group[reached]] = parts[f"at_{name}"][reached]
    return merged


def _packed(values: npt.NDArray[Any], dtype: str) -> str:
    # A double beyond FP32's range becomes infinite, which the page draws as a hole.
    with np.errstate(over="ignore"):
        return base64.b64encode(np.ascontiguousarray(values).astype(dtype).tobytes()).decode("ascii")
