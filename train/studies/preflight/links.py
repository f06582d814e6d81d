"""The network, link by link: what each rank receives from one other, while all do the same.

    node          the next GPU of the node: NVLink
    rail          the same GPU of the next node: its InfiniBand card, both ways
    all_to_all    every other rank of a group that shares experts, one after the other: rank r sends to r + shift

In each round all ranks send and receive at once, as in a ring or an exchange of tokens, but each receives from one rank
only: a slow link slows one receiver, and is named. One sum over all ranks follows, whose result is known.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

TRIES = 3
GPU_BYTES, CPU_BYTES = 64 * 2**20, 2**20


class Round(NamedTuple):
    """One exchange of a rank; None: it only waits for the others."""

    kind: str
    to: int | None
    source: int | None


class Link(NamedTuple):
    """What `to` received from `source`."""

    kind: str
    source: int
    to: int
    gb_per_s: float


def rounds(rank: int, world: int, *, per_node: int, group: int) -> list[Round]:
    """The exchanges of a rank, as many on every rank.

    Args:
        per_node: ranks of a node, neighbours.
        group: ranks that share experts, neighbours; the last group may be smaller.
    """
    node, local = divmod(rank, per_node)
    nodes, first = world // per_node, rank // group * group
    size = min(group, world - first)
    found = []
    if per_node > 1:
        found.append(Round("node", *(node * per_node + (local + step) % per_node for step in (1, -1))))
    if nodes > 1:
        found.append(Round("rail", *((node + step) % nodes * per_node + local for step in (1, -1))))
    for shift in range(1, min(group, world)):
        peers = [first + (rank - first + step) % size for step in (shift, -shift)] if shift < size else [None, None]
        found.append(Round("all_to_all", *peers))
    return found


def examine_links(plan: Sequence[Round], device: torch.device, at: dict[str, str]) -> list[Link]:
    """Measure a rank's rounds; a collective call.

    Args:
        at: gets the round that is under way, for whoever sees that it does not end.
    """
    rank = dist.get_rank()
    size = GPU_BYTES if device.type == "cuda" else CPU_BYTES
    sent, received = (torch.full((size,), rank % 251, dtype=torch.uint8, device=device) for _ in range(2))
    found = []
    for each in plan:
        at["round"] = f"{each.kind}, from rank {each.source}" if each.source is not None else each.kind
        # The first makes the connection.
        seconds = [_exchange(each, sent, received) for _ in range(1 + TRIES)][1:]
        if each.source is not None:
            if not bool((received == each.source % 251).all()):
                raise RuntimeError(f"what came from rank {each.source} is not what it sent")
            found.append(Link(each.kind, each.source, rank, size / min(seconds) / 1e9))
    return found


def meet(device: torch.device) -> None:
    """Leave when all have come."""
    ones = torch.ones(1, device=device)
    dist.all_reduce(ones)
    assert int(ones) == dist.get_world_size()


def _exchange(each: Round, sent: Tensor, received: Tensor) -> float:
    """Seconds until the own message has come, all ranks having begun together."""
    meet(sent.device)
    if each.to is None or each.source is None:
        return 0.0
    began = time.perf_counter()
    calls = [dist.P2POp(dist.irecv, received, each.source), dist.P2POp(dist.isend, sent, each.to)]
    works = dist.batch_isend_irecv(calls)
    # NCCL has one for both. A copy to the host ends when the message is there.
    works[0].wait()
    received[-1:].cpu()
    seconds = time.perf_counter() - began
    for work in works[1:]:
        work.wait()
    return seconds


def examine_sum(device: torch.device) -> dict[str, float]:
    """One sum over all ranks: wrong values, and the bandwidth that a ring needs for its time; a collective call."""
    world, rank = dist.get_world_size(), dist.get_rank()
    size = (GPU_BYTES if device.type == "cuda" else CPU_BYTES) // 4
    seconds, wrong = [], 0
    for _ in range(1 + TRIES):
        values = torch.full((size,), float(rank + 1), device=device)
        meet(device)
        began = time.perf_counter()
        dist.all_reduce(values)
        values[-1:].cpu()
        seconds.append(time.perf_counter() - began)
        # Whole numbers below 2^24: exact in FP32 in any order.
        wrong = max(wrong, int((values != world * (world + 1) / 2).sum()))
    return {"wrong": wrong, "gb_per_s": 2 * (world - 1) / world * 4 * size / min(seconds[1:]) / 1e9}


def examine_clock(device: torch.device) -> list[float]:
    """Wall time, seconds, each time that all ranks leave a meeting; a collective call."""
    found = []
    for _ in range(TRIES):
        meet(device)
        found.append(wall_s())
    return found


def wall_s() -> float:
    """This node's clock."""
    return time.time()
