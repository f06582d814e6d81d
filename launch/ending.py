"""How a process of a run ends: at once while it starts alone; its last sentence in torchrun's report.

torchrun prints its table of failures after all that its workers have said. The table ends with the cause, which
torchrun reads from a file that it names to each worker: a sentence left there is the last that a user reads.
"""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import ExitStack, suppress
from pathlib import Path

from train.observe.guards import TerminationGuard

STOPPED = "pretrain: asked to stop before the first step: nothing was trained; the same command starts\n"
# The handlers of the start, in force until the run's own are; `main` takes them away.
EARLY = ExitStack()


def trains(arguments: list[str]) -> bool:
    """Whether a command line asks for training; any other one has nothing to save, and dies by a signal."""
    plans = [argument.lower() for argument in arguments if argument.lstrip("+").startswith("dry_run=")]
    is_plan = bool(plans) and not plans[-1].endswith(("=false", "=no", "=off", "=0"))
    return not (is_plan or {"-h", "--help", "--config"} & set(arguments))


def handle_early(arguments: list[str]) -> None:
    """Handle signals during the start: a process alone leaves at once, for another one the others would wait."""
    if not trains(arguments):
        return
    if os.environ.get("WORLD_SIZE", "1") != "1":
        EARLY.enter_context(TerminationGuard())
        return
    for number, default in ((signal.SIGTERM, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
        signal.signal(number, _leave_at_once)
        EARLY.callback(signal.signal, number, default)


def _leave_at_once(*_: object) -> None:
    os.write(2, STOPPED.encode())
    os._exit(0)


def tell_launcher(sentence: str) -> None:
    """Leave a sentence for torchrun's table, if it started this process."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        # torchrun shows the call stack in this form; the sentence gets a line of its own.
        text = {"message": sentence, "extraInfo": {"py_callstack": f"\n{sentence}", "timestamp": str(int(time.time()))}}
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": text}), encoding="utf-8")
