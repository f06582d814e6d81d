"""How a process of a run ends: at once while it starts; its last sentence in torchrun's report.

torchrun prints its table of failures after all that its workers have said. The table ends with the cause, which
torchrun reads from a file that it names to each worker: a sentence left there is the last that a user reads.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path

STOPPED = "pretrain: asked to stop before the first step: nothing was trained; the same command starts\n"


def leave_at_once(*_: object) -> None:
    """A signal handler for the time of the imports."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, STOPPED.encode())
    os._exit(0)


def tell_launcher(sentence: str) -> None:
    """Leave a sentence for torchrun's table, if it started this process."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        # torchrun shows the call stack in this form; the sentence gets a line of its own.
        text = {"message": sentence, "extraInfo": {"py_callstack": f"\n{sentence}", "timestamp": str(int(time.time()))}}
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": text}), encoding="utf-8")
