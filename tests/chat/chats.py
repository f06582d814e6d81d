"""Conversations made at random from a seed: many turns, systems, tools, reasoning or none, odd Unicode."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from train.chat.ingest import ChatForm
from train.data.ingest import Prepared, Recipe, prepare
from train.data.tokenizer import TextTokenizer, train_byte_level_bpe

# Nothing here spells a mark; much of it comes near, or means something to a template, to JSON or to a tokeniser.
WORDS = [
    "one",
    " two",
    "  ",
    "\n",
    "\n\n",
    "\r\n",
    "\t",
    "\x00",
    "é",
    "e\u0301",
    "你好。",
    "שלום",
    "👩‍👩‍👧‍👦",
    "\ufeff",
    "\u2028",
    "<",
    "<think",
    "</think",
    "think>",
    "<｜User",
    "｜>",
    "User｜>",
    "<|User|>",
    "{{ messages }}",
    "{% generation %}",
    "{#",
    '"',
    "\\",
    "\\u003cthink\\u003e",
    "'",
    "1+½=",
    "<｜end▁of▁sentence｜ >",
    "𝔘",
    "\u200b",
    "&lt;",
    "ﬁ",
]
TOOL = {"type": "function", "function": {"name": "add", "description": 'adds "x"', "parameters": {"b": 1, "a": [None]}}}


def words(rng: random.Random, most: int = 9) -> str:
    """At least one of the words, more than spaces."""
    return "w" + "".join(rng.choices(WORDS, k=rng.randint(0, most)))


def answer(rng: random.Random) -> dict[str, Any]:
    """An assistant's message; reasoning apart, inside of the content, or none."""
    reasoning, content = words(rng), words(rng)
    return rng.choice(
        [
            {"role": "assistant", "content": content},
            {"role": "assistant", "content": content, "reasoning_content": reasoning},
            {"role": "assistant", "content": f"<think>{reasoning}</think>{content}"},
            {"role": "assistant", "content": None, "reasoning_content": reasoning},
        ]
    )


def turn(rng: random.Random, *, tools: bool) -> list[dict[str, Any]]:
    """A question and its answer, maybe through tools."""
    messages = [{"role": "user", "content": rng.choice(["", words(rng)])}]
    while tools and rng.random() < 0.4:
        arguments = rng.choice(['{"a": 1}', {"a": 10**20, "é": [words(rng), None, 0.5]}])
        calls = [{"type": "function", "function": {"name": "add", "arguments": arguments}}] * rng.randint(1, 2)
        messages.append(answer(rng) | {"tool_calls": calls})
        messages.extend({"role": "tool", "content": words(rng)} for _ in calls)
    return [*messages, answer(rng)]


def row(rng: random.Random) -> dict[str, Any]:
    """A row of one of the forms."""
    tools = rng.random() < 0.4
    system = [{"role": "system", "content": words(rng)}] if rng.random() < 0.5 else []
    messages = system + [message for _ in range(rng.randint(1, 4)) for message in turn(rng, tools=tools)]
    extra = {"tools": [TOOL] * rng.randint(1, 2)} if tools else {}
    form = rng.choice(["messages", "messages", "lists", "texts"])
    if form == "texts":
        return {"prompt": words(rng), "completion": answer(rng)["content"] or "w"}
    if form == "messages":
        return {"messages": messages, **extra}
    # All up to the last question is the prompt.
    last = max(i for i, message in enumerate(messages) if message["role"] == "user")
    return {"prompt": messages[: last + 1], "completion": messages[last + 1 :], **extra}


def rows(count: int, *, seed: int = 7) -> list[dict[str, Any]]:
    """So many of them."""
    rng = random.Random(seed)
    return [row(rng) for _ in range(count)]


def vocabulary(vocab_size: int = 400) -> TextTokenizer:
    """A tokeniser with the template's marks, trained on a few words."""
    return train_byte_level_bpe(["one two think 1+1=2, add. " * 3, *WORDS], vocab_size=vocab_size, chat_marks=True)


def prepared(folder: Path, lines: list[str], *, form: ChatForm | None = None, heldout: float = 0.0) -> Prepared:
    """The store of JSON lines, made in `folder`/store with `vocabulary`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "chats.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    vocabulary().save(folder / "tokenizer.json")
    recipe = Recipe(str(folder / "chats.jsonl"), tokenizer=str(folder / "tokenizer.json"), heldout=heldout)
    return prepare(recipe, folder / "store", form=form or ChatForm())
