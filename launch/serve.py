"""Serve a model over OpenAI's API, or ask such a server what a file lists: docs/serving.md.

    python launch/serve.py runs/tiny --port 8000               a run's newest checkpoint, exported where it is not yet
    python launch/serve.py out/ --engine vllm -- --tensor-parallel-size 8      a Hugging Face folder as it is
    python launch/serve.py batch in.jsonl out.jsonl --url http://127.0.0.1:8000

Served until SIGTERM, SIGHUP or Ctrl-C, exit code 0. Bad input ends with one sentence and exit code 2; an engine that
ends by itself, and a batch with lines that were not answered, with 1: the same command goes on.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

UNFINISHED, BAD_INPUT, INTERRUPTED = 1, 2, 130


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line of a server; what follows `--` is the engine's."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(prog="serve", description="Serve a model over OpenAI's API.")
    parser.add_argument("model", type=Path, help="a run's folder, such as runs/tiny, or a Hugging Face folder")
    parser.add_argument("--engine", default="transformers", choices=("transformers", "vllm"), help="%(default)s")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0: a free one (%(default)s)")
    parser.add_argument("--format", default="bf16", choices=("bf16", "fp8", "fp32"), help="of a run's (%(default)s)")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json, where the run's store is gone")
    options = parser.parse_args(arguments[:end])
    options.more = tuple(arguments[end + 1 :])
    return options


def parse_batch(arguments: list[str]) -> argparse.Namespace:
    """Read the command line of a batch."""
    parser = argparse.ArgumentParser(prog="serve batch", description="Ask a server what a file lists.")
    parser.add_argument("requests", type=Path, help="JSONL in the form of OpenAI's batches")
    parser.add_argument("answers", type=Path, help="JSONL to write, or to go on with")
    parser.add_argument("--url", required=True, help="any server of OpenAI's API, http://HOST:PORT")
    parser.add_argument("--key-variable", default="OPENAI_API_KEY", help="variable with its key (%(default)s)")
    parser.add_argument("--in-flight", type=int, default=16, help="requests under way at once (%(default)s)")
    parser.add_argument("--retries", type=int, default=20, help="of a request, about two minutes (%(default)s)")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds for an answer (%(default)s)")
    return parser.parse_args(arguments)


def run_server(options: argparse.Namespace) -> int:
    """Check what needs no export, export if need be, serve, wait."""
    # Imported late: --help should not wait for torch.
    from train.chat.engine import ModelServer, free_port, running
    from train.huggingface.export import ExportOptions
    from train.huggingface.served import served_folder

    say = partial(print, flush=True)
    ModelServer(options.engine, options.model, "model", options.host, options.port).check_machine()
    with served_folder(options.model, ExportOptions(options.format, tokenizer=options.tokenizer), say) as folder:
        port = options.port or free_port(options.host)
        engine = ModelServer(options.engine, folder.path, folder.name, options.host, port, options.more)
        # How a signal leaves the block.
        with suppress(KeyboardInterrupt, SystemExit), running(engine, os.environ, say) as process:
            say(f"{engine.url} serves {engine.name} ({options.engine}, {folder.path})\n{engine.curl}")
            process.wait()
    return 0


def run_batch(options: argparse.Namespace) -> int:
    """Ask what is not answered yet."""
    from train.chat.asking import ask_into
    from train.chat.batch import read_batch
    from train.chat.endpoint import Endpoint

    key = os.environ.get(options.key_variable, "none")
    endpoint = Endpoint(options.url, key, options.in_flight, options.retries, options.timeout)
    if options.answers.exists() and options.answers.samefile(options.requests):
        raise ValueError(f"{options.answers} holds the requests; name another file for the answers")
    requests = read_batch(options.requests)
    asked = ask_into(options.answers, endpoint, requests, total=len(requests))
    return 0 if asked.complete else UNFINISHED


def main(arguments: list[str]) -> int:
    """Serve or ask; returns the exit code."""
    try:
        if arguments[:1] == ["batch"]:
            return run_batch(parse_batch(arguments[1:]))
        return run_server(parse(arguments))
    except ChildProcessError as error:
        print(f"serve: {error}", file=sys.stderr)
        return UNFINISHED
    except (ValueError, OSError) as error:
        print(f"serve: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("serve: interrupted; the same command goes on", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
