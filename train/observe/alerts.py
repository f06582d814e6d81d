"""`observe.alert_command`: the user's own command, run when a run needs somebody, with one line of JSON on its stdin.

    divergence         the run went back to an earlier checkpoint, or ended with exit code 3 or 5
    dead_rank          a rank died, and the run ends with exit code 75; sent by the rank that noticed it
    stale_checkpoint   no checkpoint was published for `observe.stale_checkpoint_s`
    low_speed          the run is far below its own best speed, or a rank is slow
    disk               a save or the log failed, token data are damaged, or the run ended for that (exit code 2 or 4)

    {"kind": "disk", "run": "first", "directory": "runs/first", "host": "node0", "step": 400, "time_unix_s": ...,
     "message": "step 400: saving checkpoint ... failed: ..."}

Rank 0 sends all but `dead_rank`. The command runs without a shell, in a thread of its own; nothing waits for it but the
end of the run, for TIMEOUT_S at most. The same event (of a slow rank: the same rank's) comes once in EVERY_S, RETRY_S
after a command that failed; what ends a run comes in any case. Events of one moment are one alert.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from train.observe.metrics import Record
from train.observe.sentences import announcement

if TYPE_CHECKING:
    from train.observe.sinks import JsonlSink

Kind = Literal["divergence", "dead_rank", "stale_checkpoint", "low_speed", "disk"]
TIMEOUT_S, RETRY_S, EVERY_S = 10.0, 60.0, 600.0
# Of its stderr, of which the last line is logged.
SAID_BYTES = 1000
_OF_EVENT: dict[str, Kind] = {
    "rollback": "divergence",
    "stale_checkpoint": "stale_checkpoint",
    "low_speed": "low_speed",
    "straggler": "low_speed",
    "save_failed": "disk",
    "records_dropped": "disk",
    "quarantine": "disk",
}
_OF_EXIT_CODE: dict[int, Kind] = {2: "disk", 3: "divergence", 4: "disk", 5: "divergence"}
_log = logging.getLogger(__name__)


def check_command(command: str | None) -> None:
    """Raise a ValueError for a command that this machine cannot run."""
    if command is not None and shutil.which(program := shlex.split(command)[0]) is None:
        raise ValueError(
            f"observe.alert_command: {program!r} is no program that can be run here; give its full path, or null"
        )


class AlertCommand:
    """Runs the command; a run with None as command sends nothing."""

    def __init__(self, command: str | None, directory: Path, *, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._words = shlex.split(command) if command else []
        self._directory, self._clock_s = directory, clock_s
        # By source, when it may come again.
        self._due_s: dict[str, float] = {}
        self._threads: list[threading.Thread] = []
        self._failures, self._counting = 0, threading.Lock()

    def send(
        self, kind: Kind, message: str, *, source: str = "", step: int | None = None, is_last: bool = False
    ) -> None:
        """Start the command and return at once, unless this source sent a short while ago and it is not the last."""
        self.send_together(kind, {source: message}, step=step, is_last=is_last)

    def send_together(
        self, kind: Kind, messages: Mapping[str, str], *, step: int | None = None, is_last: bool = False
    ) -> None:
        """`send` of several sources, by source: one command for all that are due."""
        now_s = self._clock_s()
        due = [source for source in messages if is_last or now_s >= self._due_s.get(source, now_s)]
        if not (self._words and due):
            return
        self._due_s |= dict.fromkeys(due, now_s + EVERY_S)
        message = "; ".join(messages[source] for source in due)
        run = {"run": self._directory.name, "directory": str(self._directory), "host": socket.gethostname()}
        alert = {"kind": kind, **run, "step": step, "time_unix_s": time.time(), "message": message}
        line = json.dumps(alert, ensure_ascii=False) + "\n"
        thread = threading.Thread(target=self._run, args=(kind, line.encode(), due), name="alert", daemon=True)
        self._threads = [each for each in self._threads if each.is_alive()]
        try:
            thread.start()
        except RuntimeError as error:
            # The system gives no thread. It is no reason to end a run.
            self._failed(kind, str(error), due)
        else:
            self._threads.append(thread)

    def close(self) -> None:
        """Wait for what was started, each for TIMEOUT_S at most."""
        for thread in self._threads:
            # A second more, in which it is killed and its failure logged.
            thread.join(TIMEOUT_S + 1)

    def _run(self, kind: Kind, line: bytes, sources: Sequence[str]) -> None:
        try:
            # No pipe: a child that the command leaves behind may keep it open.
            stderr = os.memfd_create("stderr") if hasattr(os, "memfd_create") else os.open(os.devnull, os.O_RDWR)
        except OSError as error:
            self._failed(kind, str(error), sources)
            return
        try:
            # A session of its own: killed with its children, and out of reach of a terminal's Ctrl-C.
            process = subprocess.Popen(
                self._words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True
            )
            try:
                process.communicate(line, timeout=TIMEOUT_S)
                failure = f"exit code {process.returncode}" if process.returncode else ""
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                failure = f"it did not end within {TIMEOUT_S:g} s"
        except OSError as error:
            failure = str(error)
        said = os.pread(stderr, SAID_BYTES, max(os.fstat(stderr).st_size - SAID_BYTES, 0))
        os.close(stderr)
        if failure:
            last_line = said.decode(errors="replace").strip().rpartition("\n")[2]
            self._failed(kind, f"{failure}: {last_line!r}" if last_line else failure, sources)

    def _failed(self, kind: Kind, failure: str, sources: Sequence[str]) -> None:
        with self._counting:
            self._failures += 1
            self._due_s |= dict.fromkeys(sources, self._clock_s() + RETRY_S)
            _log.error("observe.alert_command failed for %s: %s (failure %d)", kind, failure, self._failures)


class AlertSink:
    """The mirror of a run's log that sends alerts."""

    def __init__(self, command: AlertCommand, log: JsonlSink) -> None:
        self._command, self._log = command, log

    def write(self, record: Record) -> None:
        """Send that the log cannot be written: no event can say so there."""
        if self._log.is_full:
            message = f"{self._log.path} cannot be written; records are kept in memory"
            self._command.send("disk", message, source="log", step=record["step"])

    def events(self, events: Sequence[Record]) -> None:
        """Send one alert for all events of one kind and step, if that is a reason for one."""
        name, step, code = events[0]["event"], events[0]["step"], events[0].get("exit_code", 0)
        kind = _OF_EXIT_CODE.get(code) if name == "stop" else _OF_EVENT.get(name)
        if kind is not None:
            # Ranks may become slow one after the other.
            messages = {f"{name} {event.get('rank', '')}": str(announcement(event)) for event in events}
            self._command.send_together(kind, messages, step=step, is_last=name == "stop")

    def close(self) -> None:
        """Let what was sent arrive, within a bounded time."""
        self._command.close()
