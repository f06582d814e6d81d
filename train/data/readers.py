"""The text of one file: one field of each row, as the string it is, or one sentence with file and line.

    .jsonl .json    one object a line, or one array of objects
    .parquet .csv   one row a document; every value of a CSV file is text
    .txt            one document, or documents separated by blank lines

Each may be compressed (.gz, .zst). Other fields are passed over, whatever they hold. A caller that makes the text of a
row itself (of a conversation: `train/chat/messages.py`) gets whole rows, of a kind that nests: .jsonl, .json, .parquet.
Memory depends on the longest row, not on the number of rows.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

COMPRESSIONS = (".gz", ".zst")
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
CHUNK_BYTES = 1 << 20
# Few, because each may be long; reading rows one by one would take three times as long.
PARQUET_ROWS = 16

# Integers of other fields may have any number of digits.
JSON = json.JSONDecoder(parse_int=float)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"it has '{max(names, key=names.count)}' twice")
    return dict(pairs)


# Of a row that is read whole every value counts.
WHOLE_JSON = json.JSONDecoder(object_pairs_hook=_once)
JSON_FIRST = re.compile(r"\s*\[\s*(?P<end>\])?")
JSON_NEXT = re.compile(r"\s*(,|(?P<end>\]))\s*")
# What a cut literal, number or escape can be short of.
JSON_CUT_CHARS = 16
JSON_KINDS = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
}

NESTING = (".jsonl", ".json", ".parquet")

# The place of a row ("line" or "row", from 1) and what it holds.
Row = tuple[str, int, Any]
# A row of several fields -> its text; a ValueError says what is wrong with it.
Parse = Callable[[dict[str, Any]], str]


class _BadRow(Exception):
    """A row that cannot be read, and why."""

    def __init__(self, unit: str, number: int, reason: str) -> None:
        super().__init__(reason)
        self.where = f"{unit} {number}"


def kind_of(file: Path) -> str | None:
    """The suffix of READERS that says how to read a file, compression apart."""
    name = Path(file.stem) if file.suffix.lower() in COMPRESSIONS else file
    return name.suffix.lower() if name.suffix.lower() in READERS else None


def read_texts(file: Path, text_field: str, *, whole_txt: bool = False, parse: Parse | None = None) -> Iterator[str]:
    """The texts of a file, in its order; `whole_txt`: a .txt file is one text; `parse`: makes a text of a whole row.

    Raises:
        ValueError: whatever keeps a text from being read exactly.
    """
    kind, unit, number = kind_of(file), "line", 0
    assert kind is not None
    rows = _whole if whole_txt and kind == ".txt" else READERS[kind]
    try:
        with file.open("rb") as raw:
            head = raw.read(len(LFS_POINTER))
        if head == LFS_POINTER and file.stat().st_size < 1024:
            raise ValueError("it is a git-lfs pointer, not the data; run `git lfs pull`")
        if not head and (kind == ".parquet" or file.suffix.lower() in COMPRESSIONS):
            raise ValueError("it has no bytes, so it was not written to its end")
        with _opened(file) as stream:
            for unit, number, value in rows(stream, None if parse else text_field):
                value = _text(value, text_field, unit, number) if parse is None else _parsed(value, parse, unit, number)
                # Arrow and every tokeniser take UTF-8.
                if not value.isascii():
                    value.encode()
                yield value
    except _BadRow as error:
        raise ValueError(
            f"source: {file}, {error.where}, is unreadable ({error}); repair or remove the {unit}"
        ) from None
    except UnicodeEncodeError as error:
        what = "it" if parse else f"'{text_field}'"
        raise ValueError(
            f"source: {file}, {unit} {number}, is unreadable ({what} holds half of a surrogate pair or a byte "
            f"that is not UTF-8, \\u{ord(error.object[error.start]):04x}); repair or remove the {unit}"
        ) from None
    # Damaged files raise whatever their library pleases.
    except Exception as error:  # noqa: BLE001
        where = f"after {unit} {number}, " if number else ""
        raise ValueError(
            f"source: {file} {where}cannot be read ({one_line(error)}); repair or replace the file"
        ) from None


def _text(value: Any, text_field: str, unit: str, number: int) -> str:
    if not isinstance(value, str):
        raise _BadRow(unit, number, f"'{text_field}' holds {kind_name(value)}, not text")
    return value


def _parsed(value: Any, parse: Parse, unit: str, number: int) -> str:
    try:
        return parse(value)
    except ValueError as error:
        raise _BadRow(unit, number, str(error)) from None


def kind_name(value: Any) -> str:
    """What a value of a JSON file is, in words."""
    return JSON_KINDS.get(type(value), "text" if isinstance(value, str) else type(value).__name__)


def one_line(error: BaseException) -> str:
    """A message without its line breaks, or the name of an error without one."""
    return " ".join(str(error).split()) or type(error).__name__


def no_field(text_field: str, names: Iterable[str]) -> str:
    """What is wrong with a row or table that lacks the field."""
    held = ", ".join(name if name.isprintable() else ascii(name) for name in names)
    return f"it has no field '{text_field}'; it has {held or 'none'}: choose one with --text-field"


def _opened(file: Path) -> Any:
    """The stream of a file's bytes, decompressed."""
    if file.suffix.lower() == ".gz":
        return gzip.open(file)
    if file.suffix.lower() == ".zst":
        return io.BufferedReader(pa.CompressedInputStream(file.open("rb"), "zstd"))
    return file.open("rb")


