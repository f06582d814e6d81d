"""How long this rank works in each phase of a step, without waiting for others: by that a slow rank is known.

In a synchronous step all ranks take equally long; the slow one waits least for the others' messages.

    busy = wall time of the phase - time in `waiting()` + time in `working()`, which stands inside a `waiting()`

On a CPU a message blocks the host. Time in which the thread could run but got no core does not count, where the kernel
says how long that was (Linux): a machine that is busy with other work makes no rank slow, a rank that sleeps or reads
a slow disk is. On a GPU the host does not block: events on its stream bound the same sections and are read when the
host has waited for the phase anyway. Then a host that is late with its launches counts as busy.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import ClassVar

import torch


class BusyTime:
    """Measures one step after another; `waiting` and `working` add to the one that was started last."""

    measured: ClassVar[BusyTime | None] = None

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.walls_s: list[float] = []  # of the phases of the last step, waiting included
        self._began_s = self._wall_began_s = 0.0
        self._phases_s: list[float] = []
        # (sign, begin, end) of each section of the phase.
        self._sections: list[tuple[int, float | torch.cuda.Event, float | torch.cuda.Event]] = []

    def start(self) -> None:
        """Begin a step and its first phase."""
        BusyTime.measured = self
        self._phases_s, self.walls_s = [], []
        self._sections.clear()
        self._began_s, self._wall_began_s = self._host_s(), time.perf_counter()

    def end_phase(self) -> None:
        """Begin the next phase; the device has finished this one."""
        ended_s, wall_ended_s = self._host_s(), time.perf_counter()
        waited_s = sum(sign * _seconds(begin, end) for sign, begin, end in self._sections)
        self._phases_s.append(ended_s - self._began_s - waited_s)
        self.walls_s.append(wall_ended_s - self._wall_began_s)
        self._sections.clear()
        self._began_s, self._wall_began_s = ended_s, wall_ended_s

    def stop(self) -> list[float]:
        """End the step and its last phase; seconds that this rank was busy in each."""
        self.end_phase()
        BusyTime.measured = None
        return self._phases_s

    @contextmanager
    def section(self, sign: int) -> Iterator[None]:
        """Subtract (sign 1) or add again (-1) the time of a block."""
        begin = self._mark()
        yield
        self._sections.append((sign, begin, self._mark()))

    def _mark(self) -> float | torch.cuda.Event:
        if self.device.type != "cuda":
            return self._host_s()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _host_s(self) -> float:
        # The device's own work goes on while the host has no core.
        return time.perf_counter() - (0.0 if self.device.type == "cuda" else without_core_s())


@contextmanager
def waiting() -> Iterator[None]:
    """A block in which this rank waits for others."""
    with nullcontext() if BusyTime.measured is None else BusyTime.measured.section(1):
        yield


@contextmanager
def working() -> Iterator[None]:
    """A block of work inside a `waiting`, in which there may be another `waiting`."""
    with nullcontext() if BusyTime.measured is None else BusyTime.measured.section(-1):
        yield


def without_core_s() -> float:
    """Seconds in which this thread was ready to run but had no core, since it began; 0 where the kernel hides it."""
    file = _schedstat(threading.get_native_id())
    # Fields: ns on a core, ns in the queue for one, turns.
    return 0.0 if file is None else int(os.pread(file, 64, 0).split()[1]) * 1e-9


@cache
def _schedstat(thread: int) -> int | None:
    """An open file, for reading costs a tenth of opening."""
    try:
        return os.open(f"/proc/self/task/{thread}/schedstat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None


def _seconds(begin: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(begin, float):
        assert isinstance(end, float)
        return end - begin
    assert isinstance(end, torch.cuda.Event)
    return float(begin.elapsed_time(end)) / 1e3
