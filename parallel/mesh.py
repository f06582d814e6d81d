"""The ranks of a run, arranged along named axes: the only file that creates process groups.

DeepSeek-V3 was trained on 16 pipeline ranks x 128 data ranks, whose experts are spread over 64 of them, with ZeRO-1
and no tensor parallelism (arXiv:2412.19437 §3.2). A `Layout` says that in numbers, a `Mesh` is one rank's view of it:

    pp    pipeline ranks of one column                       stages of the model
    dp    ranks of one stage; each sees its own tokens       dense gradients are summed here
    ep    neighbours of dp that share one copy of the experts    tokens travel here (dispatch, combine)
    edp   ranks of dp that hold the same experts             expert gradients are summed here
    tied  first and last pipeline rank of a column, when both hold a copy of the embedding

    rank = (pp_i * edp + edp_i) * ep + ep_i        dp_i = edp_i * ep + ep_i        dp = edp * ep

ep is innermost, so that neighbours lie on one node; `parallel/layout_check.py` refuses layouts that break this.

Groups are made with `new_group` and not through a DeviceMesh, because a DeviceMesh gives its groups torch's default
timeout instead of ours, makes groups of one rank, and flattens two axes only through a private method. An axis of one
rank has no group; axes with the same ranks share one. NCCL communicators form lazily, at a group's first collective,
which `make_mesh` runs at once: an unreachable peer shows here and not in the middle of the first step (those of two
pipeline neighbours form at their first message).

It moves no tensors of the model and knows nothing of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from parallel.schedules import num_stages, rank_of_stage

# As torch's own for NCCL; gloo's would be half an hour.
DEFAULT_TIMEOUT_S = 600


@dataclass(frozen=True)
class Layout:
    """How many ranks along each axis; see the module's head. Field `layout` of the configuration.

    Args:
        pp: pipeline ranks.
        dp: ranks of one pipeline stage that hold different tokens; V3: 128.
        ep: of these dp, so many neighbours share one copy of the experts; divides dp; V3: 64.
        schedule: a name of `parallel.schedules.SCHEDULES`; unused when pp is 1.
        zero: ZeRO-1, optimizer states sharded over dp (dense) and edp (experts).
        ranks_per_node: ranks joined by NVLink; rank // ranks_per_node is the node.
        stage_layers: layers of each stage; None balances them by cost.
        max_waiting_wgrads: stages' weight gradients that may wait for their slot on one rank, each with its operands;
            the oldest runs at once where a schedule would let more wait. None: as many as the schedule likes.
    Raises:
        ValueError: impossible whatever the model; the message gives the nearest layouts that work.
    Source: arXiv:2412.19437 §3.2 for the axes.
    """

    pp: int = 1
    dp: int = 1
    ep: int = 1
    schedule: str = "1F1B"
    zero: bool = True
    ranks_per_node: int = 8
    stage_layers: tuple[int, ...] | None = None
    max_waiting_wgrads: int | None = None

    def __post_init__(self) -> None:
        for field in ("pp", "dp", "ep", "ranks_per_node"):
            if getattr(self, field) < 1:
                raise ValueError(f"layout.{field}={getattr(self, field)} is too small: use 1 or more")
        if self.max_waiting_wgrads is not None and self.max_waiting_wgrads < 0:
            raise ValueError(f"layout.max_waiting_wgrads={self.max_waiting_wgrads} is negative: use 0 or more, or null")
        stages = num_stages(self.schedule, self.pp)
        if self.dp % self.ep:
            fits = [ep for ep in range(1, self.dp + 1) if self.dp % ep == 0]
            raise ValueError(
                f"layout.ep={self.ep} does not divide layout.dp={self.dp}: use "
                f"{either('layout.ep', nearest(self.ep, fits))}, or "
                f"{either('layout.dp', nearest(self.dp, multiples(self.ep, self.dp)))}"
            )
        if self.stage_layers is not None:
            self._check_stage_layers(self.stage_layers, stages)

    def _check_stage_layers(self, layers: tuple[int, ...], stages: int) -> None:
        if len(layers) != stages:
            raise ValueError(
                f"layout.stage_layers={list(layers)} names {len(layers)} stages, but layout.schedule={self.schedule} "
                f"on layout.pp={self.pp} has {stages}: give {stages} numbers, or null to balance them by cost"
            )
        if min(layers) < 1:
            raise ValueError(f"layout.stage_layers={list(layers)} leaves a stage without layers: give each 1 or more")

    @property
    def world(self) -> int:
        """Ranks in all."""
        return self.pp * self.dp

    @property
    def edp(self) -> int:
        """Replicas of each expert."""
        return self.dp // self.ep


def multiples(of: int, near: int) -> list[int]:
    """The multiples of `of` round `near`."""
    return [k * of for k in (near // of, near // of + 1) if k]


def nearest(value: int, candidates: Sequence[int]) -> list[int]:
    """The nearest candidates on either side of a value, ascending: at most two, the value itself left out."""
    below = [candidate for candidate in candidates if candidate < value]
    above = [candidate for candidate in candidates if candidate > value]
    return [*([max(below)] if below else []), *([min(above)] if above else [])]


def either(name: str, values: Sequence[int]) -> str:
    """'layout.ep=2 or 4': one sentence's list of choices."""
    return f"{name}={' or '.join(map(str, values))}"


