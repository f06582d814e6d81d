"""What `make gpu` measured, for the planner and for docs/kernels.md: both read `runs/gpu/report.json` and nothing else.

A report is used only if it is of a GPU, every parity part of it is green or left out, and no speed part's own parity is
red: no speed without parity. Without one the planner has DeepSeek's published rate in FP8, and says whose it is.
"""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / "runs/gpu/report.json"
BEGIN, END = "<!-- speed: begin -->\n", "\n<!-- speed: end -->"
NOT_MEASURED = """\
**Speed on a GPU: not measured.** The code of this repository has not run on a GPU. Below is what can be known without
one: numbers from two interpreters, instruction counts from the compiler. `make gpu` measures the rest, and
`python -m launch.gpu --document` puts it here. Where an H100 is named, an earlier prototype was measured on it."""
# 38.94 % of an H800's 989.4 TFLOP/s, on the FLOPs that `train.model.sizes` counts.
PUBLISHED = 385.0
PUBLISHED_SOURCE = "DeepSeek's whole step on 2,048 H800, arXiv:2505.09343 table 4; `make gpu` measures this machine's"


@dataclass(frozen=True)
class Layer:
    """A MoE layer of V3's width, forward and backward."""

    precision: str
    deterministic: bool
    attention: str
    time_ms: float
    tokens_per_s: float
    tflop_per_s: float


@dataclass(frozen=True)
class Report:
    """What is read of a report.

    where: device, date, commit, versions. refusal: why its speeds are not used; empty if they are. ratios: (kind of
    product or kernel, peer) -> our speed over the peer's, of each case. speeds: (case, whose) -> TFLOP/s of a product.
    memory_gb_per_s: of our memory-bound kernels.
    """

    where: str
    refusal: str
    layers: tuple[Layer, ...]
    ratios: Mapping[tuple[str, str], list[float]]
    speeds: Mapping[tuple[str, str], float]
    memory_gb_per_s: tuple[float, ...]


@dataclass(frozen=True)
class Rate:
    """TFLOP/s of forward and backward on one GPU, and who measured it; None: nobody."""

    tflop_per_s: float | None
    source: str


def read_report(path: Path) -> Report | None:
    """A report of `make gpu`; None where there is none.

    Raises:
        ValueError: the file is something else.
    """
    if not path.exists():
        return None
    try:
        return _parsed(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        raise ValueError(f"{path} is no report of `make gpu` ({reason}): run it again, or delete the file") from error


def said(command: Sequence[str]) -> str:
    """What a command prints, or 'unknown' where it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def commit() -> str:
    """Of the code that measures, and whether there were changes."""
    changed = said(["git", "status", "--porcelain", "--untracked-files=no"])
    return said(["git", "rev-parse", "HEAD"]) + ("" if changed in ("", "unknown") else " with changes")


def short_commit(name: str) -> str:
    """The first of a commit's digits, and whether there were changes."""
    digits, *changes = name.split(" ", 1)
    return " ".join([digits[:12], *changes])


def _parsed(report: Any) -> Report:
    device, versions = report["device"]["name"], report["versions"]
    where = f"{device}, {report['date']}, commit {short_commit(report['commit'])}, torch {versions['torch']}"
    red = [name for name, part in report["parity"].items() if part["status"] not in ("green", "left out")]
    red += [name for name, part in report["speed"].items() if part["status"] in ("red", "failed")]
    refusal = f"is not green ({', '.join(red)})" if red else ""
    measured = {name: part["data"] for name, part in report["speed"].items() if part["status"] == "green"}
    times = measured.get("layer", {}).get("times", [])
    layers = [Layer(**{name: kind(time[name]) for name, kind in _FIELDS.items()}) for time in times]
    if any(layer.tflop_per_s <= 0 for layer in layers):
        raise ValueError("a speed of 0")
    ratios: dict[tuple[str, str], list[float]] = {}
    rows = measured.get("peers", {}).get("rows", [])
    for row in rows:
        if row["candidate"] != "ours" and row["ours_per_peer_ratio"] is not None:
            ratios.setdefault((row["kind"], row["candidate"]), []).append(float(row["ours_per_peer_ratio"]))
    speeds = {(row["case"], row["candidate"]): float(row["tflop_per_s"]) for row in rows if row["tflop_per_s"]}
    ours = (row for row in rows if (row["kind"], row["candidate"]) == ("memory", "ours"))
    memory = tuple(float(row["gbyte_per_s"]) for row in ours if row["gbyte_per_s"])
    refusal = "was made on a CPU" if device == "CPU" else refusal
    return Report(where, refusal, tuple(layers), ratios, speeds, memory)


_FIELDS = {
    "precision": str, "deterministic": bool, "attention": str, "time_ms": float, "tokens_per_s": float,
    "tflop_per_s": float,
}  # fmt: skip


def rate(precision: str, *, deterministic: bool, path: Path) -> Rate:
    """The measured speed of a MoE layer in a precision and a mode, else what is published.

    Raises:
        ValueError: the file is no report.
    """
    report, why = read_report(path), ""
    if report is not None:
        for layer in () if report.refusal else report.layers:
            if (layer.precision, layer.deterministic) == (precision, deterministic):
                return Rate(layer.tflop_per_s, f"a MoE layer on {report.where} ({path})")
        mode = f"has no time of a layer in {precision} with run.deterministic={str(deterministic).lower()}"
        why = f"{path} {report.refusal or mode}, its speeds are not used; "
    if precision == "fp8":
        return Rate(PUBLISHED, why + PUBLISHED_SOURCE)
    return Rate(None, f"{why}no rate is known in {precision}; `make gpu` measures one")


def page(report: Report | None) -> str:
    """The block of docs/kernels.md between BEGIN and END.

    Raises:
        ValueError: the report's speeds may not be shown.
    """
    if report is None:
        return NOT_MEASURED
    if report.refusal:
        raise ValueError(f"the report {report.refusal}: no speed without parity")
    if not report.layers and not report.ratios:
        raise ValueError("the report has measured no speed")
    lines = [f"Measured by `make gpu` on {report.where}; every parity part is green or left out.", ""]
    if report.layers:
        lines += ["| one MoE layer, 4,096 tokens | attention | ms | tokens/s | TFLOP/s |", "|---|---|---|---|---|"]
    for each in report.layers:
        mode = f"{each.precision}, deterministic" if each.deterministic else each.precision
        speed = f"{each.time_ms:.2f} | {each.tokens_per_s:,.0f} | {each.tflop_per_s:.0f}"
        lines.append(f"| {mode} | {each.attention} | {speed} |")
    if report.ratios:
        lines += ["", "| kind | our speed over that of | median | cases |", "|---|---|---|---|"]
    for (kind, peer), found in report.ratios.items():
        lines.append(f"| {kind} | {peer} | {statistics.median(found):.2f} | {len(found)} |")
    return "\n".join(lines)


def document(report: Report | None, path: Path) -> None:
    """Write `page` into a document, in place of what stands between its marks."""
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, mark, after = rest.partition(END)
    assert mark, f"{path} has lost its marks"
    path.write_text(before + BEGIN + page(report) + mark + after, encoding="utf-8")
