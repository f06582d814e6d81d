"""A run is read once and from where the last look ended; torn lines, replaced files and odd records do no harm."""

from __future__ import annotations

import json
import math
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from tests.studies.dashboard.synthetic_runs import append, record, with_tables, write_run
from train.observe.metrics import Record, encode
from train.observe.sinks import read_run
from train.studies.compare import ema
from train.studies.dashboard import run_reader
from train.studies.dashboard.page import run_json, tables_json
from train.studies.dashboard.run_card import dead_experts, row, status
from train.studies.dashboard.run_reader import KEPT_EVENTS, RunReader, find_runs


def reader_of(run_dir: Path) -> RunReader:
    reader = RunReader(run_dir)
    reader.poll()
    return reader


def losses(reader: RunReader) -> list[float]:
    return reader.series["loss/main"].means.tolist()


def test_cut_at_any_byte_and_followed_it_gives_what_one_reading_gives(tmp_path: Path):
    lines = [record(1), {"event": "checkpoint", "step": 1}, record(2) | {"loss/main": math.nan}, record(3)]
    whole = reader_of(write_run(tmp_path / "whole", lines))
    text = whole.path.read_bytes()
    path = write_run(tmp_path / "cut", []) / "metrics.jsonl"
    for cut in range(0, len(text), 7):
        path.write_bytes(b"")
        reader = RunReader(path.parent)
        for end in (cut, len(text)):
            path.write_bytes(text[:end])
            reader.poll()
        np.testing.assert_array_equal(losses(reader), losses(whole))
        assert (reader.records, reader.offset) == (3, len(text))
        assert reader.events["checkpoint"].steps == [1]


def test_a_look_reads_only_what_was_appended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run_dir = write_run(tmp_path / "run", [record(step) for step in range(1, 500)])
    reader = reader_of(run_dir)
    taken: list[int] = []
    parse = run_reader._parse_lines
    monkeypatch.setattr(run_reader, "_parse_lines", lambda data: taken.append(len(data)) or parse(data))
    assert not reader.poll()
    assert sum(taken) == 0
    append(run_dir, [record(500)])
    assert reader.poll()
    assert sum(taken) == len(encode(record(500))) + 1
    assert reader.last_step == 500


def test_a_torn_line_in_the_middle_costs_that_line_only(tmp_path: Path):
    run_dir = write_run(tmp_path / "run", [record(1)])
    append(run_dir, [], torn=encode(record(2))[:-40] + "\n")
    append(run_dir, [record(3), record(4)])
    reader = reader_of(run_dir)
    assert reader.series["loss/main"].buckets["key"].tolist() == [1, 3, 4]
    assert [r["step"] for r in read_run(run_dir)] == [1, 3, 4]


def test_small_chunks_and_lines_longer_than_a_chunk_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lines = [record(step) for step in range(1, 100)]
    whole = reader_of(write_run(tmp_path / "whole", lines))
    monkeypatch.setattr(run_reader, "_CHUNK_BYTES", 700)
    reader = RunReader(write_run(tmp_path / "chunks", lines))
    looks = 0
    while reader.poll(max_bytes=1000):
        looks += 1
    assert looks > 20
    assert losses(reader) == losses(whole)


def test_a_replaced_or_shortened_file_is_read_from_its_start(tmp_path: Path):
    run_dir = write_run(tmp_path / "run", [record(step) for step in range(1, 30)])
    reader = reader_of(run_dir)
    (run_dir / "metrics.jsonl").write_text(encode(record(1, factor=2.0)) + "\n")
    assert reader.poll()
    assert losses(reader) == [record(1, factor=2.0)["loss/main"]]
    other = write_run(tmp_path / "other", [record(step, factor=3.0) for step in range(1, 50)])
    (other / "metrics.jsonl").replace(run_dir / "metrics.jsonl")
    reader.poll()
    assert losses(reader)[0] == record(1, factor=3.0)["loss/main"]
    assert reader.records == 49


def test_a_run_with_records_has_the_card_that_was_written_before_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run_dir = write_run(tmp_path / "run", [])
    read_cards = RunReader.read_cards

    def and_then_the_run_starts(reader: RunReader) -> bool:
        changed = read_cards(reader)
        monkeypatch.undo()
        (run_dir / "run_card.json").write_text('{"name": "tiny"}')
        append(run_dir, [record(1)])
        return changed

    monkeypatch.setattr(RunReader, "read_cards", and_then_the_run_starts)
    reader = reader_of(run_dir)
    assert reader.card or not reader.records
    reader.poll()
    assert (reader.records, reader.card) == (1, {"name": "tiny"})


