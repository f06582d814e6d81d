"""Export to the released Hugging Face layout, a few rows at a time, from any source of weights.

    check the source against the plan -> file after file: read rows -> round or quantise -> write -> journal
    -> tokeniser, chat template and generation files -> index -> config.json, which makes the folder a model

In FP8 a weight's blocks are quantised from the values of the source: for `--weights model` of an FP8 run these are the
payloads that training's forward multiplied (`kernels.fp8_linear.weight_fp8` of the BF16 parameter), with power-of-two
scales where the run has them; BF16 and FP32 runs get FP32 scales, as the released checkpoint has.

Memory: `ROWS_ELEMENTS` values and their copies, or one expert's matrix, whatever the model's size and whatever layout
saved it.

Shapes: rows [rows, in] of one released weight; blocks 128x128.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from kernels.formats import TILE
from kernels.quantize import quantize_blocks
from train.chat.template import missing_marks
from train.checkpoint import publish
from train.data.tokenizer import TextTokenizer
from train.data.whole_file import write_whole
from train.huggingface.config import small_files
from train.huggingface.names import SCALE_SUFFIX, ExportPlan, Format, ReleasedTensor, export_plan
from train.huggingface.reader import CONFIG, INDEX
from train.huggingface.safetensors_files import DTYPES, JOURNAL, Journal, ShardFile, read_json, write_files
from train.huggingface.weights import WeightSource, tokenizer_of

# Values that are read, converted and written at once; a multiple of 128 rows, at least 128.
ROWS_ELEMENTS = 4 * 1024**2


@dataclass(frozen=True)
class ExportOptions:
    """How to export."""

    format: Format = "bf16"
    weights: str = "model"  # which values the source gives: part of the conversion's identity
    shard_bytes: int = 5 * 10**9
    tokenizer: Path | None = None  # None: the source's own, if it has one


@dataclass(frozen=True)
class Exported:
    """What an export did: `written` counts the shards written now, the others were there."""

    plan: ExportPlan
    written: int
    tokenizer: TextTokenizer | None

    @property
    def notes(self) -> list[str]:
        """What a user should know of it, one sentence each."""
        notes = []
        if self.tokenizer is None:
            notes.append("without a tokeniser: the source names none; add one with --tokenizer")
        elif missing := missing_marks(self.tokenizer):
            notes.append(
                f"without a chat template: the tokeniser has no token for {missing[0]} and {len(missing) - 1} more "
                "marks, so chats will not work, completions will (prepare.py --chat-marks reserves them)"
            )
        if cut := len(self.plan.cut_blocks):
            notes.append(f"{cut} FP8 weights have other blocks than in training (no multiples of 128 rows)")
        return notes


@dataclass(frozen=True)
class _Work:
    """An export before it is begun: what is written, and what tells it from another one."""

    source: WeightSource
    options: ExportOptions
    plan: ExportPlan
    tokenizer: TextTokenizer | None
    texts: dict[str, str]

    @classmethod
    def of(cls, source: WeightSource, options: ExportOptions) -> _Work:
        plan = export_plan(source.config, format=options.format, shard_bytes=options.shard_bytes)
        _check_source(source, plan)
        has_tokenizer = options.tokenizer is not None or source.tokenizer is not None
        tokenizer = tokenizer_of(source, options.tokenizer) if has_tokenizer else None
        texts = small_files(source.config, format=plan.format, tokenizer=tokenizer, trained_on=source.trained_on)
        return cls(source, options, plan, tokenizer, texts)

    @property
    def power_of_two(self) -> bool:
        """Scales as the source's own forward has them."""
        return self.source.precision.name == "fp8" and self.source.precision.power_of_two_scales

    @property
    def identity(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "direction": "export",
            "plan": self.plan.sha256(),
            "weights": self.options.weights,
            "power_of_two_scales": self.power_of_two,
            "tokenizer": None if self.tokenizer is None else self.tokenizer.sha256,
            "small_files": hashlib.sha256(json.dumps(self.texts).encode()).hexdigest(),
            "source": self.source.fingerprint(),
        }

    def produce(self, file: ShardFile) -> Iterator[tuple[str, Tensor]]:
        """The values of a file, rounded or quantised."""
        for tensor, rows in _rows_of(self.source, self.plan.files[file.name]):
            dtype = self.plan.dtypes[tensor.source]
            if dtype == "F8_E4M3":
                q = quantize_blocks(rows, power_of_two=self.power_of_two)
                yield tensor.name, q.payload
                yield tensor.name + SCALE_SUFFIX, q.scale
            else:
                yield tensor.name, rows.to(DTYPES[dtype])
            # A view: it would keep one expert's matrix alive while the next is read.
            del rows


