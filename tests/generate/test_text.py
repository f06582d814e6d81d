"""Text: whole characters only, several prompts in order, and prompts that begin as documents do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.tiny_model import TINY, frozen
from train.data.tokenizer import TextTokenizer, train_byte_level_bpe
from train.generate import text
from train.generate.latent_cache import Decoder
from train.generate.sampling import Sampling
from train.generate.speculative import Completion, GenerationRequest, generate
from train.generate.text import GenerationSettings, TextStream, continue_texts, prompt_ids

EOS = 1  # of every tokeniser trained here
TEXT = "naïve café 日本語 👩‍🚀 \ufffd end"


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    """Bytes and a few merges of plain words, so that other characters take several tokens."""
    return train_byte_level_bpe(["the end of the cafe", "the naive end"], vocab_size=280)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder(frozen(replace(TINY, vocab_size=280)))


def continued(
    decoder: Decoder, tokenizer: TextTokenizer, texts: list[str], settings: GenerationSettings
) -> tuple[list[str], str]:
    """What is written, as it comes, and the line at the end."""
    written: list[str] = []
    line = continue_texts(decoder, tokenizer, texts, settings, written.append, first_id=EOS)
    return written, line


@pytest.mark.parametrize("tokens", [1, 2, 3, 5])
def test_a_stream_gives_the_text_and_never_half_a_character(tokenizer: TextTokenizer, tokens: int) -> None:
    (ids,) = tokenizer.encode_batch([TEXT])
    stream, given = TextStream(tokenizer), ""
    assert len(ids) > len(TEXT), "characters of several tokens are what is tested"
    for first in range(0, len(ids), tokens):
        given += stream.add(ids[first : first + tokens])
        assert TEXT.startswith(given)
    assert given + stream.end() == TEXT


def test_bytes_of_no_character_are_shown_as_the_replacement_character_once_settled(tokenizer: TextTokenizer) -> None:
    (japanese,), (plain,) = tokenizer.encode_batch(["日"]), tokenizer.encode_batch(["z"])
    assert len(japanese) == 3
    stream = TextStream(tokenizer)
    assert stream.add(japanese[:2]) == ""
    assert stream.add(plain) == "\ufffdz"
    assert stream.add(japanese[:1]) == ""
    assert stream.end() == "\ufffd"
    assert stream.add(plain) == "z"


def test_a_prompt_begins_with_the_start_token_and_cannot_spell_one(tokenizer: TextTokenizer) -> None:
    eos = tokenizer.special_ids.eos
    for first_id in (eos, tokenizer.special_ids.bos):
        empty, spelled = prompt_ids(["", "<｜end▁of▁sentence｜>"], tokenizer, first_id=first_id)
        assert empty == [first_id]
        assert spelled[0] == first_id
    assert eos not in spelled[1:]


@pytest.mark.parametrize(("drafting", "batch_tokens"), [(False, 16384), (True, 16384), (True, 50), (False, 1)])
def test_several_prompts_are_written_in_order_each_as_alone(
    decoder: Decoder, tokenizer: TextTokenizer, drafting: bool, batch_tokens: int
) -> None:
    texts = ["the end", "", "cafe of the"]
    settings = GenerationSettings(15, seed=3, sampling=Sampling(1.0), drafting=drafting, batch_tokens=batch_tokens)
    written, line = continued(decoder, tokenizer, texts, settings)
    expected = ""
    for i, prompt in enumerate(texts):
        alone, _ = continued(decoder, tokenizer, [prompt], replace(settings, seed=3 + i))
        assert "".join(alone).startswith(prompt)
        expected += f"--- {i + 1} of 3 ---\n" + "".join(alone)
    assert "".join(written) == expected
    assert len(written) > 5, "the first prompt is written as it comes"
    assert line.startswith("45 tokens, ")
    assert ("drafts accepted" in line) == drafting


def test_text_stops_before_an_end_of_sentence_and_at_the_models_positions(
    decoder: Decoder, tokenizer: TextTokenizer
) -> None:
    _, line = continued(decoder, tokenizer, ["the end"], GenerationSettings(max_tokens=500))
    assert "1 stopped at the model's 64 positions (max_position_embeddings)" in line
    # The same model, where the fifth of its tokens means the end.
    (prompt,) = prompt_ids(["the end"], tokenizer, first_id=EOS)
    request = GenerationRequest(tuple(prompt), 9)
    (done,) = generate(decoder, [request], sampling=Sampling(), eos=None, drafting=False, batch_tokens=64)
    assert done.ids[4] not in (*prompt, *done.ids[:4])
    ending = replace(tokenizer, special_ids=replace(tokenizer.special_ids, eos=done.ids[4]))
    shorter, _ = continued(decoder, ending, ["the end"], GenerationSettings(9, drafting=False))
    assert "".join(shorter) == "the end" + tokenizer.decode(done.ids[:4]) + "\n"


def test_rates_are_accepted_by_drafted_and_tokens_by_pass() -> None:
    done = [Completion(tuple(range(11)), "max_tokens", 8, 5, 5), Completion((1, 2), "eos", 2, 0, 1)]
    assert text.acceptance(done) == 0.5
    assert text.tokens_a_pass(done) == 11 / 6


def test_measure_reports_both_ways_and_that_greedy_tokens_are_the_same(decoder: Decoder) -> None:
    lines = text.measure(decoder, [(1, 5, 9), (1,)], GenerationSettings(max_tokens=8), rounds=1).splitlines()
    assert lines[0].startswith("2 prompts, 8 new tokens each")
    assert lines[-1] == "the same tokens with and without: 2 of 2 prompts"


def test_prompts_come_from_the_command_line_then_from_the_lines_of_a_file(tmp_path: Path) -> None:
    assert text.read_prompts([], None) == [""]
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\ntwo ü\n", encoding="utf-8")
    assert text.read_prompts(["zero"], file) == ["zero", "one", "", "two ü"]
    # What ends a line of text elsewhere is part of a prompt here, and a byte order mark is of none.
    file.write_bytes("\ufeffa\u2028b\x0c\x85c\r\n\rd\n".encode())
    assert text.read_prompts([], file) == ["a\u2028b\x0c\x85c", "\rd"]
    # Bytes of the command line that are no UTF-8.
    with pytest.raises(ValueError, match=r"--prompt 'a.udcff' is not UTF-8 text"):
        text.read_prompts(["a\udcff"], None)
    for content, message in [(b"", "prompts.txt is empty"), (b"caf\xe9", "prompts.txt cannot be read")]:
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            text.read_prompts([], file)
    with pytest.raises(ValueError, match="gone cannot be read"):
        text.read_prompts([], tmp_path / "gone")


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="device: cuda is not available"):
        text.device_of("cuda")
    assert text.device_of("auto") == text.device_of("cpu")
