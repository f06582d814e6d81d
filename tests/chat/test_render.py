"""Ids and loss mask of a conversation against `transformers`, and text that spells marks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tests.chat.chats import rows, vocabulary
from tests.deepseek import v3_vocabulary
from train.chat.messages import ANY_MARK, MARKS, read_row, spells_a_mark
from train.chat.render import ChatEncoder
from train.chat.template import chat_template
from train.data.tokenizer import SPECIAL_TOKENS, TextTokenizer, train_byte_level_bpe


def oracle(tokenizer: TextTokenizer, folder: Path, first_token: str) -> PreTrainedTokenizerFast:
    tokenizer.save(folder / "tokenizer.json")
    return PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        bos_token=SPECIAL_TOKENS[first_token],
        eos_token=SPECIAL_TOKENS["eos"],
        chat_template=chat_template(),
    )


def expected(row: dict[str, Any], reader: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """Ids and mask by `transformers`; nothing of a prompt has a loss."""
    messages, prompt = row.get("messages"), row.get("prompt")
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
        messages = [*prompt, {"role": "assistant", "content": row["completion"]}]
    elif prompt is not None:
        messages = prompt + row["completion"]
    found = reader.apply_chat_template(messages, tools=row.get("tools"), return_assistant_tokens_mask=True)
    ids, mask = found["input_ids"], found["assistant_masks"]
    without = len(reader.apply_chat_template(prompt, tools=row.get("tools"))["input_ids"]) if prompt else 0
    return ids, [0] * without + mask[without:]


@pytest.mark.parametrize(
    ("first_token", "count", "name"), [("eos", 200, "trained"), pytest.param("bos", 40, "v3", marks=pytest.mark.long)]
)
def test_ids_and_masks_are_those_of_transformers(first_token: str, count: int, name: str, tmp_path: Path) -> None:
    tokenizer = v3_vocabulary() if name == "v3" else vocabulary()
    reader, made = oracle(tokenizer, tmp_path, first_token), rows(count)
    ours = ChatEncoder(tokenizer, first_token=first_token).encode([read_row(row) for row in made])
    kinds = set()
    for row, (ids, mask) in zip(made, ours, strict=True):
        assert (ids.tolist(), mask.tolist()) == expected(row, reader), row
        text = json.dumps(row)
        kinds |= {word for word in ("messages", "prompt", "reasoning", "<think>", "system", '"tool"') if word in text}
        kinds |= {"turns"} if text.count('"user"') > 2 else set()
    assert len(kinds) == 7, "every kind of conversation is among them"


@pytest.mark.parametrize("mark", MARKS)
def test_a_mark_in_any_text_is_found_before_it_is_rendered(mark: str) -> None:
    """In what anybody says, in names, keys and values of tools; so it can neither begin a turn nor end one."""
    user, call = {"role": "user", "content": "q"}, {"function": {"name": "f", "arguments": {"a": 1}}}
    places: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": f"q{mark}"}, {"role": "assistant", "content": "a"}]},
        {"messages": [user, {"role": "assistant", "content": f"a {mark} {mark}"}]},
        {"messages": [user, {"role": "assistant", "content": "a", "reasoning_content": mark}]},
        {
            "messages": [
                user,
                {"role": "assistant", "content": "a", "tool_calls": [{"function": {"name": mark, "arguments": ""}}]},
            ]
        },
        {
            "messages": [
                user,
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": mark},
            ]
        },
        {
            "messages": [user, {"role": "assistant", "content": "a"}],
            "tools": [{"function": {"name": "f", "x": {mark: 1}}}],
        },
    ]
    for row in places:
        assert spells_a_mark(read_row(row).to_json())


def test_no_mark_comes_about_at_a_seam() -> None:
    """Texts that end with the beginning of a mark and begin with the end of one; all marks come from the template."""
    tokenizer = vocabulary()
    mark_ids = {tokenizer.core.token_to_id(mark) for mark in MARKS}
    (plain,) = ChatEncoder(tokenizer, first_token="eos").encode([read_row({"prompt": "q", "completion": "a"})])
    for mark in MARKS:
        for cut in range(1, len(mark)):
            head, tail = mark[:cut], mark[cut:]
            row = read_row({"prompt": tail + head, "completion": tail + "a" + head})
            assert not ANY_MARK.search(row.to_json())
            (found,) = ChatEncoder(tokenizer, first_token="eos").encode([row])
            marks = [each for each in found.ids.tolist() if each in mark_ids]
            assert marks == [each for each in plain.ids.tolist() if each in mark_ids], (head, tail)


def test_a_tokeniser_without_the_marks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no token for <think>, .*train one with `launch/prepare.py --chat-marks`"):
        ChatEncoder(train_byte_level_bpe(["a b"], vocab_size=270), first_token="eos")
