"""What a run began from, as its card and its checkpoints say it: a checkpoint, what that had seen, its own beginning.

    began_from: {path, run, step, tokens_seen, store, began_from: {...}}       of a Hugging Face folder the path alone

The record travels in the state of each checkpoint, so a chain of stages is known when the first runs are gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

BEGAN_FROM = "began_from"


def lineage(path: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a run that begins with the weights at `path`; `state`: saved with them, or nothing."""
    config, seen = state.get("config", {}), state.get("train_state", {})
    known = {
        "run": config.get("run", {}).get("name"),
        "step": seen.get("step"),
        "tokens_seen": seen.get("tokens_seen"),
        "store": config.get("data", {}).get("store"),
        BEGAN_FROM: state.get(BEGAN_FROM),
    }
    return {"path": str(path)} | {name: value for name, value in known.items() if value is not None}
