"""The endless stream of training samples: a pure function of (seed, position).

Epochs (packing.py) follow each other without a gap, and the whole is cut into samples of `sequence_length`
targets:

    sample w  predicts  stream[w * sequence_length : (w + 1) * sequence_length]   from the token before each

so every token is a target exactly once an epoch, the first one of all included: the stream begins as if a
document had just ended, with one end-of-sentence token as context. Neighbouring samples often come from the
same long document; the samples of an epoch are therefore visited in a shuffled order. The sample at any
position is found without reading the ones before it, so resuming a run needs one number, the position, on
any number of ranks.

Shapes: sequences = samples of a batch, tokens = sequence_length.

It holds no state beyond caches: no iterator to save. The index costs about 25 bytes a document and 8 a
sample in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from train.data.batch import Batch, batch_from_windows
from train.data.packing import (
    WINDOW_ORDER,
    Packing,
    epoch_tokens,
    pack_epoch,
    pack_in_order,
    permutation,
    read_packed,
)
from train.data.store import TokenStore, check_same_tokenizer

# A window can end in the next epoch, so two are in use at an epoch's end.
EPOCHS_KEPT = 2

Value = TypeVar("Value")


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from and how they become samples.

    Args:
        store: folder of the tokenised training store.
        heldout: folder of the held-out store, or None.
        sequence_length: targets of one sample, tokens.
        fim_rate: share of documents rearranged for fill-in-the-middle (arXiv:2412.19437 §4.1: 0.1).
        mask_documents: whether batches carry document ids that limit attention (V3 pre-training does not).
    """

    store: str
    heldout: str | None = None
    sequence_length: int = 4096
    fim_rate: float = 0.1
    mask_documents: bool = False

    def __post_init__(self) -> None:
        if self.sequence_length < 1:
            raise ValueError(f"data.sequence_length: {self.sequence_length} is not positive; set it to 1 or more")
        if not 0.0 <= self.fim_rate <= 1.0:
            raise ValueError(f"data.fim_rate: {self.fim_rate} is not a share; set it between 0 and 1")


def check_long_enough(store: TokenStore, *, sequence_length: int) -> None:
    """Refuse a store that cannot fill one sample.

    Raises:
        ValueError: the store holds fewer tokens than one sample predicts.
    """
    if store.manifest.tokens < sequence_length:
        raise ValueError(
            f"data.store: {store.path} holds {store.manifest.tokens} tokens, fewer than one sample of "
            f"data.sequence_length {sequence_length}; use a shorter sequence or more text"
        )


