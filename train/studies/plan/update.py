"""Seconds of an optimizer step on one pipeline rank, part by part (arXiv:2412.19437 §3.2, ZeRO-1).

    reduce gradients    FP32, over the data ranks of dense weights and the replicas of experts
    AdamW               on the rank's shard: sum, master and moments, and the new weight; or Muon's elementwise part
    Newton-Schulz       and what travels for it: `muon.py`, with `optim=muon`
    gather weights      BF16, or E4M3 for FP8 linears whose BF16 weights are not kept
    FP8 copies          of all weights of FP8 linears, also transposed

A ring over nodes of eight sends seven eighths of a buffer over NVLink and one over InfiniBand. The norm's own reads are
in AdamW's row. Nothing overlaps here: under ZeRO-1 the trainer reduces under the last backward and gathers under the
next forward, so this is an upper bound, 0.15 s of a step of 25.5 on `h800_2048`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial

from train.model.sizes import BF16_BYTES, E4M3_BYTES, FP32_BYTES, Held, Weight, weights
from train.studies.plan.muon import muon_s
from train.studies.plan.orders import SCHEDULES
from train.studies.plan.products import Setup
from train.studies.plan.traffic import gathered_bytes

# Bytes an element of a shard: the norm reads the sum; AdamW reads sum, master and two BF16 moments, and writes the last
# three (`kernels/adamw.py`).
NORM_BYTES, ADAMW_BYTES = 4, 4 + 2 * 4 + 2 * 2 * 2
# Of an element that Muon moves, an operator at a time (`train/optim/muon.py`): momentum widened, decayed, the gradient
# added, added to the gradient, rounded; then the master decayed and moved, and read for the new weight.
MUON_BYTES = (2 + 4) + 2 * 4 + 3 * 4 + 3 * 4 + (4 + 2) + 2 * 4 + 3 * 4 + 4
# Of an element of an FP8 linear: payload and transposed payload made from BF16, or the second from the first.
CAST_BYTES, TRANSPOSE_BYTES = BF16_BYTES + 2 * E4M3_BYTES, 2 * E4M3_BYTES


def update_s(setup: Setup, held: Held) -> dict[str, float]:
    """Seconds by part of a rank that holds these layers; they add up to the update."""
    candidate, memory = setup.candidate, setup.machine.memory
    table = [weight for weight in weights(setup.model, held, ep=candidate.ep) if weight.trained]
    # The copies of a bidirectional schedule are replicas like any other.
    copies = SCHEDULES[candidate.schedule].copies
    experts = [weight for weight in table if weight.expert]
    dense = [weight for weight in table if not weight.expert]
    axes = ((dense, copies * candidate.dp, 1), (experts, copies * candidate.edp, candidate.ep))
    # A precision without FP8 has nothing to keep.
    keep = candidate.keep_bf16_weights or candidate.precision != "fp8"
    travelling = partial(gathered_bytes, precision=candidate.precision, keep_bf16_weights=keep)
    parts = dict.fromkeys(("reduce gradients", "AdamW", "gather weights", "FP8 copies"), 0.0)
    for mine, ranks, stride in axes:
        elements = sum(weight.elements for weight in mine)
        shard = elements / (ranks if candidate.zero else 1)
        parts["reduce gradients"] += _ring_s(setup, FP32_BYTES * elements, ranks, stride)
        gathered = sum(map(travelling, mine)) if candidate.zero else FP32_BYTES * elements
        parts["gather weights"] += _ring_s(setup, gathered, ranks, stride)
        written = sum(_written_bytes(setup, weight) for weight in mine) / max(1, elements)
        by_muon = sum(weight.elements for weight in mine if weight.by_muon and setup.muon) / max(1, elements)
        moved = NORM_BYTES + by_muon * MUON_BYTES + (1 - by_muon) * ADAMW_BYTES
        parts["AdamW"] += shard * (moved + written) / memory
    parts["FP8 copies"] = _fp8_bytes(setup, table) / memory
    if setup.muon:
        (_, dense_ranks, _), (_, expert_ranks, _) = axes
        parts |= muon_s(setup, table, dense_ranks=dense_ranks, expert_ranks=expert_ranks)
    return parts


def _is_only_fp8(setup: Setup, weight: Weight) -> bool:
    return weight.fp8 and setup.candidate.precision == "fp8" and not setup.candidate.keep_bf16_weights


def _written_bytes(setup: Setup, weight: Weight) -> int:
    """Of the new weight; in E4M3 its master is read twice, for the blocks' maxima and to round."""
    if _is_only_fp8(setup, weight):
        return (E4M3_BYTES + 2 * FP32_BYTES) * weight.elements
    return weight.bytes(setup.candidate.precision)


def _fp8_bytes(setup: Setup, table: Iterable[Weight]) -> float:
    each = CAST_BYTES if setup.candidate.keep_bf16_weights else TRANSPOSE_BYTES
    fp8 = setup.candidate.precision == "fp8"
    return sum(weight.elements * each for weight in table if weight.fp8 and fp8)


def _ring_s(setup: Setup, num_bytes: float, ranks: int, stride: int) -> float:
    """A reduce-scatter or an all-gather of a buffer over ranks `stride` apart."""
    inside = min(ranks, max(1, setup.candidate.ranks_per_node // stride))
    outside = math.ceil(ranks / inside)
    by_nvlink = (inside - 1) / inside / setup.machine.nvlink
    by_infiniband = (outside - 1) / outside / inside / setup.machine.infiniband
    return num_bytes * (by_nvlink + by_infiniband)
