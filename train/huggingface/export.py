"""Export to the released Hugging Face layout, a few rows at a time, from any source of weights.

    check the source against the plan -> shard after shard: read rows -> round or quantise -> write -> journal
    -> tokeniser and generation files -> index -> config.json, which makes the folder a model

In FP8 a weight's blocks are quantised from the values of the source: for `--weights model` of an FP8 run these are the
payloads that training's forward multiplied (`kernels.fp8_linear.weight_fp8` of the BF16 parameter), with power-of-two
scales where the run has them; BF16 and FP32 runs get FP32 scales, as the released checkpoint has.

Memory: `ROWS_ELEMENTS` values and their copies, or one expert's matrix, whatever the model's size. Any layout's
checkpoint serves, since rows are read from the boxes that the ranks saved (`reader.py`).

Shapes: rows [rows, in] of one released weight; blocks 128x128. Not here: plan (`hf_plan.py`), proof (`hf_verify.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.formats import TILE
from kernels.quantize import quantize_blocks
from train.checkpoint import publish
from train.huggingface.config import small_files
from train.huggingface.plan import SCALE_SUFFIX, ExportPlan, Format, Item, export_plan
from train.huggingface.reader import INDEX, HfReader
from train.huggingface.safetensors_writer import DTYPES, Journal, Produce, Shard, write_shards, write_text
from train.huggingface.weights import WeightSource, tokenizer_of

# Values that are read, converted and written at once; a multiple of 128 rows, at least 128.
ROWS_ELEMENTS = 4 * 1024**2


@dataclass(frozen=True)
class ExportOptions:
    """How to export.

    Args:
        format: 'bf16', 'fp8' or 'fp32'.
        weights: which values the source gives, 'model', 'master' or 'ema'; part of the conversion's identity.
        shard_bytes: size at which a file is closed.
        tokenizer: its file; None: the source's own, if it has one.
    """

    format: Format = "bf16"
    weights: str = "model"
    shard_bytes: int = 5 * 10**9
    tokenizer: Path | None = None


@dataclass(frozen=True)
class Exported:
    """What an export did.

    Args:
        plan: of the folder.
        written: shards written now; the others were there.
        has_tokenizer: whether tokeniser files are among them.
    """

    plan: ExportPlan
    written: int
    has_tokenizer: bool


def export(source: WeightSource, out: Path, options: ExportOptions) -> Exported:
    """Write a Hugging Face folder, or finish one that was begun.

    Args:
        source: of the weights.
        out: folder to make.
        options: how.
    Returns:
        What was done.
    Raises:
        ValueError: the source lacks a weight or holds one that is not finite (named), the tokeniser is another model's,
            or `out` holds something else.
    """
    plan = export_plan(source.config, format=options.format, shard_bytes=options.shard_bytes)
    check_source(source, plan)
    has_tokenizer = options.tokenizer is not None or source.tokenizer is not None
    tokenizer = tokenizer_of(source, options.tokenizer) if has_tokenizer else None
    identity = {
        "direction": "export",
        "plan": plan.sha256(),
        "weights": options.weights,
        "power_of_two_scales": scales_are_powers_of_two(source),
        "tokenizer": None if tokenizer is None else tokenizer.sha256,
        "source": fingerprint(source),
    }
    journal = Journal(out, identity)
    written = write_shards(out, plan.shards, producer(source, plan), journal)
    texts = small_files(source.config, format=plan.format, tokenizer=tokenizer, trained_on=source.trained_on)
    config = texts.pop("config.json")
    for name, text in {**texts, INDEX: json.dumps(plan.index(), indent=2), "config.json": config}.items():
        if not journal.holds(out / name):
            write_text(out / name, text)
            journal.note(name, publish.entry_of(out / name))
    return Exported(plan, written, has_tokenizer=has_tokenizer)


def check_source(source: WeightSource, plan: ExportPlan) -> None:
    """Compare what the plan takes with what the source has, before anything is written.

    Raises:
        ValueError: a weight is missing or has another shape; named.
    """
    held = set(source.names())
    for items in plan.files.values():
        for item in items:
            place = item.place
            if place.name not in held:
                raise ValueError(f"{source.path} lacks {place.name}: it is incomplete, or of another model")
            whole = source.shape(place.name)
            if len(whole) < 1 + (place.expert is not None) or place.shape(whole) != item.shape:
                raise ValueError(f"{source.path} holds {place.name} as {list(whole)}, which has no {item.name}")
            rows = whole[0 if place.expert is None else 1]
            if place.stop > rows or (place.expert is not None and place.expert >= whole[0]):
                raise ValueError(f"{source.path} holds {place.name} as {list(whole)}, which has no {item.name}")


def scales_are_powers_of_two(source: WeightSource) -> bool:
    """Whether an FP8 export of this source takes power-of-two scales: as its own forward does."""
    return source.precision.name == "fp8" and source.precision.power_of_two_scales


def fingerprint(source: WeightSource) -> dict[str, Any]:
    """What tells a source from a changed one, as JSON, without reading its weights.

    Args:
        source: our checkpoint (its manifest hashes every file) or a Hugging Face folder (sizes and times of files).
    """
    if isinstance(source, HfReader):
        return source.fingerprint()
    return {"manifest": publish.read_manifest(source.path)["sha256"]}


def producer(source: WeightSource, plan: ExportPlan) -> Produce:
    """The values of each shard, tensor by tensor, a few rows at a time.

    Args:
        source: of the weights.
        plan: of the export.
    Returns:
        A function of a shard, for `write_shards`.
    """
    power_of_two = scales_are_powers_of_two(source)
    rows = PlacedRows(source)

    def produce(shard: Shard) -> Iterator[tuple[str, Tensor]]:
        for item in plan.files[shard.file]:
            if item.dtype == "F8_E4M3":
                yield from _quantised(item, rows, power_of_two=power_of_two)
            else:
                for values in rows.of(item):
                    yield item.name, values.to(DTYPES[item.dtype])

    return produce


def _quantised(item: Item, rows: PlacedRows, *, power_of_two: bool) -> Iterator[tuple[str, Tensor]]:
    scales = []
    for values in rows.of(item):
        q = quantize_blocks(values, power_of_two=power_of_two)
        scales.append(q.scale)
        yield item.name, q.payload
    yield item.name + SCALE_SUFFIX, torch.cat(scales)


class PlacedRows:
    """Reads released weights out of ours, `ROWS_ELEMENTS` at a time; of a stack one expert's matrix is kept.

    Args:
        source: of the weights.
    """

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self._expert: tuple[tuple[str, int], Tensor] | None = None

    def of(self, item: Item) -> Iterator[Tensor]:
        """Consecutive rows of one weight.

        Raises:
            ValueError: a value is not finite; named.
        """
        place = item.place
        for start, stop in row_ranges((place.start, place.stop), item.shape[1:]):
            values = self._read(place.name, place.expert, range(start, stop))
            if not bool(values.isfinite().all()):
                raise ValueError(
                    f"{self._source.path} holds NaN or infinity in {place.name}; export another checkpoint"
                )
            yield values

    def _read(self, name: str, expert: int | None, rows: range) -> Tensor:
        if expert is None:
            return self._source.read(name, rows)
        if self._expert is None or self._expert[0] != (name, expert):
            # Let go of the one before it, so that two are never held.
            self._expert = None
            self._expert = (name, expert), self._source.read(name, range(expert, expert + 1))[0]
        return self._expert[1][rows.start : rows.stop]


def row_ranges(rows: tuple[int, int], rest: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Cut rows into consecutive ranges of about `ROWS_ELEMENTS` values, multiples of 128 rows but the last.

    Args:
        rows: first, and the one after the last.
        rest: shape of one row.
    """
    step = max(TILE, ROWS_ELEMENTS // max(1, rest[0] if rest else 1) // TILE * TILE)
    for start in range(*rows, step):
        yield start, min(start + step, rows[1])
