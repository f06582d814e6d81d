"""Step metrics: the registry refuses what it does not know, a record survives JSON bit for bit, derived numbers."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train.config import compose
from train.model.sizes import model_flops_per_token
from train.observe.config import ObserveConfig
from train.observe.metrics import (
    EVENTS,
    METRICS,
    check_record,
    dead_experts,
    dense_bf16_peak,
    encode,
    same_bits,
    step_record,
)
from train.schedules import scheduled_values
from train.state import TrainState

PLACE = {"step": 1, "tokens_seen": 2048, "time_unix_s": 1.5}


@given(st.floats(allow_nan=False), st.integers(min_value=0, max_value=2**62))
def test_a_record_reads_back_bit_for_bit(value: float, tokens: int):
    record = PLACE | {"tokens_seen": tokens, "loss/main": value, "moe/expert_load": [[value, 1.0], [0.0, value]]}
    read = json.loads(encode(record))
    for found in (read["loss/main"], read["moe/expert_load"][1][1]):
        assert struct.pack("<d", found) == struct.pack("<d", value)
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
    assert not any(same_bits(*pair) for pair in ((0.1, math.nextafter(0.1, 1)), (0.0, -0.0), (None, 0.0)))


def test_the_page_of_metrics_is_the_registry():
    page = (Path(__file__).resolve().parents[2] / "docs/metrics.md").read_text()
    rows = [f"| `{n}` | {m.kind} | {m.unit} | {m.reduction} | {m.description} |" for n, m in METRICS.items()]
    events = [f"| `{kind}` | {meaning} |" for kind, meaning in EVENTS.items()]
    assert [line for line in page.splitlines() if line.startswith("| `")] == [*rows, *events]


def test_v3_at_its_published_speed_has_its_published_mfu() -> None:
    flops = model_flops_per_token(compose(["model=v3_671b"]).model, sequence_length=4096)
    # arXiv:2505.09343 tables 2 and 4: 250 GFLOP a token, 38.94 % of an H800 at 62,914,560 tokens in 19.926 s on 2048.
    assert flops == pytest.approx(250e9, rel=2e-3)
    assert 62_914_560 / 19.926 * flops / (2048 * dense_bf16_peak("NVIDIA H800")) == pytest.approx(0.3894, rel=2e-3)


UNKNOWN = dict.fromkeys(["NVIDIA H100 PCIe", "NVIDIA H200 NVL", "NVIDIA A100-SXM4-80GB", "cpu"])
PEAKS = {"NVIDIA H100 80GB HBM3": 989.4e12, "NVIDIA H200": 989.4e12, **UNKNOWN}


@pytest.mark.parametrize(("device", "peak"), PEAKS.items())
def test_the_peak_is_known_of_known_devices_only(device: str, peak: float | None) -> None:
    assert dense_bf16_peak(device) == peak


def test_idle_experts_are_named_by_layer_id() -> None:
    counts = {4: torch.tensor([0, 3, 0]), 1: torch.tensor([1, 1, 0])}
    assert dead_experts(counts) == [(1, 2), (4, 0), (4, 2)]
    assert dead_experts({}) == []


def test_the_first_step_and_every_nth_after_it_are_due() -> None:
    assert [step for step in range(1, 12) if ObserveConfig.due(step, 5)] == [1, 6, 11]
    assert not [step for step in range(1, 12) if ObserveConfig.due(step, 0)]


@pytest.mark.parametrize(
    "override",
    [
        "observe.fp8_health_every_steps=-1",
        "observe.dead_expert_steps=-2",
        "observe.peak_flops=0",
        "observe.straggler_steps=-1",
        "observe.straggler_ratio=1",
        "observe.straggler_ratio=.nan",
    ],
)
def test_a_value_out_of_range_is_refused_by_name(override: str) -> None:
    with pytest.raises(ValueError, match=override.split("=", maxsplit=1)[0]):
        compose([override])


def test_a_load_is_never_rounded_to_none() -> None:
    counts = torch.full((256,), 32768)
    counts[7] = 1
    now = scheduled_values(compose([]).schedule, step=0, tokens_seen=0)
    record = step_record(TrainState(), now, {"loss/main": torch.tensor(1.0)}, {0: counts})
    assert record["moe/dead_experts"] == 0
    assert record["moe/expert_load"][0][7] == pytest.approx(1 / counts.double().mean().item(), rel=1e-3)
