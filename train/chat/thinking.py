"""The two parts of what a reasoning model writes: its thoughts and its answer.

Servers return the thoughts beside the answer (`reasoning_content`: DeepSeek's API, SGLang; `reasoning`: newer vLLM), or
leave them in the text between `<think>` and `</think>`. Where the chat template has written `<think>` already, the text
has its end alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BEGIN, END = "<think>", "</think>"
# Fields that hold the thoughts, of a message or of a chunk of a stream.
FIELDS = ("reasoning_content", "reasoning")


@dataclass(frozen=True)
class Solution:
    """One answer of a model: "" for thoughts that it did not write; `cut_off` where its length was at an end."""

    answer: str
    thoughts: str = ""
    cut_off: bool = False
    completion_tokens: int | None = None

    @property
    def message(self) -> dict[str, str]:
        """The turn as training on messages reads it."""
        message = {"role": "assistant", "content": self.answer}
        return message | {"reasoning_content": self.thoughts} if self.thoughts else message


def solution_of(body: Mapping[str, Any]) -> Solution:
    """The first choice of a chat completion; ValueError where it is none, or its marks of thinking do not pair."""
    try:
        choice = body["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        content = message.get("content") or ""
        thoughts = next((message[name] for name in FIELDS if message.get(name)), None)
        tokens = (body.get("usage") or {}).get("completion_tokens")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise ValueError("the answer is no chat completion") from None
    if not isinstance(content, str) or not isinstance(thoughts, str | None):
        raise ValueError("the answer is no text")
    # Half of a surrogate pair is legal in JSON but no text: a ValueError too.
    f"{content}{thoughts}".encode()
    cut_off = finish == "length"
    if thoughts is None:
        thoughts, content = split_thinking(content, cut_off=cut_off)
    return Solution(content.strip(), thoughts.strip(), cut_off, tokens)


def split_thinking(text: str, *, cut_off: bool = False) -> tuple[str, str]:
    """(thoughts, answer) of a text; ValueError where the marks do not pair, unless the text was cut off."""
    head, end, answer = text.partition(END)
    before, begin, thoughts = head.rpartition(BEGIN)
    if cut_off and begin and not end:
        return thoughts, ""
    if before.strip() or BEGIN in answer or END in answer or (begin and not end):
        raise ValueError(f"{BEGIN} and {END} do not enclose one beginning of the text")
    return (thoughts, answer) if end else ("", text)


class ThinkingStream:
    """Tells thoughts from answer while a text arrives; marks may be cut anywhere between two chunks.

    `thinks`: the prompt has ended with `<think>`, so the text begins inside. An end without a beginning ends thoughts
    too: what was shown of them cannot be taken back.
    """

    def __init__(self, *, thinks: bool = False) -> None:
        self.thinks, self._has_thought, self._held = thinks, False, ""

    def feed(self, text: str, *, last: bool = False) -> list[tuple[bool, str]]:
        """Parts to show: (whether it is thought, text); what may become a mark is held until the next call."""
        self._held += text
        parts: list[tuple[bool, str]] = []
        while found := re.search("|".join(self._marks), self._held):
            is_end = found[0] == END
            parts.append((is_end, self._held[: found.start()]))
            self.thinks, self._has_thought, self._held = not is_end, is_end, self._held[found.end() :]
        lengths = (n for mark in self._marks for n in range(1, len(mark)) if self._held.endswith(mark[:n]))
        held = 0 if last else max(lengths, default=0)
        parts.append((self.thinks, self._held[: len(self._held) - held]))
        self._held = self._held[len(self._held) - held :]
        return [part for part in parts if part[1]]

    @property
    def _marks(self) -> tuple[str, ...]:
        """What has a meaning next."""
        if self.thinks:
            return (END,)
        return (BEGIN,) if self._has_thought else (BEGIN, END)
