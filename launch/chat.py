"""Chat in a terminal with a model behind any endpoint of OpenAI's form.

    python launch/chat.py http://127.0.0.1:8000

`python -m launch.serve RUN` serves a run and prints its address. `/help` lists what can be typed:
docs/post_training.md. Bad input ends with one sentence and exit code 2.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys

from rich.console import Console

from train.chat.endpoint import Endpoint, fields_of, first_model
from train.chat.terminal import Chat, line_reader

BAD_INPUT, INTERRUPTED = 2, 130


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="chat", description="Chat with a model.")
    add = parser.add_argument
    add("url", help="address of the endpoint, http://HOST:PORT")
    add("--model", help="its name at the endpoint (default: the first that it has)")
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
        if not given.url.startswith(("http://", "https://")):
            raise ValueError(
                f"{given.url} is no address; `python -m launch.serve {given.url}` serves a run and prints one"
            )
        key = os.environ.get(given.key_variable, "none")
        endpoint = Endpoint(given.url, key, retries=2, timeout_s=given.timeout)
        options = {
            "temperature": given.temperature,
            "top_p": given.top_p,
            "max_tokens": given.max_tokens,
            **fields_of(given.extra),
        }
        options = {name: value for name, value in options.items() if value is not None}
        model = given.model or asyncio.run(first_model(endpoint))
        Chat(endpoint, model, Console(highlight=False), system=given.system, options=options).run(line_reader())
    except ValueError as error:
        print(f"chat: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
