"""Sources: every kind gives the same documents, and every bad one is refused in one sentence."""

from __future__ import annotations

import gzip
import io
import json
import re
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from train.data import readers, sources
from train.data.sources import Documents, open_documents, passed_by

TEXTS = ["first line\nsecond line", "zwei: äöü 😀", "  third, with spaces  "]


def documents_of(source: Path | str, tmp_path: Path, *, text_field: str = "text") -> Documents:
    return open_documents(str(source), split="train", text_field=text_field, cache=tmp_path / "cache")


def read(source: Path | str, tmp_path: Path, *, text_field: str = "text") -> list[str]:
    return list(documents_of(source, tmp_path, text_field=text_field).all_texts())


def zstd(contents: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(contents))


def parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(table, sink)
    return sink.getvalue()


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


TABLE = pa.table({"n": [0, 1, 2], "text": TEXTS})


def csv_of(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pyarrow.csv.write_csv(table, sink)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("kind", "contents"),
    [
        ("jsonl", jsonl(TEXTS).encode()),
        ("json", json.dumps([{"text": text} for text in TEXTS], indent=1).encode()),
        ("parquet", parquet(TABLE)),
        ("csv", csv_of(TABLE)),
        ("txt", "\n\n".join(TEXTS).encode()),
    ],
)
def test_every_kind_plain_or_compressed_gives_the_same_documents(tmp_path: Path, kind: str, contents: bytes) -> None:
    assert read(write(tmp_path / f"a.{kind}", contents), tmp_path) == TEXTS
    assert read(write(tmp_path / f"a.{kind}.gz", gzip.compress(contents)), tmp_path) == TEXTS
    # Two frames in a row, as parallel compressors write them.
    frames = zstd(contents[:7]) + zstd(contents[7:])
    assert read(write(tmp_path / f"[a]::*.{kind}.zst", frames), tmp_path) == TEXTS


def test_txt_documents_are_separated_by_blank_lines(tmp_path: Path) -> None:
    file = write(tmp_path / "a.txt", "one\nstill one\n\ntwo\n\n\n\nthree")
    assert read(file, tmp_path) == ["one\nstill one", "two", "three"]


def test_a_txt_file_of_a_folder_is_one_document_unless_paragraphs_are_asked_for(tmp_path: Path) -> None:
    texts = ["\ufeffone\r\n\r\ntwo\n\n", "\n\n", "three\0\n\nfour"]
    for name, text in zip("abc", texts, strict=True):
        write(tmp_path / "in" / f"{name}.txt", text)
    whole = documents_of(tmp_path / "in", tmp_path)
    assert list(whole.all_texts()) == ["one\r\n\r\ntwo\n\n", "three\0\n\nfour"]
    assert whole.file_starts == (0, 1, 2)
    apart = open_documents(str(tmp_path / "in"), split="", text_field="", cache=tmp_path / "c", paragraphs=True)
    assert list(apart.all_texts()) == ["one", "two", "three\0", "four"]
    write(tmp_path / "in" / "b.txt", b"a\n\ncaf\xe9")
    assert "b.txt, line 3, is unreadable (byte 0xe9 is not UTF-8)" in refusal(tmp_path / "in", tmp_path)


def test_a_folder_is_read_in_order_of_its_names_without_what_is_hidden(tmp_path: Path) -> None:
    write(tmp_path / "in" / "b.jsonl", jsonl(["2"]))
    write(tmp_path / "in" / "sub" / "c.jsonl.gz", gzip.compress(jsonl(["3"]).encode()))
    write(tmp_path / "in" / "a.jsonl", jsonl(["1"]))
    others = ["._a.jsonl", ".cache/1.jsonl", "README", "sub/.d.txt"]
    for name in others:
        write(tmp_path / "in" / name, "not data")
    assert passed_by(str(tmp_path / "in")) == others
    documents = documents_of(tmp_path / "in", tmp_path)
    assert list(documents.all_texts()) == ["1", "2", "3"]
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
    assert list(documents.all_texts()) == TEXTS
    assert asked == [("owner/name", "small", "train[:1%]")]
    (source,) = documents.hashes
    assert source == "owner/name:small@train[:1%]"


