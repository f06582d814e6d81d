"""A rectangular part of a tensor that no rank need hold whole: the common tongue of sharded state.

ZeRO-1 (arXiv:2412.19437 §3.2) leaves each rank a flat slice of a weight's master and moments, expert parallelism a
few of the experts, pipeline parallelism some of the layers. Whoever reads such state (checkpoint, moving average)
wants to know only where the local part lies in the global tensor, so that the same global tensor can be cut anew
on another layout.

    local[i, j, ...] = global[offset[0] + i, offset[1] + j, ...]

Shapes: `local`, `global_shape` and `offset` have the same number of dims; a 0-d tensor has three empty ones.
It moves no data and knows neither ranks nor process groups.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Piece:
    """A rectangular part of a global tensor: local[...] = global[offset : offset + local.shape].

    Args:
        local: the part this rank holds, a live tensor; any dtype; may be empty.
        global_shape: shape of the whole tensor.
        offset: index of the part's first element along each dim.
    """

    local: Tensor
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]

    def __post_init__(self) -> None:
        shape = tuple(self.local.shape)
        assert len(shape) == len(self.global_shape) == len(self.offset), (shape, self.global_shape, self.offset)
        assert all(
            first >= 0 and first + length <= size
            for first, length, size in zip(self.offset, shape, self.global_shape, strict=True)
        ), f"a part of shape {shape} at {self.offset} leaves the whole of shape {self.global_shape}"
