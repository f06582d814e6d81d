"""A tokenised store: Arrow files of documents, an index with a SHA-256 for each of their blocks, and a manifest.

A store is a folder written once by `train/data/ingest.py` and never changed:

    manifest.json          counts, hashes, tokeniser, vocabulary, versions (the `Manifest` below), and its own SHA-256
    index.bin              where each document is, and the hashes of the blocks (`train/data/index.py`)
    data-*.arrow           one row a document: `input_ids`, the text's tokens and one end-of-sentence token; of a
                           conversation (`train/chat/`) also `loss_mask`, 1 for each token that has a loss
    state.json, dataset_info.json      what `datasets.load_from_disk` needs; nothing here reads them

Opening reads manifest and index and compares every file's size. A block of the data is compared with its hash when
something in it is first read (`train/data/blocks.py`); `verify` compares everything. Only files of the folder and the
tokeniser beside it are read, and no links.

Shapes: documents = rows of the store, tokens = ids of one document.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from reprlib import repr as short
from typing import Any, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from train.data.blocks import BLOCK_BYTES, BlockReader, DamagedData, read_regular, refuse_irregular
from train.data.index import INDEX_NAME, MASK_DTYPE, Index, parse_index
from train.data.whole_file import write_whole

MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"
DATA_SUFFIX = ".arrow"
# 1 had neither index nor hashes of blocks, nor a hash of the manifest.
FORMAT_VERSION = 2
# Of conversations: with a column `loss_mask`. Stores of text stay what they are.
CHAT_FORMAT_VERSION = 3
REMEDY = "remove the store's folder and run launch/prepare.py again"
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
ID_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "int32": np.dtype("<i4")}


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
class ChatRecord:
    """What the manifest of a store of conversations has besides."""

    targets: int  # tokens with a loss
    first_token: str  # that begins each conversation: bos or eos
    template_sha256: str
    left_out: dict[str, int]  # conversations of the source that the store lacks, by reason


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
    tokenizer_file: str  # relative to the store's folder: the one beside it
    tokenizer_sha256: str
    recipe: dict[str, Any]
    sources: dict[str, str]  # SHA-256 of each source file, or of the text of a hub dataset
    files: dict[str, FileRecord]  # the store's own, without manifest and index
    versions: dict[str, str]  # of the libraries that wrote it
    index: FileRecord | None = None  # None in format 1
    block_bytes: int = BLOCK_BYTES
    format_version: int = FORMAT_VERSION
    chat: ChatRecord | None = None  # None of a store of text

    @property
    def columns(self) -> dict[str, np.dtype[Any]]:
        """Name -> type of a token's value in each column of the data files."""
        return {"input_ids": ID_DTYPES[self.token_dtype]} | ({"loss_mask": np.dtype(MASK_DTYPE)} if self.chat else {})

    @property
    def data_files(self) -> dict[str, int]:
        """Name -> bytes of the Arrow files, in the order of the index."""
        return {name: record.num_bytes for name, record in sorted(self.files.items()) if name.endswith(DATA_SUFFIX)}

    def seal(self, folder: Path, index: Index) -> None:
        """Write the index and, once it is on the disk, this manifest with the index's hash."""
        content = index.to_bytes()
        record = FileRecord(len(content), hashlib.sha256(content).hexdigest())
        body = asdict(replace(self, index=record, format_version=CHAT_FORMAT_VERSION if self.chat else FORMAT_VERSION))
        if self.chat is None:
            del body["chat"]
        text = json.dumps(body | {"sha256": _sha256_of(body)}, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        write_whole(folder / INDEX_NAME, content)
        write_whole(folder / MANIFEST_NAME, text)


def _sha256_of(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a store; a ValueError names one that is missing, damaged or of an earlier format."""
    manifest = read_manifest_of_any_format(folder)
    if manifest.format_version < FORMAT_VERSION:
        raise ValueError(
            f"store: {folder} was made by an earlier version and has no hashes of its blocks; add them once: "
            f"`python launch/prepare.py --upgrade {folder}` (the data and the runs on it stay as they are)"
        )
    return manifest


def read_manifest_of_any_format(folder: Path) -> Manifest:
    """As `read_manifest`; format 1 is read too."""
    path = folder / MANIFEST_NAME
    try:
        values = json.loads(read_regular(path))
    except (FileNotFoundError, NotADirectoryError):
        inside = [str(manifest.parent) for manifest in sorted(folder.glob(f"*/{MANIFEST_NAME}"))]
        # The working directory is no folder to make stores in.
        out = folder.parent if folder.parent.name else Path("stores/mine")
        remedy = f"make one with `python launch/prepare.py --source TEXT --out {out}`"
        if inside:
            remedy = f"did you mean {' or '.join(inside[:3])}?"
        raise ValueError(
            f"store: {folder} holds no {MANIFEST_NAME}, so it is not a tokenised store; {remedy}"
        ) from None
    except OSError as error:
        raise ValueError(f"store: {path} cannot be read ({error.strerror}); {REMEDY}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"store: {path} is not readable JSON ({error}); {REMEDY}") from None
    version = values.get("format_version") if isinstance(values, dict) else None
    if type(version) is not int or not 1 <= version <= CHAT_FORMAT_VERSION:
        raise ValueError(
            f"store: {path} has format_version {str(version)[:20]}, and 1 to {CHAT_FORMAT_VERSION} are read; {REMEDY}"
        )
    if version > 1 and values.pop("sha256", None) != _sha256_of(values):
        raise ValueError(f"store: {path} does not have its own sha256, so it was altered; {REMEDY}")
    try:
        values["special_ids"] = SpecialIds(**values["special_ids"])
        values["files"] = {name: FileRecord(**record) for name, record in values["files"].items()}
        for name, kind in (("index", FileRecord), ("chat", ChatRecord)):
            values[name] = kind(**values[name]) if values.get(name) is not None else None
        manifest = Manifest(**values)
    except (KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"store: {path} lacks or misnames a field ({reason}); {REMEDY}") from None
    if wrong := next(_wrong_fields(manifest), None):
        raise ValueError(f"store: {path} has {wrong}; {REMEDY}")
    return manifest


def _wrong_fields(manifest: Manifest) -> Iterator[str]:
    """What is not of its kind, or leads out of the folder."""
    inner = (manifest.special_ids, *manifest.files.values(), *filter(None, [manifest.index, manifest.chat]))
    for part in (manifest, *inner):
        hints, values = get_type_hints(type(part)), vars(part)
        for name, value in values.items():
            kind = get_origin(hints[name]) or hints[name]
            if (kind in (int, str, dict) and type(value) is not kind) or (kind is int and not 0 <= value < 2**62):
                yield f"{name} = {short(value)}"
    outside = (name for name in manifest.files if not FILE_NAME.fullmatch(name))
    yield from (f"the file {short(name)}, not in its folder" for name in outside)
    largest, special = manifest.max_token_id, vars(manifest.special_ids).values()
    must_hold = {
        "tokenizer_file": manifest.tokenizer_file == f"../{TOKENIZER_NAME}",
        "token_dtype": manifest.token_dtype in ID_DTYPES,
        "files": bool(manifest.data_files),
        "documents": manifest.documents > 0,
        "block_bytes": manifest.block_bytes > 0,
        "index": manifest.index is not None or manifest.format_version == 1,
        "chat": (manifest.chat is not None) == (manifest.format_version == CHAT_FORMAT_VERSION),
        "max_token_id": max(special) <= largest < manifest.vocab_size,
    }
    yield from (f"{name} = {short(getattr(manifest, name))}" for name, holds in must_hold.items() if not holds)


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


def check_size(folder: Path, name: str, record: FileRecord) -> None:
    """Raise a ValueError unless a file is there, is no link and has the size that the manifest records."""
    path = folder / name
    try:
        status = path.lstat()
        refuse_irregular(path, status.st_mode)
        found = f"has {status.st_size} bytes" if status.st_size != record.num_bytes else ""
    except FileNotFoundError:
        found = "is missing"
    except OSError as error:
        found = f"cannot be used ({error.strerror})"
    if found:
        raise ValueError(
            f"store: {path} {found} where the manifest records {record.num_bytes} bytes; the store is truncated "
            f"or altered: {REMEDY}"
        )


@dataclass(frozen=True)
class TokenStore:
    """Read access to the documents of a store."""

    path: Path
    manifest: Manifest
    starts: NDArray[np.int64]  # [documents + 1] first token of each, all documents end to end
    runs: NDArray[np.int64]  # [3 or 4, runs] first token, data file, byte offset of its id, and of its loss mask
    blocks: BlockReader

    @classmethod
    def open(cls, path: str | Path) -> TokenStore:
        """Open the store at `path`; a ValueError says what of it does not fit the manifest."""
        folder = Path(path)
        manifest = read_manifest(folder)
        assert manifest.index is not None
        for name, record in {**manifest.files, INDEX_NAME: manifest.index}.items():
            check_size(folder, name, record)
        files = manifest.data_files
        try:
            content = read_regular(folder / INDEX_NAME)
            if hashlib.sha256(content).hexdigest() != manifest.index.sha256:
                raise ValueError("does not have the sha256 of the manifest: it was altered")
            starts, runs, hashes = parse_index(
                content,
                documents=manifest.documents,
                tokens=manifest.tokens,
                sizes=list(files.values()),
                block_bytes=manifest.block_bytes,
                item_bytes=tuple(dtype.itemsize for dtype in manifest.columns.values()),
            )
        except (OSError, ValueError) as error:
            raise ValueError(f"store: {folder / INDEX_NAME} {error}; {REMEDY}") from None
        return cls(folder, manifest, starts, runs, BlockReader(folder, files, hashes, manifest.block_bytes))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[documents] tokens, end-of-sentence token included; made anew by each call."""
        return np.diff(self.starts)

    @property
    def tokenizer_path(self) -> Path:
        """The tokeniser file that made this store."""
        return self.path / self.manifest.tokenizer_file

    def document(self, index: int, begin: int = 0, end: int | None = None) -> NDArray[np.integer[Any]]:
        """[tokens] ids of one document, or of a range of it; the last id of the whole is end-of-sentence.

        Raises:
            DamagedData: it is not what was written; names the file and the block, or the id.
        """
        ids, file = self._column("input_ids", index, begin, end)
        # A negative id is a large one.
        if len(ids) and (largest := int(ids.view(f"<u{ids.itemsize}").max())) > self.manifest.max_token_id:
            raise DamagedData(
                f"store: document {index} of {self.path} has the id {largest}, beyond the manifest's largest, "
                f"{self.manifest.max_token_id}; {REMEDY}",
                file=file,
            )
        return ids

    def loss_mask(self, index: int) -> NDArray[np.bool_]:
        """[tokens] whether each token of a conversation has a loss; of a store that has such a column.

        Raises:
            DamagedData: as `document`.
        """
        mask, _ = self._column("loss_mask", index, 0, None)
        return mask.astype(np.bool_)

    def _column(self, name: str, index: int, begin: int, end: int | None) -> tuple[NDArray[np.integer[Any]], str]:
        """The values of a document, or of a range of it, in a column, and the name of their file."""
        start, stop = int(self.starts[index]), int(self.starts[index + 1])
        first, last = start + begin, stop if end is None else min(start + end, stop)
        run_first, file, *offsets = self.runs[:, self.runs[0].searchsorted(start, side="right") - 1].tolist()
        columns = self.manifest.columns
        offset, dtype = offsets[[*columns].index(name)], columns[name]
        at = offset + (first - run_first) * dtype.itemsize
        content = self.blocks.read(file, at, at + (last - first) * dtype.itemsize)
        return np.frombuffer(content, dtype=dtype), self.blocks.names[file]

    def check(self, *, vocab_size: int) -> None:
        """Raise a ValueError for a model whose embedding is too small for this store."""
        if self.manifest.max_token_id >= vocab_size:
            raise ValueError(
                f"store: {self.path} holds token id {self.manifest.max_token_id}, beyond the model's "
                f"vocab_size {vocab_size}; set model.vocab_size >= {self.manifest.max_token_id + 1} "
                f"(the tokeniser has {self.manifest.vocab_size} ids) or prepare a store with fewer"
            )

    def verify(self) -> None:
        """Compare the SHA-256 of every file with the manifest; a ValueError names one that was altered."""
        verify_files(self.path, self.manifest)


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Compare size and SHA-256 of every file of a store with its manifest; a ValueError names one that was altered."""
    for name, record in manifest.files.items():
        check_size(folder, name, record)
        found = file_sha256(folder / name)
        if found != record.sha256:
            raise ValueError(
                f"store: {folder / name} has sha256 {found} where the manifest records {record.sha256}; the file "
                f"was altered: {REMEDY}"
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
    """SHA-256 of the tokeniser and of each file of the store but the index, which an upgrade adds: a run's identity."""
    files = {name: record.sha256 for name, record in sorted(store.manifest.files.items())}
    return {"tokenizer": store.manifest.tokenizer_sha256, **files}
