"""Runs as data for the page, and the page: one self-contained HTML file that opens offline.

The page is `page.html` with `page.css`, plotly.js of the installed plotly package, and the scripts
`page_series.js` (arrays, smoothing, the relative gap), `page_charts.js` (curves), `page_tables.js` (heat maps) and
`page.js` (controls, cards, following a server). The offline file holds all of them and the data; its content
security policy forbids every request, and allows no script but these, by their hashes. The same page is served by
`live.py`, which sends the same data in parts.

Size: the bounded series of `series.py` are thinned further so that the curves of all runs take at most
`CURVE_BYTES` and the tables `TABLE_BYTES`; every extreme and every kept event survives, and the page says how
many points it draws of how many were logged. Two runs are also compared by the relative gap of their smoothed
losses with the report's band of 0.25 % (arXiv:2412.19437 section 3.3). This file only reads runs.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path

from plotly.offline import get_plotlyjs

from train.observe.metrics import FP8_OPERANDS
from train.observe.sinks import METRICS_FILE, write_whole
from train.studies.compare import PAPER_GAP
from train.studies.dashboard import run_card
from train.studies.dashboard.charts import SECTIONS, charts_for
from train.studies.dashboard.run_reader import KEPT_EVENTS, RunReader, find_runs
from train.studies.dashboard.series import MAX_BUCKETS, MAX_COLUMNS, Json

# Of the page's file, without plotly.js (4.8 MB) and the tables; and of these.
CURVE_BYTES = 6_500_000
TABLE_BYTES = 3_000_000
# One bucket: mean, low and high as f32, their steps and the key as u32, in base64.
_BUCKET_BYTES = 32
_CELL_BYTES = 8 / 3
SCRIPTS = ("page_series.js", "page_charts.js", "page_tables.js", "page.js")
_HERE = Path(__file__).parent


def render(run_dirs: Sequence[Path], out: Path, title: str = "Training runs") -> None:
    """Write the page.

    Args:
        run_dirs: directories of runs, or folders of them, drawn in this order.
        out: the HTML file to write; its folder is made if missing.
        title: heading of the page.
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
    for place in run_dirs:
        if not find_runs([place]):
            raise ValueError(
                f"{place} has no {METRICS_FILE}: give the directory of a run that has started, such as runs/tiny_bf16"
            )
    readers = [RunReader(directory) for directory in find_runs(run_dirs)]
    for reader in readers:
        reader.poll()
        for problem in reader.problems.values():
            raise ValueError(problem)
    return readers


def offline_page(readers: Sequence[RunReader], title: str) -> str:
    """The whole page as text."""
    data = {"live": False, "title": title, **constants(readers), "runs": runs_json(readers, time.time())}
    for run, reader in zip(data["runs"], readers, strict=True):
        run["tables"] = tables_json(reader, table_limit(readers))
    data["charts"] = charts_for({name for reader in readers for name in reader.series})
    scripts = [get_plotlyjs(), *(source(name) for name in SCRIPTS)]
    hashes = " ".join(f"'sha256-{_sha256(script)}'" for script in scripts)
    tags = [f"<script>{script}</script>" for script in scripts]
    tags.insert(0, f'<script type="application/json" id="data">{script_json(data)}</script>')
    return filled_page(
        title=title,
        policy=f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:",
        style=f"<style>{source('page.css')}</style>",
        scripts="\n".join(tags),
    )


def filled_page(*, title: str, policy: str, style: str, scripts: str) -> str:
    """`page.html` with its four holes filled; `title` is text, the others are HTML."""
    parts = {"title": html.escape(title), "policy": policy, "style": style, "scripts": scripts}
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], source("page.html"))


def constants(readers: Sequence[RunReader]) -> Json:
    """What the page knows beside the runs."""
    return {
        "sections": SECTIONS,
        "band_percent": 100 * PAPER_GAP,
        "smoothing_steps": round(1 / (1 - run_card.SMOOTHING)),
        "fp8_operands": [name.replace(".", " ") for name in FP8_OPERANDS],
        "kept_events": KEPT_EVENTS,
        "drawn_unix_s": time.time(),
    }


def runs_json(readers: Sequence[RunReader], now_unix_s: float, *, limit: int | None = None) -> list[Json]:
    """Every run without its tables, each with a name of its own."""
    limit = limit or curve_limit(readers, CURVE_BYTES)
    return [
        run_json(reader, key=index, name=name, limit=limit, now_unix_s=now_unix_s)
        for index, (reader, name) in enumerate(zip(readers, names(readers), strict=True))
    ]


def names(readers: Sequence[RunReader]) -> list[str]:
    """Of each run, told apart by its directory where two have the same."""
    found: list[str] = []
    for reader in readers:
        name = str(reader.card.get("name", reader.directory.resolve().name))
        found.append(f"{name} ({reader.directory})" if name in found else name)
    return found


def run_json(reader: RunReader, *, key: int, name: str, limit: int, now_unix_s: float) -> Json:
    """One run as the page draws it; `limit` bounds the buckets of each curve."""
    axes = ("tokens_seen", "time_unix_s")
    curves = {metric: series for metric, series in reader.series.items() if metric not in axes}
    return {
        "key": key,
        "name": name,
        "directory": str(reader.directory),
        "precision": str(reader.card.get("precision", "")),
        "layer_ids": run_card.layer_ids(reader),
        "moe_layer_ids": run_card.moe_layer_ids(reader),
        "facts": run_card.facts(reader),
        "fields": run_card.fields(reader),
        "row": run_card.row(reader),
        "bits_per_byte": run_card.bits_per_byte(reader),
        "baselines": run_card.baselines(reader),
        "status": run_card.status(reader, now_unix_s),
        "dead": run_card.dead_experts(reader),
        "records": reader.records,
        "events": {kind: {"total": log.total, "steps": log.steps} for kind, log in reader.events.items()},
        "axes": {metric: reader.series[metric].knots(limit) for metric in axes if metric in reader.series},
        "series": {metric: series.to_json(limit) for metric, series in curves.items()},
        "table_names": sorted(reader.tables),
    }


def tables_json(reader: RunReader, limit: int) -> Json:
    """Every table of one run; `limit` bounds the cells of each."""
    tables = {}
    for metric, table in reader.tables.items():
        tables[metric] = table.to_json(min(MAX_COLUMNS, max(4, limit // max(1, sum(table.shape)))))
    return tables


def curve_limit(readers: Sequence[RunReader], budget_bytes: float) -> int:
    """Buckets of each curve, so that all curves together stay within the budget."""
    curves = sum(len(reader.series) for reader in readers)
    return int(max(64, min(2 * MAX_BUCKETS, budget_bytes / (_BUCKET_BYTES * max(1, curves)))))


def table_limit(readers: Sequence[RunReader]) -> int:
    """Cells of each table, so that all tables together stay within the budget."""
    tables = sum(len(reader.tables) for reader in readers)
    return int(TABLE_BYTES / (_CELL_BYTES * max(1, tables)))


def script_json(value: Json) -> str:
    """JSON that cannot end the script element it stands in, whatever a run is called."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def source(name: str) -> str:
    """The text of a part of the page, such as page.css."""
    return (_HERE / name).read_text(encoding="utf-8")


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
