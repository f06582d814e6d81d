"""Stores made by hand, token by token: the readers are tested against known ids, not against ingest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import datasets

from train.data.store import FileRecord, Manifest, SpecialIds, TokenStore, file_sha256

SPECIAL = SpecialIds(bos=0, eos=1, pad=2, fim_hole=3, fim_begin=4, fim_end=5)


def write_store(
    folder: Path,
    documents: Sequence[Sequence[int]],
    *,
    text_bytes: int = 1,
    tokenizer_sha256: str = "t",
    vocab_size: int | None = None,
) -> TokenStore:
    """Write a store of the given documents (the last id of each counts as its end) and open it."""
    datasets.disable_progress_bars()
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})
    rows = {"input_ids": [list(document) for document in documents]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(folder))
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
    ).write(folder)
    return TokenStore.open(folder)


def consecutive(lengths: Sequence[int], *, first: int = 10) -> list[list[int]]:
    """Documents of the given lengths in which no token occurs twice: first, first + 1, ..."""
    documents: list[list[int]] = []
    for length in lengths:
        documents.append(list(range(first, first + length)))
        first += length
    return documents


def alter(file: Path) -> None:
    """Flip a bit of an Arrow file, whose size stays."""
    content = bytearray(file.read_bytes())
    content[-200] ^= 1
    file.write_bytes(content)
