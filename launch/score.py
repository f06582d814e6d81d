"""Score a model: bits per byte of stores, multiple choice, exact match, tasks of lm-eval (docs/evaluation.md).

    python launch/score.py runs/demo/fp8 --store stores/demo/heldout

The model is a run, one of its checkpoints, or a Hugging Face folder. Bad input ends with one sentence, exit code 2.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import get_args

os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

from train.build import choose_device
from train.checkpoint.reader import CheckpointReader, Kind, load_model, open_weights
from train.evaluate.suite import DEFAULT_TOKENS, Subject, check_free, evaluate, summary_lines
from train.evaluate.suite_options import add_suite_options, suite_of


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
    add("--out", type=Path, help="JSON file to write")
    return parser.parse_args(arguments)


def subject_of(options: argparse.Namespace) -> Subject:
    """Load the model; what a run says of its data holds unless the command line says otherwise."""
    source = open_weights(options.model, options.weights)
    device = choose_device(options.device)
    run = source.state if isinstance(source, CheckpointReader) else None
    data = run["config"]["data"] if run else {}
    tokens = data.get("sequence_length", min(DEFAULT_TOKENS, source.config.max_position_embeddings))
    return Subject(
        load_model(source, device=device),
        device,
        name=str(options.model),
        tokenizer_path=options.tokenizer or source.tokenizer,
        tokenizer_sha256=run["identity"]["store"]["tokenizer"] if run else None,
        start="eos" if run else "bos",
        max_tokens=tokens if options.max_length is None else options.max_length,
        batch_tokens=options.batch_tokens,
        mask_documents=data.get("mask_documents", False),
    )


def main(arguments: list[str]) -> int:
    """Score as the command line says; returns the exit code."""
    options = parse(arguments)
    try:
        check_free(options.out)
        suite = suite_of(options)
        results = evaluate(subject_of(options), suite)
    except ValueError as error:
        print(f"score: {error}", file=sys.stderr)
        return 2
    print(*summary_lines(results), sep="\n")
    if options.out:
        options.out.write_text(json.dumps(results, indent=2, default=str) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
