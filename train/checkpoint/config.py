"""When a run saves and how much it keeps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save and how much to keep; field `checkpoint` of the configuration.

    Args:
        every_steps: optimizer steps between two checkpoints.
        keep: published checkpoints that are kept; two, so one survives damage to the other.
        asynchronous: write in the background while training goes on.
    """

    every_steps: int
    keep: int = 2
    asynchronous: bool = True

    def __post_init__(self) -> None:
        for name in ("every_steps", "keep"):
            value = getattr(self, name)
            if not value >= 1:
                raise ValueError(f"checkpoint.{name} = {value} must be at least 1")