def test_a_card_that_could_not_be_opened_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run_dir = write_run(tmp_path / "run", [record(1)], name="tiny")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", Mock(side_effect=OSError("the disk is away")))
        reader = reader_of(run_dir)
        assert reader.problems == {"run_card.json": "the disk is away"}
        assert not reader.poll()
    assert reader.poll()
    assert (reader.problems, reader.card) == ({}, {"name": "tiny"})


def test_odd_records_are_left_out(tmp_path: Path):
    odd = [
        {"step": "2", "tokens_seen": 1, "time_unix_s": 1.0},
        {"step": 3},
        {"step": -4, "tokens_seen": 1, "time_unix_s": 1.0},
        {"event": "skip", "step": None},
        [1, 2],
        record(1) | {"loss/main": 7.0},
        record(5) | {"loss/main": "low", "x": {"y": 1}, "moe/expert_load": "none"},
    ]
    reader = reader_of(write_run(tmp_path / "run", [record(1), record(2), *odd]))
    assert reader.series["loss/main"].buckets["key"].tolist() == [1, 2, 5]
    assert math.isnan(losses(reader)[2])
    assert losses(reader)[0] == record(1)["loss/main"], "a step that comes again is not taken again"
    assert "x" not in reader.series
    assert reader.events == {}


HUGE = 10**400
ODD_NUMBERS = {
    "a step": {"step": HUGE, "tokens_seen": 1, "time_unix_s": 1.0},
    "tokens": {"step": 9, "tokens_seen": HUGE, "time_unix_s": 1.0},
    "a time": {"step": 9, "tokens_seen": 1, "time_unix_s": HUGE},
    "a year beyond dates": record(9) | {"time_unix_s": 1e18},
    "a time before time": record(9) | {"time_unix_s": -1.0},
    "an event": {"event": "skip", "step": HUGE},
    "a metric": record(9) | {"loss/main": HUGE, "grad/norm": 1e300, "moe/dead_experts": HUGE},
    "a table": with_tables(record(9)) | {"moe/expert_load": [[HUGE, 1.0]], "fp8/amax": [[1e300]]},
}


@pytest.mark.parametrize("line", ODD_NUMBERS.values(), ids=ODD_NUMBERS.keys())
def test_numbers_beyond_every_type_cost_their_value_or_line_only(tmp_path: Path, line: dict[str, object]):
    good = [record(1), record(2), record(10)]
    run_dir = write_run(tmp_path / "run", [*good[:2], line, good[2]], tokens_total=HUGE, parameters=HUGE)
    reader = reader_of(run_dir)
    assert not reader.problems
    assert (reader.last_step, reader.records) in ((10, 3), (10, 4))
    run = run_json(reader, key=0, name="odd", limit=64, now_unix_s=2000.0)
    assert "Infinity" not in json.dumps([run, tables_json(reader, 64)], allow_nan=False)
    means = dict(zip(reader.series["loss/main"].buckets["key"].tolist(), losses(reader), strict=True))
    assert [means[step] for step in (1, 2, 10)] == [one["loss/main"] for one in good]


def test_of_many_events_the_first_and_the_last_stay_and_all_are_counted(tmp_path: Path):
    count = 3 * KEPT_EVENTS
    lines = [line for step in range(1, count + 1) for line in (record(step), {"event": "skip", "step": step})]
    log = reader_of(write_run(tmp_path / "run", lines)).events["skip"]
    assert log.total == count
    assert log.steps == [*range(1, KEPT_EVENTS + 1), *range(count - KEPT_EVENTS + 1, count + 1)]


def test_the_row_has_the_smoothed_last_values(tmp_path: Path):
    lines = [record(step) for step in range(1, 2001)]
    cells = dict(row(reader_of(write_run(tmp_path / "run", lines))))
    assert cells["Loss"] == f"{ema([line['loss/main'] for line in lines], 0.9)[-1]:.4f}"
    assert cells["Median tokens/s"] == "2 k"
    assert (cells["Steps"], cells["MFU"], cells["Skipped"], cells["Time"]) == ("2,000", "25.0 %", "0", "1:39:57")


def test_the_eta_is_the_tokens_left_over_the_recent_speed(tmp_path: Path):
    slow = [record(step) | {"time_unix_s": 100.0 * step} for step in range(1, 51)]
    pause = {"event": "resume", "step": 50}
    fast = [record(step) | {"time_unix_s": 1e6 + 2.0 * step} for step in range(51, 81)]
    reader = reader_of(write_run(tmp_path / "run", [*slow, pause, *fast], tokens_total=512 * 100))
    state = status(reader, now_unix_s=1e6 + 2.0 * 80 + 5.0)
    # Twenty steps of two seconds; neither the slow process nor the pause counts.
    assert (state["state"], state["eta_s"], state["progress"]) == ("running", pytest.approx(40.0), 0.8)
    assert state["tokens_per_s"] == pytest.approx(256.0)


