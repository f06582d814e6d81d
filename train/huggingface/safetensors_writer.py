"""Safetensors files written tensor by tensor, and the journal that makes a long conversion resumable.

    header (computed from the plan) -> bytes of each tensor at its place -> fsync -> sha256 -> rename -> journal

A safetensors file is 8 bytes of header length, a JSON header {name: dtype, shape, data_offsets} and the tensors' bytes
without gaps. Dtypes and shapes are known beforehand, so the header goes first and values follow in whatever pieces
they come; no more than one piece is in memory. Wide dtypes lie first in a file, which keeps every tensor aligned.

A file bears its own name only when it is whole and on the disk; the journal then notes its size and sha256. A
conversion that was killed at any moment is run again with the same command: what the journal lists and the disk still
holds, hash for hash, is kept, the rest is written anew, and the result has the same bytes. A journal of another plan or
source is refused.

Shapes: none of its own. Not here: which tensors (`hf_plan.py`) and their values (`hf_export.py`, `hf_import.py`).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from train.checkpoint import publish

JOURNAL = "conversion.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F8_E4M3": torch.float8_e4m3fn}
_HIDDEN = ".writing-"


class Entry(NamedTuple):
    """A tensor of a file.

    Args:
        name: key in the file.
        dtype: safetensors' word, 'F32', 'BF16' or 'F8_E4M3'.
        shape: of what the file holds.
        offset: first element of it in the whole tensor, as DCP wants to know; None: the file holds it whole.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: tuple[int, ...] | None = None


class Shard(NamedTuple):
    """A file and what it holds, in the order of writing."""

    file: str
    entries: tuple[Entry, ...]


# Makes the values of a shard: (key, consecutive rows of the tensor), tensor by tensor.
Produce = Callable[[Shard], Iterator[tuple[str, Tensor]]]


def num_bytes(entry: Entry) -> int:
    """Stored bytes of a tensor."""
    return math.prod(entry.shape) * DTYPES[entry.dtype].itemsize


def header_of(shard: Shard) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The first bytes of a file, and where each tensor lies in it.

    Args:
        shard: the file.
    Returns:
        length and header, a multiple of 8 bytes; key -> (first byte, byte after the last), counted from the file's
        beginning.
    """
    metadata = {"format": "pt"}
    if any(entry.offset is not None for entry in shard.entries):
        offsets = {entry.name: {"saved_offsets": list(entry.offset or ())} for entry in shard.entries}
        metadata |= {"DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(offsets)}
    fields: dict[str, Any] = {"__metadata__": metadata}
    places: dict[str, tuple[int, int]] = {}
    position = 0
    for entry in sorted(shard.entries, key=lambda entry: -DTYPES[entry.dtype].itemsize):
        end = position + num_bytes(entry)
        places[entry.name] = (position, end)
        fields[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    moved = {name: (start + first, start + last) for name, (first, last) in places.items()}
    return len(text).to_bytes(8, "little") + text, moved


def write_shard(path: Path, shard: Shard, values: Iterable[tuple[str, Tensor]]) -> None:
    """Write one file and wait until it is on the disk.

    Args:
        path: file to create.
        shard: what it holds.
        values: (key, consecutive rows), in the entry's dtype; pieces of one key in order.
    """
    header, places = header_of(shard)
    dtypes = {entry.name: DTYPES[entry.dtype] for entry in shard.entries}
    position = {name: first for name, (first, _) in places.items()}
    with path.open("wb") as file:
        file.write(header)
        for name, piece in values:
            assert piece.dtype == dtypes[name], (name, piece.dtype)
            file.seek(position[name])
            position[name] += file.write(piece.contiguous().view(-1).view(torch.uint8).numpy().data)
        wrong = [name for name, (_, end) in places.items() if position[name] != end]
        assert not wrong, f"values of {wrong[:3]} do not fill their places"
        file.flush()
        os.fsync(file.fileno())


class Journal:
    """What a conversion has finished, in `conversion.json` of its folder.

    Args:
        folder: where the journal lies; made if missing.
        identity: what makes two conversions the same, as JSON: source, plan, options.
    Attributes:
        files: name -> {"bytes", "sha256"} of what is finished.
    Raises:
        ValueError: the folder holds other files, or a conversion of another identity, or the journal is damaged.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.path = folder / JOURNAL
        self.identity = json.loads(json.dumps(identity))
        self.files: dict[str, dict[str, Any]] = {}
        if self.path.is_file():
            self.files = self._read()
        elif folder.exists() and (not folder.is_dir() or any(_foreign(path) for path in folder.iterdir())):
            raise ValueError(f"{folder} already holds something else; name a new or empty folder")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            self._write()

    def _read(self) -> dict[str, dict[str, Any]]:
        saved = read_json(self.path)
        if not isinstance(saved, dict) or not all(isinstance(saved.get(key), dict) for key in ("identity", "files")):
            raise ValueError(f"{self.path} is damaged; delete {self.path.parent} and convert again")
        for key in (*self.identity, *saved["identity"]):
            old, new = saved["identity"].get(key), self.identity.get(key)
            if old != new:
                values = "" if isinstance(new, dict) else f" ({old}, now {new})"
                raise ValueError(
                    f"{self.path.parent} holds a conversion with another {key}{values}; "
                    "name another folder, or delete this one to start anew"
                )
        files: dict[str, dict[str, Any]] = saved["files"]
        return files

    def _write(self) -> None:
        write_text(self.path, json.dumps({"identity": self.identity, "files": self.files}, indent=1))

    def note(self, name: str, entry: dict[str, Any]) -> None:
        """A file is finished; returns when the journal is on the disk."""
        self.files[name] = entry
        self._write()

    def holds(self, file: Path) -> bool:
        """Whether a finished file is still there, hash for hash."""
        entry = self.files.get(file.name)
        if entry is None or not file.is_file() or file.stat().st_size != entry["bytes"]:
            return False
        return publish.entry_of(file) == entry


def _foreign(path: Path) -> bool:
    """Anything but what a conversion killed at its very first write leaves."""
    return path.name != f"{_HIDDEN}{JOURNAL}"


def write_shards(folder: Path, shards: Iterable[Shard], produce: Produce, journal: Journal) -> int:
    """Write all files that the journal does not hold already.

    Args:
        folder: where the files go.
        shards: all of them.
        produce: makes the values of one.
        journal: of this conversion.
    Returns:
        files written now.
    """
    written = 0
    for shard in shards:
        file = folder / shard.file
        if journal.holds(file):
            continue
        hidden = file.with_name(_HIDDEN + file.name)
        write_shard(hidden, shard, produce(shard))
        entry = publish.entry_of(hidden)
        _rename(hidden, file)
        journal.note(file.name, entry)
        written += 1
    return written


def write_text(path: Path, text: str) -> None:
    """Write a small file so that its name shows the old content or the new one, whatever happens."""
    hidden = path.with_name(_HIDDEN + path.name)
    with hidden.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    _rename(hidden, path)


def read_json(path: Path) -> Any:
    """Read a JSON file of a folder to convert.

    Args:
        path: the file.
    Returns:
        its value.
    Raises:
        ValueError: it is missing or no JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path.parent} lacks {path.name}: it is incomplete; fetch it again") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); fetch it again") from None


def _rename(hidden: Path, path: Path) -> None:
    hidden.replace(path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
