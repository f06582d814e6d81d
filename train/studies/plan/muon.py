"""Seconds of Muon's whole matrices on one pipeline rank (arXiv:2502.16982 §2.3; `parallel/matrices.py`).

    Newton-Schulz    of the rank of each axis that has most to compute: BF16 products at measured speeds, and what is
                     elementwise at the memory's rate, copies into and out of whole matrices apart; without ZeRO of all
                     matrices
    matrices         FP32 elements that their owner does not hold, there and back

Buckets, shards and owners are found by the trainer's own functions of the sizes (`parallel/buckets.py`). Nothing
overlaps here, while in the trainer a matrix arrives under the computation of the one before.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from parallel.buckets import owners
from train.model.sizes import FP32_BYTES, Weight
from train.optim.newton_schulz import STEPS, orthogonalize_flops, products_of_step
from train.studies.plan.bucketed import Group, buckets_of, groups_of
from train.studies.plan.products import Setup, product_s

# Of an element, beside the products: the norm reads it; divided, rounded to BF16, back to FP32 and scaled, it is read
# and written (`orthogonalize`, `rms_matched` of `train/optim/muon.py`).
ELEMENTWISE_BYTES = 4 + (4 + 4) + (4 + 2) + (2 + 4) + (4 + 4)


@dataclass(frozen=True)
class RankShare:
    """[rows, cols] of the matrices that a rank of an axis computes, and elements that it sends, there and back."""

    matrices: tuple[tuple[int, int], ...]
    sent: int


@functools.cache
def shares(group: Group, *, ranks: int, precision: str) -> list[RankShare]:
    """Of each rank of an axis that shards the weights of a group."""
    places = {
        int(each.name): (each.start, bucket.numel // ranks)
        for bucket in buckets_of(group, shards=ranks, precision=precision)
        for each in bucket.ranges
    }
    matrices: list[tuple[int, int]] = []
    held: list[dict[int, int]] = []
    for index, weight in enumerate(group):
        start, length = places[index]
        for rows, cols in weight.matrices() if weight.by_muon else ():
            stop = start + rows * cols
            matrices.append((rows, cols))
            held.append(dict(_held(start, stop, length)))
            start = stop
    chosen = owners([orthogonalize_flops(*each) for each in matrices], held, ranks=ranks)
    sent: Counter[int] = Counter()
    for owner, by_rank in zip(chosen, held, strict=True):
        for rank, elements in by_rank.items():
            if rank != owner:
                sent[rank] += elements
                sent[owner] += elements
    return [
        RankShare(tuple(each for each, owner in zip(matrices, chosen, strict=True) if owner == rank), sent[rank])
        for rank in range(ranks)
    ]


def _held(start: int, stop: int, length: int) -> Iterator[tuple[int, int]]:
    """Shards of so many elements, with how many of a range each holds."""
    for rank in range(start // length, (stop - 1) // length + 1):
        yield rank, min(stop, (rank + 1) * length) - max(start, rank * length)


def newton_schulz_s(setup: Setup, rows: int, cols: int) -> float:
    """One matrix, on all multiprocessors."""
    products = sum(product_s(setup, "fprop", (1, *each), column="bf16") for each in products_of_step(rows, cols))
    return STEPS * products + ELEMENTWISE_BYTES * rows * cols / setup.machine.memory


def muon_s(setup: Setup, table: Sequence[Weight], *, dense_ranks: int, expert_ranks: int) -> dict[str, float]:
    """Seconds by part of a rank that holds these weights; axes one after the other, as in the trainer."""
    candidate = setup.candidate
    matrix_s = functools.cache(functools.partial(newton_schulz_s, setup))
    parts = dict.fromkeys(("Newton-Schulz", "matrices, there and back"), 0.0)
    # Experts on their own axis; each group is balanced alone.
    for group in groups_of(table, precision=candidate.precision):
        is_expert = any(weight.expert for weight in group)
        ranks, stride = (expert_ranks, candidate.ep) if is_expert else (dense_ranks, 1)
        found = shares(group, ranks=ranks if candidate.zero else 1, precision=candidate.precision)
        parts["Newton-Schulz"] += max(sum(matrix_s(*each) for each in share.matrices) for share in found)
        sent_bytes = FP32_BYTES * max(share.sent for share in found)
        parts["matrices, there and back"] += sent_bytes * _byte_s(setup, ranks, stride)
    return parts


def _byte_s(setup: Setup, ranks: int, stride: int) -> float:
    """Of what goes to each other rank of an axis alike, ranks that are `stride` apart."""
    if ranks == 1:
        return 0.0
    inside = min(ranks, max(1, setup.candidate.ranks_per_node // stride))
    by_nvlink = (inside - 1) / (ranks - 1) / setup.machine.nvlink
    return by_nvlink + (ranks - inside) / (ranks - 1) / setup.machine.infiniband
