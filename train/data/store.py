"""A tokenised store: one memory-mapped Arrow table of documents and a manifest.

A store is a folder written once by `train/data/ingest.py` and never changed:

    manifest.json          counts, hashes, tokeniser, vocabulary, versions (the `Manifest` below)
    data-*.arrow           one row a document: `input_ids`, the text's tokens and one end-of-sentence token
    state.json, dataset_info.json      what `datasets.load_from_disk` needs

Opening checks the size of every file; `verify` checks their SHA-256, which reads everything.

Shapes: documents = rows of the store, tokens = ids of one document. Each rank maps the same file, and the operating
system shares the pages.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class SpecialIds:
    """Token ids with a meaning of their own; the names follow the DeepSeek-V3 tokeniser."""

    bos: int
    eos: int
    pad: int
    fim_begin: int
    fim_hole: int
    fim_end: int


@dataclass(frozen=True)
class FileRecord:
    """Size and SHA-256 of one file of the store."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a store holds and what it was made from; equal recipes and equal sources give an equal store."""

    documents: int  # rows
    tokens: int  # ids in all rows, end-of-sentence tokens included
    text_bytes: int  # UTF-8 bytes of the text that the rows encode: the denominator of bits per byte
    empty_documents: int  # rows of the source without text, left out
    max_token_id: int  # largest id that a stream over this store can yield, the fill-in-the-middle tokens included
    vocab_size: int  # ids that the tokeniser can produce are below this
    token_dtype: str  # numpy name of the stored ids
    special_ids: SpecialIds
    tokenizer_file: str  # relative to the store's folder
    tokenizer_sha256: str
    recipe: dict[str, Any]
    sources: dict[str, str]  # SHA-256 of each source file, or of the text of a hub dataset
    files: dict[str, FileRecord]  # the store's own
    versions: dict[str, str]  # of the libraries that wrote it
    format_version: int = FORMAT_VERSION

    def write(self, folder: Path) -> None:
        """Write manifest.json into `folder`."""
        text = json.dumps(asdict(self), indent=2, sort_keys=True, ensure_ascii=False)
        (folder / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of the store in `folder`; a ValueError names one that is missing or cannot be read."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise ValueError(
            f"data.store: {folder} holds no {MANIFEST_NAME}, so it is not a tokenised store; "
            f"make one with `python launch/prepare.py --source TEXT --out {folder.parent}`"
        )
    remedy = "remove the folder and prepare the store again with launch/prepare.py"
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"data.store: {path} is not readable JSON ({error}); {remedy}") from None
    version = fields.get("format_version") if isinstance(fields, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(f"data.store: {path} has format_version {version}, expected {FORMAT_VERSION}; {remedy}")
    try:
        fields["special_ids"] = SpecialIds(**fields["special_ids"])
        fields["files"] = {name: FileRecord(**record) for name, record in fields["files"].items()}
        return Manifest(**fields)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"data.store: {path} lacks or misnames a field ({error}); {remedy}") from None


