"""Will it fit? The fullest rank of a cluster, built and run for one step without memory, network or GPU.

    fake process group      this process plays any rank of any world; collectives move nothing
    fake tensors            operators allocate nothing and say what they would (`kernels/operators.py`)
    assumed routing         every expert gets the same number of tokens, every token goes to as many ranks as it can

A rank's own model, optimizer and pipeline schedule run: forward, backward, reduction, update (`memory.py`). Data ranks
of one pipeline rank differ by the padding of their shares only; the fullest is found over all ranks. FLOPs and bytes on
the wire are closed forms (`train/model/sizes.py`, `traffic.py`).

Messages between stages that no micro-batch holds are the most that two neighbours allow (`moments.py`), exchanges in
flight in a pair of DualPipeV two whole ones. Routing is never perfectly balanced: what more a rank needs then, and
where it no longer fits, are differences in closed form (`footprint.py`).

Left out: what CUDA, NCCL and the allocator take for themselves (some GB) and temporaries inside kernels. Attention is
counted as cuDNN's, also with `data.mask_documents`, where flash keeps v and o as wide as q. The batch
ramp (arXiv:2412.19437 §4.2) is shown where a pipeline (§3.2.1) changes: at the first step, at the first one that fills
it (below, ranks idle), and at the full batch.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import nn

from kernels.formats import TILE
from parallel.layout import Layout
from parallel.mesh import Mesh, init_processes, make_mesh
from parallel.pipeline import Pipeline
from train.assemble import at_first
from train.config import PretrainConfig
from train.model.config import StageSpec
from train.model.precision import Precision
from train.model.sizes import flops_per_token, held_by, parameters, weights
from train.observe.sentences import few_micro_batches
from train.schedules import ScheduleConfig, scheduled_values
from train.stage import stage_specs
from train.studies import measured
from train.studies.measured import Rate, rate
from train.studies.plan.candidate import candidate_of
from train.studies.plan.footprint import IMBALANCES, RESERVED_BYTES, Footprint, breaking_imbalance, footprint, rows_at
from train.studies.plan.memory import Known, Memory, measure, share_bytes
from train.studies.plan.moments import moments_of
from train.studies.plan.traffic import destinations_by_hop, expert_bytes, pipeline_bytes, update_bytes

GB = 1e9
# An H100 or H800 says 80 GB and has 80 GiB less what the driver keeps.
DEVICE_GB = 80.0


@dataclass(frozen=True)
class RankPlan:
    """What the ranks of one pipeline rank hold.

    rank: the fullest of them, whose memory this is. ranks: all that it stands for. spread: bytes that another has less,
    at most.
    """

    rank: int
    ranks: range
    memory: Memory
    spread: int


def dry_run(config: PretrainConfig) -> str:
    """Plan the fullest rank, or the one of `config.rank`, or all kinds of ranks; returns tables for the terminal.

    Raises:
        ValueError: `config.rank` is no rank of the layout.
    """
    started, world = time.perf_counter(), config.layout.world
    known = Known()
    if isinstance(config.rank, int):
        if not 0 <= config.rank < world:
            raise ValueError(f"rank={config.rank} is not one of the {world} ranks: use 0 to {world - 1}, or all")
        tables = _tables(config, config.rank, _measured(config, config.rank, known))
    else:
        plans = [plan_pipeline_rank(config, pp_rank, known) for pp_rank in range(config.layout.pp)]
        if config.rank == "all":
            tables = [_all_table(config, plans)]
        else:
            fullest = max(plans, key=lambda plan: plan.memory.total)
            others = "rank=all shows each pipeline rank, rank=N any one"
            head = [f"the fullest of {world:,} ranks is rank {fullest.rank} ({others})"] if world > 1 else []
            tables = [head] * (world > 1) + _tables(config, fullest.rank, fullest.memory)
    tables.append([f"planned in {time.perf_counter() - started:.0f} s"])
    return "\n\n".join("\n".join(table) for table in tables)


@contextmanager
def as_rank(config: PretrainConfig, rank: int) -> Iterator[Mesh]:
    """This process plays the rank: collectives return at once, and move nothing."""
    init_processes(rank=rank, world=config.layout.world, backend="fake", store=None)
    try:
        tied = config.model.num_nextn_predict_layers > 0
        yield make_mesh(config.layout, device=torch.device("cpu"), tied_embedding=tied)
    finally:
        dist.destroy_process_group()


def plan_pipeline_rank(config: PretrainConfig, pp_rank: int, known: Known) -> RankPlan:
    """The fullest data rank of a pipeline rank; `known` as for `measure`."""
    layout = config.layout
    ranks = range(pp_rank * layout.dp, (pp_rank + 1) * layout.dp)
    with as_rank(config, ranks[0]) as mesh:
        shares = share_bytes(config, mesh)
    rank = ranks[shares.index(max(shares))]
    return RankPlan(rank, ranks, _measured(config, rank, known), max(shares) - min(shares))


def _measured(config: PretrainConfig, rank: int, known: Known) -> Memory:
    # The full batch's peak: more micro-batches only repeat the same round. Fewer may have more in flight, but weight
    # gradients that wait for their slot hold more than the activations that they replace, and most of them wait from
    # 2 pp - 1 micro-batches on. One more lets a receive buffer meet them.
    schedule, layout = config.schedule, config.layout
    full = scheduled_values(schedule, step=0, tokens_seen=schedule.batch_ramp_tokens).batch_sequences
    counts = [min(2 * layout.pp, full // layout.dp // config.run.micro_batch_sequences)]
    # While the ramp gives too few, another schedule runs; it holds most with most of them.
    counts += [layout.facts.fewest(layout.pp) - 1] if at_first(config) else []
    with as_rank(config, rank) as mesh:
        planned = [measure(config, mesh, num_micro_batches=count, known=known) for count in counts]
    memory = max(planned, key=lambda each: each.total)
    closed = _closed_form(config, rank, 1.0)
    return replace(memory, messages=round(closed.messages), in_flight=round(closed.in_flight))


def _closed_form(config: PretrainConfig, rank: int, imbalance: float) -> Footprint:
    """Of a rank's pipeline rank."""
    candidate = candidate_of(config)
    unit, schedule = candidate.dp * candidate.micro_batch_sequences, config.schedule
    counts = schedule.batch_full_sequences // unit, schedule.batch_start_sequences // unit
    found = footprint(config, candidate, moments_of(candidate, counts[0], at_first=counts[1]), imbalance=imbalance)
    return found[rank // candidate.dp]


def _tables(config: PretrainConfig, rank: int, memory: Memory) -> list[list[str]]:
    """Everything about one rank."""
    with as_rank(config, rank) as mesh:
        parts = stage_specs(config.model, mesh)
        stages = {index: nn.Identity() for index in parts}
        idle = Pipeline(stages, mesh=mesh, hidden_size=1, dtype=Precision.of(config.precision).dtype)
        in_flight = functools.cache(idle.most_in_flight)
        points = ramp_points(config.schedule, config.layout, config.run.micro_batch_sequences, in_flight)
    return [
        _position(config, mesh, parts),
        [*_memory_table(memory), *_too_long(config, rank, memory)],
        *([_imbalance_table(config, rank, memory)] if config.layout.ep > 1 else []),
        [
            *_ramp_table(points),
            *([few_micro_batches(first, config.layout.schedule)] if (first := at_first(config)) else []),
        ],
        _work_table(config, mesh, parts.values(), points[-1]),
    ]


def _all_table(config: PretrainConfig, plans: list[RankPlan]) -> list[str]:
    """One line for each pipeline rank, and a verdict on all."""
    columns = ("state", "activations", "temporary", "messages", "total")
    lines = [f"{'ranks':<13}{'pipeline rank':>13}" + "".join(f"{name:>13}" for name in columns) + f"{'of 80 GB':>13}"]
    for pp_rank, plan in enumerate(plans):
        memory = plan.memory
        messages = memory.messages + memory.in_flight
        parts = (memory.state, memory.held, memory.transient, messages, memory.total)
        sizes = "".join(f"{size(n):>13}" for n in parts)
        first, last = plan.ranks[0], plan.ranks[-1]
        left = DEVICE_GB - memory.total / GB
        verdict = f"{abs(left):.1f} GB {'left' if left >= 0 else 'over'}"
        lines.append(f"{f'{first}-{last}' if last > first else first!s:<13}{pp_rank:>13}{sizes}{verdict:>13}")
    fullest = max(plans, key=lambda plan: plan.memory.total)
    over = [len(plan.ranks) for plan in plans if plan.memory.total > DEVICE_GB * GB]
    fits = f"{sum(over):,} of {config.layout.world:,} ranks do not fit" if over else "all fit"
    lines.append(f"{fits}; the fullest is rank {fullest.rank}, whose tables are shown without rank=all")
    if spread := max(plan.spread for plan in plans):
        lines.append(f"each line is the fullest of its ranks; the others hold up to {size(spread)} less")
    return lines


def size(num_bytes: float) -> str:
    """A number of bytes in the largest unit in which it does not read 0.00."""
    return _scaled(num_bytes, ("GB", "MB", "kB", "B"), digits=2)


def _scaled(value: float, units: tuple[str, ...], *, digits: int) -> str:
    # Units from 1e9 down; what is nothing is so in the first.
    power = 1e9 if units[0] == "GB" else 1e12
    for unit in units if value else ():
        if float(f"{value / power:.{digits}f}") or unit == units[-1]:
            return f"{value / power:.{digits}f} {unit}"
        power /= 1e3
    return f"{0:.{digits}f} {units[0]}"


@dataclass(frozen=True)
class RampPoint:
    """One point of the ramp; in_flight: the most micro-batches that one rank holds, counted by stage."""

    what: str
    tokens_seen: int
    batch_sequences: int
    micro_batches: int
    in_flight: int


def ramp_points(
    schedule: ScheduleConfig, layout: Layout, micro_batch_sequences: int, most_in_flight: Callable[[int], int]
) -> list[RampPoint]:
    """First step, first step whose micro-batches fill the pipeline, first step of the full batch; equal ones are one.

    `most_in_flight` maps the micro-batches of a step to the most that a rank holds (`Pipeline.most_in_flight`).
    """

    def point(what: str, tokens_seen: int) -> RampPoint:
        batch = scheduled_values(schedule, step=0, tokens_seen=tokens_seen).batch_sequences
        count = batch // layout.dp // micro_batch_sequences
        return RampPoint(what, tokens_seen, batch, count, most_in_flight(count))

    first, last = point("first step", 0), point("full batch", schedule.batch_ramp_tokens)
    fills = last.in_flight
    points = [first]
    if first.in_flight < fills:
        # The batch grows with tokens, so halving finds the first token count with enough micro-batches.
        low, high = 0, schedule.batch_ramp_tokens
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if point("", middle).in_flight >= fills else (middle, high)
        points.append(point("pipeline full from here", high))
    if last.batch_sequences > points[-1].batch_sequences:
        points.append(last)
    return points


def _position(config: PretrainConfig, mesh: Mesh, parts: dict[int, StageSpec]) -> list[str]:
    layout: Layout = mesh.layout
    held = held_by(config.model, parts.values())
    local = config.model.n_routed_experts // layout.ep
    first = mesh.ep.rank * local
    count = parameters(weights(config.model, held, ep=layout.ep))
    holds = "; ".join(f"stage {index}: {_layers(part)}" for index, part in parts.items())
    where = f"node {mesh.rank // layout.ranks_per_node}, pipeline rank {mesh.pp.rank} of {layout.pp}"
    dense, experts = count.dense, count.expert
    return [
        f"rank {mesh.rank} of {layout.world}: {where}, data rank {mesh.dp.rank} of {layout.dp}",
        f"holds {holds}; experts {first}-{first + local - 1} of {config.model.n_routed_experts}",
        f"parameters {_billions(dense + experts)}: dense {_billions(dense)}, experts {_billions(experts)}",
    ]


def _billions(count: float) -> str:
    return f"{count / 1e9:.3f} B" if count >= 1e8 or not count else f"{count / 1e6:.3f} M"


def _layers(spec: StageSpec) -> str:
    words = [f"layers {spec.layer_ids.start}-{spec.layer_ids.stop - 1}" if len(spec.layer_ids) else "no layer"]
    if spec.is_first:
        words.insert(0, "embedding")
    if spec.is_last:
        words.append("head and MTP")
    return ", ".join(words)


def _memory_table(memory: Memory) -> list[str]:
    rows = [
        ("weights", memory.weights),
        ("FP8 copies of weights", memory.fp8_copies),
        ("FP32 gradients", memory.gradients),
        ("FP32 masters, this rank's share", memory.masters),
        ("moments, this rank's share", memory.moments),
        *([("buffers of the offloaded state", memory.staging)] if memory.host else []),
        ("activations at the schedule's peak", memory.held),
        ("temporaries above that, dispatch buffers apart", memory.transient - memory.dispatch),
        ("dispatch buffers", memory.dispatch),
        *([("messages between stages, at most", memory.messages)] if memory.messages else []),
        *([("exchanges in flight in a pair, at most", memory.in_flight)] if memory.in_flight else []),
        ("total", memory.total),
    ]
    left = DEVICE_GB - memory.total / GB
    verdict = f"fits {DEVICE_GB:.0f} GB, {left:.1f} GB left" if left >= 0 else f"does not fit: {-left:.1f} GB too much"
    host = [("host memory: pinned blocks (2^n) of that state", memory.host)] if memory.host else []
    lines = [f"{name:<48}{size(num_bytes):>12}" for name, num_bytes in (*rows, *host)]
    return [*lines[: len(rows)], verdict, *lines[len(rows) :]]


def _too_long(config: PretrainConfig, rank: int, memory: Memory) -> list[str]:
    """Where a rank does not fit: whether it could if it kept its layers' borders only, and what it takes if not."""
    if memory.total <= DEVICE_GB * GB or memory.state > DEVICE_GB * GB:
        return []
    layers = replace(config, run=replace(config.run, recompute="layers"))
    borders, tokens = _closed_form(layers, rank, 1.0).activations, config.data.sequence_length
    if memory.state + borders <= DEVICE_GB * GB:
        fewer = f"run.recompute=layers would keep the hidden states at the borders of layers only, {size(borders)}"
        return [fewer] if config.run.recompute != "layers" else []
    cure = f"this layout needs context parallelism for sequences of {tokens:,} tokens, which is not built"
    if config.run.micro_batch_sequences > 1:
        cure = f"lower run.micro_batch_sequences={config.run.micro_batch_sequences}"
    return [f"the hidden states at the borders of its layers alone take {size(borders)}: {cure}"]


def _imbalance_table(config: PretrainConfig, rank: int, memory: Memory) -> list[str]:
    """The total where this rank's experts get more than their even share of the tokens, and where that is too much."""
    even = _closed_form(config, rank, 1.0).total

    def total(of: PretrainConfig, imbalance: float) -> float:
        return memory.total + _closed_form(of, rank, imbalance).total - even

    def breaks_of(of: PretrainConfig) -> float | None:
        fits = DEVICE_GB * GB - RESERVED_BYTES
        return breaking_imbalance(of, candidate_of(of), functools.partial(total, of), limit=fits)

    verdict = f"with {RESERVED_BYTES / GB:.0f} GB for CUDA and NCCL it "
    breaks = breaks_of(config)
    if breaks is None:
        verdict += "fits even if its experts get all tokens of their group"
    elif breaks == 1.0:
        verdict += f"no longer fits {DEVICE_GB:.0f} GB however even its routing"
    else:
        verdict += f"no longer fits {DEVICE_GB:.0f} GB from {breaks:.2f} times the mean on"
    head = f"{'tokens of its experts over the mean':<48}{'total':>12}"
    lines = [head, *(f"{each:<48.1f}{size(total(config, each)):>12}" for each in IMBALANCES), verdict]
    if config.layout.max_expert_rows is not None or breaks is None or breaks == 1.0:
        return lines
    local = config.model.n_routed_experts // config.layout.ep
    rows = rows_at(config, candidate_of(config), breaks) - local * TILE
    limited = replace(config, layout=replace(config.layout, max_expert_rows=max(rows, TILE)))
    then = breaks_of(limited)
    upto = "even then" if then is None else f"up to {then:.2f} times"
    # What no longer fits with the limit either has too little room for one.
    if then is None or then > breaks:
        lines.append(
            f"layout.max_expert_rows={limited.layout.max_expert_rows} makes it fit {upto}: the same bits, slower"
        )
    return lines


def _ramp_table(points: list[RampPoint]) -> list[str]:
    head = f"{'batch ramp':<34}{'tokens seen':>14}{'sequences':>11}{'micro-batches':>15}{'in flight':>11}"
    rows = (
        f"{point.what:<34}{point.tokens_seen:>14.3e}{point.batch_sequences:>11}{point.micro_batches:>15}"
        f"{point.in_flight:>11}"
        for point in points
    )
    return [head, *rows]


def _time_lines(flops: float, known: Rate) -> list[str]:
    """How long the FLOPs take alone, without waiting for other ranks, and whose rate that is."""
    if known.tflop_per_s is None:
        return [f"time: {known.source}"]
    words = f"computing them alone, at {known.tflop_per_s:.0f} TFLOP/s"
    return [f"{words:<48}{flops / known.tflop_per_s / 1e12:>13.3g} s", f"rate: {known.source}"]


def _work_table(config: PretrainConfig, mesh: Mesh, parts: Iterable[StageSpec], point: RampPoint) -> list[str]:
    model, layout, name = config.model, mesh.layout, config.precision.name
    held = held_by(model, parts)
    table = weights(model, held, ep=layout.ep)
    tokens = config.run.micro_batch_sequences * config.data.sequence_length
    count = point.micro_batches
    per_token = flops_per_token(model, table, held, sequence_length=config.data.sequence_length)
    destinations = destinations_by_hop(model, layout)
    again = config.run.recompute == "layers"
    to_experts = expert_bytes(
        model, layout, held, tokens=tokens, precision=name, destinations=destinations, forwards=1 + again
    )
    to_stages = pipeline_bytes(model, layout, pp_rank=mesh.pp.rank, tokens=tokens, precision=name)
    work = float(sum(per_token.values()) * tokens * count)
    flops = _scaled(work, ("TFLOP", "GFLOP", "MFLOP"), digits=1)
    lines = [
        f"one step of {point.batch_sequences} sequences on this rank:",
        f"{'FLOPs, forward and backward':<48}{flops:>15}",
        *(
            [f"run.recompute=layers runs the forward of {len(held.layer_ids)} layers twice, not counted"]
            if again
            else []
        ),
        *_time_lines(work, rate(name, deterministic=config.run.deterministic, path=measured.REPORT)),
        *(f"{f'sent to experts, {kind}':<48}{size(sent * count):>12}" for kind, sent in to_experts.items()),
        f"{'sent between stages':<48}{size(to_stages * count):>12}",
    ]
    kept = config.precision.keep_bf16_weights
    for axis, kinds in update_bytes(model, layout, table, precision=name, keep_bf16_weights=kept).items():
        lines += [f"{f'sent over {axis}, {kind}':<48}{size(sent):>12}" for kind, sent in kinds.items() if sent]
    return lines
