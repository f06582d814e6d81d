"""The wandb mirror: what it sends, and the ways in which a mirror fails without training noticing."""

from __future__ import annotations

import logging
import math
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from train.observe.metrics import FP8_OPERANDS, Record
from train.observe.wandb_sink import WandbSink

# Longer than any pause of a noisy machine; only a hang reaches it.
PATIENCE_S = 60.0


def record(step: int, **tables: Any) -> Record:
    place = {"step": step, "tokens_seen": 7 * step, "time_unix_s": 0.5}
    return {**place, "loss/main": 1 / step, "moe/expert_load": [[1.0, 1.0]], **tables}


class FakeWandb(types.ModuleType):
    """A wandb whose `init` and `log` do what a test wants; `hang` blocks until the test ends."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.logged: list[tuple[int, Record]] = []
        self.init_arguments: dict[str, object] = {}
        self.summary: dict[str, int] = {}
        self.axes: dict[str, str] = {}
        self.finished = False
        self.logged_in = True
        self.released = threading.Event()
        self.reached = threading.Event()
        self.on_init = self.on_log = lambda: None

    def hang(self) -> None:
        self.reached.set()
        self.released.wait(PATIENCE_S)

    def login(self, *, prompt: bool) -> bool:
        assert not prompt
        return self.logged_in

    def init(self, **arguments: object) -> FakeWandb:
        self.init_arguments = arguments
        self.on_init()
        return self

    def log(self, values: Record, step: int) -> None:
        self.on_log()
        self.logged.append((step, values))

    def define_metric(self, name: str, *, step_metric: str) -> None:
        self.axes[name] = step_metric

    def Histogram(self, *, np_histogram: tuple[Any, Any]) -> tuple[list[int], list[float]]:
        return np_histogram[0].tolist(), np_histogram[1].tolist()

    def finish(self) -> None:
        self.finished = True

    def Settings(self, **arguments: object) -> dict[str, object]:
        return arguments


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeWandb]:
    module = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    yield module
    module.released.set()


def sent(run_dir: Path, *records: Record, mode: str = "offline", **limits: float) -> WandbSink:
    """A sink that has taken these records."""
    sink = WandbSink(mode, project="test", run_dir=run_dir, run_config={"name": "tiny"}, **limits)
    for one in records:
        sink.write(one)
    return sink


def the_warning(caplog: pytest.LogCaptureFixture) -> str:
    """The only one that was logged."""
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    return warning


def test_names_and_steps_are_those_of_the_file(fake: FakeWandb, tmp_path: Path):
    sink = sent(tmp_path, *map(record, range(1, 6)))
    sink.event({"event": "stop", "step": 5})
    sink.close()
    for step, (found, values) in enumerate(fake.logged, start=1):
        table = {"moe/expert_load": values["moe/expert_load"]}
        assert (found, values) == (step, record(step) | table)
    assert len(fake.logged) == 5
    assert fake.summary == {"event/stop": 5}
    assert fake.finished
    assert fake.init_arguments["mode"] == "offline"
    assert fake.init_arguments["config"] == {"name": "tiny"}


def test_tables_arrive_as_histograms_and_fp8_tables_as_their_worst_layers_too(fake: FakeWandb, tmp_path: Path):
    tables = {
        "moe/expert_load": [[1.0, 0.5], [2.0, 0.5]],
        "fp8/snr_db": [[31.0] * 6, [math.inf, 20.0, 31.0, 30.0, 40.0, 25.0]],
        "fp8/amax": [[1.0] * 6, [0.5, 2.0, 0.1, 0.2, 3.0, 1.0]],
    }
    sent(tmp_path, record(1, **tables)).close()
    ((_, values),) = fake.logged
    for name, table in tables.items():
        counts, edges = values[name]
        cells = [x for row in table for x in row if math.isfinite(x)]
        assert sum(counts) == len(cells)
        assert (edges[0], edges[-1]) == (min(cells), max(cells))
    assert [values[f"fp8/snr_db/{o}"] for o in FP8_OPERANDS] == [31.0, 20.0, 31.0, 30.0, 31.0, 25.0]
    assert [values[f"fp8/amax/{o}"] for o in FP8_OPERANDS] == [1.0, 2.0, 1.0, 1.0, 3.0, 1.0]


def test_losses_are_drawn_over_tokens_and_the_rest_over_steps(fake: FakeWandb, tmp_path: Path):
    sent(tmp_path).close()
    assert fake.axes == {"*": "step", "loss/*": "tokens_seen", "eval/*": "tokens_seen"}


def test_a_resumed_run_goes_on_in_its_wandb_run_and_another_directory_does_not(fake: FakeWandb, tmp_path: Path):
    ids = []
    for run_dir in (tmp_path / "a", tmp_path / "a", tmp_path / "b"):
        run_dir.mkdir(exist_ok=True)
        sent(run_dir).close()
        assert fake.init_arguments["resume"] == "allow"
        ids.append(fake.init_arguments["id"])
    assert ids[0] == ids[1] == (tmp_path / "a" / "wandb_id").read_text().strip()
    assert ids[2] != ids[0]


def test_online_without_a_key_records_offline(fake: FakeWandb, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    fake.logged_in = False
    sent(tmp_path, record(1), mode="online").close()
    assert fake.init_arguments["mode"] == "offline"
    assert len(fake.logged) == 1
    assert "recording offline" in the_warning(caplog)


@pytest.mark.parametrize("place", ["on_init", "on_log"])
def test_a_failure_gives_one_warning_and_turns_the_mirror_off(
    fake: FakeWandb, tmp_path: Path, caplog: pytest.LogCaptureFixture, place: str
):
    setattr(fake, place, Mock(side_effect=RuntimeError("the server is on fire")))
    sink = sent(tmp_path, *map(record, range(1, 200)))
    sink.close()
    for step in range(200, 300):
        sink.write(record(step))
    assert not sink.active
    warning = the_warning(caplog)
    assert "RuntimeError: the server is on fire" in warning
    assert "metrics.jsonl stays complete" in warning


@pytest.mark.parametrize("place", ["on_init", "on_log"])
def test_a_hanging_server_never_blocks_training_and_close_is_bounded(
    fake: FakeWandb, tmp_path: Path, caplog: pytest.LogCaptureFixture, place: str
):
    setattr(fake, place, fake.hang)
    sink = sent(tmp_path, record(1), queue_records=10_000, close_timeout_s=0.05)
    assert fake.reached.wait(PATIENCE_S)
    for step in range(2, 1000):
        sink.write(record(step))
    sink.close()
    # The server still hangs: `write` and `close` came back all the same.
    assert not fake.released.is_set()
    assert fake.logged == []
    assert "did not finish within 0.05 s" in the_warning(caplog)


def test_a_mirror_that_falls_behind_is_turned_off_instead_of_filling_memory(
    fake: FakeWandb, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    fake.on_log = fake.hang
    sink = sent(tmp_path, *map(record, range(1, 100)), queue_records=5)
    assert not sink.active
    sink.close()
    assert not fake.released.is_set()
    assert "5 records behind" in the_warning(caplog)


def test_a_missing_wandb_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    sent(tmp_path, record(1)).close()
    assert "pip install wandb" in the_warning(caplog)


def test_training_without_a_mirror_never_imports_wandb(run_command: Callable[..., object]):
    run_command("-c", "import sys, train.observe.sinks, train.studies.dashboard.page; sys.exit('wandb' in sys.modules)")
