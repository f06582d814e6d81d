"""Guards of a training loop: against numbers that are not finite, experts that die, and being killed mid-step.

The trainer skips and counts a step whose loss or gradient is not finite. After several in a row skipping no longer
helps: `check_consecutive_skips` stops the run with `TrainingStopped`, so that a person looks at it.

DeadExpertGuard says which experts have had no token for many steps in a row (arXiv:2412.19437 §2.1.2: balance is kept
by the routing bias, and an expert that it cannot bring back is lost). It counts the steps of this process: a resumed
run begins at zero, so an expert that stays dead is told of again, once, that many steps after the resume.

TerminationGuard turns SIGTERM (a scheduler's notice) and the first Ctrl-C into a flag that the loop reads
between steps: the step in flight is finished, a checkpoint is saved, the process exits 0. A second Ctrl-C
interrupts at once.

No guard saves anything: the trainer does, on seeing the exception or the flag.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable
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


class DeadExpertGuard:
    """Counts for each expert the steps in a row without a token.

    Args:
        limit: so many steps make an expert dead; 0 never does.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._idle_steps: dict[tuple[int, int], int] = {}

    def note(self, idle: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """Take one step's idle experts.

        Args:
            idle: (layer id, expert) of each expert without a token in this step.
        Returns:
            Those whose `limit`-th such step in a row this was; each is told once until it gets a token again.
        """
        self._idle_steps = {expert: self._idle_steps.get(expert, 0) + 1 for expert in idle}
        return sorted(expert for expert, steps in self._idle_steps.items() if steps == self.limit)


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
