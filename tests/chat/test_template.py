"""The chat template as `transformers` renders it: text, ids and masks against conversations written out here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tests.deepseek import v3_vocabulary
from train.chat.template import chat_template, missing_marks
from train.data.ingest import Recipe, prepare
from train.data.tokenizer import (
    CHAT_MARKS,
    SMALLEST_VOCAB_SIZE,
    SPECIAL_TOKENS,
    TextTokenizer,
    load_tokenizer,
    train_byte_level_bpe,
)

TEXTS = ["In the beginning God created the heaven and the earth.\n", "And the earth was without form."] * 5
EOS = SPECIAL_TOKENS["eos"]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "½"}}}
CALLED = '<｜tool▁call▁begin｜>add<｜tool▁sep｜>{"a": 1, "b": "½"}<｜tool▁call▁end｜>'
ADD = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def answer(content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


# Name -> messages, options, and the text with what an assistant turn learns in « ».
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "one turn": ([user("2+2?"), answer("4")], {}, f"<｜User｜>2+2?<｜Assistant｜>«</think>4{EOS}»"),
    "reasoning": (
        [user("2+2?"), answer("4", reasoning_content="two\ntwice")],
        {},
        f"<｜User｜>2+2?<｜Assistant｜>«<think>two\ntwice</think>4{EOS}»",
    ),
    "reasoning of an earlier turn": (
        [user("a"), answer("b", reasoning_content="r"), user("c"), answer("d", reasoning_content="s")],
        {},
        f"<｜User｜>a<｜Assistant｜>«</think>b{EOS}»<｜User｜>c<｜Assistant｜>«<think>s</think>d{EOS}»",
    ),
    "reasoning inside the content": (
        [user("a"), answer("<think>r</think>b"), user("c"), answer("<think>s</think>d")],
        {},
        f"<｜User｜>a<｜Assistant｜>«</think>b{EOS}»<｜User｜>c<｜Assistant｜>«<think>s</think>d{EOS}»",
    ),
    "two systems, answer without thinking": (
        [{"role": "system", "content": "Be brief."}, user("a"), {"role": "system", "content": "Now."}],
        {"add_generation_prompt": True},
        "Be brief.\n\nNow.<｜User｜>a<｜Assistant｜></think>",
    ),
    "answer with thinking": (
        [user("a"), answer("b", reasoning_content="r"), user("c")],
        {"add_generation_prompt": True, "thinking": True},
        f"<｜User｜>a<｜Assistant｜>«</think>b{EOS}»<｜User｜>c<｜Assistant｜><think>",
    ),
    "tools": (
        [
            user("1+½?"),
            answer(None, tool_calls=[CALL, CALL], reasoning_content="r"),
            {"role": "tool", "content": "1.5"},
            {"role": "tool", "content": "3/2"},
            answer("1.5"),
        ],
        {"tools": [ADD]},
        (
            f"\n\nTools:\n{json.dumps(ADD['function'])}<｜User｜>1+½?<｜Assistant｜>«<think>r</think><｜tool▁calls▁begin｜>{CALLED}"
            f"{CALLED}<｜tool▁calls▁end｜>{EOS}»<｜tool▁output▁begin｜>1.5<｜tool▁output▁end｜><｜tool▁output▁begin｜>3/2"
            f"<｜tool▁output▁end｜>«1.5{EOS}»"
        ),
    ),
    "arguments as text, answer after a tool": (
        [
            user("?"),
            answer("Look:", tool_calls=[{"function": {"name": "f", "arguments": "{}"}}]),
            {"role": "tool", "content": "1"},
        ],
        {"add_generation_prompt": True, "thinking": True},
        (
            "<｜User｜>?<｜Assistant｜>«</think>Look:<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
            f"<｜tool▁calls▁end｜>{EOS}»<｜tool▁output▁begin｜>1<｜tool▁output▁end｜>"
        ),
    ),
}


@pytest.fixture(scope="module")
def trained() -> TextTokenizer:
    return train_byte_level_bpe(TEXTS, vocab_size=300, chat_marks=True)


@pytest.fixture(scope="module")
def v3() -> TextTokenizer:
    return v3_vocabulary()


@pytest.fixture(scope="module", params=["trained", "v3"])
def reader(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """That of `transformers` for each vocabulary, for a model whose samples begin with the end of a sentence."""
    file = tmp_path_factory.mktemp("vocabulary") / "tokenizer.json"
    request.getfixturevalue(request.param).save(file)
    return PreTrainedTokenizerFast(
        tokenizer_file=str(file), bos_token=EOS, eos_token=EOS, chat_template=chat_template()
    )


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_text_ids_and_mask_are_those_written_out(name: str, reader: PreTrainedTokenizerFast) -> None:
    messages, options, expected = CONVERSATIONS[name]
    expected = EOS + expected
    assert reader.apply_chat_template(messages, tokenize=False, **options) == expected.replace("«", "").replace("»", "")
    rendered = reader.apply_chat_template(messages, return_assistant_tokens_mask=True, **options)
    learnt = "".join(part.split("»")[0] for part in expected.split("«")[1:])
    pairs = list(zip(rendered["input_ids"], rendered["assistant_masks"], strict=True))
    assert reader.decode([id_ for id_, mask in pairs if mask]) == learnt
    assert reader.decode([id_ for id_, _ in pairs]) == expected.replace("«", "").replace("»", "")
    marks = {reader.convert_tokens_to_ids(mark) for mark in (*CHAT_MARKS.values(), EOS)}
    spelled = sum(expected.count(mark) for mark in (*CHAT_MARKS.values(), EOS))
    assert sum(id_ in marks for id_, _ in pairs) == spelled, "every mark is one token"


def test_a_role_that_is_unknown_is_refused(reader: PreTrainedTokenizerFast) -> None:
    with pytest.raises(Exception, match="role: critic is none of system, user, assistant, tool"):
        reader.apply_chat_template([{"role": "critic", "content": "a"}])


def test_reserved_marks_are_the_last_ids_and_text_cannot_spell_them(trained: TextTokenizer, v3: TextTokenizer) -> None:
    plain = train_byte_level_bpe(TEXTS, vocab_size=300 - len(CHAT_MARKS))
    known = trained.core.get_vocab(with_added_tokens=True)
    assert trained.vocab_size == 300
    assert [known[mark] for mark in CHAT_MARKS.values()] == list(range(300 - len(CHAT_MARKS), 300))
    assert trained.special_ids == plain.special_ids
    text = "a<think>" + "".join(CHAT_MARKS.values())
    assert trained.encode_batch([text, TEXTS[0]]) == plain.encode_batch([text, TEXTS[0]])
    assert trained.decode(trained.encode_batch([text])[0]) == text
    assert missing_marks(trained) == missing_marks(v3) == ()
    assert missing_marks(plain) == tuple(CHAT_MARKS.values())


def test_marks_are_reserved_by_training_only() -> None:
    with pytest.raises(ValueError, match=r"vocab_size: 262 is below 273 \(256 bytes and 17 special tokens\)"):
        train_byte_level_bpe(TEXTS, vocab_size=SMALLEST_VOCAB_SIZE, chat_marks=True)
    with pytest.raises(ValueError, match=r"only a tokeniser that is trained here .* --tokenizer is deepseek"):
        Recipe("text.jsonl", tokenizer="deepseek", chat_marks=True)


def test_a_store_says_that_marks_are_reserved_and_one_without_says_nothing(tmp_path: Path) -> None:
    source = tmp_path / "text.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    plain, marked = (Recipe(str(source), vocab_size=300, chat_marks=marks) for marks in (False, True))
    made = prepare(marked, tmp_path / "marked").train
    assert load_tokenizer(made.path / made.manifest.tokenizer_file).vocab_size == 300
    assert made.manifest.recipe["chat_marks"] is True
    assert prepare(marked, tmp_path / "marked").reused
    with pytest.raises(ValueError, match=r"made with other inputs \(chat_marks differ\)"):
        prepare(plain, tmp_path / "marked")
    assert "chat_marks" not in prepare(plain, tmp_path / "plain").train.manifest.recipe
