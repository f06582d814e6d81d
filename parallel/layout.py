"""How a run's ranks are arranged, and whether a model, a batch and so many processes fit the arrangement.

Two tables of numbers, from which everything else follows before anything is allocated:

    Layout      ranks along each axis (arXiv:2412.19437 §3.2) and stages of each (`schedules.py`); refuses what no model
                could run
    Workload    model and batch in numbers (§2.1.2, §4.2); `check_layout` refuses a layout that cannot carry it

Each refusal is one sentence with the numbers and the nearest choices that pass the same check.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from kernels.formats import TILE
from parallel.schedules import INTERLEAVED_CHUNKS, ScheduleFacts, schedule_facts


@dataclass(frozen=True)
class Layout:
    """How many ranks along each axis (arXiv:2412.19437 §3.2); field `layout` of the configuration.

    A layout that is impossible whatever the model is a ValueError with the nearest layouts that work.
    """

    pp: int = 1  # pipeline ranks; V3: 16
    dp: int = 1  # ranks of one pipeline stage, which hold different tokens; V3: 128
    ep: int = 1  # so many neighbours of these dp share one copy of the experts; divides dp; V3: 64
    schedule: str = "1F1B"  # a name of `SCHEDULES`; unused when pp is 1
    # Stages that one pipeline rank owns; None: as many as the schedule fixes, 2 where it takes any number.
    stages_per_rank: int | None = None
    zero: bool = True  # ZeRO-1: optimizer states sharded over dp (dense) and edp (experts)
    ranks_per_node: int = 8  # ranks joined by NVLink; rank // ranks_per_node is the node
    # Layers of each stage; None balances them by cost. The first, with the embedding, and the last, with head and MTP,
    # may have none.
    stage_layers: tuple[int, ...] | None = None
    # Weight gradients that may wait for their W slot on one rank, each with its operands; beyond that the oldest runs.
    max_waiting_wgrads: int | None = None
    # direct: a token goes once to each rank of its experts; node: once to each node, and on from there (§3.2.2);
    # deepep: by DeepEP's kernels (`parallel/deepep.py`).
    dispatch: Literal["direct", "node", "deepep"] = "direct"
    # Rows of a rank's experts in one layer and micro-batch, beyond which they keep only their tokens and compute the
    # rest in parts, twice: the same bits in less memory, for a popular expert. None: never.
    max_expert_rows: int | None = None

    def __post_init__(self) -> None:
        for field in ("pp", "dp", "ep", "ranks_per_node"):
            if getattr(self, field) < 1:
                raise ValueError(f"layout.{field}={getattr(self, field)} is too small: use 1 or more")
        if self.max_waiting_wgrads is not None and self.max_waiting_wgrads < 0:
            raise ValueError(f"layout.max_waiting_wgrads={self.max_waiting_wgrads} is negative: use 0 or more, or null")
        self._check_stages_per_rank()
        if self.max_expert_rows is not None and self.max_expert_rows < TILE:
            raise ValueError(
                f"layout.max_expert_rows={self.max_expert_rows} is less than a tile of {TILE} rows: use "
                f"{TILE} or more, or null for no limit"
            )
        if self.dp % self.ep:
            fits = [ep for ep in range(1, self.dp + 1) if self.dp % ep == 0]
            raise ValueError(
                f"layout.ep={self.ep} does not divide layout.dp={self.dp}: use "
                f"{either('layout.ep', nearest(self.ep, fits))}, or "
                f"{either('layout.dp', nearest(self.dp, multiples(self.ep, self.dp)))}"
            )
        if self.stage_layers is not None:
            self._check_stage_layers(self.stage_layers)

    def _check_stages_per_rank(self) -> None:
        fixed, given = self.facts.chunks, self.stages_per_rank
        if given is None:
            return
        if given < 1 or given != (fixed or given):
            raise ValueError(
                f"layout.stages_per_rank={given} does not fit layout.schedule={self.schedule}: "
                f"use {f'{fixed}, or null' if fixed else '1 or more'}"
            )

    def _check_stage_layers(self, layers: tuple[int, ...]) -> None:
        stages = self.num_stages
        if len(layers) != stages:
            raise ValueError(
                f"layout.stage_layers={list(layers)} names {len(layers)} stages, but layout.schedule={self.schedule} "
                f"on layout.pp={self.pp} has {stages}: give {stages} numbers, or null to balance them by cost"
                + self._other_number_of_stages(len(layers))
            )
        if min(layers) < 0 or 0 in layers[1:-1]:
            raise ValueError(
                f"layout.stage_layers={list(layers)} leaves a stage without anything: only the first, which has the "
                "embedding, and the last, which has head and MTP, may have 0 layers"
            )

    def _other_number_of_stages(self, stages: int) -> str:
        chunks = stages // self.pp
        if self.pp == 1 or self.facts.chunks is not None or chunks < 1 or stages % self.pp:
            return ""
        return f", or set layout.stages_per_rank={chunks}"

    @property
    def facts(self) -> ScheduleFacts:
        """Of the schedule."""
        return schedule_facts(self.schedule)

    @property
    def chunks(self) -> int:
        """Stages that one pipeline rank owns."""
        return (self.stages_per_rank or self.facts.chunks or INTERLEAVED_CHUNKS) if self.pp > 1 else 1

    @property
    def num_stages(self) -> int:
        """Of the whole pipeline."""
        return self.pp * self.chunks

    def rank_of_stage(self, stage: int) -> int:
        """The pipeline rank that owns a stage."""
        assert 0 <= stage < self.num_stages, (stage, self.num_stages)
        return self.facts.rank_of_stage(self.pp, stage) if self.pp > 1 else 0

    def stages_of_rank(self, pp_rank: int) -> tuple[int, ...]:
        """The stages of one pipeline rank, ascending."""
        assert 0 <= pp_rank < self.pp, (pp_rank, self.pp)
        return tuple(stage for stage in range(self.num_stages) if self.rank_of_stage(stage) == pp_rank)

    @property
    def world(self) -> int:
        """Ranks in all."""
        return self.pp * self.dp

    @property
    def edp(self) -> int:
        """Replicas of each expert."""
        return self.dp // self.ep

    @property
    def two_hops(self) -> bool:
        """Whether tokens take two hops; with experts on one node, or one rank a node, one of them would be idle."""
        return self.dispatch == "node" and 1 < self.ranks_per_node < self.ep


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
        and not _splits_a_node(replace(layout, ep=ep))
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
    if _splits_a_node(layout):
        sizes = [size for size in range(1, layout.ep + 1) if layout.ep % size == 0]
        raise ValueError(
            f"layout.dispatch=node passes tokens on inside whole nodes, but layout.ep={layout.ep} is no multiple of "
            f"layout.ranks_per_node={layout.ranks_per_node}: use {_either_ep(layout, workload)}, "
            f"{either('layout.ranks_per_node', nearest(layout.ranks_per_node, sizes))}, or layout.dispatch=direct"
        )


def _straddles(layout: Layout) -> bool:
    """Whether an expert-parallel group that would fit a node is on two."""
    node = layout.ranks_per_node
    return layout.world > node and layout.ep <= node and node % layout.ep > 0


def _splits_a_node(layout: Layout) -> bool:
    """Whether tokens take two hops, and an expert-parallel group has a part of a node."""
    return layout.two_hops and layout.ep % layout.ranks_per_node > 0


def _check_layers(layout: Layout, workload: Workload) -> None:
    stages, layers = layout.num_stages, workload.num_layers
    if stages > layers and layout.stage_layers is None:
        fewer = max(layers // layout.chunks, 1)
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
    if (batch := _refused_batch(layout, workload)) is None:
        return
    micro = workload.micro_batch_sequences
    fields = [name for name in ("batch_start_sequences", "batch_full_sequences") if getattr(workload, name) == batch]
    multiple = workload.batch_multiple_sequences
    which = f"schedule.batch_multiple_sequences={multiple} makes a step of {batch} sequences, which"
    if fields:
        which = f"schedule.{fields[0]}={batch}"
    count = batch // (layout.dp * micro)
    *choices, last = _nearest_that_pass(layout, workload, fields or ["batch_multiple_sequences"])
    raise ValueError(
        f"{which} gives each of layout.dp={layout.dp} pipelines {count} micro-batches of "
        f"run.micro_batch_sequences={micro}, but layout.schedule={layout.schedule} on layout.pp={layout.pp} takes "
        f"{layout.facts.wanted(layout.pp, count)}: use {', '.join(choices)}{' or ' * bool(choices)}{last}"
    )


def _refused_batch(layout: Layout, workload: Workload) -> int | None:
    """The first batch of the ramp that no schedule on these stages takes, or the full one if the layout's does not."""
    unit, full = layout.dp * workload.micro_batch_sequences, workload.batch_full_sequences
    if layout.pp == 1:
        return None
    for batch in range(workload.batch_start_sequences, full, workload.batch_multiple_sequences):
        if layout.facts.of_step(layout.pp, batch // unit) is None:
            return batch
    return None if layout.facts.takes(layout.pp, full // unit) else full


def _nearest_that_pass(layout: Layout, workload: Workload, fields: list[str]) -> list[str]:
    """Changes under which every step of the ramp can run: of these batches, of ranks along an axis, of the schedule."""
    multiple, full = workload.batch_multiple_sequences, workload.batch_full_sequences
    # Where it is their greatest common divisor, as most of configs/schedule have it, it follows the batches.
    follows = multiple == math.gcd(workload.batch_start_sequences, full) and "batch_multiple_sequences" not in fields
    step = math.lcm(layout.dp * workload.micro_batch_sequences, 1 if follows else multiple)

    def other_batch(n: int) -> bool:
        changed = replace(workload, **dict.fromkeys(fields, n))
        both = math.gcd(changed.batch_start_sequences, changed.batch_full_sequences)
        return _passes(layout, replace(changed, batch_multiple_sequences=both) if follows else changed)

    keys: dict[str, tuple[int, range, Callable[[int], bool]]] = {
        " and ".join(f"schedule.{name}" for name in fields): (
            getattr(workload, fields[0]),
            range(step, full + 2 * layout.pp * step, step),
            other_batch,
        ),
        "layout.pp": (
            layout.pp,
            range(1, 2 * layout.pp),
            lambda n: _passes(replace(layout, pp=n, stage_layers=None), workload),
        ),
        "layout.dp": (
            layout.dp,
            range(layout.ep, layout.dp, layout.ep),
            lambda n: _passes(replace(layout, dp=n), workload),
        ),
    }
    choices = []
    for key, (now, values, passes) in keys.items():
        below = next((n for n in reversed(values) if n < now and passes(n)), None)
        above = next((n for n in values if n > now and passes(n)), None)
        if near := [n for n in (below, above) if n is not None]:
            choices.append(either(key, near))
    takes_any = replace(layout, schedule="ZBVZeroBubble", stages_per_rank=None, stage_layers=None)
    return [*choices, *(["layout.schedule=ZBVZeroBubble"] if _passes(takes_any, workload) else [])]


def _passes(layout: Layout, workload: Workload) -> bool:
    """Whether a changed layout carries a changed workload, as far as stages and batches go."""
    start, full = workload.batch_start_sequences, workload.batch_full_sequences
    if start > full or start % workload.batch_multiple_sequences or full % workload.batch_multiple_sequences:
        return False
    try:
        _check_layers(layout, workload)
        _check_batch(layout, workload)
    except ValueError:
        return False
    return _refused_batch(layout, workload) is None
