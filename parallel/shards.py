"""Which part of which tensor each rank holds, and who writes it: the arithmetic of saving across layouts.

A box is a rectangle in a global tensor: its first element and its size along each dim. A whole tensor is the box that
fills it. When saved, the ranks' boxes of one tensor must tile it: two boxes are identical or share no element, and
together they leave no hole. Of identical boxes (replicas, tied copies, the random generator) one rank writes one.

    part     {name: Part} of one rank, what it passes to save or load
    whole    {name: {"shape", "dtype"}}, the union over all ranks, what the manifest lists

No tensor data, no file, no process group here: plain numbers that travel as JSON.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parallel.pieces import Piece

Wholes = dict[str, dict[str, Any]]


class Part(NamedTuple):
    """What a rank holds of one tensor.

    Args:
        shape: of the whole tensor.
        dtype: as `str(tensor.dtype)`.
        offset: first element of the rank's box, along each dim.
        size: of the rank's box, along each dim.
    """

    shape: tuple[int, ...]
    dtype: str
    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """Elements in the box."""
        return math.prod(self.size)


class _Box(NamedTuple):
    offset: tuple[int, ...]
    size: tuple[int, ...]


def part_of(name: str, value: Tensor | Piece) -> Part:
    """Say where a tensor or piece lies.

    Args:
        name: for the message.
        value: a whole tensor, or a piece of one.
    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, Piece):
        return Part(value.global_shape, str(value.local.dtype), value.offset, tuple(value.local.shape))
    if isinstance(value, Tensor):
        return Part(tuple(value.shape), str(value.dtype), (0,) * value.dim(), tuple(value.shape))
    raise ValueError(f"tensors[{name!r}] is a {type(value).__name__}, not a tensor; put it into the JSON state")


def local_of(value: Tensor | Piece) -> Tensor:
    """The live tensor, detached: filling it in place fills the caller's, and raises its version."""
    return (value.local if isinstance(value, Piece) else value).detach()


def read_parts(report: Mapping[str, Any]) -> dict[str, Part]:
    """Parts as they come out of JSON, where tuples have become lists.

    Args:
        report: name -> [shape, dtype, offset, size].
    """
    return {
        name: Part(tuple(shape), dtype, tuple(offset), tuple(size))
        for name, (shape, dtype, offset, size) in report.items()
    }


def union(reports: Sequence[Mapping[str, Part]]) -> Wholes:
    """Every tensor of which some rank holds a part.

    Args:
        reports: one for each rank.
    Returns:
        name -> {"shape": list of int, "dtype": str}, in order of name.
    Raises:
        ValueError: two ranks differ in a tensor's shape or dtype; named.
    """
    seen: dict[str, tuple[int, Part]] = {}
    for rank, report in enumerate(reports):
        for name, part in report.items():
            first_rank, first = seen.setdefault(name, (rank, part))
            if part[:2] != first[:2]:
                raise ValueError(
                    f"tensor {name} is {first.dtype} {list(first.shape)} on rank {first_rank}, but "
                    f"{part.dtype} {list(part.shape)} on rank {rank}; all ranks must give one shape and dtype"
                )
    return {name: {"shape": list(part.shape), "dtype": part.dtype} for name, (_, part) in sorted(seen.items())}


def assign(reports: Sequence[Mapping[str, Part]]) -> list[list[str]]:
    """Choose one writer for every box, so that the ranks write about as many bytes each.

    Args:
        reports: one for each rank; of equal shapes and dtypes, as `union` has checked.
    Returns:
        for each rank the names whose box it writes. A tensor without elements is written by nobody.
    Raises:
        ValueError: the boxes of a tensor overlap or leave a hole; named.
    """
    holders: dict[str, dict[_Box, list[int]]] = {}
    wholes: dict[str, Part] = {}
    for rank, report in enumerate(reports):
        for name, part in report.items():
            wholes.setdefault(name, part)
            boxes = holders.setdefault(name, {})
            if part.num_elements:
                boxes.setdefault(_Box(part.offset, part.size), []).append(rank)
    jobs: list[tuple[list[int], int, str]] = []
    for name, boxes in holders.items():
        _check_tiling(name, wholes[name].shape, boxes)
        itemsize = getattr(torch, wholes[name].dtype.removeprefix("torch.")).itemsize
        jobs.extend((ranks, math.prod(box.size) * itemsize, name) for box, ranks in boxes.items())
    # First what only one rank can write, then the replicas, the largest first, each to the rank with least to do.
    jobs.sort(key=lambda job: (len(job[0]) > 1, -job[1], job[2]))
    names: list[list[str]] = [[] for _ in reports]
    written_bytes = [0] * len(reports)
    for ranks, num_bytes, name in jobs:
        writer = min(ranks, key=written_bytes.__getitem__)
        names[writer].append(name)
        written_bytes[writer] += num_bytes
    return names


def _check_tiling(name: str, shape: tuple[int, ...], boxes: Mapping[_Box, list[int]]) -> None:
    """Sweep along the first dim: only boxes that reach the current one there are compared with it."""
    covered = 0
    active: list[_Box] = []
    for box in sorted(boxes):
        active = [other for other in active if not box.offset or other.offset[0] + other.size[0] > box.offset[0]]
        for other in active:
            if _overlap(box, other):
                raise ValueError(
                    f"parts of tensor {name} {list(shape)} overlap: {list(other.size)} at {list(other.offset)} of rank "
                    f"{boxes[other][0]}, {list(box.size)} at {list(box.offset)} of rank {boxes[box][0]}; "
                    "two ranks must hold the same part or share no element"
                )
        active.append(box)
        covered += math.prod(box.size)
    if covered != math.prod(shape):
        raise ValueError(
            f"parts of tensor {name} {list(shape)} hold {covered} of its {math.prod(shape)} elements; "
            "every element must be held by some rank"
        )


def _overlap(one: _Box, other: _Box) -> bool:
    return all(
        a < b + other_length and b < a + length
        for a, length, b, other_length in zip(one.offset, one.size, other.offset, other.size, strict=True)
    )
