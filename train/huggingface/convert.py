"""The two directions of a conversion as commands: do it, prove it, and say in a few lines what was done.

    run_export   checkpoint of any layout, or Hugging Face folder -> Hugging Face folder
    run_import   Hugging Face folder -> checkpoint of ours

Options come as parsed by `launch/convert.py`. Shapes: none. Not here: the conversion itself (`hf_export.py`,
`hf_import.py`) and its proof (`hf_verify.py`).
"""

from __future__ import annotations

import re
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from train.huggingface.export import ExportOptions, export
from train.huggingface.import_weights import import_hf
from train.huggingface.reader import HfReader
from train.huggingface.verify import Oracle, Verified, compare_logits, verify_export, verify_import
from train.huggingface.weights import CheckpointReader, open_weights

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def run_export(options: Namespace, oracle: Oracle) -> Iterator[str]:
    """Export and, if asked, prove it.

    Args:
        options: source, out, format, weights, tokenizer, shard_size, verify, logits.
        oracle: another implementation of the model.
    Returns:
        Lines for the user, as the work goes on.
    Raises:
        ValueError: bad input, or the proof failed.
    """
    if options.logits and not options.verify:
        raise ValueError("--logits is a part of --verify: give both")
    source = open_weights(options.source, options.weights)
    yield from source.notes if isinstance(source, HfReader) else ()
    if options.verify and isinstance(source, CheckpointReader):
        # What is compared with a damaged source proves nothing.
        source.verify()
    asked = ExportOptions(options.format, options.weights, bytes_of(options.shard_size), options.tokenizer)
    started = time.perf_counter()
    done = export(source, options.out, asked)
    seconds = time.perf_counter() - started
    size = done.plan.index()["metadata"]["total_size"]
    counts = ", ".join(f"{count:,} {dtype}" for dtype, count in sorted(done.plan.elements().items()))
    yield f"{options.out}: {source.path} as {options.format}, {counts} in {len(done.plan.files)} files, {size:,} bytes"
    yield f"  {done.written} files written now, {seconds:.1f} s"
    if not done.has_tokenizer:
        yield "  without a tokeniser: the source names none; add one with --tokenizer"
    if done.plan.cut_blocks:
        yield f"  {len(done.plan.cut_blocks)} FP8 weights have other blocks than in training (no multiples of 128 rows)"
    if options.verify:
        yield _said(verify_export(source, options.out, done.plan))
    if options.logits:
        gap = compare_logits(source, options.out, oracle)
        yield f"  logits, relative: {gap.to_oracle:.1e} to transformers, {gap.to_source:.1e} to the source's weights"


def run_import(options: Namespace) -> Iterator[str]:
    """Import and, if asked, prove it.

    Args:
        options: source, out, dtype, shard_size, verify.
    Returns:
        Lines for the user, as the work goes on.
    Raises:
        ValueError: bad input, or the proof failed.
    """
    _check_folder(options.source)
    source = HfReader(options.source)
    yield from source.notes
    started = time.perf_counter()
    done = import_hf(source, options.out, dtype=options.dtype, shard_bytes=bytes_of(options.shard_size))
    seconds = time.perf_counter() - started
    size = sum(file.stat().st_size for file in done.path.iterdir())
    yield f"{done.path}: {source.path}, weights only, {size:,} bytes"
    yield f"  {done.written} files written now, {seconds:.1f} s"
    if options.verify:
        yield _said(verify_import(source, done.path))


def bytes_of(size: str) -> int:
    """'5GB' -> 5000000000.

    Raises:
        ValueError: it is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", size)
    if match is None or match[2].upper() not in _UNITS or float(match[1]) == 0:
        raise ValueError(f"--shard-size {size} is no size: write 5GB or 500MB")
    return max(1, int(float(match[1]) * _UNITS[match[2].upper()]))


def _check_folder(path: Path) -> None:
    if not path.is_dir():
        raise ValueError(f"there is no folder {path}: name a Hugging Face model's folder")


def _said(verified: Verified) -> str:
    steps = f", FP8 within {verified.worst_step:.3f} steps of E4M3" if verified.worst_step else ""
    return (
        f"  verified: {verified.files} files by hash, {verified.tensors} tensors by name and shape, "
        f"{verified.values:,} values{steps}"
    )
