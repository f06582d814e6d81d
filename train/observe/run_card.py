"""A run as a reader of the dashboard meets it: read from its directory, told as a card and a row of a table.

    runs/<name>/metrics.jsonl   records and events                              required
    runs/<name>/run_card.json   who it is and on what it ran                    optional
    runs/<name>/summary.json    held-out bits per byte and its baselines        optional

run_card.json (written by `open_sinks`): name, precision, parameters {total, active, mtp}, tokens_total,
sequence_length, seed, device, torch or versions {package: version}; other fields are listed below these.
summary.json: heldout_bits_per_byte (else the last eval/bits_per_byte counts) and
baselines_bits_per_byte {name: value}, of simpler models on the same held-out text.

Every text that comes from a file is escaped. Curves are drawn in `dashboard.py`.
"""

from __future__ import annotations

import html
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from train.observe.compare import ema
from train.observe.metrics import Record
from train.observe.sinks import RUN_CARD_FILE, read_events, read_run

SUMMARY_FILE = "summary.json"
SMOOTHING = 0.9
# page.html has this many colours; the ninth run begins again, dashed.
NUM_COLORS = 8

Json = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What the page shows of one run directory."""

    name: str
    records: list[Record]
    events: list[Record]
    card: Json
    summary: Json

    @property
    def bits_per_byte(self) -> float | None:
        """Held-out bits per byte at the end of the run, if it was measured."""
        measured = [r["eval/bits_per_byte"] for r in self.records if "eval/bits_per_byte" in r]
        value = self.summary.get("heldout_bits_per_byte", measured[-1] if measured else None)
        return finite(value)

    def column(self, name: str) -> list[float]:
        """One metric over the records; NaN where a record lacks it."""
        return [float(record.get(name, math.nan)) for record in self.records]


def load_runs(run_dirs: Sequence[Path]) -> list[Run]:
    """Read the runs and give each a name of its own."""
    runs: list[Run] = []
    for run_dir in run_dirs:
        card = _read_json(run_dir / RUN_CARD_FILE)
        name = str(card.get("name", run_dir.resolve().name))
        if any(run.name == name for run in runs):
            name = f"{name} ({run_dir})"
        summary = _read_json(run_dir / SUMMARY_FILE)
        runs.append(Run(name, read_run(run_dir), read_events(run_dir), card, summary))
    return runs


def finite(value: float | None) -> float | None:
    """The value, or None where there is none or it is not finite."""
    return None if value is None or not math.isfinite(value) else value


def _read_json(path: Path) -> Json:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): mend it or delete it") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not an object: mend it or delete it")
    return value


def baselines_of(runs: list[Run]) -> dict[str, float]:
    """Name -> bits per byte of simpler models on the same held-out text, over all runs."""
    baselines: dict[str, float] = {}
    for run in runs:
        baselines |= run.summary.get("baselines_bits_per_byte", {})
    return {name: value for name, value in baselines.items() if finite(value) is not None}


def chip_html(run: Run, index: int) -> str:
    """The run's name as a button that hides and shows its curves."""
    button = f'<button class="chip" data-run="{index}" aria-pressed="true" {_colored(index)}>'
    return f"{button}<i></i>{html.escape(run.name)}</button>"


def _colored(index: int) -> str:
    """The attribute that gives an element the colour of a run."""
    return f'style="--run:var(--run-{index % NUM_COLORS})"'


def card_html(run: Run, index: int) -> str:
    """The run's card: who it is, on what it ran, and every other field of its run card folded away."""
    facts = [(label, text) for label, text in _facts(run) if text]
    rows = "".join(f"<dt>{html.escape(label)}</dt><dd>{html.escape(text)}</dd>" for label, text in facts)
    rest = "".join(
        f"<dt>{html.escape(key)}</dt><dd>{html.escape(str(value))}</dd>" for key, value in _flat(run.card).items()
    )
    precision = run.card.get("precision")
    badge = f'<span class="precision">{html.escape(str(precision))}</span>' if precision else ""
    more = f"<details><summary>Whole run card</summary><dl>{rest}</dl></details>" if rest else ""
    return (
        f'<article class="card" {_colored(index)}><header><i></i><h2>{html.escape(run.name)}</h2>'
        f"{badge}</header><dl>{rows}</dl>{more}</article>"
    )


