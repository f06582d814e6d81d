"""E4M3 numbers and scaled tiles (arXiv:2412.19437 §3.3.2).

E4M3 (`torch.float8_e4m3fn`): 1 sign, 4 exponent, 3 mantissa bits, largest 448, smallest normal 2^-6, smallest subnormal
2^-9, no infinity, one NaN per sign. FP32 scales, one per tile (1x128) or block (128x128, weights).

Names and sizes only, which a plan reads without torch; what computes with them is in `kernels/tiles.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Tiles = TypeVar("Tiles")

E4M3_MAX = 448.0
TILE = 128


@dataclass(frozen=True)
class Quantized:
    """A tensor in FP8: value = payload * scale, the scale broadcast over its tile or block."""

    # [rows, cols] float8_e4m3fn; blocks of weights may have leading dims, [experts, rows, cols].
    payload: Tensor
    # fp32. Tiles: [ceil(cols/128), rows], as a TMA load wants them. Blocks: [..., ceil(rows/128), ceil(cols/128)].
    scale: Tensor
    # Blocks only: stored transposed, [..., cols, rows], for tensor cores that contract over contiguous elements.
    payload_t: Tensor | None = None

    def transposed_blocks(self) -> Quantized:
        """The transposed matrix: the transposed copy or a view. Only 128x128 blocks allow it, without requantising."""
        payload_t = self.payload.mT if self.payload_t is None else self.payload_t
        return Quantized(payload_t, self.scale.mT, self.payload)


@dataclass(frozen=True)
class CarriedTiles:
    """An activation in 1x128 tiles as one reader gets it, with what carries that reader's gradient back.

    FP8 is never differentiable: autograd would cast its gradient to E4M3 in silence, and 1000 would arrive as 448.
    """

    # [..., cols] in the activation's dtype, a single NaN expanded: no memory, and nothing to be read.
    carrier: Tensor
    tiles: Quantized  # payload [rows, cols]; every reader's are the same
    # Row numbers [sampled] int64 -> those rows before quantisation: for a probe.
    rows: Callable[[Tensor], Tensor]

    def flatten(self, start_dim: int, end_dim: int) -> CarriedTiles:
        """The same with fewer leading dims, as a tensor's; the tiles have none."""
        return replace(self, carrier=self.carrier.flatten(start_dim, end_dim))

    @property
    def shape(self) -> torch.Size:
        """[..., cols]."""
        return self.carrier.shape

    def dim(self) -> int:
        """Number of dims."""
        return self.carrier.dim()


class GradientTiles(Generic[Tiles]):
    """Where an operation's backward leaves the gradient of its input in tiles, for the operation before it.

    What autograd hands over meanwhile is a NaN expanded to the shape of that input, for the reason above.
    """

    def __init__(self) -> None:
        self._tiles: Tiles | None = None
        # Whether a probe looks at the operation before: only then are numbers before quantisation kept for it.
        self.watched = False

    def put(self, tiles: Tiles) -> None:
        """Leave a gradient."""
        self._tiles = tiles

    def take(self) -> Tiles:
        """The gradient that was left."""
        tiles, self._tiles = self._tiles, None
        assert tiles is not None, "no gradient was left: the operation behind did not run its backward"
        return tiles


def ceil_div(numerator: int, denominator: int) -> int:
    """Smallest integer not below numerator / denominator; `ceil_div(cols, TILE)` counts tiles."""
    return -(-numerator // denominator)
