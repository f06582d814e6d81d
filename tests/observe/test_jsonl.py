"""metrics.jsonl stays true through kill -9, torn lines and resumes that repeat steps."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from train.observe import sinks
from train.observe.config import ObserveConfig
from train.observe.metrics import Record
from train.observe.sinks import JsonlSink, Sinks, open_sinks, read_events, read_run

REPOSITORY = Path(__file__).resolve().parents[2]

# A "training run" whose numbers are a pure function of the step, with a checkpoint every 16 steps.
# Its records are large (a table of 64 x 64 doubles, some 80 kB), so that SIGKILL does cut lines short.
WORKER = """
import math, sys
from pathlib import Path
from train.observe.sinks import JsonlSink, read_run
run_dir = Path(sys.argv[1])
sink = JsonlSink(run_dir / "metrics.jsonl")
checkpoint = max(sink.last_step, 0) // 16 * 16
sink.event({"event": "resume" if checkpoint else "start", "step": checkpoint})
step = checkpoint
while True:
    step += 1
    table = [[(step + i) / 7 for i in range(64)]] * 64
    appended = sink.write({"step": step, "tokens_seen": 7 * step, "time_unix_s": 0.5, "loss/main": 1 / step,
                            "grad/norm": math.sqrt(step), "moe/expert_load": table})
    if appended:
        print(step, flush=True)
    if step % 16 == 0:
        sink.event({"event": "checkpoint", "step": step})
    if sink.replays_differing:
        raise SystemExit("a replayed step differed")
