"""The page of a plan: one self-contained HTML file that opens offline, in the dashboard's look.

    plan_page.html, plan_page.css   the frame
    plan_timeline.js                one step on a canvas: a window of it, and the whole as an overview
    plan_page.js                    headline, words, charts and tables
    charts/offline.py               what every page of charts shares

The timeline reaches the page in whole microseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.data.whole_file import write_whole
from train.studies.charts.offline import self_contained
from train.studies.plan.schema import KINDS, check

SCRIPTS = ("plan_timeline.js", "plan_page.js")


def render(document: Mapping[str, Any], out: Path) -> None:
    """Write the page of a plan document.

    Raises:
        ValueError: it is no whole plan document.
    """
    check(document)
    boxes = [[_box(*span) for span in spans] for spans in document["timeline"]["ranks"]]
    plan = dict(document) | {"timeline": {"step_s": document["timeline"]["step_s"], "ranks": boxes}}
    data = {"title": f"Plan of {document['name']}", "kinds": KINDS, "plan": plan}
    page = self_contained(
        _source("plan_page.html"), data, style=_source("plan_page.css"), scripts=[_source(name) for name in SCRIPTS]
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, page)


def _box(start_s: float, end_s: float, actions: list[Any]) -> list[Any]:
    """Start and length in whole microseconds, then kind, stage and micro-batch of each action."""
    start_us = round(1e6 * start_s)
    return [start_us, round(1e6 * end_s) - start_us, *(part for action in actions for part in action)]


def _source(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")
