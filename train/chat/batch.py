"""A file of requests in the form of OpenAI's batches, one JSON object a line.

    {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...], ...}}

Answers are those of `answer_log.py`, which OpenAI's form is part of.
"""

from __future__ import annotations

from pathlib import Path

from train.chat.endpoint import Request
from train.evaluate.jsonl import Line, read_lines

VERSION = "/v1"


def read_batch(path: Path) -> list[Request]:
    """All requests of a file.

    Raises:
        ValueError: a line that cannot be sent, or an id that is there twice; names file and line.
    """
    requests: dict[str, Request] = {}
    for line in read_lines(path):
        request = _request(line)
        if request.id in requests:
            raise line.error(f"has the custom_id {request.id!r} of a line before; give each its own")
        requests[request.id] = request
    return list(requests.values())


def _request(line: Line) -> Request:
    method, url, body = line.optional("method") or "POST", line.text("url"), line.fields.get("body")
    if method != "POST" or not url.startswith(f"{VERSION}/"):
        raise line.error(f"asks for {method} {url}; write POST and a path such as /v1/chat/completions")
    if not isinstance(body, dict):
        raise line.error("has no object 'body'; write the request there")
    if body.get("stream"):
        raise line.error("asks for a stream, which a file cannot hold; leave 'stream' out")
    return Request(line.text("custom_id"), body, url.removeprefix(VERSION))