@dataclass(frozen=True)
class Axis:
    """One rank's place on one axis of the mesh.

    Args:
        name: 'world', 'pp', 'dp', 'edp', 'ep' or 'tied'.
        size: ranks along the axis.
        rank: this rank's index among them; equals its rank in `group`.
        group: None exactly when size is 1: there is nobody to talk to.
    """

    name: str
    size: int
    rank: int
    group: dist.ProcessGroup | None

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.size, (self.name, self.rank, self.size)
        assert (self.group is None) == (self.size == 1), (self.name, self.size)


@dataclass(frozen=True)
class Mesh:
    """One rank's view of a layout; see the module's head for the axes."""

    layout: Layout
    device: torch.device
    rank: int
    world: Axis
    pp: Axis
    dp: Axis
    edp: Axis
    ep: Axis
    tied: Axis


AXES = ("world", "pp", "dp", "edp", "ep", "tied")


def axis_ranks(layout: Layout, axis: str, rank: int) -> tuple[int, ...]:
    """The global ranks on a rank's axis, ascending, which is the order along the axis.

    Args:
        layout: the arrangement.
        axis: a name of `AXES`; 'tied' as if both ends held a copy of the embedding.
        rank: global rank, 0 <= rank < layout.world.
    Returns:
        `rank` itself is among them; for 'tied' a rank between the ends is alone.
    """
    assert axis in AXES, axis
    assert 0 <= rank < layout.world, (rank, layout)
    pp_i, dp_i = divmod(rank, layout.dp)
    edp_i, ep_i = divmod(dp_i, layout.ep)
    stage = pp_i * layout.dp
    if axis == "pp":
        return tuple(range(dp_i, layout.world, layout.dp))
    if axis == "dp":
        return tuple(range(stage, stage + layout.dp))
    if axis == "edp":
        return tuple(range(stage + ep_i, stage + layout.dp, layout.ep))
    if axis == "ep":
        return tuple(range(stage + edp_i * layout.ep, stage + (edp_i + 1) * layout.ep))
    if axis == "tied":
        stages = num_stages(layout.schedule, layout.pp)
        ends = sorted({0, rank_of_stage(layout.schedule, layout.pp, stages - 1)})
        return tuple(i * layout.dp + dp_i for i in ends) if pp_i in ends else (rank,)
    return tuple(range(layout.world))


def single(device: torch.device | str) -> Mesh:
    """The mesh of one process; needs no process group and makes none."""
    alone = {axis: Axis(axis, size=1, rank=0, group=None) for axis in AXES}
    return Mesh(layout=Layout(), device=torch.device(device), rank=0, **alone)


