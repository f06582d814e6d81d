"""Where a run's records go: one JSONL file that is the truth, mirrored to the console and to wandb.

    runs/<name>/metrics.jsonl    one line per optimizer step, and one per event (a line with the key "event")
    runs/<name>/run_card.json    name, precision, model, device (keys: `train/studies/dashboard/run_card.py`)
    runs/<name>/plan.json        what the run was expected to do, put there before its start; no run reads or writes it

Promises of the file:
- Append-only; a line goes out in one write. Killing the process (kill -9) loses at most the line being
  written, by cutting it short. The next process finishes a torn line with a newline; readers ignore it.
- Steps strictly increase. A resumed run repeats the steps between its checkpoint and the last logged step: their
  numbers are compared with the logged ones and not written again; a difference is logged as an event.
- A `rollback` to an earlier step makes the later records and evaluations before it void: their steps come again.
- What a full disk does not take is kept in memory and written as soon as there is room, up to BUFFER_BYTES; lines
  beyond that are dropped and counted. No record is a reason to end a run.
- Events reach the disk (fsync) before training goes on, step records when the kernel writes them back. A power cut
  may lose the steps after the last checkpoint event; the resumed run repeats and writes them. An fsync per step
  could cost more than a small model's step.

Rank 0 opens the sinks of a run.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from train.data.whole_file import write_whole
from train.observe.config import ObserveConfig
from train.observe.metrics import EVENTS, METRICS, Record, check_record, encode, same_bits

if TYPE_CHECKING:
    from train.observe.alerts import AlertSink
    from train.observe.console import ConsoleSink

METRICS_FILE = "metrics.jsonl"
_log = logging.getLogger(__name__)
BUFFER_BYTES = 16 * 2**20
RUN_CARD_FILE = "run_card.json"
PLAN_FILE = "plan.json"
# Keys of the run card that are found out while a run trains: whoever writes the card again keeps them.
FOUND_OUT = ("predicted_vs_measured",)
SCORE = "eval/bits_per_byte"
_REPLAYED = tuple(name for name, metric in METRICS.items() if metric.replayed)


class Sink(Protocol):
    """A mirror of the JSONL file; it never raises because of a terminal, a network or a server."""

    def write(self, record: Record) -> None:
        """Take one step record."""

    def event(self, event: Record) -> None:
        """Take one event."""

    def close(self) -> None:
        """Finish within a bounded time."""


class JsonlSink:
    """Appends to metrics.jsonl and proves that a resumed run repeats what is logged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        self._size = os.fstat(self._file).st_size
        # Lines that the disk has not taken, the first perhaps in part, and how many were dropped for want of memory.
        self._unwritten: deque[bytes] = deque()
        self._unwritten_bytes, self._dropped, self.is_full = 0, 0, False
        if self._size and os.pread(self._file, 1, self._size - 1) != b"\n":
            self._append("")
        lines = _valid(read_lines(path))
        self._logged = {line["step"]: _replayed_part(line) for line in lines if "event" not in line}
        self.evaluated = {line["step"]: line[SCORE] for line in lines if line.get("event") == "evaluation"}
        self.last_step: int = max(self._logged, default=-1)
        # Repeated steps that gave the logged bits; that did not, or that the file lacks.
        self.replays_equal, self.replays_differing = 0, 0
        self._previous_step = -1

    def write(self, record: Record) -> bool:
        """Append one step record, or compare it with the logged one; returns whether it was appended.

        Raises:
            ValueError: another process writes to the file.
        """
        check_record(record)
        step = record["step"]
        assert step > self._previous_step, f"step {step} after step {self._previous_step}: steps must increase"
        self._previous_step = step
        if step <= self.last_step:
            self._compare(step, _replayed_part(record))
            return False
        self._logged.clear()
        self.last_step = step
        self._append(encode(record))
        return True

    def event(self, event: Record) -> None:
        """Append one event and wait until it, and so every line before it, is on disk."""
        assert event["event"] in EVENTS, f"undeclared event {event['event']!r}: declare it in metrics.py"
        self._append(encode(event))
        self._sync()
        if event["event"] == "evaluation":
            self.evaluated[event["step"]] = event[SCORE]
        if event["event"] == "rollback":
            self.last_step = self._previous_step = event["step"]
            self._logged.clear()
            self.evaluated = {step: score for step, score in self.evaluated.items() if step <= event["step"]}

    def close(self) -> None:
        """Sync and close; calling it again does nothing."""
        if self._file >= 0:
            self._flush()
            self._sync()
            if lost := len(self._unwritten) + self._dropped:
                _log.warning("%s lacks its last %d lines: the disk did not take them", self.path, lost)
            os.close(self._file)
            self._file = -1

    def _sync(self) -> None:
        with suppress(OSError):
            os.fsync(self._file)

    def _compare(self, step: int, replayed: Record) -> None:
        logged = self._logged.pop(step, None)
        names = replayed.keys() | (logged or {}).keys()
        if logged is not None and all(same_bits(logged.get(name), replayed.get(name)) for name in names):
            self.replays_equal += 1
            return
        self.replays_differing += 1
        self.event({"event": "replay_differs", "step": step, "logged": logged, "replayed": replayed})

    def _append(self, line: str) -> None:
        grown = os.fstat(self._file).st_size - self._size
        if grown:
            raise ValueError(
                f"{self.path} changed by {grown} bytes that this process did not write: another process uses "
                f"the same run directory. Stop it, or give this run a name of its own."
            )
        if self._unwritten_bytes < BUFFER_BYTES:
            self._unwritten.append(line.encode() + b"\n")
            self._unwritten_bytes += len(self._unwritten[-1])
        else:
            self._dropped += 1
        self._flush()

    def _flush(self) -> None:
        """Write what waits, a line in one write; stop where the disk is full."""
        while self._unwritten:
            line, reason = self._unwritten.popleft(), "it took a part of a line"
            try:
                written = os.write(self._file, line)
            except OSError as error:
                written, reason = 0, str(error.strerror)
            self._size += written
            self._unwritten_bytes -= written
            if written < len(line):
                self._unwritten.appendleft(line[written:])
                if not self.is_full:
                    _log.warning("%s cannot be written (%s); records are kept in memory", self.path, reason)
                self.is_full = True
                return
        self.is_full = False
        if self._dropped:
            dropped, self._dropped = self._dropped, 0
            self._append(encode({"event": "records_dropped", "step": self.last_step, "lines": dropped}))


