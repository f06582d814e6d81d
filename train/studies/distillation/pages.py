"""The study as files: result.json, everything measured, and tables.md, which docs/post_training.md shows."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.data.store import strict_json


def write(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write both files into a folder and return their paths."""
    texts = {"result.json": strict_json(result), "tables.md": tables(result)}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


def spread(values: Sequence[float]) -> str:
    """The mean in percent, with the least and the most where these differ."""
    mean, least, most = (f"{value:.1%}" for value in (statistics.fmean(values), min(values), max(values)))
    return mean if least == most else f"{mean} ({least} to {most})"


def tables(result: Mapping[str, Any]) -> str:
    """What was trained on, and the right answers by number of digits, as Markdown."""
    arms, steps = result["arms"], result["size"]["steps"]
    lines = _head("arm", "conversations", "wrong answers", "tokens with a loss", "epochs", "targets a step")
    for arm, store in result["stores"].items():
        targets = store["targets"] * store["epochs"] / steps
        cells = (f"{store['conversations']:,}", f"{store['wrong']:.1%}", f"{store['targets']:,}")
        lines.append(f"| {arm} | {' | '.join(cells)} | {store['epochs']:.1f} | {targets:.0f} |")
    parts = list(arms[next(iter(arms))][0]["right"])
    named = (part if part == "all" else f"{part} digits" for part in parts)
    lines += ["", *_head("right answers", *named, "of those trained on", "working right")]
    for arm, seeds in arms.items():
        shares = [spread([seed["right"][part] for seed in seeds]) for part in parts]
        shares += [spread([seed[name] for seed in seeds]) for name in ("seen", "working")]
        lines.append(f"| {arm} | {' | '.join(shares)} |")
    for name, right in result["guesses"].items():
        lines.append(f"| {name} | {' | '.join(spread([right[part]]) for part in parts)} | | |")
    seconds = sum(seed["training_core_s"] + seed["test_core_s"] for seeds in arms.values() for seed in seeds)
    return "\n".join([*lines, "", f"{seconds / 60:.0f} core-minutes; torch {result['torch']}", ""])


def _head(*names: str) -> list[str]:
    return [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
