"""Asking an endpoint: bounded, retried, kept at once, resumed by id; against a real server on loopback."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import io
import itertools
import json
import re
import resource
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.chat.scripted_server import Reply, ScriptedServer, served
from train.chat.answer_log import AnswerLog, read_answers
from train.chat.asking import ask_into
from train.chat.endpoint import Asked, Endpoint, Request, ask_all, first_model

SLOW = {"Retry-After": "0.05"}
TROUBLE = {
    "busy": [Reply(status=429, headers=SLOW), Reply(status=429, headers=SLOW), Reply("late")],
    "ill": [Reply(status=500, headers=SLOW), Reply(status=503, headers=SLOW), Reply("cured")],
    "drops": [Reply(trouble="drop"), Reply("again")],
    "half": [Reply(trouble="half"), Reply("whole")],
    "slow": [Reply(delay_s=0.3)],
    "refused": [Reply(status=400)],
}


def script(body: dict[str, Any]) -> Reply | list[Reply]:
    text = body["messages"][-1]["content"]
    return TROUBLE.get(text, Reply(f"echo {text}", delay_s=0.01))


@pytest.fixture(scope="module")
def server() -> Iterator[ScriptedServer]:
    with served(script) as running:
        yield running


@pytest.fixture(autouse=True)
def _fresh(request: pytest.FixtureRequest) -> None:
    if "server" in request.fixturenames:
        server = request.getfixturevalue("server")
        server.most_in_flight, server.bodies = 0, []
        server.attempts.clear()


def requests(*texts: str) -> list[Request]:
    return [Request(t, {"model": "teacher", "messages": [{"role": "user", "content": t}]}) for t in texts]


def ask(path: Path, endpoint: Endpoint, wanted: list[Request]) -> Asked:
    return ask_into(path, endpoint, wanted, total=len(wanted), console=Console(file=io.StringIO()))


def contents(path: Path) -> dict[str, Any]:
    """Id -> what was answered, or the error."""
    return {
        line["custom_id"]: line["error"] or line["response"]["body"]["choices"][0]["message"]["content"]
        for _, line in read_answers(path)
    }


def test_every_request_is_answered_whatever_happens_on_the_way(server: ScriptedServer, tmp_path: Path) -> None:
    texts = [f"n{i}" for i in range(30)]
    asked = ask(tmp_path / "a.jsonl", Endpoint(server.url, in_flight=5), requests(*TROUBLE, *texts))
    found = contents(tmp_path / "a.jsonl")
    assert found.pop("refused")["message"].startswith("Error code: 400")
    expected = {"busy": "late", "ill": "cured", "drops": "again", "half": "whole", "slow": ""}
    assert found == expected | {text: f"echo {text}" for text in texts}
    assert (asked.answered, dict(asked.refused), asked.failed.total()) == (35, {"status 400": 1}, 0)
    # One HTTP request each, two more for `busy` and `ill`, one more for `drops` and `half`.
    assert asked.sent == len(server.bodies) == 36 + 2 + 2 + 1 + 1
    assert server.most_in_flight <= 5
    rows = dict(asked.rows())
    assert rows == {"answered": 35, "refused: status 400": 1, "HTTP requests": 42}


def test_what_a_server_says_of_a_refusal_is_kept_in_either_form(tmp_path: Path) -> None:
    refusals = {"openai": Reply(status=422), "fastapi": Reply(status=422, detail="no such\nfield: " + "x" * 1000)}
    with served(lambda body: refusals[body["messages"][0]["content"]]) as picky:
        ask(tmp_path / "a.jsonl", Endpoint(picky.url), requests(*refusals))
    found = contents(tmp_path / "a.jsonl")
    assert found["openai"]["message"] == "Error code: 422 - scripted 422"
    assert found["fastapi"]["message"].startswith("Error code: 422 - {'detail': 'no such\\nfield: xxx")
    assert len(found["fastapi"]["message"]) == len("Error code: 422 - ") + 500


def test_as_many_are_in_flight_as_are_allowed_and_never_more(tmp_path: Path) -> None:
    together = threading.Barrier(5)

    def meet(body: dict[str, Any]) -> Reply:
        # With fewer than five at once nobody gets on: the barrier breaks, and so does the connection.
        together.wait(timeout=30)
        # Time for a sixth to come.
        return Reply("met", delay_s=0.05)

    with served(meet) as server:
        asked = ask(tmp_path / "a.jsonl", Endpoint(server.url, in_flight=5, retries=0), requests(*map(str, range(40))))
    assert (asked.answered, server.most_in_flight) == (40, 5)


def test_what_the_file_has_is_not_asked_again(server: ScriptedServer, tmp_path: Path) -> None:
    path, endpoint = tmp_path / "a.jsonl", Endpoint(f"{server.url}/v1/")
    ask(path, endpoint, requests("a", "b", "refused"))
    # A write that was cut.
    with path.open("ab") as file:
        file.write(path.read_bytes().splitlines()[0].replace(b'"a"', b'"c"')[:60])
    server.bodies = []
    asked = ask(path, endpoint, requests("a", "b", "c", "refused"))
    assert [body["messages"][0]["content"] for body in server.bodies] == ["c"]
    assert (asked.kept, asked.answered, asked.done) == (3, 1, 4)
    assert set(contents(path)) == {"a", "b", "c", "refused"}


def test_what_fails_in_the_end_is_not_written(tmp_path: Path) -> None:
    ill = {"ill": Reply(status=500), "lost": Reply(trouble="drop"), "junk": Reply(trouble="junk")}
    with served(lambda body: ill.get(body["messages"][0]["content"], Reply("fine", delay_s=0.02))) as server:
        endpoint = Endpoint(server.url, in_flight=4, retries=0)
        asked = ask(tmp_path / "a.jsonl", endpoint, requests(*ill, "a", "b"))
        assert asked.failed == {"status 500": 1, "connection lost": 1, "malformed answer": 1}
        assert not asked.complete
        assert set(contents(tmp_path / "a.jsonl")) == {"a", "b"}
        slow = Endpoint(server.url, retries=0, timeout_s=0.001)
        assert ask(tmp_path / "b.jsonl", slow, requests("a")).failed == {"timed out": 1}


def test_an_endpoint_that_refuses_or_is_gone_is_not_asked_for_the_rest(tmp_path: Path) -> None:
    with served(lambda body: Reply(status=404)) as server:
        asked = ask(tmp_path / "a.jsonl", Endpoint(server.url, in_flight=1), requests("a", "b"))
        assert asked.stopped.startswith("there is no such model or path (Error code: 404")
        assert asked.sent == 1
    many = requests(*map(str, range(100)))
    asked = ask(tmp_path / "a.jsonl", Endpoint(server.url, in_flight=3, retries=0), many)
    assert re.fullmatch(r"the endpoint is gone \(\d+ failed in a row\)", asked.stopped)
    # The three, and what the others had begun until nobody was found to be there.
    assert 3 <= asked.failed["connection lost"] < 20
    assert (tmp_path / "a.jsonl").read_bytes() == b""


@pytest.mark.parametrize("in_flight", [1, 3])
def test_requests_that_always_fail_do_not_keep_the_others_from_being_asked(tmp_path: Path, in_flight: int) -> None:
    bad = {"ill": Reply(status=500), "lost": Reply(trouble="drop"), "junk": Reply(trouble="junk")}
    with served(lambda body: bad.get(body["messages"][0]["content"], Reply("fine"))) as server:
        endpoint = Endpoint(server.url, in_flight=in_flight, retries=0)
        asked = ask(tmp_path / "a.jsonl", endpoint, requests(*bad, *"abcd"))
    assert (asked.answered, asked.failed.total(), asked.stopped) == (4, 3, "")
    assert set(contents(tmp_path / "a.jsonl")) == set("abcd")


def test_where_all_fails_each_further_request_is_sent_once(tmp_path: Path) -> None:
    with served(lambda body: Reply(status=500, headers=SLOW)) as server:
        endpoint = Endpoint(server.url, in_flight=2, retries=2)
        asked = ask(tmp_path / "a.jsonl", endpoint, requests(*map(str, range(20))))
        assert asked.failed == {"status 500": 20}
        # Two with two retries each, and one more that may have begun when the second was not yet given up.
        assert 20 + 2 * 2 <= len(server.bodies) <= 20 + 3 * 2


def test_too_many_requests_are_no_failure_of_the_endpoint(tmp_path: Path) -> None:
    replies = {"busy": Reply(status=429, headers=SLOW), "ill": [Reply(status=500, headers=SLOW), Reply("cured")]}
    with served(lambda body: replies[body["messages"][0]["content"]]) as server:
        asked = ask(tmp_path / "a.jsonl", Endpoint(server.url, in_flight=1, retries=1), requests("busy", "ill"))
    assert (asked.failed, contents(tmp_path / "a.jsonl")) == ({"status 429": 1}, {"ill": "cured"})


def test_an_endpoint_that_stays_busy_is_given_up_after_one_more_than_are_in_flight(tmp_path: Path) -> None:
    many = requests(*map(str, range(20)))
    with served(lambda body: Reply(status=429, headers=SLOW)) as server:
        asked = ask(tmp_path / "a.jsonl", Endpoint(server.url, in_flight=2, retries=1), many)
        # The third in a row, and at most the one that was under way.
        assert 3 <= asked.failed["status 429"] <= 4
        assert asked.stopped == "the endpoint is too busy (3 in a row got status 429 to the end)"
        assert len(server.bodies) <= 2 * 4


def test_a_prompt_that_is_forbidden_fails_alone(tmp_path: Path) -> None:
    replies = {"bad": Reply(status=403), "worse": Reply(status=403)}
    with served(lambda body: replies.get(body["messages"][0]["content"], Reply("fine"))) as server:
        asked = ask(tmp_path / "a.jsonl", Endpoint(server.url, in_flight=1), requests("bad", "worse", *"abc"))
    assert (asked.failed, asked.stopped, len(server.bodies)) == ({"status 403": 2}, "", 5)
    assert set(contents(tmp_path / "a.jsonl")) == set("abc")


def test_where_the_models_are_forbidden_too_the_rest_is_not_asked(tmp_path: Path) -> None:
    with served(lambda body: Reply(status=403)) as server:
        server.listing_status = 403
        asked = ask(tmp_path / "a.jsonl", Endpoint(server.url, in_flight=2), requests(*map(str, range(20))))
    assert re.fullmatch(r"access is forbidden \([23] failed in a row\)", asked.stopped)
    assert asked.failed["status 403"] <= 4


def test_a_key_that_may_ask_and_not_list_the_models_is_no_trouble(tmp_path: Path) -> None:
    replies = {"bad": Reply(status=500)}
    with served(lambda body: replies.get(body["messages"][0]["content"], Reply("fine"))) as server:
        server.listing_status = 403
        asked = ask(tmp_path / "a.jsonl", Endpoint(server.url, in_flight=1, retries=0), requests("a", "bad", "b", "c"))
    assert (asked.answered, asked.failed, asked.stopped) == (3, {"status 500": 1}, "")


def test_busy_and_ill_by_turns_each_request_is_sent_once_in_the_end(tmp_path: Path) -> None:
    turns = itertools.cycle((429, 503))
    with served(lambda body: Reply(status=next(turns), headers=SLOW)) as server:
        asked = ask(tmp_path / "a.jsonl", Endpoint(server.url, in_flight=2, retries=1), requests(*map(str, range(40))))
        assert asked.failed.total() <= 40
        # Twice each only at the beginning.
        assert len(server.bodies) <= 40 + 8
    assert asked.answered == 0


def test_no_proxy_leads_to_this_machine(
    server: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        endpoint = Endpoint(server.url, in_flight=1, retries=0)
        assert ask(tmp_path / "a.jsonl", endpoint, requests("a")).answered == 1
        assert [model.id for model in endpoint.client().models.list()] == list(server.models)
    assert Endpoint("https://x").is_elsewhere


def test_an_address_where_nobody_listens_is_given_up_long_before_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Endpoint("http://x").settings()
    assert (settings["timeout"].connect, settings["timeout"].read) == (10.0, 1800.0)
    monkeypatch.setattr("train.chat.endpoint.CONNECT_S", 0.1)
    # Once its queue is full, the kernel answers nobody.
    with socket.socket() as silent, ExitStack() as waiting:
        silent.bind(("127.0.0.1", 0))
        silent.listen(0)
        for _ in range(4):
            queued = waiting.enter_context(socket.socket())
            queued.setblocking(False)
            queued.connect_ex(silent.getsockname())
        endpoint = Endpoint(f"http://127.0.0.1:{silent.getsockname()[1]}", in_flight=1, retries=0)
        asked = ask(tmp_path / "a.jsonl", endpoint, requests("a", "b"))
    assert (asked.failed, asked.stopped) == ({"timed out": 1}, "the endpoint is gone (1 failed in a row)")


def test_a_server_that_is_down_for_a_while_is_waited_for(tmp_path: Path) -> None:
    with served(script) as server:
        port = server.server_port

    async def both() -> Asked:
        with AnswerLog(tmp_path / "a.jsonl") as log:
            asking = asyncio.create_task(ask_all(Endpoint(server.url, in_flight=2), requests("a", "b"), log))
            await asyncio.sleep(0.2)
            with served(script, port=port):
                return await asking

    assert asyncio.run(both()).answered == 2


def test_the_first_model_is_found(server: ScriptedServer) -> None:
    assert asyncio.run(first_model(Endpoint(server.url))) == "teacher"
    with served(script, models=()) as empty, pytest.raises(ValueError, match="has no model; name one with --model"):
        asyncio.run(first_model(Endpoint(empty.url)))
    with pytest.raises(ValueError, match=r"127\.0\.0\.1:\d+/v1 does not say which models it has \(Connection error"):
        asyncio.run(first_model(Endpoint(empty.url, retries=0)))


@pytest.mark.parametrize("listing", [b"<html>hello</html>", b"[]", b'{"data": [1]}', b'{"data": null}', b"null"])
def test_an_address_that_lists_no_models_is_one_sentence(listing: bytes) -> None:
    with served(script) as other:
        other.listing = listing
        with pytest.raises(ValueError, match=r"127\.0\.0\.1:\d+/v1 does not list models as OpenAI's API does"):
            asyncio.run(first_model(Endpoint(other.url, retries=0)))


def test_the_words_of_a_server_are_no_markup_and_do_not_steer_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Asked(stopped="no \x1b]0;title\x07[/b] model")
    asked.failed["no \x1b]0;title\x07[/b] model"] = 1

    async def answered(*_: object) -> Asked:
        return asked

    monkeypatch.setattr("train.chat.asking.ask_all", answered)
    shown = io.StringIO()
    ask_into(tmp_path / "a", Endpoint("http://x"), [], total=0, console=Console(file=shown, width=200))
    assert shown.getvalue().count("no ]0;title[/b] model") == 2
    assert "\x1b" not in shown.getvalue()


def test_a_file_system_without_locks_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with AnswerLog(tmp_path / "a.jsonl") as log:
        assert log.ids == set()


def test_mistakes_are_named(server: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, endpoint = tmp_path / "a.jsonl", Endpoint(server.url)
    with pytest.raises(ValueError, match="two requests have the id 'a'"):
        ask(path, endpoint, requests("a", "a"))
    with AnswerLog(path), pytest.raises(ValueError, match=r"a\.jsonl is written by another process"):
        ask(path, endpoint, [])
    bad = ['"a"', "1", '"a", "response": 1', '"a", "response": {}', '"a", "response": {"body": 1}']
    for text in ("no JSON\n", "[1]\n", *(f'{{"custom_id": {each}}}\n' for each in bad)):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"a\.jsonl line 1 is no answer to a request"):
            ask(path, endpoint, [])
    for fields, message in {
        ("localhost:8000",): "localhost:8000 is no address",
        ("http://x", "k", 0): "--in-flight 0 must be 1 or more",
        ("http://x", "k", 1, -1): "--retries -1 must be 0 or more",
        ("http://x", "k", 1, 1, 0.0): r"--timeout 0\.0 must be above 0",
    }.items():
        with pytest.raises(ValueError, match=message):
            Endpoint(*fields)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "openai", None)
    path.unlink()
    with pytest.raises(ValueError, match="the package openai is not installed; it is optional: pip install 'openai>=3"):
        ask(path, endpoint, requests("a"))


def test_nothing_secret_of_the_address_is_written() -> None:
    assert Endpoint("https://me:word@host:1/v2?key=x").public_url == "https://host:1/v2"


@pytest.mark.parametrize("size", [0, 10, 1 << 16, (1 << 16) + 1, 1 << 18])
def test_a_torn_last_line_is_removed_whatever_its_length(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.jsonl"
    whole = json.dumps({"custom_id": "a", "response": {"body": None}}).encode() + b"\n"
    for kept in (b"", whole, whole + whole):
        path.write_bytes(kept + (b'{"custom_id": "' + b"x" * size)[:size])
        with AnswerLog(path) as log:
            assert log.ids == ({"a"} if kept else set())
        assert path.read_bytes() == kept


def test_a_response_that_is_null_answers_nothing_and_is_asked_again(server: ScriptedServer, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"custom_id": "a", "response": null, "error": {"code": "batch_expired", "message": "late"}}\n')
    asked = ask(path, Endpoint(server.url), requests("a"))
    assert (asked.kept, asked.answered) == (0, 1)
    assert contents(path) == {"a": "echo a"}


def test_a_full_disk_is_one_sentence_and_leaves_whole_lines(tmp_path: Path) -> None:
    """The kernel takes a part of the line, and no more: a limit on the size of files, as a quota is."""
    path, line = tmp_path / "a.jsonl", {"custom_id": "a", "response": {"body": {"text": "x" * 100}}}
    with AnswerLog(path) as log:
        log.append(line)
        size = path.stat().st_size
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, limits[1]))
        try:
            with pytest.raises(ValueError, match=r"a\.jsonl cannot be written \(File too large\); make room, and the"):
                log.append(line | {"custom_id": "b"})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert (path.stat().st_size, log.ids) == (size, {"a"})
        log.append(line | {"custom_id": "c"})
    with AnswerLog(path) as log:
        assert log.ids == {"a", "c"}


@pytest.mark.parametrize(
    "text",
    [
        '{"model": "mine"}',
        "x" * 70000,
        '{"custom_id": "a", "body": {}}',
        '{"custom_id": "a", "response": {"body": null}}\n{"text": "b"}',
    ],
)
def test_a_file_that_is_no_log_is_left_as_it_is(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"a\.jsonl is no answer file"):
        AnswerLog(path)
    assert path.read_text() == text


def test_the_table_counts_every_request_and_lines_say_how_it_goes(
    server: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.chat.asking.LINE_EVERY_S", 0.0)
    for terminal in (False, True):
        shown = Console(file=io.StringIO(), force_terminal=terminal, width=100)
        path = tmp_path / f"{terminal}.jsonl"
        ask_into(path, Endpoint(server.url), requests("a", "refused"), total=2, console=shown)
        text = shown.file.getvalue()  # type: ignore[attr-defined]
        assert "refused: status 400" in text
        assert "2 of 2  1 refused" in text or terminal
