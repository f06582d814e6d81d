"""Samples of conversations, whole and apart, with a loss on what the assistant says: a function of (seed, position).

    ids        f s s u u A a a e | f u u A a e | f u ...     f the first token, A the assistant's mark, e the end
    input      f s s u u A a a     f u u A a     f u           a conversation of n ids takes n - 1 positions
    label      . . . . . a a e     . . . a e     . .           the next id where that has a loss
    document   0 0 0 0 0 0 0 0     1 1 1 1 1     2 2

Attention stays inside a document; positions are relative (RoPE), so a conversation is computed as if alone. MTP depth k
is asked at position i for the label at i + k. So the first labels of a conversation, as many as there are depths, are
never targets: the conversation before would be asked for them. The template begins with three tokens without a loss or
more, so at V3's one depth nothing is lost. Room at the end is filled with a copy of the sample's beginning, without
targets, since one id repeated would send all its tokens to the same experts.

The order of an epoch's samples is shuffled; a run resumes with one number, the position, on any number of ranks.

Shapes: sequences = samples of a batch, tokens = sequence_length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from train.data.batch import IGNORE_INDEX, Batch, DamagedWindow
from train.data.best_fit import ConversationPacking
from train.data.blocks import DamagedData
from train.data.config import DataConfig
from train.data.packing import WINDOW_ORDER, permutation
from train.data.store import TokenStore
from train.data.stream import Stores, cached, check_seed, open_pair
from train.data.windows import Windows, position_of


@dataclass
class ConversationStream:
    """Training samples of one store of conversations in the order of one seed; endless.

    Args:
        mtp_depths: of the model: so many first labels of a conversation are no targets.
    Raises:
        ValueError: the seed is out of range, or a conversation is longer than a sample.
    """

    store: TokenStore
    config: DataConfig
    seed: int
    mtp_depths: int
    dropped: Windows = ()  # positions that are left out; those after them move up
    # Caches only.
    _orders: dict[int, NDArray[np.int64]] = field(default_factory=dict, repr=False)
    _in_slots: dict[int, NDArray[np.int64]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        check_seed(self.seed)
        self.packing = ConversationPacking(self.store, self.config.sequence_length)

    def take(self, position: int, count: int) -> Batch:
        """The samples at `position`, `position + 1`, ... of the visiting order without the dropped ones.

        They are the same whatever was taken before. A batch with damaged ones is not to be trained on.
        """
        assert min(position, count) >= 0, (position, count)
        rows, damaged = _Rows(count, self.config.sequence_length), list[DamagedWindow]()
        for row in range(count):
            at = position_of(position + row, self.dropped)
            try:
                rows.fill(row, self.store, self._conversations(at), no_targets=self.mtp_depths)
            except DamagedData as error:
                damaged.append(DamagedWindow(at, error.file, error.block, str(error)))
                # Any ids, without targets.
                rows.labels[row], rows.documents[row] = IGNORE_INDEX, 0
                rows.input_ids[row] = np.arange(self.config.sequence_length) % (self.store.manifest.max_token_id + 1)
        return rows.batch(tuple(damaged))

    def _conversations(self, position: int) -> NDArray[np.int64]:
        """Those of the sample at a position."""
        samples, seed = self.packing.num_samples, self.seed
        epoch, index = divmod(position, samples)
        order = partial(permutation, samples, seed=seed, purpose=WINDOW_ORDER, epoch=epoch)
        in_slots = cached(self._in_slots, epoch, partial(self.packing.shuffled, seed=seed, epoch=epoch))
        return self.packing.conversations(int(cached(self._orders, epoch, order)[index]), in_slots)


class _Rows:
    """Samples under construction, each array [sequences, tokens] int64."""

    def __init__(self, count: int, sequence_length: int) -> None:
        self.input_ids = np.empty((count, sequence_length), dtype=np.int64)
        self.labels, self.documents = np.empty_like(self.input_ids), np.empty_like(self.input_ids)

    def fill(self, row: int, store: TokenStore, conversations: NDArray[np.int64], *, no_targets: int = 0) -> None:
        """One sample; the first `no_targets` labels of each conversation are no targets."""
        inputs, labels, documents, start = self.input_ids[row], self.labels[row], self.documents[row], 0
        for number, index in enumerate(conversations.tolist()):
            ids, has_loss = store.document(index).astype(np.int64), store.loss_mask(index)
            stop = start + len(ids) - 1
            inputs[start:stop], documents[start:stop] = ids[:-1], number
            labels[start:stop] = np.where(has_loss[1:], ids[1:], IGNORE_INDEX)
            labels[start : min(start + no_targets, stop)] = IGNORE_INDEX
            start = stop
        inputs[start:] = np.resize(inputs[:start], len(inputs) - start)
        labels[start:], documents[start:] = IGNORE_INDEX, len(conversations)

    def batch(self, damaged: tuple[DamagedWindow, ...] = ()) -> Batch:
        """As tensors."""
        inputs, labels, documents = map(torch.from_numpy, (self.input_ids, self.labels, self.documents))
        return Batch(inputs, labels, documents, damaged)


def iterate_conversations(store: TokenStore, *, sequence_length: int, batch_sequences: int) -> Iterator[Batch]:
    """A store once, packed: every token with a loss is a target exactly once. The last batch may be smaller.

    Raises:
        ValueError: a conversation is longer than a sample.
    """
    packing = ConversationPacking(store, sequence_length)
    in_slots = packing.in_store_order()
    for first in range(0, packing.num_samples, batch_sequences):
        rows = _Rows(min(batch_sequences, packing.num_samples - first), sequence_length)
        for row in range(len(rows.labels)):
            rows.fill(row, store, packing.conversations(first + row, in_slots))
        yield rows.batch()


def open_conversations(config: DataConfig, *, vocab_size: int, seed: int, mtp_depths: int) -> Stores:
    """The training stream and the held-out store, checked as `open_stores` does.

    Raises:
        ValueError: also a store of text, held-out conversations with another first token or template, or a
            conversation that is longer than a sample.
    """
    store, heldout = open_pair(config, vocab_size=vocab_size)
    for name, each in (("store", store), ("heldout", heldout)):
        if each is not None and each.manifest.chat is None:
            raise ValueError(
                f"data.{name}: {each.path} holds text, and data.samples=conversations takes what "
                "`launch/prepare.py --format messages` makes; name such a store"
            )
    if heldout is not None:
        _check_alike(store, heldout)
        ConversationPacking(heldout, config.sequence_length)
    return ConversationStream(store, config, seed, mtp_depths), heldout


def _check_alike(store: TokenStore, heldout: TokenStore) -> None:
    """Refuse held-out conversations that are written otherwise than those of training."""
    one, other = store.manifest.chat, heldout.manifest.chat
    assert one is not None
    assert other is not None
    if one.first_token != other.first_token:
        raise ValueError(
            f"data.heldout: conversations of {heldout.path} begin with {other.first_token}, those of {store.path} with "
            f"{one.first_token}: prepare them with --first-token {one.first_token}"
        )
    if one.template_sha256 != other.template_sha256:
        raise ValueError(
            f"data.heldout: conversations of {heldout.path} have another chat template than those of {store.path}: "
            "prepare both with one version"
        )
