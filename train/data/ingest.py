"""Source -> tokeniser -> tokenised stores, published whole or not at all.

    OUT/tokenizer.json      the tokeniser, trained on the training documents only unless one was given
    OUT/train/              store of all documents but the last ones
    OUT/heldout/            store of the last ones (absent with a held-out fraction of 0)

Everything is written into a hidden folder beside OUT, which is renamed to OUT at the end: a store that
exists is complete. Asking again for what OUT already holds costs a check of its hashes and nothing else;
asking for something different is refused, never overwritten.

It does not shuffle, pack or cut: the store keeps the source's documents in the source's order.
"""

from __future__ import annotations

import hashlib
import platform
import tempfile
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from train.data.sources import Documents, has_text, hash_files, local_files, open_documents, texts_of
from train.data.store import FileRecord, Manifest, TokenStore, file_sha256, read_manifest
from train.data.tokenizer import TextTokenizer, deepseek_tokenizer, load_tokenizer, train_byte_level_bpe

TOKENIZER_FILE = "tokenizer.json"
TRAIN, HELDOUT = "train", "heldout"
ROWS_PER_BATCH = 1000


@dataclass(frozen=True)
class Recipe:
    """What is asked for.

    Args:
        source: file, folder or hub name (sources.py).
        text_field: the field that holds the text.
        split: split of a hub dataset.
        tokenizer: `bpe` (train one), `deepseek` (V3's own) or the path of a tokenizer.json.
        vocab_size: ids of a tokeniser trained here; ignored otherwise.
        heldout: share of the documents, the last ones, kept out of training.
    """

    source: str
    text_field: str = "text"
    split: str = "train"
    tokenizer: str = "bpe"
    vocab_size: int = 1024
    heldout: float = 0.1

    def __post_init__(self) -> None:
        if not 0.0 <= self.heldout < 1.0:
            raise ValueError(f"heldout: {self.heldout} is not a share of the documents; choose 0 <= heldout < 1")


@dataclass(frozen=True)
class Prepared:
    """The stores of one folder.

    Args:
        train: the training store.
        heldout: the held-out store, if one was asked for.
        reused: whether they existed already.
    """

    train: TokenStore
    heldout: TokenStore | None
    reused: bool


