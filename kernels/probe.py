"""A door through which the FP8 linears show their operands, before and after quantisation, to whoever asks.

arXiv:2412.19437 §3.3.2: scales are computed online, so whether E4M3 still fits a tensor can only be seen where it is
quantised. While a block `watching(probe)` is open, each FP8 linear that runs forward asks the probe for a `Watch` and
shows it samples of the six operands of its three GEMMs:

    x.fprop    1x128 tiles    rows       w.fprop    128x128 blocks                 y  = x @ W.T
    dy.dgrad   1x128 tiles    rows       w.dgrad    the same, stored transposed    dx = dy @ W
    dy.wgrad   128x1 tiles    columns    x.wgrad    128x1 tiles    columns         dW = dy.T @ x

The Watch is kept with the call (on autograd's context), so that backward and a weight gradient that runs later report
to the probe of their own forward, whatever a pipeline schedule runs in between. With no probe open a linear pays for
one look at an empty list. Nothing is written, drawn or waited for, so no bit of training changes.

Sampled are whole blocks of 128 rows at even distances, because a 128x1 tile needs 128 rows; of experts, only rows below
the last group's end, which is found on the device.

Not here: what is computed of the samples (`train/observe/fp8_health.py`).
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
    """Some rows of an operand before quantisation.

    Args:
        values: [sampled, cols] fp32 or bf16.
        rows: [sampled] int64, their numbers in the operand; whole blocks of 128, or all rows where there are fewer.
        blocks: [ceil(sampled/128)] int64, which blocks of 128 rows they are.
    """

    values: Tensor
    rows: Tensor
    blocks: Tensor


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
    """Decides which linears are looked at."""

    def watch(self, weight: Tensor) -> Watch | None:
        """What looks at a call of the linear with this weight; None: nothing does."""


# The probes of the open blocks; a plain global for the reason given in `kernels/deferred.py`.
_open: list[Probe] = []


@contextmanager
def watching(probe: Probe) -> Iterator[None]:
    """Show the operands of every FP8 linear whose forward runs inside the block to `probe`."""
    _open.append(probe)
    try:
        yield
    finally:
        _open.pop()


def watch(weight: Tensor) -> Watch | None:
    """What looks at this call of the linear with `weight`; None while no probe is open."""
    return _open[-1].watch(weight) if _open else None


@torch.no_grad()
def sample(rows_of: Rows, like: Tensor, group_ends: Tensor | None, *, num_blocks: int) -> Sample:
    """Take whole blocks of 128 rows at even distances, one block the middle one.

    Args:
        rows_of: gives the values of some rows.
        like: [rows, ...], the operand or a tensor of as many rows on its device.
        group_ends: [groups] int32, exclusive end rows, multiples of 128; None: one group of all rows.
        num_blocks: at most so many.
    Returns:
        Sample. Where groups have fewer blocks than were asked for some are taken twice; if no group has a row they are
        padding, all zeros. A short last block is taken only if it is the only one.
    """
    whole_blocks = max(len(like) // TILE, 1)
    taken = min(num_blocks, whole_blocks)
    blocks = torch.arange(taken, device=like.device)
    # Where the groups end is known to the device alone.
    blocks = (2 * blocks + 1) * (whole_blocks if group_ends is None else group_ends[-1].long() // TILE) // (2 * taken)
    within = torch.arange(min(len(like), TILE), device=like.device)
    rows = (blocks[:, None] * TILE + within).flatten()  # [sampled]
    return Sample(rows_of(rows), rows, blocks)
