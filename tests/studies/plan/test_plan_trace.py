"""The trace of a plan: fields of the published trace event format, and every action of the timeline once."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.studies.plan.plan_documents import plan_document
from train.studies.plan.schema import KINDS
from train.studies.plan.trace import write_trace

RANKS, MICRO_BATCHES = 4, 12
# Of the trace event format: complete events and metadata events.
COMPLETE = {"ph", "name", "cat", "pid", "tid", "ts", "dur", "args"}
METADATA = {"ph", "name", "pid", "tid", "args"}
METADATA_ARGS = {"process_name": "name", "thread_name": "name", "thread_sort_index": "sort_index"}


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return plan_document(RANKS, MICRO_BATCHES)


@pytest.fixture(scope="module")
def trace(document: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out: Path = tmp_path_factory.mktemp("trace") / "new" / "trace.json"
    write_trace(document, out)
    made: dict[str, Any] = json.loads(out.read_text())
    return made


def test_every_event_has_the_fields_of_the_format(trace: dict[str, Any]):
    assert trace["displayTimeUnit"] in ("ms", "ns")
    for event in trace["traceEvents"]:
        assert event.keys() == {"X": COMPLETE, "M": METADATA}[event["ph"]]
        assert (event["pid"], type(event["tid"])) == (0, int)
        if event["ph"] == "M":
            assert list(event["args"]) == [METADATA_ARGS[event["name"]]]
        else:
            assert event["ts"] >= 0
            assert event["dur"] > 0


def test_every_action_is_there_once_at_its_time(trace: dict[str, Any], document: dict[str, Any]):
    expected = {
        (rank, lane, KINDS[kind], stage, micro_batch): (1e6 * start_s, 1e6 * (end_s - start_s), len(actions) > 1)
        for rank, spans in enumerate(document["timeline"]["ranks"])
        for start_s, end_s, actions in spans
        for lane, (kind, stage, micro_batch) in enumerate(actions)
    }
    assert len(expected) >= 2 * 2 * RANKS * MICRO_BATCHES
    found = {}
    for event in (event for event in trace["traceEvents"] if event["ph"] == "X"):
        args = event["args"]
        key = (*divmod(event["tid"], 2), args["kind"], args["stage"], args["micro_batch"])
        assert key not in found
        # Nanoseconds are kept.
        found[key] = (
            pytest.approx(event["ts"], abs=5.1e-4), pytest.approx(event["dur"], abs=5.1e-4), args["overlapped"],
        )  # fmt: skip
    assert expected == found


def test_a_thread_is_named_and_runs_one_action_at_a_time(trace: dict[str, Any]):
    names = {event["tid"]: event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "thread_name"}
    assert names == {
        2 * rank + lane: f"pipeline rank {rank}" + (", paired" if lane else "")
        for rank in range(RANKS)
        for lane in (0, 1)
    }
    threads = defaultdict(list)
    for event in (event for event in trace["traceEvents"] if event["ph"] == "X"):
        threads[event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    assert threads.keys() == names.keys()
    for spans in threads.values():
        # Two roundings to nanoseconds.
        assert all(end <= start + 2e-3 for (_, end), (start, _) in pairwise(spans))