def make_mesh(
    layout: Layout, *, device: torch.device, tied_embedding: bool, timeout_s: int = DEFAULT_TIMEOUT_S
) -> Mesh:
    """Create the process groups of a layout; every rank calls it with the same layout.

    Args:
        layout: must have as many ranks as the default group (`init_processes` made it).
        device: where this rank computes.
        tied_embedding: the first and the last stage both hold a copy of the embedding (an MTP module reads it);
            without effect where they share a rank.
        timeout_s: a collective of these groups that takes longer is an error.
    Returns:
        This rank's view.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    assert world == layout.world, f"{world} ranks for {layout}: check_world refuses this before"
    groups: dict[tuple[int, ...], dist.ProcessGroup | None] = {tuple(range(world)): dist.group.WORLD}
    axes: dict[str, Axis] = {}
    for name in AXES:
        ranks = axis_ranks(layout, name, rank)
        if name == "tied" and not tied_embedding:
            ranks = (rank,)
        else:
            _make_groups(layout, name, groups, timeout_s)
        group = groups[ranks] if len(ranks) > 1 else None
        axes[name] = Axis(name, size=len(ranks), rank=ranks.index(rank), group=group)
    if dist.get_backend() == "nccl":
        _connect(axes, device)
    return Mesh(layout=layout, device=device, rank=rank, **axes)


def _make_groups(
    layout: Layout, axis: str, groups: dict[tuple[int, ...], dist.ProcessGroup | None], timeout_s: int
) -> None:
    """Every group of an axis, on every rank in the same order, as `new_group` demands; None where not a member."""
    # The world's group exists already; to list it once for each rank would take a second on 2,048.
    for rank in range(layout.world) if axis != "world" else ():
        ranks = axis_ranks(layout, axis, rank)
        # Each group once: at its first rank.
        if rank == ranks[0] and len(ranks) > 1 and ranks not in groups:
            group = dist.new_group(list(ranks), timeout=timedelta(seconds=timeout_s), group_desc=axis)
            groups[ranks] = group if dist.get_rank() in ranks else None


def _connect(axes: dict[str, Axis], device: torch.device) -> None:
    """Form the NCCL communicators now, each with all its ranks, in one order everywhere."""
    for axis in axes.values():
        if axis.group is not None:
            dist.all_reduce(torch.zeros(1, device=device), group=axis.group)


def cpu_group(*, timeout_s: int = DEFAULT_TIMEOUT_S) -> dist.ProcessGroup | None:
    """A gloo group over all ranks for bytes in CPU memory, apart from the step's own collectives.

    A background thread may use it (a checkpoint's planning) without mixing with what the main thread sends.

    Returns:
        None without a default group or with one rank; every rank must call it.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    backend = "fake" if dist.get_backend() == "fake" else "gloo"
    group: dist.ProcessGroup = dist.new_group(backend=backend, timeout=timedelta(seconds=timeout_s), group_desc="cpu")
    return group


def init_processes(
    *,
    rank: int,
    world: int,
    backend: Literal["gloo", "nccl", "fake"],
    store: Store | None,
    timeout_s: int = DEFAULT_TIMEOUT_S,
) -> None:
    """Join the default process group; the only caller of `init_process_group`.

    No device is bound to the group: a bound one makes NCCL split the communicator of all ranks once for every group,
    members or not, about 1,300 times on 2,048 ranks. The caller sets its CUDA device before.

    Args:
        rank: this process's global rank.
        world: processes in all.
        backend: 'fake' moves no data: one process plays any rank of any world.
        store: where the ranks find each other; None only for 'fake'.
        timeout_s: a collective that takes longer is an error.
    """
    if backend == "fake":
        # Importing this registers the backend; before torch 2.13 nothing else does.
        from torch.testing._internal.distributed.fake_pg import FakeStore

        store = FakeStore()
    assert store is not None, "a real backend needs a store"
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)


def shutdown() -> None:
    """End of an orderly run: wait for all ranks, then destroy every group, newest first; no group is no error.

    Without it a thread of gloo or NCCL may outlive the interpreter and abort a process that has done its work. A
    rank that fails must not call it: it would wait for ranks that wait for it.
    """
    if not dist.is_initialized():
        return
    if dist.get_backend() == "nccl":
        dist.barrier(device_ids=[torch.cuda.current_device()])
    else:
        dist.barrier()
    dist.destroy_process_group()
