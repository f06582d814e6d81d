"""The weights of a rank in the trainer's buckets, in closed form (`build_optimizer` of `train/assemble.py`).

A table of weights has the order of the model's parameters, so that buckets, and the shards that ranks own of them
(`parallel/buckets.py`), are those of a run to the element.
"""

from __future__ import annotations

from collections.abc import Iterable

from parallel.buckets import BUCKET_BYTES, BucketPlan, plan_buckets
from train.model.sizes import Weight

Group = tuple[Weight, ...]


def groups_of(table: Iterable[Weight], *, precision: str, tied: bool = False) -> list[Group]:
    """Trained weights that share buckets: others, linears in FP8, experts; and the embedding where it is summed apart.

    tied: another pipeline rank holds a copy of the embedding.
    """
    groups: list[list[Weight]] = [[], [], [], []]
    for weight in table:
        if weight.trained:
            is_tied = tied and weight.part == "embedding"
            groups[3 if is_tied else 2 if weight.expert else weight.fp8 and precision == "fp8"].append(weight)
    return [tuple(group) for group in groups]


def buckets_of(group: Group, *, shards: int, precision: str) -> tuple[BucketPlan[bool], ...]:
    """Its buckets; a range has the number of its weight in the group for a name."""
    sizes = ((str(index), weight.elements, weight.stored_fp32(precision)) for index, weight in enumerate(group))
    return plan_buckets(sizes, shards=shards, bucket_bytes=BUCKET_BYTES)
