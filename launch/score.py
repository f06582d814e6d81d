"""Score a model: bits per byte of stores, multiple choice, exact match, tasks of lm-eval (docs/evaluation.md).

    python launch/score.py runs/demo/fp8 --store stores/demo/heldout

The model is a run, one of its checkpoints, or a Hugging Face folder. Bad input ends with one sentence, exit code 2.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path
from typing import get_args

os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

from train.assemble import choose_device
from train.evaluate.subject import Subject
from train.evaluate.suite import Report, evaluate, read_files
from train.evaluate.suite_options import add_suite_options, suite_of
from train.huggingface.weights import Kind, load_model, open_weights, tokenizer_of

BAD_INPUT, INTERRUPTED = 2, 130


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Score a model.")
    add = parser.add_argument
    add("model", type=Path, help="a run, a checkpoint, or a Hugging Face folder")
    add_suite_options(parser)
    add("--weights", choices=get_args(Kind), default="model", help="which values, of a run (default: model)")
    add("--tokenizer", type=Path, help="tokenizer.json (default: the model's)")
    add("--max-length", type=int, help="longest input, tokens (default: as trained)")
    add("--batch-tokens", type=int, default=4096, help="tokens of one forward pass (default: 4096)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    add("--out", type=Path, help="JSON file to write, anew after each score")
    return parser.parse_args(arguments)


def subject_of(options: argparse.Namespace) -> Subject:
    """Load the model; what it says of its training holds unless the command line says otherwise."""
    source = open_weights(options.model, options.weights)
    device = choose_device(options.device)
    return Subject(
        load_model(source, device=device),
        device,
        name=str(options.model),
        tokenizer=partial(tokenizer_of, source, options.tokenizer),
        trained_on=source.trained_on,
        max_length=options.max_length,
        batch_tokens=options.batch_tokens,
    )


def main(arguments: list[str]) -> int:
    """Score as the command line says; returns the exit code."""
    options = parse(arguments)
    report, code = None, 0
    try:
        suite, report = suite_of(options), Report(options.out)
        files = read_files(suite)
        evaluate(subject_of(options), suite, files, report.keep)
        code = 0 if report.finish(files.left_out) else BAD_INPUT
    except (ValueError, OSError) as error:
        print(f"score: {error}", file=sys.stderr)
        code = BAD_INPUT
    except KeyboardInterrupt:
        print("score: interrupted", file=sys.stderr)
        code = INTERRUPTED
    if report is not None:
        report.show()
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
