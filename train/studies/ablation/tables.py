"""The ablations of `runs.py` as files: JSON, Markdown tables, and pictures as offline HTML pages.

    result.json     everything measured
    tables.md       runs, what a gate makes of them, one-step errors, moments: what docs/numerics.md shows
    sums.html       error of the accumulation alone against the length of the contraction (arXiv:2412.19437 §3.3.2)
    outliers.html   error of dx token by token against the spread of tokens, 1x128 against 128x128 (App. B.2)
    runs.html       gap of each run to BF16 of its seed, with the noise floor

docs/numerics.md says how a page becomes PNG.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.data.store import strict_json
from train.studies.ablation.runs import interval
from train.studies.compare import PAPER_GAP

LINEAR_COLUMNS = {
    "x": "x",
    "w": "W",
    "dy_dgrad": "dy, dgrad",
    "dy_wgrad": "dy, wgrad",
    "y": "y",
    "dx": "dx",
    "dw": "dW",
    "sum": "sum of y alone",
    "sum_largest": "its largest",
    "gradient": "model: gradient",
    "turn": "model: turn",
}
MOMENT_COLUMNS = {
    "exp_avg": "first moment",
    "exp_avg_sq": "second moment",
    "update": "update",
    "update_largest": "largest, in learning rates",
    "zero_share": "second moments that are 0",
}
COLOURS = ("#1f5fa8", "#d1662a", "#2f8f5b", "#8a4fb0", "#7a7a7a")


def write(result: Mapping[str, Any], directory: Path) -> list[Path]:
    """Write all files into a folder and return their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    texts = {"result.json": strict_json(result), "tables.md": tables(result)}
    texts |= {f"{name}.html": page for name, page in pages(result).items()}
    for name, text in texts.items():
        (directory / name).write_text(text, encoding="utf-8")
    return [directory / name for name in texts]


def tables(result: Mapping[str, Any]) -> str:
    """The measured numbers as Markdown."""
    changes, errors = result["changes"], result["errors"]
    linears = _table(
        ["one step", *LINEAR_COLUMNS.values()],
        [[changes[name], *_cells(row, LINEAR_COLUMNS)] for name, row in errors["linears"].items()],
    )
    moments = _table(
        ["moments", *MOMENT_COLUMNS.values()],
        [[dtype, *_cells(row, MOMENT_COLUMNS)] for dtype, row in errors["moments"].items()],
    )
    rows = {name: row for name, row in result["runs"].items() if name != "bf16"}
    runs = _table(
        ["run", *(f"seed {seed}" for seed in result["size"]["seeds"]), "mean", "mean against the recipe"],
        [[changes[name], *_gap_cells(row)] for name, row in rows.items()],
    )
    floor = f"Floor (mean absolute gap of BF16 in another order): {result['floor']:.3%}"
    parts = [runs, floor]
    if len(result["size"]["seeds"]) > 1:
        gate = result["floor"] + PAPER_GAP
        power = _table(
            ["run", "mean", "95 % interval of the mean", f"seeds beyond {gate:.3%}", "the gate says"],
            [[changes[name], *_power_cells(row["gaps"], gate)] for name, row in rows.items()],
        )
        parts += [power, f"Gate: |mean| <= floor + {PAPER_GAP:.2%} (the report's bound)"]
    return "\n\n".join((*parts, *(table for table in (linears, moments) if table))) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(row: Mapping[str, float], columns: Mapping[str, str]) -> list[str]:
    # A number that was not measured leaves its cell empty.
    return [f"{row[name]:.3g}" if name in row else "" for name in columns]


def _gap_cells(row: Mapping[str, Any]) -> list[str]:
    ended = ["" if stopped is None else " (stopped)" for stopped in row["stopped"]]
    gaps = [f"{_percent(gap)}{note}" for gap, note in zip(row["gaps"], ended, strict=True)]
    return [*gaps, _percent(row["mean"]), _percent(row["against_fp8"])]


def _power_cells(gaps: Sequence[float], gate: float) -> list[str]:
    """A run without a finite loss is beyond every gate."""
    mean, (low, high) = statistics.fmean(gaps), interval(gaps)
    beyond = sum(not abs(gap) <= gate for gap in gaps)
    bounds = f"{_percent(low)} to {_percent(high)}" if math.isfinite(mean) else ""
    return [_percent(mean), bounds, f"{beyond} of {len(gaps)}", "green" if abs(mean) <= gate else "RED"]


