"""Sources: every kind gives the same documents, and every bad one is refused in one sentence."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from train.data.sources import open_documents, texts_of

TEXTS = ["first line\nsecond line", "zwei: äöü 😀", "  third, with spaces  "]


def read(source: Path | str, tmp_path: Path, *, text_field: str = "text") -> list[str]:
    documents = open_documents(str(source), split="train", text_field=text_field, cache=tmp_path / "cache")
    return list(texts_of(documents.table, documents.text_field))


def jsonl(texts: list[str]) -> str:
    return "".join(json.dumps({"text": text, "n": n}) + "\n" for n, text in enumerate(texts))


def write(path: Path, contents: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(contents.encode() if isinstance(contents, str) else contents)
    return path


def refusal(source: Path | str, tmp_path: Path, *, text_field: str = "text") -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (callers check the message)
        read(source, tmp_path, text_field=text_field)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_jsonl_json_gzip_parquet_and_csv_give_the_same_documents(tmp_path: Path) -> None:
    table = pa.table({"n": [0, 1, 2], "text": TEXTS})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    pyarrow.csv.write_csv(table, tmp_path / "a.csv")
    files = [
        write(tmp_path / "a.jsonl", jsonl(TEXTS)),
        write(tmp_path / "b.jsonl.gz", gzip.compress(jsonl(TEXTS).encode())),
        write(tmp_path / "c.json", json.dumps([{"text": text} for text in TEXTS])),
        tmp_path / "a.parquet",
        tmp_path / "a.csv",
    ]
    for file in files:
        assert read(file, tmp_path) == TEXTS, file


def test_txt_documents_are_separated_by_blank_lines(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "one\nstill one\n\ntwo\n\n\n\nthree")
    assert read(file, tmp_path) == ["one\nstill one", "two", "three"]


def test_a_folder_is_read_in_order_of_its_names(tmp_path: Path) -> None:
    write(tmp_path / "in" / "b.jsonl", jsonl(["2"]))
    write(tmp_path / "in" / "sub" / "c.jsonl.gz", gzip.compress(jsonl(["3"]).encode()))
    write(tmp_path / "in" / "a.jsonl", jsonl(["1"]))
    write(tmp_path / "in" / "README", "not data")
    documents = open_documents(str(tmp_path / "in"), split="train", text_field="text", cache=tmp_path / "cache")
    assert list(texts_of(documents.table, "text")) == ["1", "2", "3"]
    assert list(documents.hashes) == ["a.jsonl", "b.jsonl", "sub/c.jsonl.gz"]


def test_another_field_can_hold_the_text(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", '{"body": "x", "text": "y"}\n')
    assert read(file, tmp_path, text_field="body") == ["x"]


def test_blank_lines_of_jsonl_are_no_documents(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.jsonl", '{"text": "a"}\n\n\n{"text": "b"}\n'), tmp_path) == ["a", "b"]


@pytest.mark.parametrize("name", ["none.jsonl", "none/none.parquet", "./none", "none/"])
def test_a_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    assert "source: there is no file or folder" in refusal(f"{tmp_path}/{name}", tmp_path)


def test_a_hub_dataset_is_read_through_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def hub(name: str, config: str | None, *, split: str) -> datasets.Dataset:
        asked.append((name, config, split))
        return datasets.Dataset.from_dict({"text": TEXTS})

    monkeypatch.setattr(datasets, "load_dataset", hub)
    documents = open_documents("owner/name:small", split="train[:1%]", text_field="text", cache=tmp_path / "cache")
    assert list(texts_of(documents.table, "text")) == TEXTS
    assert asked == [("owner/name", "small", "train[:1%]")]
    (source,) = documents.hashes
    assert source == "owner/name:small@train[:1%]"


def test_a_hub_dataset_that_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    # The suite runs offline (conftest.py).
    message = refusal("nobody/nothing", tmp_path)
    assert "'nobody/nothing' (split 'train') is no file here and cannot be loaded from the hub" in message
    assert "or pass a local file" in message


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.parquet", "a.csv"])
def test_an_empty_file_is_refused(tmp_path: Path, name: str) -> None:
    message = refusal(write(tmp_path / name, ""), tmp_path)
    assert "a." in message
    assert "is an empty corpus; pass files with text in them" in message


EMPTY, NO_TEXT = "is an empty corpus", "'text' of .* not text; choose another"
REPAIR = ".*; repair or remove the line$"
ZIPPED = gzip.compress(jsonl(TEXTS * 50).encode())
BAD_FILES: list[tuple[str, str | bytes, str]] = [
    ("a.txt", "\n\n\n", EMPTY),
    ("a.jsonl", "\n\n", EMPTY),
    ("a.jsonl.gz", gzip.compress(b"", mtime=0), EMPTY),
    ("a.jsonl", '{"text": "a"}\nno\n{"text": "b"}\n', rf"a\.jsonl, line 2, is unreadable \(Expecting value{REPAIR}"),
    (
        "a.jsonl",
        '{"text": "a"}\n{"n": 1}\n{"text": "c',
        rf"a\.jsonl, line 3, is unreadable \(Unterminated string{REPAIR}",
    ),
    ("a.jsonl", '{"text": "a"}\n"b"\n', rf"a\.jsonl, line 2, is unreadable \(it is not a JSON object{REPAIR}"),
    ("a.jsonl.gz", ZIPPED[: len(ZIPPED) // 2], r"a\.jsonl\.gz, after line .* ended before the end-of-stream marker"),
    ("a.parquet", b"\xff\xfe not what it says", r"a\.parquet cannot be read as"),
    ("a.txt", b"\xff\xfe not what it says", r"a\.txt cannot be read as"),
    ("a.jsonl", '{"body": "x", "id": 1}\n', "has no field 'text'; it has body, id: choose one with --text-field"),
    ("a.jsonl", jsonl(["x"] * 1500) + '{"n": 1}\n', "document 1501 of .* has no 'text'; repair or remove it"),
    ("a.jsonl", '{"text": 5}\n', NO_TEXT),
    ("a.jsonl", '{"text": [1, 2]}\n', NO_TEXT),
    ("a.jsonl", '{"text": {"a": 1}}\n', NO_TEXT),
]


@pytest.mark.parametrize(("name", "contents", "message"), BAD_FILES, ids=range(len(BAD_FILES)))
def test_a_bad_file_is_refused_by_name_line_or_field(
    tmp_path: Path, name: str, contents: str | bytes, message: str
) -> None:
    assert re.search(message, refusal(write(tmp_path / name, contents), tmp_path))


def test_a_folder_of_two_kinds_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.txt", "a")
    write(tmp_path / "in" / "b.jsonl", jsonl(["b"]))
    assert "is not made of files of one known kind" in refusal(tmp_path / "in", tmp_path)


def test_a_folder_without_data_and_an_unknown_kind_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.pdf", "a")
    assert "holds none of .jsonl .json .parquet .csv .txt" in refusal(tmp_path / "in", tmp_path)
    assert "is not made of files of one known kind" in refusal(tmp_path / "in" / "a.pdf", tmp_path)
