"""Source -> tokeniser -> tokenised stores, published whole or not at all.

    OUT/tokenizer.json      the tokeniser, trained on the training documents only unless one was given
    OUT/train/              store of all documents but the last ones
    OUT/heldout/            store of the last ones (absent with a held-out fraction of 0)

Where a source has several files, the last ones are those of whole files: no file is in both stores.

Everything is written into a hidden folder next to OUT, which is renamed to OUT at the end: a store that exists is
complete. The same request again only checks its hashes; another one is refused, never overwritten. Documents keep the
source's order.
"""

from __future__ import annotations

import hashlib
import platform
import tempfile
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np

from train.data.blocks import BLOCK_BYTES
from train.data.forms import Form, TextForm
from train.data.index import scan_arrow
from train.data.readers import kind_of
from train.data.sources import Documents, hash_files, is_txt_folder, local_files, open_documents
from train.data.store import DATA_SUFFIX, TOKENIZER_NAME, FileRecord, Manifest, TokenStore, file_sha256, read_manifest
from train.data.tokenizer import TextTokenizer, deepseek_tokenizer, load_tokenizer, train_byte_level_bpe

TRAIN, HELDOUT = "train", "heldout"


@dataclass(frozen=True)
class Recipe:
    """What is asked for."""

    source: str  # file, folder or hub name (sources.py)
    text_field: str = "text"
    split: str = "train"  # of a hub dataset
    tokenizer: str = "bpe"  # `bpe` (train one), `deepseek` (V3's own) or the path of a tokenizer.json
    vocab_size: int = 1024  # of a tokeniser trained here
    chat_marks: bool = False  # whether it has tokens for the marks of a conversation
    heldout: float = 0.1  # share of the documents, the last ones, kept out of training
    paragraphs: bool = False  # documents of a folder of .txt files: its paragraphs instead of its files

    def __post_init__(self) -> None:
        if not 0.0 <= self.heldout < 1.0:
            raise ValueError(f"heldout: {self.heldout} is not a share of the documents; choose 0 <= heldout < 1")
        if self.chat_marks and self.tokenizer != "bpe":
            raise ValueError(
                f"chat_marks: only a tokeniser that is trained here reserves them, and --tokenizer is "
                f"{self.tokenizer}; leave --chat-marks out"
            )


@dataclass(frozen=True)
class Prepared:
    """The stores of one folder; `reused` if they existed already, `split` says how new ones were divided."""

    train: TokenStore
    heldout: TokenStore | None
    reused: bool
    split: str = ""


TEXT = TextForm()


