"""The chat in a terminal: typed into a pseudo-terminal as a user would, against a server on loopback."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from launch.chat import main
from tests.chat.scripted_server import Reply, ScriptedServer, served
from tests.chat.typed_terminal import PATIENCE_S, ROOT, Terminal
from train.chat.endpoint import Endpoint
from train.chat.terminal import Chat, _deltas, put_line, read_message
from train.chat.thinking import ThinkingStream

DIM = "\x1b[2m"


def script(body: dict[str, Any]) -> Reply | list[Reply]:
    text = body["messages"][-1]["content"]
    replies = {
        "inline": Reply("<think>quiet thoughts</think>loud answer"),
        "begun": Reply("quiet thoughts</think>loud answer"),
        "thoughtless": Reply("loud answer"),
        "endless": Reply("word " * 200_000, chunk_s=0.01),
        "cut": Reply("half of it", finish="length"),
        "refused": Reply(status=400),
        "steer": Reply("a\x1b]0;title\x07b"),
    }
    return replies.get(text, Reply(f"you said {text!r}", reasoning="let me think"))


@pytest.fixture(scope="module")
def server() -> Iterator[ScriptedServer]:
    with served(script) as running:
        yield running


@contextmanager
def chat(server: ScriptedServer, *arguments: str) -> Iterator[Terminal]:
    terminal = Terminal([server.url, *arguments])
    try:
        terminal.wait_for("> ")
        yield terminal
    finally:
        terminal.close()


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r\n", "\n")


def test_a_chat_is_typed_stopped_saved_and_ended(server: ScriptedServer, tmp_path: Path) -> None:
    saved = tmp_path / "saved.jsonl"
    with chat(server, "--system", "Be kind.", "--temperature", "0.5", "--extra", '{"seed": 7}') as terminal:
        # Thoughts are dimmed, the answer is not.
        seen = terminal.ask("hello", "'hello'")
        assert f"{DIM}let\x1b[0m{DIM} me\x1b[0m{DIM} think\x1b[0myou said" in seen
        body = server.bodies[-1]
        assert body["messages"] == [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hello"}]
        assert (body["temperature"], body["top_p"], body["seed"], body["stream"]) == (0.5, 0.95, 7, True)
        # Marks inside the text do the same; hidden, they are not shown.
        assert f"{DIM}<think>" not in (seen := terminal.ask("inline", "loud answer"))
        assert f"{DIM}quiet\x1b[0m" in seen
        terminal.ask("/think", "thoughts are hidden")
        assert "quiet" not in terminal.ask("inline", "loud answer")
        # Ctrl-C stops the answer and not the chat; what was not finished is not kept.
        terminal.type("endless\r")
        terminal.wait_for("word word")
        terminal.interrupt("stopped: question and answer are not kept")
        terminal.ask("cut", "cut off: question and answer are not kept")
        terminal.ask("refused", "question and answer are not kept")
        # Several lines, in both ways.
        assert "you said 'one\\ntwo'" in plain(terminal.ask("one\\\rtwo", "two'"))
        assert "you said 'three\\n\\nfour'" in plain(terminal.ask('"""\rthree\r\rfour\r"""', "four'"))
        turns = [message["content"] for message in server.bodies[-1]["messages"]]
        expected = ["Be kind.", "hello", "you said 'hello'", "inline", "loud answer", "inline", "loud answer"]
        assert turns == [*expected, "one\ntwo", "you said 'one\\ntwo'", "three\n\nfour"]
        assert "\x1b]0;" not in terminal.ask("steer", "a]0;titleb")
        # Thoughts are not sent again.
        assert {frozenset(message) for message in server.bodies[-1]["messages"]} == {frozenset({"role", "content"})}
        terminal.ask(f"/save {saved}", "12 messages added to")
        terminal.ask("/clear", "a new conversation")
        terminal.ask("/save", "name a file")
        terminal.ask(f"/save {saved}", "nothing to save yet")
        terminal.ask("/what", "end, as Ctrl-D does")
        # Ctrl-C at an empty prompt ends nothing.
        terminal.interrupt("/quit or Ctrl-D ends the chat")
        assert terminal.ask("again", "'again'")
        assert len(server.bodies[-1]["messages"]) == 2
        terminal.ask(f"/save {tmp_path / 'no/where'}", "not saved")
        terminal.type("/quit\r")
        assert terminal.process.wait(timeout=PATIENCE_S) == 0
    (line,) = saved.read_text().splitlines()
    messages = json.loads(line)["messages"]
    assert messages[:3] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "you said 'hello'", "reasoning_content": "let me think"},
    ]
    assert messages[4] == {"role": "assistant", "content": "loud answer", "reasoning_content": "quiet thoughts"}
    assert [message["role"] for message in messages[1:]] == ["user", "assistant"] * 6


@pytest.mark.long
def test_the_end_of_input_ends_a_chat_and_a_pipe_works(server: ScriptedServer, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "launch/chat.py"), server.url]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, input="hi\n", capture_output=True, text=True, env=environment, timeout=120, check=False
    )
    assert done.returncode == 0
    assert "let me think" in done.stdout
    assert "you said 'hi'" in done.stdout
    assert "\x1b" not in done.stdout


def test_what_a_user_can_do_wrong_is_one_sentence(server: ScriptedServer, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = {
        "runs/x is neither a folder nor an address; give runs/NAME or http://HOST:PORT": ["runs/x"],
        "ftp://x is no address": ["ftp://x"],
        "--extra '[]' is no JSON object": [server.url, "--extra", "[]"],
        "does not say which models it has": ["http://127.0.0.1:9", "--timeout", "5"],
    }
    for message, arguments in wrong.items():
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1


def test_marks_of_thinking_may_be_cut_anywhere() -> None:
    text = "a<b <think>x < y</thin></think>c</think><"
    whole = [(False, "a<b "), (True, "x < y</thin>"), (False, "c</think><")]
    for size in range(1, len(text) + 1):
        chunks = [text[begin : begin + size] for begin in range(0, len(text), size)]
        assert joined(ThinkingStream(), *chunks) == whole, size


def joined(stream: ThinkingStream, *chunks: str) -> list[tuple[bool, str]]:
    """What a stream shows, without its cuts."""
    whole = list[tuple[bool, str]]()
    for thinks, part in [part for chunk in chunks for part in stream.feed(chunk)] + stream.feed("", last=True):
        if whole and whole[-1][0] == thinks:
            whole[-1] = (thinks, whole[-1][1] + part)
        else:
            whole.append((thinks, part))
    return whole


def test_thoughts_may_begin_in_the_prompt() -> None:
    expected = [(True, "a < b"), (False, "c</think>")]
    for size in range(1, 20):
        chunks = [text[i : i + size] for text in ["a < b</think>c</think>"] for i in range(0, len(text), size)]
        assert joined(ThinkingStream(thinks=True), *chunks) == expected, size
    # Not known before: what was not shown yet is thought.
    assert joined(ThinkingStream(), "a < b</think>c</think>") == expected
    assert joined(ThinkingStream(), "a <", " b</think>c</think>") == [(False, "a "), (True, "< b"), *expected[1:]]


def said(server: ScriptedServer, *questions: str, thinking: bool, hides: bool) -> tuple[Chat, str]:
    """A chat, and what it shows after its first line, thoughts dimmed."""
    console = Console(file=io.StringIO(), force_terminal=True, width=200, highlight=False)
    options = {"chat_template_kwargs": {"thinking": thinking}}
    chat = Chat(Endpoint(server.url, retries=0), "teacher", console, system=None, options=options)
    lines = iter([*(["/think"] if hides else []), *questions, "/quit"])
    chat.run(lambda _: next(lines))
    return chat, console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("hides", [False, True])
def test_an_answer_that_begins_inside_thinking_is_told_from_its_thoughts(server: ScriptedServer, hides: bool) -> None:
    _, shown = said(server, "begun", thinking=True, hides=hides)
    assert (f"{DIM}quiet\x1b[0m" in shown) != hides
    assert "loud answer" in shown
    assert "think>" not in shown
    # A server that takes thoughts out itself, of an answer without any: never hidden.
    assert "loud" in plain(said(server, "thoughtless", thinking=True, hides=hides)[1])
    # And of one with some: they came before.
    shown = said(server, "hello", thinking=True, hides=hides)[1]
    assert "you said 'hello'" in shown
    assert (f"{DIM}let" in shown) != hides


def test_a_conversation_is_saved_once_and_brought_up_to_date(server: ScriptedServer, tmp_path: Path) -> None:
    path, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    path.write_text('{"messages": "of another"}\n')
    questions = ["hello", f"/save {path}", f"/save {path}", "inline", f"/save {path}", f"/save {other}", "/clear"]
    _, shown = said(server, *questions, "again", f"/save {path}", thinking=False, hides=False)
    lines = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    assert lines[0] == "of another"
    assert [[turn["content"] for turn in line] for line in lines[1:]] == [
        ["hello", "you said 'hello'", "inline", "loud answer"],
        ["again", "you said 'again'"],
    ]
    assert shown.count("2 messages added to") == 2
    assert "2 messages brought up to date in" in shown
    assert "4 messages brought up to date in" in shown
    assert len(other.read_text().splitlines()) == 1
    # Where somebody took the line away, it comes again.
    assert put_line(path, "new\n", in_place_of="gone\n")
    assert path.read_text().endswith('again\'", "reasoning_content": "let me think"}]}\nnew\n')
    # After a last line that an editor left without its end.
    path.write_text("another's")
    assert put_line(path, "old\n", in_place_of=None)
    assert not put_line(path, "new\n", in_place_of="old\n")
    assert path.read_text() == "another's\nnew\n"


def test_a_message_ends_where_its_lines_do() -> None:
    for lines, message in {("a",): "a", ("a\\", "b\\", "c"): "a\nb\nc", ('"""', "a", "", '"""'): "a\n"}.items():
        waiting = iter(lines)
        assert read_message(lambda _, waiting=waiting: next(waiting)) == message
        assert list(waiting) == []


def test_chunks_of_another_form_are_no_traceback() -> None:
    def chunk(**fields: Any) -> SimpleNamespace:
        return SimpleNamespace(choices=[SimpleNamespace(finish_reason=None, **fields)])

    odd = [SimpleNamespace(choices=None), SimpleNamespace(), SimpleNamespace(choices=[None]), chunk(delta=None)]
    said = chunk(delta=SimpleNamespace(content="a", reasoning_content="b"))
    parts = [(thinks, text) for thinks, text, _ in _deltas([*odd, said]) if text]
    assert parts == [(True, "b"), (False, "a")]
    with pytest.raises(ValueError, match="the server sent an answer whose content is no text"):
        list(_deltas([chunk(delta=SimpleNamespace(content=[{"type": "text"}]))]))


def test_what_a_server_calls_its_model_does_not_steer_the_terminal() -> None:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=False)

    def ended(_: str) -> str:
        raise EOFError

    Chat(Endpoint("http://x"), "m\x1b]0;title\x07", console, system=None, options={}).run(ended)
    assert shown.getvalue().startswith("m]0;title; /help")
