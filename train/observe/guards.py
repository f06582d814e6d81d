"""Guards of a training loop: against numbers that are not finite, experts that die, and being killed mid-step.

    check_consecutive_skips   several steps in a row not finite: skipping no longer helps, the run stops
    DeadExpertGuard           experts without a token for many steps in a row (arXiv:2412.19437 §2.1.2: the routing
                              bias keeps the balance, and an expert that it cannot bring back is lost)
    TerminationGuard          SIGTERM (a scheduler's notice) or Ctrl-C: finish the step, save, exit 0

The trainer saves a checkpoint when it sees the exception or the flag.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable
from types import FrameType
from typing import Any


class TrainingStopped(RuntimeError):
    """The run cannot usefully go on; the message says why and what to try."""

    exit_code = 3


class SavesFailed(TrainingStopped):
    """Nothing can be saved any more."""

    exit_code = 4


def check_consecutive_skips(skips: int, *, limit: int, step: int) -> None:
    """Raise TrainingStopped when `skips` steps in a row, up to `step`, have reached `limit`."""
    if skips >= limit:
        raise TrainingStopped(
            f"step {step}: loss or gradient was not finite {skips} steps in a row (limit {limit}). Look at the last "
            "losses in metrics.jsonl, then start a new run with a lower learning rate, or with precision=bf16 to learn "
            "whether FP8 is the cause."
        )


class DeadExpertGuard:
    """Counts for each expert the steps in a row without a token; `limit` of them make it dead, 0 never does."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        # Of this process: an expert that stays dead is reported once more, `limit` steps after a resume.
        self._idle_steps: dict[tuple[int, int], int] = {}

    def note(self, idle: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """Take one step's idle (layer id, expert) pairs; returns those whose `limit`-th such step in a row this was."""
        self._idle_steps = {expert: self._idle_steps.get(expert, 0) + 1 for expert in idle}
        return sorted(expert for expert, steps in self._idle_steps.items() if steps == self.limit)


class TerminationGuard:
    """Context manager, of the main thread: `requested` becomes True on SIGTERM or the first SIGINT.

    Inside another one it knows what that one has received.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether the loop should finish its step, save and leave."""
        return self.received is not None

    def __enter__(self) -> TerminationGuard:
        self._previous = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        outer = getattr(self._previous[signal.SIGTERM], "__self__", None)
        if isinstance(outer, TerminationGuard):
            self.received = outer.received
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            # None is a handler that was not installed from Python; it cannot be given back by name.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # A second Ctrl-C interrupts at once.
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
