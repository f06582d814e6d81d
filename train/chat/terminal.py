"""A chat in a terminal with any endpoint of OpenAI's form: answers as they are written, thoughts dimmed or hidden.

A line is sent as it is; one that ends with a backslash goes on in the next, and lines between two of \"\"\" are one
message. Ctrl-C stops an answer, Ctrl-D ends the chat. An answer that was stopped, cut off or failed is not kept, nor
is its question: what `/save` writes, one conversation a line, is whole and is what training on messages reads. Thoughts
are saved and not sent again: V3.1's template leaves those of earlier turns out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from train.chat.endpoint import Endpoint, openai_module, printable, sentence_of
from train.chat.thinking import FIELDS, Solution, ThinkingStream, split_thinking
from train.data.whole_file import write_whole

QUOTES = '"""'
HELP = """\
/think        show thoughts dimmed, or hide them
/save FILE    add this conversation to a JSONL file, in the form of training on messages; again: bring it up to date
/clear        begin a new conversation
/help         this list
/quit         end, as Ctrl-D does; Ctrl-C stops an answer
a line that ends with \\ goes on in the next; lines between two of \"\"\" are one message"""


class Chat:
    """One conversation; `ask` sends it with a new message and shows the answer."""

    def __init__(
        self, endpoint: Endpoint, model: str, console: Console, *, system: str | None, options: Mapping[str, Any]
    ) -> None:
        self._openai = openai_module()
        self._client = endpoint.client()
        self._console, self._model, self._options = console, model, dict(options)
        self._system = [{"role": "system", "content": system}] if system else []
        self._turns: list[dict[str, str]] = []
        # File -> the line of this conversation.
        self._saved: dict[Path, str] = {}
        self._shows_thoughts = True
        asked = options.get("chat_template_kwargs")
        self._asks_to_think = isinstance(asked, Mapping) and bool(asked.get("thinking") or asked.get("enable_thinking"))

    def run(self, read: Callable[[str], str]) -> None:
        """Talk until the end of input or `/quit`; `read` returns a line for a prompt, as `input` does."""
        self._say(f"{self._model}; /help lists what can be typed")
        while True:
            try:
                text = read_message(read)
            except KeyboardInterrupt:
                self._say("\n/quit or Ctrl-D ends the chat")
                continue
            except EOFError:
                return
            if text.startswith("/"):
                if not self._command(*text.split(maxsplit=1)):
                    return
            elif text.strip():
                self._ask(text)

    def _command(self, name: str, argument: str = "") -> bool:
        """Do what a command says; returns whether the chat goes on."""
        if name == "/think":
            self._shows_thoughts = not self._shows_thoughts
            self._say(f"thoughts are {'shown' if self._shows_thoughts else 'hidden'}")
        elif name == "/save":
            self._save(argument.strip())
        elif name == "/clear":
            self._turns, self._saved = [], {}
            self._say("a new conversation")
        elif name != "/quit":
            self._say(HELP)
        return name != "/quit"

    def _save(self, name: str) -> None:
        if not name or not self._turns:
            self._say("nothing to save yet" if name else "/save FILE: name a file")
            return
        path = Path(name).resolve()
        line = json.dumps({"messages": self._system + self._turns}, ensure_ascii=False) + "\n"
        try:
            is_new = put_line(path, line, in_place_of=self._saved.get(path))
        # A server may send half of a surrogate pair, which no file can hold.
        except (OSError, UnicodeError) as error:
            self._say(f"not saved: {error}")
            return
        self._saved[path] = line
        self._say(f"{len(self._turns)} messages {'added to' if is_new else 'brought up to date in'} {name}")

    def _ask(self, text: str) -> None:
        question = {"role": "user", "content": text}
        finish, answer, problem = "", "", ""
        try:
            without_thoughts = [{"role": turn["role"], "content": turn["content"]} for turn in self._turns]
            finish, solution = self._receive([*self._system, *without_thoughts, question])
            answer = solution.answer
        except KeyboardInterrupt:
            problem = "stopped"
        except (self._openai.OpenAIError, ValueError) as error:
            problem = sentence_of(error)
        if not problem and (finish == "length" or not answer):
            problem = "cut off" if finish == "length" else "no answer"
        self._console.print()
        if problem:
            self._say(f"{problem}: question and answer are not kept")
        else:
            self._turns += [question, solution.message]

    def _receive(self, messages: list[dict[str, str]]) -> tuple[str, Solution]:
        """Show an answer while it comes; why it ended, and all of it."""
        stream = self._client.chat.completions.create(
            model=self._model, messages=messages, stream=True, extra_body=self._options
        )
        marks, finish, thoughts, content = ThinkingStream(), "", "", ""
        with stream:
            for thinks, text, why in _deltas(stream):
                finish = why or finish
                if thinks:
                    thoughts += text
                    self._show(True, text)
                elif text:
                    if not content:
                        # A server that takes thoughts out of the text has sent some by now.
                        marks = ThinkingStream(thinks=self._asks_to_think and not thoughts)
                    content += text
                    for part in marks.feed(text):
                        self._show(*part)
        for part in marks.feed("", last=True):
            self._show(*part)
        inside, answer = split_thinking(content, cut_off=finish == "length")
        if marks.thinks and finish != "length" and not self._shows_thoughts:
            # No end of thoughts came: there were none, and the answer was taken for them.
            self._show(False, answer)
        return finish, Solution(answer.strip(), (thoughts + inside).strip())

    def _show(self, thinks: bool, text: str) -> None:
        if self._shows_thoughts or not thinks:
            style = "dim" if thinks else None
            self._console.print(printable(text), end="", style=style, markup=False, soft_wrap=True)

    def _say(self, text: str) -> None:
        self._console.print(printable(text), style="italic", markup=False, soft_wrap=True)