def timed(step: int, at_s: float) -> Record:
    # 512 tokens of a step at 256 tokens/s are two seconds.
    return record(step) | {"time_unix_s": at_s, "speed/tokens_per_s": 256.0}


# What happens between step 3, at 106 s, and step 4, at 90,000 s.
PAUSES: dict[str, list[Record]] = {
    "stopped overnight": [{"event": "stop", "step": 3, "reason": "signal"}, {"event": "resume", "step": 3}],
    "killed, two steps repeated": [{"event": "resume", "step": 1, "time_unix_s": 89990.0}],
    "asleep, without an event": [],
}


@pytest.mark.parametrize("between", PAUSES.values(), ids=PAUSES.keys())
@pytest.mark.parametrize("chunk_bytes", [600, 1 << 20])
def test_a_pause_is_no_time_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, between: list[Record], chunk_bytes: int
) -> None:
    monkeypatch.setattr(run_reader, "_CHUNK_BYTES", chunk_bytes)
    lines = [*(timed(step, 100.0 + 2 * step) for step in (1, 2, 3)), *between]
    reader = reader_of(write_run(tmp_path / "run", [*lines, timed(4, 90000.0), timed(5, 90003.0)]))
    assert reader.series["time/trained_s"].means.tolist() == [0.0, 2.0, 4.0, 6.0, 9.0]
    assert dict(row(reader))["Time"] == "0:00:09"
    assert "time/trained_s" not in run_json(reader, key=0, name="run", limit=64, now_unix_s=0.0)["series"]


def test_a_slow_run_is_not_asleep(tmp_path: Path) -> None:
    lines = [record(step) | {"time_unix_s": 300.0 * step, "speed/tokens_per_s": 512 / 300} for step in range(1, 6)]
    reader = reader_of(write_run(tmp_path / "run", [*lines, lines[-1] | {"step": 6, "time_unix_s": 4300.0}]))
    # Nine steps long is no pause, and a step of five minutes is a step.
    assert reader.series["time/trained_s"].means.tolist() == pytest.approx([0, 300, 600, 900, 1200, 4000])


@pytest.mark.parametrize("kind", ["spike", "skip", "dead_experts", "evaluation"])
def test_an_event_that_a_resumed_run_repeats_is_counted_once(tmp_path: Path, kind: str) -> None:
    def at(*steps: int) -> list[Record]:
        return [{"event": kind, "step": step} for step in steps]

    resume, rollback = ({"event": event, "step": 5} for event in ("resume", "rollback"))
    lines = [*map(record, range(1, 9)), *at(3, 7, 8), resume, *at(7, 8), resume, *at(7, 8, 9), record(9)]
    once = write_run(tmp_path / "once", lines)
    assert reader_of(once).events[kind].steps == [3, 7, 8, 9]
    assert reader_of(once).events["resume"].total == 2
    # After a rollback the steps have other data, so these are other events.
    again = reader_of(write_run(tmp_path / "again", [*lines, rollback, *at(7), resume, *at(7), record(6)]))
    assert (again.events[kind].total, again.events[kind].steps[-1]) == (5, 7)


STOP = {"event": "stop", "step": 3, "reason": "signal"}
# Lines after three steps, token budget, seconds since the last record, state, whether there is an ETA.
STATES: list[tuple[list[Record], int, int, str, bool]] = [
    ([], 10_000, 100, "running", True),
    ([], 10_000, 1000, "silent", False),
    ([STOP], 10_000, 1000, "stopped", False),
    # Before the first new record there is no speed.
    ([STOP, {"event": "resume", "step": 3}], 10_000, 13, "running", False),
    ([STOP, record(4)], 10_000, 13, "running", True),
    ([], 512 * 3, 1000, "finished", False),
]


@pytest.mark.parametrize(("lines", "tokens_total", "age_s", "state", "eta"), STATES)
def test_the_state_of_a_run_is_told(
    tmp_path: Path, lines: list[Record], tokens_total: int, age_s: int, state: str, eta: bool
) -> None:
    run_dir = write_run(tmp_path / "run", [*map(record, (1, 2, 3))], tokens_total=tokens_total)
    reader = reader_of(run_dir)
    for line in lines:
        append(run_dir, [line])
        reader.poll()
    found = status(reader, 1009.0 + age_s)
    assert (found["state"], found["reason"]) == (state, "signal" if state == "stopped" else None)
    assert (found["eta_s"] is not None) == eta


