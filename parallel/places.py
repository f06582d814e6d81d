"""Where this process is, and whether it waits there for other ranks: by that a hang is attributed to its rank.

When one rank stops, all others wait in collectives for it, and theirs are the errors. Python's stacks tell them apart:
a rank that waits is inside `torch.distributed`, or at a line that waits for the device; the one they wait for is not.
"""

from __future__ import annotations

import linecache
import sys
import threading
from pathlib import Path
from types import FrameType

# At such a line of ours the host waits for a collective or for the device, which may wait for one.
_WAITING_WORDS = (".wait(", ".tolist()", ".item()", "synchronize(", ".cpu()")
_WAITING_MODULES = ("torch.distributed", "parallel.watchdog", "parallel.consensus")


def place_of_main_thread() -> tuple[str, bool]:
    """'file:line in function' of the innermost Python line, and whether this process waits for others."""
    frames = sys._current_frames()
    main = frames.get(threading.main_thread().ident or 0)
    if main is None:
        return "", False
    code = main.f_code
    where = f"{'/'.join(Path(code.co_filename).parts[-2:])}:{main.f_lineno} in {code.co_name}"
    if waits_for_others(main):
        return where, True
    # Backward of a GPU runs in threads of autograd, which `threading` does not know.
    known = {thread.ident for thread in threading.enumerate()}
    backward = (frame for ident, frame in frames.items() if ident not in known)
    return where, module_of(main).startswith("torch.autograd") and any(map(waits_for_others, backward))


def waits_for_others(frame: FrameType | None) -> bool:
    """Whether a stack's innermost lines, up to the first of our own code, wait for other ranks."""
    while frame is not None:
        if module_of(frame).startswith(_WAITING_MODULES):
            return True
        if not module_of(frame).startswith(("torch.", "threading")):
            # Python 3.11 has no line for some instructions.
            line = linecache.getline(frame.f_code.co_filename, frame.f_lineno or 0)
            return any(word in line for word in _WAITING_WORDS)
        frame = frame.f_back
    return False


def module_of(frame: FrameType) -> str:
    """Name of the module whose code a frame runs."""
    return str(frame.f_globals.get("__name__", ""))
