"""One file holds what was measured: `make gpu` writes it, the planner and docs/kernels.md read it, or say why not."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from train.studies import gpu_report, measured
from train.studies.bench.table import Row, records
from train.studies.gpu_report import Finished
from train.studies.gpu_sections import Section
from train.studies.measured import BEGIN, END, page, rate, read_report
from train.studies.plan.dry_run import _time_lines

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"
TIME = {
    "precision": "fp8", "deterministic": False, "attention": "cudnn", "time_ms": 23.0, "tokens_per_s": 178_000.0,
    "tflop_per_s": 640.0, "host_ms": 4.0,
}  # fmt: skip


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As `make gpu` writes it, on a GPU."""
    peer = Row("c", "fprop", "DeepGEMM", "measured", ours_per_peer_ratio=0.96)
    absent = Row("d", "fprop", "DeepGEMM", "absent", "ImportError")
    sections = {
        "training": Section("green"), "te": Section("left out", "absent"),
        "peers": Section("green", data={"rows": records([peer, Row("c", "fprop", "ours", "measured"), absent])}),
        "layer": Section("green", data={"times": [TIME, TIME | {"precision": "bf16", "deterministic": True}]}),
    }  # fmt: skip
    where = {"device": {"name": "NVIDIA H100"}, "date": "2026-12-01", "commit": "c" * 40, "versions": {"torch": "2.13"}}
    monkeypatch.setattr(gpu_report, "machine", lambda device: where)
    gpu_report.write([Finished(name, each, 1.0) for name, each in sections.items()], torch.device("cpu"), tmp_path)
    return tmp_path / "report.json"


def test_a_changed_rate_changes_the_prediction_and_its_source_is_named(report: Path) -> None:
    shown = _time_lines(1.28e15, rate("fp8", deterministic=False, path=report))
    assert shown[0].split("  ")[0] == "computing them alone, at 640 TFLOP/s"
    assert shown[0].endswith(" 2 s")
    assert shown[1] == f"rate: a MoE layer on NVIDIA H100, 2026-12-01, commit {'c' * 12}, torch 2.13 ({report})"
    report.write_text(report.read_text().replace("640.0", "320.0").replace("c" * 40, "c" * 40 + " with changes"))
    assert "ccc with changes, torch" in rate("fp8", deterministic=False, path=report).source
    assert _time_lines(1.28e15, rate("fp8", deterministic=False, path=report))[0].endswith(" 4 s")


def without(words: str) -> Callable[[Any], None]:
    def change(values: Any) -> None:
        *outer, last = words.split(".")
        for name in outer:
            values = values[name]
        del values[last]

    return change


CITED = "arXiv:2505.09343 table 4"


@pytest.mark.parametrize(
    ("precision", "change", "rated", "words"),
    [
        ("fp8", None, 385.0, CITED),
        ("bf16", None, None, "no rate is known in bf16; `make gpu` measures one"),
        ("bf16", lambda v: None, None, "has no time of a layer in bf16 with run.deterministic=false, its speeds are"),
        ("fp8", lambda v: v["parity"]["training"].update(status="red"), 385.0, "is not green (training), its speeds"),
        ("fp8", lambda v: v["parity"]["training"].update(status="not measured"), 385.0, "is not green (training)"),
        ("fp8", lambda v: v["speed"]["peers"].update(status="red"), 385.0, "is not green (peers)"),
        ("fp8", lambda v: v["speed"]["layer"].update(status="not measured", data={}), 385.0, "has no time of a layer"),
        ("fp8", lambda v: v["device"].update(name="CPU"), 385.0, "was made on a CPU"),
    ],
)
def test_what_was_not_measured_in_parity_is_not_used_and_said(
    precision: str, change: Callable[[Any], None] | None, rated: float | None, words: str, report: Path
) -> None:
    if change is None:
        report.unlink()
    else:
        values = json.loads(report.read_text())
        change(values)
        report.write_text(json.dumps(values))
    found = rate(precision, deterministic=False, path=report)
    assert found.tflop_per_s == rated
    assert words in found.source
    assert rated is None or CITED in found.source
    assert (str(report) in found.source) == report.exists()
    assert found.source in _time_lines(1.0, found)[-1]


@pytest.mark.parametrize(
    "wrong",
    [
        "", "[]", "3", '{"device": 1}', b"\xff\xfe", without("parity"), without("device.name"), without("commit"),
        lambda v: v["speed"]["layer"]["data"]["times"][0].update(tflop_per_s="fast"),
        lambda v: v["speed"]["layer"]["data"]["times"][0].update(tflop_per_s=0),
        lambda v: v["speed"].update(layer=None), lambda v: v["speed"]["peers"]["data"].update(rows=[1]),
    ],
)  # fmt: skip
def test_a_wrong_file_is_one_sentence(wrong: Any, report: Path) -> None:
    if callable(wrong):
        values = copy.deepcopy(json.loads(report.read_text()))
        wrong(values)
        wrong = json.dumps(values)
    report.write_bytes(wrong if isinstance(wrong, bytes) else wrong.encode())
    with pytest.raises(ValueError, match=r"is no report of `make gpu` \(.*run it again, or delete the file$") as error:
        rate("fp8", deterministic=False, path=report)
    assert str(report) in str(error.value)
    assert "\n" not in str(error.value)


def test_the_document_shows_the_reports_speeds_or_that_there_are_none(
    report: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from launch import gpu

    shown = DOCUMENT.read_text().partition(BEGIN)[2].partition(END)[0]
    assert shown == page(None) or shown.startswith("Measured by `make gpu` on ")
    (tmp_path / "docs").mkdir()
    (copied := tmp_path / "docs" / "kernels.md").write_text(DOCUMENT.read_text())
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr("sys.argv", ["gpu", "--document", "--out", str(tmp_path)])
    assert gpu.main() == 0
    text = copied.read_text()
    assert "| fp8 | cudnn | 23.00 | 178,000 | 640 |\n| bf16, deterministic | cudnn |" in text
    assert "| fprop | DeepGEMM | 0.96 | 1 |" in text
    assert text.replace(page(read_report(report)), shown) == DOCUMENT.read_text()
    values = json.loads(report.read_text())
    for part in ("layer", "peers"):
        values["speed"][part]["status"] = "not measured"
    report.write_text(json.dumps(values))
    assert gpu.main() == 2
    assert capsys.readouterr().err.startswith("gpu: the report has measured no speed")
    values["parity"]["training"]["status"] = "red"
    report.write_text(json.dumps(values))
    assert gpu.main() == 2
    assert capsys.readouterr().err.startswith("gpu: the report is not green (training): no speed without")
    report.unlink()
    assert gpu.main() == 2
    assert capsys.readouterr().err == f"gpu: there is no {report}: run `make gpu` on a machine with a GPU first\n"
    assert copied.read_text() == text


def test_the_plan_reads_that_file(report: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from train.config import compose
    from train.studies.plan import dry_run

    monkeypatch.setattr(measured, "REPORT", report)
    config = compose(["experiment=tiny", "precision=fp8", "run.deterministic=false"])
    monkeypatch.setattr(dry_run, "_measured", lambda *_: SimpleNamespace())
    monkeypatch.setattr(dry_run, "_memory_table", lambda _: [])
    (*_, work) = dry_run._tables(config, 0, SimpleNamespace(total=0))  # type: ignore[arg-type]
    assert work[2].startswith("computing them alone, at 640 TFLOP/s")
    assert work[3].endswith(f"({report})")
