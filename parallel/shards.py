"""Where a local block of a tensor lies in the global one, and which rank writes it into a checkpoint.

ZeRO-1 (arXiv:2412.19437 §3.2) leaves each rank a flat range of a weight's master and moments, expert parallelism some
of the experts, pipeline parallelism some of the layers. A `Shard` says which block that is, so another layout can cut
the same global tensor differently:

    local[i, j, ...] = global[offsets[0] + i, offsets[1] + j, ...]       0 <= i < sizes[0], 0 <= j < sizes[1], ...

When saved, the ranks' shards of one tensor must tile it: two shards are identical or share no element, and together
they leave no hole. Of identical shards (replicas, tied copies, the random generator) one rank writes one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Shard(NamedTuple):
    """A rectangular block of a global tensor; all three have one entry per dim, none for a 0-d tensor."""

    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Shard:
        """The shard that is all of a tensor."""
        return cls(tuple(shape), (0,) * len(shape), tuple(shape))

    @property
    def numel(self) -> int:
        """Elements of the block."""
        return math.prod(self.sizes)

    def is_inside(self) -> bool:
        """Whether it is a block of the global tensor."""
        return len(self.global_shape) == len(self.offsets) == len(self.sizes) and all(
            min(first, length) >= 0 and first + length <= size for size, first, length in zip(*self, strict=True)
        )

    def flatten(self) -> Shard:
        """The same elements of the flattened global tensor; only the first dim may be cut."""
        assert self.sizes[1:] == self.global_shape[1:], f"{self} is not contiguous in the flattened tensor"
        row = math.prod(self.global_shape[1:])
        return Shard((self.global_shape[0] * row,), (self.offsets[0] * row,), (self.sizes[0] * row,))

    def of(self, outer: Shard) -> Shard:
        """This shard of a block, as a shard of the tensor that the block is a shard of."""
        assert self.global_shape == outer.sizes, (self, outer)
        offsets = (mine + its for mine, its in zip(self.offsets, outer.offsets, strict=True))
        return Shard(outer.global_shape, tuple(offsets), self.sizes)


@dataclass(frozen=True, eq=False)
class LocalShard:
    """A live tensor, any dtype, and the block of the global tensor that it holds."""

    tensor: Tensor
    shard: Shard

    def __post_init__(self) -> None:
        assert tuple(self.tensor.shape) == self.shard.sizes, (self.tensor.shape, self.shard)
        assert self.shard.is_inside(), f"{self.shard} leaves the global tensor"

    @classmethod
    def at(cls, tensor: Tensor, global_shape: tuple[int, ...], offsets: tuple[int, ...]) -> LocalShard:
        """A tensor whose first element is at `offsets` of the global one."""
        return cls(tensor, Shard(global_shape, offsets, tuple(tensor.shape)))


# Name -> what a rank holds of the tensor; a `Tensor` is whole.
HeldTensors = Mapping[str, Tensor | LocalShard]


class TypedShard(NamedTuple):
    """What a rank holds of one tensor, as ranks tell each other in JSON; dtype as `str(tensor.dtype)`."""

    dtype: str
    shard: Shard


# Name -> {"shape": list of int, "dtype": str}, as the manifest of a checkpoint lists it.
GlobalTensors = dict[str, dict[str, Any]]


def typed_shard(name: str, value: Tensor | LocalShard) -> TypedShard:
    """What a rank holds of the tensor `name`; a `Tensor` is whole. Anything else is a ValueError."""
    if isinstance(value, LocalShard):
        return TypedShard(str(value.tensor.dtype), value.shard)
    if isinstance(value, Tensor):
        return TypedShard(str(value.dtype), Shard.whole(value.shape))
    raise ValueError(f"tensors[{name!r}] is a {type(value).__name__}, not a tensor; put it into the JSON state")


def local_tensor(value: Tensor | LocalShard) -> Tensor:
    """The live tensor, detached: filling it in place fills the caller's, and raises its version."""
    return (value.tensor if isinstance(value, LocalShard) else value).detach()


