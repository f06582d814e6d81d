"""What answers questions: a model as token ids in, likelihoods and continuations out, with its tokeniser.

Every sequence begins with the token that samples of the model's training began with. A prompt too long for the model
loses its beginning but for that token, and how many tokens that cost is told to whoever asks.

The model is injected (`subject.py` makes a `Respondent` of a real one). Not here: prompts and scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from train.data.tokenizer import TextTokenizer
from train.evaluate.likelihood import Scorer


class Generate(Protocol):
    """Continues prompts."""

    def __call__(
        self, prompts: list[list[int]], *, max_new_tokens: int, temperature: float, seed: int
    ) -> list[list[int]]:
        """New ids after each prompt, without it, ended by the end-of-sentence token or by `max_new_tokens`.

        Args:
            prompts: token ids, one or more each.
            max_new_tokens: at most so many.
            temperature: 0 for the most likely token.
            seed: the same seed and prompts give the same ids; equal prompts in one call get samples of their own.
        """
        ...


@dataclass(frozen=True)
class Respondent:
    """A model under test.

    Args:
        scorer: gives log-likelihoods; knows the longest input.
        generate: continues prompts.
        tokenizer: of the model.
        start: id that begins every sequence of the model.
        name: of the model.
    """

    scorer: Scorer
    generate: Generate
    tokenizer: TextTokenizer
    start: int
    name: str

    def prompt(self, ids: Sequence[int], *, max_new_tokens: int) -> tuple[list[int], int]:
        """Start token and as much of a prompt's end as leaves room for what is to be written.

        Args:
            ids: of the prompt, without the start token.
            max_new_tokens: to be written after it.
        Returns:
            Token ids, and how many of `ids` were cut off.
        Raises:
            ValueError: no token of a prompt would be left.
        """
        room = self.scorer.max_tokens - max_new_tokens - 1
        if room < 1:
            raise ValueError(
                f"{max_new_tokens} new tokens leave no room for a prompt in {self.scorer.max_tokens}; raise "
                "--max-length, if the model has positions for it, or ask for fewer new tokens"
            )
        kept = ids[max(0, len(ids) - room) :]
        return [self.start, *kept], len(ids) - len(kept)

    def text(self, ids: Sequence[int]) -> str:
        """What was written, up to the first end-of-sentence token."""
        end = self.tokenizer.special_ids.eos
        return self.tokenizer.decode(ids[: ids.index(end)] if end in ids else ids)
