"""A model that knows what it is told: a table from everything before a token to that token.

`PlantedModel` is a `LogitsOf`; what it has not been told it takes for equally likely. Its forward passes are counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from train.data.tokenizer import TextTokenizer, train_byte_level_bpe
from train.evaluate.likelihood import Scorer
from train.evaluate.respondent import Generate, Respondent


def small_tokenizer() -> TextTokenizer:
    """Bytes and special tokens: 262 ids and no merges, so that a text's tokens are its bytes."""
    return train_byte_level_bpe(["abc"], vocab_size=262)


class PlantedModel:
    """p(token | everything before) = 1/2 + 1/2 / vocab where it was told, else uniform."""

    def __init__(self, vocab_size: int = 262) -> None:
        self.vocab_size = vocab_size
        self.known: dict[tuple[int, ...], int] = {}
        self.passes: list[tuple[int, int]] = []
        # Rows of logits that were asked for at a time.
        self.blocks: list[int] = []

    def tell(self, before: Sequence[int], after: Sequence[int]) -> None:
        for i, token in enumerate(after):
            self.known[(*before, *after[:i])] = token

    def __call__(self, input_ids: Tensor) -> Callable[[Tensor], Tensor]:
        self.passes.append(tuple(input_ids.shape))
        return lambda places: self._logits(input_ids, places)

    def _logits(self, input_ids: Tensor, places: Tensor) -> Tensor:
        self.blocks.append(len(places))
        logits = torch.zeros(len(places), self.vocab_size)
        for row, place in zip(logits, places.tolist(), strict=True):
            sequence, last = divmod(place, input_ids.shape[1])
            token = self.known.get(tuple(input_ids[sequence, : last + 1].tolist()))
            if token is not None:
                # e^x / (e^x + V - 1) = 1/2 + 1/(2V)
                row[token] = math.log(self.vocab_size + 1)
        return logits

    def scorer(self, *, max_tokens: int = 4096, batch_tokens: int = 4096) -> Scorer:
        return Scorer(self, self.vocab_size, max_tokens, batch_tokens)


def writes_nothing(prompts: list[list[int]], *, max_new_tokens: int, temperature: float, seed: int) -> list[list[int]]:
    """A `Generate` for who is only asked for likelihoods."""
    raise AssertionError("nobody asks for text here")


def respondent(
    planted: PlantedModel, *, start: int, generate: Generate = writes_nothing, max_tokens: int = 4096
) -> Respondent:
    """A planted model with the small tokeniser."""
    return Respondent(planted.scorer(max_tokens=max_tokens), generate, small_tokenizer(), start, "runs/x")