def export(source: WeightSource, out: Path, options: ExportOptions) -> Exported:
    """Write a Hugging Face folder, or finish one that was begun.

    Raises:
        ValueError: the source lacks a weight or holds one that is not finite (named), the tokeniser is another model's,
            or `out` holds something else.
    """
    return _write(_Work.of(source, options), out)


def finished(source: WeightSource, out: Path, options: ExportOptions) -> Exported | None:
    """What `out` holds, where it is the export asked for and every file still has its size."""
    return _finished(_Work.of(source, options), out)


def refresh(source: WeightSource, out: Path, options: ExportOptions) -> Exported:
    """Export in place of an earlier export, unless it is finished.

    Raises:
        ValueError: as `export`; `out` holds something that is no export.
    """
    work = _Work.of(source, options)
    if done := _finished(work, out):
        return done
    found = _journal(out).get("identity")
    if isinstance(found, dict) and found.get("direction") == "export" and found != work.identity:
        remove(out)
    return _write(work, out)


def remove(out: Path) -> None:
    """Delete an export, its journal last: what a kill leaves is still known as one, to be finished or deleted."""
    for path in out.iterdir():
        if path.name != JOURNAL and not path.is_dir():
            path.unlink()
    shutil.rmtree(out)


def _journal(out: Path) -> dict[str, Any]:
    journal = read_json(out / JOURNAL) if (out / JOURNAL).is_file() else {}
    return journal if isinstance(journal, dict) else {}


def _finished(work: _Work, out: Path) -> Exported | None:
    journal = _journal(out)
    files = journal.get("files")
    whole = (
        journal.get("identity") == work.identity
        and isinstance(files, dict)
        and files.keys() >= {*work.plan.files, CONFIG}
        and all(
            (out / name).is_file() and (out / name).stat().st_size == entry["bytes"] for name, entry in files.items()
        )
    )
    return Exported(work.plan, 0, work.tokenizer) if whole else None


def _write(work: _Work, out: Path) -> Exported:
    journal = Journal(out, work.identity)
    written = write_files(out, work.plan.shards, work.produce, journal)
    texts = {**work.texts, INDEX: json.dumps(work.plan.index(), indent=2)}
    # Last: it makes the folder a model.
    for name in sorted(texts, key=lambda name: name == CONFIG):
        if not journal.holds(out / name):
            write_whole(out / name, texts[name])
            journal.record(name, publish.entry_of(out / name))
    return Exported(work.plan, written, work.tokenizer)


def _check_source(source: WeightSource, plan: ExportPlan) -> None:
    """Compare what the plan takes with what the source has, before anything is written."""
    held = set(source.names())
    for tensor in (tensor for tensors in plan.files.values() for tensor in tensors):
        if tensor.source not in held:
            raise ValueError(f"{source.path} lacks {tensor.source}: it is incomplete, or of another model")
        whole = source.shape(tensor.source)
        dim = 0 if tensor.expert is None else 1
        if (
            len(whole) <= dim
            or whole[dim + 1 :] != tensor.shape[1:]
            or whole[dim] < tensor.stop
            or (tensor.expert is not None and whole[0] <= tensor.expert)
        ):
            raise ValueError(f"{source.path} holds {tensor.source} as {list(whole)}, which has no {tensor.name}")


def _rows_of(source: WeightSource, tensors: Iterable[ReleasedTensor]) -> Iterator[tuple[ReleasedTensor, Tensor]]:
    """Consecutive rows of each tensor, `ROWS_ELEMENTS` at a time; of a stack one expert's matrix is kept."""
    expert: tuple[str, int | None] | None = None
    matrix: Tensor | None = None
    for tensor in tensors:
        if expert != (tensor.source, tensor.expert):
            expert, matrix = (tensor.source, tensor.expert), None  # before the read: two are never held
            if tensor.expert is not None:
                matrix = source.read(tensor.source, range(tensor.expert, tensor.expert + 1))[0]
        for span in row_ranges(range(tensor.start, tensor.stop), tensor.shape[1:]):
            rows = source.read(tensor.source, span) if matrix is None else matrix[span.start : span.stop]
            if not bool(rows.isfinite().all()):
                raise ValueError(f"{source.path} holds NaN or infinity in {tensor.source}; export another checkpoint")
            yield tensor, rows
            del rows


def row_ranges(rows: range, rest: tuple[int, ...]) -> Iterator[range]:
    """Cut rows of shape `rest` into ranges of about `ROWS_ELEMENTS` values; a stack into its experts.

    Ranges of a matrix are consecutive multiples of 128 rows but the last.
    """
    step = 1 if len(rest) == 2 else max(TILE, ROWS_ELEMENTS // max(1, math.prod(rest)) // TILE * TILE)
    for start in rows[::step]:
        yield range(start, min(start + step, rows.stop))
