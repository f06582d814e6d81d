"""Guards of a training loop: numbers that are not finite, dead experts, slow ranks, and being killed mid-step.

    check_consecutive_skips   several steps in a row not finite: skipping no longer helps, the run stops
    DeadExpertGuard           experts without a token for many steps in a row (arXiv:2412.19437 §2.1.2: the routing
                              bias keeps the balance, and an expert that it cannot bring back is lost)
    SpeedGuard                a run that is far slower than it was
    CheckpointAge             a run that would lose too much work now
    StragglerGuard            a rank that is slower than the others for many steps in a row
    TerminationGuard          SIGTERM (a scheduler's notice) or Ctrl-C: finish the step, save, exit 0; before the first
                              step: leave at once, several ranks together

The trainer saves a checkpoint when it sees the exception or the flag.
"""

from __future__ import annotations

import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import median_low
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


class DataRefused(TrainingStopped):
    """Token data were altered after preparing; nothing of the step that met them was applied."""

    exit_code = 2


class AskedToStop(BaseException):
    """A signal came before the first step; there is nothing to save."""


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


@dataclass(frozen=True)
class Straggler:
    """A rank that worked `busy_ms` a step where `usual_ms` was to be expected, as means over `steps` steps."""

    rank: int
    pipeline_rank: int
    data_rank: int
    busy_ms: float
    usual_ms: float
    steps: int


class StragglerGuard:
    """Finds ranks that for `steps` steps in a row work more than `ratio` times longer than is usual; 0 steps: none.

    Usual is the median of a rank's pipeline stage. A rank without others there has its own past share of the work: its
    time over the median of all ranks, since a growing batch makes all of them work longer.
    """

    PAST_STEPS = 100
    LEAST_PAST = 20

    def __init__(self, ratio: float, steps: int) -> None:
        self.ratio, self.steps = ratio, steps
        # By rank: (busy, usual) of its slow steps in a row; of reported ones the quick steps in a row since.
        self._slow: dict[int, list[tuple[float, float]]] = {}
        self._reported: dict[int, int] = {}
        self._past_shares: dict[int, deque[float]] = {}

    def note(self, busy_ms: Sequence[Sequence[float]]) -> list[Straggler]:
        """Take one step's [pipeline][data ranks] times; returns who became slow with it, once until it recovers."""
        if self.steps == 0 or not busy_ms:
            return []
        found, data_ranks = list[Straggler](), len(busy_ms[0])
        for rank, (busy, usual) in enumerate(zip(chain(*busy_ms), self._usual(busy_ms), strict=True)):
            if busy > self.ratio * usual:
                if rank in self._reported:
                    self._reported[rank] = 0
                    continue
                streak = self._slow.setdefault(rank, [])
                streak.append((busy, usual))
                if len(streak) == self.steps:
                    mean_ms, usual_ms = (round(sum(column) / self.steps, 1) for column in zip(*streak, strict=True))
                    found.append(Straggler(rank, *divmod(rank, data_ranks), mean_ms, usual_ms, self.steps))
                    self._reported[rank] = 0
            else:
                self._slow.pop(rank, None)
                if rank in self._reported:
                    self._reported[rank] += 1
                    if self._reported[rank] == self.steps:
                        del self._reported[rank]
        return found

    def _usual(self, busy_ms: Sequence[Sequence[float]]) -> list[float]:
        """What each rank's time is compared with; infinite while it is unknown."""
        if len(busy_ms[0]) > 1:
            return [median_low(stage) for stage in busy_ms for _ in stage]
        usual = []
        times = [stage[0] for stage in busy_ms]
        for rank, busy in enumerate(times):
            others = median_low(times[:rank] + times[rank + 1 :])
            past = self._past_shares.setdefault(rank, deque(maxlen=self.PAST_STEPS))
            usual.append(others * median_low(past) if len(past) >= self.LEAST_PAST else math.inf)
            past.append(busy / max(others, 1e-3))
        return usual


class SpeedGuard:
    """Finds a run below SHARE of its best speed for SLOW_S and SLOW_STEPS; reported once until it has recovered.

    A step may take long by itself: a paused process, a sampled step.
    """

    SHARE, SLOW_S, SLOW_STEPS = 0.25, 20.0, 5
    RECENT_STEPS = 1000

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s, self.best = clock_s, 0.0
        self._recent: deque[float] = deque(maxlen=self.RECENT_STEPS)
        # When the slow steps in a row began and how many they are.
        self._since_s, self._steps, self._is_reported = 0.0, 0, False

    @property
    def median(self) -> float | None:
        """Of the last steps, tokens/s."""
        return median_low(self._recent) if self._recent else None

    def note(self, tokens_per_s: float) -> bool:
        """Take a step's speed; returns whether the run has become slow with it."""
        self._recent.append(tokens_per_s)
        self.best, now_s = max(self.best, tokens_per_s), self._clock_s()
        if tokens_per_s >= self.SHARE * self.best:
            self._since_s, self._steps, self._is_reported = now_s, 0, False
            return False
        self._steps += 1
        is_slow = now_s - self._since_s >= self.SLOW_S and self._steps >= self.SLOW_STEPS
        is_new, self._is_reported = is_slow and not self._is_reported, is_slow or self._is_reported
        return is_new


class CheckpointAge:
    """How long no checkpoint was published, on a clock that suspension stops; once every `limit_s`, 0 never."""

    def __init__(self, limit_s: float, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._limit_s, self._clock_s = limit_s, clock_s
        self.published()

    def published(self) -> None:
        """A checkpoint was; or nothing has been trained yet."""
        self._since_s, self._reports = self._clock_s(), 0

    def note(self) -> float | None:
        """The age in seconds, where it has reached a multiple of the limit."""
        age_s = self._clock_s() - self._since_s
        if not self._limit_s or age_s < self._limit_s * (self._reports + 1):
            return None
        self._reports = int(age_s / self._limit_s)
        return age_s


class TerminationGuard:
    """Context manager, of the main thread: `requested` becomes True on SIGTERM or the first SIGINT.

    Inside another one it knows what that one has received. One that `interrupts` raises AskedToStop where the signal
    finds it, until one that does not is entered inside: from then on there may be something to finish.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)
    # A terminal sends Ctrl-C to torchrun and to its workers, and torchrun sends it to them again.
    ECHO_S = 2.0

    def __init__(self, *, interrupts: bool = False) -> None:
        self.interrupts = interrupts
        self.received: signal.Signals | None = None
        self._received_s = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether the loop should finish its step, save and leave."""
        return self.received is not None

    def __enter__(self) -> TerminationGuard:
        self._previous = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        outer = getattr(self._previous[signal.SIGTERM], "__self__", None)
        if isinstance(outer, TerminationGuard):
            outer.interrupts = False
            # It may have come meanwhile.
            if self.received is None:
                self.received, self._received_s = outer.received, outer._received_s
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            # None is a handler that was not installed from Python; it cannot be given back by name.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        # What comes after, such as a look at the held-out score, was not asked to stop.
        self.received = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # A second Ctrl-C interrupts at once.
        is_second = number == signal.SIGINT and self.received == signal.SIGINT
        if is_second and time.monotonic() - self._received_s > self.ECHO_S:
            raise KeyboardInterrupt
        if not is_second:
            self._received_s = time.monotonic()
        self.received = signal.Signals(number)
        if self.interrupts:
            raise AskedToStop
