"""A conversation -> ids and loss mask, by the one template (`chat_template.jinja`).

    template -> pieces of text, each with or without a loss -> cut at marks -> a mark is its one token, text is encoded
                                                                               as text: it cannot become a mark

`{% generation %}` encloses what has a loss. Ids and mask are those of `apply_chat_template` of `transformers` with
`return_assistant_tokens_mask`, where no text spells a mark; other conversations are left out (`ingest.py`). None comes
about at a seam: what the template puts beside a text begins with "<" or a line's end, and ends with ">" or such an end.

Shapes: tokens = ids of one conversation.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import groupby
from typing import NamedTuple

import jinja2
import numpy as np
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from numpy.typing import NDArray

from train.chat.messages import ANY_MARK, MARKS, Conversation
from train.chat.template import chat_template, missing_marks
from train.data.tokenizer import SPECIAL_TOKENS, TextTokenizer


class Learnt(str):
    """A piece of a rendered text that the model learns to write."""

    __slots__ = ()


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: its text comes out of the template's generator as `Learnt`."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's interface)

    def parse(self, parser: Parser) -> nodes.Node:
        """The tag as a call of `_learnt` around its body."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_learnt"), [], [], body).set_lineno(line)

    def _learnt(self, caller: Callable[[], str]) -> str:
        return Learnt(caller())


def _raise(message: str) -> None:
    raise ValueError(message)


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(extensions=[_Generation], trim_blocks=True, lstrip_blocks=True, autoescape=False)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    environment.globals["raise_exception"] = _raise
    return environment.from_string(chat_template())


def pieces(conversation: Conversation, *, first_token: str) -> Iterator[tuple[str, bool]]:
    """Text and whether it has a loss, in order, two neighbours never alike; `first_token`: spelling, begins the whole.

    Of a prompt with turns of the assistant, what the template makes of it alone has no loss.
    """
    values = {"bos_token": first_token, "eos_token": SPECIAL_TOKENS["eos"], "tools": conversation.tools or None}
    context = 0
    if conversation.context:
        prompt = conversation.messages[: conversation.context]
        context = len(_template().render(messages=prompt, **values))
    parts, length = [], 0
    for part in _template().generate(messages=conversation.messages, **values):
        length += len(part)
        parts.append((part, isinstance(part, Learnt) and length > context))
    for has_loss, run in groupby(parts, key=lambda part: part[1]):
        yield "".join(text for text, _ in run), has_loss


class Encoded(NamedTuple):
    """[tokens] int32 and [tokens] uint8, 1 where a token has a loss."""

    ids: NDArray[np.int32]
    loss_mask: NDArray[np.uint8]


class ChatEncoder:
    """Encodes conversations with one tokeniser.

    Args:
        tokenizer: has the template's marks.
        first_token: name of the special token that begins each conversation, as in the model's training: bos or eos.
    Raises:
        ValueError: it lacks marks; names them.
    """

    def __init__(self, tokenizer: TextTokenizer, *, first_token: str) -> None:
        if missing := missing_marks(tokenizer):
            raise ValueError(
                f"tokenizer: it has no token for {', '.join(missing)}, so marks would be read as letters; train one "
                "with `launch/prepare.py --chat-marks`, or take DeepSeek-V3's (`--tokenizer deepseek`)"
            )
        self._tokenizer, self._first = tokenizer, SPECIAL_TOKENS[first_token]
        self._ids = {mark: tokenizer.core.token_to_id(mark) for mark in MARKS}

    def encode(self, conversations: Sequence[Conversation]) -> list[Encoded]:
        """Ids and loss mask of each."""
        # (text or mark, whether it is a mark, whether it has a loss) of each conversation.
        cut = [
            [(*part, has_loss) for text, has_loss in pieces(each, first_token=self._first) for part in _at_marks(text)]
            for each in conversations
        ]
        texts = iter(self._tokenizer.encode_arrays([part for each in cut for part, is_mark, _ in each if not is_mark]))
        encoded = []
        for each in cut:
            ids = [np.array([self._ids[part]], dtype=np.int32) if is_mark else next(texts) for part, is_mark, _ in each]
            lengths = [len(part) for part in ids]
            loss_mask = np.repeat(np.array([has_loss for *_, has_loss in each], dtype=np.uint8), lengths)
            encoded.append(Encoded(np.concatenate(ids), loss_mask))
        return encoded


def _at_marks(text: str) -> Iterator[tuple[str, bool]]:
    """The marks of a text and what is between them, in order, and which of the two each is."""
    start = 0
    for mark in ANY_MARK.finditer(text):
        if start < mark.start():
            yield text[start : mark.start()], False
        yield mark[0], True
        start = mark.end()
    if start < len(text):
        yield text[start:], False
