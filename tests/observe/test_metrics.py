"""The registry refuses what it does not know, and a record survives its journey through JSON bit for bit."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.observe.metrics import EVENTS, METRICS, check_record, encode, same_bits

PLACE = {"step": 1, "tokens_seen": 2048, "time_unix_s": 1.5}


def bits(value: float) -> bytes:
    return struct.pack("<d", value)


@given(st.floats(allow_nan=False), st.integers(min_value=0, max_value=2**62))
def test_a_record_reads_back_bit_for_bit(value: float, tokens: int):
    record = PLACE | {
        "tokens_seen": tokens,
        "loss/main": value,
        "moe/expert_load": [[value, 1.0], [0.0, value]],
    }
    read = json.loads(encode(record))
    assert bits(read["loss/main"]) == bits(value)
    assert bits(read["moe/expert_load"][1][1]) == bits(value)
    assert read == record


def test_not_finite_numbers_survive():
    read = json.loads(encode(PLACE | {"loss/main": math.nan, "grad/norm": math.inf}))
    assert math.isnan(read["loss/main"])
    assert read["grad/norm"] == math.inf


def test_every_name_of_the_registry_is_accepted():
    example = {"int": 3, "float": 0.5, "table": [[1.0, 1.0], [0.5, 1.5]]}
    check_record({name: example[metric.kind] for name, metric in METRICS.items()})


def test_every_metric_says_unit_and_meaning():
    assert all(metric.unit and len(metric.description) > 10 for metric in METRICS.values())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("loss/mian", 1.0),
        ("loss/main", "1.0"),
        ("loss/main", None),
        ("step", 1.0),
        ("guard/skipped_steps", True),
        ("moe/expert_load", [1.0, 2.0]),
    ],
)
def test_an_undeclared_name_or_kind_is_an_assertion_error(name: str, value: object):
    with pytest.raises(AssertionError, match=name):
        check_record(PLACE | {name: value})


@pytest.mark.parametrize("missing", sorted(PLACE))
def test_a_record_without_its_place_in_the_run_is_an_assertion_error(missing: str):
    with pytest.raises(AssertionError, match=missing):
        check_record({name: value for name, value in PLACE.items() if name != missing})


def test_same_bits_tells_neighbouring_doubles_apart():
    assert same_bits(math.nan, math.nan)
    assert same_bits(2, 2.0)
    assert not same_bits(0.1, math.nextafter(0.1, 1))
    assert not same_bits(0.0, -0.0)
    assert not same_bits(None, 0.0)


def test_the_page_of_metrics_is_the_registry():
    page = (Path(__file__).resolve().parents[2] / "docs/metrics.md").read_text()
    rows = [f"| `{n}` | {m.kind} | {m.unit} | {m.reduction} | {m.description} |" for n, m in METRICS.items()]
    events = [f"| `{kind}` | {meaning} |" for kind, meaning in EVENTS.items()]
    assert [line for line in page.splitlines() if line.startswith("| `")] == [*rows, *events]
