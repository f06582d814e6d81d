"""Two guards of a training loop: one against numbers that are not finite, one against being killed mid-step.

The trainer skips and counts a step whose loss or gradient is not finite. After several in a row skipping no longer
helps: `check_consecutive_skips` stops the run with `TrainingStopped`, so that a person looks at it.

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


def check_consecutive_skips(skips: int, *, limit: int, step: int) -> None:
    """Stop a run that no longer takes a step.

    Args:
        skips: steps skipped in a row up to now, this one included (`TrainState.consecutive_skips`).
        limit: so many in a row are too many.
        step: the last step, for the message.
    Raises:
        TrainingStopped: `skips` has reached `limit`.
    """
    if skips >= limit:
        raise TrainingStopped(
            f"step {step}: loss or gradient was not finite {skips} steps in a row (limit {limit}). Look at the last "
            "losses in metrics.jsonl, then start a new run with a lower learning rate, or with precision=bf16 to learn "
            "whether FP8 is the cause."
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
