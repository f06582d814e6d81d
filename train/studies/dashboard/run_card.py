"""A run in words: its state, its card, its row of final numbers, and what it was configured with.

    state      running, finished, stopped (by a signal or a guard), silent (no record for long), empty
    ETA        tokens still to come over the tokens per second of the newest records of this process
    row        last smoothed values (`compare.ema`, decay 0.9), held-out bits per byte, skipped steps
    identity   what two runs must share for a gap of their losses to mean anything: the model's shape and the data
    fields     every field of run_card.json and of config.yaml by its dotted name: the page shows where runs differ

run_card.json (written by `open_sinks`): name, precision, parameters {total, active, mtp}, tokens_total,
sequence_length, seed, device, torch or versions {package: version}, layer_ids (of the rows of the fp8 tables),
dropped_sequences (left out of the data order), predicted_vs_measured (`train/studies/plan/judged.py`).
summary.json: heldout_bits_per_byte (else the last eval/bits_per_byte counts) and
baselines_bits_per_byte {name: value}, of simpler models on the same held-out text.

Texts and numbers only, no HTML: the page's script sets them as text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import numpy as np

from train.studies.amounts import amount
from train.studies.compare import ema
from train.studies.dashboard.run_reader import RunReader
from train.studies.dashboard.series import Json, Steps

SMOOTHING = 0.9
# Without tokens for so many steps an expert is dead, where the run's configuration does not say; a tiny batch leaves
# one idle now and then by chance.
DEAD_STEPS = 50
# Fields of `model` that are no shape, and those of `data` that change what a loss is taken over.
INITIAL_VALUES = ("initializer_range", "embedding_initializer_range")
DATA_FIELDS = ("sequence_length", "fim_rate", "mask_documents")


def bits_per_byte(run: RunReader) -> float | None:
    """Held-out bits per byte at the end of the run, if it was measured."""
    measured = run.series.get("eval/bits_per_byte")
    return finite(run.summary.get("heldout_bits_per_byte", measured.tail[-1] if measured else None))


def baselines(run: RunReader) -> dict[str, float]:
    """Name -> bits per byte of simpler models on the same held-out text."""
    found = run.summary.get("baselines_bits_per_byte", {})
    return {str(k): v for k, v in found.items() if finite(v) is not None} if isinstance(found, dict) else {}


def status(run: RunReader, now_unix_s: float) -> Json:
    """State and progress; `eta_s` is None when unknown or not running, `age_s` is since the last record."""
    total = finite(run.card.get("tokens_total"))
    speed = _recent_speed(run)
    age_s = max(0.0, now_unix_s - run.last_time_s) if run.records else None
    state = _state(run, total, age_s)
    eta_s = max(0.0, total - run.tokens_seen) / speed if state == "running" and total and speed else None
    return {
        "state": state,
        "step": max(run.last_step, 0),
        "tokens": run.tokens_seen,
        "tokens_total": total,
        "progress": min(1.0, run.tokens_seen / total) if total else None,
        "tokens_per_s": speed,
        "eta_s": finite(eta_s),
        "age_s": age_s,
        "reason": run.stopped,
    }


def _state(run: RunReader, total: float | None, age_s: float | None) -> str:
    if age_s is None:
        return "empty"
    if total and run.tokens_seen >= total:
        return "finished"
    if run.stopped is not None:
        return "stopped"
    return "silent" if age_s > run.silent_after_s else "running"


def _recent_speed(run: RunReader) -> float | None:
    if len(run.recent) < 2:
        return None
    (first_s, first), (last_s, last) = run.recent[0], run.recent[-1]
    return finite((last - first) / (last_s - first_s)) if last_s > first_s and last > first else None


def dead_experts(run: RunReader) -> Json | None:
    """The alarm; None while every expert has tokens and no event has named one that had none.

    Returns:
        level ("alarm": some pair had no token for `steps` logged steps in a row; "idle": for fewer; "past": all have
        tokens again after an event), steps, now and last (`DeadExperts`), and the pairs of that level, the longest
        first: count, since (a step), streak (steps of the longest), pairs [[row of the load table, expert], ...].
    """
    dead, steps = run.dead, _patience(run)
    logged = run.events["dead_experts"].steps[-1] if "dead_experts" in run.events else -1
    if not dead.now:
        return {"level": "past", "steps": steps, "now": 0, "last": max(dead.last, logged)} if logged >= 0 else None
    is_dead = steps > 0 and bool((dead.idle >= steps).any())
    idle = np.flatnonzero(dead.idle >= (steps if is_dead else 1))
    idle = idle[np.argsort(-dead.idle[idle], kind="stable")]
    level = "alarm" if is_dead or logged == run.last_step else "idle"
    since, streak = (int(dead.since[idle[0]]), int(dead.idle[idle[0]])) if len(idle) else (dead.last, 1)
    verdict = {"level": level, "steps": steps, "now": dead.now, "last": dead.last}
    return verdict | {"count": len(idle) or dead.now, "since": since, "streak": streak, "pairs": _pairs(run, idle[:12])}


def _patience(run: RunReader) -> int:
    """After how many steps the trainer itself calls an expert dead; 0: never."""
    observe = run.config.get("observe")
    steps = observe.get("dead_expert_steps") if isinstance(observe, dict) else None
    return steps if type(steps) is int and steps >= 0 else DEAD_STEPS


def _pairs(run: RunReader, cells: Steps) -> list[list[int]]:
    """(row of the load table, expert) of cells of the flat table."""
    starts = np.cumsum([0, *run.tables["moe/expert_load"].shape]) if len(cells) else np.zeros(1, int)
    layers = np.searchsorted(starts, cells, side="right") - 1
    return [[int(layer), int(cell - starts[layer])] for layer, cell in zip(layers, cells, strict=True)]


def facts(run: RunReader) -> list[list[str]]:
    """[[label, text], ...] of the card's first lines."""
    card = run.card
    versions = card.get("versions", {"torch": card["torch"]} if "torch" in card else {})
    versions = versions if isinstance(versions, Mapping) else {}
    tokens = amount(run.tokens_seen) if run.records else "no steps yet"
    if run.records and finite(card.get("tokens_total")):
        tokens += f" of {amount(card['tokens_total'])}"
    sequence = card.get("sequence_length")
    lines = [
        ("Model", _model_size(card.get("parameters"))),
        ("Tokens", tokens),
        ("Sequence", f"{sequence} tokens" if sequence else ""),
        ("Device", str(card.get("device", ""))),
        ("Versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("Seed", str(card.get("seed", ""))),
        ("Dropped sequences", str(card.get("dropped_sequences", ""))),
    ]
    return [[label, text] for label, text in lines if text]


def _model_size(parameters: Any) -> str:
    if isinstance(parameters, Mapping):
        known = {key: value for key, value in parameters.items() if finite(value)}
        parts = [f"{amount(known['total'])} parameters"] if "total" in known else []
        parts += [f"{amount(known[key])} {key}" for key in ("active", "mtp") if key in known]
        return ", ".join(parts).replace(" mtp", " in MTP")
    return f"{amount(parameters)} parameters" if finite(parameters) else ""


def layer_ids(run: RunReader) -> list[int]:
    """Layers of the rows of the fp8 tables; [] when the card does not say."""
    ids = run.card.get("layer_ids")
    return ids if isinstance(ids, list) and all(type(layer) is int for layer in ids) else []


def moe_layer_ids(run: RunReader) -> list[int]:
    """Layers of the rows of the moe tables: those from `first_k_dense_replace` on; [] when the card does not say."""
    first = run.card.get("first_k_dense_replace")
    return [layer for layer in layer_ids(run) if layer >= first] if type(first) is int else []


def identity(run: RunReader) -> dict[str, str]:
    """What makes a loss comparable, by name; what neither card nor configuration says is left out."""
    model, data, store = (
        part if isinstance(part, Mapping) else {}
        for part in (run.config.get("model"), run.config.get("data"), run.card.get("store"))
    )
    found = {name: str(value) for name, value in model.items() if name not in INITIAL_VALUES}
    found |= {name: str(data[name]) for name in DATA_FIELDS if name in data}
    if "tokenizer" in store:
        found["tokeniser"] = str(store["tokenizer"])
    if text := {name: value for name, value in store.items() if name != "tokenizer"}:
        found["text"] = str(text)
    parameters = run.card.get("parameters")
    size = parameters.get("total") if isinstance(parameters, Mapping) else parameters
    return found | ({"parameters": f"{size:,}"} if finite(size) is not None else {})


def fields(run: RunReader) -> dict[str, str]:
    """Every value of the run card and of the configuration, by dotted name."""
    return {name: str(value) for name, value in (_flat(run.card) | _flat(run.config, "config.")).items()}


def _flat(card: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in card.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def row(run: RunReader) -> list[list[str]]:
    """[[label, text], ...]: final numbers, smoothed where the curve is; "–" for what was not measured."""

    def last(name: str, digits: int) -> str:
        # 0.9^256 is 2e-12: what came before the tail no longer counts.
        tail = run.series[name].tail if name in run.series else []
        values = [value for value in ema(tail, SMOOTHING) if math.isfinite(value)]
        return f"{values[-1]:.{digits}f}" if values else "–"

    def median(name: str, text: Callable[[float], str]) -> str:
        means = run.series[name].means if name in run.series else np.zeros(0)
        means = means[np.isfinite(means)]
        return text(float(np.median(means))) if len(means) else "–"

    score = bits_per_byte(run)
    skipped = run.series.get("guard/skipped_steps")
    return [
        ["Steps", f"{max(run.last_step, 0):,}"],
        ["Tokens", amount(run.tokens_seen)],
        ["Loss", last("loss/main", 4)],
        ["MTP loss", last("loss/mtp", 4)],
        ["Bits per byte", f"{score:.4f}" if score is not None else "–"],
        ["Median tokens/s", median("speed/tokens_per_s", amount)],
        ["MFU", median("speed/mfu_ratio", lambda ratio: f"{100 * ratio:.1f} %")],
        ["MaxVio", last("moe/max_violation_ratio", 2)],
        ["Skipped", f"{skipped.tail[-1]:.0f}" if skipped and math.isfinite(skipped.tail[-1]) else "–"],
        ["Time", str(timedelta(seconds=round(run.trained_s)))],
    ]


def finite(value: Any) -> float | None:
    """The value, or None for what is no finite float64."""
    try:
        return value if isinstance(value, int | float) and math.isfinite(value) else None
    except OverflowError:
        return None
