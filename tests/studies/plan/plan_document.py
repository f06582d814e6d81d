"""A small plan as the planner writes it, with round numbers, for the tests of what is read of one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MEMORY = {
    "weights": 1000, "fp8_copies": 500, "gradients": 2000, "masters": 1600, "moments": 1200, "activations": 700,
    "messages": 100, "temporaries": 150, "dispatch": 50, "reserved": 400,
}  # fmt: skip


def plan_document(run: Mapping[str, Any], candidate: Mapping[str, Any]) -> dict[str, Any]:
    """A step of 2 s: 1.5 s of chunks, 0.3 s of bubble, 0.2 s of update; in the ramp one of half the batch, 1.25 s."""
    phases = {"1F": 0.25, "1B": 0.5, "1W": 0.25, "1F1B": 0.5, "bubble": 0.3, "update": 0.2}
    early = phases | {"1F1B": 0.0, "bubble": 0.05}
    return {
        "version": 1,
        "date": "2026-11-30",
        "name": "by hand",
        "run": dict(run),
        # A run of one rank does not say what it has no use for.
        "candidate": {"schedule": "1F1B", "comm_sms": 20, **candidate},
        "step": {"time_s": 2.0, "phases_s": phases},
        "ramp": [{"batch_sequences": run["batch_sequences"] // 2, "time_s": 1.25, "phases_s": early}],
        "memory": {"ranks": [{"pp_rank": 0, "rank": 0, "components": MEMORY, "total_bytes": sum(MEMORY.values())}]},
    }
