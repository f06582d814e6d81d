"""Rows of conversations: what is read out of each form, and one sentence for each mistake."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launch.prepare import main
from tests.chat.chats import TOOL, prepared, rows
from train.chat.ingest import ChatForm
from train.chat.messages import Conversation, read_row
from train.data.readers import read_texts, without_null_fields
from train.data.sources import open_documents

USER = {"role": "user", "content": "q"}
SAID = {"role": "assistant", "content": "a"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"n": 3}}}


def test_forms_are_read_into_one() -> None:
    one = read_row({"messages": [USER, SAID], "id": 5, "tools": None})
    assert one == read_row({"prompt": "q", "completion": "a"}) == read_row({"prompt": [USER], "completion": [SAID]})
    assert one.messages == [USER, SAID]
    inline = read_row({"messages": [USER, {"role": "assistant", "content": "\n<think>r\n</think>\n\na"}]})
    apart = {"role": "assistant", "content": "\n\na", "reasoning_content": "r\n"}
    assert inline.messages == [USER, apart]
    # Fields that are null are absent: a table has every field in every row.
    null = {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": None, "name": None}
    called = read_row({"messages": [USER, null, {"role": "tool", "content": "3"}, SAID], "tools": [TOOL]})
    assert called.messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    # An earlier answer in a prompt is context, all of it.
    context = read_row({"prompt": [USER, SAID, USER], "completion": [SAID]})
    assert (context.context, len(context.messages)) == (3, 4)
    assert read_row({"prompt": [USER], "completion": [SAID]}).context == 0
    for row in rows(50, seed=3):
        assert Conversation.from_json(read_row(row).to_json()) == read_row(row)


BAD = {
    "neither form": ({"text": "a"}, "it has no 'messages', and no 'prompt' either; it has text"),
    "half a form": ({"prompt": "a"}, "it has no 'messages', and no 'completion' either; it has prompt"),
    "no list": ({"messages": "hi"}, "'messages' holds text, not messages"),
    "an empty list": ({"messages": []}, "'messages' holds an empty list, not messages"),
    "mixed": ({"prompt": "q", "completion": [SAID]}, "'prompt' holds text, not messages"),
    "no object": (
        {"messages": [USER, "a"]},
        "message 2 of 'messages' is text, not an object with 'role' and 'content'",
    ),
    "unknown role": (
        {"messages": [{"role": "bot", "content": "a"}]},
        "has the role 'bot', which is none of system, user",
    ),
    "a role that is a list": ({"messages": [{"role": ["user"]}]}, "message 1 of 'messages' has the role ['user']"),
    "no role": ({"messages": [{"content": "a"}]}, "message 1 of 'messages' has the role None"),
    "unknown field": (
        {"messages": [USER, SAID | {"weight": 0}]},
        "message 2 of 'messages' has 'weight', which is none of",
    ),
    "content in parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, SAID]},
        "message 1 of 'messages' has a 'content' that is a list, not text",
    ),
    "a number": ({"messages": [USER, SAID | {"reasoning_content": 4}]}, "has a 'reasoning_content' that is a number"),
    "a user who reasons": ({"messages": [USER | {"reasoning_content": "r"}, SAID]}, "is the user's and has reasoning"),
    "assistant first": ({"messages": [SAID]}, "message 1, the assistant's, comes first"),
    "twice": ({"messages": [USER, SAID, SAID]}, "message 3, the assistant's, follows the assistant's"),
    "system later": (
        {"messages": [USER, {"role": "system", "content": "s"}]},
        "message 2, the system's, follows the user's",
    ),
    "tool after nothing": (
        {"messages": [USER, {"role": "tool", "content": "3"}]},
        "message 2, the tool's, follows the user's",
    ),
    "a tool that was not called": (
        {"messages": [USER, SAID, {"role": "tool", "content": "3"}, SAID]},
        "message 3, the tool's, is the output of no call that the assistant made",
    ),
    "more outputs than calls": (
        {"messages": [USER, SAID | {"tool_calls": [CALL]}, *[{"role": "tool", "content": "3"}] * 2, SAID]},
        "message 4, the tool's, is the output of no call",
    ),
    "no answer": ({"messages": [USER]}, "the assistant says nothing in it"),
    "an empty answer": ({"messages": [USER, {"role": "assistant"}]}, "message 2, the assistant's, says nothing"),
    "prompt that ends with an answer": (
        {"prompt": [USER, SAID], "completion": [USER, SAID]},
        "'prompt' does not end with",
    ),
    "completion that asks": (
        {"prompt": [USER], "completion": [SAID, USER]},
        "'completion' has other turns than answers",
    ),
    "a call without arguments": (
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]},
        "message 2 of 'messages' has a call without a function's 'name' and 'arguments'",
    ),
    "calls that are no list": (
        {"messages": [USER, SAID | {"tool_calls": {}}]},
        "has 'tool_calls' that is an object, not a list",
    ),
    "tools without a name": (
        {"messages": [USER, SAID], "tools": [{"function": {}}]},
        "tool 1 has no 'function' with a 'name'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_one_sentence_with_file_and_line(name: str, tmp_path: Path) -> None:
    row, reason = BAD[name]
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(map(json.dumps, [{"prompt": "q", "completion": "a"}, row])), encoding="utf-8")
    with pytest.raises(ValueError, match=r"^source: ") as refused:
        list(read_texts(file, "", parse=ChatForm().parse))
    sentence = str(refused.value)
    assert sentence.startswith(f"source: {file}, line 2, is unreadable ("), sentence
    assert reason in sentence
    assert sentence.endswith("); repair or remove the line")
    assert "\n" not in sentence


LINES = {
    "a key twice": ('{"messages": [], "prompt": "a", "prompt": "b"}', "it has 'prompt' twice"),
    "a key twice inside": (
        '{"messages": [{"role": "user", "content": "a", "content": "b"}]}',
        "it has 'content' twice",
    ),
    "half a pair": ('{"prompt": "\\ud83d", "completion": "a"}', "it holds half of a surrogate pair"),
    "no JSON": ('{"prompt": ', "Expecting value"),
    "no object": ("[1]", "it is not a JSON object"),
}


@pytest.mark.parametrize("name", LINES)
def test_a_line_that_is_no_row_is_one_sentence(name: str, tmp_path: Path) -> None:
    line, reason = LINES[name]
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "q", "completion": "a"}\n' + line, encoding="utf-8")
    with pytest.raises(ValueError, match=r"source: .*a\.jsonl, line 2, is unreadable") as refused:
        list(read_texts(file, "", parse=ChatForm().parse))
    assert reason in str(refused.value)


def called() -> list[dict[str, Any]]:
    """Rows with tools and arguments of which no two have the same fields; a table gives each the fields of all."""
    schemas: list[dict[str, Any]] = [
        {"type": "object", "properties": {"city": {"type": "string", "enum": ["Rome", None]}}, "required": ["city"]},
        {"type": "object", "properties": {"n": {"type": "integer", "default": 3}}},
        {},
    ]
    arguments: list[dict[str, Any]] = [{"city": "Rome"}, {"n": 3, "deep": {"parts": [{"a": 1}, {"b": "c"}]}}, {}]
    found = []
    for schema, given in zip(schemas, arguments, strict=True):
        call = {"type": "function", "function": {"name": "f", "arguments": given}}
        messages = [USER, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "3"}, SAID]
        tool = {"type": "function", "function": {"name": "f"} | ({"parameters": schema} if schema else {})}
        found.append({"messages": messages, "tools": [tool]})
    return found


def test_a_table_cannot_tell_a_null_that_was_written_from_a_field_that_is_not_there(tmp_path: Path) -> None:
    call = {"function": {"name": "f", "arguments": {"unit": None, "n": 3, "of": [None, 1]}}}
    row = any_row(messages=[USER, {"role": "assistant", "tool_calls": [call]}])
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")  # type: ignore[no-untyped-call]
    (text,) = read_texts(tmp_path / "a.parquet", "", parse=ChatForm().parse)
    assert '"arguments": {"n": 3, "of": [null, 1]}' in text
    assert '"arguments": {"unit": null, "n": 3, "of": [null, 1]}' in read_row(row).to_json()
    # Columns of JSON invent nothing, and keep it.
    table = datasets.Dataset.from_list([row], features=datasets.Features({"messages": datasets.List(datasets.Json())}))
    assert without_null_fields(table[0], pa.struct(list(table.features.arrow_schema))) == row


def test_every_kind_of_file_gives_the_same_conversations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [{"messages": row["messages"]} for row in rows(30) if "messages" in row]
    made = [
        {"messages": [{**m, "tool_calls": None} for m in row["messages"]]} for row in made if "tool" not in str(row)
    ]
    made = called() + made
    expected = [read_row(row).to_json() for row in made]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, made)), encoding="utf-8")
    (tmp_path / "a.json").write_text(json.dumps(made), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(made), tmp_path / "a.parquet")  # type: ignore[no-untyped-call]
    for kind in ("jsonl", "json", "parquet"):
        assert list(read_texts(tmp_path / f"a.{kind}", "", parse=ChatForm().parse)) == expected, kind
    # A dataset of the hub, as its library hands it out.
    table = datasets.Dataset.from_list(made)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    found = open_documents(
        "owner/chats", split="train", text_field="", cache=tmp_path / "cache", parse=ChatForm().parse
    )
    assert found.table["text"][:] == expected


def test_text_files_hold_no_conversations(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello", encoding="utf-8")
    with pytest.raises(ValueError, match=r"is \.txt, and conversations are read from \.jsonl, \.json, \.parquet"):
        open_documents(str(tmp_path / "a.txt"), split="", text_field="", cache=tmp_path / "c", parse=ChatForm().parse)


def row_of(question: str, answer: str) -> str:
    return json.dumps({"prompt": question, "completion": answer})


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    lines = [row_of("q", "a"), row_of("say <｜User｜>", "no"), row_of("q", "word " * 40), row_of("q", "b")]
    found = prepared(tmp_path, lines, form=ChatForm(max_tokens=20)).train
    assert found.manifest.documents == 2
    assert found.manifest.chat is not None
    assert found.manifest.chat.left_out == {"text that spells a mark": 1, "longer than max_tokens": 1}
    assert found.manifest.text_bytes == len("ab")
    with pytest.raises(ValueError, match="no conversation is left of 4: 1 have text that spells a mark, 3 are longer"):
        prepared(tmp_path / "none", lines, form=ChatForm(max_tokens=4))
    with pytest.raises(ValueError, match=r"is an empty corpus; .* conversations whose text spells a mark are left out"):
        prepared(tmp_path / "marks", lines[1:2])


@pytest.mark.parametrize("flag", [["--max-tokens", "9"], ["--first-token", "bos"]])
def test_flags_of_conversations_are_refused_for_text(flag: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--source", "a.jsonl", "--out", "b", *flag])
    assert "are for conversations: add --format messages" in capsys.readouterr().err


def any_row(**fields: Any) -> dict[str, Any]:
    return {"messages": [USER, SAID], **fields}


def test_numbers_of_arguments_stay_whole(tmp_path: Path) -> None:
    """Rows of text read every number as a float; an argument is written as it came."""
    call = {"function": {"name": "f", "arguments": {"n": 12345678901234567890, "x": 1.50}}}
    row = any_row(messages=[USER, {"role": "assistant", "tool_calls": [call]}])
    (tmp_path / "a.jsonl").write_text(json.dumps(row), encoding="utf-8")
    (text,) = read_texts(tmp_path / "a.jsonl", "", parse=ChatForm().parse)
    assert '{"n": 12345678901234567890, "x": 1.5}' in text


def test_the_conversations_of_the_repository_are_what_their_script_writes(tmp_path: Path) -> None:
    folder = Path(__file__).resolve().parents[2] / "data" / "chats"
    (tmp_path / "build_sums.py").write_bytes((folder / "build_sums.py").read_bytes())
    runpy.run_path(str(tmp_path / "build_sums.py"), run_name="__main__")
    assert (tmp_path / "sums.jsonl").read_bytes() == (folder / "sums.jsonl").read_bytes()
    texts = list(read_texts(folder / "sums.jsonl", "", parse=ChatForm().parse))
    assert len(texts) == 120
    assert all(texts), "none is left out"
