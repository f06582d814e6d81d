"""The command line of a `Suite`: its flags, and a Suite from what they were given.

Apart from `launch/score.py` so that what can be asked for stands beside what is measured (`suite.py`), with the same
names. The model's own flags (weights, device, lengths) stay with the entrypoint, which loads it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from train.evaluate.exact import Attempts
from train.evaluate.suite import Suite, named_stores

SAME_NAMES = ("choice", "exact", "dev", "shots", "seed", "tasks", "limit", "run_code")


def add_suite_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what to measure."""
    add = parser.add_argument
    add("--store", action="append", default=[], help="held-out store, PATH or NAME=PATH; may be repeated")
    add("--choice", action="append", default=[], type=Path, help="multiple choice (MMLU-Pro, MMLU, GPQA), JSONL")
    add("--exact", action="append", default=[], type=Path, help="final answers (MATH, AIME), JSONL")
    add("--tasks", default="", help="deepseek-base, or lm-eval tasks separated by commas; needs lm-eval")
    add("--dev", type=Path, help="JSONL of examples, in the format of the questions")
    add("--shots", type=int, default=0, help="examples before each question (default: 0)")
    add("--samples", type=int, default=1, help="solutions a problem (default: 1)")
    add("--temperature", type=float, default=0.0, help="of solutions (default: 0, greedy)")
    add("--max-new-tokens", type=int, help="longest solution (default: 512, at most half of --max-length)")
    add("--seed", type=int, default=0, help="of samples and of the order of GPQA's options (default: 0)")
    add("--limit", type=int, help="documents of each lm-eval task (default: all)")
    add("--run-code", action="store_true", help="let lm-eval run programs that the model wrote")


def suite_of(options: argparse.Namespace) -> Suite:
    """What the flags ask for.

    Raises:
        ValueError: a value out of range, a store's name twice, or nothing to measure.
    """
    return Suite(
        stores=named_stores(options.store),
        attempts=Attempts(options.samples, options.temperature, options.max_new_tokens, options.seed),
        **{name: getattr(options, name) for name in SAME_NAMES},
    )
