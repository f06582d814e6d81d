"""Let a teacher solve problems, keep what a verifier accepts, and write it as conversations to train on.

    python launch/distill.py problems.jsonl --teacher http://127.0.0.1:8000 --out distilled/math
    python launch/distill.py reasoning-gym:chain_sum --size 1000 --teacher runs/sft --out distilled/sums

The same command goes on where it was stopped. OUT/messages.jsonl is what `launch/prepare.py --format messages` reads:
docs/post_training.md. Exit code 0: every sample was answered; 1: some were not, the same command asks for them; 2: bad
input, one sentence.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from train.chat.asking import ask_into
from train.chat.distill import MESSAGES, SAMPLES, Distillation, claim, select
from train.chat.endpoint import Endpoint, fields_of, first_model
from train.chat.problems import open_problems
from train.huggingface.answering import answering

INCOMPLETE, BAD_INPUT, INTERRUPTED = 1, 2, 130


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="distill", description="Keep a teacher's verified solutions to train on.")
    add = parser.add_argument
    add("source", help="JSONL of problems with answers or tests, or reasoning-gym:FAMILY")
    add("--teacher", required=True, help="an endpoint of OpenAI's form, http://HOST:PORT, a run or an exported folder")
    add("--engine", choices=("transformers", "vllm"), help="of a run or folder (transformers)")
    add("--format", choices=("bf16", "fp8", "fp32"), help="of a run's export (bf16)")
    add("--out", type=Path, required=True, help="folder to make, or to go on with")
    add("--model", help="name of the teacher at an endpoint (default: the first that it has)")
    add("--key-variable", default="OPENAI_API_KEY", help="environment variable with the endpoint's key (%(default)s)")
    add("--size", type=int, default=1000, help="problems of a family of reasoning-gym (%(default)s)")
    add("--seed", type=int, default=0, help="of the problems of a family, and of the first sample (%(default)s)")
    add("--samples", type=int, default=4, help="solutions a problem (%(default)s)")
    add("--keep", type=int, default=1, help="accepted solutions a problem to keep (%(default)s)")
    add("--temperature", type=float, default=0.6, help="(%(default)s)")
    add("--top-p", type=float, default=0.95, help="(%(default)s)")
    add("--max-tokens", type=int, default=32768, help="of a solution; what is cut off is rejected (%(default)s)")
    add("--instruction", help="after each problem (default: asks for \\boxed{}, or for a code block)")
    add("--min-characters", type=int, default=1, help="of thoughts and answer together (%(default)s)")
    add("--max-characters", type=int, default=65536, help="of thoughts and answer together (%(default)s)")
    add("--extra", default="{}", help="JSON object with more fields of each request")
    add("--in-flight", type=int, default=16, help="requests under way at once, at most (%(default)s)")
    add("--retries", type=int, default=20, help="of a request, about two minutes (%(default)s)")
    add("--timeout", type=float, default=1800.0, help="seconds until an answer is given up (%(default)s)")
    add("--run-code", action="store_true", help="run what the teacher wrote against unit tests: no security boundary")
    return parser.parse_args(arguments)


def settings_of(options: argparse.Namespace, model: str) -> Distillation:
    """What is asked and kept."""
    names = Distillation.__dataclass_fields__.keys() - {"model", "extra"}
    named = {name: getattr(options, name) for name in names}
    return Distillation(model=model, extra=fields_of(options.extra), **named)


def show(report: dict[str, Any], folder: Path) -> None:
    """The report as a table."""
    console, table = Console(highlight=False), Table("solutions", "number")
    table.add_row("accepted", f"{report['accepted']:,}")
    for reason, number in report["rejected"].items():
        table.add_row(f"rejected: {reason}", f"{number:,}")
    if report["missing"]:
        table.add_row("not answered yet", f"{report['missing']:,}")
    console.print(f"{folder / MESSAGES}: {report['solved']} of {report['problems']} problems solved", soft_wrap=True)
    console.print(table)


def main(arguments: list[str]) -> int:
    """Ask, verify, write; returns the exit code."""
    options = parse(arguments)
    try:
        problems = open_problems(options.source, size=options.size, seed=options.seed, run_code=options.run_code)
        settings = settings_of(options, options.model or "")
        teacher = answering(options.teacher, options.engine, options.format, os.environ, named=options.model)
        with teacher as (url, name):
            key = os.environ.get(options.key_variable, "none")
            endpoint = Endpoint(url, key, options.in_flight, options.retries, options.timeout)
            settings = replace(settings, model=name or asyncio.run(first_model(endpoint)))
            claim(options.out, settings, problems)
            total = len(problems.distinct) * settings.samples
            asked = ask_into(options.out / SAMPLES, endpoint, settings.requests(problems), total=total)
        show(select(options.out, settings, problems), options.out)
    except ChildProcessError as error:
        print(f"distill: {error}; the same command goes on", file=sys.stderr)
        return INCOMPLETE
    except (ValueError, OSError) as error:
        print(f"distill: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("distill: interrupted; the same command goes on", file=sys.stderr)
        return INTERRUPTED
    return 0 if asked.complete else INCOMPLETE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
