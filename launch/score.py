"""Score a model: bits per byte of stores, multiple choice, exact match, tasks of lm-eval (docs/evaluation.md).

    python launch/score.py runs/demo/fp8 --store stores/demo/heldout

The model is a run, a checkpoint, a Hugging Face folder, or, for --chat, an endpoint of OpenAI's form, its key in
OPENAI_API_KEY. Bad input ends with one sentence, exit code 2.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path
from typing import get_args

from launch.threads import spin_default

os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.update(spin_default(os.environ))

from train.assemble import choose_device
from train.backend import use_for_command
from train.chat.score import score_endpoint
from train.evaluate.exact_match import Attempts
from train.evaluate.language_model import LanguageModel
from train.evaluate.suite import Suite, SuiteScores, evaluate, named_stores, read_files
from train.huggingface.weights import Kind, load_model, open_weights, tokenizer_of
from train.studies.ngram_baselines import measure_beside, open_beside

BAD_INPUT, INTERRUPTED = 2, 130
SAME_NAMES = ("choice", "exact", "dev", "shots", "seed", "tasks", "limit", "run_code", "chat", "extra", "answers")


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Score a model.")
    add = parser.add_argument
    add("model", help="a run, a checkpoint, a Hugging Face folder, or for --chat http://HOST:PORT")
    add("--store", action="append", default=[], help="held-out store, PATH or NAME=PATH; may be repeated")
    add("--learn-from", type=Path, help="store of the n-gram models and xz (default: `train` beside each --store)")
    add("--baselines", action=argparse.BooleanOptionalAction, help="beside each score (default: up to 32 MB of text)")
    add("--choice", action="append", default=[], type=Path, help="multiple choice (MMLU-Pro, MMLU, GPQA), JSONL")
    add("--exact", action="append", default=[], type=Path, help="final answers (MATH, AIME), JSONL")
    add("--chat", action="append", default=[], help="JSONL of answers, options or tests, or reasoning-gym:FAMILY")
    add("--extra", default="{}", help="JSON object with more fields of each request of --chat")
    add("--answers", type=Path, help="JSONL that keeps the answers to --chat; what it has is not asked again")
    add("--tasks", default="", help="deepseek-base, or lm-eval tasks separated by commas; needs lm-eval")
    add("--dev", type=Path, help="JSONL of examples, in the format of the questions")
    add("--shots", type=int, default=0, help="examples before each question (default: 0)")
    add("--samples", type=int, default=1, help="solutions a problem (default: 1)")
    add("--temperature", type=float, default=0.0, help="of solutions (default: 0, greedy)")
    add("--max-new-tokens", type=int, help="longest solution (default: 512, at most half of --max-length)")
    add("--seed", type=int, default=0, help="of samples and of the order of GPQA's options (default: 0)")
    add("--limit", type=int, help="of each lm-eval task and each --chat the first so many (default: all)")
    add("--run-code", action="store_true", help="run programs that the model wrote: no security boundary")
    add("--weights", choices=get_args(Kind), default="model", help="which values, of a run (default: model)")
    add("--tokenizer", type=Path, help="tokenizer.json (default: the model's)")
    add("--max-length", type=int, help="longest input, tokens (default: as trained)")
    add("--batch-tokens", type=int, default=4096, help="tokens of one forward pass (default: 4096)")
    add("--kernels", default="gluon", help="on a GPU: gluon, portable, reference or deepgemm (default: gluon)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    add("--out", type=Path, help="JSON file to write, anew after each score")
    return parser.parse_args(arguments)


def suite_of(options: argparse.Namespace) -> Suite:
    """What to measure."""
    attempts = Attempts(options.samples, options.temperature, options.max_new_tokens, options.seed)
    named = {name: getattr(options, name) for name in SAME_NAMES}
    return Suite(stores=named_stores(options.store), attempts=attempts, **named)


def model_of(options: argparse.Namespace) -> LanguageModel:
    """Load the model; lengths and tokeniser are those of its training unless the command line says otherwise."""
    source = open_weights(Path(options.model), options.weights)
    device = choose_device(options.device)
    use_for_command(options.kernels, source.config, source.precision, tokens=options.batch_tokens, device=device)
    return LanguageModel(
        load_model(source, device=device),
        device,
        name=options.model,
        load_tokenizer=partial(tokenizer_of, source, options.tokenizer),
        trained_on=source.trained_on,
        max_length=options.max_length,
        batch_tokens=options.batch_tokens,
    )


def main(arguments: list[str]) -> int:
    """Score as the command line says; returns the exit code."""
    options = parse(arguments)
    scores = None
    try:
        suite, scores = suite_of(options), SuiteScores(options.out)
        if "://" in options.model:
            whole = score_endpoint(options.model, os.environ.get("OPENAI_API_KEY", "none"), suite, scores)
            code = 0 if whole else BAD_INPUT
        else:
            files = read_files(suite)
            beaten = open_beside({} if options.baselines is False else suite.stores, options.learn_from)
            evaluate(model_of(options), suite, files, scores)
            for name, pair in beaten.items():
                scores.add("baselines", name, measure_beside(pair, asked=bool(options.baselines)))
            code = 0 if scores.finish(files.left_out) else BAD_INPUT
    except (ValueError, OSError) as error:
        print(f"score: {error}", file=sys.stderr)
        code = BAD_INPUT
    except KeyboardInterrupt:
        print("score: interrupted", file=sys.stderr)
        code = INTERRUPTED
    if scores is not None:
        scores.show()
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
