"""Thin functions over torch.distributed for one axis of the mesh, with the bytes counted.

The exchange of tokens in expert parallelism is an uneven all-to-all of whole rows (arXiv:2412.19437 §3.2.2). On an axis
of one rank there is no group, and every function is the identity. Not differentiable: autograd belongs to the callers.
What a journey starts in a pair of micro-batches is asynchronous (`parallel/flight.py`); all else waits at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.flight import Lane, Started, UnderWay
from parallel.mesh import Axis
from parallel.waiting import waiting

TEXT_BYTES = 1024


class Traffic:
    """Bytes sent by this rank, by kind ("dispatch", "combine", "routing", "gates", "counts")."""

    def __init__(self) -> None:
        # A row counts once per destination rank, this rank included; `to_others` leaves out what stays here.
        self.sent: Counter[str] = Counter()
        self.to_others: Counter[str] = Counter()
        self.rows: Counter[str] = Counter()
        # The most bytes of send and receive buffer that one call had.
        self.largest_exchange = 0

    def add(self, kind: str, splits: Sequence[int], *, received: int, row_bytes: int, own: int) -> None:
        """Count one exchange of rows of `row_bytes` each; own: this rank's index on the axis."""
        rows = sum(splits)
        self.largest_exchange = max(self.largest_exchange, (rows + received) * row_bytes)
        self.rows[kind] += rows
        self.sent[kind] += rows * row_bytes
        self.to_others[kind] += (rows - splits[own]) * row_bytes


def all_to_all_rows(
    rows: Tensor,
    send_splits: Sequence[int],
    recv_splits: Sequence[int],
    axis: Axis,
    *,
    kind: str = "rows",
    traffic: Traffic | None = None,
    then: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> UnderWay:
    """Send whole rows to every rank of an axis; every rank must call it. In a pair it starts, else it has ended.

    Args:
        rows: [sum(send_splits), ...], sorted by destination. gloo refuses FP8: send its bytes as uint8.
        send_splits: rows for each rank, zero allowed.
        recv_splits: rows from each rank, zero allowed.
        axis: the ranks that take part.
        kind: under which name `traffic` counts the bytes, if it is given.
        then: what becomes of the rows when they are here.
    Returns:
        [sum(recv_splits), ...] in order of the source rank, under way; `rows` itself on an axis of one rank.
    """
    assert len(send_splits) == len(recv_splits) == axis.size, (send_splits, recv_splits, axis.size)
    assert rows.shape[0] == sum(send_splits), (rows.shape, send_splits)
    if traffic is not None:
        row_bytes = rows.shape[1:].numel() * rows.element_size()
        traffic.add(kind, send_splits, received=sum(recv_splits), row_bytes=row_bytes, own=axis.rank)
    if axis.group is None:
        return UnderWay(rows, None, then)
    received = rows.new_empty(sum(recv_splits), *rows.shape[1:])
    sent, splits = rows.contiguous(), (list(recv_splits), list(send_splits))
    if Lane.current is not None:
        # The backend holds both tensors until the wait.
        work: Started = dist.all_to_all_single(received, sent, *splits, group=axis.group, async_op=True)
        return UnderWay(received, work, then)
    with waiting():
        dist.all_to_all_single(received, sent, *splits, group=axis.group)
    return UnderWay(received, None, then)


def sum_over(x: Tensor, axis: Axis) -> Tensor:
    """Sum of a tensor over the ranks of an axis, in place; returns x."""
    if axis.group is not None:
        with waiting():
            dist.all_reduce(x, op=dist.ReduceOp.SUM, group=axis.group)
    return x


def texts_of(text: str, axis: Axis, *, device: torch.device) -> list[str]:
    """Every rank's text, cut to TEXT_BYTES of UTF-8, in order of rank; a collective call that waits."""
    # Texts are summed: one kind of collective on any backend, for what happens once in a long while.
    sent = torch.zeros(axis.size, TEXT_BYTES, dtype=torch.uint8, device=device)
    data = text.encode()[:TEXT_BYTES]
    sent[axis.rank, : len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else 0
    rows = sum_over(sent, axis).cpu().numpy()
    return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in rows]


def max_over(x: Tensor, axis: Axis) -> Tensor:
    """Largest value of each element over the ranks of an axis, in place; returns x."""
    if axis.group is not None:
        with waiting():
            dist.all_reduce(x, op=dist.ReduceOp.MAX, group=axis.group)
    return x
