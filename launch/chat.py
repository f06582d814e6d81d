"""Chat in a terminal with a run, or with a model behind any endpoint of OpenAI's form.

    python launch/chat.py runs/sft                   its newest checkpoint, by an engine that ends with the chat
    python launch/chat.py http://127.0.0.1:8000

`/help` lists what can be typed: docs/post_training.md. Bad input ends with one sentence and exit code 2, an engine that
ended by itself with 1.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys

from rich.console import Console

from train.chat.endpoint import Endpoint, fields_of, first_model
from train.chat.terminal import Chat, line_reader
from train.huggingface.answering import answering

ENGINE_DIED, BAD_INPUT, INTERRUPTED = 1, 2, 130


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="chat", description="Chat with a model.")
    add = parser.add_argument
    add("where", metavar="RUN|FOLDER|URL", help="a run, a Hugging Face folder, or an endpoint, http://HOST:PORT")
    add("--engine", choices=("transformers", "vllm"), help="of a run or folder (transformers)")
    add("--format", choices=("bf16", "fp8", "fp32"), help="of a run's export (bf16)")
    add("--model", help="its name at an endpoint (default: the first that it has)")
    add("--system", help="the system's message, before all others")
    add("--temperature", type=float, default=0.6, help="(%(default)s)")
    add("--top-p", type=float, default=0.95, help="(%(default)s)")
    add("--max-tokens", type=int, help="of an answer (default: the endpoint's)")
    add("--extra", default="{}", help="JSON object with more fields of each request")
    add("--key-variable", default="OPENAI_API_KEY", help="environment variable with the endpoint's key (%(default)s)")
    add("--timeout", type=float, default=600.0, help="seconds until an answer is given up (%(default)s)")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Chat as the command line says; returns the exit code."""
    given = parse(arguments)
    try:
        options = {
            "temperature": given.temperature,
            "top_p": given.top_p,
            "max_tokens": given.max_tokens,
            **fields_of(given.extra),
        }
        options = {name: value for name, value in options.items() if value is not None}
        with answering(given.where, given.engine, given.format, os.environ, named=given.model) as (url, name):
            endpoint = Endpoint(url, os.environ.get(given.key_variable, "none"), retries=2, timeout_s=given.timeout)
            model = name or asyncio.run(first_model(endpoint))
            Chat(endpoint, model, Console(highlight=False), system=given.system, options=options).run(line_reader())
    except ChildProcessError as error:
        print(f"chat: {error}", file=sys.stderr)
        return ENGINE_DIED
    except (ValueError, OSError) as error:
        print(f"chat: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
