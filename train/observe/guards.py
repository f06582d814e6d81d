"""Two guards of a training loop: one against numbers that are not finite, one against being killed mid-step.

NonFiniteGuard counts the steps whose loss or gradient is not finite. The trainer skips such a step; after
several in a row skipping no longer helps and the guard stops the run with `TrainingStopped`, so that a
person looks at it.

TerminationGuard turns SIGTERM (a scheduler's notice) and the first Ctrl-C into a flag that the loop reads
between steps: the step in flight is finished, a checkpoint is saved, the process exits 0. A second Ctrl-C
interrupts at once.

Neither guard saves anything: the trainer does, on seeing the exception or the flag.
"""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any


class TrainingStopped(RuntimeError):
    """The run cannot usefully go on; the message says why and what to try."""


class NonFiniteGuard:
    """Counts skipped steps and stops the run after `max_consecutive` in a row.

    Attributes:
        skipped_steps: skipped since the run began, over all its processes.
        consecutive_skips: length of the current row.
    """

    def __init__(self, max_consecutive: int, *, skipped_steps: int = 0, consecutive_skips: int = 0) -> None:
        if max_consecutive < 1:
            raise ValueError(f"max_consecutive is {max_consecutive}: it must be at least 1")
        self.max_consecutive = max_consecutive
        self.skipped_steps = skipped_steps
        self.consecutive_skips = consecutive_skips

    def observe(self, finite: bool, step: int) -> None:
        """Take note of one step.

        Args:
            finite: whether the step's loss and gradient norm were finite.
            step: the step's number, for the message.
        Raises:
            TrainingStopped: this was the `max_consecutive`-th step in a row that was not finite.
        """
        if finite:
            self.consecutive_skips = 0
            return
        self.skipped_steps += 1
        self.consecutive_skips += 1
        if self.consecutive_skips >= self.max_consecutive:
            raise TrainingStopped(
                f"step {step}: loss or gradient was not finite {self.consecutive_skips} steps in a row "
                f"(limit {self.max_consecutive}). Look at the last losses in metrics.jsonl, then "
                f"start a new run with a lower learning rate, or with precision=bf16 to learn whether FP8 is the cause."
            )


class TerminationGuard:
    """Context manager: `requested` becomes True on SIGTERM or the first SIGINT; old handlers return on exit.

    Use it in the main thread only, as Python delivers signals there.
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
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            # None stands for a handler that was not installed from Python; it cannot be given back by name.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
