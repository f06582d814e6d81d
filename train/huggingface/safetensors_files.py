"""Safetensors files: opened for reading, written tensor by tensor, and the journal that makes a conversion resumable.

    header (computed from the plan) -> bytes of each tensor at its offset -> fsync -> sha256 -> rename -> journal

A file is 8 bytes of header length, a JSON header {name: dtype, shape, data_offsets} and the tensors without gaps.
The header is known beforehand and written first, values follow in chunks of any size, one of them in memory.

A file gets its own name only when it is whole and on the disk; the journal then records its size and sha256. A
conversion killed at any moment is resumed by the same command: files that the journal lists and whose hash is right are
kept, the others are written again, and the result has the same bytes.
"""

from __future__ import annotations

import json
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from train.checkpoint import publish
from train.data.whole_file import draft_of, fsync_directory, write_whole

JOURNAL = "conversion.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F8_E4M3": torch.float8_e4m3fn}
# A released model has 163 files and a checkpoint may have thousands, but a process has only so many descriptors.
OPEN_FILES = 32
READ_ERRORS = (SafetensorError, OSError)
_LFS = b"version https://git-lfs"


class TensorSpec(NamedTuple):
    """A tensor of a file."""

    name: str  # key in the file
    dtype: str  # a key of `DTYPES`
    shape: tuple[int, ...]  # of what the file holds
    # Of its first element in the whole tensor, as DCP stores them; None: the file holds it whole.
    offsets: tuple[int, ...] | None = None

    @property
    def num_bytes(self) -> int:
        """Stored bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class ShardFile(NamedTuple):
    """A file and its tensors, in the order of writing."""

    name: str
    tensors: tuple[TensorSpec, ...]


# Makes the values of a file: (key, consecutive rows of the tensor), the rows of a key in order.
Produce = Callable[[ShardFile], Iterator[tuple[str, Tensor]]]


class OpenFiles:
    """Memory-mapped files of a folder, at most `OPEN_FILES`; `damaged` makes the error of one that cannot be opened."""

    def __init__(self, folder: Path, damaged: Callable[[Path, Exception], ValueError]) -> None:
        self._folder, self._damaged = folder, damaged
        self._open: OrderedDict[str, Any] = OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    def close(self) -> None:
        """Let go of every file; the next access opens it again."""
        self._open.clear()

    def __getitem__(self, name: str) -> Any:
        if name not in self._open:
            if len(self._open) >= OPEN_FILES:
                self._open.popitem(last=False)
            try:
                self._open[name] = safe_open(self._folder / name, framework="pt")
            except READ_ERRORS as error:
                raise self._damaged(self._folder / name, error) from None
        self._open.move_to_end(name)
        return self._open[name]


def read_json(path: Path) -> Any:
    """The value of a JSON file of a folder to convert; a ValueError names one that is missing or not JSON."""
    # Not `publish.read_json`: its message asks the user to delete a checkpoint.
    if not path.is_file():
        raise ValueError(f"{path.parent} lacks {path.name}: it is incomplete; fetch it again")
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({pointer_or(error, path)}); fetch it again") from None


def pointer_or(error: Exception, path: Path) -> str:
    """Why a file cannot be read: what a library says, or that git-lfs left a pointer in its place."""
    # The file may be the one that cannot be opened.
    with suppress(OSError), path.open("rb") as stream:
        if stream.read(len(_LFS)) == _LFS:
            return "a git-lfs pointer: run `git lfs pull`"
    return publish.one_line(error)


def header_of(file: ShardFile) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The first bytes of a file, a multiple of 8, and key -> (first byte, byte after the last) of each tensor."""
    metadata = {"format": "pt"}
    if any(tensor.offsets is not None for tensor in file.tensors):
        offsets = {tensor.name: {"saved_offsets": list(tensor.offsets or ())} for tensor in file.tensors}
        metadata |= {"DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(offsets)}
    fields: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    # Wide dtypes first: every tensor is aligned.
    for tensor in sorted(file.tensors, key=lambda tensor: -DTYPES[tensor.dtype].itemsize):
        end = position + tensor.num_bytes
        fields[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    spans = {tensor.name: fields[tensor.name]["data_offsets"] for tensor in file.tensors}
    return len(text).to_bytes(8, "little") + text, {name: (start + a, start + b) for name, (a, b) in spans.items()}


def write_file(path: Path, file: ShardFile, values: Iterable[tuple[str, Tensor]]) -> None:
    """Write one file and wait until it is on the disk; `values` are as `Produce` makes them, in the stored dtype."""
    header, spans = header_of(file)
    dtypes = {tensor.name: DTYPES[tensor.dtype] for tensor in file.tensors}
    position = {name: first for name, (first, _) in spans.items()}
    with path.open("wb") as stream:
        stream.write(header)
        for name, rows in values:
            assert rows.dtype == dtypes[name], (name, rows.dtype)
            stream.seek(position[name])
            position[name] += stream.write(rows.contiguous().view(-1).view(torch.uint8).numpy().data)
        wrong = [name for name, (_, end) in spans.items() if position[name] != end]
        assert not wrong, f"values of {wrong[:3]} do not fill their bytes"
        stream.flush()
        os.fsync(stream.fileno())


class Journal:
    """What a conversion has finished, in `conversion.json` of its folder, which is made if missing.

    Two conversions with one `identity` (source, plan, options) are the same. `files` is name -> {"bytes", "sha256"}.

    Raises:
        ValueError: the folder holds other files, or a conversion of another identity, or the journal is damaged.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.path = folder / JOURNAL
        self.identity = json.loads(json.dumps(identity))
        self.files: dict[str, dict[str, Any]] = {}
        if self.path.is_file():
            self._read()
            return
        # A conversion killed at its very first write leaves the journal's hidden file.
        if folder.exists() and (not folder.is_dir() or set(folder.iterdir()) - {draft_of(self.path)}):
            raise ValueError(f"{folder} already holds something else; name a new or empty folder")
        folder.mkdir(parents=True, exist_ok=True)
        self._write()

    def _read(self) -> None:
        saved = read_json(self.path)
        if not isinstance(saved, dict) or not all(isinstance(saved.get(key), dict) for key in ("identity", "files")):
            raise ValueError(f"{self.path} is damaged; delete {self.path.parent} and convert again")
        for key in (*self.identity, *saved["identity"]):
            old, new = saved["identity"].get(key), self.identity.get(key)
            if old != new:
                values = "" if isinstance(new, dict) else f" ({old}, now {new})"
                raise ValueError(
                    f"{self.path.parent} holds a conversion with another {key}{values}; "
                    "name another folder, or delete this one to start again"
                )
        self.files = saved["files"]

    def _write(self) -> None:
        write_whole(self.path, json.dumps({"identity": self.identity, "files": self.files}, indent=1))

    def record(self, name: str, entry: dict[str, Any]) -> None:
        """A file is finished; returns when the journal is on the disk."""
        self.files[name] = entry
        self._write()

    def holds(self, file: Path) -> bool:
        """Whether a finished file still has its size and hash."""
        return file.name in self.files and file.is_file() and publish.entry_of(file) == self.files[file.name]


def write_files(folder: Path, files: Iterable[ShardFile], produce: Produce, journal: Journal) -> int:
    """Write all files that the journal does not hold already; returns how many were written."""
    written = 0
    for file in files:
        path = folder / file.name
        if journal.holds(path):
            continue
        hidden = draft_of(path)
        write_file(hidden, file, produce(file))
        entry = publish.entry_of(hidden)
        hidden.replace(path)
        fsync_directory(path.parent)
        journal.record(path.name, entry)
        written += 1
    return written