def prepare(recipe: Recipe, out: Path, *, workers: int = 1) -> Prepared:
    """Make the stores of a recipe, or find them made.

    Args:
        recipe: what to make.
        out: folder to make; its parents are created.
        workers: processes that tokenise; the result does not depend on it.
    Raises:
        ValueError: bad input, or `out` holds something else; nothing is left behind.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not (out / TRAIN).is_dir():
        raise ValueError(f"out: {out} exists and is not a store; choose another --out or remove it")
    files = local_files(recipe.source)
    if files and (out / TRAIN).is_dir():
        return _reuse(recipe, out, hash_files(recipe.source, files))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.partial-", dir=out.parent) as scratch:
        documents = open_documents(
            recipe.source, split=recipe.split, text_field=recipe.text_field, cache=Path(scratch, "cache")
        )
        if (out / TRAIN).is_dir():
            return _reuse(recipe, out, documents.hashes)
        whole = Path(scratch, "whole")
        _write_all(recipe, documents, whole, workers=workers)
        # A folder made by mkdtemp is private; a store is not.
        whole.chmod(0o755)
        whole.rename(out)
    return _opened(out, reused=False)


def _opened(out: Path, *, reused: bool) -> Prepared:
    heldout = TokenStore.open(out / HELDOUT) if (out / HELDOUT).is_dir() else None
    return Prepared(TokenStore.open(out / TRAIN), heldout, reused)


def _comparable(recipe: Recipe) -> dict[str, Any]:
    """The recipe without what cannot change the result: folders, the vocabulary size beside a given file."""
    fields = asdict(recipe)
    fields["source"] = Path(recipe.source).name if local_files(recipe.source) else recipe.source
    if recipe.tokenizer != "bpe":
        del fields["vocab_size"]
        fields["tokenizer"] = _given_tokenizer(recipe).sha256
    return fields


def _given_tokenizer(recipe: Recipe) -> TextTokenizer:
    return deepseek_tokenizer() if recipe.tokenizer == "deepseek" else load_tokenizer(Path(recipe.tokenizer))


def _reuse(recipe: Recipe, out: Path, hashes: dict[str, str]) -> Prepared:
    """Take existing stores if they are what was asked for and unaltered.

    Raises:
        ValueError: they are not; nothing is touched.
    """
    manifest = read_manifest(out / TRAIN)
    if manifest.recipe != _comparable(recipe) or manifest.sources != hashes:
        wanted = {**_comparable(recipe), "sources": hashes}
        found = {**manifest.recipe, "sources": manifest.sources}
        names = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise ValueError(
            f"out: {out} holds a store made with other inputs ({', '.join(names)} differ); "
            "choose another --out or remove it"
        )
    prepared = _opened(out, reused=True)
    for store in filter(None, (prepared.train, prepared.heldout)):
        store.verify()
    if (prepared.heldout is not None) != (recipe.heldout > 0):
        raise ValueError(f"out: {out} lacks its held-out store; remove the folder and prepare it again")
    if file_sha256(out / TOKENIZER_FILE) != manifest.tokenizer_sha256:
        raise ValueError(f"out: {out / TOKENIZER_FILE} was altered; remove {out} and prepare it again")
    return prepared


def _write_all(recipe: Recipe, documents: Documents, whole: Path, *, workers: int) -> None:
    """Write tokeniser and stores into the folder `whole`."""
    table, rows = documents.table, len(documents.table)
    # At least one document each: a fraction that rounds to nothing would silently drop the evaluation.
    num_heldout = max(1, round(rows * recipe.heldout)) if recipe.heldout else 0
    if rows - num_heldout < 1:
        raise ValueError(
            f"source: {recipe.source} has {rows} documents, too few to keep {num_heldout} out of training; "
            "pass more documents or --heldout 0"
        )
    train = table.select(range(rows - num_heldout))
    if recipe.tokenizer == "bpe":
        texts = texts_of(train, documents.text_field)
        tokenizer = train_byte_level_bpe(texts, vocab_size=recipe.vocab_size)
    else:
        tokenizer = _given_tokenizer(recipe)
    whole.mkdir()
    tokenizer.save(whole / TOKENIZER_FILE)
    parts = {TRAIN: train}
    if num_heldout:
        parts[HELDOUT] = table.select(range(rows - num_heldout, rows))
    for name, part in parts.items():
        _write_store(recipe, replace(documents, table=part), tokenizer, whole / name, workers=workers)


def _write_store(recipe: Recipe, documents: Documents, tokenizer: TextTokenizer, folder: Path, *, workers: int) -> None:
    """Tokenise documents into one store; documents without text are left out."""
    dtype = "uint16" if tokenizer.vocab_size <= 1 + np.iinfo(np.uint16).max else "int32"
    eos = tokenizer.special_ids.eos

    def encode(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        texts = list(filter(has_text, rows[documents.text_field]))
        return {"input_ids": [[*ids, eos] for ids in tokenizer.encode_batch(texts)]}

    cache = folder.parent.parent / "cache" / f"{folder.name}.arrow"
    cache.parent.mkdir(exist_ok=True)
    # Named by us: the library's own name would hash this function and its tokeniser.
    name = f"{documents.hashes} {_comparable(recipe)} {folder.name}"
    fingerprint = hashlib.sha256(name.encode()).hexdigest()[:16]
    table = documents.table.map(
        encode,
        batched=True,
        batch_size=ROWS_PER_BATCH,
        remove_columns=documents.table.column_names,
        features=datasets.Features({"input_ids": datasets.List(datasets.Value(dtype))}),
        num_proc=workers if workers > 1 else None,
        cache_file_name=str(cache),
        new_fingerprint=fingerprint,
    )
    if len(table) == 0:
        raise ValueError(
            f"source: {recipe.source} is an empty corpus: its {folder.name} documents have no text in "
            f"'{documents.text_field}'; pass documents with text"
        )
    # The bare table: what the library remembers of source and workers stays behind.
    datasets.Dataset(table.data, fingerprint=fingerprint).save_to_disk(str(folder))
    _write_manifest(recipe, documents, tokenizer, folder, dtype=dtype)


def _write_manifest(
    recipe: Recipe, documents: Documents, tokenizer: TextTokenizer, folder: Path, *, dtype: str
) -> None:
    """Describe the Arrow files just written."""
    column = datasets.load_from_disk(str(folder)).data.column("input_ids")
    flat = [chunk.flatten().to_numpy() for chunk in column.chunks]
    special = tokenizer.special_ids
    texts = texts_of(documents.table, documents.text_field)
    manifest = Manifest(
        documents=len(column),
        tokens=sum(len(ids) for ids in flat),
        text_bytes=sum(len(text.encode()) for text in filter(has_text, texts)),
        empty_documents=len(documents.table) - len(column),
        max_token_id=max(*asdict(special).values(), *(int(ids.max()) for ids in flat)),
        vocab_size=tokenizer.vocab_size,
        token_dtype=dtype,
        special_ids=special,
        tokenizer_file=f"../{TOKENIZER_FILE}",
        tokenizer_sha256=tokenizer.sha256,
        recipe=_comparable(recipe),
        sources=documents.hashes,
        files={file.name: FileRecord(file.stat().st_size, file_sha256(file)) for file in sorted(folder.iterdir())},
        versions={
            "python": platform.python_version(),
            **{package: version(package) for package in ("datasets", "numpy", "pyarrow", "tokenizers")},
        },
    )
    manifest.write(folder)
