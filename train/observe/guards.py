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
from pathlib import Path
from types import FrameType
from typing import Any


class TrainingStopped(RuntimeError):
    """The run cannot usefully go on; the message says why and what to try."""

    exit_code = 3


class SavesFailed(TrainingStopped):
    """Nothing can be saved any more."""

    exit_code = 4


class Diverged(TrainingStopped):
    """The loss left its band and did not come back. All checkpoints are as they were."""

    exit_code = 5


def check_consecutive_skips(skips: int, *, limit: int, step: int) -> None:
    """Raise TrainingStopped when `skips` steps in a row, up to `step`, have reached `limit`."""
    if skips >= limit:
        raise TrainingStopped(
            f"step {step}: loss or gradient was not finite {skips} steps in a row (limit {limit}). Look at the last "
            "losses in metrics.jsonl, then start a new run with a lower learning rate, or with precision=bf16 to learn "
            "whether FP8 is the cause."
        )


def check_any_applied(step: int, *, updates: int, ended: bool) -> None:
    """Raise TrainingStopped at the end of a run of `step` steps of which none was applied."""
    if ended and step and not updates:
        raise TrainingStopped(
            f"step {step}: the token budget is spent and no step was ever applied: loss or gradient was never finite. "
            "Nothing was trained. Start a new run with a lower learning rate, or with precision=bf16."
        )


def diverged(step: int, path: Path | None, *, rollbacks: int, rises: bool) -> Diverged:
    """What to raise where going back cannot help; `path` is the last checkpoint from before."""
    if rises:
        cause = "the loss has risen slowly, by more than spikes.max_rise above its lowest level"
    elif path is None:
        cause = "the loss left its band, and there is no checkpoint from before to go back to"
    else:
        cause = f"the loss left its band again after {rollbacks} rollbacks in a row (spikes.max_rollbacks)"
    left = f"The last checkpoint from before is {path}; to go on from it, move the later ones away. " if path else ""
    return Diverged(
        f"step {step}: {cause}. {left}Lower schedule.lr_peak or look at the data at the logged positions; if such a "
        "loss is right for this data, raise spikes.loss_z or set spikes.window_steps=0."
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
