"""The endless stream of training samples: a pure function of (seed, position).

Epochs (packing.py) follow each other without a gap, and the whole is cut into samples of `sequence_length` targets:

    sample w  predicts  stream[w * sequence_length : (w + 1) * sequence_length]   from the token before each

Every token is a target exactly once an epoch, the first of all included: the stream begins as if a document had just
ended, with one end-of-sentence token as context. Neighbouring samples often come from one long document; the samples
of an epoch are therefore visited in a shuffled order. The sample at any position is found without reading the ones
before it: a run resumes with one number, the position, on any number of ranks.

Shapes: sequences = samples of a batch, tokens = sequence_length. In memory: 25 bytes a document, 8 a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from train.data.batch import Batch, DamagedWindow, batch_from_windows
from train.data.blocks import DamagedData
from train.data.config import DataConfig
from train.data.packing import WINDOW_ORDER, Packing, epoch_tokens, pack_epoch, pack_in_order, permutation, read_packed
from train.data.store import TokenStore, check_same_tokenizer
from train.data.windows import Windows, position_of

# A window can end in the next epoch, so two are in use at an epoch's end.
EPOCHS_KEPT = 2

Value = TypeVar("Value")


@dataclass
class TokenStream:
    """Training samples of one store in the order of one seed; a ValueError refuses a store shorter than one sample."""

    store: TokenStore
    config: DataConfig
    seed: int
    dropped: Windows = ()  # positions that are left out; those after them move up
    # Caches only. First position of each epoch known so far in the endless stream; grows on demand.
    _epoch_starts: list[int] = field(default_factory=lambda: [0], repr=False)
    _packings: dict[int, Packing] = field(default_factory=dict, repr=False)
    _orders: dict[int, NDArray[np.int64]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.store.manifest.tokens < self.config.sequence_length:
            raise ValueError(
                f"data.store: {self.store.path} holds {self.store.manifest.tokens} tokens, fewer than one sample of "
                f"data.sequence_length {self.config.sequence_length}; use a shorter sequence or more text"
            )

    def take(self, position: int, count: int) -> Batch:
        """The samples at `position`, `position + 1`, ... of the visiting order without the dropped windows.

        They are the same whatever was taken before. A batch with damaged ones is not to be trained on.
        """
        assert min(position, count) >= 0, (position, count)
        windows = np.empty((count, self.config.sequence_length + 1), dtype=np.int64)
        documents, damaged = np.empty_like(windows), []
        for row in range(count):
            at = position_of(position + row, self.dropped)
            try:
                self._read_window(self._window_at(at), windows[row], documents[row])
            except DamagedData as error:
                damaged.append(DamagedWindow(at, error.file, error.block, str(error)))
                # Any ids; one id repeated would send all its tokens to the same experts.
                windows[row] = np.arange(windows.shape[1]) % (self.store.manifest.max_token_id + 1)
                documents[row] = 0
        batch = batch_from_windows(windows, documents, mask_documents=self.config.mask_documents)
        return replace(batch, damaged=tuple(damaged))

    def epoch_of(self, position: int) -> int:
        """The epoch in which the sample at `position` begins."""
        return self._epoch_at(position * self.config.sequence_length)

    def _epoch_at(self, offset: int) -> int:
        """The epoch of the token at `offset` in the endless stream."""
        while self._epoch_starts[-1] <= offset:
            epoch = len(self._epoch_starts) - 1
            tokens = epoch_tokens(self.store, seed=self.seed, epoch=epoch, fim_rate=self.config.fim_rate)
            self._epoch_starts.append(self._epoch_starts[-1] + tokens)
        return int(np.searchsorted(self._epoch_starts, offset, side="right")) - 1

    def _window_at(self, position: int) -> int:
        """The sample (numbered along the stream) that is visited at `position`: shuffled within the epoch."""
        epoch, length = self.epoch_of(position), self.config.sequence_length
        # Samples of an epoch are those whose first target is in it: ceil(start / length) <= w < ceil(end / length).
        first = -(-self._epoch_starts[epoch] // length)
        after = -(-self._epoch_starts[epoch + 1] // length)
        order = partial(permutation, after - first, seed=self.seed, purpose=WINDOW_ORDER, epoch=epoch)
        return first + int(cached(self._orders, epoch, order)[position - first])

    def _read_window(self, window: int, tokens: NDArray[np.int64], documents: NDArray[np.int64]) -> None:
        """Fill one row with a sample's context token and its targets."""
        offset, filled = window * self.config.sequence_length - 1, 0
        if offset < 0:
            tokens[0], documents[0], filled = self.store.manifest.special_ids.eos, -1, 1
        while filled < len(tokens):
            epoch = self._epoch_at(offset + filled)
            start = offset + filled - self._epoch_starts[epoch]
            pack = partial(pack_epoch, self.store, seed=self.seed, epoch=epoch, fim_rate=self.config.fim_rate)
            packing = cached(self._packings, epoch, pack)
            count = read_packed(self.store, packing, start, tokens=tokens[filled:], documents=documents[filled:])
            documents[filled : filled + count] += epoch * self.store.manifest.documents
            filled += count


