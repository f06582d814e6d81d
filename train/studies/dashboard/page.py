"""The dashboard's page: its charts, runs as data, and one self-contained HTML file that opens offline.

    page.html, page.css       the frame
    page_figures.js, page.js  every figure; controls, cards, and following a server
    charts/offline.py         look and figures of every page of charts, plotly.js, and one file that holds all of them

`server.py` serves the same page and sends the same data in parts.

Size: the bounded series of `series.py` are thinned further until the curves of all runs take at most `CURVE_BYTES`
and the tables `TABLE_BYTES`. Every extreme and every kept event survives, and the page says how many points it draws
of how many were logged. Paper: arXiv:2412.19437 section 4.2 names the schedules, 3.3 the loss gap with its band of
0.25 %; arXiv:2408.15664 MaxVio.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from train.data.whole_file import write_whole
from train.observe.metrics import FP8_OPERANDS, METRICS
from train.observe.sinks import no_run
from train.studies.charts.offline import self_contained
from train.studies.compare import PAPER_GAP
from train.studies.dashboard import run_card
from train.studies.dashboard.run_reader import KEPT_EVENTS, RunReader, find_runs
from train.studies.dashboard.series import MAX_BUCKETS, MAX_COLUMNS, Json

# Of the page's file, without plotly.js (4.8 MB) and the tables; and of these.
CURVE_BYTES = 6_500_000
TABLE_BYTES = 3_000_000
# One bucket: mean, low and high as f32, their steps and the key as u32, in base64.
_BUCKET_BYTES = 32
_CELL_BYTES = 8 / 3
SCRIPTS = ("page_figures.js", "page.js")
SECTIONS = {"loss": "Loss", "optimizer": "Optimiser and schedules", "speed": "Speed", "experts": "Experts"}
SECTIONS |= {"fp8": "FP8 health", "more": "More"}


@dataclass(frozen=True)
class Chart:
    """A metric drawn over the run.

    smooth, logarithmic: the page's control applies. percent: a ratio, shown as %. ticks: d3 format. least_values: with
    fewer there is no curve. marks: every event is marked on this curve.
    """

    metric: str
    section: str
    title: str
    hint: str = ""
    smooth: bool = False
    wide: bool = False
    logarithmic: bool = False
    from_zero: bool = False
    percent: bool = False
    ticks: str = "~g"
    least_values: int = 1
    marks: bool = False


_EVENTS = "next token, nats; faint as logged; ○ checkpoint, ✕ skipped, ▲ spike, ◆ replay differs"
# In the order of the page. Tables (expert load and bias, FP8 statistics) have figures of their own in its script.
CHARTS = (
    Chart("loss/main", "loss", "Loss", _EVENTS, smooth=True, wide=True, logarithmic=True, marks=True),
    Chart("loss/mtp", "loss", "MTP loss", "mean over depths, nats", smooth=True, logarithmic=True),
    Chart("eval/bits_per_byte", "loss", "Bits per byte while training", "held-out text", least_values=2),
    Chart("grad/norm", "optimizer", "Gradient norm", "global, before clipping", smooth=True, logarithmic=True),
    Chart("attention/max_logit", "optimizer", "Largest logit", "of attention, worst head", from_zero=True),
    Chart("optim/lr", "optimizer", "Learning rate", from_zero=True),
    Chart("schedule/batch_sequences", "optimizer", "Batch", "sequences a step", from_zero=True),
    Chart("schedule/bias_speed", "optimizer", "γ", "step of the routing bias", from_zero=True),
    Chart("schedule/mtp_weight", "optimizer", "λ", "weight of the MTP loss", from_zero=True),
    Chart("speed/tokens_per_s", "speed", "Tokens per second", smooth=True, from_zero=True, ticks="~s"),
    Chart("speed/mfu_ratio", "speed", "MFU", "share of the peak FLOP/s", smooth=True, from_zero=True, percent=True),
    Chart("moe/max_violation_ratio", "experts", "MaxVio", "(max load − mean) / mean, worst layer", smooth=True),
    Chart("moe/dead_experts", "experts", "Experts without a token", "(layer, expert) pairs in a step", from_zero=True),
    Chart("loss/balance", "experts", "Balance loss", "sequence-wise, without α", smooth=True),
)
# Axes, and sums of what is drawn. Every other metric gets a plain chart in "More", whatever a trainer logs.
NOT_DRAWN = frozenset({"step", "tokens_seen", "time/trained_s", "loss/total", "guard/skipped_steps"})


def charts_for(metrics: set[str]) -> list[Json]:
    """The charts of the recorded metrics, in the page's order, with what METRICS says about each."""
    others = sorted(metrics - {chart.metric for chart in CHARTS} - NOT_DRAWN)
    charts = [chart for chart in CHARTS if chart.metric in metrics]
    charts += [Chart(name, "more", name, METRICS[name].unit if name in METRICS else "") for name in others]
    about = {name: f"{name}: {metric.description}" for name, metric in METRICS.items()}
    return [asdict(chart) | {"about": about.get(chart.metric, chart.metric)} for chart in charts]