def test_a_hub_dataset_that_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    # The suite runs offline (conftest.py).
    message = refusal("nobody/nothing", tmp_path)
    assert "'nobody/nothing' (split 'train') is no file here and cannot be loaded from the hub" in message
    assert "or pass a local file" in message


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.csv"])
def test_an_empty_file_is_refused(tmp_path: Path, name: str) -> None:
    message = refusal(write(tmp_path / name, ""), tmp_path)
    assert "a." in message
    assert "is an empty corpus; pass files with text in them" in message


EMPTY, REPAIR = "is an empty corpus", r"; repair or remove the (line|row)$"
ZIPPED = gzip.compress(jsonl(TEXTS * 50).encode())
NO_FIELD = "it has no field 'text'; it has body, id: choose one with --text-field"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
BAD_UTF8 = parquet(pa.table({"text": pa.array([b"ok", b"caf\xe9"], pa.binary()).view(pa.string())}))
BAD_FILES: list[tuple[str, str | bytes, str]] = [
    ("a.txt", "\n\n\n", EMPTY),
    ("a.jsonl", "\n\n", EMPTY),
    ("a.json", "[ ]", EMPTY),
    ("a.csv", "text\n\n", EMPTY),
    ("a.parquet", parquet(TABLE.slice(0, 0)), EMPTY),
    ("a.jsonl", '{"text": ""}\n{"text": " \\n"}\n', EMPTY),
    ("a.jsonl.gz", gzip.compress(b"", mtime=0), EMPTY),
    ("a.jsonl", '{"text": "a"}\nno\n', r"a\.jsonl, line 2, is unreadable \(Expecting value.*" + REPAIR),
    ("a.jsonl", '{"text": "a"}\n{"text": "c', r"line 2, is unreadable \(Unterminated string.*" + REPAIR),
    ("a.jsonl", '{"text": "a"}\n"b"\n', r"line 2, is unreadable \(it is not a JSON object.*" + REPAIR),
    ("a.jsonl", '{"text": "a"}\n' + "[" * 9999, r"line 2, is unreadable \(maximum recursion depth.*" + REPAIR),
    ("a.jsonl", '{"text": "a", "text": "b"}', r"line 1, is unreadable \(it has 'text' twice\)" + REPAIR),
    ("a.jsonl", '{"text": "a"}\n{"text": "\\ud83d"}\n', r"line 2, .* half of a surrogate pair .* \\ud83d\)" + REPAIR),
    ("a.json", '[{"text": "a"},\n {"text": "b"}', r"a\.json, row 3, is unreadable \(the array has no end\)" + REPAIR),
    ("a.json", '[{"text": "a"} {"text": "b"}]', r"row 2, is unreadable \(there is no comma before it\)" + REPAIR),
    ("a.json", '[{"text": "a"}]{"text": "b"}', r"row 2, is unreadable \(the array has ended before it\)" + REPAIR),
    ("a.json", b'[{"text": "a"}, {"text": "\xe9"}]', r"row 2, .* a byte that is not UTF-8, \\udce9\)" + REPAIR),
    ("a.csv", 'text,n\n"x\ny",1\na,b,2\n', r"a\.csv, line 4, .*3 fields where the header has 2\)" + REPAIR),
    ("a.csv", 'text,n\na,1\n"b,2\nc,3\n', r"line 3, is unreadable \(unexpected end of data\)" + REPAIR),
    ("a.csv", "body,id\nx,1\n", NO_FIELD),
    ("a.csv", "text,text\nx,1\n", "'text' is twice among its fields"),
    ("a.jsonl.gz", ZIPPED[: len(ZIPPED) // 2], r"a\.jsonl\.gz after line .* ended before the end-of-stream marker"),
    ("a.jsonl.gz", b"PK no gzip", r"a\.jsonl\.gz cannot be read \(Not a gzipped file"),
    ("a.jsonl.zst", zstd(b"x" * 99)[:-3], r"a\.jsonl\.zst cannot be read \(Truncated compressed stream"),
    ("a.parquet", b"\xff\xfe not what it says", r"a\.parquet cannot be read \(.*magic bytes not found"),
    ("a.parquet", parquet(TABLE)[:-30] + b"0" * 22 + b"\x09\0\0\0PAR1", r"a\.parquet cannot be read \("),
    ("a.parquet", BAD_UTF8, r"a\.parquet, row 2, is unreadable \(byte 0xe9 is not UTF-8\)" + REPAIR),
    ("a.parquet", parquet(pa.table({"text": [b"x"]})), "'text' holds binary, not text; choose another"),
    ("a.parquet", parquet(pa.table({"text": ["x", None]})), "row 2, is unreadable .*'text' holds null, not text"),
    ("a.parquet", parquet(pa.table({"body": ["x"], "id": [1]})), NO_FIELD),
    ("a.jsonl", '{"body": "x", "id": 1}\n', NO_FIELD),
    ("a.jsonl", jsonl(["x"] * 1500) + '{"n": 1}\n', "line 1501, is unreadable .it has no field 'text'; it has n: "),
    *[(f"a{kind}", b"text\nb\ncaf\xe9\n", rf"a{kind}, line 3, .*byte 0xe9 is not UTF-8") for kind in (".txt", ".csv")],
    *[(f"a{kind}", POINTER, rf"a{kind} cannot be read \(it is a git-lfs pointer, not") for kind in readers.READERS],
    *[("a.jsonl", f'{{"text": "a"}}\n{{"text": {value}}}\n', f"line 2, .*'text' holds {held}, not text.*" + REPAIR)
      for value, held in {"5": "a number", "1e3": "a number", "true": "true or false", "null": "null", "[1]": "a list",
                          "{}": "an object"}.items()],
    *[(name, b"", rf"{name} cannot be read \(it has no bytes") for name in ("a.parquet", "a.txt.gz", "a.jsonl.zst")],
]  # fmt: skip


@pytest.mark.parametrize(("name", "contents", "message"), BAD_FILES, ids=range(len(BAD_FILES)))
def test_a_bad_file_is_refused_by_name_line_or_field(
    tmp_path: Path, name: str, contents: str | bytes, message: str
) -> None:
    assert re.search(message, refusal(write(tmp_path / name, contents), tmp_path))


KEPT: list[tuple[str, str | bytes, list[str]]] = [
    ("jsonl", '{"text": "2024-01-01"}\n{"text": "1"}\n{"text": "NA"}\n', ["2024-01-01", "1", "NA"]),
    ("jsonl", '{"text": "a\\u0000\u2028\x85\\ud83d\\ude00"}\r\n{"text": "b"}\r\n', ["a\0\u2028\x85😀", "b"]),
    ("jsonl", '\ufeff{"text": "a", "n": [{"text": 1}]}\n\n\n{"n": {}, "text": "b"}', ["a", "b"]),
    ("jsonl", '{"n": ' + "9" * 5000 + ', "text": "a"}\n{"n": "\\ud83d", "text": "b"}', ["a", "b"]),
    ("json", '\ufeff[\n{"text": "a,]"}\n,\n{"n": NaN, "text": "b"}]\n', ["a,]", "b"]),
    ("csv", "\ufefftext\nNA\nnull\nnan\n1\n1.50\n2024-01-01\n\n", ["NA", "null", "nan", "1", "1.50", "2024-01-01"]),
    ("csv", 'n,text\r\n1,"a\r\nb, ""c"""\r\n\r\n2, d \r\n', ['a\r\nb, "c"', " d "]),
    ("csv", 'text\rone\r"t\rwo"\r', ["one", "t\rwo"]),
    ("csv", "text\n" + "x" * 200_000 + "\na\0b\n", ["x" * 200_000, "a\0b"]),
    ("txt", "\ufeffone\r\nline\r\n\r\ntwo\rlines\n \n\n\nthree\0\n", ["one\r\nline", "two\rlines\n ", "\nthree\0\n"]),
    ("parquet", parquet(pa.table({"text": pa.array(["a", "b", "a"]).dictionary_encode()})), ["a", "b", "a"]),
    ("parquet", parquet(pa.table({"text": pa.array(["1", "", "2024-01-01"], pa.large_string())})), ["1", "2024-01-01"]),
]


@pytest.mark.parametrize(("kind", "contents", "texts"), KEPT, ids=range(len(KEPT)))
def test_text_is_kept_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, contents: str | bytes, texts: list[str]
) -> None:
    file = write(tmp_path / f"a.{kind}", contents)
    assert read(file, tmp_path) == texts
    # Any place may be the end of a chunk.
    monkeypatch.setattr(readers, "CHUNK_BYTES", 1)
    assert read(file, tmp_path) == texts


def test_shards_may_differ_in_all_but_the_text_and_be_empty(tmp_path: Path) -> None:
    for name, table in {
        "a": pa.table({"text": ["a"], "n": [1]}),
        "b": pa.table({"n": pa.nulls(0)}),
        "c": pa.table({"n": [[{"x": 1}]], "text": pa.array(["c"], pa.large_string())}),
    }.items():
        write(tmp_path / "tables" / f"{name}.parquet", parquet(table))
    lines = {
        "a": '{"text": "a", "n": 1}',
        "b": "",
        "c": '{"n": [{"x": "1"}], "text": "c"}',
        "d": '{"text": "d", "n": []}',
    }
    for name, line in lines.items():
        write(tmp_path / "lines" / f"{name}.jsonl", line)
    assert read(tmp_path / "tables", tmp_path) == ["a", "c"]
    assert read(tmp_path / "lines", tmp_path) == ["a", "c", "d"]


def test_batches_are_cut_by_bytes_and_by_rows(tmp_path: Path) -> None:
    limit = sources.BATCH_BYTES
    lengths = [limit // 2, limit // 2, 1, 3 * limit, 1, *[1] * 2500]
    documents = documents_of(write(tmp_path / "a.jsonl", jsonl(["x" * length for length in lengths])), tmp_path)
    assert list(documents.batches()) == [(0, 2), (2, 3), (3, 4), (4, 1004), (1004, 2004), (2004, 2505)]
    assert [len(text) for text in documents.all_texts()] == lengths
    # What the file holds is what is mapped at once.
    assert max(batch.nbytes for batch in documents.table.data.to_batches()) < 4 * limit


def test_a_folder_of_two_kinds_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.txt", "a")
    write(tmp_path / "in" / "b.jsonl", jsonl(["b"]))
    assert "is not made of files of one known kind" in refusal(tmp_path / "in", tmp_path)


def test_a_folder_without_data_and_an_unknown_kind_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.pdf", "a")
    assert "holds none of .jsonl .json .parquet .csv .txt (or .gz .zst of them)" in refusal(tmp_path / "in", tmp_path)
    assert "is not made of files of one known kind" in refusal(tmp_path / "in" / "a.pdf", tmp_path)


def test_a_file_that_would_be_missed_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.jsonl", jsonl(["a"]))
    write(tmp_path / "in" / "B.JSONL", jsonl(["b"]))
    assert read(tmp_path / "in", tmp_path) == ["b", "a"]
    other = write(tmp_path / "in" / "c.jsonl.xz", "")
    assert "is not made of files of one known kind" in refusal(tmp_path / "in", tmp_path)
    other.unlink()
    (tmp_path / "in" / "d.jsonl").symlink_to(tmp_path / "nothing")
    assert "d.jsonl is a link to nothing" in refusal(tmp_path / "in", tmp_path)
