"""From the ranks' summed gradients to clipped mean gradients (arXiv:2412.19437 §4.2).

Losses are sums, so `main_grad` arrives as the sum over this rank's targets of the step. Over N main-model targets of
all ranks:

    g <- (sum over ranks of g) / N * min(1, max_norm / (|g / N| + 1e-6))

Sum, then divide once: every gradient has the same weight per target, however unevenly targets are spread over ranks and
micro-batches. Experts too: their gradients hold the tokens of the whole expert group already, are summed over the
expert-data axis only, and are divided by the same N. Dividing late keeps small numbers out of the FP8 backward: divided
by 6e7 before, activation gradients would vanish. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import deferred
from kernels.grad_norm import sums_of_squares
from parallel.collectives import sum_over, texts_of
from parallel.mesh import Axis
from parallel.zero import GradientBuckets

# As torch.nn.utils.clip_grad_norm_ guards its division, so that both clip alike.
_CLIP_EPS = 1e-6
# Parameters that a rank names when their gradients are not finite.
NAMED = 8


@dataclass(frozen=True)
class GradNorm:
    """Global L2 norm before clipping, 0-d fp32, and whether it is finite, 0-d bool; the same on every rank."""

    norm: Tensor
    finite: Tensor


@dataclass(frozen=True)
class NonFinite:
    """A parameter whose gradient has `elements` that are not finite on `rank`, which made them; None: some rank did."""

    rank: int | None
    tensor: str
    elements: int


@torch.no_grad()
def reduce_and_clip(
    buckets: Sequence[GradientBuckets], *, num_targets: Tensor | int, max_norm: float, world: Axis
) -> GradNorm:
    """Sum every gradient over its axis, divide by the number of targets and clip the global norm, in place.

    When the norm is not finite the sums are neither divided nor clipped: the caller skips the step and can log them.

    Args:
        buckets: all gradients of this rank; the same kinds in the same order on every rank of an axis.
        num_targets: N, equal on all ranks; 0 counts as 1.
        max_norm: 1.0 in the report.
        world: all ranks of the run.
    """
    deferred.check_drained()
    for bucket in buckets:
        bucket.reduce()
    norm = _global_norm(buckets, world)  # []
    targets = torch.as_tensor(num_targets, device=norm.device).clamp(min=1).to(torch.float32)  # []
    norm = norm / targets
    finite = torch.isfinite(norm)  # []
    clip = torch.clamp(max_norm / (norm + _CLIP_EPS), max=1.0)  # []
    # Times one leaves every bit as it is, infinities and NaNs included.
    factor = torch.where(finite, clip / targets, torch.ones_like(clip))
    for bucket in buckets:
        bucket.scale(factor)
    return GradNorm(norm=norm, finite=finite)


def nonfinite_gradients(buckets: Sequence[GradientBuckets], world: Axis, *, device: torch.device) -> list[NonFinite]:
    """After `reduce_and_clip` found a norm that is not finite: which gradients are not, and whose; waits.

    A NaN spreads by the sum over ranks. Under ZeRO the ranks' own sums are still there but for the shard that each
    owns, so ranks are named that have some of their own; the owners of the sums where none does. Costs one pass over
    the gradients and one collective, on such a step only.

    Returns:
        The same on every rank: at most NAMED for each rank, those of the lowest ranks first.
    """
    # A rank's own first: they say whose fault it is, and there is room for few.
    found = sorted((entry for bucket in buckets for entry in bucket.nonfinite()), key=lambda entry: not entry[1])
    sharded = {name: bucket.sharded for bucket in buckets for name in bucket.parameters}
    lines = [f"{name} {here} {summed} {int(here > 0 or sharded[name])}" for name, here, summed in found]
    texts = texts_of("\n".join(lines[:NAMED]), world, device=device)
    reports = []
    for rank, text in enumerate(texts):
        for line in text.splitlines():
            fields = line.split()
            # The last line may be cut.
            if len(fields) == 4:
                reports.append((rank, fields[0], int(fields[1]), int(fields[2]), fields[3] == "1"))
    some_have_own = any(here for _, _, here, _, _ in reports)
    return [
        NonFinite(rank if is_known else None, name, here + summed)
        for rank, name, here, summed, is_known in reports
        if here or not some_have_own
    ]


def _global_norm(buckets: Sequence[GradientBuckets], world: Axis) -> Tensor:
    """L2 norm over all gradients of all ranks, [] fp32; each parameter counts once, by the rank that owns it."""
    # A rank may own nothing but padding, so its shards do not show the device; it has parameters nevertheless.
    device = next((p.device for bucket in buckets for p in bucket.parameters.values()), None)
    assert device is not None, "no trained parameter: there is nothing to clip"
    shards = [shard for bucket in buckets for shard in bucket.norm_shards()]
    parts = [torch.zeros(1, dtype=torch.float64, device=device), *map(sums_of_squares, shards)]
    return sum_over(torch.cat(parts).sum(), world).sqrt().to(torch.float32)
