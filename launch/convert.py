"""Convert models between our checkpoints and the released Hugging Face layout.

    python launch/convert.py export runs/tiny_fp8 out/ --format fp8 --verify
    python launch/convert.py import out/ runs/imported --verify

Interrupted, the same command goes on. What is mapped and proved: docs/hugging_face.md. Bad input ends with one
sentence and exit code 2.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from torch import Tensor


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
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


def transformers_logits(folder: Path, ids: Tensor, dequantised: dict[str, Tensor] | None) -> Tensor:
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
    return cast("Tensor", model.eval()(input_ids=ids).logits)


def main(arguments: list[str]) -> int:
    """Convert as the command line says; returns the exit code."""
    options = parse(arguments)
    # Imported late: --help should not wait for torch.
    from train.huggingface.convert import run_export, run_import

    try:
        lines = run_import(options) if options.direction == "import" else run_export(options, transformers_logits)
        for line in lines:
            print(line, flush=True)
    except (ValueError, OSError) as error:
        print(f"convert: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word; the same command goes on
    sys.exit(main(sys.argv[1:]))
