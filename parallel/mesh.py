"""The ranks of a run, arranged along named axes: the only file that creates process groups.

DeepSeek-V3 was trained on 16 pipeline ranks x 128 data ranks, whose experts are spread over 64 of them, with ZeRO-1
and no tensor parallelism (arXiv:2412.19437 §3.2). A `Layout` gives the numbers, a `Mesh` is one rank's view of it:

    pp    pipeline ranks of one column                       stages of the model
    dp    ranks of one stage; each sees its own tokens       dense gradients are summed here
    ep    neighbours of dp that share one copy of the experts    tokens travel here (dispatch, combine)
    edp   ranks of dp that hold the same experts             expert gradients are summed here
    rail  ranks of ep with one index on their nodes          a token crosses to each node that needs it
    node  ranks of ep on one node                            and is passed on there
    tied  first and last pipeline rank of a column, when both hold a copy of the embedding

    rank = (pp_i * edp + edp_i) * ep + ep_i        dp_i = edp_i * ep + ep_i        dp = edp * ep
    ep_i = rail_i * ranks_per_node + node_i, where tokens take two hops (`Layout.two_hops`)

ep is innermost, so neighbours are on one node. An axis of one rank has no group; axes with the same ranks share one.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from parallel.layout import Layout
from parallel.network import TIMEOUT_S


@dataclass(frozen=True)
class Axis:
    """One rank's view of one axis of the mesh."""

    name: str  # one of `AXES`
    size: int  # ranks along the axis
    rank: int  # this rank's index among them, equal to its rank in `group`
    group: dist.ProcessGroup | None  # None exactly when size is 1

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.size, (self.name, self.rank, self.size)
        assert (self.group is None) == (self.size == 1), (self.name, self.size)


@dataclass(frozen=True)
class Mesh:
    """One rank's view of a layout."""

    layout: Layout
    device: torch.device
    rank: int
    world: Axis
    pp: Axis
    dp: Axis
    edp: Axis
    ep: Axis
    rail: Axis
    node: Axis
    tied: Axis

    @property
    def hops(self) -> tuple[Axis, ...]:
        """What a token crosses on its way to its experts."""
        return (self.rail, self.node) if self.layout.two_hops else (self.ep,)


AXES = ("world", "pp", "dp", "edp", "ep", "rail", "node", "tied")


def axis_ranks(layout: Layout, axis: str, rank: int) -> tuple[int, ...]:
    """The global ranks on the axis of global rank `rank`, ascending, which is the order along the axis.

    'tied' is as if both ends held a copy of the embedding; a rank between them is alone, as every rank is on 'rail' and
    'node' where tokens take one hop.
    """
    assert axis in AXES, axis
    assert 0 <= rank < layout.world, (rank, layout)
    pp_i, dp_i = divmod(rank, layout.dp)
    edp_i, ep_i = divmod(dp_i, layout.ep)
    stage = pp_i * layout.dp
    if axis == "tied":
        ends = sorted({0, layout.rank_of_stage(layout.num_stages - 1)})
        return tuple(i * layout.dp + dp_i for i in ends) if pp_i in ends else (rank,)
    if axis in ("rail", "node") and not layout.two_hops:
        return (rank,)
    experts, size = stage + edp_i * layout.ep, layout.ranks_per_node
    ranges = {
        "world": range(layout.world),
        "pp": range(dp_i, layout.world, layout.dp),
        "dp": range(stage, stage + layout.dp),
        "edp": range(stage + ep_i, stage + layout.dp, layout.ep),
        "ep": range(experts, experts + layout.ep),
        "rail": range(experts + ep_i % size, experts + layout.ep, size),
        "node": range(rank - ep_i % size, rank - ep_i % size + size),
    }
    return tuple(ranges[axis])


def single(device: torch.device | str) -> Mesh:
    """The mesh of one process; needs no process group and makes none."""
    alone = {axis: Axis(axis, size=1, rank=0, group=None) for axis in AXES}
    return Mesh(layout=Layout(), device=torch.device(device), rank=0, **alone)


