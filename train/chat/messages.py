"""Rows of TRL's two forms -> a conversation in one form, or one sentence on what is wrong.

    {"messages": [{"role": ..., "content": ...}, ...], "tools": [...]}
    {"prompt": ..., "completion": ...}        both texts (one question, one answer) or both lists of messages

A message of the assistant may have `reasoning_content` and `tool_calls`; reasoning with which its content begins, in
`<think>` and `</think>`, is taken out of it. All turns of the assistant have a loss, those of a `prompt` none. Other
fields of a row are passed over; of a message they are refused, for one of them may say that it has no loss.

The one form is JSON: {"messages", "tools"?, "context"?}, `context` the number of first messages without a loss.
Source of the forms: TRL 1.16, "Dataset formats and types".
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from train.data.readers import kind_name
from train.data.tokenizer import CHAT_MARKS, SPECIAL_TOKENS

Message = dict[str, Any]

MARKS = (*SPECIAL_TOKENS.values(), *CHAT_MARKS.values())
ANY_MARK = re.compile("|".join(map(re.escape, MARKS)))
FIELDS = ("role", "content", "reasoning_content", "tool_calls", "name", "tool_call_id")
# Role -> those that may stand before it.
MAY_FOLLOW = {
    "system": (None,),
    "user": (None, "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
INLINE_REASONING = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)


class Conversation(NamedTuple):
    """Checked messages; the first `context` of them have no loss."""

    messages: list[Message]
    tools: list[dict[str, Any]]
    context: int = 0

    def to_json(self) -> str:
        """One line."""
        fields: dict[str, Any] = {"messages": self.messages}
        fields |= {"tools": self.tools} if self.tools else {}
        return json.dumps(fields | ({"context": self.context} if self.context else {}), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Conversation:
        """Inverse of `to_json`."""
        fields = json.loads(text)
        return cls(fields["messages"], fields.get("tools", []), fields.get("context", 0))

    @property
    def texts(self) -> list[str]:
        """What is said and thought in it."""
        names = ("content", "reasoning_content")
        return [message[name] for message in self.messages for name in names if message.get(name)]


def read_row(row: dict[str, Any]) -> Conversation:
    """The conversation of a row of either form.

    Raises:
        ValueError: what is wrong with it; no sentence yet.
    """
    tools = _tools(row.get("tools"))
    if row.get("messages") is not None:
        messages = _messages(row["messages"], "messages")
        return _checked(Conversation(messages, tools))
    for name in ("prompt", "completion"):
        if row.get(name) is None:
            held = ", ".join(map(str, row)) or "none"
            raise ValueError(f"it has no 'messages', and no '{name}' either; it has {held}")
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return _checked(Conversation([_message("user", prompt), _message("assistant", completion)], tools))
    before, after = _messages(prompt, "prompt"), _messages(completion, "completion")
    if before[-1]["role"] not in ("user", "tool") or any(each["role"] in ("user", "system") for each in after):
        raise ValueError("'prompt' does not end with the user or a tool, or 'completion' has other turns than answers")
    has_answers = any(each["role"] == "assistant" for each in before)
    return _checked(Conversation([*before, *after], tools, len(before) if has_answers else 0))


def spells_a_mark(text: str) -> bool:
    """Whether a conversation as JSON has text that spells a mark of the template, or another control token."""
    # JSON escapes no character of a mark.
    return ANY_MARK.search(text) is not None


def _message(role: str, content: str) -> Message:
    message = {"role": role, "content": content}
    if role == "assistant" and (found := INLINE_REASONING.fullmatch(content)):
        message |= {"reasoning_content": found[1], "content": found[2]}
    return message


def _messages(value: object, field: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        empty = "an empty list" if value == [] else kind_name(value)
        raise ValueError(f"'{field}' holds {empty}, not messages")
    return [_one(item, f"message {number} of '{field}'") for number, item in enumerate(value, 1)]


def _one(item: object, where: str) -> Message:
    """A message without the fields that are null."""
    if not isinstance(item, dict):
        raise ValueError(f"{where} is {kind_name(item)}, not an object with 'role' and 'content'")
    fields = {name: value for name, value in item.items() if value is not None}
    if unknown := [str(name) for name in fields if name not in FIELDS]:
        raise ValueError(f"{where} has '{unknown[0]}', which is none of {', '.join(FIELDS)}")
    role = fields.get("role")
    if not isinstance(role, str) or role not in MAY_FOLLOW:
        raise ValueError(f"{where} has the role {role!r}, which is none of {', '.join(MAY_FOLLOW)}")
    for name in ("content", "reasoning_content", "name", "tool_call_id"):
        if not isinstance(fields.setdefault(name, "") if name == "content" else fields.get(name, ""), str):
            raise ValueError(f"{where} has a '{name}' that is {kind_name(fields[name])}, not text")
    if role != "assistant" and fields.keys() & {"reasoning_content", "tool_calls"}:
        raise ValueError(f"{where} is the {role}'s and has reasoning or tool calls, which only the assistant has")
    calls = [_call(call, where) for call in _list(fields.get("tool_calls"), f"{where} has 'tool_calls'")]
    message = fields | ({} if fields.get("reasoning_content") else _message(role, fields["content"]))
    return message | ({"tool_calls": calls} if calls else {})


def _list(value: object, what: str) -> list[Any]:
    if value is not None and not isinstance(value, list):
        raise ValueError(f"{what} that is {kind_name(value)}, not a list")
    return value or []


def _call(call: object, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    name, arguments = (function.get("name"), function.get("arguments")) if isinstance(function, dict) else (None, None)
    if not isinstance(name, str) or not isinstance(arguments, str | dict):
        raise ValueError(f"{where} has a call without a function's 'name' and 'arguments' (text or an object)")
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def _tools(value: object) -> list[dict[str, Any]]:
    tools = _list(value, "it has 'tools'")
    for number, tool in enumerate(tools, 1):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"tool {number} has no 'function' with a 'name'")
    return tools


def _checked(conversation: Conversation) -> Conversation:
    """Refuse turns out of order, outputs that nobody asked for, and a conversation without an answer to learn."""
    before, open_calls, messages = None, 0, conversation.messages
    for number, message in enumerate(messages, 1):
        role = message["role"]
        if before not in MAY_FOLLOW[role]:
            after = "comes first" if before is None else f"follows the {before}'s"
            raise ValueError(f"message {number}, the {role}'s, {after}")
        open_calls = len(message.get("tool_calls", ())) if role != "tool" else open_calls - 1
        if open_calls < 0:
            raise ValueError(f"message {number}, the tool's, is the output of no call that the assistant made")
        if role == "assistant" and not any(
            message.get(name) for name in ("content", "reasoning_content", "tool_calls")
        ):
            raise ValueError(f"message {number}, the assistant's, says nothing")
        before = role
    if all(message["role"] != "assistant" for message in messages):
        raise ValueError("the assistant says nothing in it, so there is nothing to learn")
    return conversation
