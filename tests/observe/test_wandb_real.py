"""The real wandb package: what an offline run holds is what metrics.jsonl holds, and no server can disturb training.

The offline file is read by the test's own reader of its format (LevelDB's log: blocks of 32 KiB, each record in
fragments with CRC, length and type) and wandb's own message types. The servers are real ones on the loopback.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from train.observe.config import ObserveConfig
from train.observe.metrics import METRICS, Record
from train.observe.sinks import open_sinks, read_run

# Longer than any pause of a noisy machine; only a hang reaches it.
PATIENCE_S = 60.0
BLOCK, HEADER = 32768, 7
STEPS = 12


def record(step: int) -> Record:
    """Every declared metric."""
    values: Record = {}
    for index, (name, metric) in enumerate(METRICS.items()):
        width = 6 if name.startswith("fp8/") else 3
        table = [[math.sin(step + index + row + column) for column in range(width)] for row in range(2)]
        values[name] = {"int": step * (index + 1), "float": math.sqrt(step + index), "table": table}[metric.kind]
    return values | {"step": step}


def log_records(data: bytes) -> Iterator[bytes]:
    """The payloads of a LevelDB log, less what is not whole yet; the file's header is as long as a record's."""
    at, pending = HEADER, b""
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + HEADER])
        fragment = data[at + HEADER : at + HEADER + length]
        if len(fragment) < length:
            return
        pending += fragment
        at += HEADER + length
        # 1 whole, 2 first, 3 middle, 4 last.
        if kind in (1, 4):
            yield pending
            pending = b""


def offline_file(run_dir: Path) -> bytes:
    """The newest offline run's file, once its process has written the end."""
    from wandb.proto.wandb_internal_pb2 import Record as Message

    path = max(run_dir.glob("wandb/offline-run-*/run-*.wandb"), key=lambda p: p.stat().st_mtime_ns)
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        data = path.read_bytes()
        if any(Message.FromString(m).WhichOneof("record_type") == "exit" for m in log_records(data)):
            return data
        time.sleep(0.05)
    raise AssertionError(f"{path} has no end")


def nested(items: Any) -> dict[str, Any]:
    # Items with a key or a path of keys, as a dict of dicts.
    found: dict[str, Any] = {}
    for item in items:
        *path, last = [item.key] if item.key else item.nested_key
        inner = found
        for key in path:
            inner = inner.setdefault(key, {})
        inner[last] = json.loads(item.value_json)
    return found


def held(run_dir: Path) -> tuple[list[dict[str, Any]], dict[str, Any], str]:
    """History, config and id of the newest offline run."""
    from wandb.proto.wandb_internal_pb2 import Record as Message

    history: list[dict[str, Any]] = []
    config: dict[str, Any] = {}
    run_id = ""
    for payload in log_records(offline_file(run_dir)):
        message = Message.FromString(payload)
        kind = message.WhichOneof("record_type")
        if kind == "history":
            history.append(nested(message.history.item))
        elif kind == "run":
            run_id = message.run.run_id
            config |= nested(message.run.config.update)
    return history, config, run_id


