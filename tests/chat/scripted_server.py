"""A real HTTP server on loopback that speaks OpenAI's API by a script, and counts what is in flight.

A script is a function of the request's body: it returns a `Reply`, or a list of them, one an attempt of the same
request (the last is repeated). What the server does with each is up to the reply: a status, a delay, a lost connection,
half of a body, a stream.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Reply:
    """What the server does with one HTTP request."""

    content: str = ""
    reasoning: str | None = None
    finish: str = "stop"
    status: int = 200
    delay_s: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)
    # "drop": close without a word; "half": half of the body; "junk": no JSON.
    trouble: str = ""
    # Of a refusal, in FastAPI's form.
    detail: str = ""
    # Of a stream: seconds between two chunks.
    chunk_s: float = 0.0

    def body(self, model: str) -> dict[str, Any]:
        if self.detail:
            return {"detail": self.detail}
        if self.status != 200:
            return {"error": {"message": f"scripted {self.status}", "type": "scripted"}}
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning is not None:
            message["reasoning_content"] = self.reasoning
        choice = {"index": 0, "message": message, "finish_reason": self.finish}
        usage = {"prompt_tokens": 1, "completion_tokens": len(self.content), "total_tokens": 1 + len(self.content)}
        return {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": model,
            "choices": [choice],
            "usage": usage,
        }


Script = Callable[[dict[str, Any]], Reply | list[Reply]]


class ScriptedServer(ThreadingHTTPServer):
    """Serves a script; `most_in_flight` and `bodies` are what it saw."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, script: Script, models: tuple[str, ...] = ("teacher",), port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.script, self.models = script, models
        # Sent in place of the list of models.
        self.listing: bytes | None = None
        self.listing_status = 200
        self.lock = threading.Lock()
        self.in_flight = self.most_in_flight = 0
        self.bodies: list[dict[str, Any]] = []
        self.attempts: Counter[str] = Counter()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is no error of the server's."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ScriptedServer

    def do_GET(self) -> None:
        listed = [{"id": name, "object": "model", "created": 0, "owned_by": "x"} for name in self.server.models]
        self._send(
            self.server.listing_status, self.server.listing or json.dumps({"object": "list", "data": listed}).encode()
        )

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = json.dumps(body, sort_keys=True)
        with server.lock:
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
            server.bodies.append(body)
            attempt = server.attempts[key]
            server.attempts[key] += 1
        try:
            replies = server.script(body)
            reply = replies if isinstance(replies, Reply) else replies[min(attempt, len(replies) - 1)]
            time.sleep(reply.delay_s)
        finally:
            # Before the answer: the client may send its next request as soon as it has this one's.
            with server.lock:
                server.in_flight -= 1
        if body.get("stream") and reply.status == 200:
            self._stream(reply)
        elif reply.trouble == "drop":
            self.close_connection = True
        elif reply.trouble == "junk":
            self._send(200, b"<html>busy</html>")
        else:
            self._send(reply.status, json.dumps(reply.body(body["model"])).encode(), reply)

    def _send(self, status: int, data: bytes, reply: Reply | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in (reply.headers if reply else {}).items():
            self.send_header(name, value)
        self.end_headers()
        if reply and reply.trouble == "half":
            data, self.close_connection = data[: len(data) // 2], True
        self.wfile.write(data)

    def _stream(self, reply: Reply) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        parts = [("reasoning_content", word) for word in (reply.reasoning or "").split(" ") if word]
        parts += [("content", word) for word in reply.content.split(" ")]
        for number, (name, word) in enumerate(parts):
            first_of_kind = number == 0 or parts[number - 1][0] != name
            self._event({name: word if first_of_kind else f" {word}"}, None)
            time.sleep(reply.chunk_s)
        self._event({}, reply.finish)
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, delta: dict[str, str], finish: str | None) -> None:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        chunk = {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "teacher", "choices": [choice]}
        self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        self.wfile.flush()

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""


@contextmanager
def served(script: Script, *, models: tuple[str, ...] = ("teacher",), port: int = 0) -> Iterator[ScriptedServer]:
    """A server in a thread of its own, until the block ends."""
    server = ScriptedServer(script, models, port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
