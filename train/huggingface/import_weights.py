"""Import from the released Hugging Face layout: a folder becomes a checkpoint of ours, a few rows at a time.

    HfReader -> chunks of rows -> shards in a hidden folder -> state.json, tokenizer.json, manifest.json -> published

The checkpoint holds weights only (`model.*`) in the dtypes of training: BF16 with an FP32 router, or all FP32. FP8
weights become payload x scale, rounded to BF16 unless FP32 is asked for. It is read like any other (score, generate,
export, `dcp.load`); the trainer refuses to *resume* from it, since it has no optimizer state.

Large tensors are cut into chunks of whole rows or experts. Interrupted, the same command goes on.

Shapes: [rows, in], or [experts, out, in] of a stack; rows are of the first dim.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from train.checkpoint import publish
from train.data.whole_file import write_whole
from train.huggingface.export import row_ranges
from train.huggingface.names import shapes_of
from train.huggingface.reader import HfReader
from train.huggingface.safetensors_files import DTYPES, Journal, ShardFile, TensorSpec, write_files
from train.huggingface.weights import tokenizer_of
from train.model.precision import Precision

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PREFIX = "model."


@dataclass(frozen=True)
class Imported:
    """The checkpoint; `written` counts the shards written now, the others were there."""

    path: Path
    written: int


def import_hf(
    source: HfReader, run: Path, *, dtype: Literal["source", "fp32"] = "source", shard_bytes: int = 5 * 10**9
) -> Imported:
    """Write a run's folder with one checkpoint of step 0, or finish one that was begun.

    With `dtype` 'source' weights are BF16 from BF16, FP16 and FP8, and FP32 from FP32; with 'fp32' nothing is rounded.

    Raises:
        ValueError: a value is not finite, a stored copy of embedding or head differs (named), or `run` holds
            something else, or an export of ours has another tokeniser than its training had.
    """
    precision = source.precision if dtype == "source" else Precision("fp32")
    shapes = shapes_of(source.config, precision)
    chunks = _chunks(shapes, max_bytes=shard_bytes)
    groups = publish.group_into_files(chunks, lambda chunk: chunk.num_bytes, file_bytes=shard_bytes)
    shards = [
        ShardFile(f"shard-00001-model-{i:05d}-of-{len(groups):05d}{publish.SHARD_SUFFIX}", group)
        for i, group in enumerate(groups, start=1)
    ]
    identity = {
        "direction": "import",
        "plan": hashlib.sha256(json.dumps(shards).encode()).hexdigest(),
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

    def produce(shard: ShardFile) -> Iterator[tuple[str, Tensor]]:
        for chunk in shard.tensors:
            assert chunk.offsets is not None
            first = chunk.offsets[0]
            for rows in row_ranges(range(first, first + chunk.shape[0]), chunk.shape[1:]):
                yield chunk.name, source.read(chunk.name.removeprefix(_PREFIX), rows).to(DTYPES[chunk.dtype])

    written = write_files(hidden, shards, produce, journal)
    # A hidden file of a killed writer.
    for leftover in hidden.iterdir():
        if leftover.name not in journal.files:
            leftover.unlink()
    config = {"model": asdict(source.config), "precision": asdict(precision)}
    state = {"config": config, "imported": {"from": source.path.name}, **source.trained_on.to_json()}
    publish.write_json(hidden / publish.STATE, state)
    if source.tokenizer is not None:
        write_whole(hidden / "tokenizer.json", source.tokenizer.read_text(encoding="utf-8"))
    tensors = {f"{_PREFIX}{name}": {"shape": list(shape), "dtype": str(kind)} for name, (shape, kind) in shapes.items()}
    publish.write_manifest(hidden, tensors, journal.files)
    publish.publish(target)
    return Imported(target, written)


def _chunks(shapes: dict[str, tuple[tuple[int, ...], torch.dtype]], *, max_bytes: int) -> Iterator[TensorSpec]:
    """Every tensor in chunks of whole rows, in order of the model."""
    for name, (shape, dtype) in shapes.items():
        step = max(1, max_bytes // (math.prod(shape[1:]) * dtype.itemsize))
        for start in range(0, shape[0], step):
            offsets = (start, *[0] * (len(shape) - 1))
            yield TensorSpec(_PREFIX + name, _DTYPE_NAMES[dtype], (min(step, shape[0] - start), *shape[1:]), offsets)
