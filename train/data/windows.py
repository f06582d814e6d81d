"""Positions of the data order that a run leaves out: after a rollback, or because their data are damaged.

A file of its own: the policy that drops them (`train/spikes.py`) needs neither torch nor numpy.
"""

from __future__ import annotations

from collections.abc import Iterable

# (first position, number of positions), in order and apart from each other.
Windows = tuple[tuple[int, int], ...]


def position_of(sequence: int, dropped: Windows) -> int:
    """Position in the order of the data of a run's `sequence`-th sequence, where windows of it are dropped."""
    for first, count in dropped:
        if sequence < first:
            break
        sequence += count
    return sequence


def union(windows: Iterable[tuple[int, int]]) -> Windows:
    """The windows in order; those that touch are one."""
    merged: list[tuple[int, int]] = []
    for first, count in sorted(windows):
        if merged and first <= sum(merged[-1]):
            start = merged[-1][0]
            merged[-1] = (start, max(sum(merged[-1]), first + count) - start)
        else:
            merged.append((first, count))
    return tuple(merged)
