"""Ask an endpoint that speaks OpenAI's API many things at once, and keep each answer as it comes.

    Endpoint   where it is and how it is asked
    Request    one call: an id, the body, the path
    ask_all    requests -> an `AnswerLog`, a bounded number of them in flight; ids that the log has are not asked

The client is OpenAI's own: it retries on 408, 409, 429, 5xx, timeouts and lost connections, after 0.5 to 8 s or what
`Retry-After` says. A request that is refused (400, 413, 422 and so on) is answered: its line holds the error. What
fails in the end is not written, so the next call asks again.

Requests that always fail must not keep the others from being asked, nor an endpoint that is gone be asked for all. So
where it refuses everybody (401, 402, 404), the rest is not asked. A 403 may be about one prompt, which fails alone.
Where as many requests in a row fail as are in flight, it is asked for its models: without an answer it is gone, and the
rest is not asked, nor where its models are forbidden too; with one, each further request is sent once, without
retries, until one is answered. An endpoint that is busy (429) is asked at its own pace, until more in a row than are in
flight have used up their retries.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from train.chat.answer_log import AnswerLog

INSTALL = "the package openai is not installed; it is optional: pip install 'openai>=3'"
CHAT = "/chat/completions"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# Characters of an answer's body that an error shows: FastAPI's repeats the request.
MAX_DETAIL = 500
# Refusals that are about the endpoint, not about one request.
REFUSES_ALL = {401: "the key is refused", 402: "the account has nothing left", 404: "there is no such model or path"}
# Too many requests: the endpoint is there.
BUSY = "status 429"
# One prompt may be, or all.
FORBIDDEN = "status 403"
# Seconds until nobody is there; an answer may take as long as `timeout_s`.
CONNECT_S = 10.0


def openai_module() -> ModuleType:
    """The package `openai`; ValueError where it is not installed."""
    try:
        import openai
    except ModuleNotFoundError:
        raise ValueError(INSTALL) from None
    return openai


@dataclass(frozen=True)
class Endpoint:
    """An endpoint, and how it is asked: `url` with or without `/v1`, seconds until an answer is given up."""

    url: str
    key: str = "none"
    in_flight: int = 16
    retries: int = 20
    timeout_s: float = 1800.0

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError(f"{self.url} is no address; write http://HOST:PORT or https://HOST/v1")
        for flag, value, least in (("--in-flight", self.in_flight, 1), ("--retries", self.retries, 0)):
            if value < least:
                raise ValueError(f"{flag} {value} must be {least} or more")
        if not self.timeout_s > 0:
            raise ValueError(f"--timeout {self.timeout_s} must be above 0 seconds")

    @property
    def base_url(self) -> str:
        """The address with its version, `/v1` where none is given."""
        parts = urlsplit(self.url)
        return urlunsplit(parts._replace(path=parts.path.rstrip("/") or "/v1"))

    @property
    def public_url(self) -> str:
        """The address without user, password and query: what may be written into a file."""
        parts = urlsplit(self.base_url)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))

    def settings(self) -> dict[str, Any]:
        """What a client of the package `openai` is made with."""
        timeout = openai_module().Timeout(self.timeout_s, connect=min(CONNECT_S, self.timeout_s))
        return {"base_url": self.base_url, "api_key": self.key, "max_retries": self.retries, "timeout": timeout}

    @property
    def is_elsewhere(self) -> bool:
        """Whether a proxy (`HTTP_PROXY`) may lead there: not to this machine."""
        return urlsplit(self.url).hostname not in ("127.0.0.1", "localhost", "::1")

    def client(self) -> Any:
        """An `OpenAI`."""
        openai, settings = openai_module(), self.settings()
        http = openai.DefaultHttpxClient(timeout=settings["timeout"], trust_env=self.is_elsewhere)
        return openai.OpenAI(http_client=http, **settings)

    def async_client(self, *, sent: Callable[[Any], Any] | None = None) -> Any:
        """An `AsyncOpenAI`; `sent`, a coroutine function, is called with each HTTP request, retries included."""
        openai, settings = openai_module(), self.settings()
        hooks = {"request": [sent] if sent else []}
        http = openai.DefaultAsyncHttpxClient(
            event_hooks=hooks, timeout=settings["timeout"], trust_env=self.is_elsewhere
        )
        return openai.AsyncOpenAI(http_client=http, **settings)


def fields_of(extra: str) -> dict[str, Any]:
    """More fields of each request, from JSON; ValueError where it is no object."""
    try:
        fields = json.loads(extra)
    except ValueError as error:
        raise ValueError(f"--extra {extra!r} is not JSON ({error})") from None
    if not isinstance(fields, dict):
        raise ValueError(f"--extra {extra!r} is no JSON object of fields")
    return fields


async def first_model(endpoint: Endpoint) -> str:
    """The first model that the endpoint names; ValueError where it does not answer or has none."""
    openai = openai_module()
    try:
        async with endpoint.async_client() as client:
            listed = await client.get("/models", cast_to=object)
    except openai.OpenAIError as error:
        raise ValueError(f"{endpoint.public_url} does not say which models it has ({sentence_of(error)})") from None
    except ValueError:
        listed = None
    models = listed.get("data") if isinstance(listed, dict) else None
    if models == []:
        raise ValueError(f"{endpoint.public_url} has no model; name one with --model")
    first = models[0] if isinstance(models, list) else None
    if not isinstance(first, dict) or not isinstance(first.get("id"), str):
        raise ValueError(f"{endpoint.public_url} does not list models as OpenAI's API does; is the address right?")
    return str(first["id"])


@dataclass(frozen=True)
class Request:
    """One call: what to send where; the id is unique among those of one file."""

    id: str
    body: Mapping[str, Any]
    path: str = CHAT


@dataclass
class Asked:
    """What became of the requests so far."""

    answered: int = 0
    # In the log before.
    kept: int = 0
    # HTTP requests sent, with retries.
    sent: int = 0
    # Refused for good: their lines hold the error.
    refused: Counter[str] = field(default_factory=Counter)
    # Not in the log: asked again by the next call.
    failed: Counter[str] = field(default_factory=Counter)
    # Why the rest was not asked.
    stopped: str = ""
    # Since the last that was answered or refused, `BUSY` apart; and those that were `BUSY` to the end of their retries.
    failed_in_a_row: int = 0
    busy_in_a_row: int = 0

    @property
    def done(self) -> int:
        """Requests that need no more."""
        return self.kept + self.answered + self.refused.total()

    @property
    def complete(self) -> bool:
        """Whether every request has its line."""
        return not self.failed and not self.stopped

    def add(self, line: Mapping[str, Any] | None, reason: str) -> None:
        """Count one request: its line, None without one, and what went wrong."""
        if line:
            self.failed_in_a_row = self.busy_in_a_row = 0
        elif reason != BUSY:
            self.failed_in_a_row += 1
        if line and reason:
            self.refused[reason] += 1
        elif line:
            self.answered += 1
        else:
            self.failed[reason] += 1
            if reason.startswith(tuple(REFUSES_ALL.values())):
                self.stopped = reason

    def rows(self) -> Iterator[tuple[str, int]]:
        """What the table at the end shows: a word and a number."""
        yield "answered", self.answered
        if self.kept:
            yield "answered before", self.kept
        yield from ((f"refused: {reason}", number) for reason, number in self.refused.most_common())
        yield from (
            (f"failed, asked again next time: {reason}", number) for reason, number in self.failed.most_common()
        )
        yield "HTTP requests", self.sent


async def ask_all(
    endpoint: Endpoint, requests: Iterable[Request], log: AnswerLog, show: Callable[[Asked], None] = lambda _: None
) -> Asked:
    """Ask what the log does not have; `show` is called after each request.

    Raises:
        ValueError: two requests have one id, or the disk is full.
    """
    asked, openai = Asked(), openai_module()
    # One iterator for all: each worker takes the next request when it has its answer.
    waiting = _still_to_ask(requests, log, asked)

    async def count(_: object) -> None:
        asked.sent += 1

    async def work(client: Any, once: Any) -> None:
        for request in waiting:
            is_tried_once = asked.failed_in_a_row >= endpoint.in_flight
            line, reason = await _ask(once if is_tried_once else client, request, openai)
            if line:
                log.append(line | {"endpoint": endpoint.public_url})
            asked.add(line, reason)
            asked.busy_in_a_row += reason == BUSY and not is_tried_once
            failed, busy = asked.failed_in_a_row, asked.busy_in_a_row
            if busy > endpoint.in_flight:
                asked.stopped = asked.stopped or f"the endpoint is too busy ({busy} in a row got {BUSY} to the end)"
            all_failed = reason != BUSY and failed > 0 and failed % endpoint.in_flight == 0
            # A key may ask and not list.
            forbidden = reason == FORBIDDEN and not asked.answered
            if all_failed and not asked.stopped and (trouble := await _trouble(once, openai, forbidden=forbidden)):
                asked.stopped = f"{trouble} ({failed} failed in a row)"
            show(asked)
            if asked.stopped:
                return

    async with endpoint.async_client(sent=count) as client:
        once = client.with_options(max_retries=0)
        await asyncio.gather(*(work(client, once) for _ in range(endpoint.in_flight)))
    return asked


async def _trouble(client: Any, openai: ModuleType, *, forbidden: bool) -> str:
    """Why nobody is answered; "" where somebody is there, and what fails may be the requests' own fault.

    forbidden: the requests are, so that a list of models that is forbidden too means all.
    """
    try:
        await client.get("/models", cast_to=object, options={"timeout": CONNECT_S})
    except openai.PermissionDeniedError:
        return "access is forbidden" if forbidden else ""
    except openai.APIStatusError as error:
        return "the endpoint is gone" if error.status_code >= 500 else ""
    except openai.APIConnectionError:
        return "the endpoint is gone"
    # What comes with status 200 and is no JSON.
    except (openai.OpenAIError, ValueError):
        return ""
    return ""


def _still_to_ask(requests: Iterable[Request], log: AnswerLog, asked: Asked) -> Iterator[Request]:
    seen = set[str]()
    for request in requests:
        if request.id in seen:
            raise ValueError(f"two requests have the id {request.id!r}; give each its own")
        seen.add(request.id)
        if request.id not in log.ids:
            yield request
        else:
            asked.kept += 1


async def _ask(client: Any, request: Request, openai: ModuleType) -> tuple[dict[str, Any] | None, str]:
    """The line of a request, None where it is to be asked again, and what went wrong, "" if nothing did."""
    begun_s = time.time()
    try:
        body = await client.post(request.path, body=dict(request.body), cast_to=object)
    except openai.APIStatusError as error:
        status, reason = error.status_code, f"status {error.status_code}"
        if status in REFUSES_ALL:
            return None, f"{REFUSES_ALL[status]} ({sentence_of(error)})"
        for_good = status not in (403, 408, 409, 429) and status < 500
        return _line(request, status, None, sentence_of(error), begun_s) if for_good else None, reason
    except openai.APITimeoutError:
        return None, "timed out"
    except openai.APIConnectionError:
        return None, "connection lost"
    # What comes with status 200 and is no JSON.
    except (openai.OpenAIError, ValueError):
        return None, "malformed answer"
    return (_line(request, 200, body, None, begun_s), "") if isinstance(body, dict) else (None, "malformed answer")


def _line(
    request: Request, status: int, body: Mapping[str, Any] | None, error: str | None, begun_s: float
) -> dict[str, Any]:
    now_s = time.time()
    return {
        "custom_id": request.id,
        "response": {"status_code": status, "body": body},
        "error": None if error is None else {"message": error},
        "time_unix_s": round(now_s, 3),
        "seconds": round(now_s - begun_s, 3),
    }


def printable(text: str) -> str:
    """Without control characters but tabs and ends of lines: what a server says must not steer the terminal."""
    return _CONTROL.sub("", text)


def sentence_of(error: Exception) -> str:
    """What an error of the client says, on one line, and the body of an answer without a message of OpenAI's form."""
    cause, body = error.__cause__, getattr(error, "body", None)
    text = " ".join(str(error).split()) or type(error).__name__
    if body and not (isinstance(body, Mapping) and isinstance(body.get("message"), str)):
        text += f" - {' '.join(str(body).split())[:MAX_DETAIL]}"
    return f"{text} ({type(cause).__name__}: {cause})" if cause is not None else text
