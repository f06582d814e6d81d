"""Where a run stands: the few integers from which everything else follows.

Every schedule is a pure function of (step, tokens seen), the data order one of (seed, position).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from reprlib import repr as short
from typing import Any


@dataclass(frozen=True)
class TrainState:
    """Counters of a run, as `state.json` keeps them."""

    step: int = 0  # optimizer steps taken, skipped ones included
    tokens_seen: int = 0  # input tokens of the main model
    sequences_seen: int = 0  # position in the data order
    skipped_steps: int = 0  # steps that were not applied: loss or gradient not finite, or a spike
    consecutive_skips: int = 0  # not finite

    @property
    def updates(self) -> int:
        """Optimizer updates applied: the t of Adam's bias correction."""
        return self.step - self.skipped_steps

    def advance(self, *, sequences: int, tokens: int, finite: bool, applied: bool) -> TrainState:
        """The state after one more step, with finite loss and gradients or not, applied or skipped."""
        return replace(
            self,
            step=self.step + 1,
            tokens_seen=self.tokens_seen + tokens,
            sequences_seen=self.sequences_seen + sequences,
            skipped_steps=self.skipped_steps + (not applied),
            consecutive_skips=0 if finite else self.consecutive_skips + 1,
        )

    def to_json(self) -> dict[str, int]:
        """Inverse of `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Any) -> TrainState:
        """Inverse of `to_json`; a ValueError names a field that is missing, unknown or no count."""
        names = [field.name for field in fields(cls)]
        if not isinstance(values, dict) or sorted(values) != sorted(names):
            raise ValueError(f"lacks 'train_state' with the fields {', '.join(names)}")
        if wrong := [name for name in names if type(values[name]) is not int or not 0 <= values[name] < 2**62]:
            raise ValueError(f"has train_state.{wrong[0]} = {short(values[wrong[0]])}, which is no count")
        return cls(**values)
