"""Run what a model wrote against unit tests: in a process of its own, with limits. This is no security boundary.

The child has an empty folder that is removed, no environment, and hard limits on CPU time, memory, file size, open
files and processes; its process group is killed at the end. That stops accidents: endless loops, full memory, a mess
of files. It does not stop malice: the child reads the files and reaches the network that its user can, and root is
above some limits. Run hostile code in a container or virtual machine without network.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

CHILD = Path(__file__).with_name("limited_program.py")
Outcome = Literal["passed", "failed", "timed out"]


@dataclass(frozen=True)
class CodeLimits:
    """Of one program: CPU seconds, wall seconds, bytes of memory."""

    cpu_s: int = 10
    wall_s: float = 20.0
    memory_bytes: int = 1 << 30


def run_tests(program: str, tests: str, limits: CodeLimits) -> Outcome:
    """Import a program, then run its tests among its names; "passed" where both came to their end without an error."""
    word = secrets.token_hex(16)
    given = {"program": program, "tests": tests, "seconds": limits.cpu_s, "memory_bytes": limits.memory_bytes}
    with tempfile.TemporaryDirectory(prefix="unit_tests_") as folder, tempfile.TemporaryFile() as verdict:
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(CHILD)],
            cwd=folder,
            env={},
            stdin=subprocess.PIPE,
            stdout=verdict,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            # Not a pipe for the verdict: what the program leaves behind could hold it open.
            child.communicate(json.dumps(given | {"word": word}).encode(), timeout=limits.wall_s)
        except subprocess.TimeoutExpired:
            return "timed out"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        if -child.returncode in (signal.SIGXCPU, signal.SIGKILL):
            return "timed out"
        verdict.seek(0)
        return "passed" if child.returncode == 0 and verdict.read() == word.encode() else "failed"
