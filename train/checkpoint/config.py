"""When a run saves and how much it keeps, with the checks of these values.

A file of its own: the configuration of a run is read without importing torch's distributed checkpoints, which takes as
long as importing torch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save and how much to keep; field `checkpoint` of the configuration."""

    every_steps: int  # optimizer steps between two checkpoints
    # Published checkpoints that are kept; two, so one survives damage to the other. The newest good one stays too.
    keep: int = 2
    keep_every_steps: int = 0  # those of every so many steps stay for good; 0: none
    asynchronous: bool = True  # write in the background while training goes on
    max_failed_saves: int = 3  # in a row; so many end the run, fewer (a full disk for a while) do not

    def __post_init__(self) -> None:
        for name in ("every_steps", "keep", "max_failed_saves"):
            value = getattr(self, name)
            if not value >= 1:
                raise ValueError(f"checkpoint.{name} = {value} must be at least 1")
        if self.keep_every_steps < 0 or self.keep_every_steps % self.every_steps:
            raise ValueError(
                f"checkpoint.keep_every_steps = {self.keep_every_steps} must be a multiple of checkpoint.every_steps = "
                f"{self.every_steps}, or 0 for none"
            )
