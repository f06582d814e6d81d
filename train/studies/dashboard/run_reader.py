"""A run's metrics.jsonl read once, from the last byte on, into bounded series: for finished and running jobs.

    runs/<name>/metrics.jsonl   records and events                              required
    runs/<name>/run_card.json   its name, and on what it ran                    optional, may come later
    runs/<name>/config.yaml     every value it was started with                 optional
    runs/<name>/summary.json    held-out bits per byte and its baselines        optional, comes last

`poll` takes what was appended since the last call. A line without its end is left for the next call, unless it
is whole (its closing brace comes last, so a torn line never parses). A file that became shorter or was replaced is
read from its start; so is one in which the run has gone back, now without the records that this made void. Memory
does not grow with the run (`series.py`), nor with its events: of each kind the first and the last are kept, and all are
counted.

An expert is idle in a step when it got no token: a zero of `moe/expert_load`, or a count in `moe/dead_experts` where
only that is logged.

Time of training is the time between records without the pauses: between two processes, and whenever the run was silent.
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import numpy as np

from train.observe.metrics import REQUIRED, Record
from train.observe.sinks import METRICS_FILE, RUN_CARD_FILE
from train.studies.dashboard.series import Cells, Json, Reduction, Series, Steps, TableSeries

SUMMARY_FILE = "summary.json"
CONFIG_FILE = "config.yaml"
# Tables that are drawn, and how one cell of the picture is made of several steps.
TABLES: dict[str, Reduction] = {
    "step/busy_ms": "mean",
    "step/data_ms": "mean",
    "step/gradients_ms": "mean",
    "step/update_ms": "mean",
    "attention/head_max_logit": "max",
    "moe/expert_load": "mean",
    "moe/expert_bias": "last",
    "fp8/amax": "max",
    "fp8/scale_spread_ratio": "max",
    "fp8/saturated_ratio": "max",
    "fp8/underflow_ratio": "max",
    "fp8/snr_db": "min",
}
KEPT_EVENTS = 200
# Events that a resumed run repeats with the steps in which they happened.
REPEATED_EVENTS = frozenset({"checkpoint", "dead_experts", "evaluation", "replay_differs", "skip", "spike"})
# A run is silent after this long without a record, or after ten of its steps, whichever is longer.
SILENT_S = 120.0
SILENT_STEPS = 10
# Records and metrics that a file may bring; a hostile file cannot fill memory with names.
_CHUNK_BYTES = 4 << 20
_MAX_METRICS = 200
_RECENT_RECORDS = 101
# Of the year 5138: dates and durations beyond it overflow.
_LAST_SECOND = 1e11


@dataclass
class EventLog:
    """Events of one kind: their number, and the steps of the first and of the last of them."""

    total: int = 0
    first: list[int] = field(default_factory=list)
    last: deque[int] = field(default_factory=lambda: deque(maxlen=KEPT_EVENTS))
    # Steps at which one is not counted again.
    counted: deque[int] = field(default_factory=lambda: deque(maxlen=KEPT_EVENTS))

    def add(self, step: int, *, once: bool) -> None:
        """Count one; `once`: unless one of that step is counted."""
        if once:
            if step in self.counted:
                return
            self.counted.append(step)
        self.total += 1
        (self.first if len(self.first) < KEPT_EVENTS else self.last).append(step)

    def go_back(self, step: int) -> None:
        """Later steps come again with other data: their events are others."""
        self.counted = deque((each for each in self.counted if each <= step), maxlen=KEPT_EVENTS)

    @property
    def steps(self) -> list[int]:
        """What is kept, in the order it happened."""
        return [*self.first, *self.last]


class DeadExperts:
    """How many (layer, expert) pairs got no token in the last step, and for how long each of them."""

    def __init__(self) -> None:
        # Pairs in the last step, and the last step with one.
        self.now, self.last = 0, 0
        # [cells] logged steps in a row without a token, of each pair, and the first step of that streak.
        self.idle = self.since = np.zeros(0, np.int64)

    def add_counts(self, steps: Sequence[int], counts: Sequence[float]) -> None:
        """Take `moe/dead_experts` of more steps."""
        for step, count in zip(steps, counts, strict=True):
            self.now = int(count) if math.isfinite(count) else 0
            self.last = step if self.now else self.last

    def add_loads(self, steps: Steps, loads: Cells, shape: Sequence[int]) -> None:
        """Take load tables: [tables] steps, [tables, cells] loads of `shape` = experts of each layer."""
        fed = np.zeros_like(loads, bool)
        at = 0
        for experts in shape:
            layer = loads[:, at : at + experts]
            # A layer without any load was not measured.
            fed[:, at : at + experts] = (layer != 0) | ~layer.any(axis=1, keepdims=True)
            at += experts
        if len(self.idle) != loads.shape[1]:
            self.idle = self.since = np.zeros(loads.shape[1], np.int64)
        trailing = np.where(fed.any(axis=0), np.argmax(fed[::-1], axis=0), len(steps))
        begins_here = (trailing < len(steps)) | (self.idle == 0)
        first = steps[np.minimum(len(steps) - trailing, len(steps) - 1)]
        self.since = np.where(begins_here, first, self.since)
        self.idle = np.where(trailing == len(steps), self.idle + trailing, trailing)
        self.now = int((self.idle > 0).sum())
        rows = np.flatnonzero(~fed.all(axis=1))
        self.last = int(steps[rows[-1]]) if len(rows) else self.last


class RunReader:
    """One run directory, followed; it need not have a metrics.jsonl yet."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / METRICS_FILE
        # File -> why it, or some lines of metrics.jsonl, could not be read.
        self.problems: dict[str, str] = {}
        self.card: Json = {}
        self.summary: Json = {}
        self.config: Json = {}
        self._stamps: dict[str, tuple[int, int, int]] = {}
        self._inode = -1
        # Steps of all rollbacks in the file when it was last searched for them.
        self._rollbacks: list[int] = []
        self._restart()

    def poll(self, max_bytes: int | None = None) -> bool:
        """Take what was appended, at most about `max_bytes`; returns whether anything changed."""
        changed, read = False, 0
        if self.path.is_file():
            with self.path.open("rb") as file:
                facts = os.fstat(file.fileno())
                if facts.st_ino != self._inode or facts.st_size < self.offset:
                    changed |= self.offset > 0
                    self._rollbacks = _find_rollbacks(file)
                    self._restart()
                    self._inode = facts.st_ino
                self.size = facts.st_size
                file.seek(self.offset)
                while (max_bytes is None or read < max_bytes) and (taken := self._take(file.read(_CHUNK_BYTES))):
                    read += taken
                    if self._went_back and len(found := _find_rollbacks(file)) > len(self._rollbacks):
                        self._rollbacks = found
                        self._restart()
                    file.seek(self.offset)
        # After the records: a card that was written before them is then seen with them.
        return bool(self.read_cards() or changed or read)

    def _restart(self) -> None:
        # The last step that what comes leaves valid: after each rollback, from the last to none; and whether there was
        # one more than was known.
        self._limits, self._went_back = [math.inf, *accumulate(reversed(self._rollbacks), min)], False
        self.series: dict[str, Series] = {}
        self.tables: dict[str, TableSeries] = {}
        self.events: dict[str, EventLog] = {}
        self.dead = DeadExperts()
        # Seconds of training up to the last record, and whether the time since then is a pause.
        self.trained_s, self._paused = 0.0, False
        # (time, tokens) of the newest records of this process, for the speed.
        self.recent: deque[tuple[float, int]] = deque(maxlen=_RECENT_RECORDS)
        # Reason of the last stop event, None when a record, a start or a resume came after it.
        self.stopped: str | None = None
        self.records, self.last_step, self.tokens_seen, self.evaluated_step = 0, -1, 0, -1
        self.last_time_s = 0.0
        self.offset, self.size = 0, 0
        self.problems.pop(METRICS_FILE, None)

    def _take(self, data: bytes) -> int:
        """Take the whole lines of `data`; returns how many bytes that was."""
        end = data.rfind(b"\n") + 1
        # A line longer than a chunk, or the unfinished last one: whole if it parses.
        if end == 0 and data:
            if len(data) < _CHUNK_BYTES and not isinstance(_parsed(data), dict):
                return 0
            end = len(data)
        self.offset += end
        try:
            self._take_lines([line for line in _parse_lines(data[:end]) if isinstance(line, dict)])
        except Exception as error:  # noqa: BLE001
            # A file that the trainer did not write: what follows is read, and the page says that something is missing.
            self.problems[METRICS_FILE] = f"{self.path} has lines that cannot be read ({error})"
        return end

    def _take_lines(self, lines: list[Record]) -> None:
        records: list[Record] = []
        for line in lines:
            if "event" in line:
                self._take_event(line, records)
            elif _is_step_record(line) and self.last_step < line["step"] <= self._limits[-1]:
                records.append(line)
                self.last_step, self.stopped = line["step"], None
        self._take_records(records)

    def _take_event(self, event: Record, before: list[Record]) -> None:
        kind, step = str(event["event"]), event.get("step")
        if not _is_step(step) or (kind not in self.events and len(self.events) >= _MAX_METRICS):
            return
        self.events.setdefault(kind, EventLog()).add(step, once=kind in REPEATED_EVENTS)
        if kind == "rollback":
            for log in self.events.values():
                log.go_back(step)
            self._went_back |= len(self._limits) == 1
            self._limits = self._limits[:-1] or self._limits
        if kind == "evaluation" and self.evaluated_step < step <= self._limits[-1]:
            self.evaluated_step = step
            self._take_column("eval/bits_per_byte", [step], [event.get("eval/bits_per_byte")])
        if kind == "stop":
            self.stopped = str(event.get("reason", "stopped"))
        if kind in ("start", "resume", "rollback"):
            # The time between two processes, or lost, is no training time.
            self._take_records(before)
            before.clear()
            self.recent.clear()
            self.stopped, self._paused = None, True

    def _take_records(self, records: list[Record]) -> None:
        if not records:
            return
        steps = [record["step"] for record in records]
        # In place of the clock, which runs on through pauses.
        self._take_column("time/trained_s", steps, [self._take_time(record) for record in records])
        for name in sorted(set[str]().union(*records) - {"step", "time_unix_s", "time/trained_s"}):
            self._take_column(name, steps, [record.get(name) for record in records])

    def _take_time(self, record: Record) -> float:
        """Add the time since the last record to the training, or after a pause the step's own; returns the sum."""
        now_s, tokens = record["time_unix_s"], record["tokens_seen"]
        passed_s = max(0.0, now_s - self.last_time_s)
        if self.records and (self._paused or (passed_s > SILENT_S and passed_s > self.silent_after_s)):
            # Steps that were repeated after the pause are no new training either.
            speed = _number(record.get("speed/tokens_per_s"))
            passed_s = min(passed_s, max(0, tokens - self.tokens_seen) / speed) if speed > 0 else 0.0
        self.trained_s += passed_s if self.records else 0.0
        self._paused = False
        self.records += 1
        self.tokens_seen, self.last_time_s = tokens, now_s
        self.recent.append((now_s, tokens))
        return self.trained_s

    @property
    def silent_after_s(self) -> float:
        """How long without a record is silence: more than ten of the newest steps take."""
        steps = len(self.recent) - 1
        return max(SILENT_S, SILENT_STEPS * (self.recent[-1][0] - self.recent[0][0]) / steps if steps > 0 else 0.0)

    def _take_column(self, name: str, steps: list[int], values: list[Any]) -> None:
        if None in values:
            present = [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]
            steps, values = [step for step, _ in present], [value for _, value in present]
        if name in TABLES:
            table = self.tables.setdefault(name, TableSeries(TABLES[name]))
            for at, cells in table.add(steps, values):
                if name == "moe/expert_load" and cells.shape[1] == sum(table.shape):
                    self.dead.add_loads(at, cells, table.shape)
            return
        numbers = _numbers(values)
        if name not in self.series and (not np.isfinite(numbers).any() or len(self.series) >= _MAX_METRICS):
            # A metric that is never a number has no curve.
            return
        self.series.setdefault(name, Series()).add(np.array(steps, np.int64), numbers)
        if name == "moe/dead_experts":
            self.dead.add_counts(steps, numbers.tolist())

    def read_cards(self) -> bool:
        """Read the small files that came or changed since; returns whether the run looks different now."""
        changed = False
        for name, (attribute, read) in _CARDS.items():
            path = self.directory / name
            try:
                facts = path.stat()
            except OSError:
                continue
            stamp = (facts.st_mtime_ns, facts.st_size, facts.st_ino)
            if self._stamps.get(name) == stamp:
                continue
            problem = self.problems.pop(name, None)
            try:
                setattr(self, attribute, read(path))
            except (ValueError, OSError) as error:
                self.problems[name] = str(error)
                if isinstance(error, OSError):
                    # The bytes were not seen: without a stamp they are read again at the next look.
                    changed |= str(error) != problem
                    continue
            self._stamps[name] = stamp
            changed = True
        return changed