@dataclass
class TokenStream:
    """Training samples of one store in the order of one seed.

    Args:
        store: the training store.
        config: sequence length, fill-in-the-middle rate, document masking.
        seed: of the run, 0 <= seed < 2**64.
    Raises:
        ValueError: the store is shorter than one sample, or the seed is out of range.
    """

    store: TokenStore
    config: DataConfig
    seed: int
    # First place of each epoch known so far in the endless stream; grows on demand.
    _epoch_starts: list[int] = field(default_factory=lambda: [0], repr=False)
    _packings: dict[int, Packing] = field(default_factory=dict, repr=False)
    _orders: dict[int, NDArray[np.int64]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed: {self.seed} is out of range; choose one between 0 and 2**64 - 1")
        check_long_enough(self.store, sequence_length=self.config.sequence_length)

    def take(self, position: int, count: int) -> Batch:
        """The samples at `position`, `position + 1`, ... of the run.

        Args:
            position: index of the first sample since the start of the run, sequences.
            count: samples to take, sequences.
        Returns:
            A Batch of [count, sequence_length]; the same whatever was taken before.
        """
        assert min(position, count) >= 0, (position, count)
        places = self.config.sequence_length + 1
        windows = np.empty((count, places), dtype=np.int64)
        documents = np.empty((count, places), dtype=np.int64)
        for row in range(count):
            self._read_window(self._window_at(position + row), windows[row], documents[row])
        return batch_from_windows(windows, documents, mask_documents=self.config.mask_documents)

    def epoch_of(self, position: int) -> int:
        """The epoch in which the sample at `position` begins."""
        return self._epoch_at(position * self.config.sequence_length)

    def _epoch_at(self, place: int) -> int:
        """The epoch that holds `place` of the endless stream."""
        while self._epoch_starts[-1] <= place:
            epoch = len(self._epoch_starts) - 1
            tokens = epoch_tokens(self.store, seed=self.seed, epoch=epoch, fim_rate=self.config.fim_rate)
            self._epoch_starts.append(self._epoch_starts[-1] + tokens)
        return int(np.searchsorted(self._epoch_starts, place, side="right")) - 1

    def _window_at(self, position: int) -> int:
        """The sample (numbered along the stream) that is visited at `position`: shuffled within the epoch."""
        epoch = self.epoch_of(position)
        length = self.config.sequence_length
        # Samples of an epoch are those whose first target lies in it: ceil(start / length) <= w < ceil(end
        # / length).
        first = -(-self._epoch_starts[epoch] // length)
        after = -(-self._epoch_starts[epoch + 1] // length)
        if epoch not in self._orders:
            order = permutation(after - first, seed=self.seed, purpose=WINDOW_ORDER, epoch=epoch)
            _remember(self._orders, epoch, order)
        return first + int(self._orders[epoch][position - first])

    def _packing(self, epoch: int) -> Packing:
        if epoch not in self._packings:
            packing = pack_epoch(self.store, seed=self.seed, epoch=epoch, fim_rate=self.config.fim_rate)
            _remember(self._packings, epoch, packing)
        return self._packings[epoch]

    def _read_window(self, window: int, tokens: NDArray[np.int64], documents: NDArray[np.int64]) -> None:
        """Fill one row with a sample's context token and its targets."""
        place = window * self.config.sequence_length - 1
        filled = 0
        if place < 0:
            tokens[0], documents[0], filled = self.store.manifest.special_ids.eos, -1, 1
        while filled < len(tokens):
            epoch = self._epoch_at(place + filled)
            start = place + filled - self._epoch_starts[epoch]
            count = read_packed(
                self.store, self._packing(epoch), start, tokens=tokens[filled:], documents=documents[filled:]
            )
            documents[filled : filled + count] += epoch * len(self.store.lengths)
            filled += count


def _remember(cache: dict[int, Value], epoch: int, value: Value) -> None:
    """Keep the value of the few epochs used last."""
    while len(cache) >= EPOCHS_KEPT:
        del cache[next(iter(cache))]
    cache[epoch] = value


def iterate_windows(
    store: TokenStore, *, sequence_length: int, batch_sequences: int, mask_documents: bool = False
) -> Iterator[Batch]:
    """A store from its first token to its last, in order: every token is a target exactly once.

    Args:
        store: usually the held-out store.
        sequence_length: targets of one sample, tokens.
        batch_sequences: samples of one batch; the last batch may hold fewer.
        mask_documents: whether batches carry document ids.
    Yields:
        Batches; the first token is predicted from an end-of-sentence token, the last sample is filled up with
        positions without a target.
    """
    packing = pack_in_order(store)
    samples = -(-packing.num_tokens // sequence_length)
    for first in range(0, samples, batch_sequences):
        rows = min(batch_sequences, samples - first)
        windows = np.full((rows, sequence_length + 1), -1, dtype=np.int64)
        # Places after the end count as one more document: nothing real is attended to from there.
        documents = np.full_like(windows, len(packing.ends))
        for row in range(rows):
            place = (first + row) * sequence_length - 1
            skip = 1 if place < 0 else 0
            if skip:
                windows[row, 0], documents[row, 0] = store.manifest.special_ids.eos, -1
            read_packed(store, packing, place + skip, tokens=windows[row, skip:], documents=documents[row, skip:])
        yield batch_from_windows(windows, documents, mask_documents=mask_documents)


# The training stream and the held-out store.
Stores = tuple[TokenStream, TokenStore | None]


def open_stores(config: DataConfig, *, vocab_size: int, seed: int) -> Stores:
    """The training stream and the held-out store, checked against the model's vocabulary and each other.

    Raises:
        ValueError: missing, damaged, too short, or made with another tokeniser or too large a vocabulary.
    """
    store = TokenStore.open(Path(config.store))
    store.check(vocab_size=vocab_size)
    stream = TokenStream(store, config, seed)
    if config.heldout is None:
        return stream, None
    heldout = TokenStore.open(Path(config.heldout))
    heldout.check(vocab_size=vocab_size)
    check_same_tokenizer(store, heldout)
    return stream, heldout
