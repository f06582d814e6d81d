"""Import from the released Hugging Face layout: a folder becomes a checkpoint of ours, a few rows at a time.

    HfReader -> boxes of rows -> shards in a hidden folder -> state.json, tokenizer.json, manifest.json -> published

The checkpoint holds weights only (`model.*`) in the dtypes of training: BF16 with an FP32 router, or all FP32. FP8
weights become payload x scale, rounded to BF16 unless FP32 is asked for. `reader.py` reads it like any other (score,
generate, export) and `dcp.load` fills a model from it; the trainer refuses to *resume* from it, since an optimizer's
state is not there.

Large stacks of experts are cut into boxes of whole experts, so no file need hold one tensor whole. Interrupted, the
same command goes on (`hf_writer.py`); the checkpoint appears at once when it is whole (`publish.py`).

Shapes: [rows, in], or [experts, out, in] of a stack; rows are of the first dim. Not here: training from it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from train.checkpoint import publish
from train.huggingface.export import row_ranges
from train.huggingface.plan import shapes_of
from train.huggingface.reader import HfReader
from train.huggingface.safetensors_writer import DTYPES, Entry, Journal, Shard, num_bytes, write_shards, write_text
from train.huggingface.weights import tokenizer_of
from train.model.precision import Precision

WORDS = {dtype: word for word, dtype in DTYPES.items()}
PREFIX = "model."


@dataclass(frozen=True)
class Imported:
    """What an import did.

    Args:
        path: the checkpoint.
        written: shards written now; the others were there.
    """

    path: Path
    written: int


def import_hf(
    source: HfReader, run: Path, *, dtype: Literal["source", "fp32"] = "source", shard_bytes: int = 5 * 10**9
) -> Imported:
    """Write a run's folder with one checkpoint of step 0, or finish one that was begun.

    Args:
        source: the Hugging Face folder.
        run: folder to make.
        dtype: 'source': BF16 for BF16, FP16 and FP8 weights, FP32 for FP32 ones; 'fp32': FP32 and nothing is rounded.
        shard_bytes: size at which a file is closed.
    Returns:
        What was done.
    Raises:
        ValueError: a value is not finite, a stored copy of embedding or head differs (named), or `run` holds
            something else, or an export of ours has another tokeniser than its training had.
    """
    if shard_bytes < 1:
        raise ValueError(f"shard size {shard_bytes} must be at least 1 byte; 5GB is usual")
    precision = source.precision if dtype == "source" else Precision("fp32")
    shapes = shapes_of(source.config, precision)
    shards = _shards(shapes, shard_bytes)
    body = json.dumps([(shard.file, shard.entries) for shard in shards]).encode()
    identity = {
        "direction": "import",
        "plan": hashlib.sha256(body).hexdigest(),
        "precision": asdict(precision),
        "source": source.fingerprint(),
    }
    target = run / "checkpoints" / publish.step_name(0)
    journal = Journal(run, identity)
    if target.exists():
        publish.verify(target)
        return Imported(target, written=0)
    source.check_shared_copies()
    if source.tokenizer is not None and source.trained_on.tokenizer_sha256 is not None:
        tokenizer_of(source)
    hidden = publish.writing_path(target)
    hidden.mkdir(parents=True, exist_ok=True)
    written = write_shards(hidden, shards, _producer(source), journal)
    _finish(hidden, source, precision, journal)
    tensors = {f"{PREFIX}{name}": {"shape": list(shape), "dtype": str(kind)} for name, (shape, kind) in shapes.items()}
    publish.write_manifest(hidden, tensors, journal.files)
    publish.publish(target)
    return Imported(target, written)


def _shards(shapes: dict[str, tuple[tuple[int, ...], torch.dtype]], shard_bytes: int) -> list[Shard]:
    """Boxes of whole rows, in order of the model, as many to a file as fit."""
    groups: list[list[Entry]] = [[]]
    filled_bytes = 0
    for name, (shape, dtype) in shapes.items():
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        step = max(1, shard_bytes // row_bytes)
        for start in range(0, shape[0], step):
            rows = min(step, shape[0] - start)
            offset = (start, *[0] * (len(shape) - 1))
            entry = Entry(f"{PREFIX}{name}", WORDS[dtype], (rows, *shape[1:]), offset)
            if groups[-1] and filled_bytes + num_bytes(entry) > shard_bytes:
                groups.append([])
                filled_bytes = 0
            groups[-1].append(entry)
            filled_bytes += num_bytes(entry)
    return [
        Shard(f"shard-00001-model-{i:05d}-of-{len(groups):05d}{publish.SHARD_SUFFIX}", tuple(group))
        for i, group in enumerate(groups, start=1)
    ]


def _producer(source: HfReader) -> Any:
    def produce(shard: Shard) -> Iterator[tuple[str, Tensor]]:
        for entry in shard.entries:
            assert entry.offset is not None
            name, first = entry.name.removeprefix(PREFIX), entry.offset[0]
            for rows in _rows_of(first, entry.shape):
                yield entry.name, source.read(name, rows).to(DTYPES[entry.dtype])

    return produce


def _rows_of(first: int, shape: tuple[int, ...]) -> Iterator[range]:
    """One expert at a time of a stack, a few rows of anything else."""
    if len(shape) == 3:
        yield from (range(row, row + 1) for row in range(first, first + shape[0]))
        return
    yield from (range(start, stop) for start, stop in row_ranges((first, first + shape[0]), shape[1:]))


def _finish(hidden: Path, source: HfReader, precision: Precision, journal: Journal) -> None:
    """State and tokeniser; a hidden file of a killed writer goes away."""
    for leftover in hidden.iterdir():
        if leftover.name not in journal.files:
            leftover.unlink()
    config = {"model": asdict(source.config), "precision": asdict(precision)}
    state = {"config": config, "imported": {"from": source.path.name}, **source.trained_on.to_json()}
    publish.write_json(hidden / publish.STATE, state)
    if source.tokenizer is not None:
        write_text(hidden / "tokenizer.json", source.tokenizer.read_text(encoding="utf-8"))