def read_object(path: Path) -> Json:
    """The JSON object of a small file; ValueError where it holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        _check_text(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}): mend it or delete it") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not an object: mend it or delete it")
    return value


def _check_text(value: object) -> None:
    """Refuse half of a surrogate pair: it can be written in JSON and YAML but not into a page."""
    json.dumps(value, default=str, ensure_ascii=False).encode()


def _read_yaml(path: Path) -> Json:
    # The page does without a file that was broken by hand. An alias could hold itself.
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            return {}
        value = yaml.safe_load(text)
        _check_text(value)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


# File -> the attribute of RunReader that holds it, and how it is read.
_CARDS = {
    RUN_CARD_FILE: ("card", read_object),
    SUMMARY_FILE: ("summary", read_object),
    CONFIG_FILE: ("config", _read_yaml),
}


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _parse_lines(data: bytes) -> list[Any]:
    """Every line of `data`; all at once, which is faster, unless one of them is torn."""
    lines = data.split(b"\n")
    whole = [line for line in lines if line.endswith(b"}")]
    joined = _parsed(b"[" + b",".join(whole) + b"]")
    if isinstance(joined, list) and len(joined) == len(whole):
        return joined
    return [_parsed(line) for line in whole]


def _find_rollbacks(file: BinaryIO) -> list[int]:
    """The steps to which the run of a log went back, in order."""
    file.seek(0)
    lines = (line for line in iter(lambda: file.readline(_CHUNK_BYTES), b"") if b'"rollback"' in line)
    events = [event for event in map(_parsed, lines) if isinstance(event, dict) and event.get("event") == "rollback"]
    return [event["step"] for event in events if _is_step(event.get("step"))]


def _is_step_record(record: Record) -> bool:
    """Whether step, tokens and time are there and in range."""
    step, tokens, time_s = (record.get(name) for name in REQUIRED)
    if not _is_step(step) or type(tokens) is not int or not isinstance(time_s, int | float):
        return False
    return 0 <= tokens < 2**63 and 0 <= time_s < _LAST_SECOND


def _is_step(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 2**32


def _numbers(values: list[Any]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Float64; NaN for what is no number, or none that float64 can hold."""
    try:
        return np.array(values, np.float64).reshape(len(values))
    except (TypeError, ValueError, OverflowError):
        return np.array([_number(value) for value in values], np.float64)


def _number(value: Any) -> float:
    try:
        return float(value) if type(value) in (int, float) else math.nan
    except OverflowError:
        return math.nan


def find_runs(folders: Sequence[Path], max_depth: int = 3) -> list[Path]:
    """The run directories among `folders`, and those below a folder that is none itself; in order, each once."""
    found: dict[Path, Path] = {}
    for folder in folders:
        for directory in [folder] if (folder / METRICS_FILE).is_file() else _below(folder, max_depth):
            found.setdefault(directory.resolve(), directory)
    return list(found.values())


def _below(folder: Path, depth: int) -> list[Path]:
    try:
        entries = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.is_symlink())
    except OSError:
        return []
    found: list[Path] = []
    for entry in entries:
        if (entry / METRICS_FILE).is_file():
            found.append(entry)
        elif depth > 1 and not entry.name.startswith("."):
            found += _below(entry, depth - 1)
    return found