def read_report(report: Mapping[str, Any]) -> dict[str, TypedShard]:
    """A rank's typed shards as they come out of JSON, where tuples have become lists."""
    return {name: TypedShard(dtype, Shard(*map(tuple, shard))) for name, (dtype, shard) in report.items()}


def global_tensors(reports: Sequence[Mapping[str, TypedShard]]) -> GlobalTensors:
    """Every tensor of which some rank holds a shard, in order of name; `reports` has one entry for each rank.

    A ValueError names a tensor whose shape or dtype differs between two ranks.
    """
    seen: dict[str, tuple[int, TypedShard]] = {}
    for rank, report in enumerate(reports):
        for name, held in report.items():
            first_rank, first = seen.setdefault(name, (rank, held))
            shape, first_shape = held.shard.global_shape, first.shard.global_shape
            if (held.dtype, shape) != (first.dtype, first_shape):
                raise ValueError(
                    f"tensor {name} is {first.dtype} {list(first_shape)} on rank {first_rank}, but "
                    f"{held.dtype} {list(shape)} on rank {rank}; all ranks must give one shape and dtype"
                )
    in_order = ((name, seen[name][1]) for name in sorted(seen))
    return {name: {"shape": list(held.shard.global_shape), "dtype": held.dtype} for name, held in in_order}


def assign_writers(reports: Sequence[Mapping[str, TypedShard]]) -> list[list[str]]:
    """Choose one writer for every shard, so that the ranks write about as many bytes each.

    Args:
        reports: one for each rank; of equal shapes and dtypes, as `global_tensors` has checked.
    Returns:
        for each rank the names whose shard it writes; a tensor without elements has no writer.
    Raises:
        ValueError: the shards of a tensor overlap or leave a hole; named.
    """
    holders: dict[str, dict[Shard, list[int]]] = {}
    firsts: dict[str, TypedShard] = {}
    for rank, report in enumerate(reports):
        for name, held in report.items():
            firsts.setdefault(name, held)
            shards = holders.setdefault(name, {})
            if held.shard.numel:
                shards.setdefault(held.shard, []).append(rank)
    jobs: list[tuple[list[int], int, str]] = []
    for name, shards in holders.items():
        _check_tiling(name, firsts[name].shard.global_shape, shards)
        itemsize = getattr(torch, firsts[name].dtype.removeprefix("torch.")).itemsize
        jobs.extend((ranks, shard.numel * itemsize, name) for shard, ranks in shards.items())
    # First what only one rank can write, then the replicas, the largest first, each to the rank with least to do.
    jobs.sort(key=lambda job: (len(job[0]) > 1, -job[1], job[2]))
    names: list[list[str]] = [[] for _ in reports]
    written_bytes = [0] * len(reports)
    for ranks, num_bytes, name in jobs:
        writer = min(ranks, key=written_bytes.__getitem__)
        names[writer].append(name)
        written_bytes[writer] += num_bytes
    return names


def _check_tiling(name: str, shape: tuple[int, ...], shards: Mapping[Shard, list[int]]) -> None:
    """Sweep along the first dim: a shard is compared only with those that reach it there."""
    covered = 0
    active: list[Shard] = []
    for shard in sorted(shards):
        active = [it for it in active if not shape or it.offsets[0] + it.sizes[0] > shard.offsets[0]]
        for other in active:
            spans = zip(shard.offsets, shard.sizes, other.offsets, other.sizes, strict=True)
            if all(a < b + its_length and b < a + length for a, length, b, its_length in spans):
                raise ValueError(
                    f"shards of tensor {name} {list(shape)} overlap: {list(other.sizes)} at {list(other.offsets)} of "
                    f"rank {shards[other][0]}, {list(shard.sizes)} at {list(shard.offsets)} of rank "
                    f"{shards[shard][0]}; two ranks must hold the same shard or share no element"
                )
        active.append(shard)
        covered += shard.numel
    if covered != math.prod(shape):
        raise ValueError(
            f"shards of tensor {name} {list(shape)} hold {covered} of its {math.prod(shape)} elements; "
            "every element must be held by some rank"
        )
