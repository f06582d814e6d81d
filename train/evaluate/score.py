"""Held-out bits per byte: the cost of a text under a model, whatever its tokeniser.

    bits per byte = sum of -ln p(token) over every held-out token / ln 2 / UTF-8 bytes of the held-out text
    perplexity    = exp(the same sum / tokens)

(bits per byte as arXiv:2412.19437 Tab. 3 on Pile-test). The end of each document is a token like any other: it costs
bits and adds no bytes. The first token is predicted from one end-of-sentence token, later ones from what precedes
them in the same sample. The model is injected as a function of a batch, so n-gram baselines are scored on the same
tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from train.data.batch import Batch
from train.data.conversations import iterate_conversations
from train.data.store import TokenStore
from train.data.stream import iterate_windows

# Batch -> sum of -ln p over its targets, nats, and how many targets that were.
LossOfBatch = Callable[[Batch], tuple[float, int]]


@dataclass(frozen=True)
class StoreScore:
    """The loss of one store, or of several together: sum in nats, tokens with document ends, UTF-8 bytes of text."""

    nats: float
    tokens: int
    text_bytes: int

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text."""
        return self.nats / math.log(2) / self.text_bytes

    @property
    def perplexity(self) -> float:
        """exp of the mean loss per token; infinite where that overflows."""
        mean = self.nats / self.tokens
        return math.inf if mean > 700 else math.exp(mean)

    def to_json(self) -> dict[str, float]:
        """Both figures and what they were made from."""
        return {"bits_per_byte": self.bits_per_byte, "perplexity": self.perplexity, **vars(self)}


def total_score(scores: Iterable[StoreScore]) -> StoreScore:
    """Several domains as one text: perplexity weighs a domain by its tokens, bits per byte by its bytes."""
    stores = list(scores)
    return StoreScore(*(sum(getattr(store, name) for store in stores) for name in ("nats", "tokens", "text_bytes")))


def score_store(
    loss_of_batch: LossOfBatch,
    store: TokenStore,
    *,
    sequence_length: int,
    batch_sequences: int,
    mask_documents: bool = False,
) -> StoreScore:
    """Score a model on a whole store, in batches of `batch_sequences` samples with or without document ids.

    Of conversations, which are always kept apart, on what the assistant says; a ValueError where one is too long.
    """
    nats, targets, chat = 0.0, 0, store.manifest.chat
    batches = (
        iterate_windows(
            store, sequence_length=sequence_length, batch_sequences=batch_sequences, mask_documents=mask_documents
        )
        if chat is None
        else iterate_conversations(store, sequence_length=sequence_length, batch_sequences=batch_sequences)
    )
    for batch in batches:
        batch_nats, batch_targets = loss_of_batch(batch)
        nats += batch_nats
        targets += batch_targets
    expected = store.manifest.tokens if chat is None else chat.targets
    assert targets == expected, (targets, expected)
    return StoreScore(nats, targets, store.manifest.text_bytes)
