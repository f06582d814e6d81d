"""Shared memory of an emulated Gluon kernel: poisoned buffers, views of them, and the check of who touches what when.

An allocation starts as 0xFF bytes, NaN in every floating-point format. Every access is a box in the allocation's own
coordinates with the clock at which it happened (see `tests/kernels/gluon_machine.py`): a write must come after every
access to the same bytes, a read after every write, and where the threads wrote and TMA or wgmma follow, a
`fence_async_shared` of the writer must lie between. A TMA load is a write by the barrier that announces it; a wgmma's
read ends at its wait, a TMA store's at its `store_wait`, a lazy load's at its first use.

Not emulated: swizzling and bank conflicts, reshaping or reinterpreting a buffer, reuse of a buffer by the compiler for
another whose life is over, and the compiler's own scratch memory (none of it counts here).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch

from tests.kernels.gluon_machine import Barrier, Clock, Partition, now
from tests.kernels.gluon_values import BarrierMisuse, Misuse, OutOfRange, Race, Tensor, raw, where

POISON = 0xFF
# (first, one past the last) in each dim of the allocation.
Box = tuple[tuple[int, int], ...]


@dataclasses.dataclass
class Access:
    """One access to an allocation.

    Args:
        box: what it touches.
        actor: the partition, or the barrier that announces a TMA load.
        clock: what happened before it begins.
        text: what it is and where, for reports.
        writes: it changes the memory.
        by_threads: it is a load or store of the threads (the generic proxy), not TMA or wgmma (the async proxy).
        time: the actor's time when it ends; None while it is outstanding.
        fences: proxy fences its partition had issued before it.
    """

    box: Box
    actor: Partition | Barrier
    clock: Clock
    text: str
    writes: bool = False
    by_threads: bool = False
    time: int | None = None
    fences: int = 0


def _overlap(left: Box, right: Box) -> bool:
    return all(low < end and start < high for (low, high), (start, end) in zip(left, right, strict=True))


def _covers(outer: Box, inner: Box) -> bool:
    return all(low <= start and end <= high for (low, high), (start, end) in zip(outer, inner, strict=True))


class Allocation:
    """A buffer of shared memory, its mbarriers if it holds any, and the accesses a later one may collide with."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, *, layout: Any, name: str) -> None:
        self.layout, self.name = layout, name
        size_bytes = math.prod(shape) * dtype.itemsize
        self.data = torch.full((size_bytes,), POISON, dtype=torch.uint8).view(dtype).view(*shape)
        self.barriers: dict[Box, Barrier] = {}
        self._accesses: list[Access] = []

    def access(self, new: Access) -> Access:
        """Check an access against all earlier ones, and remember it."""
        partition = now()
        if partition.machine.options.races:
            self._check(new)
        new.fences = partition.fences
        self._accesses = [old for old in self._accesses if not self._replaces(new, old)]
        self._accesses.append(new)
        return new

    def _check(self, new: Access) -> None:
        written = new.writes
        for old in self._accesses:
            if not _overlap(new.box, old.box):
                continue
            written |= old.writes
            if not (new.writes or old.writes):
                continue
            place = f"{self.name}{[list(extent) for extent in new.box]}: {new.text}"
            if old.time is None:
                raise Race(f"{place} is not ordered after {old.text} (still outstanding)")
            if new.clock.get(old.actor, 0) < old.time:
                raise Race(f"{place} is not ordered after {old.text}")
            if old.writes and old.by_threads and not new.by_threads:
                assert isinstance(old.actor, Partition)
                if old.actor.fences <= old.fences:
                    raise Race(f"{place} is not separated by fence_async_shared where it comes after {old.text}")
        if not written:
            raise Race(f"{self.name}: {new.text} of unwritten shared memory")

    @staticmethod
    def _replaces(new: Access, old: Access) -> bool:
        """Whether every access that collides with `old` would collide with `new` too."""
        same_reader = not old.writes and old.time is not None and old.actor is new.actor
        return (new.writes or same_reader) and _covers(new.box, old.box)


class Shared:
    """A view of an allocation, as `allocate_shared_memory`, `index`, `slice` and `permute` give it.

    Args:
        allocation: what it is a view of.
        data: the torch view.
        box: its extent in the allocation.
        dims: which dim of the allocation each of its own is.
    """

    def __init__(self, allocation: Allocation, data: torch.Tensor, *, box: Box, dims: tuple[int, ...]) -> None:
        self.allocation, self.data, self.box, self.dims = allocation, data, box, dims

    @classmethod
    def whole(cls, allocation: Allocation) -> Shared:
        shape = allocation.data.shape
        box = tuple((0, extent) for extent in shape)
        return cls(allocation, allocation.data, box=box, dims=tuple(range(len(shape))))

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    @property
    def size_bytes(self) -> int:
        return self.data.numel() * self.data.element_size()

    def index(self, index: int) -> Shared:
        """One element of the first dim, which goes."""
        row = self.slice(int(index), 1)
        return Shared(self.allocation, row.data[0], box=row.box, dims=self.dims[1:])

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        """A part of one dim."""
        start, extent = int(start), self.data.shape[dim]
        if start < 0 or start + length > extent:
            raise OutOfRange(f"{self.allocation.name}: [{start}, {start + length}) of {extent}, at {where()}")
        box = list(self.box)
        low = box[self.dims[dim]][0] + start
        box[self.dims[dim]] = (low, low + length)
        return Shared(self.allocation, self.data.narrow(dim, start, length), box=tuple(box), dims=self.dims)

    def permute(self, order: Sequence[int]) -> Shared:
        dims = tuple(self.dims[dim] for dim in order)
        return Shared(self.allocation, self.data.permute(*order), box=self.box, dims=dims)

    def load(self, layout: Any = None) -> Tensor:
        """Read into registers; under `lazy_loads`, later."""
        partition = now()
        partition.step()
        access = self.allocation.access(
            Access(self.box, partition, partition.clock, f"load at {where()}", by_threads=True)
        )

        def take() -> torch.Tensor:
            access.time = partition.clock[partition]
            partition.untaken_loads = [load for load in partition.untaken_loads if load is not result]
            return self.data.clone()

        result = Tensor(pending=take)
        if partition.machine.options.lazy_loads:
            partition.untaken_loads.append(result)
        else:
            _ = result.value
        return result

    def store(self, value: Tensor) -> None:
        """Write from registers."""
        partition = now()
        partition.step()
        # Program order: a load before the store does not see it.
        partition.take_loads()
        data = raw(value)
        if data.dtype != self.data.dtype or data.shape != self.data.shape:
            raise Misuse(
                f"shared store of {data.dtype}{list(data.shape)} into {self.data.dtype}{self.shape}, at {where()}"
            )
        time = partition.clock[partition]
        text = f"store at {where()}"
        self.allocation.access(
            Access(self.box, partition, partition.clock, text, writes=True, by_threads=True, time=time)
        )
        self.data.copy_(data)

    @property
    def barrier(self) -> Barrier:
        """The mbarrier that was initialised here."""
        if self.box not in self.allocation.barriers:
            raise BarrierMisuse(f"{self.place} used before mbarrier.init, at {where()}")
        return self.allocation.barriers[self.box]

    @property
    def place(self) -> str:
        """`name[index]` of a barrier's memory, for reports."""
        return f"{self.allocation.name}[{self.box[0][0]}]"
