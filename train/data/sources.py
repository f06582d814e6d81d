"""From a name to documents: the text of any source, checked, in one Arrow file, before it is tokenised.

A source is a local file, a local folder of files of one kind (readers.py), or the name of a dataset on the hub:
owner/name, or owner/name:config for one of its configurations.

Documents keep the order of the file; files are read in order of their names. A .txt file of a folder is one document,
unless paragraphs are asked for; of a single .txt file the paragraphs are the documents.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from train.data.readers import (
    COMPRESSIONS,
    NESTING,
    READERS,
    Parse,
    kind_of,
    no_field,
    one_line,
    read_texts,
    without_null_fields,
)
from train.data.store import file_sha256

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
# Passed by in a folder, such a file would be missed in silence.
OTHER_COMPRESSIONS = (".bz2", ".xz", ".lz4", ".zip")
KNOWN = f"{' '.join(READERS)} (or {' '.join(COMPRESSIONS)} of them)"

# What is held in memory at once: documents up to either limit, one at least.
BATCH_BYTES = 1 << 20
BATCH_ROWS = 1000
HUB_ROWS = 16


@dataclass(frozen=True)
class Documents:
    """The text of a source."""

    table: Any  # a `datasets.Dataset` of one column `text`; a document of blanks alone is empty
    text_bytes: NDArray[np.int64]  # [documents] of UTF-8
    hashes: dict[str, str]  # SHA-256 of each file, or of the whole text of a hub dataset
    file_starts: tuple[int, ...] = (0,)  # the first document of each file; of a part: as if it were one file

    def batches(self) -> Iterator[tuple[int, int]]:
        """First document and one past the last of each batch, cut by bytes."""
        ends, start = np.cumsum(self.text_bytes), 0
        while start < len(ends):
            room = BATCH_BYTES + (int(ends[start - 1]) if start else 0)
            stop = int(np.searchsorted(ends, room, side="right"))
            stop = min(max(stop, start + 1), start + BATCH_ROWS)
            yield start, stop
            start = stop

    def texts(self, start: int, stop: int) -> list[str]:
        """Those with text of the documents from `start` to `stop`."""
        return [text for text in self.table[start:stop]["text"] if text]

    def all_texts(self) -> Iterator[str]:
        """Every document with text, without holding them all in memory."""
        for start, stop in self.batches():
            yield from self.texts(start, stop)

    def select(self, start: int, stop: int) -> Documents:
        """The documents from `start` to `stop`."""
        return replace(
            self, table=self.table.select(range(start, stop)), text_bytes=self.text_bytes[start:stop], file_starts=(0,)
        )


def local_files(source: str) -> list[Path]:
    """The files of a local source, in order of their names; none if the source names a hub dataset.

    Raises:
        ValueError: a path that does not exist, of an unknown kind, or of several kinds.
    """
    path = Path(source)
    if path.is_dir():
        files = [file for file in _files_below(path) if _is_data(file, path)]
        if not files:
            raise ValueError(f"source: folder {path} holds none of {KNOWN}")
    elif path.is_file():
        files = [path]
    elif kind_of(path) or not HUB_NAME.fullmatch(source):
        raise ValueError(f"source: there is no file or folder {source}; check the path")
    else:
        return []
    for file in files:
        if not file.is_file():
            raise ValueError(f"source: {file} is a link to nothing, or no file; repair or remove it")
        if b"?" in str(file).replace("?", "").encode("utf-8", "replace"):
            raise ValueError(f"source: the name {str(file)!r} is not UTF-8; rename the file")
    kinds = {kind_of(file) for file in files}
    if None in kinds or len(kinds) > 1:
        raise ValueError(
            f"source: {source} is not made of files of one known kind (found {', '.join(sorted(map(str, kinds)))}); "
            f"pass one kind of {KNOWN}"
        )
    return files


def passed_by(source: str) -> list[str]:
    """The files of a local folder that are not read: hidden ones, and those of no known kind."""
    path = Path(source)
    return [str(file.relative_to(path)) for file in _files_below(path) if not _is_data(file, path)]


def hash_files(source: str, files: list[Path]) -> dict[str, str]:
    """SHA-256 of each file, by its path inside the source."""
    root = Path(source) if Path(source).is_dir() else Path(source).parent
    return {file.relative_to(root).as_posix(): file_sha256(file) for file in files}


def is_txt_folder(source: str) -> bool:
    """Whether a source is a folder of .txt files."""
    files = local_files(source)
    return Path(source).is_dir() and kind_of(files[0]) == ".txt"


def open_documents(
    source: str, *, split: str, text_field: str, cache: Path, paragraphs: bool = False, parse: Parse | None = None
) -> Documents:
    """Read a file, folder or hub dataset (through `datasets`) into an Arrow file in the folder `cache`.

    `paragraphs`: documents of a .txt file are separated by blank lines, in a folder too. `parse`: as `read_texts`.

    Raises:
        ValueError: whatever a user can repair, in one sentence.
    """
    files = local_files(source)
    digest, starts = hashlib.sha256(), list[int]()
    texts: Iterable[str]
    if parse and files and (kind := kind_of(files[0])) not in NESTING:
        raise ValueError(f"source: {source} is {kind}, and conversations are read from {', '.join(NESTING)}")
    if files:
        whole_txt = is_txt_folder(source) and not paragraphs
        texts = _file_texts(files, text_field, starts, whole_txt=whole_txt, parse=parse)
    else:
        texts = _hub_texts(source, split=split, text_field=text_field, digest=digest, parse=parse)
    table, text_bytes = _written(texts, cache)
    if table is None or not text_bytes.any():
        left_out = "; conversations whose text spells a mark are left out" if parse else ""
        raise ValueError(f"source: {source} is an empty corpus; pass files with text in them{left_out}")
    hashes = hash_files(source, files) if files else {f"{source}@{split}": digest.hexdigest()}
    return Documents(table, text_bytes, hashes, tuple(starts) or (0,))


def _file_texts(
    files: list[Path], text_field: str, starts: list[int], *, whole_txt: bool, parse: Parse | None
) -> Iterator[str]:
    """The texts of all files; `starts` gets the number of the first one of each."""
    number = 0
    for file in files:
        starts.append(number)
        for text in read_texts(file, text_field, whole_txt=whole_txt, parse=parse):
            number += 1
            yield text


def _files_below(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if not file.is_dir())


def _is_data(file: Path, folder: Path) -> bool:
    """Whether a file of a folder is text to be read; what programs put beside it (._x.txt, .git) is hidden."""
    if any(part.startswith(".") for part in file.relative_to(folder).parts):
        return False
    return kind_of(file) is not None or (
        file.suffix.lower() in OTHER_COMPRESSIONS and Path(file.stem).suffix.lower() in READERS
    )


def _hub_texts(source: str, *, split: str, text_field: str, digest: Any, parse: Parse | None) -> Iterator[str]:
    """The texts of a hub dataset; each goes into the digest."""
    name, _, config = source.partition(":")
    try:
        table = datasets.load_dataset(name, config or None, split=split)
    # The library raises what its many backends raise.
    except Exception as error:  # noqa: BLE001
        raise ValueError(
            f"source: '{source}' (split '{split}') is no file here and cannot be loaded from the hub "
            f"({one_line(error)}); check the name, the split and the network, or pass a local file"
        ) from None
    for text in _hub_rows(table, source, text_field) if parse is None else _hub_parsed(table, source, parse):
        digest.update(len(text.encode()).to_bytes(8, "little") + text.encode())
        yield text


def _hub_parsed(table: Any, source: str, parse: Parse) -> Iterator[str]:
    fields = pa.struct(list(table.features.arrow_schema))
    for number, row in enumerate(table, 1):
        try:
            yield parse(without_null_fields(row, fields))
        except ValueError as error:
            raise ValueError(f"source: row {number} of {source} is unreadable ({error}); repair or remove it") from None


def _hub_rows(table: Any, source: str, text_field: str) -> Iterator[str]:
    if text_field not in table.column_names:
        raise ValueError(f"source: {source} cannot be read: {no_field(text_field, table.column_names)}")
    dtype = getattr(table.features[text_field], "dtype", str(table.features[text_field]))
    if dtype not in ("string", "large_string"):
        raise ValueError(f"text_field: '{text_field}' of {source} holds {dtype}, not text; choose another")
    number = 0
    for rows in table.select_columns([text_field]).iter(batch_size=HUB_ROWS):
        for text in rows[text_field]:
            number += 1
            if text is None:
                raise ValueError(f"text_field: document {number} of {source} holds null in '{text_field}', not text")
            yield text


def _written(texts: Iterable[str], cache: Path) -> tuple[Any, NDArray[np.int64]]:
    """The texts in one memory-mapped Arrow file, those of blanks alone emptied, and the bytes of each."""
    cache.mkdir(parents=True, exist_ok=True)
    schema = pa.schema({"text": pa.large_string()})
    path, text_bytes = cache / "text.arrow", array("q")
    with path.open("wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        batch: list[str] = []
        batch_bytes = 0
        for text in chain(texts, [None]):
            if text is not None:
                batch.append("" if text.isspace() else text)
                text_bytes.append(len(batch[-1].encode()))
                batch_bytes += text_bytes[-1]
            if batch and (text is None or batch_bytes >= BATCH_BYTES or len(batch) == BATCH_ROWS):
                writer.write_batch(pa.record_batch([pa.array(batch, pa.large_string())], schema=schema))
                batch, batch_bytes = [], 0
    table = datasets.Dataset.from_file(str(path)) if text_bytes else None
    return table, np.frombuffer(text_bytes, dtype=np.int64)
