"""Stores made by hand, token by token: the readers are tested against known ids, not against ingest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from train.data.index import Index, scan_arrow
from train.data.store import FileRecord, Manifest, SpecialIds, TokenStore, file_sha256, read_manifest

SPECIAL = SpecialIds(bos=0, eos=1, pad=2, fim_hole=3, fim_begin=4, fim_end=5)


def write_store(
    folder: Path,
    documents: Sequence[Sequence[int]],
    *,
    text_bytes: int = 1,
    tokenizer_sha256: str = "t",
    vocab_size: int | None = None,
    block_bytes: int = 2 * 2**20,
) -> TokenStore:
    """Write a store of the given documents (the last id of each counts as its end) and open it."""
    # Here, since ranks import this file for its readers: a second each.
    import datasets

    datasets.disable_progress_bars()
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})
    rows = {"input_ids": [list(document) for document in documents]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(folder))
    index, *_ = scan_arrow(sorted(folder.glob("*.arrow")), dtype="int32", block_bytes=block_bytes)
    largest = max(5, *(max(document) for document in documents))
    Manifest(
        documents=len(documents),
        tokens=sum(map(len, documents)),
        text_bytes=text_bytes,
        empty_documents=0,
        max_token_id=largest,
        vocab_size=vocab_size or largest + 1,
        token_dtype="int32",
        special_ids=SPECIAL,
        tokenizer_file="../tokenizer.json",
        tokenizer_sha256=tokenizer_sha256,
        recipe={},
        sources={},
        files={file.name: FileRecord(file.stat().st_size, file_sha256(file)) for file in folder.iterdir()},
        versions={},
        block_bytes=block_bytes,
    ).seal(folder, index)
    return TokenStore.open(folder)


def consecutive(lengths: Sequence[int], *, first: int = 10) -> list[list[int]]:
    """Documents of the given lengths in which no token occurs twice: first, first + 1, ..."""
    documents: list[list[int]] = []
    for length in lengths:
        documents.append(list(range(first, first + length)))
        first += length
    return documents


def resealed(
    folder: Path,
    *,
    block_bytes: int | None = None,
    change_index: Callable[[Index], Index] = lambda index: index,
    **fields: object,
) -> Path:
    """Give a store other hashes of its own: smaller blocks, or what an author of stores could write."""
    manifest = read_manifest(folder)
    block_bytes = block_bytes or manifest.block_bytes
    files = [folder / name for name in manifest.data_files]
    index, *_ = scan_arrow(files, dtype=manifest.token_dtype, block_bytes=block_bytes)
    replace(manifest, block_bytes=block_bytes, **fields).seal(folder, change_index(index))  # type: ignore[arg-type]
    return folder


def signed(manifest: dict[str, Any]) -> dict[str, Any]:
    """The fields of a manifest with the hash that belongs to them."""
    body = {name: value for name, value in manifest.items() if name != "sha256"}
    return body | {"sha256": hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()}


def as_format_1(folder: Path) -> Path:
    """Take from a store what the first format did not have."""
    manifest = json.loads((folder / "manifest.json").read_text()) | {"format_version": 1}
    for name in ("index", "block_bytes", "sha256"):
        del manifest[name]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "index.bin").unlink()
    return folder


def flip(file: Path, at: int) -> None:
    """Change one byte where it is, as a failing disk or another program would."""
    with file.open("r+b") as stream:
        stream.seek(at)
        (byte,) = stream.read(1)
        stream.seek(at)
        stream.write(bytes([byte ^ 1]))


def alter(file: Path) -> None:
    """Flip a bit of an Arrow file, whose size stays."""
    content = bytearray(file.read_bytes())
    content[-200] ^= 1
    file.write_bytes(content)
