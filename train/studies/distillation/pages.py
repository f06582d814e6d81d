"""The study as files: result.json, everything measured, and tables.md, which docs/post_training.md shows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.data.store import strict_json
from train.studies.recorded import head, spread, write_files


def write(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write both files into a folder and return their paths."""
    return write_files(folder, {"result.json": strict_json(result), "tables.md": tables(result)})


def tables(result: Mapping[str, Any]) -> str:
    """What was trained on, and the right answers by number of digits, as Markdown."""
    arms, steps = result["arms"], result["size"]["steps"]
    lines = head("arm", "conversations", "wrong answers", "tokens with a loss", "epochs", "targets a step")
    for arm, store in result["stores"].items():
        targets = store["targets"] * store["epochs"] / steps
        cells = (f"{store['conversations']:,}", f"{store['wrong']:.1%}", f"{store['targets']:,}")
        lines.append(f"| {arm} | {' | '.join(cells)} | {store['epochs']:.1f} | {targets:.0f} |")
    parts = list(arms[next(iter(arms))][0]["right"])
    named = (part if part == "all" else f"{part} digits" for part in parts)
    lines += ["", *head("right answers", *named, "of those trained on", "working right")]
    for arm, seeds in arms.items():
        shares = [spread([seed["right"][part] for seed in seeds], 1) for part in parts]
        shares += [spread([seed[name] for seed in seeds], 1) for name in ("seen", "working")]
        lines.append(f"| {arm} | {' | '.join(shares)} |")
    for name, right in result["guesses"].items():
        lines.append(f"| {name} | {' | '.join(spread([right[part]], 1) for part in parts)} | | |")
    seconds = sum(seed["training_core_s"] + seed["test_core_s"] for seeds in arms.values() for seed in seeds)
    return "\n".join([*lines, "", f"{seconds / 60:.0f} core-minutes; torch {result['torch']}", ""])