def _lines(stream: IO[bytes]) -> Iterator[tuple[int, str]]:
    """Number and text of each line; only a line feed ends one."""
    for number, line in enumerate(stream, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise _BadRow("line", number, f"byte 0x{line[error.start]:02x} is not UTF-8") from None
        yield number, text


def _split(line: str) -> Iterable[str]:
    """The lines that end with a carriage return inside of one."""
    return io.StringIO(line, newline="") if "\r" in line else (line,)


def _paragraphs(stream: IO[bytes], _: str) -> Iterator[Row]:
    number, paragraph = 0, [""]
    for number, raw in _lines(stream):
        for line in _split(raw):
            if not line.strip("\r\n") and paragraph[-1].endswith(("\n", "\r")):
                paragraph[-1] = paragraph[-1].removesuffix("\n").removesuffix("\r")
                if any(paragraph):
                    yield "line", number, "".join(paragraph)
                paragraph = [""]
            else:
                paragraph.append(line)
    if any(paragraph):
        yield "line", number, "".join(paragraph)


def _whole(stream: IO[bytes], _: str | None) -> Iterator[Row]:
    yield "line", 1, "".join(text for _, text in _lines(stream))


def _csv_rows(stream: IO[bytes], text_field: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    rows = csv.reader((part for _, line in _lines(stream) for part in _split(line)), strict=True)
    header: list[str] = []
    column, number = 0, 1
    try:
        for row in rows:
            if len(row) > 1 or "".join(row).strip() or (row and len(header) == 1):
                if not header:
                    header, column = row, _column(row, text_field)
                elif len(row) != len(header):
                    reason = f"{len(row)} fields where the header has {len(header)}"
                    raise _BadRow("line", number, reason)
                else:
                    yield "line", number, row[column]
            number = rows.line_num + 1
    except csv.Error as error:
        raise _BadRow("line", number, str(error)) from None


def _column(names: list[str], text_field: str) -> int:
    """The index of the text among the columns of a table."""
    if names.count(text_field) != 1:
        raise ValueError(
            f"'{text_field}' is twice among its fields" if text_field in names else no_field(text_field, names)
        )
    return names.index(text_field)


def _parquet_rows(stream: Any, text_field: str | None) -> Iterator[Row]:
    # The library jumps about in a file, which a compressed one cannot.
    is_plain = isinstance(getattr(stream, "raw", None), io.FileIO)
    with nullcontext(stream) if is_plain else tempfile.TemporaryFile() as file:
        if not is_plain:
            shutil.copyfileobj(stream, file)
        with pq.ParquetFile(file, page_checksum_verification=True) as table:
            # Writers leave shards without rows for empty partitions.
            if table.metadata.num_rows:
                yield from _whole_rows(table) if text_field is None else _table_rows(table, text_field)


def _whole_rows(table: Any) -> Iterator[Row]:
    number, fields = 0, pa.struct(list(table.schema_arrow))
    for rows in table.iter_batches(batch_size=PARQUET_ROWS):
        for value in rows.to_pylist():
            number += 1
            yield "row", number, without_null_fields(value, fields)


def without_null_fields(value: Any, kind: pa.DataType) -> Any:
    """A value of a table as its writer had it, without the fields that it has because other rows have them.

    A field that was written as null cannot be told from one that was not there and is dropped; nulls of lists stay.
    """
    if pa.types.is_struct(kind) and isinstance(value, dict):
        held = {field.name: without_null_fields(value[field.name], field.type) for field in kind}
        return {name: each for name, each in held.items() if each is not None}
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return [without_null_fields(each, kind.value_type) for each in value] if is_list and value is not None else value


def _table_rows(table: Any, text_field: str) -> Iterator[Row]:
    schema = table.schema_arrow
    dtype = schema.field(_column(schema.names, text_field)).type
    plain = dtype.value_type if pa.types.is_dictionary(dtype) else dtype
    if not (pa.types.is_string(plain) or pa.types.is_large_string(plain) or pa.types.is_string_view(plain)):
        raise ValueError(f"'{text_field}' holds {dtype}, not text; choose another with --text-field")
    number = 0
    for rows in table.iter_batches(batch_size=PARQUET_ROWS, columns=[text_field]):
        for scalar in rows.column(text_field):
            number += 1
            try:
                value = scalar.as_py()
            except UnicodeDecodeError as error:
                raise _BadRow("row", number, f"byte 0x{error.object[error.start]:02x} is not UTF-8") from None
            yield "row", number, value


def _json_rows(stream: Any, text_field: str | None) -> Iterator[Row]:
    beginning = stream.peek(CHUNK_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()
    if beginning.startswith(b"["):
        yield from _array_rows(stream, text_field)
        return
    decoder = WHOLE_JSON if text_field is None else JSON
    for number, line in _lines(stream):
        if not line.isspace():
            try:
                value = decoder.decode(line)
            except (ValueError, RecursionError) as error:
                raise _BadRow("line", number, one_line(error)) from None
            yield "line", number, _text_of("line", number, value, line, text_field)


def _array_rows(stream: IO[bytes], text_field: str | None) -> Iterator[Row]:
    """The objects of one JSON array, each parsed as soon as it is there."""
    # A byte that is not UTF-8 becomes a lone surrogate, which `read_texts` refuses in the row that holds it.
    decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
    objects = WHOLE_JSON if text_field is None else JSON
    text, at, number, reason = "", 0, 0, "the array has no end"
    while chunk := stream.read(max(CHUNK_BYTES, len(text) - at)):
        text, at = text[at:] + decoder.decode(chunk), 0
        while match := (JSON_NEXT if number else JSON_FIRST).match(text, at):
            if match["end"]:
                if text[match.end() :].strip() or stream.read().strip():
                    raise _BadRow("row", number + 1, "the array has ended before it")
                return
            try:
                value, end = objects.raw_decode(text, match.end())
            except json.JSONDecodeError as error:
                reason = one_line(error)
                if error.pos < len(text) - JSON_CUT_CHARS and not error.msg.startswith("Unterminated string"):
                    raise _BadRow("row", number + 1, reason) from None
                break
            except (ValueError, RecursionError) as error:
                raise _BadRow("row", number + 1, one_line(error)) from None
            number += 1
            yield "row", number, _text_of("row", number, value, text[match.end() : end], text_field)
            at = end
        else:
            if text[at:].strip():
                raise _BadRow("row", number + 1, "there is no comma before it")
    raise _BadRow("row", number + 1, reason)


def _text_of(unit: str, number: int, value: Any, source: str, text_field: str | None) -> Any:
    """The field of a parsed object, or the object; `source` is what was parsed."""
    if not isinstance(value, dict):
        raise _BadRow(unit, number, "it is not a JSON object")
    if text_field is None:
        return value
    if text_field not in value:
        raise _BadRow(unit, number, no_field(text_field, value))
    if source.count(f'"{text_field}"') > 1:
        names = [name for name, _ in json.loads(source, object_pairs_hook=list, parse_int=float)]
        if names.count(text_field) > 1:
            raise _BadRow(unit, number, f"it has '{text_field}' twice")
    return value[text_field]


READERS: dict[str, Callable[[Any, Any], Iterator[Row]]] = {
    ".jsonl": _json_rows,
    ".json": _json_rows,
    ".parquet": _parquet_rows,
    ".csv": _csv_rows,
    ".txt": _paragraphs,
}
