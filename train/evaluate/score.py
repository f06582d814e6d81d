"""Held-out bits per byte: what a model pays to write down the text, whatever its tokeniser.

    bits per byte = sum of -ln p(token) over every held-out token / ln 2 / UTF-8 bytes of the held-out text

(as arXiv:2412.19437 Tab. 3 on Pile-test). The end of each document is a token like any other: it costs bits
and adds no bytes. The first token is predicted from one end-of-sentence token, later ones from what precedes
them in the same sample. n-gram baselines go through this same function, so they are scored on the
same tokens by construction.

The model is injected as a function of a batch; this file imports no model.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from train.data.batch import Batch
from train.data.store import TokenStore
from train.data.stream import iterate_windows

LossOfBatch = Callable[[Batch], tuple[float, int]]


def bits_per_byte(
    loss_of_batch: LossOfBatch,
    store: TokenStore,
    *,
    sequence_length: int,
    batch_sequences: int,
    mask_documents: bool = False,
) -> float:
    """Score a model on a whole store.

    Args:
        loss_of_batch: gives the sum of -ln p over the batch's targets, nats, and how many targets it scored.
        store: the held-out store.
        sequence_length: tokens of one sample.
        batch_sequences: samples of one batch.
        mask_documents: whether batches carry document ids, as in training.
    Returns:
        Bits per byte of held-out text.
    """
    nats, targets = 0.0, 0
    batches = iterate_windows(
        store,
        sequence_length=sequence_length,
        batch_sequences=batch_sequences,
        mask_documents=mask_documents,
    )
    for batch in batches:
        batch_nats, batch_targets = loss_of_batch(batch)
        nats += batch_nats
        targets += batch_targets
    assert targets == store.manifest.tokens, (targets, store.manifest.tokens)
    return nats / math.log(2) / store.manifest.text_bytes
