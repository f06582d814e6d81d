"""Several runs overlaid in one self-contained HTML page that opens offline.

What it reads of a run directory stands in `run_card.py`. Curves are drawn raw and smoothed (`compare.ema`).
Two runs are also compared by the relative gap of their smoothed losses, with the report's band of 0.25 %
(arXiv:2412.19437 section 3.3); the reference is the first run, or the one that is not FP8. Expert load is
averaged over neighbouring steps into at most `MAX_COLUMNS` columns.

The page is `page.html` filled with data and with plotly.js of the installed plotly package; its content
security policy forbids every request. This file only reads runs.
"""

from __future__ import annotations

import html
import json
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from plotly.offline import get_plotlyjs

from train.observe.compare import PAPER_GAP, common_steps, ema, mean_smoothed_gap, relative_gap
from train.observe.metrics import METRICS
from train.observe.run_card import (
    SMOOTHING,
    Json,
    Run,
    baselines_of,
    card_html,
    chip_html,
    finite,
    load_runs,
    subtitle,
    table_html,
)

# Events marked on the loss curve, with the sign that page.html draws for each.
MARKS = {
    "checkpoint": "○ checkpoint",
    "resume": "▷ resumed",
    "skip": "✕ step skipped",
    "stop": "■ end",
    "replay_differs": "◆ replay differs",
}
MAX_COLUMNS = 160
_PAGE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Chart:
    """A metric drawn over the run: smoothed or as it is, with a hint for the reader.

    logarithmic: the page's "log y" applies. ticks: d3 format of the numbers. least_values: below, no curve.
    """

    metric: str
    title: str
    hint: str
    smooth: bool = True
    wide: bool = False
    logarithmic: bool = False
    from_zero: bool = False
    ticks: str = "~g"
    least_values: int = 1


CHARTS = (
    Chart("loss/main", "Loss", "next token, nats", wide=True, logarithmic=True),
    Chart("eval/bits_per_byte", "Bits per byte while training", "held-out", smooth=False, least_values=2),
    Chart("loss/mtp", "MTP loss", "mean over depths, nats", logarithmic=True),
    Chart("grad/norm", "Gradient norm", "global, before clipping", logarithmic=True),
    Chart("optim/lr", "Learning rate", "", smooth=False, from_zero=True),
    Chart("speed/tokens_per_s", "Speed", "tokens per second", from_zero=True, ticks="~s"),
    Chart("moe/max_violation_ratio", "MaxVio", "(max load − mean) / mean, worst layer", from_zero=True),
)


def render(run_dirs: Sequence[Path], out: Path, title: str = "Training runs") -> None:
    """Write the page.

    Args:
        run_dirs: directories of runs, drawn in this order.
        out: the HTML file to write; its folder is made if missing.
        title: heading of the page.
    Raises:
        ValueError: no run, a directory without metrics.jsonl, or a run card that is not JSON.
    """
    if not run_dirs:
        raise ValueError("no run given: name at least one run directory, such as runs/tiny_bf16")
    runs = load_runs(run_dirs)
    figures = _figures(runs)
    parts = {
        "title": html.escape(title),
        "subtitle": html.escape(subtitle(runs)),
        "cards": "\n".join(card_html(run, index) for index, run in enumerate(runs)),
        "chips": "\n".join(chip_html(run, index) for index, run in enumerate(runs)),
        "table": table_html(runs),
        "figures": "\n".join(_figure_html(figure) for figure in figures) or "<p>No steps yet.</p>",
        "data": _script_json({"runs": [_run_json(run) for run in runs], "figures": figures}),
        "plotly": get_plotlyjs(),
    }
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _PAGE.read_text(encoding="utf-8"))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")


def _figures(runs: list[Run]) -> list[Json]:
    """Every figure that has something to show, in the page's order."""
    figures = [_curves(runs, chart) for chart in CHARTS]
    present = [figure for figure in figures if figure["traces"]]
    return [*present[:1], *_gap(runs), *_bars(runs), *present[1:], *_heat_map(runs)]


def _curves(runs: list[Run], chart: Chart) -> Json:
    traces: list[Json] = []
    for index, run in enumerate(runs):
        values = run.column(chart.metric)
        if sum(map(math.isfinite, values)) < chart.least_values:
            continue
        if chart.smooth:
            traces.append({"run": index, "style": "raw", "y": _numbers(values)})
            traces.append({"run": index, "style": "line", "y": _numbers(ema(values, SMOOTHING))})
        else:
            traces.append({"run": index, "style": "line", "y": _numbers(values)})
        if chart.metric == "loss/main":
            traces.extend(_markers(run, index))
    hint = chart.hint
    if chart.metric == "loss/main":
        kinds = dict.fromkeys(kind for trace in traces for kind in trace.get("kinds", ()))
        hint = "; ".join([hint, "faint as logged, strong smoothed", *(MARKS[kind] for kind in kinds)])
    return {
        "id": chart.metric.replace("/", "-"),
        "kind": "curves",
        "title": chart.title,
        "hint": hint,
        "about": METRICS[chart.metric].description,
        "wide": chart.wide,
        "log": chart.logarithmic,
        "zero": chart.from_zero,
        "ticks": chart.ticks,
        "traces": traces,
    }


def _markers(run: Run, index: int) -> list[Json]:
    """Events of the run at the height of its smoothed loss, as one trace."""
    row_of_step = {record["step"]: row for row, record in enumerate(run.records)}
    smooth = ema(run.column("loss/main"), SMOOTHING)
    shown = [event for event in run.events if event["event"] in MARKS and event["step"] in row_of_step]
    if not shown:
        return []
    rows = [row_of_step[event["step"]] for event in shown]
    return [
        {
            "run": index,
            "style": "events",
            "rows": rows,
            "y": _numbers([smooth[row] for row in rows]),
            "kinds": [event["event"] for event in shown],
        }
    ]