def alarm(run_dir: Path, **expected: object) -> bool:
    """Whether the verdict on a run's dead experts is the expected one, in the keys that are named."""
    verdict = dead_experts(reader_of(run_dir))
    assert {name: verdict[name] for name in expected} == expected
    return True


@pytest.mark.parametrize("chunk_bytes", [3_000, 1 << 20])
def test_an_expert_without_tokens_for_long_is_an_alarm_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
):
    monkeypatch.setattr(run_reader, "_CHUNK_BYTES", chunk_bytes)
    run_dir = write_run(tmp_path / "run", [with_tables(record(step), dead=step > 20) for step in range(1, 81)])
    assert alarm(run_dir, level="alarm", count=1, since=21, streak=60, pairs=[[1, 2]])


def test_experts_that_are_idle_in_turn_are_no_alarm(tmp_path: Path):
    def load(step: int) -> list[list[float]]:
        return [[0.0 if expert == step % 4 else 4 / 3 for expert in range(4)]]

    lines = [record(step) | {"moe/expert_load": load(step), "moe/dead_experts": 1} for step in range(1, 101)]
    assert alarm(write_run(tmp_path / "run", lines), level="idle", streak=1, pairs=[[0, 0]])


def test_the_patience_is_the_trainers_and_its_event_is_remembered(tmp_path: Path):
    lines = [with_tables(record(step), dead=step > 20) for step in range(1, 31)]
    run_dir = write_run(tmp_path / "run", lines)
    (run_dir / "config.yaml").write_text("observe:\n  dead_expert_steps: 7\n")
    assert alarm(run_dir, level="alarm", steps=7)
    back = [{"event": "dead_experts", "step": 27}, *(record(step) for step in range(31, 40))]
    assert alarm(write_run(tmp_path / "back", [*lines, *back]), level="past", last=30)
    assert dead_experts(reader_of(write_run(tmp_path / "well", [record(1)]))) is None


def test_a_patience_of_zero_is_never_an_alarm(tmp_path: Path):
    run_dir = write_run(tmp_path / "run", [with_tables(record(step), dead=True) for step in range(1, 200)])
    (run_dir / "config.yaml").write_text("observe:\n  dead_expert_steps: 0\n")
    assert alarm(run_dir, level="idle", steps=0, streak=199)


def test_runs_below_a_folder_are_found_in_order_and_once(tmp_path: Path):
    for name in ("b", "a", "sweep/one", ".hidden/x"):
        write_run(tmp_path / "runs" / name, [record(1)])
    write_run(tmp_path / "runs" / "a" / "inner", [record(1)])
    (tmp_path / "runs" / "empty").mkdir()
    found = find_runs([tmp_path / "runs" / "b", tmp_path / "runs"])
    assert [path.relative_to(tmp_path / "runs").as_posix() for path in found] == ["b", "a", "sweep/one"]


@pytest.mark.parametrize("max_bytes", [None, 1])
def test_what_a_rollback_made_void_leaves_the_curves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_bytes: int | None
):
    """Followed or read at once: the records that `read_run` gives, after one and after two rollbacks."""
    monkeypatch.setattr(run_reader, "_CHUNK_BYTES", 2048)

    def back_to(step: int) -> Record:
        return {"event": "rollback", "step": step, "left_at_step": 9, "dropped_positions": []}

    def score(step: int, value: float) -> Record:
        return {"event": "evaluation", "step": step, "eval/bits_per_byte": value}

    first = [*(record(step) for step in range(1, 9)), score(8, 9.0)]
    second = [back_to(5), *(record(step) | {"loss/main": 2.0} for step in (6, 7)), score(7, 1.0)]
    third = [back_to(3), *(record(step) | {"loss/main": 3.0} for step in (4, 5, 6)), score(6, 2.0)]
    run_dir = write_run(tmp_path / "run", first)
    followed = RunReader(run_dir)
    for more in ([], second, third):
        append(run_dir, more)
        while followed.poll(max_bytes):
            pass
        for reader in (followed, reader_of(run_dir)):
            assert losses(reader) == [each["loss/main"] for each in read_run(run_dir)]
            assert reader.records == reader.last_step == len(losses(reader))
            assert reader.series["eval/bits_per_byte"].means.tolist() == [
                each["eval/bits_per_byte"] for each in read_run(run_dir) if "eval/bits_per_byte" in each
            ]
    assert losses(followed)[2:] == [record(3)["loss/main"], 3.0, 3.0, 3.0]
    assert followed.events["rollback"].steps == [5, 3]