def test_an_offline_run_holds_every_name_and_value_of_the_file_and_keeps_its_id(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    observe = ObserveConfig(progress=False, console_every_steps=1000, wandb="offline")
    card = {"name": "tiny", "layer_ids": [0, 1]}
    run_config = {"model": {"hidden_size": 256}, "run": {"name": "tiny"}}
    with open_sinks(observe, tmp_path, card, run_config) as sinks:
        for step in range(1, STEPS + 1):
            sinks.write(record(step))
        sinks.event("checkpoint", step=STEPS)
    history, config, first_id = held(tmp_path)
    written = offline_file(tmp_path)
    whole = list(log_records(written))
    for end in range(0, len(written), 97):
        cut = list(log_records(written[:end]))
        assert cut == whole[: len(cut)], "a file that is still being written is read wrongly"
    logged = read_run(tmp_path)
    assert len(history) == len(logged) == STEPS
    assert b"event/checkpoint" in written
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING]
    assert config["model"] == run_config["model"]
    assert config["run_card"] == card
    for ours, theirs in zip(logged, history, strict=True):
        assert ours.keys() <= theirs.keys()
        for name, value in ours.items():
            if METRICS[name].kind != "table":
                assert theirs[name] == value, name
                continue
            cells = [x for row in value for x in row]
            assert theirs[name]["_type"] == "histogram"
            assert sum(theirs[name]["values"]) == len(cells), name
            assert theirs[name]["bins"][0] == min(cells)
            assert theirs[name]["bins"][-1] == max(cells)
    with open_sinks(observe, tmp_path, card, run_config) as sinks:
        # Steps that the file holds are not sent twice.
        for step in range(STEPS - 2, STEPS + 3):
            sinks.write(record(step))
    history, _, second_id = held(tmp_path)
    assert second_id == first_id == (tmp_path / "wandb_id").read_text().strip()
    assert [line["step"] for line in history] == [STEPS + 1, STEPS + 2]


class _Broken(BaseHTTPRequestHandler):
    """Answers 500."""

    def do_POST(self) -> None:
        self.send_response(500)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


class _Hanging(_Broken):
    """Answers when the test ends."""

    released = threading.Event()

    def do_POST(self) -> None:
        self.released.wait(PATIENCE_S)

    do_GET = do_POST


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address of a server on the loopback."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as service:
        service.daemon_threads = True
        threading.Thread(target=service.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{service.server_port}"
        finally:
            _Hanging.released.set()
            service.shutdown()


@contextmanager
def refusing() -> Iterator[str]:
    """An address that is bound and not listened on: connections are refused, and no other process gets the port."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


# A process of its own: wandb reads its environment once.
RUN = """
import json, logging, sys, time
from pathlib import Path
from train.observe.sinks import JsonlSink, Sinks
from train.observe.wandb_sink import WandbSink

run_dir = Path(sys.argv[1])
records = json.loads((run_dir / "records.json").read_text())
logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
mirror = WandbSink("online", project="test", run_dir=run_dir, run_config={}, init_timeout_s=1.0)
half = len(records) // 2
with Sinks(JsonlSink(run_dir / "metrics.jsonl"), console=None, wandb=mirror) as sinks:
    for record in records[:half]:
        assert sinks.write(record)
    deadline = time.monotonic() + float(sys.argv[2])
    while mirror.active and time.monotonic() < deadline:
        time.sleep(0.02)
    for record in records[half:]:
        assert sinks.write(record)
"""


def start(server: str, run_dir: Path, records: str) -> subprocess.Popen[str]:
    """A run that mirrors to `server`."""
    run_dir.mkdir()
    (run_dir / "records.json").write_text(records)
    names = {"WANDB_MODE": "online", "WANDB_BASE_URL": server, "WANDB_API_KEY": "0" * 40}
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(run_dir), str(PATIENCE_S)],
        env=os.environ | names | {"WANDB_CONFIG_DIR": str(run_dir / "config")},
        cwd=Path(__file__).resolve().parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_server_that_refuses_hangs_or_fails_costs_one_warning_and_no_record(tmp_path: Path) -> None:
    records = [record(step) for step in range(1, STEPS + 1)]
    with refusing() as closed, serving(_Hanging) as hanging, serving(_Broken) as broken:
        servers = {"refuses": closed, "hangs": hanging, "fails": broken}
        runs = {name: start(server, tmp_path / name, json.dumps(records)) for name, server in servers.items()}
        for name, run in runs.items():
            _, output = run.communicate(timeout=3 * PATIENCE_S)
            assert run.returncode == 0, f"{name}: {output}"
            assert read_run(tmp_path / name) == records
            warnings = [line for line in output.splitlines() if line.startswith("train.")]
            assert len(warnings) == 1, f"{name}: {output}"
            assert re.search("The wandb mirror is off.*metrics.jsonl stays complete", warnings[0])
