"""How a run's ranks are arranged, and whether a model, a batch and so many processes fit the arrangement.

Three tables of numbers, from which everything else follows before anything is allocated:

    SCHEDULES   what a layout must know about a pipeline schedule of `torch.distributed.pipelining` (arXiv:2412.19437
                §3.2.1): how many stages a rank owns, which ones, how many micro-batches it takes
    Layout      ranks along each axis (§3.2); refuses what no model could run
    Workload    model and batch in numbers (§2.1.2, §4.2); `check_layout` refuses a layout that cannot carry it

Placement of stages, numbered along the forward pass:

    "loop"   stage s is on rank s mod pp                 1F1B: rank r owns stage r
    "v"      rank r owns stages r and 2 pp - 1 - r       the first and the last stage share rank 0

Each refusal is one sentence with the numbers and the nearest choices that pass the same check.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from kernels.formats import TILE


@dataclass(frozen=True)
class ScheduleFacts:
    """What a layout must know about a schedule; torch refuses fewer micro-batches than stages if it waits for all."""

    name: str
    stages_per_rank: int
    placement: Literal["loop", "v"]
    waits_for_all_stages: bool

    def min_micro_batches(self, pp: int) -> int:
        """The smallest legal number of micro-batches of one step on `pp` ranks."""
        return num_stages(self.name, pp) if self.waits_for_all_stages else 1


SCHEDULES = {
    facts.name: facts
    for facts in (
        # Schedule1F1B raises below one micro-batch a stage: its warm-up hands one to every stage.
        ScheduleFacts("1F1B", stages_per_rank=1, placement="loop", waits_for_all_stages=True),
        # ScheduleZBVZeroBubble plans for 2 pp - 1 micro-batches or more and strikes out those that do not exist:
        # any number from one is legal, below 2 pp - 1 the pipeline does not fill.
        ScheduleFacts("ZBVZeroBubble", stages_per_rank=2, placement="v", waits_for_all_stages=False),
    )
}


def schedule_facts(name: str) -> ScheduleFacts:
    """The entry of `SCHEDULES`, or a ValueError that names the nearest one."""
    if name not in SCHEDULES:
        (near,) = difflib.get_close_matches(name, SCHEDULES, n=1, cutoff=0.0)
        names = ", ".join(SCHEDULES)
        raise ValueError(
            f"layout.schedule={name} is not a pipeline schedule: did you mean layout.schedule={near}? ({names})"
        )
    return SCHEDULES[name]


def num_stages(schedule: str, pp: int) -> int:
    """Stages of the whole pipeline on `pp` ranks."""
    facts = schedule_facts(schedule)
    return facts.stages_per_rank * pp if pp > 1 else 1


def stage_ids(schedule: str, pp: int, pp_rank: int) -> tuple[int, ...]:
    """The stages of one pipeline rank, ascending."""
    assert 0 <= pp_rank < pp, (pp_rank, pp)
    return tuple(stage for stage in range(num_stages(schedule, pp)) if rank_of_stage(schedule, pp, stage) == pp_rank)


def rank_of_stage(schedule: str, pp: int, stage: int) -> int:
    """The pipeline rank that owns a stage."""
    stages = num_stages(schedule, pp)
    assert 0 <= stage < stages, (stage, stages)
    return min(stage, stages - 1 - stage) if schedule_facts(schedule).placement == "v" else stage % pp


@dataclass(frozen=True)
class Layout:
    """How many ranks along each axis (arXiv:2412.19437 §3.2); field `layout` of the configuration.

    A layout that is impossible whatever the model is a ValueError with the nearest layouts that work.
    """

    pp: int = 1  # pipeline ranks; V3: 16
    dp: int = 1  # ranks of one pipeline stage, which hold different tokens; V3: 128
    ep: int = 1  # so many neighbours of these dp share one copy of the experts; divides dp; V3: 64
    schedule: str = "1F1B"  # a name of `SCHEDULES`; unused when pp is 1
    zero: bool = True  # ZeRO-1: optimizer states sharded over dp (dense) and edp (experts)
    ranks_per_node: int = 8  # ranks joined by NVLink; rank // ranks_per_node is the node
    stage_layers: tuple[int, ...] | None = None  # layers of each stage; None balances them by cost
    # Weight gradients that may wait for their W slot on one rank, each with its operands; beyond that the oldest runs.
    max_waiting_wgrads: int | None = None
    # Rows of a rank's experts in one layer and micro-batch, beyond which they keep only their tokens and compute the
    # rest in parts, twice: the same bits in less memory, for a popular expert. None: never.
    max_expert_rows: int | None = None

    def __post_init__(self) -> None:
        for field in ("pp", "dp", "ep", "ranks_per_node"):
            if getattr(self, field) < 1:
                raise ValueError(f"layout.{field}={getattr(self, field)} is too small: use 1 or more")
        if self.max_waiting_wgrads is not None and self.max_waiting_wgrads < 0:
            raise ValueError(f"layout.max_waiting_wgrads={self.max_waiting_wgrads} is negative: use 0 or more, or null")
        if self.max_expert_rows is not None and self.max_expert_rows < TILE:
            raise ValueError(
                f"layout.max_expert_rows={self.max_expert_rows} is less than a tile of {TILE} rows: use "
                f"{TILE} or more, or null for no limit"
            )
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
    """The multiples of `of` on either side of `near`."""
    return [k * of for k in (near // of, near // of + 1) if k]


def nearest(value: int, candidates: Sequence[int]) -> list[int]:
    """The nearest candidates on either side of a value, ascending: at most two, the value itself left out."""
    below = sorted(candidate for candidate in candidates if candidate < value)
    above = sorted(candidate for candidate in candidates if candidate > value)
    return below[-1:] + above[:1]


def either(name: str, values: Sequence[int]) -> str:
    """'layout.ep=2 or 4': one sentence's list of choices."""
    return f"{name}={' or '.join(map(str, values))}"


