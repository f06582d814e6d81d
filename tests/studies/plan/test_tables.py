"""Every number of the planner says what it is and where it is from; a report of `make gpu` replaces what it has."""

from __future__ import annotations

import json
import math
import re
import statistics
from pathlib import Path

import pytest
import torch

from train.studies import gpu_report
from train.studies.bench.cases import shapes
from train.studies.bench.table import Row as BenchRow
from train.studies.bench.table import records
from train.studies.gpu_report import Finished
from train.studies.gpu_sections import Section
from train.studies.plan.tables import FOLDER, LABELS, read_tables

DATE = re.compile(r"20\d\d-\d\d(-\d\d)?")
KEY = "ours grouped fprop G4 M32768 N4096 K7168"


def test_every_row_has_a_label_a_source_and_a_date() -> None:
    rows = read_tables().rows
    assert len(rows) > 250
    for what, row in rows.items():
        values = row.value if isinstance(row.value, tuple) else (row.value,)
        assert row.label in LABELS, what
        assert DATE.fullmatch(row.date), what
        assert len(row.source) > 15, what
        assert row.unit, what
        assert all(math.isfinite(value) and value >= 0 for value in values), what
    assert {row.label for row in rows.values()} == set(LABELS)
    # A repository holds sources, not data.
    assert sum(path.stat().st_size for path in FOLDER.glob("*.json")) < 60_000


def test_what_was_chosen_is_labelled_modelled() -> None:
    chosen = {what for what, row in read_tables().rows.items() if row.label == "modelled"}
    assert chosen == {
        "memory under exchange", "NVLink H100", "router fp32", "imbalance DeepSeek", "dense share", "restart",
        "copy to host",
        *(f"before fusions {way} attend" for way in ("forward", "backward", "weights")),
        *(f"fused {part} {way}" for part in ("attend", "experts") for way in ("forward", "backward", "weights")),
    }  # fmt: skip


def test_the_columns_of_products_cover_the_layer_and_keep_their_ratio() -> None:
    """24 products of a MoE layer and more; the prototype ran at 0.87 of DeepGEMM in the median of the dense ones."""
    tables = read_tables()
    speeds = {
        column: {product[:5]: product.flop_per_s for product in tables.products(column)}
        for column in ("deepgemm", "ours", "bf16")
    }
    assert set(speeds["deepgemm"]) == set(speeds["ours"]) >= set(speeds["bf16"])
    ratios = [speeds["ours"][key] / speed for key, speed in speeds["deepgemm"].items() if key[0] in ("fprop", "dgrad")]
    assert len(ratios) == 22
    assert statistics.median(ratios) == pytest.approx(0.87, abs=0.01)
    first = {product[:5]: product.flop_per_s for product in tables.products("deepgemm 2025-02")}
    assert set(first) == set(speeds["deepgemm"])
    assert sum(first[key] != speed for key, speed in speeds["deepgemm"].items()) == 8


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As `make gpu` writes it: speeds of every product of the peer bench, of memory-bound kernels and of a layer."""
    rows = [
        BenchRow(
            shape.name, shape.kind, candidate, "measured", tflop_per_s=speed * (3 if "overwrite" in shape.name else 1)
        )
        for shape in shapes(small=False)
        for candidate, speed in (("ours", 1000.0), ("F.grouped_mm BF16" if shape.ends else "torch.mm BF16", 500.0))
    ]
    rows += [BenchRow(f"m{rate}", "memory", "ours", "measured", gbyte_per_s=rate) for rate in (2000.0, 3000.0, 4000.0)]
    rows += [BenchRow("m", "memory", "copy_, equal bytes", "measured", gbyte_per_s=9000.0)]
    time = {
        "precision": "fp8", "deterministic": False, "attention": "cudnn", "time_ms": 23.0, "tokens_per_s": 1.0,
        "tflop_per_s": 640.0,
    }  # fmt: skip
    sections = {
        "training": Section("green"),
        "peers": Section("green", data={"rows": records(rows)}),
        "layer": Section("green", data={"times": [time]}),
    }
    where = {"device": {"name": "NVIDIA H100"}, "date": "2026-12-01", "commit": "c" * 40, "versions": {"torch": "2.13"}}
    monkeypatch.setattr(gpu_report, "machine", lambda device: where)
    gpu_report.write([Finished(name, each, 1.0) for name, each in sections.items()], torch.device("cpu"), tmp_path)
    return tmp_path / "report.json"


def test_a_green_report_replaces_what_it_has_measured_and_names_itself(report: Path) -> None:
    before, after = read_tables().rows, read_tables(report).rows
    row = after[KEY]
    assert (row.value, row.label, row.date) == (1000.0, "measured", "2026-12-01")
    assert row.source == f"make gpu on NVIDIA H100, 2026-12-01, commit {'c' * 12}, torch 2.13"
    # The layer's own number of experts is new; uneven groups are no rows of the planner.
    assert set(after) - set(before) == {
        "layer fp8", *(what for what in after if re.match(r"(ours|bf16) grouped \w+ G8 ", what)),
    }  # fmt: skip
    assert len([what for what in after if " G8 " in what]) == 2 * 6
    # Gradients that are written, three times as fast here, are no rows: all but a step's first are added.
    assert {row.value for row in after.values() if row.date == "2026-12-01" and row.unit == "TFLOP/s"} == {
        1000.0,
        500.0,
    }
    assert after["memory"].value == 3000.0
    assert after["layer fp8"].value == 23.0
    # DeepGEMM was not there, nor the rows of other numbers of tokens.
    for what in ("deepgemm fprop G1 M4096 N2112 K7168", "ours fprop G1 M8192 N4096 K7168", "attention cudnn forward"):
        assert after[what] == before[what]


def test_a_report_that_is_not_green_replaces_nothing(report: Path) -> None:
    values = json.loads(report.read_text())
    values["parity"]["training"]["status"] = "red"
    red = report.with_name("red.json")
    red.write_text(json.dumps(values))
    assert read_tables(red).rows == read_tables().rows
    red.with_name("none.json").write_text("{}")
    with pytest.raises(ValueError, match="is no report of `make gpu`"):
        read_tables(red.with_name("none.json"))
