"""The user's command gets one line of JSON for each kind of alert; it can neither stop nor hold up a run."""

from __future__ import annotations

import itertools
import json
import logging
import os
import shlex
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from train import worker
from train.config import compose
from train.observe import alerts
from train.observe.alerts import AlertCommand, check_command
from train.observe.config import ObserveConfig
from train.observe.sinks import Sinks, open_sinks

SLOW = {"rank": 5, "pipeline_rank": 1, "data_rank": 1, "busy_ms": 300.0, "usual_ms": 100.0, "steps": 5, "phase": "data"}
# Event, details -> kind and words of the message; no kind: no alert.
EVENTS: list[tuple[str, dict[str, Any], str | None, str]] = [
    ("rollback", {"left_at_step": 9, "dropped_positions": []}, "divergence", "back from step 9 to step 7"),
    ("stop", {"reason": "the loss left", "exit_code": 5}, "divergence", "ended after step 7: the loss left"),
    ("stop", {"reason": "not finite", "exit_code": 3}, "divergence", "not finite"),
    ("stop", {"reason": "no room", "exit_code": 4}, "disk", "no room"),
    ("stop", {"reason": "altered", "exit_code": 2}, "disk", "altered"),
    ("save_failed", {"error": "No space left"}, "disk", "step 7: No space left"),
    ("records_dropped", {"lines": 3}, "disk", "3 lines of the log are lost"),
    ("quarantine", {"windows": [{"error": "block 3 is altered"}]}, "disk", "block 3 is altered"),
    ("stale_checkpoint", {"age_s": 7300.2}, "stale_checkpoint", "no checkpoint was published for 7300 s"),
    ("low_speed", {"tokens_per_s": 1200.0, "best_tokens_per_s": 9000.0}, "low_speed", "1.2k tok/s, where it was 9.0k"),
    ("straggler", SLOW, "low_speed", "rank 5 (pipeline rank 1, data rank 1) is slow"),
    ("stop", {"reason": "token budget spent"}, None, ""),
    ("checkpoint", {}, None, ""),
    ("skip", {"nonfinite": []}, None, ""),
]


def opened(folder: Path, command: str) -> Sinks:
    return open_sinks(ObserveConfig(wandb="off", alert_command=command), folder / "run", {"name": "run"})


def python(code: str) -> str:
    return shlex.join([sys.executable, "-S", "-c", code])


@pytest.mark.parametrize(("event", "details", "kind", "words"), EVENTS)
def test_each_event_that_needs_somebody_is_sent(
    event: str, details: dict[str, Any], kind: str | None, words: str, tmp_path: Path
) -> None:
    # Words of a shell arrive as they are.
    file = tmp_path / "got $(date) it"
    with opened(tmp_path, shlex.join(["tee", str(file)])) as sinks:
        sinks.event(event, step=7, **details)
    if kind is None:
        assert not file.exists()
        return
    (line,) = file.read_text().splitlines()
    alert = json.loads(line)
    assert (alert["kind"], alert["run"], alert["directory"], alert["step"]) == (
        kind, "run", str(tmp_path / "run"), 7,
    )  # fmt: skip
    assert words in alert["message"]


def test_a_log_that_cannot_be_written_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, write = tmp_path / "got", os.write
    with opened(tmp_path, shlex.join(["tee", str(file)])) as sinks:
        with monkeypatch.context() as full:
            full.setattr(os, "write", lambda *_: 0)
            sinks.write({"step": 1, "tokens_seen": 1, "time_unix_s": 0.0})
        assert os.write is write
    assert json.loads(file.read_text())["message"].endswith("cannot be written; records are kept in memory")


def test_no_alert_hides_another_one(tmp_path: Path) -> None:
    sent = [("quarantine", {"windows": [{"error": "altered"}]}), ("save_failed", {"error": "No space"}),
            ("straggler", SLOW), ("straggler", SLOW | {"rank": 6}), ("straggler", SLOW)]  # fmt: skip
    with opened(tmp_path, f"tee -a {tmp_path / 'got'}") as sinks:
        for event, details in sent:
            sinks.event(event, step=7, **details)
    messages = sorted(json.loads(line)["message"] for line in (tmp_path / "got").read_text().splitlines())
    assert len(messages) == 4
    for message, words in zip(messages, ("samples left out", "No space", "rank 5", "rank 6"), strict=True):
        assert words in message


def test_ranks_that_are_slow_in_the_same_step_are_one_alert(tmp_path: Path) -> None:
    """All of them named; one that was named before is not again."""
    # A file for each: two commands at once would mix what they append.
    with opened(tmp_path, f"sh -c 'cat > {tmp_path}/$$.got'") as sinks:
        sinks.events("straggler", [SLOW | {"rank": rank} for rank in range(64)], step=7)
        sinks.events("straggler", [SLOW | {"rank": rank} for rank in (63, 64)], step=9)
        sinks.events("straggler", [], step=11)
    alerts_sent = [json.loads(file.read_text()) for file in tmp_path.glob("*.got")]
    messages = {alert["step"]: alert["message"] for alert in alerts_sent}
    assert sorted(messages) == [7, 9]
    assert len(alerts_sent) == 2
    assert [f"rank {rank} (" in messages[7] for rank in range(65)] == [True] * 64 + [False]
    assert [f"rank {rank} (" in messages[9] for rank in (62, 63, 64)] == [False, False, True]


