"""What must be the same when a run is resumed: model, precision, data order, store and seed; and what may differ.

Fields at their defaults are left out, so that a later version with a new field resumes the runs of older ones, which
lack it. The new default must mean what the older version did, and the default of a field here must never change.
"""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

from train.checkpoint.lineage import BEGAN_FROM
from train.checkpoint.publish import STATE, damage, one_line
from train.data.config import DataConfig
from train.model.config import ModelConfig
from train.model.precision_config import PrecisionConfig
from train.spikes import SpikeState
from train.state import TrainState

# Sections of a checkpoint's identity that are dataclasses of the configuration.
IDENTITY_SECTIONS: dict[str, Any] = {"model": ModelConfig, "precision": PrecisionConfig, "data": DataConfig}


class SavedState(NamedTuple):
    """What `state.json` of a run's checkpoint holds."""

    identity: dict[str, Any]
    config: dict[str, Any]
    train_state: TrainState
    spikes: SpikeState
    began_from: dict[str, Any] | None  # `lineage.py`; None of a run that drew its weights, and of earlier versions


def read_state(path: Path, state: dict[str, Any]) -> SavedState:
    """Check the state of the checkpoint `path`.

    Raises:
        ValueError: a part is missing or is not what a run writes; named.
    """
    try:
        for name in ("identity", "config"):
            if not isinstance(state.get(name), dict):
                raise ValueError(f"lacks {name!r}")
        train_state, spikes = TrainState.from_json(state.get("train_state")), SpikeState.from_json(state.get("spikes"))
        began_from = state.get(BEGAN_FROM)
        if began_from is not None and not isinstance(began_from, dict):
            raise ValueError(f"has {BEGAN_FROM!r} that is no record")
        return SavedState(state["identity"], state["config"], train_state, spikes, began_from)
    except ValueError as error:
        raise damage(path / STATE, str(error)) from None


def _non_default(kind: Any, values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults; inner dataclasses too."""
    kept, hints = {}, get_type_hints(kind)
    for field in fields(kind):
        inner = [each for each in get_args(hints[field.name]) if is_dataclass(each)]
        value = values.get(field.name, field.default)
        if inner and isinstance(value, dict):
            value = _non_default(inner[0], value)
        if value != field.default:
            kept[field.name] = value
    # A field that only another version has.
    return kept | {name: value for name, value in values.items() if name not in {field.name for field in fields(kind)}}


def without_defaults(identity: dict[str, Any]) -> dict[str, Any]:
    """An identity as JSON gives it back, without the fields at their defaults."""
    plain: dict[str, Any] = json.loads(json.dumps(identity))
    sections = {key: IDENTITY_SECTIONS.get(key) for key, value in plain.items() if isinstance(value, dict)}
    return {key: _non_default(kind, value) if (kind := sections.get(key)) else value for key, value in plain.items()}


def check_same_identity(path: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Compare two identities, of any versions.

    Raises:
        ValueError: they differ; names the first field with both values.
    """
    saved, current = without_defaults(saved), without_defaults(current)
    for key, value in current.items():
        if saved.get(key) != value:
            raise ValueError(
                f"{path} was saved with another {key}: {_difference(key, saved.get(key), value)}; "
                "choose another run.name, or give back the old value"
            )


def _difference(section: str, old: object, new: object) -> str:
    """The first field in which two values differ, or the values themselves; an absent field has its default."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return f"was {one_line(old)}, now {one_line(new)}"
    key = next(key for key in (*new, *old) if old.get(key) != new.get(key))
    kind = IDENTITY_SECTIONS.get(section)
    default = {field.name: field.default for field in fields(kind)}.get(key) if kind else None
    return f"{one_line(key)} was {one_line(old.get(key, default))}, now {one_line(new.get(key, default))}"


def changed_fields(old: dict[str, Any], new: dict[str, Any]) -> dict[str, list[object]]:
    """`section.field` -> [old, new], for every field in which a configuration differs from a saved one."""
    # As it comes back from a file: tuples become lists.
    new = json.loads(json.dumps(new))
    pairs = {
        f"{section}.{name}": [before.get(name), value]
        for section, values in new.items()
        if isinstance(values, dict) and isinstance(before := old.get(section) or {}, dict)
        for name, value in values.items()
        # A version before had not the field: what it did is today's default.
        if name in before
    }
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