def file_sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def strict_json(value: Any) -> str:
    """Indented JSON that every reader takes: `null` for NaN and infinity, unknown types as their text."""
    return json.dumps(_plain(value), indent=2, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


@dataclass(frozen=True)
class TokenStore:
    """Read access to the documents of a store."""

    path: Path
    manifest: Manifest
    lengths: NDArray[np.int64]  # [documents] tokens, end-of-sentence token included
    chunks: tuple[NDArray[np.integer[Any]], ...]  # flat memory-mapped ids
    chunk_ids: NDArray[np.int64]  # [documents] index into `chunks`
    starts: NDArray[np.int64]  # [documents] first token within the chunk

    @classmethod
    def open(cls, path: str | Path) -> TokenStore:
        """Map the store at `path` into memory; a ValueError says what of it does not fit the manifest."""
        folder = Path(path)
        manifest = read_manifest(folder)
        for name, record in manifest.files.items():
            size = (folder / name).stat().st_size if (folder / name).is_file() else None
            if size != record.num_bytes:
                found = "is missing" if size is None else f"has {size} bytes"
                raise ValueError(
                    f"data.store: {folder / name} {found} where the manifest records {record.num_bytes}; the "
                    "store is truncated or altered: remove the folder and run launch/prepare.py again"
                )
        # Imported here: `datasets` takes most of a second, and only opening a store needs it.
        from datasets import load_from_disk

        arrow = load_from_disk(str(folder)).data.column("input_ids").chunks
        # Zero-copy views: `offsets` honours a sliced chunk and indexes the unsliced `values`.
        chunks = tuple(chunk.values.to_numpy(zero_copy_only=True) for chunk in arrow)
        offsets = [chunk.offsets.to_numpy(zero_copy_only=True).astype(np.int64) for chunk in arrow]
        lengths = np.concatenate([np.diff(each) for each in offsets])
        starts = np.concatenate([each[:-1] for each in offsets])
        chunk_ids = np.concatenate([np.full(len(chunk), i, dtype=np.int64) for i, chunk in enumerate(arrow)])
        if len(lengths) != manifest.documents or int(lengths.sum()) != manifest.tokens:
            raise ValueError(
                f"data.store: {folder} holds {len(lengths)} documents and {int(lengths.sum())} tokens where "
                f"the manifest records {manifest.documents} and {manifest.tokens}; "
                "remove the folder and run launch/prepare.py again"
            )
        return cls(folder, manifest, lengths, chunks, chunk_ids, starts)

    @property
    def tokenizer_path(self) -> Path:
        """The tokeniser file that made this store."""
        return self.path / self.manifest.tokenizer_file

    def document(self, index: int) -> NDArray[np.integer[Any]]:
        """[tokens] ids of one document, a read-only view of the file; the last id is end-of-sentence."""
        start = int(self.starts[index])
        return self.chunks[int(self.chunk_ids[index])][start : start + int(self.lengths[index])]

    def check(self, *, vocab_size: int) -> None:
        """Raise a ValueError for a model whose embedding is too small for this store."""
        if self.manifest.max_token_id >= vocab_size:
            raise ValueError(
                f"data.store: {self.path} holds token id {self.manifest.max_token_id}, beyond the model's "
                f"vocab_size {vocab_size}; set model.vocab_size >= {self.manifest.max_token_id + 1} "
                f"(the tokeniser has {self.manifest.vocab_size} ids) or prepare a store with fewer"
            )

    def verify(self) -> None:
        """Compare the SHA-256 of every file with the manifest; a ValueError names one that was altered."""
        for name, record in self.manifest.files.items():
            found = file_sha256(self.path / name)
            if found != record.sha256:
                raise ValueError(
                    f"data.store: {self.path / name} has sha256 {found} where the manifest records "
                    f"{record.sha256}; the file was altered: remove the folder and prepare it again"
                )


def check_same_tokenizer(store: TokenStore, heldout: TokenStore) -> None:
    """Raise a ValueError for a held-out store made with another tokeniser than the training store."""
    if store.manifest.tokenizer_sha256 != heldout.manifest.tokenizer_sha256:
        raise ValueError(
            f"data.heldout: {heldout.path} was made with tokeniser {heldout.manifest.tokenizer_sha256[:12]}, "
            f"data.store {store.path} with {store.manifest.tokenizer_sha256[:12]}; prepare both with the "
            f"same one: `python launch/prepare.py --tokenizer {store.tokenizer_path} ...`"
        )


def store_hashes(store: TokenStore) -> dict[str, str]:
    """SHA-256 of the tokeniser and of each file of the store: what a run has read."""
    files = {name: record.sha256 for name, record in sorted(store.manifest.files.items())}
    return {"tokenizer": store.manifest.tokenizer_sha256, **files}
