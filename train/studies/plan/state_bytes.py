"""Bytes of weights, FP8 copies, gradients, masters and moments of a rank in closed form.

Integer arithmetic on the table of weights (`train/model/sizes.py`); nothing is built. Sharded means over the data axis
(dense) or the expert-data axis (experts). A rank's share is the even one: the real cut follows bucket borders and adds
at most 127 elements of padding per parameter and 128 x ranks - 1 per bucket. Paper: arXiv:2412.19437 §3.2, §3.3.3.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

from kernels.formats import TILE, ceil_div
from train.model.sizes import BF16_BYTES, E4M3_BYTES, FP32_BYTES, Weight
from train.studies.plan.traffic import share


class Sharing(Protocol):
    """Over how many ranks states are sharded: a `Layout`, a `Candidate`."""

    @property
    def dp(self) -> int:
        """Ranks that share the states of dense parameters."""

    @property
    def edp(self) -> int:
        """Ranks that share those of experts."""

    @property
    def ep(self) -> int:
        """Ranks that share one copy of the experts."""

    @property
    def zero(self) -> bool:
        """Whether states are sharded at all."""


class StateBytes(NamedTuple):
    """Bytes that a rank holds for the whole run."""

    weights: int
    fp8_copies: int
    gradients: int
    masters: int
    moments: int


def state_bytes(
    table: Iterable[Weight],
    layout: Sharing,
    *,
    precision: str,
    dp_rank: int,
    keep_bf16_weights: bool = True,
    moment_bytes: int = BF16_BYTES,
    moments_of_matrices: int = 2,
) -> StateBytes:
    """Bytes of a rank's weights, copies, gradients and optimizer states, without padding; Muon has one moment."""
    table = tuple(table)
    masters = moments = 0
    for expert in (False, True):
        ranks = (layout.edp if expert else layout.dp) if layout.zero else 1
        # ep is the innermost axis (`parallel/mesh.py`).
        rank = (dp_rank // layout.ep if expert else dp_rank) if layout.zero else 0
        trained = [weight for weight in table if weight.trained and weight.expert == expert]
        own_master = sum(weight.elements for weight in trained if not weight.stored_fp32(precision))
        masters += FP32_BYTES * share(own_master, ranks=ranks, rank=rank)
        matrices = sum(weight.elements for weight in trained if weight.by_muon)
        twice = 2 * share(sum(weight.elements for weight in trained), ranks=ranks, rank=rank)
        moments += moment_bytes * (twice - (2 - moments_of_matrices) * share(matrices, ranks=ranks, rank=rank))
    return StateBytes(
        weights=sum(weight.bytes(precision) for weight in table if keep_bf16_weights or not weight.fp8),
        fp8_copies=sum(fp8_bytes(weight, precision) for weight in table),
        gradients=FP32_BYTES * sum(weight.elements for weight in table if weight.trained),
        masters=masters,
        moments=moments,
    )


def fp8_bytes(weight: Weight, precision: str) -> int:
    """Bytes of the E4M3 copy, of the same stored transposed, and of block scales; 0 outside the fp8 recipe."""
    if not weight.fp8 or precision != "fp8":
        return 0
    blocks = weight.copies * ceil_div(weight.rows, TILE) * ceil_div(weight.cols, TILE)
    return 2 * weight.elements * E4M3_BYTES + blocks * FP32_BYTES
