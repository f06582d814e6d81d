"""Where a run's tokens come from and how they become samples, with the checks of these values.

A file of its own: the configuration of a run is read without torch and numpy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from and how they become samples; stores are folders."""

    store: str
    heldout: str | None = None
    sequence_length: int = 4096  # targets of one sample, tokens
    fim_rate: float = 0.1  # share of documents rearranged for fill-in-the-middle (arXiv:2412.19437 §4.1)
    mask_documents: bool = False  # whether document ids limit attention; not in V3's pre-training
    # Windows of text, every token a target; or whole conversations, with a loss on what the assistant says.
    samples: Literal["windows", "conversations"] = "windows"
    # A sample whose data were altered after preparing ends the run, or is left out of the data order.
    on_damage: Literal["refuse", "quarantine"] = "refuse"

    def __post_init__(self) -> None:
        if self.sequence_length < 1:
            raise ValueError(f"data.sequence_length: {self.sequence_length} is not positive; set it to 1 or more")
        if not 0.0 <= self.fim_rate <= 1.0:
            raise ValueError(f"data.fim_rate: {self.fim_rate} is not a share; set it between 0 and 1")
        if self.samples == "conversations" and (self.fim_rate or not self.mask_documents):
            raise ValueError(
                f"data.samples=conversations are kept apart and never rearranged, but data.mask_documents="
                f"{self.mask_documents} and data.fim_rate={self.fim_rate}: set data.mask_documents=true and "
                "data.fim_rate=0"
            )
