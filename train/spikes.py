"""Whether a step's loss belongs to the run: skip it, go back to the last good checkpoint, leave out the data around it.

    score    z of the loss, and of the log of the gradient's norm, among the last `window_steps` applied steps:
             (value - median) / sigma, with sigma = max(1.4826 MAD, (95 % quantile - median) / 1.645, floor).
             Both estimate a normal's deviation; the second one grows where the upper tail is heavy.
    spike    z of the loss >= `loss_z`; or z of the norm >= `norm_z` with either half of that in the loss or a norm
             `norm_ratio` times the median. Lone jumps of the norm are ordinary, and clipping takes care of them.
    ladder   spike -> the step is skipped; `max_skips` of them in a row -> the run goes back to the last good
             checkpoint without the batches around the spikes, wider each time; `max_rollbacks` in a row -> it stops
    slow     the median of the window rises `max_rise` above its lowest so far: it stops, since no batch is to blame
    good     a checkpoint after which `good_after_steps` steps stayed in the band and near the lowest median

Everything is decided from numbers that are equal on all ranks and from the state, which every checkpoint keeps; so a
resumed run decides as the unbroken one. docs/reliability.md has the counts of false alarms.

Source: ours; going back and leaving data out is PaLM's remedy (arXiv:2204.02311 §5.1).
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from statistics import median
from typing import Any

from train.data.windows import Windows, union

# Nats, and the norm's natural logarithm: where the window is quieter, its deviation counts as this.
LOSS_FLOOR, NORM_FLOOR = 0.05, 0.1
# Applied steps before the first score.
LEAST_HISTORY = 8
# Batches left out on either side of the spikes at the first rollback; four times as many at each further one.
MARGIN_BATCHES, WIDENING = 1, 4


@dataclass(frozen=True)
class SpikeConfig:
    """Thresholds of the policy; field `spikes` of the configuration."""

    window_steps: int = 64  # applied steps that a step is compared with; 0 switches the policy off
    loss_z: float = 8.0
    norm_z: float = 8.0
    norm_ratio: float = 100.0
    max_rise: float = 0.5  # nats
    max_skips: int = 3
    max_rollbacks: int = 3
    good_after_steps: int = 5

    def __post_init__(self) -> None:
        if self.window_steps and self.window_steps < LEAST_HISTORY:
            raise ValueError(
                f"spikes.window_steps = {self.window_steps} is too short: {LEAST_HISTORY} or more, or 0 for no policy"
            )
        for name in ("loss_z", "norm_z", "norm_ratio", "max_rise"):
            if not getattr(self, name) > 0:
                raise ValueError(f"spikes.{name} = {getattr(self, name)} must be above 0")
        for name, least in {"max_skips": 1, "max_rollbacks": 0, "good_after_steps": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"spikes.{name} = {getattr(self, name)} must be at least {least}")


@dataclass(frozen=True)
class Applied:
    """A step of the history."""

    position: int  # of its first sequence in the order of the data
    loss: float
    log_norm: float


@dataclass(frozen=True)
class Score:
    """How far a step is from those before it."""

    loss_z: float
    norm_z: float
    is_spike: bool


@dataclass(frozen=True)
class SpikeState:
    """What the policy knows; kept in every checkpoint."""

    history: tuple[Applied, ...] = ()  # applied steps, the newest last
    lowest_median: float | None = None  # of the loss over a full window
    in_a_row: int = 0  # spikes up to now
    first_skipped: int = 0  # step after the last applied one, if it was skipped; 0: none was
    candidate: int = 0  # step of a checkpoint after which every step was in the band, but too few yet; 0: none
    good_step: int = 0  # of the newest checkpoint known to be good; 0: none
    rollbacks: int = 0  # in a row, without a good checkpoint since
    rolled_back_to: int = 0  # step of the last one
    left_at: int = 0  # the furthest step at which one of them began
    dropped: Windows = ()  # positions left out of the data order

    def score(self, config: SpikeConfig, *, loss: float, norm: float) -> Score | None:
        """Compare one finite step with the history; None where there is too little, or no policy."""
        if not config.window_steps or len(self.history) < LEAST_HISTORY:
            return None
        log_norm = _log(norm)
        loss_z = _upward_z(loss, [each.loss for each in self.history], LOSS_FLOOR)
        norms = [each.log_norm for each in self.history]
        norm_z = _upward_z(log_norm, norms, NORM_FLOOR)
        is_huge = log_norm - median(norms) >= math.log(config.norm_ratio)
        supported = norm_z >= config.norm_z and (loss_z >= config.loss_z / 2 or is_huge)
        return Score(loss_z, norm_z, loss_z >= config.loss_z or supported)

    def after_applied(self, config: SpikeConfig, *, position: int, loss: float, norm: float) -> SpikeState:
        """The state after a step in the band."""
        state = replace(self, in_a_row=0, first_skipped=0)
        if not config.window_steps:
            return state
        history = (*self.history, Applied(position, loss, _log(norm)))[-config.window_steps :]
        state = replace(state, history=history)
        if len(history) < config.window_steps:
            return state
        level = median(each.loss for each in history)
        lowest = level if state.lowest_median is None else min(level, state.lowest_median)
        is_low = level - lowest <= config.max_rise / 2
        return replace(state, lowest_median=lowest, candidate=state.candidate if is_low else 0)

    def after_skipped(self, *, step: int, is_spike: bool) -> SpikeState:
        """The state after a step that was not applied: a spike, or not finite."""
        return replace(self, in_a_row=self.in_a_row + is_spike, first_skipped=self.first_skipped or step, candidate=0)

    def has_risen(self, config: SpikeConfig) -> bool:
        """Whether the loss has slowly left its lowest level for good."""
        if self.lowest_median is None:
            return False
        return median(each.loss for each in self.history) - self.lowest_median > config.max_rise

    def after_save(self, step: int) -> SpikeState:
        """The state that the due checkpoint of `step` keeps; a stop's is no candidate: an unbroken run has none."""
        return replace(self, candidate=self.candidate or step)

    def stay(self, step: int) -> Container[int]:
        """Steps of checkpoints that a save of `step` must not prune."""
        if self.first_skipped:
            # Which of them is the last from before is known when an update is in the band again.
            return range(step)
        return {self.good_step, self.candidate, self.rolled_back_to if self.rollbacks else 0}

    def proven(self, config: SpikeConfig, *, step: int) -> SpikeState:
        """The state at the end of `step`, when a checkpoint may have become good."""
        if not self.candidate or step - self.candidate < config.good_after_steps:
            return self
        # Not before the trouble was passed: else a run whose fault comes back at the same step would go back for ever.
        rollbacks = 0 if self.candidate >= self.left_at else self.rollbacks
        return replace(self, candidate=0, good_step=self.candidate, rollbacks=rollbacks)

    def rolled_back(
        self, saved: SpikeState, *, left_at: int, step: int, resumes_at: int, spike_end: int, batch_sequences: int
    ) -> SpikeState:
        """The state after going back.

        Args:
            saved: that of the checkpoint.
            left_at: step of the last spike.
            step: of the checkpoint.
            resumes_at: position in the data order at which its next step begins.
            spike_end: position after the last batch with a spike.
            batch_sequences: of the step with that spike.
        """
        margin = MARGIN_BATCHES * WIDENING**self.rollbacks
        positions = [each.position for each in self.history]
        first = max(positions[-min(margin, len(positions))], resumes_at)
        end = spike_end + margin * batch_sequences
        dropped = union((*saved.dropped, *self.dropped, (first, end - first)))
        return replace(
            saved,
            in_a_row=0,
            first_skipped=0,
            candidate=step,
            good_step=0,
            rollbacks=self.rollbacks + 1,
            rolled_back_to=step,
            left_at=max(left_at, self.left_at),
            dropped=dropped,
        )

    def to_json(self) -> dict[str, Any]:
        """Inverse of `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Any) -> SpikeState:
        """Inverse of `to_json`; None, of a checkpoint without it, is an empty one.

        Raises:
            ValueError: a field is missing, unknown or of another kind.
        """
        if values is None:
            return cls()
        try:
            history = tuple(Applied(**each) for each in values["history"])
            dropped = tuple((first, count) for first, count in values["dropped"])
            state = cls(**values | {"history": history, "dropped": dropped})
            lowest = state.lowest_median
            numbers = [number for each in history for number in (each.loss, each.log_norm)]
            counts = [getattr(state, field.name) for field in fields(cls) if field.type == "int"]
            counts += [each.position for each in history] + [number for window in dropped for number in window]
            whole = all(type(count) is int and 0 <= count < 2**62 for count in counts)
            numbers += [] if lowest is None else [lowest]
            if (
                not whole
                or not all(type(x) is float and math.isfinite(x) for x in numbers)
                or union(dropped) != dropped
            ):
                raise ValueError
        except (TypeError, KeyError, ValueError):
            raise ValueError("has a 'spikes' that no run writes") from None
        return state


def rollback_order(steps: Iterable[int], state: SpikeState, *, every_steps: int) -> list[int]:
    """Checkpoints to go back to, the best first: the good one, else those before the spikes; older ones after them.

    One that was gone back to without success comes later, then one that was not due but made by a stop: an unbroken
    run has none. Last come those between the good one and the spikes, for the case that all others are damaged.
    """
    steps = set(steps)
    before = state.first_skipped - 1 if state.in_a_row else 0
    limit = state.good_step if state.good_step in steps else before

    def rank(step: int) -> tuple[bool, bool, bool, int]:
        failed = state.rollbacks > 0 and step >= state.rolled_back_to
        return step > limit, step % every_steps > 0, failed, -step

    return sorted((step for step in steps if step <= max(limit, before)), key=rank)


def _log(norm: float) -> float:
    return math.log(max(norm, 1e-30))


def _upward_z(value: float, history: Sequence[float], floor: float) -> float:
    middle = median(history)
    deviation = 1.4826 * median(abs(each - middle) for each in history)
    high = sorted(history)[min(len(history) - 1, math.ceil(0.95 * len(history)))]
    return (value - middle) / max(deviation, (high - middle) / 1.645, floor)