class Sinks:
    """The file and its mirrors; a context manager, which gives the terminal back."""

    def __init__(
        self, jsonl: JsonlSink, *, console: ConsoleSink | None, wandb: Sink | None, alerts: AlertSink | None = None
    ) -> None:
        self.jsonl = jsonl
        self._console, self._wandb, self._alerts = console, wandb, alerts
        self._mirrors: list[Sink] = [mirror for mirror in (console, wandb) if mirror]
        self._mirrored_step = jsonl.last_step

    def write(self, record: Record) -> bool:
        """Write one step record; returns False for a step repeated after a resume. wandb gets no step twice."""
        appended = self.jsonl.write(record)
        if self._console:
            self._console.write(record)
        if self._wandb and record["step"] > self._mirrored_step:
            self._mirrored_step = record["step"]
            self._wandb.write(record)
        if self._alerts:
            self._alerts.write(record)
        return appended

    def say(self, sentences: list[str]) -> None:
        """Show sentences on the console; they are in no file."""
        if self._console:
            self._console.say(sentences)

    def event(self, kind: str, *, step: int, **details: Any) -> None:
        """Log an event after `step` steps; `kind` is one of `metrics.EVENTS`."""
        self.events(kind, [details], step=step)

    def events(self, kind: str, each: Iterable[Mapping[str, Any]], *, step: int) -> None:
        """Log events of one kind, each by its details; together they are one alert."""
        logged = [event for details in each if (event := self._log(kind, step, details))]
        if self._alerts and logged:
            self._alerts.events(logged)

    def _log(self, kind: str, step: int, details: Mapping[str, Any]) -> Record | None:
        event = {"event": kind, "step": step, "time_unix_s": time.time(), **details}
        if kind == "evaluation" and not self.lacks_evaluation(step):
            # Scored again after a resume.
            logged, again = self.jsonl.evaluated[step], event[SCORE]
            if same_bits(logged, again):
                return None
            event |= {"event": "replay_differs", "logged": {SCORE: logged}, "replayed": {SCORE: again}}
        self.jsonl.event(event)
        for mirror in self._mirrors:
            mirror.event(event)
        return event

    def write_card(self, run_card: Mapping[str, Any]) -> None:
        """Write the run card again; where the disk is full the older one stays."""
        with suppress(OSError):
            _write_card(self.jsonl.path.parent, run_card)

    def lacks_evaluation(self, step: int) -> bool:
        """Whether the held-out score after a step is still to be logged."""
        return step not in self.jsonl.evaluated

    def close(self) -> None:
        """Close the file first, then the mirrors, each within a bounded time."""
        self.jsonl.close()
        for mirror in (*self._mirrors, self._alerts):
            if mirror:
                mirror.close()

    def __enter__(self) -> Sinks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class NoSinks:
    """The sinks of every rank but the first: they drop everything."""

    def write(self, record: Record) -> bool:
        """Drop a record."""
        return False

    def event(self, kind: str, *, step: int, **details: Any) -> None:
        """Drop an event."""
        assert kind in EVENTS, kind

    def events(self, kind: str, each: Iterable[Mapping[str, Any]], *, step: int) -> None:
        """Drop events."""
        assert kind in EVENTS, kind

    def write_card(self, run_card: Mapping[str, Any]) -> None:
        """Leave it to rank 0."""
        assert run_card

    def lacks_evaluation(self, step: int) -> bool:
        """Leave the answer to rank 0."""
        return False

    def __enter__(self) -> NoSinks:
        return self

    def __exit__(self, *_: object) -> None:
        return None