def make_mesh(layout: Layout, *, device: torch.device, tied_embedding: bool, timeout_s: int = TIMEOUT_S) -> Mesh:
    """Create the process groups of a layout; every rank calls it, with the same layout.

    Args:
        layout: has as many ranks as the default group (`init_processes` made it).
        device: where this rank computes.
        tied_embedding: the first and the last stage both hold a copy of the embedding (an MTP module reads it);
            without effect where they share a rank.
        timeout_s: a collective of these groups that takes longer is an error.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    assert world == layout.world, f"{world} ranks for {layout}: check_world refuses this before"
    # None where this rank is not a member.
    groups: dict[tuple[int, ...], dist.ProcessGroup | None] = {tuple(range(world)): dist.group.WORLD}
    axes: dict[str, Axis] = {}
    for name in AXES:
        is_used = name != "tied" or tied_embedding
        # Every group of the axis, on all ranks in the same order, as `new_group` demands; not through a DeviceMesh, see
        # docs/decisions/0007-parallel.md. The world's group exists already; listing it once a rank takes 1 s on 2,048.
        for first in range(world) if is_used and name != "world" else ():
            members = axis_ranks(layout, name, first)
            if first == members[0] and len(members) > 1 and members not in groups:
                made = dist.new_group(list(members), timeout=timedelta(seconds=timeout_s), group_desc=name)
                groups[members] = made if rank in members else None
        ranks = axis_ranks(layout, name, rank) if is_used else (rank,)
        group = groups[ranks] if len(ranks) > 1 else None
        axes[name] = Axis(name, size=len(ranks), rank=ranks.index(rank), group=group)
    if dist.get_backend() == "nccl":
        # Communicators form at a group's first collective: run here, an unreachable peer shows before the first step.
        # Those of two pipeline neighbours form at their first message.
        for axis in axes.values():
            if axis.group is not None:
                dist.all_reduce(torch.zeros(1, device=device), group=axis.group)
    return Mesh(layout=layout, device=device, rank=rank, **axes)


def cpu_group(*, timeout_s: int = TIMEOUT_S) -> dist.ProcessGroup | None:
    """A gloo group over all ranks, or None with one rank; every rank must call it.

    A background thread may use it (a checkpoint's planning) without mixing with what the main thread sends.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    backend = "fake" if dist.get_backend() == "fake" else "gloo"
    group: dist.ProcessGroup = dist.new_group(backend=backend, timeout=timedelta(seconds=timeout_s), group_desc="cpu")
    return group


def group_of_one() -> dist.ProcessGroup:
    """A group of this rank alone, for a library that takes None for all ranks; no other rank takes part."""
    group: dist.ProcessGroup = dist.new_group(
        [dist.get_rank()], use_local_synchronization=True, group_desc="group_of_one"
    )
    return group


def init_processes(
    *, rank: int, world: int, backend: Literal["gloo", "nccl", "fake"], store: Store | None, timeout_s: int = TIMEOUT_S
) -> None:
    """Join the default process group; the only caller of `init_process_group`.

    With backend 'fake', which moves no data and needs no store, one process plays any rank of any world.
    """
    if backend == "fake":
        # Importing this registers the backend; before torch 2.13 nothing else does.
        from torch.testing._internal.distributed.fake_pg import FakeStore

        store = FakeStore()
    assert store is not None, "a real backend needs a store"
    # No device is bound to the group: a bound one makes NCCL split the communicator of all ranks once for every group,
    # members or not, about 1,300 times on 2,048 ranks. The caller sets its CUDA device before.
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout_s))


def shutdown() -> None:
    """End of an orderly run: wait for all ranks, then destroy every group, newest first."""
    if not dist.is_initialized():
        return
    # A rank that fails must not come here: it would wait for ranks that wait for it.
    # Without this a thread of gloo or NCCL may outlive the interpreter and abort a process that has done its work.
    dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)
    dist.destroy_process_group()
