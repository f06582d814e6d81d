"""Is a layout possible for this model, this batch and so many processes? Said before anything is allocated.

`Layout` itself refuses what no model could run. Here it meets the rest (arXiv:2412.19437 §2.1.2, §3.2, §4.2):

    experts     ep divides the routed experts: expert e lives on rank e // (experts / ep) of its expert-parallel group
    routing     node-limited routing sends a token to a few *groups* of consecutive experts; that limits nodes only
                when the ranks of a group lie on one node. V3: 8 groups on 64 ranks, 8 a node: each group is a node
    layers      every pipeline stage has at least one
    batch       a step is whole micro-batches on every data rank, at each point of the ramp: the start, the end and
                the granularity are multiples of dp x micro-batch
    schedule    has enough micro-batches where the ramp starts; later there are only more

Each refusal is one sentence with the numbers and the nearest choices that pass the same check.

Not checked: memory, speed, and whether the machines are what `ranks_per_node` says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from parallel.mesh import Layout, either, multiples, nearest
from parallel.schedules import SCHEDULES, num_stages, schedule_facts


@dataclass(frozen=True)
class Workload:
    """What a layout must carry, beside the name of the configuration's field.

    Args:
        num_layers: model.num_hidden_layers.
        n_routed_experts: model.n_routed_experts.
        n_group: model.n_group; 1 when routing is not limited by node.
        batch_start_sequences: schedule.batch_start_sequences.
        batch_full_sequences: schedule.batch_full_sequences.
        batch_multiple_sequences: schedule.batch_multiple_sequences.
        micro_batch_sequences: run.micro_batch_sequences.
    """

    num_layers: int
    n_routed_experts: int
    n_group: int
    batch_start_sequences: int
    batch_full_sequences: int
    batch_multiple_sequences: int
    micro_batch_sequences: int


def check_world(layout: Layout, world: int) -> None:
    """Refuse a number of processes that is not the layout's.

    Args:
        layout: the wanted arrangement.
        world: processes that were started.
    Raises:
        ValueError: how many to start, or which fields would fit those that were.
    """
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
    """Refuse a layout that cannot carry a workload.

    Args:
        layout: the arrangement.
        workload: model and batch in numbers.
    Raises:
        ValueError: the first check of the module's head that fails.
    """
    _check_experts(layout, workload)
    _check_routing_groups(layout, workload)
    _check_layers(layout, workload)
    _check_batch(layout, workload)
    _check_micro_batches(layout, workload)


def _expert_choices(layout: Layout, workload: Workload) -> list[int]:
    """Every ep on this dp that divides the experts and keeps routing groups on one node."""
    return [
        ep
        for ep in range(1, layout.dp + 1)
        if layout.dp % ep == 0
        and workload.n_routed_experts % ep == 0
        and not _groups_across_nodes(replace(layout, ep=ep), workload)
        and not _straddles(replace(layout, ep=ep))
    ]


def _check_experts(layout: Layout, workload: Workload) -> None:
    if workload.n_routed_experts % layout.ep:
        raise ValueError(
            f"layout.ep={layout.ep} does not divide model.n_routed_experts={workload.n_routed_experts}: "
            f"on layout.dp={layout.dp} use {_either_ep(layout, workload)}"
        )


def _either_ep(layout: Layout, workload: Workload) -> str:
    return either("layout.ep", nearest(layout.ep, _expert_choices(layout, workload)))


def _groups_across_nodes(layout: Layout, workload: Workload) -> list[tuple[int, int, int]]:
    """(group, first rank, last rank) of each routing group that touches two nodes; ep divides the experts.

    An expert-parallel group starts at a multiple of ep; where it starts within a node decides, so that equal starts
    are looked at once.
    """
    groups = workload.n_group
    if groups == 1:
        return []
    local_experts = workload.n_routed_experts // layout.ep
    experts_per_group = workload.n_routed_experts // groups
    starts: dict[int, int] = {}
    for start in range(0, layout.world, layout.ep):
        starts.setdefault(start % layout.ranks_per_node, start)
    found = []
    for start in starts.values():
        for group in range(groups):
            first = start + group * experts_per_group // local_experts
            last = start + ((group + 1) * experts_per_group - 1) // local_experts
            if first // layout.ranks_per_node != last // layout.ranks_per_node:
                found.append((group, first, last))
    return found


def _check_routing_groups(layout: Layout, workload: Workload) -> None:
    across = _groups_across_nodes(layout, workload)
    if across:
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
    """Whether an expert group that would fit a node lies on two."""
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
    """Only where the ramp starts: later steps have more."""
    start, micro = workload.batch_start_sequences, workload.micro_batch_sequences
    count = start // (layout.dp * micro)
    needed = schedule_facts(layout.schedule).min_micro_batches(layout.pp)
    if count >= needed:
        return
    choices = [f"schedule.batch_start_sequences={needed * layout.dp * micro}", f"layout.pp={count}"]
    dps = [
        dp
        for dp in range(layout.ep, layout.dp, layout.ep)
        if start % (dp * micro) == 0 and start // (dp * micro) >= needed
    ]
    choices += [f"layout.dp={dp}" for dp in dps[-1:]]
    choices += [f"layout.schedule={name}" for name, f in SCHEDULES.items() if f.min_micro_batches(layout.pp) <= count]
    raise ValueError(
        f"schedule.batch_start_sequences={start} gives each of layout.dp={layout.dp} pipelines {count} micro-batches "
        f"of run.micro_batch_sequences={micro}, but layout.schedule={layout.schedule} on layout.pp={layout.pp} needs "
        f"{needed}: use {', '.join(choices[:-1])} or {choices[-1]}"
    )
