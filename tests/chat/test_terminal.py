"""The chat in a terminal: typed into a pseudo-terminal as a user would, against a server on loopback."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from launch.chat import main
from tests.chat.scripted_server import Reply, ScriptedServer, served
from train.chat.endpoint import Endpoint
from train.chat.terminal import Chat, _deltas, read_message
from train.chat.thinking import ThinkingStream

ROOT = Path(__file__).resolve().parents[2]
# The command, with the pseudo-terminal as the one whose Ctrl-C reaches it.
TAKE_TERMINAL = (
    "import fcntl, sys, termios\nfcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
    "from launch.chat import main\nsys.exit(main(sys.argv[1:]))"
)
DIM = "\x1b[2m"


def script(body: dict[str, Any]) -> Reply | list[Reply]:
    text = body["messages"][-1]["content"]
    replies = {
        "inline": Reply("<think>quiet thoughts</think>loud answer"),
        "endless": Reply("word " * 2000, chunk_s=0.01),
        "cut": Reply("half of it", finish="length"),
        "refused": Reply(status=400),
        "steer": Reply("a\x1b]0;title\x07b"),
    }
    return replies.get(text, Reply(f"you said {text!r}", reasoning="let me think"))


@pytest.fixture(scope="module")
def server() -> Iterator[ScriptedServer]:
    with served(script) as running:
        yield running


class Terminal:
    """A process on a pseudo-terminal: type, and wait until something is shown."""

    def __init__(self, arguments: list[str]) -> None:
        self._leader, follower = pty.openpty()
        environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "200"}
        environment.pop("NO_COLOR", None)
        self.process = subprocess.Popen(
            [sys.executable, "-c", TAKE_TERMINAL, *arguments],
            stdin=follower,
            stdout=follower,
            stderr=follower,
            env=environment,
            start_new_session=True,
        )
        os.close(follower)
        self.shown = ""

    def wait_for(self, text: str) -> str:
        """What was shown since the last wait, up to and with `text`."""
        deadline = time.monotonic() + 60
        while text not in self.shown:
            assert time.monotonic() < deadline, self.shown
            if select.select([self._leader], [], [], 0.1)[0]:
                self.shown += os.read(self._leader, 1 << 16).decode()
        seen, found, self.shown = self.shown.partition(text)
        return seen + found

    def type(self, text: str) -> None:
        os.write(self._leader, text.encode())

    def ask(self, line: str, until: str) -> str:
        self.type(line + "\r")
        seen = self.wait_for(until)
        self.wait_for("> ")
        return seen

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._leader)


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
        terminal.type("\x03")
        terminal.wait_for("stopped: question and answer are not kept")
        terminal.wait_for("> ")
        terminal.ask("cut", "cut off: question and answer are not kept")
        terminal.ask("refused", "question and answer are not kept")
        # Several lines, in both ways.
        assert "you said 'one\\ntwo'" in plain(terminal.ask("one\\\rtwo", "two'"))
        assert "you said 'three\\n\\nfour'" in plain(terminal.ask('"""\rthree\r\rfour\r"""', "four'"))
        turns = [message["content"] for message in server.bodies[-1]["messages"]]
        expected = ["Be kind.", "hello", "you said 'hello'", "inline", "loud answer", "inline", "loud answer"]
        assert turns == [*expected, "one\ntwo", "you said 'one\\ntwo'", "three\n\nfour"]
        assert "\x1b]0;" not in terminal.ask("steer", "a]0;titleb")
        terminal.ask(f"/save {saved}", "12 messages added to")
        terminal.ask("/clear", "a new conversation")
        terminal.ask("/save", "name a file")
        terminal.ask(f"/save {saved}", "nothing to save yet")
        terminal.ask("/what", "end, as Ctrl-D does")
        # Ctrl-C at an empty prompt ends nothing.
        terminal.type("\x03")
        terminal.wait_for("/quit or Ctrl-D ends the chat")
        assert terminal.ask("again", "'again'")
        assert len(server.bodies[-1]["messages"]) == 2
        terminal.ask(f"/save {tmp_path / 'no/where'}", "not saved")
        terminal.type("/quit\r")
        assert terminal.process.wait(timeout=60) == 0
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
        "runs/x is no address; `python -m launch.serve runs/x` serves a run": ["runs/x"],
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
        stream, parts = ThinkingStream(), list[tuple[bool, str]]()
        for begin in range(0, len(text), size):
            parts += stream.feed(text[begin : begin + size])
        parts += stream.feed("", last=True)
        joined = list[tuple[bool, str]]()
        for thinks, part in parts:
            if joined and joined[-1][0] == thinks:
                joined[-1] = (thinks, joined[-1][1] + part)
            else:
                joined.append((thinks, part))
        assert joined == whole, size


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