"""


def record(step: int, **values: float) -> Record:
    base = {"step": step, "tokens_seen": 7 * step, "time_unix_s": float(step), "loss/main": 1 / step, "optim/lr": 1e-3}
    return base | values


def logged(run_dir: Path, *records: Record) -> JsonlSink:
    """A sink that has taken these records, and is closed."""
    sink = JsonlSink(run_dir / "metrics.jsonl")
    for one in records:
        sink.write(one)
    sink.close()
    return sink


def ten_steps(run_dir: Path) -> Path:
    logged(run_dir, *map(record, range(1, 11)))
    return run_dir / "metrics.jsonl"


def steps_in(run_dir: Path) -> list[int]:
    return [one["step"] for one in read_run(run_dir)]


def test_kill_minus_nine_at_any_moment_leaves_every_step_exactly_once(tmp_path: Path):
    moments = random.Random(9)
    torn, survivors = 0, 0
    for _ in range(10):
        command = [sys.executable, "-c", WORKER, str(tmp_path)]
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=REPOSITORY, text=True)
        # Wait for a few new steps, then strike at a random moment of the next one.
        new_steps = [worker.stdout.readline() for _ in range(moments.randint(1, 12))]
        time.sleep(moments.uniform(0.0, 0.008))
        worker.kill()
        worker.communicate()
        assert worker.returncode == -9
        torn += not (tmp_path / "metrics.jsonl").read_bytes().endswith(b"\n")
        records = read_run(tmp_path)
        steps = [r["step"] for r in records]
        assert steps == list(range(1, len(steps) + 1))
        assert all(r["loss/main"] == 1 / r["step"] and r["grad/norm"] == math.sqrt(r["step"]) for r in records)
        # What the worker had reported as written is there, and so is all that was there before.
        assert len(steps) >= max(int(new_steps[-1]), survivors + len(new_steps))
        survivors = len(steps)
    kinds = [event["event"] for event in read_events(tmp_path)]
    assert survivors > 16
    assert "resume" in kinds
    assert "replay_differs" not in kinds
    print(f"{survivors} steps over 10 kills, {torn} of them left a torn line")


def test_a_line_torn_at_any_byte_is_ignored_and_finished(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    logged(tmp_path, *map(record, (1, 2, 3)))
    whole = path.read_bytes()
    for cut in range(whole[:-1].rindex(b"\n") + 2, len(whole)):
        path.write_bytes(whole[:cut])
        # Cut at the newline alone, the record is complete; cut anywhere before, it is gone.
        expected = [1, 2, 3] if cut == len(whole) - 1 else [1, 2]
        assert steps_in(tmp_path) == expected
        assert logged(tmp_path, record(3), record(4)).replays_equal == len(expected) - 2
        assert steps_in(tmp_path) == [1, 2, 3, 4]
        assert path.read_bytes().startswith(whole[:cut] + b"\n")


def test_an_equal_replay_writes_nothing(tmp_path: Path):
    path = ten_steps(tmp_path)
    before = path.read_bytes()
    sink = JsonlSink(path)
    # The wall clock of a replay is another one; it is not part of the promise.
    assert [sink.write(record(step, time_unix_s=99.0)) for step in range(6, 13)] == [False] * 5 + [True] * 2
    assert (sink.replays_equal, sink.replays_differing) == (5, 0)
    sink.close()
    assert path.read_bytes().startswith(before)
    assert path.read_bytes().count(b"\n") == before.count(b"\n") + 2


def test_a_replay_that_differs_by_one_bit_is_told_once_and_never_a_second_record(tmp_path: Path):
    ten_steps(tmp_path)
    nudged = math.nextafter(1 / 7, 1)
    sink = logged(tmp_path, record(6), record(7, **{"loss/main": nudged}), *map(record, (8, 9, 10)))
    assert (sink.replays_equal, sink.replays_differing) == (4, 1)
    assert steps_in(tmp_path) == list(range(1, 11))
    assert read_run(tmp_path)[6]["loss/main"] == 1 / 7
    (event,) = read_events(tmp_path)
    assert (event["event"], event["step"]) == ("replay_differs", 7)
    assert (event["logged"]["loss/main"], event["replayed"]["loss/main"]) == (1 / 7, nudged)


REPLAYED = ["tokens_seen", "loss/main", "loss/mtp", "loss/balance", "loss/total", "grad/norm", "optim/lr"]


@pytest.mark.parametrize("name", REPLAYED)
def test_each_promised_field_is_compared(tmp_path: Path, name: str):
    logged(tmp_path, record(1), record(2, **{name: 123455}))
    assert logged(tmp_path, record(2, **{name: 123456})).replays_differing == 1


def test_a_skipped_step_replays_as_equal(tmp_path: Path):
    skipped = record(1, **{"loss/main": math.nan})
    logged(tmp_path, skipped)
    again = logged(tmp_path, skipped)
    assert (again.replays_equal, again.replays_differing) == (1, 0)


class FullDisk:
    """Stands in for `os.write`: takes `room` more bytes, a line in part if need be, then none."""

    def __init__(self, room: int) -> None:
        self.room, self._write = room, os.write

    def __call__(self, file: int, data: bytes) -> int:
        if self.room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = self._write(file, data[: self.room])
        self.room -= written
        return written


def test_records_wait_for_room_on_a_full_disk_and_none_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk = FullDisk(room=150)
    monkeypatch.setattr(os, "write", disk)
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    for step in range(1, 6):
        sink.write(record(step))
    sink.event({"event": "save_failed", "step": 5, "error": "no room"})
    assert caplog.text.count("cannot be written") == 1
    assert [line["step"] for line in read_run(tmp_path)] == [1], "the second is torn"
    disk.room = 10**6
    sink.write(record(6))
    sink.close()
    assert read_run(tmp_path) == [record(step) for step in range(1, 7)]
    assert [event["event"] for event in read_events(tmp_path)] == ["save_failed"]


def test_beyond_the_buffer_lines_are_dropped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk = FullDisk(room=0)
    monkeypatch.setattr(os, "write", disk)
    monkeypatch.setattr(sinks, "BUFFER_BYTES", 250)
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    for step in range(1, 8):
        sink.write(record(step))
    disk.room = 10**6
    sink.write(record(8))
    kept = [line["step"] for line in read_run(tmp_path)]
    (event,) = read_events(tmp_path)
    assert kept[:2] == [1, 2]
    assert event == {"event": "records_dropped", "step": 8, "lines": 8 - len(kept)}
    disk.room = 0
    sink.write(record(9))
    sink.close()
    assert "lacks its last 1 lines" in caplog.text


def test_an_evaluation_belongs_to_its_step_and_is_logged_once(tmp_path: Path) -> None:
    for _ in range(2):
        jsonl = JsonlSink(tmp_path / "metrics.jsonl")
        with Sinks(jsonl, console=None, wandb=None) as both:
            both.write(record(1))
            both.event("evaluation", step=1, **{"eval/bits_per_byte": 1.5})
            assert not both.lacks_evaluation(1)
            assert both.lacks_evaluation(2)
    assert [event["event"] for event in read_events(tmp_path)] == ["evaluation"]
    assert read_run(tmp_path) == [record(1) | {"eval/bits_per_byte": 1.5}]
    with Sinks(JsonlSink(tmp_path / "metrics.jsonl"), console=None, wandb=None) as both:
        both.event("evaluation", step=1, **{"eval/bits_per_byte": 1.25})
    assert read_events(tmp_path)[-1]["event"] == "replay_differs"


@pytest.mark.parametrize("step", [3, 2])
def test_steps_increase_within_a_process(tmp_path: Path, step: int):
    with pytest.raises(AssertionError, match="steps must increase"):
        logged(tmp_path, *map(record, (1, 2, 3, step)))


def test_a_second_process_on_the_same_run_is_refused(tmp_path: Path):
    first = JsonlSink(tmp_path / "metrics.jsonl")
    first.write(record(1))
    logged(tmp_path, record(2))
    with pytest.raises(ValueError, match="another process uses the same run directory"):
        first.write(record(2))
    first.close()
    assert steps_in(tmp_path) == [1, 2]


def test_sinks_keep_events_apart_from_records_and_write_the_run_card(tmp_path: Path):
    config = ObserveConfig(progress=False, console_every_steps=100, wandb="off", wandb_project="test")
    run_dir = tmp_path / "new" / "run"
    card = {"name": "tiny_bf16", "tokens_total": 70}
    with open_sinks(config, run_dir, card) as sinks:
        sinks.event("start", step=0)
        assert sinks.write(record(1))
        sinks.event("checkpoint", step=1, path="checkpoints/step_00000001")
    with open_sinks(config, run_dir, card) as sinks:
        sinks.event("resume", step=0)
        assert not sinks.write(record(1))
        assert sinks.write(record(2))
    assert steps_in(run_dir) == [1, 2]
    assert [e["event"] for e in read_events(run_dir)] == ["start", "checkpoint", "resume"]
    assert read_events(run_dir)[1]["path"] == "checkpoints/step_00000001"
    assert json.loads((run_dir / "run_card.json").read_text())["name"] == "tiny_bf16"


def test_the_run_card_is_written_before_the_file_by_which_a_run_is_found(tmp_path: Path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(IsADirectoryError):
        open_sinks(ObserveConfig(wandb="off"), tmp_path, {"name": "tiny"})
    assert json.loads((tmp_path / "run_card.json").read_text())["name"] == "tiny"


class Listener:
    """A mirror that remembers."""

    def __init__(self) -> None:
        self.seen: list[int | str] = []

    def write(self, record: Record) -> None:
        self.seen.append(record["step"])

    def event(self, event: Record) -> None:
        self.seen.append(event["event"])

    def close(self) -> None:
        self.seen.append("closed")


def test_the_console_follows_a_replay_but_wandb_sees_each_step_once(tmp_path: Path):
    logged(tmp_path, *map(record, range(1, 6)))
    console, wandb = Listener(), Listener()
    with Sinks(JsonlSink(tmp_path / "metrics.jsonl"), console=console, wandb=wandb) as sinks:
        sinks.event("resume", step=3)
        for step in range(4, 8):
            sinks.write(record(step))
    assert console.seen == ["resume", 4, 5, 6, 7, "closed"]
    assert wandb.seen == ["resume", 6, 7, "closed"]


def test_an_undeclared_event_is_an_assertion_error(tmp_path: Path):
    with pytest.raises(AssertionError, match="party"):
        JsonlSink(tmp_path / "metrics.jsonl").event({"event": "party", "step": 1})


def test_reading_a_directory_without_metrics_says_what_to_do(tmp_path: Path):
    with pytest.raises(ValueError, match=r"has no metrics\.jsonl: give the directory of a run"):
        read_run(tmp_path)


@pytest.mark.parametrize(("field", "value"), [("console_every_steps", 0), ("wandb", "onlin")])
def test_a_bad_observe_config_names_field_and_value(field: str, value: object):
    with pytest.raises(ValueError, match=rf"{field} is .*{value}"):
        ObserveConfig(**{field: value})


def test_a_rollback_makes_the_later_records_before_it_void(tmp_path: Path):
    """Of a run that goes back twice, and of the process that takes it up, each step counts once: its last attempt."""
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)

    def attempt(steps: range, loss: float) -> None:
        assert all(sink.write(record(step, **{"loss/main": loss})) for step in steps)
        sink.event({"event": "evaluation", "step": steps[-1], "eval/bits_per_byte": loss})

    def losses_then(back_to: int) -> list[float]:
        sink.event({"event": "rollback", "step": back_to})
        return [one["loss/main"] for one in read_run(tmp_path)]

    attempt(range(1, 9), 9.0)
    assert losses_then(back_to=5) == [9.0] * 5
    assert (sink.last_step, sink.evaluated) == (5, {})
    attempt(range(6, 8), 1.0)
    assert losses_then(back_to=3) == [9.0] * 3
    attempt(range(4, 11), 2.0)
    sink.close()
    assert [(one["step"], one["loss/main"]) for one in read_run(tmp_path)] == [
        (step, 9.0 if step <= 3 else 2.0) for step in range(1, 11)
    ]
    assert [one["eval/bits_per_byte"] for one in read_run(tmp_path) if "eval/bits_per_byte" in one] == [2.0]
    again = JsonlSink(path)
    assert (again.last_step, again.evaluated) == (10, {10: 2.0})
    assert [again.write(record(step, **{"loss/main": 2.0})) for step in (9, 10, 11)] == [False, False, True]
    assert (again.replays_equal, again.replays_differing) == (2, 0)
    again.close()


def test_wandb_gets_no_step_of_a_rollback_twice(tmp_path: Path):
    class Mirror:
        def __init__(self) -> None:
            self.steps: list[int] = []

        def write(self, one: Record) -> None:
            self.steps.append(one["step"])

        def event(self, event: Record) -> None:
            pass

    mirror = Mirror()
    sinks_of_run = Sinks(JsonlSink(tmp_path / "metrics.jsonl"), console=None, wandb=mirror)
    for step in (1, 2, 3, None, 2, 3, 4):
        if step is None:
            sinks_of_run.event("rollback", step=1)
        else:
            assert sinks_of_run.write(record(step))
    sinks_of_run.jsonl.close()
    assert mirror.steps == [1, 2, 3, 4]