@dataclass(frozen=True)
class Workload:
    """Model and batch in numbers, each the configuration's field of that name; n_group 1: no limit on nodes."""

    num_layers: int
    n_routed_experts: int
    n_group: int
    batch_start_sequences: int
    batch_full_sequences: int
    batch_multiple_sequences: int
    micro_batch_sequences: int


def check_world(layout: Layout, world: int) -> None:
    """Raise a ValueError unless `world` processes are the layout's; it says how many to start, or what would fit."""
    if world == layout.world:
        return
    pp = math.gcd(layout.pp, world)
    dp = world // pp
    fits = {"pp": pp, "dp": dp, "ep": math.gcd(layout.ep, dp)}
    changes = [f"layout.{field}={value}" for field, value in fits.items() if value != getattr(layout, field)]
    processes = "1 process was" if world == 1 else f"{world} processes were"
    raise ValueError(
        f"{processes} started, but layout.pp={layout.pp} x layout.dp={layout.dp} needs {layout.world}: "
        f"start {layout.world}, or set {' and '.join(changes)}"
    )


def check_layout(layout: Layout, workload: Workload) -> None:
    """Raise a ValueError at the first thing that makes a layout unable to carry a workload."""
    # Expert e is on rank e // (experts / ep) of its expert-parallel group.
    if workload.n_routed_experts % layout.ep:
        raise ValueError(
            f"layout.ep={layout.ep} does not divide model.n_routed_experts={workload.n_routed_experts}: "
            f"on layout.dp={layout.dp} use {_either_ep(layout, workload)}"
        )
    # Node-limited routing sends a token to a few groups of consecutive experts. That limits nodes only when the ranks
    # of a group are on one node; V3: 8 groups on 64 ranks, 8 a node, each group a node.
    _check_routing_groups(layout, workload)
    # Every pipeline stage has at least one layer.
    _check_layers(layout, workload)
    # A step is whole micro-batches on every data rank, at each point of the batch ramp.
    _check_batch(layout, workload)
    # The schedule has enough micro-batches where the ramp starts; later there are only more.
    _check_micro_batches(layout, workload)


def _either_ep(layout: Layout, workload: Workload) -> str:
    fits = [
        ep
        for ep in range(1, layout.dp + 1)
        if layout.dp % ep == 0
        and workload.n_routed_experts % ep == 0
        and not _groups_across_nodes(replace(layout, ep=ep), workload)
        and not _straddles(replace(layout, ep=ep))
    ]
    return either("layout.ep", nearest(layout.ep, fits))