def test_an_event_comes_once_in_a_while_and_at_the_end_in_any_case(tmp_path: Path) -> None:
    now = [0.0]
    command = AlertCommand(f"tee -a {tmp_path / 'got'}", tmp_path / "run", clock_s=lambda: now[0])
    for at_s, source, is_last in ((0, "save", False), (1, "log", False), (599, "save", False), (600, "save", False),
                                  (601, "save", True)):  # fmt: skip
        now[0] = at_s
        command.send("disk", f"at {at_s}", source=source, is_last=is_last)
        command.close()
    messages = [json.loads(line)["message"] for line in (tmp_path / "got").read_text().splitlines()]
    assert messages == ["at 0", "at 1", "at 600", "at 601"]


def test_after_a_failure_an_event_is_sent_again_in_a_minute(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    failing = python("import sys; print('no\\nroute ' * 9999 + 'home', file=sys.stderr); sys.exit(3)")
    command = AlertCommand(failing, tmp_path / "run", clock_s=lambda: now[0])
    for now[0] in (0, 59, 60):
        command.send("disk", "full")
        command.close()
    sentence = "observe.alert_command failed for disk: exit code 3: 'route home' (failure %d)"
    assert caplog.messages == [sentence % 1, sentence % 2]


def test_a_command_that_fails_or_hangs_is_counted_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It hangs until its end of a pipe is closed, which only its death can do: `send` does not wait for it."""
    monkeypatch.setattr(alerts, "TIMEOUT_S", 0.5)
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    monkeypatch.setattr(alerts.subprocess.Popen, "__init__", _inheriting(writer, alerts.subprocess.Popen.__init__))
    # A child of its own holds the pipe too.
    hangs = f"import subprocess, time; subprocess.run(['sleep', '600'], close_fds=False); time.sleep({writer})"
    failing = {python("raise SystemExit(3)"): "exit code 3", str(tmp_path): "Permission denied", python(hangs): "0.5 s"}
    with caplog.at_level(logging.ERROR):
        senders = [AlertCommand(command, tmp_path / "run") for command in failing]
        for kind, sender in itertools.product(("disk", "low_speed"), senders):
            sender.send(kind, "x" * 100_000, source=kind)
            sender.close()
    os.close(writer)
    assert os.read(reader, 1) == b"", "nothing of a command that hung is left"
    os.close(reader)
    assert len(caplog.messages) == 6
    for number, (words, message) in enumerate(zip(2 * list(failing.values()), caplog.messages, strict=True)):
        assert words in message
        assert message.endswith(f"(failure {1 + number // 3})")


def test_an_alert_that_gets_no_thread_is_a_failure_and_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    command = AlertCommand(f"tee {tmp_path / 'got'}", tmp_path / "run")
    with monkeypatch.context() as full:
        full.setattr(threading.Thread, "start", _no_thread)
        command.send("disk", "lost")
        command.close()
    command.send("disk", "sent", is_last=True)
    command.close()
    assert caplog.messages == ["observe.alert_command failed for disk: can't start new thread (failure 1)"]
    assert json.loads((tmp_path / "got").read_text())["message"] == "sent"


def _no_thread(_: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_a_rank_whose_alert_fails_ends_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []
    dog = SimpleNamespace(reports_death=True)
    monkeypatch.setattr(worker, "Watchdog", lambda *_, **named: ended.append(named["on_death"]) or nullcontext(dog))
    for name, stand_in in {"init_processes": lambda **_: None, "make_mesh": lambda *_, **__: None,
                           "shutdown": lambda: None, "end_process": ended.append}.items():  # fmt: skip
        monkeypatch.setattr(worker, name, stand_in)
    config = compose(["layout.dp=2", f"run.directory={tmp_path}"])
    opened = worker.Opened(torch.device("cpu"), "gloo", None)  # type: ignore[arg-type]
    with worker.joined(config, worker.WorkerInfo(1, 2, 1, dist.HashStore()), opened):
        monkeypatch.setattr(AlertCommand, "send", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ended.pop()("rank 1 ends")  # type: ignore[operator]
    assert ended == ["rank 1 ends"]


def _inheriting(writer: int, original: Any) -> Any:
    def init(self: Any, *arguments: Any, **named: Any) -> None:
        original(self, *arguments, **named, pass_fds=(writer,))

    return init


def test_a_command_that_cannot_be_is_refused() -> None:
    check_command(None)
    check_command("tee x")
    with pytest.raises(ValueError, match=r"observe.alert_command: 'pagerx' is no program that can be run here"):
        check_command("pagerx --now")
    for command, words in (("tee 'x", "No closing quotation"), ("", "is empty")):
        with pytest.raises(ValueError, match=words):
            ObserveConfig(alert_command=command)
    with pytest.raises(ValueError, match="stale_checkpoint_s=-1 is negative"):
        ObserveConfig(stale_checkpoint_s=-1)