def _facts(run: Run) -> list[tuple[str, str]]:
    card = run.card
    tokens = amount(run.records[-1]["tokens_seen"]) if run.records else "no steps yet"
    if run.records and card.get("tokens_total"):
        tokens += f" of {amount(card['tokens_total'])}"
    versions = card.get("versions", {"torch": card["torch"]} if "torch" in card else {})
    sequence = card.get("sequence_length")
    return [
        ("Model", _model_size(card.get("parameters"))),
        ("Tokens", tokens),
        ("Sequence", f"{sequence} tokens" if sequence else ""),
        ("Device", str(card.get("device", ""))),
        ("Versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("Seed", str(card.get("seed", ""))),
    ]


def _model_size(parameters: Any) -> str:
    if isinstance(parameters, Mapping):
        parts = [f"{amount(parameters['total'])} parameters"] if "total" in parameters else []
        parts += [f"{amount(parameters[key])} {key}" for key in ("active", "mtp") if parameters.get(key)]
        return ", ".join(parts).replace(" mtp", " in MTP")
    return f"{amount(parameters)} parameters" if parameters else ""


def _flat(card: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in card.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def table_html(runs: list[Run]) -> str:
    """Final numbers; the best held-out result is bold, baselines follow below."""
    scores = [run.bits_per_byte for run in runs if run.bits_per_byte is not None]
    lines = []
    for index, run in enumerate(runs):
        cells = _final_numbers(run)
        if run.bits_per_byte is not None and run.bits_per_byte == min(scores) and len(scores) > 1:
            cells["Bits per byte"] = f"<b>{cells['Bits per byte']}</b>"
        name = f'<th scope="row" {_colored(index)}><i></i>{html.escape(run.name)}</th>'
        lines.append(f"<tr>{name}{''.join(f'<td>{cell}</td>' for cell in cells.values())}</tr>")
    labels = list(_final_numbers(runs[0]))
    for baseline, value in baselines_of(runs).items():
        row = "".join(f"<td>{value:.4f}</td>" if label == "Bits per byte" else "<td></td>" for label in labels)
        lines.append(f'<tr class="baseline"><th scope="row">{html.escape(baseline)}</th>{row}</tr>')
    head = "".join(f"<th>{label}</th>" for label in labels)
    return f"<table><thead><tr><th>Run</th>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _final_numbers(run: Run) -> dict[str, str]:
    """Label -> text of the last value, smoothed where the curve is."""

    def last(name: str, digits: int) -> str:
        values = [value for value in ema(run.column(name), SMOOTHING) if math.isfinite(value)]
        return f"{values[-1]:.{digits}f}" if values else "–"

    speeds = [speed for speed in run.column("speed/tokens_per_s") if math.isfinite(speed)]
    records = run.records
    seconds = records[-1]["time_unix_s"] - records[0]["time_unix_s"] if records else 0.0
    return {
        "Steps": f"{records[-1]['step']:,}" if records else "0",
        "Tokens": amount(records[-1]["tokens_seen"]) if records else "0",
        "Loss": last("loss/main", 4),
        "MTP loss": last("loss/mtp", 4),
        "Bits per byte": f"{run.bits_per_byte:.4f}" if run.bits_per_byte is not None else "–",
        "Median tokens/s": amount(statistics.median(speeds)) if speeds else "–",
        "MaxVio": last("moe/max_violation_ratio", 2),
        "Skipped": str(records[-1].get("guard/skipped_steps", "–")) if records else "–",
        "Time": str(timedelta(seconds=round(seconds))),
    }


def amount(value: float) -> str:
    """1234567 -> '1.23 M'."""
    for scale, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {letter}"
    return f"{value:.3g}"


def subtitle(runs: list[Run]) -> str:
    """How much the page shows, and when it was drawn."""
    tokens = sum(run.records[-1]["tokens_seen"] for run in runs if run.records)
    count = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    return f"{count} · {amount(tokens)} tokens · drawn {datetime.now():%Y-%m-%d %H:%M}"
