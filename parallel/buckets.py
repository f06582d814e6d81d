"""Which rank of an axis updates which elements and matrices: pure functions of sizes; no torch, so that plans share it.

    plan_buckets    parameters into flat buckets, each cut into one equal shard a rank (ZeRO-1, arXiv:1910.02054 §5.1)
    owners          whole matrices to ranks, balanced by FLOPs (Muon, arXiv:2502.16982 §2.3)

Shapes: `start` and `numel` count elements. Each parameter starts at a multiple of ALIGNMENT in its bucket and a
bucket's length is a multiple of ALIGNMENT x shards.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

# Elements: 512 bytes of FP32, 256 of BF16; wider than any vector load or TMA box asks for.
ALIGNMENT = 128
BUCKET_BYTES = 256 * 2**20

Dtype = TypeVar("Dtype", bound=Hashable)


@dataclass(frozen=True)
class BucketRange:
    """A parameter's range in a flat gradient bucket."""

    name: str
    start: int
    numel: int


@dataclass(frozen=True)
class BucketPlan(Generic[Dtype]):
    """One bucket: its parameters, all of one dtype, and its length in elements, padding included."""

    dtype: Dtype
    ranges: tuple[BucketRange, ...]
    numel: int

    def owned(self, rank: int, *, shards: int) -> Iterator[tuple[BucketRange, int, int]]:
        """Each range with its elements in one of so many equal shards: from, to; from >= to where it has none."""
        length = self.numel // shards
        for each in self.ranges:
            yield each, max(rank * length, each.start), min((rank + 1) * length, each.start + each.numel)


def plan_buckets(
    sizes: Iterable[tuple[str, int, Dtype]], *, shards: int, bucket_bytes: int
) -> tuple[BucketPlan[Dtype], ...]:
    """Assign parameters to buckets, in the order given; a pure function of its arguments, so equal on all ranks.

    Args:
        sizes: (name, elements, dtype) of each parameter. Dtypes do not mix, because weights are gathered by bucket.
        shards: number of equal shards per bucket.
        bucket_bytes: FP32 bytes of a bucket before its padding; a larger parameter gets a bucket of its own, uncut.
    """
    assert shards >= 1, shards
    assert bucket_bytes >= 4, bucket_bytes
    by_dtype: dict[Dtype, list[tuple[str, int]]] = {}
    for name, numel, dtype in sizes:
        by_dtype.setdefault(dtype, []).append((name, numel))
    plans: list[BucketPlan[Dtype]] = []
    for dtype, named in by_dtype.items():
        ranges: list[BucketRange] = []
        end = 0
        for name, numel in named:
            start = _round_up(end, ALIGNMENT)
            if ranges and (start + numel) * 4 > bucket_bytes:
                plans.append(BucketPlan(dtype, tuple(ranges), _round_up(end, ALIGNMENT * shards)))
                ranges, start = [], 0
            ranges.append(BucketRange(name, start, numel))
            end = start + numel
        plans.append(BucketPlan(dtype, tuple(ranges), _round_up(end, ALIGNMENT * shards)))
    return tuple(plans)


def owners(flops: Sequence[int], held: Sequence[Mapping[int, int]], *, ranks: int) -> list[int]:
    """Which rank computes each matrix; a pure function of its arguments, so equal on all ranks.

    Args:
        flops: of each matrix.
        held: of each matrix the elements that ranks hold, by rank.
        ranks: of the axis.
    """
    loads, chosen = [0] * ranks, [-1] * len(flops)
    by_size = sorted(range(len(flops)), key=lambda index: -flops[index])
    for index in by_size:
        holder = max(held[index], key=held[index].__getitem__)
        if (loads[holder] + flops[index]) * ranks <= sum(flops):
            chosen[index] = holder
            loads[holder] += flops[index]
    for index in by_size:
        if chosen[index] < 0:
            chosen[index] = loads.index(min(loads))
            loads[chosen[index]] += flops[index]
    return chosen


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