def open_sinks(
    config: ObserveConfig, run_dir: Path, run_card: Mapping[str, Any], run_config: Mapping[str, Any] | None = None
) -> Sinks:
    """Write the run card and open the run's sinks; appends when the run directory already has records.

    Args:
        config: which mirrors to open.
        run_dir: runs/<name>, made if missing.
        run_card: JSON-able; `tokens_total` gives the console its ETA.
        run_config: the run's whole configuration, for wandb.
    """
    # Here, so that a run can be read where rich is missing.
    from train.observe.alerts import AlertCommand, AlertSink
    from train.observe.console import ConsoleSink
    from train.observe.wandb_sink import WandbSink

    run_dir.mkdir(parents=True, exist_ok=True)
    # Before metrics.jsonl, by which a reader finds the run: it then finds its name too.
    _write_card(run_dir, run_card)
    jsonl = JsonlSink(run_dir / METRICS_FILE)

    console = ConsoleSink(
        progress=config.progress,
        every_steps=config.console_every_steps,
        total_tokens=run_card.get("tokens_total"),
        name=str(run_card.get("name", run_dir.name)),
    )
    wandb = None
    if config.wandb != "off":
        described = {**(run_config or {}), "run_card": dict(run_card)}
        wandb = WandbSink(config.wandb, project=config.wandb_project, run_dir=run_dir, run_config=described)
    alerts = AlertSink(AlertCommand(config.alert_command, run_dir), jsonl)
    return Sinks(jsonl, console=console, wandb=wandb, alerts=alerts)


def _write_card(run_dir: Path, run_card: Mapping[str, Any]) -> None:
    found = {key: value for key, value in read_card(run_dir).items() if key in FOUND_OUT and key not in run_card}
    write_whole(run_dir / RUN_CARD_FILE, json.dumps({**run_card, **found}, indent=2, ensure_ascii=False) + "\n")


def read_card(run_dir: Path) -> dict[str, Any]:
    """A run's card; empty where there is none, or none that can be read."""
    try:
        card = json.loads((run_dir / RUN_CARD_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return card if isinstance(card, dict) else {}


def read_run(run_dir: Path) -> list[Record]:
    """The step records of a run, steps strictly increasing, each with its evaluation if it had one.

    Raises:
        ValueError: there is no metrics.jsonl.
    """
    lines, last_step = _valid(_lines_of_run(run_dir)), -1
    scores = {line["step"]: {SCORE: line[SCORE]} for line in lines if line.get("event") == "evaluation"}
    records = []
    for line in lines:
        if "event" not in line and line["step"] > last_step:
            last_step = line["step"]
            records.append(line | scores.get(last_step, {}))
    return records


def read_events(run_dir: Path) -> list[Record]:
    """The events of a run, in the order they happened; ValueError without a metrics.jsonl."""
    return [line for line in _lines_of_run(run_dir) if "event" in line]


def read_lines(path: Path) -> Iterator[Record]:
    """Every whole line of a metrics file; torn ones (cut short by kill -9), and what no run writes, are left out."""
    with path.open("rb") as lines:
        for text in lines:
            # A cut line cannot parse as an object, because its closing brace comes last.
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if _is_line(line):
                yield line


def _is_line(line: Any) -> bool:
    """Whether this is a step record, or an event, an evaluation with its score."""
    if not isinstance(line, dict) or type(step := line.get("step")) is not int or not 0 <= step < 2**63:
        return False
    event = line.get("event", "")
    return isinstance(event, str) and (event != "evaluation" or type(line.get(SCORE)) in (int, float))


def _lines_of_run(run_dir: Path) -> Iterator[Record]:
    if not (run_dir / METRICS_FILE).is_file():
        raise no_run(run_dir)
    return read_lines(run_dir / METRICS_FILE)


def no_run(folder: Path) -> ValueError:
    """What to raise where a folder holds no run."""
    example = "give the directory of a run that has started, such as runs/tiny_bf16"
    return ValueError(f"{folder} has no {METRICS_FILE}: {example}")


def _valid(lines: Iterable[Record]) -> list[Record]:
    """All lines but the records and evaluations that a later rollback made void."""
    valid: list[Record] = []
    for line in lines:
        if line.get("event") == "rollback":
            valid = [
                each
                for each in valid
                if each.get("event", "evaluation") != "evaluation" or each["step"] <= line["step"]
            ]
        valid.append(line)
    return valid


def _replayed_part(record: Record) -> Record:
    return {name: record[name] for name in _REPLAYED if name in record}