def render(run_dirs: Sequence[Path], out: Path, title: str = "Training runs") -> None:
    """Write the page of runs, or of folders of runs, drawn in this order.

    Raises:
        ValueError: no run, a directory without metrics.jsonl, or a run card that is not JSON.
    """
    page = offline_page(read_runs(run_dirs), title)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, page)


def read_runs(run_dirs: Sequence[Path]) -> list[RunReader]:
    """Read runs to their ends.

    Raises:
        ValueError: no run, a directory without metrics.jsonl, or a run card that is not JSON.
    """
    if not run_dirs:
        raise ValueError("no run given: name at least one run directory, such as runs/tiny_bf16")
    for folder in run_dirs:
        if not find_runs([folder]):
            raise no_run(folder)
    readers = [RunReader(directory) for directory in find_runs(run_dirs)]
    for reader in readers:
        reader.poll()
        for problem in reader.problems.values():
            raise ValueError(problem)
    return readers


def offline_page(readers: Sequence[RunReader], title: str) -> str:
    """The whole page as text."""
    data = {"live": False, "title": title, **constants(), "runs": runs_json(readers, time.time())}
    for run, reader in zip(data["runs"], readers, strict=True):
        run["tables"] = tables_json(reader, table_limit(readers))
    data["charts"] = charts_for({name for reader in readers for name in reader.series})
    return self_contained(
        source("page.html"), data, style=source("page.css"), scripts=[source(name) for name in SCRIPTS]
    )


def constants() -> Json:
    """What the page knows besides the runs."""
    return {
        "sections": SECTIONS,
        "band_percent": 100 * PAPER_GAP,
        "smoothing_steps": round(1 / (1 - run_card.SMOOTHING)),
        "fp8_operands": [name.replace(".", " ") for name in FP8_OPERANDS],
        "kept_events": KEPT_EVENTS,
        "drawn_unix_s": time.time(),
    }


def runs_json(readers: Sequence[RunReader], now_unix_s: float) -> list[Json]:
    """Every run without its tables, each with a name of its own."""
    limit = curve_limit(readers, CURVE_BYTES)
    return [
        run_json(reader, key=index, name=name, limit=limit, now_unix_s=now_unix_s)
        for index, (reader, name) in enumerate(zip(readers, names(readers), strict=True))
    ]


def names(readers: Sequence[RunReader]) -> list[str]:
    """The name of each run, with its directory where an earlier run has the same."""
    found: list[str] = []
    for reader in readers:
        name = str(reader.card.get("name", reader.directory.resolve().name))
        found.append(f"{name} ({reader.directory})" if name in found else name)
    return found


def run_json(reader: RunReader, *, key: int, name: str, limit: int, now_unix_s: float) -> Json:
    """One run as the page draws it; `limit` bounds the buckets of each curve."""
    axes = ("tokens_seen", "time/trained_s")
    return {
        "key": key,
        "name": name,
        "directory": str(reader.directory),
        "precision": str(reader.card.get("precision", "")),
        "layer_ids": run_card.layer_ids(reader),
        "moe_layer_ids": run_card.moe_layer_ids(reader),
        "facts": run_card.facts(reader),
        "fields": run_card.fields(reader),
        "identity": run_card.identity(reader),
        "row": run_card.row(reader),
        "bits_per_byte": run_card.bits_per_byte(reader),
        "baselines": run_card.baselines(reader),
        "status": run_card.status(reader, now_unix_s),
        "dead": run_card.dead_experts(reader),
        "records": reader.records,
        "events": {kind: {"total": log.total, "steps": log.steps} for kind, log in reader.events.items()},
        "axes": {metric: reader.series[metric].knots(limit) for metric in axes if metric in reader.series},
        "series": {metric: curve.to_json(limit) for metric, curve in reader.series.items() if metric not in axes},
        "table_names": sorted(reader.tables),
    }


def tables_json(reader: RunReader, limit: int) -> Json:
    """Every table of one run; `limit` bounds the cells of each."""
    return {
        metric: table.to_json(min(MAX_COLUMNS, max(4, limit // max(1, sum(table.shape)))))
        for metric, table in reader.tables.items()
    }


def curve_limit(readers: Sequence[RunReader], budget_bytes: float) -> int:
    """Buckets of each curve with which all curves together stay within the budget."""
    curves = sum(len(reader.series) for reader in readers)
    return int(max(64, min(2 * MAX_BUCKETS, budget_bytes / (_BUCKET_BYTES * max(1, curves)))))


def table_limit(readers: Sequence[RunReader]) -> int:
    """Cells of each table with which all tables together stay within `TABLE_BYTES`."""
    return int(TABLE_BYTES / (_CELL_BYTES * max(1, sum(len(reader.tables) for reader in readers))))


def source(name: str) -> str:
    """The text of one of the page's files, such as page.css."""
    return (Path(__file__).parent / name).read_text(encoding="utf-8")
