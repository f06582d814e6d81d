"""`launch/chat.py` on a pseudo-terminal, typed into as a user would."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# The command, with the pseudo-terminal as the one whose Ctrl-C reaches it.
TAKE_TERMINAL = (
    "import fcntl, sys, termios\nfcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
    "from launch.chat import main\nsys.exit(main(sys.argv[1:]))"
)
# Of every wait: only what hangs takes so long.
PATIENCE_S = 300.0


class Terminal:
    """A process on a pseudo-terminal: type, and wait until something is shown."""

    def __init__(self, arguments: list[str]) -> None:
        self._leader, follower = pty.openpty()
        environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "200"}
        environment.pop("NO_COLOR", None)
        self.process = subprocess.Popen(
            [sys.executable, "-c", TAKE_TERMINAL, *arguments],
            stdin=follower,
            stdout=follower,
            stderr=follower,
            env=environment,
            start_new_session=True,
        )
        os.close(follower)
        self.shown = ""

    def wait_for(self, text: str) -> str:
        """What was shown since the last wait, up to and with `text`."""
        assert self._shows(text, PATIENCE_S), self.shown
        seen, found, self.shown = self.shown.partition(text)
        return seen + found

    def _shows(self, text: str, within_s: float) -> bool:
        deadline = time.monotonic() + within_s
        while text not in self.shown and time.monotonic() < deadline:
            if select.select([self._leader], [], [], 0.1)[0]:
                self.shown += os.read(self._leader, 1 << 16).decode()
        return text in self.shown

    def type(self, text: str) -> None:
        os.write(self._leader, text.encode())

    def ask(self, line: str, until: str) -> str:
        self.type(line + "\r")
        seen = self.wait_for(until)
        self.wait_for("> ")
        return seen

    def interrupt(self, until: str) -> None:
        """Ctrl-C, and again if nothing comes: Python misses one between showing a prompt and waiting for a key."""
        deadline = time.monotonic() + PATIENCE_S
        self.type("\x03")
        while not self._shows(until, within_s=10):
            assert time.monotonic() < deadline, self.shown
            self.type("\x03")
        self.wait_for(until)
        self.wait_for("> ")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._leader)
