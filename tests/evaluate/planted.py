"""A model that knows a table: from everything before a token to that token.

`PlantedModel` is a `LogitsOf`; contexts outside its table give a uniform distribution. It counts its forward passes.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from train.data.tokenizer import TextTokenizer, train_byte_level_bpe
from train.evaluate.language_model import LanguageModel
from train.evaluate.likelihood import Scorer

# Bytes and special tokens.
VOCAB = 262
# log p of a token in the table and, where the table has nothing, of any token; FP32 logits.
KNOWN, UNKNOWN = math.log(0.5 + 0.5 / VOCAB), -math.log(VOCAB)
Generate = Callable[..., list[list[int]]]


@functools.cache
def small_tokenizer() -> TextTokenizer:
    """Without merges: a text's tokens are its bytes."""
    return train_byte_level_bpe(["abc"], vocab_size=VOCAB)


def write_lines(path: Path, *lines: object) -> Path:
    """A JSONL file; texts are written as they are."""
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


class PlantedModel:
    """p(token | everything before) = 1/2 + 1/2 / vocab where the table has it, else uniform."""

    def __init__(self) -> None:
        self.known: dict[tuple[int, ...], int] = {}
        self.passes: list[tuple[int, int]] = []
        # Rows of logits that were asked for at a time.
        self.blocks: list[int] = []

    def plant(self, before: Sequence[int], after: Sequence[int]) -> None:
        self.known |= {(*before, *after[:i]): token for i, token in enumerate(after)}

    def __call__(self, input_ids: Tensor) -> Callable[[Tensor], Tensor]:
        self.passes.append(tuple(input_ids.shape))

        def logits(positions: Tensor) -> Tensor:
            self.blocks.append(len(positions))
            logits = torch.zeros(len(positions), VOCAB)
            for row, position in zip(logits, positions.tolist(), strict=True):
                sequence, last = divmod(position, input_ids.shape[1])
                token = self.known.get(tuple(input_ids[sequence, : last + 1].tolist()))
                if token is not None:
                    # e^x / (e^x + V - 1) = 1/2 + 1/(2V)
                    row[token] = math.log(VOCAB + 1)
            return logits

        return logits

    def scorer(self, *, max_tokens: int = 4096) -> Scorer:
        return Scorer(self, VOCAB, max_tokens)


class PlantedLanguageModel(LanguageModel):
    """The small tokeniser, a planted scorer, and text from a function."""

    def __init__(
        self, planted: PlantedModel, *, first_id: int, generate: Generate | None = None, max_tokens: int = 4096
    ) -> None:
        self.scorer, self.generate = planted.scorer(max_tokens=max_tokens), generate
        self.tokenizer, self.first_id = small_tokenizer(), first_id
        self.name, self.max_tokens = "runs/x", max_tokens