def put_line(path: Path, line: str, *, in_place_of: str | None) -> bool:
    """Add a line to a file, unless an earlier one is still there, which it replaces; returns whether it was added."""
    new, old = line.encode(), (in_place_of or "").encode()
    text = path.read_bytes() if path.is_file() else b""
    if old and old in text:
        write_whole(path, text.replace(old, new, 1))
        return False
    with path.open("ab") as file:
        # An editor may have left the last line without its end.
        file.write(b"\n" + new if text and not text.endswith(b"\n") else new)
    return True


def read_message(read: Callable[[str], str]) -> str:
    """One message: a line, lines joined by backslashes, or lines between two of three quotation marks."""
    line = read("> ")
    if line.strip() == QUOTES:
        lines: list[str] = []
        while (line := read(". ")).strip() != QUOTES:
            lines.append(line)
        return "\n".join(lines)
    while line.endswith("\\"):
        line = line[:-1] + "\n" + read(". ")
    return line


def _deltas(stream: Any) -> Iterator[tuple[bool, str, str]]:
    """(whether it is thought, text, why it ended or "") of each chunk."""
    for chunk in stream:
        # The client does not check what servers send: fields may be null, or of another kind.
        choices = getattr(chunk, "choices", None)
        for choice in choices[:1] if isinstance(choices, list) else ():
            delta, finish = getattr(choice, "delta", None), getattr(choice, "finish_reason", None) or ""
            thought = next((text for name in FIELDS if (text := getattr(delta, name, None))), "")
            content = getattr(delta, "content", None) or ""
            if not all(isinstance(text, str) for text in (thought, content, finish)):
                raise ValueError("the server sent an answer whose content is no text")
            if thought:
                yield True, thought, finish
            yield False, content, finish


def line_reader() -> Callable[[str], str]:
    """`input`, with arrows and history where Python has readline."""
    with suppress(ImportError):
        import readline  # noqa: F401
    return input
