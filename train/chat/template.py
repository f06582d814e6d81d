"""The chat template of exports and of fine-tuning: DeepSeek-V3.1's form, written as Jinja in `chat_template.jinja`.

    <first token>SYSTEM<｜User｜>QUESTION<｜Assistant｜><think>REASONING</think>ANSWER<｜end▁of▁sentence｜><｜User｜>...
    <first token>SYSTEM<｜User｜>QUESTION<｜Assistant｜></think>ANSWER<｜end▁of▁sentence｜>...      without reasoning

`thinking` (default false) says whether a generation prompt ends with `<think>` or with `</think>`. A message of the
assistant has `content`, beside it `reasoning_content` and `tool_calls`; reasoning is written after the last message of
the user only, so that a model sees earlier turns in training as it sees them when it answers. After the output of a
tool the turn goes on without a mark. `{% generation %}` marks what an assistant's turn must learn: all after its mark,
the marks of thinking and the end of sentence included. `bos_token` is the token that begins a sample of the model's own
training, which an export writes so.

Source: the template published with DeepSeek-V3.1; `tools` are listed in words of ours, as JSON, a line each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from train.data.tokenizer import CHAT_MARKS, SPECIAL_TOKENS, TextTokenizer

# The name that `transformers` 5, vLLM and others look for beside the tokeniser.
TEMPLATE_NAME = "chat_template.jinja"

# How `transformers` takes an answer apart: into reasoning, content and calls of tools, as it comes or whole.
RESPONSE_TEMPLATE: dict[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor": [CHAT_MARKS["assistant"], CHAT_MARKS["tool_output_end"]],
    "fields": {
        "reasoning_content": {
            "open": CHAT_MARKS["think"],
            "close": CHAT_MARKS["end_of_think"],
            "content": "text",
            "content_args": {"strip": False},
        },
        "tool_calls": {
            "open_pattern": f"{CHAT_MARKS['tool_call_begin']}(?P<name>.*?){CHAT_MARKS['tool_sep']}",
            "close": CHAT_MARKS["tool_call_end"],
            "repeats": True,
            "content": "text",
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        # Marks that are no part of the text; what follows one goes on with it.
        "content": {
            "close": [
                *(CHAT_MARKS[name] for name in ("end_of_think", "tool_calls_begin", "tool_calls_end")),
                SPECIAL_TOKENS["eos"],
            ],
            "content": "text",
            "content_args": {"strip": False},
            "repeats": True,
            "join": "",
        },
    },
}


def chat_template() -> str:
    """The Jinja text; a renderer gives it `bos_token`, `eos_token`, `messages` and what a request adds."""
    return Path(__file__).with_name(TEMPLATE_NAME).read_text(encoding="utf-8")


def missing_marks(tokenizer: TextTokenizer) -> tuple[str, ...]:
    """Marks of the template that a tokeniser has no token for: with any, chats would be read as letters."""
    return tuple(mark for mark in CHAT_MARKS.values() if tokenizer.core.token_to_id(mark) is None)
