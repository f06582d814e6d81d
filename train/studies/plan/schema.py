"""What a plan document must hold, so that a damaged or foreign one is one sentence and not a page of holes.

`SHAPE` names what its readers need; a document may hold more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

VERSION = 1
KINDS = {"F": "forward", "B": "backward", "I": "backward, input part", "W": "backward, weight part"}
LABELS = ("measured", "published", "modelled", "counted")
_NUMBER = int | float
_TOTALS = {"gpu_hours_per_trillion": _NUMBER, "gpu_hours": _NUMBER, "days": _NUMBER, "dollars": _NUMBER}
_HELD_OUT = {"name": str, "published": _NUMBER, "modelled": _NUMBER, "error": _NUMBER, "source": str}
_PART = {"what": str, "tokens": _NUMBER, "modelled_gpu_hours": _NUMBER, "corrected_gpu_hours": _NUMBER}
_RANK = {"pp_rank": int, "rank": int, "holds": str, "components": {str: _NUMBER}, "total_bytes": _NUMBER}
_ROW = {
    **dict.fromkeys(("pp", "ep", "dp", "chunks", "micro_batch_sequences"), int),
    **dict.fromkeys(("schedule", "dispatch"), str),
    **dict.fromkeys(("step_s", "modelled", "corrected", "memory_bytes", "bubble"), _NUMBER),
    **dict.fromkeys(("recompute", "overlap", "fits", "runs_today"), bool),
}
# A type; {key: shape}, with `str` for every key; [shape of every item].
SHAPE: dict[str, Any] = {
    "date": str, "name": str, "words": [str], "runs_today": bool, "why_not": str | None,
    "run": {"world": int, "sequence_length": int, "batch_sequences": int, "micro_batches": int, "precision": str},
    "gpu": {"name": str, "memory_bytes": _NUMBER, "reserved_bytes": _NUMBER},
    "candidate": {"pp": int, "dp": int, "ep": int, "schedule": str},
    "step": {
        **dict.fromkeys(("time_s", "tokens_per_s", "tokens_per_s_per_gpu", "tflop_per_s"), _NUMBER),
        "phases_s": {str: _NUMBER},
    },
    "memory": {
        "ranks": [_RANK], "breaks_at": _NUMBER | None,
        "imbalance": [{"imbalance": _NUMBER, "fullest_bytes": _NUMBER, "fullest_rank": int, "step_s": _NUMBER}],
    },
    "loads": [{"run": str, "first_step": int, "last_step": int, "in_time": _NUMBER, "in_memory": _NUMBER}],
    "cost": {
        "modelled": _TOTALS, "corrected": _TOTALS, "bias": _NUMBER, "bias_source": str, "dollars_per_gpu_hour": _NUMBER,
        "held_out": [_HELD_OUT], "parts": [_PART], "effective_training_time": _NUMBER,
    },
    "changes": [{"what": str, "step_s": _NUMBER, "modelled": _NUMBER, "corrected": _NUMBER, "bubble": _NUMBER}],
    "bound": {"what": str, "modelled": _NUMBER},
    "search": {"tried": int, "fit": int, "seconds": _NUMBER, "rows": [_ROW]},
    "timeline": {"step_s": _NUMBER, "ranks": [list]},
    "sources": [{"what": str, "value": _NUMBER | str, "unit": str, "label": str, "source": str, "date": str}],
}  # fmt: skip


def check(document: Any) -> None:
    """Refuse what is no whole plan document.

    Raises:
        ValueError: what is missing or wrong, with its path.
    """
    if not isinstance(document, Mapping) or "version" not in document:
        raise ValueError("this is no plan document: it has no version; make one with launch/plan.py")
    if document["version"] != VERSION:
        raise ValueError(f"plan document of version {document['version']!r}, this code reads {VERSION}: make it again")
    _check(document, SHAPE, "")
    if not document["memory"]["ranks"]:
        raise _damaged("memory.ranks", "is empty")
    for row in document["memory"]["ranks"]:
        # The sum of some ten numbers, whatever the order.
        if not math.isclose(row["total_bytes"], sum(row["components"].values()), rel_tol=1e-9):
            raise _damaged(f"memory.ranks[{row['pp_rank']}]", "has a total that is not the sum of its components")
    for row in document["sources"]:
        if row["label"] not in LABELS:
            raise _damaged("sources", f"has the label {row['label']!r}, which is none of {', '.join(LABELS)}")
    for rank, spans in enumerate(document["timeline"]["ranks"]):
        _check_spans(spans, f"timeline.ranks[{rank}]")


def _damaged(path: str, what: str) -> ValueError:
    return ValueError(f"the plan document is damaged: {path} {what}; make it again with launch/plan.py")


def _check(value: Any, shape: Any, path: str) -> None:
    if isinstance(shape, dict):
        if not isinstance(value, Mapping):
            raise _damaged(path, f"is {_shown(value)}, not an object")
        keys = dict.fromkeys(value, shape[str]) if str in shape else shape
        for key, inner in keys.items():
            where = f"{path}.{key}".lstrip(".")
            if key not in value:
                raise _damaged(where, "is missing")
            _check(value[key], inner, where)
    elif isinstance(shape, list):
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise _damaged(path, f"is {_shown(value)}, not a list")
        for index, item in enumerate(value):
            _check(item, shape[0], f"{path}[{index}]")
    elif not isinstance(value, shape) or (isinstance(value, bool) and shape is not bool):
        raise _damaged(path, f"is {_shown(value)}, not {getattr(shape, '__name__', str(shape))}")
    elif isinstance(value, float) and not math.isfinite(value):
        raise _damaged(path, f"is {value}, not a finite number")


def _check_spans(spans: Sequence[Any], path: str) -> None:
    """Spans of one pipeline rank, one after the other, each of one action or of an overlapped pair."""
    last_end = 0.0
    for index, span in enumerate(spans):
        try:
            start, end, actions = span
            right = last_end - 1e-9 <= start <= end < math.inf and len(actions) in (1, 2)
            right = right and all(
                kind in KINDS
                and isinstance(stage, int)
                and isinstance(micro_batch, int)
                and min(stage, micro_batch) >= 0
                for kind, stage, micro_batch in actions
            )
        except (TypeError, ValueError):
            right = False
        if not right:
            raise _damaged(f"{path}[{index}]", f"is {_shown(span)}, no span of actions after the one before it")
        last_end = end


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
