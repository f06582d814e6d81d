"""Where the FP8 linears show their operands, before and after quantisation, to a probe.

Scales are computed online, so whether E4M3 still fits a tensor can only be seen where it is quantised
(arXiv:2412.19437 §3.3.2). While `watching(probe)` is open, each FP8 linear that runs forward asks the probe for a
`Watch` and shows it samples of the six operands of its three GEMMs:

    x.fprop    1x128 tiles    rows       w.fprop    128x128 blocks                 y  = x @ W.T
    dy.dgrad   1x128 tiles    rows       w.dgrad    the same, stored transposed    dx = dy @ W
    dy.wgrad   128x1 tiles    columns    x.wgrad    128x1 tiles    columns         dW = dy.T @ x

The Watch is kept on autograd's context: backward and a deferred weight gradient report to the probe of their own
forward. Nothing is written or waited for, and no bit of training changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from kernels.formats import TILE, Quantized

Operand = Literal["x.fprop", "w.fprop", "dy.dgrad", "w.dgrad", "dy.wgrad", "x.wgrad"]
# Row numbers [sampled] int64 -> those rows [sampled, cols] of what a quantiser was given.
Rows = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Sample:
    """Some rows of an operand before quantisation."""

    values: Tensor  # [sampled, cols] fp32 or bf16
    rows: Tensor  # [sampled] int64, numbers in the operand; whole blocks of 128, or all rows where there are fewer
    blocks: Tensor  # [ceil(sampled/128)] int64, which blocks of 128 rows they are


class Watch(Protocol):
    """Looks at the operands of one call of one linear."""

    num_blocks: int

    def rows(self, operand: Operand, sample: Sample, quantized: Quantized) -> None:
        """An operand in 1x128 tiles: payload [rows, cols], of which `sample` holds some rows."""

    def columns(self, operand: Operand, sample: Sample, quantized: Quantized) -> None:
        """An operand in 128x1 tiles, stored transposed: payload [cols, rows]."""

    def weight(self, operand: Operand, weight: Tensor, quantized: Quantized) -> None:
        """A weight [..., out, in] and its 128x128 blocks, those of dgrad as the transposed matrix."""


class Probe(Protocol):
    """Decides which linears are watched."""

    def watch(self, weight: Tensor) -> Watch | None:
        """What looks at a call of the linear with this weight; None: nothing does."""


# The probes of the open blocks; a plain global for the reason given in `kernels/deferred.py`.
_open: list[Probe | None] = []


def current() -> Probe | None:
    """The probe of the innermost open block."""
    return _open[-1] if _open else None


@contextmanager
def watching(probe: Probe | None) -> Iterator[None]:
    """Show the operands of every FP8 linear whose forward runs inside the block to `probe`, or to none."""
    _open.append(probe)
    try:
        yield
    finally:
        _open.pop()


def watch(weight: Tensor) -> Watch | None:
    """What looks at this call of the linear with `weight`; None while no probe is open."""
    probe = current()
    return None if probe is None else probe.watch(weight)


@torch.no_grad()
def sample(rows_of: Rows, like: Tensor, group_ends: Tensor | None, *, num_blocks: int) -> Sample:
    """Take at most `num_blocks` whole blocks of 128 rows at even distances, one block the middle one.

    `like` has as many rows as the operand; with `group_ends` only rows below the last end are taken, some twice if they
    are few. If no group has a row they are padding, all zeros.
    """
    # A 128x1 tile needs 128 rows; a short last block is taken only if it is the only one.
    whole_blocks = max(len(like) // TILE, 1)
    taken = min(num_blocks, whole_blocks)
    blocks = torch.arange(taken, device=like.device)
    # Where the groups end is known to the device alone.
    blocks = (2 * blocks + 1) * (whole_blocks if group_ends is None else group_ends[-1].long() // TILE) // (2 * taken)
    within = torch.arange(min(len(like), TILE), device=like.device)
    rows = (blocks[:, None] * TILE + within).flatten()  # [sampled]
    return Sample(rows_of(rows), rows, blocks)
