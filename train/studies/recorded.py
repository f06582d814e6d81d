"""What recorded studies share: a folder of one setting, the files they write, tables in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.data.store import strict_json
from train.data.whole_file import write_whole


def claim_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make the folder of a study, or go on in it; ValueError where it holds one with other settings."""
    folder.mkdir(parents=True, exist_ok=True)
    known, text = folder / "settings.json", strict_json(settings)
    if known.exists() and known.read_text(encoding="utf-8") != text:
        raise ValueError(f"{folder} holds a study with other settings: give --out another folder, or delete it")
    if not known.exists():
        write_whole(known, text)


def write_files(folder: Path, texts: Mapping[str, str]) -> list[Path]:
    """Write a study's files, name -> text, and return their paths."""
    for name, text in texts.items():
        write_whole(folder / name, text)
    return [folder / name for name in texts]


def head(*names: str) -> list[str]:
    """The first two lines of a table."""
    return [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]


def spread(values: Sequence[float], digits: int = 0) -> str:
    """The mean in percent, with the least and the most where these differ."""
    mean, least, most = (f"{value:.{digits}%}" for value in (statistics.fmean(values), min(values), max(values)))
    return mean if least == most else f"{mean} ({least} to {most})"
