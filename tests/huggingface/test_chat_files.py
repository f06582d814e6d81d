"""What an export gives an engine beside weights: read by `transformers`, and the tokeniser as trained by us again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from transformers import AutoTokenizer, GenerationConfig

from tests.deepseek import v3_vocabulary
from tests.huggingface.hf_folders import FP8, RAGGED, lively, saved
from train.chat.template import chat_template
from train.data.tokenizer import (
    CHAT_MARKS,
    SPECIAL_TOKENS,
    TextTokenizer,
    load_tokenizer,
    tokenizer_from_json,
    train_byte_level_bpe,
)
from train.data.trained_on import FirstToken, TrainedOn
from train.huggingface.config import small_files
from train.huggingface.export import ExportOptions, export

TEXTS = ["In the beginning", "the earth was without form, and void\n\n", "naïve 漢字 \t", "", " a  b "]
EOS = SPECIAL_TOKENS["eos"]


@pytest.fixture(scope="module", params=["trained", "trained without marks", "v3"])
def ours(request: pytest.FixtureRequest) -> TextTokenizer:
    if request.param == "v3":
        return v3_vocabulary()
    return train_byte_level_bpe(TEXTS * 3, vocab_size=300, chat_marks=request.param == "trained")


def written(tokenizer: TextTokenizer, folder: Path, first_token: FirstToken = "eos") -> Any:
    """The small files of an export, and the tokeniser that `transformers` makes of them."""
    trained_on = TrainedOn(first_token, tokenizer_sha256=tokenizer.sha256)
    for name, text in small_files(RAGGED, format="bf16", tokenizer=tokenizer, trained_on=trained_on).items():
        (folder / name).write_text(text, encoding="utf-8")
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("first_token", ["bos", "eos"])
def test_texts_and_chats_begin_with_the_runs_own_first_token(
    ours: TextTokenizer, first_token: FirstToken, tmp_path: Path
) -> None:
    theirs = written(ours, tmp_path, first_token)
    first_id = getattr(ours.special_ids, first_token)
    assert theirs(TEXTS)["input_ids"] == [[first_id, *ids] for ids in ours.encode_batch(TEXTS)]
    settings = GenerationConfig.from_pretrained(tmp_path)
    assert (settings.bos_token_id, theirs.bos_token_id) == (first_id, first_id)
    assert (settings.eos_token_id, settings.pad_token_id) == (ours.special_ids.eos, ours.special_ids.pad)
    assert (settings.do_sample, settings.temperature, settings.top_p) == (True, 0.6, 0.95)
    has_marks = CHAT_MARKS["user"] in ours.core.get_vocab()
    assert (tmp_path / "chat_template.jinja").exists() == has_marks
    if has_marks:
        ids = theirs.apply_chat_template([{"role": "user", "content": "a"}], add_generation_prompt=True)["input_ids"]
        marks = [ours.core.token_to_id(CHAT_MARKS[name]) for name in ("user", "assistant", "end_of_think")]
        assert ids == [first_id, marks[0], *ours.encode_batch(["a"])[0], *marks[1:]]
        assert theirs.chat_template == chat_template()
        # A server leaves special tokens out of an answer; thoughts must stay apart from it.
        assert theirs.decode(ids, skip_special_tokens=True) == "<｜User｜>a<｜Assistant｜></think>"


def test_the_tokeniser_of_an_export_is_read_as_it_was_trained(ours: TextTokenizer, tmp_path: Path) -> None:
    written(ours, tmp_path)
    again = load_tokenizer(tmp_path / "tokenizer.json")
    assert (tmp_path / "tokenizer.json").read_text(encoding="utf-8") != ours.json_text
    assert again.json_text == ours.json_text


def test_a_tokeniser_that_adds_a_token_itself_is_not_given_a_second() -> None:
    ours = train_byte_level_bpe(TEXTS, vocab_size=300)
    first_id, spelling = ours.special_ids.bos, SPECIAL_TOKENS["bos"]
    core = tokenizers.Tokenizer.from_str(ours.json_text)
    core.post_processor = tokenizers.processors.TemplateProcessing(f"{spelling} $A", None, [(spelling, first_id)])
    foreign = tokenizer_from_json(core.to_str(), origin="here")
    assert foreign.file_beginning_with(first_id) == foreign.json_text


# Answer after a prompt without thinking, and with: text -> what a server should tell a client.
ANSWERS: dict[str, tuple[bool, str, dict[str, Any]]] = {
    "plain": (False, f" Yes.\n{EOS}", {"content": " Yes.\n"}),
    "thinking": (True, f"well</think>\nYes{EOS}", {"reasoning_content": "well", "content": "\nYes"}),
    "thinking, cut off": (True, "well", {"reasoning_content": "well"}),
    "a stray mark": (False, "a</think>b", {"content": "ab"}),
    "two calls": (
        True,
        (
            'hm</think>Look:<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜>'
            f"<｜tool▁call▁begin｜>g<｜tool▁sep｜>not JSON<｜tool▁call▁end｜><｜tool▁calls▁end｜>{EOS}"
        ),
        {
            "reasoning_content": "hm",
            "content": "Look:",
            "tool_calls": [
                {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}},
                {"type": "function", "function": {"name": "g", "arguments": "not JSON"}},
            ],
        },
    ),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_transformers_takes_an_answer_apart(name: str, tmp_path: Path) -> None:
    thinking, text, expected = ANSWERS[name]
    theirs = written(train_byte_level_bpe(TEXTS * 3, vocab_size=300, chat_marks=True), tmp_path)
    prompt = theirs.apply_chat_template(
        [{"role": "user", "content": "<think>?"}], tokenize=False, add_generation_prompt=True, thinking=thinking
    )
    assert theirs.parse_response(text, prefix=prompt) == {"role": "assistant", **expected}


def test_an_export_without_marks_says_that_chats_will_not_work(tmp_path: Path) -> None:
    source = saved(lively(replace(RAGGED, vocab_size=310), FP8), tmp_path)
    for marks, note in (
        (False, "without a chat template: the tokeniser has no token for <think> and 10 more"),
        (True, ""),
    ):
        tokenizer = tmp_path / f"{marks}.json"
        train_byte_level_bpe(TEXTS * 3, vocab_size=300, chat_marks=marks).save(tokenizer)
        done = export(source, tmp_path / f"out_{marks}", ExportOptions(tokenizer=tokenizer))
        assert any(said.startswith(note) for said in done.notes if note) or not note
        assert any("chat" in said for said in done.notes) == bool(note)
        assert (tmp_path / f"out_{marks}/chat_template.jinja").exists() == marks