def prepare(recipe: Recipe, out: Path, *, workers: int = 1, form: Form = TEXT) -> Prepared:
    """Make the stores of a recipe in the folder `out`, or find them made; the result does not depend on `workers`.

    `form`: whether rows are texts or conversations.

    Raises:
        ValueError: bad input, or `out` holds something else; nothing is left behind.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not (out / TRAIN).is_dir():
        raise ValueError(f"out: {out} exists and is not a store; choose another --out or remove it")
    files = local_files(recipe.source)
    if recipe.paragraphs and not (files and kind_of(files[0]) == ".txt"):
        raise ValueError(f"paragraphs: {recipe.source} is not .txt, of which alone it is; leave it out")
    if files and (out / TRAIN).is_dir():
        return _reuse(recipe, out, hash_files(recipe.source, files), form)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.partial-", dir=out.parent) as scratch:
        whole, cache = Path(scratch, "whole"), Path(scratch, "cache")
        documents = open_documents(
            recipe.source,
            split=recipe.split,
            text_field=recipe.text_field,
            cache=cache,
            paragraphs=recipe.paragraphs,
            parse=form.parse,
        )
        if (out / TRAIN).is_dir():
            return _reuse(recipe, out, documents.hashes, form)
        split = _split(recipe, documents)
        _write_all(recipe, documents, whole, form, num_train=split.num_train, workers=workers)
        # A folder made by mkdtemp is private; a store is not.
        whole.chmod(0o755)
        whole.rename(out)
    return replace(_opened(out, reused=False), split=split.sentence)


def summary(manifest: Manifest) -> str:
    """What a store holds, in a line."""
    if manifest.chat is None:
        return (
            f"{manifest.documents} documents, {manifest.tokens} tokens, {manifest.text_bytes} bytes of text "
            f"({manifest.text_bytes / manifest.tokens:.2f} a token), vocabulary {manifest.vocab_size}"
        )
    left_out = ", ".join(f"{count} {reason}" for reason, count in manifest.chat.left_out.items() if count)
    return (
        f"{manifest.documents} conversations, {manifest.tokens} tokens, {manifest.chat.targets} of them with a loss, "
        f"vocabulary {manifest.vocab_size}{f'; left out: {left_out}' if left_out else ''}"
    )


def _opened(out: Path, *, reused: bool) -> Prepared:
    heldout = TokenStore.open(out / HELDOUT) if (out / HELDOUT).is_dir() else None
    return Prepared(TokenStore.open(out / TRAIN), heldout, reused)


def _comparable(recipe: Recipe, given: TextTokenizer | None, form: Form) -> dict[str, Any]:
    """The recipe without what cannot change the result: folders, the vocabulary size where a tokeniser is given."""
    fields = asdict(recipe)
    fields["source"] = Path(recipe.source).name if local_files(recipe.source) else recipe.source
    if given is not None:
        del fields["vocab_size"]
        fields["tokenizer"] = given.sha256
    if not local_files(recipe.source) or not is_txt_folder(recipe.source):
        del fields["paragraphs"]
    # Stores of an earlier version do not name it.
    if not recipe.chat_marks:
        del fields["chat_marks"]
    return form.compared(fields)


def _found(manifest: Manifest, wanted: dict[str, Any]) -> dict[str, Any]:
    """The recipe of a store; one of an earlier version took paragraphs of every .txt file."""
    return ({"paragraphs": True} if "paragraphs" in wanted else {}) | manifest.recipe


def _given_tokenizer(recipe: Recipe) -> TextTokenizer | None:
    if recipe.tokenizer == "bpe":
        return None
    return deepseek_tokenizer() if recipe.tokenizer == "deepseek" else load_tokenizer(Path(recipe.tokenizer))


def _reuse(recipe: Recipe, out: Path, hashes: dict[str, str], form: Form) -> Prepared:
    """Take existing stores if they are what was asked for and unaltered; refuse others untouched."""
    manifest = read_manifest(out / TRAIN)
    wanted = {**_comparable(recipe, _given_tokenizer(recipe), form), "sources": hashes}
    found = {**_found(manifest, wanted), "sources": manifest.sources}
    if wanted != found:
        names = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise ValueError(
            f"out: {out} holds a store made with other inputs ({', '.join(names)} differ); "
            "choose another --out or remove it"
            + (", or give --paragraphs" if found.get("paragraphs") and not recipe.paragraphs else "")
        )
    prepared = _opened(out, reused=True)
    for store in filter(None, (prepared.train, prepared.heldout)):
        store.verify()
    if (prepared.heldout is not None) != (recipe.heldout > 0):
        raise ValueError(f"out: {out} lacks its held-out store; remove the folder and prepare it again")
    if file_sha256(out / TOKENIZER_NAME) != manifest.tokenizer_sha256:
        raise ValueError(f"out: {out / TOKENIZER_NAME} was altered; remove {out} and prepare it again")
    return prepared


class _Split(NamedTuple):
    """How many rows are for training, the rest being kept out of it, and a sentence on that."""

    num_train: int
    sentence: str


def _split(recipe: Recipe, documents: Documents) -> _Split:
    """No file is in both stores; a file that is alone is cut between documents."""
    if not recipe.heldout:
        return _Split(len(documents.table), "nothing is held out")
    with_text = np.flatnonzero(documents.text_bytes)
    total = len(with_text)
    # At least one document each: a fraction that rounds to nothing would silently drop the evaluation.
    wanted = max(1, round(total * recipe.heldout))
    if total - wanted < 1:
        hint = ", --paragraphs" if is_txt_folder(recipe.source) and not recipe.paragraphs else ""
        raise ValueError(
            f"source: {recipe.source} has {total} documents, too few to keep {wanted} out of training; "
            f"pass more documents{hint} or --heldout 0"
        )
    # Start of a file -> documents with text from there on.
    held_from = {start: total - int(np.searchsorted(with_text, start)) for start in documents.file_starts}
    cuts = {start: held for start, held in held_from.items() if 0 < held < total}
    if not cuts:
        where = "the source's" if len(documents.hashes) > 1 or not local_files(recipe.source) else "the one file's"
        return _Split(int(with_text[-wanted]), f"held out: the last {wanted} of {where} {total} documents")
    # The nearest to what was asked for; of two equally near the smaller.
    start = min(cuts, key=lambda start: (abs(cuts[start] - wanted), cuts[start]))
    if 2 * cuts[start] > total and cuts[start] > wanted:
        raise ValueError(
            f"source: files are kept whole, and of {recipe.source} the last has {cuts[start]} of {total} documents: "
            f"held out would be {cuts[start] / total:.1%}, not {recipe.heldout:.1%}; give --heldout 0, one file, or "
            "files of more even size"
        )
    files = sum(other >= start for other in documents.file_starts)
    return _Split(
        start,
        f"held out: the last {files} of {len(documents.file_starts)} files, whole, with {cuts[start]} of {total} "
        f"documents ({cuts[start] / total:.1%}; asked for {recipe.heldout:.1%})",
    )


def _write_all(recipe: Recipe, documents: Documents, whole: Path, form: Form, *, num_train: int, workers: int) -> None:
    rows = len(documents.table)
    stores = {TRAIN: documents.select(0, num_train)}
    if num_train < rows:
        stores[HELDOUT] = documents.select(num_train, rows)
    given = _given_tokenizer(recipe)
    tokenizer = given or train_byte_level_bpe(
        form.texts(stores[TRAIN].all_texts()), vocab_size=recipe.vocab_size, chat_marks=recipe.chat_marks
    )
    made_from = _comparable(recipe, given, form)
    whole.mkdir()
    tokenizer.save(whole / TOKENIZER_NAME)
    for name, store in stores.items():
        _write_store(made_from, store, tokenizer, whole / name, form, workers=workers)
        _write_manifest(made_from, store, tokenizer, whole / name, form)


def _id_dtype(tokenizer: TextTokenizer) -> str:
    return "uint16" if tokenizer.vocab_size <= 1 + np.iinfo(np.uint16).max else "int32"


def _write_store(
    made_from: dict[str, Any], documents: Documents, tokenizer: TextTokenizer, folder: Path, form: Form, *, workers: int
) -> None:
    """Tokenise documents into one store, those without text left out."""
    dtypes = {name: dtype or _id_dtype(tokenizer) for name, dtype in form.columns.items()}

    def encode(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        columns = form.encode(documents.texts(batch["start"][0], batch["stop"][0]), tokenizer)
        return {name: [row.astype(dtypes[name]) for row in rows] for name, rows in columns.items()}

    cache = folder.parent.parent / "cache" / f"{folder.name}.arrow"
    cache.parent.mkdir(exist_ok=True)
    # Named by us: the library's own name would hash this function and its tokeniser.
    name = f"{documents.hashes} {made_from} {folder.name}"
    fingerprint = hashlib.sha256(name.encode()).hexdigest()[:16]
    starts, stops = zip(*documents.batches(), strict=True)
    table = datasets.Dataset.from_dict({"start": starts, "stop": stops}).map(
        encode,
        batched=True,
        batch_size=1,
        remove_columns=["start", "stop"],
        features=datasets.Features({name: datasets.List(datasets.Value(dtype)) for name, dtype in dtypes.items()}),
        num_proc=workers if workers > 1 else None,
        cache_file_name=str(cache),
        new_fingerprint=fingerprint,
    )
    # The bare table, without what the library remembers of source and workers.
    datasets.Dataset(table.data, fingerprint=fingerprint).save_to_disk(str(folder))


def _write_manifest(
    made_from: dict[str, Any], documents: Documents, tokenizer: TextTokenizer, folder: Path, form: Form
) -> None:
    """Describe the Arrow files just written, and index them."""
    files = sorted(folder.iterdir())
    arrow = [file for file in files if file.name.endswith(DATA_SUFFIX)]
    dtype = _id_dtype(tokenizer)
    scanned = scan_arrow(arrow, dtype=dtype, block_bytes=BLOCK_BYTES, masked="loss_mask" in form.columns)
    index, special = scanned.found, tokenizer.special_ids
    described = form.describe(documents, tokenizer, arrow, scanned)
    Manifest(
        documents=len(index.starts) - 1,
        tokens=int(index.starts[-1]),
        text_bytes=described.text_bytes,
        empty_documents=len(documents.table) - (len(index.starts) - 1),
        max_token_id=max(*asdict(special).values(), scanned.max_token_id),
        vocab_size=tokenizer.vocab_size,
        token_dtype=dtype,
        special_ids=special,
        tokenizer_file=f"../{TOKENIZER_NAME}",
        tokenizer_sha256=tokenizer.sha256,
        recipe=made_from,
        sources=documents.hashes,
        files={file.name: FileRecord(file.stat().st_size, file_sha256(file)) for file in files},
        versions={
            "python": platform.python_version(),
            **{package: version(package) for package in ("datasets", "numpy", "pyarrow", "tokenizers")},
        },
        chat=described.chat,
    ).seal(folder, index)
