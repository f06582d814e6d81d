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
    keep: int = 2  # published checkpoints that are kept; two, so one survives damage to the other
    asynchronous: bool = True  # write in the background while training goes on
    max_failed_saves: int = 3  # in a row; so many end the run, fewer (a full disk for a while) do not

    def __post_init__(self) -> None:
        for name in ("every_steps", "keep", "max_failed_saves"):
            value = getattr(self, name)
            if not value >= 1:
                raise ValueError(f"checkpoint.{name} = {value} must be at least 1")
