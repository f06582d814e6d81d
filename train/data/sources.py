"""From a name to documents: any source that `datasets` reads, as one column of text, checked before it is tokenised.

A source is a local file, a local folder of files of one kind, or the name of a dataset on the hub:

    .jsonl .json    one object a line (or one array), the text in one field
    .parquet .csv   one row a document
    .txt            documents are separated by blank lines
    owner/name      a hub dataset; owner/name:config picks a configuration

Text files may be gzipped (.jsonl.gz). Documents keep the order of the file; files are read in order of their names.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow.compute as pc

from train.data.store import file_sha256

KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


@dataclass(frozen=True)
class Documents:
    """The text of a source."""

    table: Any  # a `datasets.Dataset`; every row of `text_field` is a string
    text_field: str
    hashes: dict[str, str]  # SHA-256 of each file, or of the whole text of a hub dataset


def local_files(source: str) -> list[Path]:
    """The files of a local source, in order of their names; none if the source names a hub dataset.

    Raises:
        ValueError: a path that does not exist, of an unknown kind, or of several kinds.
    """
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and _kind(file))
        if not files:
            raise ValueError(f"source: folder {path} holds none of {' '.join(KINDS)} (or .gz of them)")
    elif path.is_file():
        files = [path]
    elif _kind(path) or not HUB_NAME.fullmatch(source):
        raise ValueError(f"source: there is no file or folder {source}; check the path")
    else:
        return []
    kinds = {_kind(file) for file in files}
    if None in kinds or len(kinds) > 1:
        raise ValueError(
            f"source: {source} is not made of files of one known kind (found {', '.join(map(str, kinds))}); "
            f"pass one kind of {' '.join(KINDS)} (or .gz of them)"
        )
    return files


def hash_files(source: str, files: list[Path]) -> dict[str, str]:
    """SHA-256 of each file, by its path inside the source."""
    root = Path(source) if Path(source).is_dir() else Path(source).parent
    return {file.relative_to(root).as_posix(): file_sha256(file) for file in files}


def open_documents(source: str, *, split: str, text_field: str, cache: Path) -> Documents:
    """Read a file, folder or hub dataset through `datasets`; Arrow copies of local files go to the folder `cache`.

    Raises:
        ValueError: whatever a user can repair, in one sentence.
    """
    files = local_files(source)
    table = _load_files(source, files, cache=cache) if files else _load_hub(source, split=split)
    if text_field not in table.column_names:
        raise ValueError(
            f"text_field: {source} has no field '{text_field}'; it has {', '.join(table.column_names)}: "
            "choose one with --text-field"
        )
    _check_text(source, table, text_field=text_field)
    if not any(map(has_text, texts_of(table, text_field))):
        raise _empty(source)
    if files:
        return Documents(table, text_field, hash_files(source, files))
    digest = hashlib.sha256()
    for text in texts_of(table, text_field):
        digest.update(len(text.encode()).to_bytes(8, "little") + text.encode())
    return Documents(table, text_field, {f"{source}@{split}": digest.hexdigest()})


def texts_of(table: Any, text_field: str) -> Any:
    """The texts, one after the other, without holding them all in memory."""
    for rows in table.select_columns([text_field]).iter(batch_size=1000):
        yield from rows[text_field]


def has_text(text: str) -> bool:
    """Whether a document is worth keeping: blanks alone are no text."""
    return not (text == "" or text.isspace())


def _kind(path: Path) -> str | None:
    """Which reader of `datasets` takes the file."""
    return KINDS.get(Path(path.stem).suffix if path.suffix == ".gz" else path.suffix)


def _empty(source: str) -> ValueError:
    return ValueError(f"source: {source} is an empty corpus; pass files with text in them")


def _load_files(source: str, files: list[Path], *, cache: Path) -> Any:
    if not any(file.stat().st_size for file in files):
        raise _empty(source)
    kind = _kind(files[0])
    options = {"sample_by": "paragraph"} if kind == "text" else {}
    try:
        return datasets.load_dataset(
            kind, data_files=[str(file) for file in files], split="train", cache_dir=str(cache), **options
        )
    except (OSError, EOFError, ValueError, StopIteration, datasets.exceptions.DatasetsError) as error:
        if kind == "json":
            _name_bad_line(files)
        cause = error.__cause__ or error
        # What the library says of files without a single row depends on the kind of file.
        no_rows = isinstance(cause, StopIteration | datasets.arrow_writer.SchemaInferenceError)
        if no_rows or "corresponds to no data" in str(cause):
            raise _empty(source) from None
        raise ValueError(
            f"source: {source} cannot be read as {kind} ({_one_line(cause)}); repair or replace the file"
        ) from None


def _load_hub(source: str, *, split: str) -> Any:
    name, _, config = source.partition(":")
    try:
        return datasets.load_dataset(name, config or None, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"source: '{source}' (split '{split}') is no file here and cannot be loaded from the hub "
            f"({_one_line(error)}); check the name, the split and the network, or pass a local file"
        ) from None


def _check_text(source: str, table: Any, *, text_field: str) -> None:
    dtype = getattr(table.features[text_field], "dtype", str(table.features[text_field]))
    if dtype not in ("string", "large_string"):
        raise ValueError(f"text_field: '{text_field}' of {source} holds {dtype}, not text; choose another")
    seen = 0
    for rows in table.select_columns([text_field]).with_format("arrow").iter(batch_size=1000):
        column = rows[text_field]
        if column.null_count:
            number = seen + 1 + pc.index(pc.is_null(column), True).as_py()
            raise ValueError(f"text_field: document {number} of {source} has no '{text_field}'; repair or remove it")
        seen += len(column)


def _name_bad_line(files: list[Path]) -> None:
    """Raise a ValueError with the file and line that made a JSON source unreadable, if there is one."""
    for file in files:
        number = 0
        try:
            with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as stream:
                for line in stream:
                    number += 1
                    if line.strip() and not isinstance(json.loads(line), dict):
                        raise ValueError("it is not a JSON object")
        except (ValueError, OSError, EOFError) as error:
            where = f"after line {number}" if isinstance(error, OSError | EOFError) else f"line {number}"
            raise ValueError(
                f"source: {file}, {where}, is unreadable ({_one_line(error)}); repair or remove the line"
            ) from None


def _one_line(error: BaseException) -> str:
    """The first line of a message, or the name of an error without one."""
    return (str(error).splitlines() or [type(error).__name__])[0]
