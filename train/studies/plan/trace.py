"""The timeline of a plan in the trace event format, for ui.perfetto.dev and chrome://tracing.

One process, one thread a pipeline rank and lane: an overlapped pair has its forward on the first lane and its backward
on the second. Complete events (ph "X") in microseconds; names and order of threads are metadata events (ph "M").
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from train.data.whole_file import write_whole
from train.studies.plan.schema import KINDS, check

_LANES = 2


def write_trace(document: Mapping[str, Any], out: Path) -> None:
    """Write the timeline of a plan document.

    Raises:
        ValueError: it is no whole plan document.
    """
    check(document)
    events = [*_names(document), *_actions(document["timeline"]["ranks"])]
    trace = {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"plan": document["name"]}}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, json.dumps(trace, separators=(",", ":"), allow_nan=False))


def _names(document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    def named(kind: str, tid: int, **args: Any) -> dict[str, Any]:
        return {"ph": "M", "name": kind, "pid": 0, "tid": tid, "args": args}

    yield named("process_name", 0, name=f"{document['name']}: {document['candidate']['schedule']}, as modelled")
    for rank, spans in enumerate(document["timeline"]["ranks"]):
        for lane in range(max((len(actions) for _, _, actions in spans), default=1)):
            tid = _LANES * rank + lane
            yield named("thread_name", tid, name=f"pipeline rank {rank}" + (", paired" if lane else ""))
            yield named("thread_sort_index", tid, sort_index=tid)


def _actions(ranks: list[Any]) -> Iterator[dict[str, Any]]:
    for rank, spans in enumerate(ranks):
        for start_s, end_s, actions in spans:
            for lane, (kind, stage, micro_batch) in enumerate(actions):
                args = {"kind": KINDS[kind], "stage": stage, "micro_batch": micro_batch, "overlapped": len(actions) > 1}
                yield {
                    "ph": "X", "name": f"{kind} {micro_batch}", "cat": kind, "pid": 0, "tid": _LANES * rank + lane,
                    "ts": round(1e6 * start_s, 3), "dur": round(1e6 * (end_s - start_s), 3), "args": args,
                }  # fmt: skip
