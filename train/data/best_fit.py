"""Whole conversations packed into samples: best fit, the longest first.

The report packs several into a sequence and does not say how (arXiv:2412.19437 §5.1). A conversation of n ids takes
n - 1 positions, one for each next id. Longest first, each goes where it leaves the least room. That makes slots of
certain lengths, from the lengths alone; which conversation of such a length is in a slot changes from epoch to epoch.
So neighbours change, and every epoch has the same number of samples.

Shapes: conversations = rows of the store, samples = of one epoch.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from train.data.packing import DOCUMENT_ORDER, permutation
from train.data.store import TokenStore


def best_fit(lengths: NDArray[np.int64], *, room: int) -> NDArray[np.int64]:
    """[conversations] the sample of each, numbered from 0; `lengths` fall and none is above `room`."""
    samples = np.empty(len(lengths), dtype=np.int64)
    # Rooms that samples have, in order, and the samples that have each.
    rooms, with_room = list[int](), dict[int, list[int]]()
    count = 0
    for number, length in enumerate(lengths.tolist()):
        at = bisect_left(rooms, length)
        if at == len(rooms):
            sample, left = count, room - length
            count += 1
        else:
            found = rooms[at]
            sample, left = with_room[found].pop(), found - length
            if not with_room[found]:
                del rooms[at], with_room[found]
        if left not in with_room:
            insort(rooms, left)
            with_room[left] = []
        with_room[left].append(sample)
        samples[number] = sample
    return samples


class ConversationPacking:
    """The samples of a store's conversations, of any epoch.

    Raises:
        ValueError: a conversation is longer than a sample.
    """

    def __init__(self, store: TokenStore, sequence_length: int) -> None:
        self._positions = store.lengths - 1
        if longer := int((self._positions > sequence_length).sum()):
            raise ValueError(
                f"store: {longer} of {len(self._positions)} conversations in {store.path} take more than "
                f"data.sequence_length={sequence_length} positions, the longest {self._positions.max()}, and none is "
                f"cut: raise it, or leave them out with `launch/prepare.py --max-tokens {sequence_length + 1}`"
            )
        falling = -np.sort(-self._positions)
        sample_of_slot = best_fit(falling, room=sequence_length)
        self._slots = np.argsort(sample_of_slot, kind="stable")  # [conversations] by sample
        self._ends = np.cumsum(np.bincount(sample_of_slot))  # [samples]

    @property
    def num_samples(self) -> int:
        """Of an epoch."""
        return len(self._ends)

    def in_store_order(self) -> NDArray[np.int64]:
        """[conversations] what is in each slot, of equal lengths the first of the store first: for evaluation."""
        return np.argsort(-self._positions, kind="stable")

    def shuffled(self, *, seed: int, epoch: int) -> NDArray[np.int64]:
        """[conversations] what is in each slot, equal lengths in an order of the epoch."""
        order = permutation(len(self._positions), seed=seed, purpose=DOCUMENT_ORDER, epoch=epoch)
        by_length: NDArray[np.int64] = order[np.argsort(-self._positions[order], kind="stable")]
        return by_length

    def conversations(self, sample: int, in_slots: NDArray[np.int64]) -> NDArray[np.int64]:
        """Store indices of the conversations of a sample."""
        start = self._ends[sample - 1] if sample else 0
        return in_slots[self._slots[start : self._ends[sample]]]


def epoch_tokens(store: Path, sequence_length: int) -> int:
    """Positions of an epoch of a store of conversations: what a budget in epochs is made of.

    Raises:
        ValueError: no such store, or a conversation is longer than a sample.
    """
    return ConversationPacking(TokenStore.open(store), sequence_length).num_samples * sequence_length
