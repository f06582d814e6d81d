"""Text: whole characters only, several prompts in order, and prompts that begin as documents do."""

from __future__ import annotations

import io
import itertools
import random
from dataclasses import replace
from pathlib import Path

import pytest

from tests.tiny_model import TINY, frozen
from train.data.tokenizer import TextTokenizer, train_byte_level_bpe
from train.generate import text
from train.generate.latent_cache import Decoder
from train.generate.sampling import Sampling
from train.generate.speculative import Completion, GenerationRequest, generate
from train.generate.text import GenerationSettings, StopFilter, TextStream, continue_texts, prompt_ids

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


def earliest_end(text: str, stops: tuple[str, ...]) -> str:
    """The text before the stop that is complete first, letter by letter; of two the longer."""
    for end in range(len(text) + 1):
        found = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: min(found)]
    return text


def test_a_text_is_cut_before_its_first_stop_however_it_comes_in_pieces() -> None:
    chooser, cut = random.Random(0), 0
    for _ in range(500):
        text = "".join(chooser.choices("ab", k=12))
        stops = tuple("".join(chooser.choices("ab", k=chooser.randint(1, 6))) for _ in range(chooser.randint(1, 3)))
        filter_, given, whole = StopFilter(stops), "", earliest_end(text, stops)
        places = sorted(chooser.sample(range(13), 4))
        for first, last in itertools.pairwise((0, *places, 12)):
            given += filter_.add(text[first:last])
            assert whole.startswith(given), "what was given is never taken back"
        assert given + filter_.end() == whole
        assert filter_.stopped == (whole != text)
        cut += filter_.stopped
    assert 50 < cut < 450


@pytest.mark.parametrize("drafting", [False, True])
def test_a_stop_of_several_tokens_ends_each_text_alone_and_the_rest_of_a_batch_goes_on(
    decoder: Decoder, tokenizer: TextTokenizer, drafting: bool
) -> None:
    texts, settings = ["the end", "cafe of the"], GenerationSettings(30, drafting=drafting)
    whole = ["".join(continued(decoder, tokenizer, [text], settings)[0])[len(text) : -1] for text in texts]
    for first in range(3, 12, 2):
        stop = whole[0][first : first + 3]
        (ids,) = tokenizer.encode_batch([stop])
        assert len(ids) > 1, "it spans tokens"
        written, _ = continued(decoder, tokenizer, texts, replace(settings, stops=("no such text", stop)))
        expected = [earliest_end(text, (stop,)) for text in whole]
        heads = [f"--- {i} of 2 ---\n{text}" for i, text in enumerate(texts, 1)]
        assert "".join(written) == "".join(f"{a}{b}\n" for a, b in zip(heads, expected, strict=True))
        assert len(expected[0]) <= first < len(whole[0])


def test_an_empty_stop_is_refused() -> None:
    for stop, message in {"": "--stop is empty", "a\udcff": r"--stop 'a.udcff' is not UTF-8"}.items():
        with pytest.raises(ValueError, match=message):
            GenerationSettings(stops=("a", stop))


def test_drafts_are_made_on_a_cpu_only_if_asked_for(decoder: Decoder, tokenizer: TextTokenizer) -> None:
    _, line = continued(decoder, tokenizer, ["the end"], GenerationSettings(5))
    assert decoder.depths > 0
    assert "drafts" not in line


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


def test_prompts_come_from_a_pipe_where_nothing_else_is_given(tmp_path: Path) -> None:
    def pipe() -> io.BytesIO:
        return io.BytesIO("one\r\n\ntwo ü\n".encode())

    lines, dash = ["one", "", "two ü"], Path("-")
    assert text.read_prompts([], None, pipe()) == lines
    assert text.read_prompts(["zero"], dash, pipe()) == ["zero", *lines]
    assert text.read_prompts(["zero"], None, pipe()) == ["zero"]
    # `echo` after a command that ended its line.
    assert text.read_prompts([], None, io.BytesIO(b"a\n\n")) == ["a"]
    assert text.read_prompts([], None, io.BytesIO()) == [""]
    for file, stream, message in [(dash, io.BytesIO(), "- is empty|pipe is empty"), (dash, None, "there is none")]:
        with pytest.raises(ValueError, match=message):
            text.read_prompts([], file, stream)
    with pytest.raises(ValueError, match="the pipe cannot be read as UTF-8"):
        text.read_prompts([], None, io.BytesIO(b"caf\xe9"))


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="device: cuda is not available"):
        text.device_of("cuda")
    assert text.device_of("auto") == text.device_of("cpu")
