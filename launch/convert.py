"""Convert between our checkpoints and the released Hugging Face layout: docs/hugging_face.md. Bad input: exit code 2.

python launch/convert.py export runs/tiny_fp8 out/ --format fp8 --verify
python launch/convert.py import out/ runs/imported --verify         interrupted, the same command goes on
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="convert", description="Convert to and from Hugging Face's layout.")
    directions = parser.add_subparsers(dest="direction", required=True)
    out = directions.add_parser("export", help="write a Hugging Face folder")
    out.add_argument("source", type=Path, help="a run's folder, one checkpoint, or a Hugging Face folder")
    out.add_argument("out", type=Path, help="folder to make")
    out.add_argument("--format", default="bf16", choices=("bf16", "fp8", "fp32"), help="(default: %(default)s)")
    out.add_argument("--weights", default="model", choices=("model", "master", "ema"), help="(default: %(default)s)")
    out.add_argument("--tokenizer", type=Path, help="tokenizer.json, where the run's store is gone")
    out.add_argument("--logits", action="store_true", help="with --verify: compare logits with transformers")
    back = directions.add_parser("import", help="make a checkpoint of ours, weights only")
    back.add_argument("source", type=Path, help="a Hugging Face folder")
    back.add_argument("out", type=Path, help="run folder to make")
    back.add_argument("--dtype", default="source", choices=("source", "fp32"), help="fp32 rounds nothing")
    for direction in (out, back):
        direction.add_argument("--shard-size", default="5GB", help="of a file, such as 500MB (default: %(default)s)")
        direction.add_argument("--verify", action="store_true", help="prove the result")
    return parser.parse_args(arguments)


def bytes_of(size: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", size)
    if match is None or match[2].upper() not in _UNITS or float(match[1]) == 0:
        raise ValueError(f"--shard-size {size} is no size: write 5GB or 500MB")
    return max(1, int(float(match[1]) * _UNITS[match[2].upper()]))


def transformers_logits(folder: Path, ids: Any, dequantised: dict[str, Any] | None) -> Any:
    """What `transformers` computes in FP32 from a folder, or with its values given: -> [sequences, tokens, vocab]."""
    try:
        import torch
        from transformers import AutoConfig, DeepseekV3ForCausalLM
        from transformers.utils import logging
    except ImportError:
        raise ValueError("--logits needs transformers: `pip install transformers==5.23.0`") from None
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # it would list the MTP layers, which it leaves out
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    config: Any = AutoConfig.from_pretrained(folder)
    if dequantised is not None:
        del config.quantization_config
    named: dict[str, Any] = {"config": config, "dtype": torch.float32, "state_dict": dequantised}
    model: Any = DeepseekV3ForCausalLM.from_pretrained(folder if dequantised is None else None, **named)
    return model.eval()(input_ids=ids).logits


def run_export(options: argparse.Namespace) -> Iterator[str]:
    from train.huggingface import export, verify, weights

    if options.logits and not options.verify:
        raise ValueError("--logits is a part of --verify: give both")
    source = weights.open_weights(options.source, options.weights)
    yield from source.notes
    if options.verify and isinstance(source, weights.CheckpointReader):
        source.verify()  # what is compared with a damaged source proves nothing
    asked = export.ExportOptions(options.format, options.weights, bytes_of(options.shard_size), options.tokenizer)
    started = time.perf_counter()
    done = export.export(source, options.out, asked)
    seconds = time.perf_counter() - started
    yield f"{options.out}: {source.path} as {options.format}, {done.plan.summary()}"
    yield f"  {done.written} files written now, {seconds:.1f} s"
    yield from (f"  {note}" for note in done.notes)
    if options.verify:
        yield f"  verified: {verify.verify_export(source, options.out, done.plan).summary()}"
    if options.logits:
        gap = verify.compare_logits(source, options.out, transformers_logits)
        yield f"  logits, relative: {gap.to_oracle:.1e} to transformers, {gap.to_source:.1e} to the source's weights"


def run_import(options: argparse.Namespace) -> Iterator[str]:
    from train.huggingface import import_weights, reader, verify

    if not options.source.is_dir():
        raise ValueError(f"there is no folder {options.source}: name a Hugging Face model's folder")
    source = reader.HfReader(options.source)
    yield from source.notes
    shard_bytes, started = bytes_of(options.shard_size), time.perf_counter()
    done = import_weights.import_hf(source, options.out, dtype=options.dtype, shard_bytes=shard_bytes)
    seconds, size = time.perf_counter() - started, sum(file.stat().st_size for file in done.path.iterdir())
    yield f"{done.path}: {source.path}, weights only, {size:,} bytes"
    yield f"  {done.written} files written now, {seconds:.1f} s"
    if options.verify:
        yield f"  verified: {verify.verify_import(source, done.path).summary()}"


def main(arguments: list[str]) -> int:
    """Convert as the command line says; returns the exit code."""
    options = parse(arguments)
    try:
        for line in {"export": run_export, "import": run_import}[options.direction](options):
            print(line, flush=True)
    except (ValueError, OSError) as error:
        print(f"convert: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word; the same command goes on
    sys.exit(main(sys.argv[1:]))