def _percent(gap: float | None) -> str:
    # None where the recipe was not run, NaN where a run had no finite loss.
    return "" if gap is None or math.isnan(gap) else f"{gap:+.3%}"


def pages(result: Mapping[str, Any]) -> dict[str, str]:
    """Name -> HTML page of one picture, 960 x 460 pixels, with plotly.js inside."""
    errors, figures = result["errors"], {}
    if errors["sums"]:
        figures["sums"] = _sums(errors["sums"], result["changes"])
    if errors["outliers"]:
        figures["outliers"] = _outliers(errors["outliers"], result["changes"])
    figures["runs"] = _runs(result)
    bare = {"displayModeBar": False}
    return {name: figure.to_html(include_plotlyjs=True, config=bare) for name, figure in figures.items()}


def _figure(title: str, x: str, y: str) -> Any:
    import plotly.graph_objects as graph

    figure = graph.Figure()
    figure.update_layout(
        template="plotly_white",
        title={"text": title, "font": {"size": 17}},
        xaxis_title=x,
        yaxis_title=y,
        font={"size": 13},
        margin={"l": 80, "r": 20, "t": 60, "b": 60},
        legend={"x": 0.01, "y": 0.99, "bgcolor": "rgba(255, 255, 255, 0.8)"},
        width=960,
        height=460,
    )
    return figure


def _lines(figure: Any, curves: Mapping[str, Mapping[float, float]]) -> Any:
    for (name, curve), colour in zip(curves.items(), COLOURS, strict=False):
        line = {"color": colour}
        figure.add_scatter(x=list(curve), y=list(curve.values()), name=name, mode="lines+markers", line=line)
    return figure


def _sums(curves: Mapping[str, Mapping[float, Mapping[str, float]]], changes: dict[str, str]) -> Any:
    title = "What the sum alone costs: largest error of y over its root mean square"
    figure = _figure(title, "terms of the contraction", "largest error")
    figure.update_yaxes(type="log", dtick=1, exponentformat="power")
    figure.update_layout(legend={"y": 0.47})
    lengths = sorted({int(k) for curve in curves.values() for k in curve})
    figure.update_xaxes(type="log", tickvals=lengths)
    ends, name = [lengths[0], lengths[-1]], "the report: near 2 % at 4096, no promotion"
    figure.add_scatter(x=ends, y=[0.02, 0.02], name=name, mode="lines", line={"dash": "dot", "color": "black"})
    largest = {name: {k: errors["sum_largest"] for k, errors in curve.items()} for name, curve in curves.items()}
    return _lines(figure, {(changes | {"fp8": "FP32 sums"})[name]: curve for name, curve in largest.items()})


def _outliers(curves: Mapping[str, Mapping[float, float]], changes: dict[str, str]) -> Any:
    title = "Error of dx, token by token, where the gradients of tokens differ in size"
    spread = "spread of tokens: standard deviation in powers of two"
    figure = _figure(title, spread, "relative error of a token's dx (rms)")
    figure.update_yaxes(type="log", tickformat=".2~%")
    names = changes | {"fp8": "gradients in 1x128 (the recipe)"}
    return _lines(figure, {names[name]: curve for name, curve in curves.items()})


def _runs(result: Mapping[str, Any]) -> Any:
    title = "Loss gap to BF16 of the same seed; the band is the report's 0.25 %"
    figure = _figure(title, "", "mean gap of smoothed losses")
    figure.update_yaxes(tickformat="+.2~%")
    figure.update_layout(legend={"x": 1.01, "y": 1.0})
    figure.add_hrect(y0=-PAPER_GAP, y1=PAPER_GAP, fillcolor="#1f5fa8", opacity=0.08, line_width=0)
    floor = result["floor"]
    figure.add_hrect(y0=-floor, y1=floor, fillcolor="#7a7a7a", opacity=0.25, line_width=0)
    rows = {result["changes"][name]: row for name, row in result["runs"].items() if name != "bf16"}
    for index, seed in enumerate(result["size"]["seeds"]):
        marker = {"size": 9, "color": COLOURS[index % len(COLOURS)]}
        gaps = [row["gaps"][index] for row in rows.values()]
        figure.add_scatter(x=list(rows), y=gaps, name=f"seed {seed}", mode="markers", marker=marker)
    marker = {"size": 20, "symbol": "line-ew-open", "color": "black"}
    means = [row["mean"] for row in rows.values()]
    return figure.add_scatter(x=list(rows), y=means, name="mean", mode="markers", marker=marker)
