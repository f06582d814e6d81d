"""Continue text with a trained model.

    python launch/generate.py runs/demo/bf16 --prompt "In the beginning" --max-tokens 100 --seed 1

Several prompts are continued as one batch and printed in order; a pipe gives one a line. `--measure STORE` prints what
MTP drafting gains on the beginnings of a store's documents (docs/generation.md). Bad input ends with one sentence and
exit code 2.
"""

from __future__ import annotations

import argparse
import os
import signal
import stat
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

from launch.threads import spin_default

os.environ.update(spin_default(os.environ))

BAD_INPUT, INTERRUPTED = 2, 130


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="generate", description="Continue text with a trained model.")
    parser.add_argument("model", type=Path, help="a run's folder, such as runs/demo/bf16, or one checkpoint")
    parser.add_argument("--prompt", action="append", default=[], help="text to continue; may be given several times")
    parser.add_argument("--prompts-file", type=Path, help="a prompt a line, after those of --prompt; - reads a pipe")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this; may be repeated")
    parser.add_argument("--measure", type=Path, metavar="STORE", help="print what drafting gains on a store's text")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="of each document for --measure (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=100, help="new tokens a prompt (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest token (%(default)s)")
    parser.add_argument("--top-p", type=float, default=0.95, help="weight of the tokens drawn from (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt, seed + 1 of the next (%(default)s)")
    parser.add_argument("--batch-tokens", type=int, default=16384, help="of caches held together (%(default)s)")
    parser.add_argument("--draft", action=argparse.BooleanOptionalAction, help="MTP drafts (not on a CPU)")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json (that of the run's store)")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp8"), help="to compute in (as trained)")
    parser.add_argument("--weights", choices=("model", "master", "ema"), default="model", help="%(default)s")
    parser.add_argument(
        "--kernels", default="gluon", help="on a GPU: gluon, portable, reference or deepgemm (%(default)s)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (%(default)s)")
    return parser.parse_args(arguments)


def piped_input() -> BinaryIO | None:
    """Standard input where it is a pipe or a file; a terminal, /dev/null and a closed one have no prompts."""
    try:
        mode = os.fstat(0).st_mode
    except OSError:
        return None
    return open(0, "rb", closefd=False) if stat.S_ISFIFO(mode) or stat.S_ISREG(mode) else None


def main(arguments: list[str]) -> int:
    """Load, continue, print; returns the exit code."""
    options = parse(arguments)
    # Imported late: --help should not wait for torch.
    from train.backend import use_for_command
    from train.data.store import TokenStore
    from train.generate import text
    from train.generate.latent_cache import Decoder
    from train.generate.sampling import Sampling
    from train.huggingface.weights import load_model, open_weights, tokenizer_of

    try:
        sampling = Sampling(options.temperature, options.top_p)
        settings = text.GenerationSettings(
            options.max_tokens, options.seed, sampling, options.draft, options.batch_tokens, tuple(options.stop)
        )
        pipe = None if options.measure else piped_input()
        device, texts = text.device_of(options.device), text.read_prompts(options.prompt, options.prompts_file, pipe)
        source = open_weights(options.model, options.weights)
        tokenizer = tokenizer_of(source, options.tokenizer)
        first_id = source.trained_on.first_id(tokenizer.special_ids)
        # Nothing is kept for a backward, and weights come with their numbers.
        precision = replace(
            source.precision, name=options.precision or source.precision.name, attention_output="bf16",
            keep_bf16_weights=True,
        )  # fmt: skip
        # A step of decoding has a token a prompt; in FP8 its rows are few.
        use_for_command(options.kernels, source.config, precision, tokens=max(16, len(texts)), device=device)
        decoder = Decoder(load_model(source, precision=precision, device=device))
        if options.measure:
            store = TokenStore.open(options.measure)
            prompts = text.store_prompts(store, tokenizer, first_id=first_id, tokens=options.prompt_tokens)
            print(text.measure(decoder, prompts, settings))
            return 0
        write = partial(print, end="", flush=True)
        print(text.continue_texts(decoder, tokenizer, texts, settings, write, first_id=first_id), file=sys.stderr)
    except (ValueError, OSError) as error:
        print(f"generate: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it without a word
    sys.exit(main(sys.argv[1:]))
