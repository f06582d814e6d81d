"""How a run reports, with the checks of these values.

A file of its own: the configuration of a run is read without torch.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ObserveConfig:
    """How a run reports; field `observe` of the configuration."""

    # Draw a progress bar when stdout is a terminal; where there is none, print a line this often.
    progress: bool = True
    console_every_steps: int = 10
    # Offline needs neither account nor network.
    wandb: Literal["off", "offline", "online"] = "offline"
    wandb_project: str = "v3fp8"
    # On the first step and every so many after it, 0 never: FP8 runs sample their operands, all log the routing biases.
    fp8_health_every_steps: int = 50
    bias_every_steps: int = 50
    # Steps in a row without a token after which an expert is reported as dead; 0 never.
    dead_expert_steps: int = 50
    # A rank is reported as slow that works so many times longer than is usual in its pipeline stage, for so many steps
    # (0 never) in a row; docs/reliability.md counts the false alarms.
    straggler_ratio: float = 2.0
    straggler_steps: int = 5
    # A command that gets one line of JSON on stdin when the run needs somebody (`train/observe/alerts.py`); None: none.
    alert_command: str | None = None
    # Seconds without a published checkpoint after which an event says so, and again after as many; 0 never.
    stale_checkpoint_s: float = 7200.0
    # Of one device, FLOP/s, for the MFU; None takes the dense BF16 peak where the device is a known one.
    peak_flops: float | None = None

    def __post_init__(self) -> None:
        if self.console_every_steps < 1:
            raise ValueError(f"console_every_steps is {self.console_every_steps}: it must be at least 1")
        if self.wandb not in ("off", "offline", "online"):
            raise ValueError(f"wandb is {self.wandb!r}: it must be off, offline or online")
        for field in ("fp8_health_every_steps", "bias_every_steps", "dead_expert_steps", "straggler_steps"):
            if getattr(self, field) < 0:
                raise ValueError(f"observe.{field}={getattr(self, field)} is negative: use 1 or more, or 0 for never")
        if not self.straggler_ratio > 1:
            raise ValueError(
                f"observe.straggler_ratio={self.straggler_ratio} must be above 1: give how many times longer than the "
                "others a slow rank works, such as 2; observe.straggler_steps=0 reports none"
            )
        self._check_alerts()
        if self.peak_flops is not None and self.peak_flops <= 0:
            raise ValueError(
                f"observe.peak_flops={self.peak_flops} must be above 0: give FLOP/s of one device, such as 989.4e12, "
                "or null"
            )

    def _check_alerts(self) -> None:
        if not self.stale_checkpoint_s >= 0:
            raise ValueError(f"observe.stale_checkpoint_s={self.stale_checkpoint_s} is negative: use 0 for never")
        if self.alert_command is not None:
            try:
                is_empty = not shlex.split(self.alert_command)
            except ValueError as error:
                raise ValueError(f"observe.alert_command={self.alert_command!r}: {error}") from error
            if is_empty:
                raise ValueError("observe.alert_command is empty: give a command and its arguments, or null for none")

    @staticmethod
    def due(step: int, every_steps: int) -> bool:
        """Whether a step, counted from 1, is the first or one of every `every_steps` after it."""
        return every_steps > 0 and (step - 1) % every_steps == 0
