"""Document order, fill-in-the-middle and packing of one epoch (arXiv:2412.19437 §4.1).

An epoch is every document of a store once, in a shuffled order, end to end. A share of the documents is first
rearranged: the model learns to fill a hole from both sides (prefix, suffix, middle):

    <fim_begin> prefix <fim_hole> suffix <fim_end> middle <eos>

Everything random is a pure function of (seed, epoch, document).

Shapes: documents = rows of the store, tokens = offsets in the packed epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from train.data.store import SpecialIds, TokenStore

# Philox counter words, from the top: purpose, epoch, document, running number.
DOCUMENT_ORDER, WINDOW_ORDER, FIM_CHOICE, FIM_CUTS = range(4)

FIM_TOKENS = 3


def random_words(count: int, *, seed: int, purpose: int, epoch: int, document: int = 0) -> NDArray[np.uint64]:
    """[count] uint64: the random words at an address; equal addresses give equal words for ever."""
    # Raw words of a counter-based generator: numpy promises never to change them, unlike its distributions.
    return np.random.Philox(key=seed, counter=[0, document, epoch, purpose]).random_raw(count)


def permutation(count: int, *, seed: int, purpose: int, epoch: int) -> NDArray[np.int64]:
    """[count] int64: the numbers below `count` in an order fixed by (seed, purpose, epoch)."""
    return np.argsort(random_words(count, seed=seed, purpose=purpose, epoch=epoch), kind="stable")


def fim_choice(num_documents: int, *, seed: int, epoch: int, rate: float) -> NDArray[np.bool_]:
    """[documents] bool: the documents rearranged in this epoch, each with probability `rate` on its own."""
    words = random_words(num_documents, seed=seed, purpose=FIM_CHOICE, epoch=epoch)
    # The top 53 bits make a float64 in [0, 1), so rate 0 chooses none and rate 1 all.
    return (words >> np.uint64(11)) * 2.0**-53 < rate


def fim_cuts(text_tokens: int, *, seed: int, epoch: int, document: int) -> tuple[int, int]:
    """Where the middle of a document begins and ends: two uniform draws, sorted, of its tokens without the last."""
    words = random_words(2, seed=seed, purpose=FIM_CUTS, epoch=epoch, document=document)
    first, second = (int(word % np.uint64(text_tokens + 1)) for word in words)
    return min(first, second), max(first, second)


def fim_document(tokens: NDArray[np.int64], special: SpecialIds, *, cuts: tuple[int, int]) -> NDArray[np.int64]:
    """Rearrange one document [tokens], the last one end-of-sentence, as prefix, suffix, middle: [tokens + 3].

    Source: arXiv:2412.19437 §4.1 (PSM), after DeepSeek-Coder-V2.
    """
    begin, end = cuts
    text, eos = tokens[:-1], tokens[-1:]
    prefix, middle, suffix = text[:begin], text[begin:end], text[end:]
    marks = np.array([[special.fim_begin], [special.fim_hole], [special.fim_end]], dtype=np.int64)
    return np.concatenate([marks[0], prefix, marks[1], suffix, marks[2], middle, eos])


@dataclass(frozen=True)
class Packing:
    """The offset of every document of one epoch; arrays are [documents], in packed order."""

    seed: int
    epoch: int
    documents: NDArray[np.int64]  # store index
    is_fim: NDArray[np.bool_]
    ends: NDArray[np.int64]  # first offset after the document

    @property
    def num_tokens(self) -> int:
        """Of the epoch."""
        return int(self.ends[-1])


def pack_in_order(store: TokenStore) -> Packing:
    """The documents in store order, none rearranged: what evaluation reads."""
    count = store.manifest.documents
    return Packing(0, 0, np.arange(count), np.zeros(count, dtype=np.bool_), store.starts[1:])


def pack_epoch(store: TokenStore, *, seed: int, epoch: int, fim_rate: float) -> Packing:
    """The documents of one training epoch, shuffled, some rearranged."""
    count = store.manifest.documents
    order = permutation(count, seed=seed, purpose=DOCUMENT_ORDER, epoch=epoch)
    is_fim = fim_choice(count, seed=seed, epoch=epoch, rate=fim_rate)[order]
    return Packing(seed, epoch, order, is_fim, np.cumsum(store.lengths[order] + FIM_TOKENS * is_fim))


def epoch_tokens(store: TokenStore, *, seed: int, epoch: int, fim_rate: float) -> int:
    """Tokens of an epoch, without packing it."""
    is_fim = fim_choice(store.manifest.documents, seed=seed, epoch=epoch, rate=fim_rate)
    return store.manifest.tokens + FIM_TOKENS * int(is_fim.sum())


def packed_document(store: TokenStore, packing: Packing, ordinal: int) -> NDArray[np.int64]:
    """[tokens] int64: the `ordinal`-th document of the packing, rearranged if it was chosen."""
    index = int(packing.documents[ordinal])
    tokens = store.document(index).astype(np.int64)
    if not packing.is_fim[ordinal]:
        return tokens
    cuts = fim_cuts(len(tokens) - 1, seed=packing.seed, epoch=packing.epoch, document=index)
    return fim_document(tokens, store.manifest.special_ids, cuts=cuts)


def read_packed(
    store: TokenStore, packing: Packing, start: int, *, tokens: NDArray[np.int64], documents: NDArray[np.int64]
) -> int:
    """Fill `tokens` with ids from offset `start` of a packed epoch, and `documents` with the ordinals of theirs.

    Returns:
        Tokens filled: fewer than asked for where the epoch ends.
    """
    filled = 0
    ordinal = int(np.searchsorted(packing.ends, start, side="right"))
    while filled < len(tokens) and ordinal < len(packing.ends):
        before = int(packing.ends[ordinal - 1]) if ordinal else 0
        skip = start + filled - before
        wanted = slice(skip, skip + len(tokens) - filled)
        if packing.is_fim[ordinal]:
            chunk: NDArray[np.integer[Any]] = packed_document(store, packing, ordinal)[wanted]
        else:
            # Of a long document no more than is wanted.
            chunk = store.document(int(packing.documents[ordinal]), wanted.start, wanted.stop)
        tokens[filled : filled + len(chunk)] = chunk
        documents[filled : filled + len(chunk)] = ordinal
        filled += len(chunk)
        ordinal += 1
    return filled
