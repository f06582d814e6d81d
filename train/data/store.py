"""A tokenised store: one Arrow table of documents, memory-mapped, beside a manifest that says what it is.

A store is a folder written once by `train/data/ingest.py` and never changed:

    manifest.json          counts, hashes, tokeniser, vocabulary, versions (the `Manifest` below)
    data-*.arrow           one row a document: `input_ids`, the text's tokens followed by the
    end-of-sentence token state.json, dataset_info.json      what `datasets.load_from_disk` needs

Opening checks the size of every file (cheap, always); `verify` checks their SHA-256 (reads everything, on
demand).

Shapes: documents = rows of the store, tokens = ids of one document. Nothing here is sharded: each rank maps
the same file, and the operating system shares the pages.

It does not order, cut or pack documents: that is `packing.py` and `stream.py`.
"""

from __future__ import annotations

import hashlib
import json
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
    """What a store holds and what it was made from.

    Args:
        documents: rows.
        tokens: ids in all rows, end-of-sentence tokens included.
        text_bytes: UTF-8 bytes of the text that the rows encode: the denominator of bits per byte.
        empty_documents: rows of the source without text, left out.
        max_token_id: largest id that a stream over this store can yield, the fill-in-the-middle tokens
            included.
        vocab_size: ids that the tokeniser can produce are below this.
        token_dtype: numpy name of the stored ids.
        special_ids: ids of the special tokens.
        tokenizer_file: the tokeniser, relative to the store's folder.
        tokenizer_sha256: SHA-256 of that file.
        recipe: what the store was asked for (source, split, tokeniser, held-out fraction): equal recipes and
            equal sources give an equal store.
        sources: SHA-256 of each source file, or the fingerprint of a hub dataset.
        files: the store's own files.
        versions: versions of the libraries that wrote it.
    """

    documents: int
    tokens: int
    text_bytes: int
    empty_documents: int
    max_token_id: int
    vocab_size: int
    token_dtype: str
    special_ids: SpecialIds
    tokenizer_file: str
    tokenizer_sha256: str
    recipe: dict[str, Any]
    sources: dict[str, str]
    files: dict[str, FileRecord]
    versions: dict[str, str]
    format_version: int = FORMAT_VERSION

    def write(self, folder: Path) -> None:
        """Write manifest.json into `folder`."""
        text = json.dumps(asdict(self), indent=2, sort_keys=True, ensure_ascii=False)
        (folder / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of the store in `folder`.

    Raises:
        ValueError: there is no manifest, or this code cannot read it; the message names the folder and the
            remedy.
    """
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
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@dataclass(frozen=True)
class TokenStore:
    """Read access to the documents of a store.

    Args:
        path: the store's folder.
        manifest: its manifest.
        lengths: [documents] int64, tokens of each document, end-of-sentence token included.
        chunks: [chunks] flat memory-mapped id arrays.
        chunk_ids: [documents] index into `chunks`.
        starts: [documents] first token of the document within its chunk.
    """

    path: Path
    manifest: Manifest
    lengths: NDArray[np.int64]
    chunks: tuple[NDArray[np.integer[Any]], ...]
    chunk_ids: NDArray[np.int64]
    starts: NDArray[np.int64]

    @classmethod
    def open(cls, path: str | Path) -> TokenStore:
        """Map the store at `path` into memory.

        Raises:
            ValueError: not a store, a file missing or of another size than recorded, or contents that do
                not add up to the manifest; the message says which and what to do.
        """
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
        lengths, chunks, chunk_ids, starts = _map_arrow(folder)
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
        """Refuse a model whose embedding is too small for this store.

        Raises:
            ValueError: an id of the store (or of the fill-in-the-middle tokens) is not below `vocab_size`.
        """
        if self.manifest.max_token_id >= vocab_size:
            raise ValueError(
                f"data.store: {self.path} holds token id {self.manifest.max_token_id}, beyond the model's "
                f"vocab_size {vocab_size}; set model.vocab_size >= {self.manifest.max_token_id + 1} "
                f"(the tokeniser has {self.manifest.vocab_size} ids) or prepare a store with fewer"
            )

    def verify(self) -> None:
        """Compare the SHA-256 of every file with the manifest; reads the whole store.

        Raises:
            ValueError: a file was altered.
        """
        for name, record in self.manifest.files.items():
            found = file_sha256(self.path / name)
            if found != record.sha256:
                raise ValueError(
                    f"data.store: {self.path / name} has sha256 {found} where the manifest records "
                    f"{record.sha256}; the file was altered: remove the folder and prepare it again"
                )


def check_same_tokenizer(store: TokenStore, heldout: TokenStore) -> None:
    """Refuse a held-out store made with another tokeniser than the training store.

    Raises:
        ValueError: the tokeniser hashes differ.
    """
    if store.manifest.tokenizer_sha256 != heldout.manifest.tokenizer_sha256:
        raise ValueError(
            f"data.heldout: {heldout.path} was made with tokeniser {heldout.manifest.tokenizer_sha256[:12]}, "
            f"data.store {store.path} with {store.manifest.tokenizer_sha256[:12]}; prepare both with the "
            f"same one: `python launch/prepare.py --tokenizer {store.tokenizer_path} ...`"
        )


def _map_arrow(
    folder: Path,
) -> tuple[NDArray[np.int64], tuple[NDArray[np.integer[Any]], ...], NDArray[np.int64], NDArray[np.int64]]:
    """Zero-copy views of the `input_ids` column: lengths, flat chunks, chunk and start of each document."""
    # Imported here: `datasets` takes most of a second, and only opening a store needs it.
    from datasets import load_from_disk

    column = load_from_disk(str(folder)).data.column("input_ids")
    lengths: list[NDArray[np.int64]] = []
    starts: list[NDArray[np.int64]] = []
    chunk_ids: list[NDArray[np.int64]] = []
    flat: list[NDArray[np.integer[Any]]] = []
    for number, chunk in enumerate(column.chunks):
        # `offsets` honours a sliced chunk and indexes the unsliced `values`.
        offsets = chunk.offsets.to_numpy(zero_copy_only=True).astype(np.int64)
        flat.append(chunk.values.to_numpy(zero_copy_only=True))
        lengths.append(np.diff(offsets))
        starts.append(offsets[:-1])
        chunk_ids.append(np.full(len(chunk), number, dtype=np.int64))
    return np.concatenate(lengths), tuple(flat), np.concatenate(chunk_ids), np.concatenate(starts)


def store_hashes(store: TokenStore) -> dict[str, str]:
    """SHA-256 of the tokeniser and of each file of the store: what a run has read."""
    manifest = store.manifest
    files = {name: record.sha256 for name, record in sorted(manifest.files.items())}
    return {"tokenizer": manifest.tokenizer_sha256, **files}