def _groups_across_nodes(layout: Layout, workload: Workload) -> list[tuple[int, int, int]]:
    """(group, first rank, last rank) of each routing group that touches two nodes; ep divides the experts."""
    groups, node = workload.n_group, layout.ranks_per_node
    if groups == 1:
        return []
    local_experts = workload.n_routed_experts // layout.ep
    experts_per_group = workload.n_routed_experts // groups
    found = []
    # An expert-parallel group starts at a multiple of ep; only its start within a node matters, so check each once.
    for start in range(0, min(layout.world, math.lcm(layout.ep, node)), layout.ep):
        for group in range(groups):
            first = start + group * experts_per_group // local_experts
            last = start + ((group + 1) * experts_per_group - 1) // local_experts
            if first // node != last // node:
                found.append((group, first, last))
    return found


def _check_routing_groups(layout: Layout, workload: Workload) -> None:
    if across := _groups_across_nodes(layout, workload):
        group, first, last = across[0]
        raise ValueError(
            f"layout.ep={layout.ep} spreads expert group {group} of model.n_group={workload.n_group} over ranks "
            f"{first} to {last}, which lie on two nodes of layout.ranks_per_node={layout.ranks_per_node}, so that "
            f"node-limited routing would not limit nodes: use {_either_ep(layout, workload)}"
        )
    if _straddles(layout):
        raise ValueError(
            f"layout.ep={layout.ep} does not divide layout.ranks_per_node={layout.ranks_per_node}, so that some expert "
            f"groups would lie on two nodes: use {_either_ep(layout, workload)}"
        )


def _straddles(layout: Layout) -> bool:
    """Whether an expert-parallel group that would fit a node is on two."""
    node = layout.ranks_per_node
    return layout.world > node and layout.ep <= node and node % layout.ep > 0


def _check_layers(layout: Layout, workload: Workload) -> None:
    stages, layers = num_stages(layout.schedule, layout.pp), workload.num_layers
    if stages > layers:
        fewer = max(layers // schedule_facts(layout.schedule).stages_per_rank, 1)
        raise ValueError(
            f"layout.pp={layout.pp} with layout.schedule={layout.schedule} makes {stages} stages of "
            f"model.num_hidden_layers={layers}, less than one layer each: use layout.pp={fewer}"
            + (" or less" if fewer > 1 else "")
        )
    if layout.stage_layers is not None and sum(layout.stage_layers) != layers:
        gap = layers - sum(layout.stage_layers)
        raise ValueError(
            f"layout.stage_layers={list(layout.stage_layers)} sums to {sum(layout.stage_layers)}, but "
            f"model.num_hidden_layers={layers}: {'add' if gap > 0 else 'take away'} {abs(gap)}, or use null"
        )


def _check_batch(layout: Layout, workload: Workload) -> None:
    micro = workload.micro_batch_sequences
    unit = layout.dp * micro
    fields = ("batch_multiple_sequences", "batch_start_sequences", "batch_full_sequences")
    common = math.gcd(*(getattr(workload, field) for field in fields))
    dps = [dp for dp in range(layout.ep, common + 1, layout.ep) if common % (dp * micro) == 0]
    for field in fields:
        value = getattr(workload, field)
        if value % unit:
            raise ValueError(
                f"schedule.{field}={value} is not a multiple of layout.dp={layout.dp} x "
                f"run.micro_batch_sequences={micro} = {unit}, so a step would not split into micro-batches: "
                f"use {either(f'schedule.{field}', multiples(unit, value))}"
                + (f", or {either('layout.dp', nearest(layout.dp, dps))}" if dps else "")
            )


def _check_micro_batches(layout: Layout, workload: Workload) -> None:
    start, micro = workload.batch_start_sequences, workload.micro_batch_sequences
    count = start // (layout.dp * micro)
    needed = schedule_facts(layout.schedule).min_micro_batches(layout.pp)
    if count >= needed:
        return
    choices = [f"schedule.batch_start_sequences={needed * layout.dp * micro}", f"layout.pp={count}"]
    dps = range(layout.ep, layout.dp, layout.ep)
    fits = [dp for dp in dps if start % (dp * micro) == 0 and start // (dp * micro) >= needed]
    choices += [f"layout.dp={dp}" for dp in fits[-1:]]
    choices += [f"layout.schedule={name}" for name, f in SCHEDULES.items() if f.min_micro_batches(layout.pp) <= count]
    raise ValueError(
        f"schedule.batch_start_sequences={start} gives each of layout.dp={layout.dp} pipelines {count} micro-batches "
        f"of run.micro_batch_sequences={micro}, but layout.schedule={layout.schedule} on layout.pp={layout.pp} needs "
        f"{needed}: use {', '.join(choices[:-1])} or {choices[-1]}"
    )
