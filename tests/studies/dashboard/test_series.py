"""Bounded series: exact while short, every extreme kept when long, the same whatever the chunks."""

from __future__ import annotations

import base64
import math

import numpy as np
import pytest

from train.studies.dashboard.series import MAX_COLUMNS, Series, TableSeries


def unpacked(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype)


def filled(values: np.ndarray, *, limit: int, chunk: int, first: int = 1, stride: int = 1) -> Series:
    series = Series(limit)
    steps = first + stride * np.arange(len(values))
    for start in range(0, len(values), chunk):
        series.add(steps[start : start + chunk], values[start : start + chunk])
    return series


def test_a_short_series_is_kept_as_logged():
    values = np.random.default_rng(0).normal(size=127)
    packed = filled(values, limit=64, chunk=10).to_json(limit=500)
    assert packed["width"] == 1
    assert unpacked(packed["key"], "<u4").tolist() == list(range(1, 128))
    # f32 keeps 24 bits.
    np.testing.assert_allclose(unpacked(packed["mean"], "<f4"), values, rtol=2**-24)


@pytest.mark.parametrize("chunk", [1, 63, 4001])
def test_a_long_series_keeps_both_extremes_of_every_bucket_at_their_steps(chunk: int):
    values = np.random.default_rng(1).normal(size=4001)
    values[1234] = 99.0
    values[4000] = -99.0
    series = filled(values, limit=64, chunk=chunk)
    steps = np.arange(1, 4002)
    assert 64 < len(series.buckets) <= 128
    for bucket in series.buckets:
        inside = steps // series.width == bucket["key"]
        assert bucket["count"] == inside.sum()
        assert (bucket["low"], bucket["high"]) == (values[inside].min(), values[inside].max())
        assert bucket["at_low"] == steps[inside][values[inside].argmin()]
        assert bucket["at_high"] == steps[inside][values[inside].argmax()]
        # A sum in another order: at most one rounding an addend.
        assert bucket["total"] == pytest.approx(values[inside].sum(), abs=4001 * 2**-50)
    assert 1235 in series.buckets["at_high"]
    assert 4001 in series.buckets["at_low"]


def test_of_equal_extremes_the_first_is_marked():
    series = filled(np.tile([5.0, 1.0, 5.0, 1.0], 16), limit=2, chunk=9)
    # Buckets of 32 steps: 1 to 31, 32 to 63, and 64; odd steps are high.
    assert series.buckets["at_high"].tolist() == [1, 33, 64]
    assert series.buckets["at_low"].tolist() == [2, 32, 64]


def test_thinning_for_the_page_loses_no_extreme():
    values = np.random.default_rng(2).normal(size=5000)
    series = filled(values, limit=256, chunk=777)
    packed = series.to_json(limit=20)
    assert len(unpacked(packed["key"], "<u4")) <= 20
    assert unpacked(packed["high"], "<f4").max() == np.float32(values.max())
    assert unpacked(packed["at_low"], "<u4")[unpacked(packed["low"], "<f4").argmin()] == 1 + values.argmin()
    assert len(series.buckets) > 20, "the series itself stays as fine as it was"


def test_a_value_that_is_not_finite_is_a_hole_and_never_an_extreme():
    series = filled(np.array([1.0, math.nan, math.inf, 3.0]), limit=8, chunk=4)
    means = unpacked(series.to_json(limit=8)["mean"], "<f4")
    assert np.isnan(means).tolist() == [False, True, True, False]
    wide = filled(np.array([1.0, math.nan, -math.inf, 3.0] * 8), limit=2, chunk=5)
    assert (wide.buckets["low"].min(), wide.buckets["high"].max()) == (1.0, 3.0)
    assert wide.buckets["count"].sum() == 16


def test_a_metric_of_few_steps_keeps_each_of_them():
    series = filled(np.arange(50.0), limit=64, chunk=7, first=1000, stride=1000)
    assert series.width == 1
    assert series.buckets["at_high"].tolist() == list(range(1000, 51000, 1000))


def test_knots_give_tokens_at_any_step_exactly_while_they_grow_evenly():
    tokens = 512.0 * np.arange(1, 3001)
    knots = filled(tokens, limit=16, chunk=100).knots(limit=16)
    steps, values = unpacked(knots["step"], "<u4"), unpacked(knots["value"], "<f8")
    assert len(steps) <= 32
    np.testing.assert_array_equal(np.interp(np.arange(1, 3001), steps, values), tokens)


@pytest.mark.parametrize("reduction", ["mean", "last", "max", "min"])
@pytest.mark.parametrize("chunk", [1, 97, 1000])
def test_a_column_of_a_table_is_its_own_steps_reduced(reduction: str, chunk: int):
    cells = np.random.default_rng(3).normal(size=(1000, 5)).astype(np.float32)
    series = TableSeries(reduction)
    for start in range(0, 1000, chunk):
        block = cells[start : start + chunk]
        series.add(range(1 + start, 1 + start + len(block)), [[row[:2].tolist(), row[2:].tolist()] for row in block])
    packed = series.to_json(limit=MAX_COLUMNS)
    drawn = unpacked(packed["cells"], "<u2").astype(np.uint32) << 16
    drawn = drawn.view(np.float32).reshape(-1, 5)
    assert packed["shape"] == [2, 3]
    assert 60 < len(drawn) <= MAX_COLUMNS
    assert (packed["first"][0], packed["last"][-1]) == (1, 1000)
    reduce = {"mean": np.mean, "last": lambda part, axis: part[-1], "max": np.max, "min": np.min}[reduction]
    for column, first, last in zip(drawn, packed["first"], packed["last"], strict=True):
        # BF16 has 7 bits after the point: rounding moves by half of 2^-7; sums in FP32 add 1e-6.
        np.testing.assert_allclose(column, reduce(cells[first - 1 : last], axis=0), rtol=2**-8, atol=1e-6)


def test_a_table_of_another_shape_begins_anew_and_no_table_is_left_out():
    series = TableSeries("mean")
    series.add([1, 2, 3, 4, 5], [[[1.0, 1.0]], "x", [[2.0], ["y"]], [[3.0, 4.0, 5.0]], [[5.0, 6.0, 7.0]]])
    spans, cells = series.limited(10)
    assert spans[:, 0].tolist() == [4, 5]
    assert cells.tolist() == [[3, 4, 5], [5, 6, 7]]