def cached(cache: dict[int, Value], epoch: int, make: Callable[[], Value]) -> Value:
    """The value of an epoch; those of the few epochs used last are kept."""
    if epoch not in cache:
        value = make()
        while len(cache) >= EPOCHS_KEPT:
            del cache[next(iter(cache))]
        cache[epoch] = value
    return cache[epoch]


def iterate_windows(
    store: TokenStore, *, sequence_length: int, batch_sequences: int, mask_documents: bool = False
) -> Iterator[Batch]:
    """A store from its first token to its last, in order: every token is a target exactly once.

    The first token is predicted from an end-of-sentence token, the last sample is filled up with positions without a
    target, and the last batch may hold fewer than `batch_sequences` samples.
    """
    packing = pack_in_order(store)
    samples = -(-packing.num_tokens // sequence_length)
    for first in range(0, samples, batch_sequences):
        rows = min(batch_sequences, samples - first)
        windows = np.full((rows, sequence_length + 1), -1, dtype=np.int64)
        # Positions after the end count as one more document: nothing real is attended to from there.
        documents = np.full_like(windows, len(packing.ends))
        for row in range(rows):
            offset = (first + row) * sequence_length - 1
            skip = 1 if offset < 0 else 0
            if skip:
                windows[row, 0], documents[row, 0] = store.manifest.special_ids.eos, -1
            read_packed(store, packing, offset + skip, tokens=windows[row, skip:], documents=documents[row, skip:])
        yield batch_from_windows(windows, documents, mask_documents=mask_documents)


class SampleStream(Protocol):
    """An endless order of training samples: windows of text, or conversations (`train/data/conversations.py`)."""

    dropped: Windows

    @property
    def store(self) -> TokenStore:
        """Where the samples come from."""

    def take(self, position: int, count: int) -> Batch:
        """The samples at `position`, `position + 1`, ..., whatever was taken before."""


# The training stream and the held-out store.
Stores = tuple[SampleStream, TokenStore | None]


def check_seed(seed: int) -> None:
    """Raise a ValueError for a seed that is out of range."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed: {seed} is out of range; choose one between 0 and 2**64 - 1")


def open_stores(config: DataConfig, *, vocab_size: int, seed: int) -> Stores:
    """The training stream and the held-out store, checked against the model's vocabulary and each other.

    Raises:
        ValueError: missing, damaged, too short, of conversations, or made with another tokeniser or too large a
            vocabulary.
    """
    store, heldout = open_pair(config, vocab_size=vocab_size)
    for name, each in (("store", store), ("heldout", heldout)):
        if each is not None and each.manifest.chat is not None:
            raise ValueError(
                f"data.{name}: {each.path} holds conversations, and data.samples=windows would cut them and learn the "
                "user's turns too; train on it with +stage=sft"
            )
    return TokenStream(store, config, seed), heldout


def open_pair(config: DataConfig, *, vocab_size: int) -> tuple[TokenStore, TokenStore | None]:
    """The training and the held-out store; ValueError as `open_stores`."""
    store = TokenStore.open(Path(config.store))
    store.check(vocab_size=vocab_size)
    if config.heldout is None:
        return store, None
    heldout = TokenStore.open(Path(config.heldout))
    heldout.check(vocab_size=vocab_size)
    check_same_tokenizer(store, heldout)
    return store, heldout
