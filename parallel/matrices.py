"""Whole matrices out of ZeRO-1's flat shards: each on one rank, for an update that is no function of one element.

arXiv:2502.16982 §2.3 (Muon with ZeRO-1). What the update starts from is in the shards of the gradient buckets, and so
is what it ends with; in between a matrix is on the rank that owns it:

    gather     owner of a matrix <- its elements on the other ranks       sent out of their shards, no copy
    compute    on the owner
    give back  owner -> the shards                                        received where the gradient was

Rounds: in each a rank owns one matrix, and while it computes the next one arrives, so it holds two at a time. Each
element of a shard travels twice at most, in FP32. Owners are balanced by FLOPs, and a rank that holds most of a matrix
is preferred: no rank has more than the mean and one matrix. Without ZeRO every rank computes all matrices itself.

Shapes: a matrix is [rows, cols] fp32, contiguous in its flattened parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.buckets import owners
from parallel.waiting import waiting
from parallel.zero import GradientBuckets


@dataclass(frozen=True)
class Matrix:
    """`rows` x `cols` elements of the flattened parameter on this rank, from `start`; `flops` of its update."""

    parameter: str
    start: int
    rows: int
    cols: int
    flops: int

    @property
    def stop(self) -> int:
        """After its last element."""
        return self.start + self.rows * self.cols


# Rank of the axis, and elements of the flattened parameter: from, to.
_Range = tuple[int, int, int]
# Send or receive, the other rank, and what.
_Operation = tuple[Callable[..., dist.Work | None], int, Tensor]


@dataclass(frozen=True, eq=False)
class _Round:
    """Matrices of one round as this rank takes part; slices are elements of the matrix that it owns."""

    own: Matrix | None
    here: list[tuple[slice, Tensor]]  # what of it this rank holds; tensors are views of its shards
    others: list[tuple[int, slice]]  # what of it other ranks hold
    away: list[tuple[int, Tensor]]  # what this rank holds of the matrices of other ranks


class MatrixExchange:
    """Applies a function to whole matrices of which the ranks of an axis hold shards.

    Args:
        buckets: hold the parameters; all ranks of their axis make the same exchange.
        matrices: the same in the same order on all ranks of the axis; no element is in two.
    """

    def __init__(self, buckets: GradientBuckets, matrices: Sequence[Matrix]) -> None:
        self._axis, self._parameters = buckets.axis, buckets.parameters
        self._grads = {held.name: (held.shard.offsets[0], held.grad) for held in buckets.parameter_shards()}
        is_cut = buckets.sharded and self._axis.size > 1
        self._whole = () if is_cut else tuple(matrices)
        # Rank of the axis -> the matrices that it computes, in order.
        self.owned: list[list[Matrix]] = []
        self._rounds = self._plan(buckets, matrices) if is_cut else []

    def _plan(self, buckets: GradientBuckets, matrices: Sequence[Matrix]) -> list[_Round]:
        shards = [buckets.shards_of(rank) for rank in range(self._axis.size)]
        ranges = {matrix: _cut(matrix, shards) for matrix in matrices}
        held = [{rank: stop - start for rank, start, stop in ranges[matrix]} for matrix in matrices]
        chosen = owners([matrix.flops for matrix in matrices], held, ranks=self._axis.size)
        self.owned = [[] for _ in range(self._axis.size)]
        # The largest first: in a round ranks compute matrices of about one size.
        for owner, matrix in sorted(zip(chosen, matrices, strict=True), key=lambda each: -each[1].flops):
            self.owned[owner].append(matrix)
        return [self._round(in_round, ranges) for in_round in zip_longest(*self.owned)]

    def _round(self, matrices: Sequence[Matrix | None], ranges: Mapping[Matrix, Sequence[_Range]]) -> _Round:
        me, here, others = self._axis.rank, list[tuple[slice, Tensor]](), list[tuple[int, slice]]()
        away = list[tuple[int, Tensor]]()
        for owner, matrix in enumerate(matrices):
            for rank, start, stop in () if matrix is None else ranges[matrix]:
                assert matrix is not None
                place = slice(start - matrix.start, stop - matrix.start)
                if owner == rank == me:
                    here.append((place, self._values(matrix, start, stop)))
                elif owner == me:
                    others.append((rank, place))
                elif rank == me:
                    away.append((owner, self._values(matrix, start, stop)))
        return _Round(matrices[me], here, others, away)

    def _values(self, matrix: Matrix, start: int, stop: int) -> Tensor:
        """Elements of the parameter that this rank holds, a view of the gradient."""
        offset, grad = self._grads[matrix.parameter]
        return grad[start - offset : stop - offset]

    @torch.no_grad()
    def apply(self, compute: Callable[[Tensor], Tensor]) -> None:
        """Put `compute(matrix)` in the place of each matrix in the gradients of `parameter_shards()`; collective."""
        for matrix in self._whole:
            values = self._values(matrix, matrix.start, matrix.stop)
            values.copy_(compute(values.view(matrix.rows, matrix.cols)).reshape(-1))
        coming = [self._gather(each) for each in self._rounds[:1]]
        for index, each in enumerate(self._rounds):
            whole, works = coming.pop()
            _wait_for(works)
            coming += [self._gather(after) for after in self._rounds[index + 1 : index + 2]]
            self._give_back(each, None if whole is None else compute(whole))

    def _gather(self, each: _Round) -> tuple[Tensor | None, list[dist.Work]]:
        """Start the way of a round's matrices to their owners; this rank's own, which is complete after the wait."""
        operations: list[_Operation] = [(dist.isend, owner, values) for owner, values in each.away]
        if each.own is None:
            return None, self._start(operations)
        device = self._parameters[each.own.parameter].device
        whole = torch.empty(each.own.rows, each.own.cols, dtype=torch.float32, device=device)
        flat = whole.view(-1)
        for place, values in each.here:
            flat[place].copy_(values)
        operations += [(dist.irecv, rank, flat[place]) for rank, place in each.others]
        return whole, self._start(operations)

    def _give_back(self, each: _Round, whole: Tensor | None) -> None:
        operations: list[_Operation] = [(dist.irecv, owner, values) for owner, values in each.away]
        if whole is not None:
            flat = whole.reshape(-1)
            for place, values in each.here:
                values.copy_(flat[place])
            operations += [(dist.isend, rank, flat[place]) for rank, place in each.others]
        _wait_for(self._start(operations))

    def _start(self, operations: Sequence[_Operation]) -> list[dist.Work]:
        """Sends and receives of one round together; every pair of ranks issues its own in the same order."""
        group = self._axis.group
        started = [dist.P2POp(call, tensor, group=group, group_peer=rank) for call, rank, tensor in operations]
        return dist.batch_isend_irecv(started) if started else []


def _cut(matrix: Matrix, shards: Sequence[Mapping[str, tuple[int, int]]]) -> list[_Range]:
    """What each rank holds of a matrix."""
    ranges = []
    for rank, shard in enumerate(shards):
        first, end = shard.get(matrix.parameter, (0, 0))
        start, stop = max(first, matrix.start), min(end, matrix.stop)
        if start < stop:
            ranges.append((rank, start, stop))
    return ranges


def _wait_for(works: Sequence[dist.Work]) -> None:
    with waiting():
        for work in works:
            work.wait()