def _gap(runs: list[Run]) -> list[Json]:
    """The relative gap of exactly two runs that share steps."""
    if len(runs) != 2:
        return []
    fp8 = [run.card.get("precision") == "fp8" for run in runs]
    at_reference, at_tested = (1, 0) if fp8 == [True, False] else (0, 1)
    reference, tested = runs[at_reference], runs[at_tested]
    steps = set(common_steps(tested.records, reference.records))
    if not steps:
        return []
    percent = [100 * gap for gap in relative_gap(tested.records, reference.records, SMOOTHING)]
    mean = 100 * mean_smoothed_gap(tested.records, reference.records, SMOOTHING)
    rows = [row for row, record in enumerate(reference.records) if record["step"] in steps]
    settled = [abs(value) for value in percent[len(percent) // 10 :]]
    return [
        {
            "id": "gap",
            "kind": "gap",
            "title": "Relative gap of the smoothed loss",
            "hint": f"{tested.name} against {reference.name}; band: ±{100 * PAPER_GAP:g} %",
            "about": "mean over the second half",
            "badge": f"{mean:+.3f} %",
            "good": abs(mean) <= 100 * PAPER_GAP,
            "wide": True,
            "band": 100 * PAPER_GAP,
            "limit": max(3 * 100 * PAPER_GAP, 1.15 * max(settled, default=0.0)),
            "traces": [{"run": at_reference, "by": at_tested, "rows": rows, "y": _numbers(percent)}],
        }
    ]


def _bars(runs: list[Run]) -> list[Json]:
    """Held-out bits per byte of runs beside their baselines."""
    baselines = baselines_of(runs)
    bars: list[Json] = [
        {"run": index, "label": run.name, "value": run.bits_per_byte}
        for index, run in enumerate(runs)
        if run.bits_per_byte is not None
    ]
    if not bars or not baselines:
        return []
    bars += [{"run": None, "label": name, "value": value} for name, value in baselines.items()]
    return [
        {
            "id": "bits-per-byte",
            "kind": "bars",
            "title": "Held-out bits per byte",
            "hint": "runs beside simpler models of the same text; shorter is better",
            "about": METRICS["eval/bits_per_byte"].description,
            "wide": False,
            "traces": sorted(bars, key=lambda bar: bar["value"]),
        }
    ]


def _heat_map(runs: list[Run]) -> list[Json]:
    maps = [_load_map(run, index) for index, run in enumerate(runs)]
    present = [load_map for load_map in maps if load_map]
    if not present:
        return []
    return [
        {
            "id": "expert-load",
            "kind": "heat",
            "title": "Expert load",
            "hint": "load over the layer's mean: 1 is balanced, 0 an idle expert",
            "about": METRICS["moe/expert_load"].description,
            "wide": True,
            "traces": present,
        }
    ]


def _load_map(run: Run, index: int) -> Json | None:
    """Rows are the experts of all layers, columns are groups of neighbouring steps; cells are mean loads."""
    rows = [row for row, record in enumerate(run.records) if record.get("moe/expert_load")]
    tables = [run.records[row]["moe/expert_load"] for row in rows]
    if not tables:
        return None
    shape = [len(layer) for layer in tables[-1]]
    kept = [row for row, table in zip(rows, tables, strict=True) if [len(layer) for layer in table] == shape]
    width = math.ceil(len(kept) / MAX_COLUMNS)
    groups = [kept[start : start + width] for start in range(0, len(kept), width)]
    columns = []
    for group in groups:
        flat = [[load for layer in run.records[row]["moe/expert_load"] for load in layer] for row in group]
        columns.append([_number(statistics.fmean(loads), digits=3) for loads in zip(*flat, strict=True)])
    return {
        "run": index,
        "layers": shape,
        "rows": [group[len(group) // 2] for group in groups],
        "ranges": [[run.records[group[0]]["step"], run.records[group[-1]]["step"]] for group in groups],
        "z": [list(row) for row in zip(*columns, strict=True)],
    }


def _run_json(run: Run) -> Json:
    """Name and the x axes that all curves of the run share."""
    start = run.records[0]["time_unix_s"] if run.records else 0.0
    return {
        "name": run.name,
        "axes": {
            "step": [record["step"] for record in run.records],
            "tokens": [record["tokens_seen"] for record in run.records],
            "minutes": _numbers([(record["time_unix_s"] - start) / 60 for record in run.records]),
        },
    }


def _script_json(value: Json) -> str:
    """JSON that cannot end the script element it stands in, whatever a run is called."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _figure_html(figure: Json) -> str:
    badge = ""
    if "badge" in figure:
        verdict = "good" if figure["good"] else "bad"
        about = html.escape(figure["about"])
        badge = f'<span class="badge {verdict}" title="{about}">{about}: <b>{figure["badge"]}</b></span>'
    return (
        f'<figure id="{figure["id"]}" class="{"wide" if figure["wide"] else ""}">'
        f'<figcaption title="{html.escape(figure["about"])}"><h2>{html.escape(figure["title"])}</h2>'
        f"<p>{html.escape(figure['hint'])}</p>{badge}</figcaption><div class=plot></div></figure>"
    )


def _number(value: float | None, digits: int = 6) -> float | None:
    """Rounded to what a screen can show, to keep the page small; JSON has no NaN, so that becomes null."""
    number = finite(value)
    return None if number is None else float(f"{number:.{digits}g}")


def _numbers(values: Sequence[float]) -> list[float | None]:
    return [_number(value) for value in values]
