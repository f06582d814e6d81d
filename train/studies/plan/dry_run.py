"""Will it fit? One rank of a cluster, built and run for one step without memory, network or GPU.

    fake process group      this process plays any rank of any world; collectives move nothing
    fake tensors            operators allocate nothing and say what they would (`kernels/operators.py`)
    assumed routing         every expert gets the same number of tokens, every token goes to as many ranks as it can

The rank's own model, optimizer and pipeline schedule run: forward, backward, reduction, update. State is counted from
the tensors that were built, activations from what is alive during the schedule (`live_bytes.py`); FLOPs and bytes
on the wire are closed forms (`train/model/sizes.py`, `traffic.py`).

Left out: what CUDA, NCCL and the allocator take for themselves (some GB), messages to other stages that are still on
their way, the masks of `data.mask_documents`, and temporaries inside kernels. Routing is never perfectly balanced, so a
real rank needs room above the figure. The batch ramp (arXiv:2412.19437 §4.2) is shown where a pipeline (§3.2.1)
changes: at the first step, at the first one that fills it (below, ranks idle), and at the full batch.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels.formats import Quantized
from parallel.collectives import Traffic
from parallel.expert import ExpertParallelDispatcher
from parallel.grads import reduce_and_clip
from parallel.layout import Layout
from parallel.mesh import Mesh, init_processes, make_mesh
from parallel.pipeline import Pipeline
from train.assemble import assemble
from train.config import PretrainConfig
from train.losses import LossWeights
from train.model.sizes import flops_per_token, held_by, parameters, weights
from train.model.transformer import StageSpec, recompute_up_projections
from train.schedules import ScheduleConfig, scheduled_values
from train.stage import StepMetrics, build_stages, stage_specs
from train.step import Engine
from train.studies.plan.live_bytes import LiveBytes
from train.studies.plan.traffic import expected_destinations, expert_bytes, pipeline_bytes, update_bytes

GB = 1e9
# An H100 or H800 says 80 GB and has 80 GiB less what the driver keeps.
DEVICE_GB = 80.0


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    held: kept for backward at the schedule's peak. transient: above that, for a moment. dispatch: buffers of one
    exchange of a MoE layer, counted in transient too. With `optim.offload=cpu`, host: masters and moments, not in the
    total; staging: the buffers on the device through which they pass.
    """

    weights: int
    fp8_copies: int
    gradients: int
    masters: int
    moments: int
    held: int
    transient: int
    dispatch: int
    staging: int = 0
    host: int = 0

    @property
    def total(self) -> int:
        """At the highest moment of the step."""
        state = self.weights + self.fp8_copies + self.gradients + self.masters + self.moments
        state += self.staging
        return state + self.held + self.transient


def dry_run(config: PretrainConfig) -> str:
    """Plan rank `config.rank` of the configured layout; returns tables for the terminal."""
    layout = config.layout
    if not 0 <= config.rank < layout.world:
        raise ValueError(f"rank={config.rank} is not one of the {layout.world} ranks: use 0 to {layout.world - 1}")
    started = time.perf_counter()
    init_processes(rank=config.rank, world=layout.world, backend="fake", store=None)
    try:
        tied = config.model.num_nextn_predict_layers > 0
        mesh = make_mesh(layout, device=torch.device("cpu"), tied_embedding=tied)
        parts = stage_specs(config.model, mesh)
        stages = {index: nn.Identity() for index in parts}
        idle = Pipeline(stages, mesh=mesh, hidden_size=1, dtype=config.precision.dtype)
        in_flight = functools.cache(idle.most_in_flight)
        points = ramp_points(config.schedule, layout, config.run.micro_batch_sequences, in_flight)
        # The full batch's peak: more micro-batches only repeat the same round. Fewer may have more in flight, but
        # weight gradients that wait for their slot hold more than the activations that they replace, and most of them
        # wait from 2 pp - 1 micro-batches on. One more lets a receive buffer meet them.
        memory = measure(config, mesh, num_micro_batches=min(2 * layout.pp, points[-1].micro_batches))
    finally:
        dist.destroy_process_group()
    tables = [
        _position(config, mesh, parts),
        _memory_table(memory),
        _ramp_table(points),
        _work_table(config, mesh, parts.values(), points[-1]),
        [f"planned in {time.perf_counter() - started:.0f} s"],
    ]
    return "\n\n".join("\n".join(table) for table in tables)


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


def measure(config: PretrainConfig, mesh: Mesh, *, num_micro_batches: int) -> Memory:
    """Build this rank's stages of fake tensors, run one step, and count; `mesh` is of the fake process group."""
    traffic, precision = Traffic(), config.precision
    dispatcher = None
    if mesh.ep.size > 1:
        dispatcher = ExpertParallelDispatcher(
            config.model.n_routed_experts,
            mesh.ep,
            wire=precision.name,
            power_of_two=precision.power_of_two_scales,
            assume_balanced=True,
            traffic=traffic,
        )
    with FakeTensorMode(), LiveBytes() as live:
        stages = build_stages(config.model, precision, mesh, dispatcher)
        for stage in stages.values():
            if config.run.recompute:
                recompute_up_projections(stage.model)
        # The moving average is stored in CPU memory and not counted; DeepSpeed's flat memory is as large as ours.
        engine = assemble(stages, replace(config.optim, ema_decay=None, backend="native"), mesh)
        state = live.now
        gradients = sum(bucket.grad_bytes for bucket in engine.optimizer.buckets)
        optimizer = engine.optimizer.state_shards()
        masters = _storage_bytes(piece.tensor for name, piece in optimizer.items() if name.startswith("master."))
        moments = _storage_bytes(piece.tensor for name, piece in optimizer.items() if name.startswith("exp_avg"))
        live.peak = live.now
        held = _run_step(config, engine, live, num_micro_batches)
        staging = engine.optimizer.staging.num_bytes if engine.optimizer.staging else 0
        host = masters + moments if engine.optimizer.staging else 0
        copies = _storage_bytes(
            tensor for model in engine.models for parameter in model.parameters() for tensor in _fp8_copy(parameter)
        )
        peak = live.peak
    return Memory(
        weights=state - gradients - masters - moments - staging,
        fp8_copies=copies,
        gradients=gradients,
        masters=0 if host else masters,
        moments=0 if host else moments,
        held=held - state - copies,
        transient=peak - held,
        dispatch=traffic.largest_exchange,
        staging=staging,
        host=host,
    )


def _run_step(config: PretrainConfig, engine: Engine, live: LiveBytes, num_micro_batches: int) -> int:
    """Run one step of the schedule; returns the bytes alive after the forward at which most is held."""
    shape = (num_micro_batches * config.run.micro_batch_sequences, config.data.sequence_length)
    inputs = {name: torch.zeros(shape, dtype=torch.int64) for name in ("input_ids", "labels")}
    now = scheduled_values(config.schedule, step=0, tokens_seen=0)
    step = LossWeights(now.mtp_weight, now.balance_alpha, torch.ones((), dtype=torch.int64), num_sequences=1)
    metrics = StepMetrics(config.model, engine.mesh.device)
    most_held = 0

    def look(*_: object) -> None:
        nonlocal most_held
        most_held = max(most_held, live.now)

    for stage in engine.stages.values():
        stage.begin(step, metrics)
        stage.register_forward_hook(look)
    engine.optimizer.zero_grad()
    engine.pipeline.run(inputs, num_micro_batches=num_micro_batches)
    buckets, world = engine.optimizer.buckets, engine.mesh.world
    reduce_and_clip(buckets, num_targets=step.num_targets, max_norm=config.optim.clip_norm, world=world)
    engine.optimizer.step(lr=now.lr, step=1)
    return most_held


def _fp8_copy(parameter: Tensor) -> tuple[Tensor, ...]:
    if (cached := getattr(parameter, "_fp8_copy", None)) is None:
        return ()
    copy: Quantized = cached[1]
    return tuple(tensor for tensor in (copy.payload, copy.scale, copy.payload_t) if tensor is not None)


def _storage_bytes(tensors: Iterable[Tensor]) -> int:
    return sum({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def _position(config: PretrainConfig, mesh: Mesh, parts: dict[int, StageSpec]) -> list[str]:
    layout: Layout = mesh.layout
    held = held_by(config.model, parts.values())
    local = config.model.n_routed_experts // layout.ep
    first = mesh.ep.rank * local
    count = parameters(weights(config.model, held, ep=layout.ep))
    holds = "; ".join(f"stage {index}: {_layers(part)}" for index, part in parts.items())
    where = f"node {mesh.rank // layout.ranks_per_node}, pipeline rank {mesh.pp.rank} of {layout.pp}"
    dense, experts = count.dense / 1e9, count.expert / 1e9
    return [
        f"rank {mesh.rank} of {layout.world}: {where}, data rank {mesh.dp.rank} of {layout.dp}",
        f"holds {holds}; experts {first}-{first + local - 1} of {config.model.n_routed_experts}",
        f"parameters {dense + experts:.3f} B: dense {dense:.3f} B, experts {experts:.3f} B",
    ]


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
        ("total", memory.total),
    ]
    left = DEVICE_GB - memory.total / GB
    verdict = f"fits {DEVICE_GB:.0f} GB, {left:.1f} GB left" if left >= 0 else f"does not fit: {-left:.1f} GB too much"
    host = [f"{'host memory: masters and moments, pinned':<48}{memory.host / GB:>9.2f} GB"] if memory.host else []
    return [*(f"{name:<48}{size / GB:>9.2f} GB" for name, size in rows), verdict, *host]


def _ramp_table(points: list[RampPoint]) -> list[str]:
    head = f"{'batch ramp':<34}{'tokens seen':>14}{'sequences':>11}{'micro-batches':>15}{'in flight':>11}"
    rows = (
        f"{point.what:<34}{point.tokens_seen:>14.3e}{point.batch_sequences:>11}{point.micro_batches:>15}"
        f"{point.in_flight:>11}"
        for point in points
    )
    return [head, *rows]


def _work_table(config: PretrainConfig, mesh: Mesh, parts: Iterable[StageSpec], point: RampPoint) -> list[str]:
    model, layout, name = config.model, mesh.layout, config.precision.name
    held = held_by(model, parts)
    table = weights(model, held, ep=layout.ep)
    tokens = config.run.micro_batch_sequences * config.data.sequence_length
    count = point.micro_batches
    per_token = flops_per_token(model, table, held, sequence_length=config.data.sequence_length)
    destinations = expected_destinations(model, ep=layout.ep)
    to_experts = expert_bytes(model, layout, held, tokens=tokens, precision=name, destinations=destinations)
    to_stages = pipeline_bytes(model, layout, pp_rank=mesh.pp.rank, tokens=tokens, precision=name)
    lines = [
        f"one step of {point.batch_sequences} sequences on this rank:",
        f"{'FLOPs, forward and backward':<48}{sum(per_token.values()) * tokens * count / 1e12:>9.1f} TFLOP",
        *(f"{f'sent to experts, {kind}':<48}{sent * count / GB:>9.2f} GB" for kind, sent in to_experts.items()),
        f"{'sent between stages':<48}{to_stages * count / GB:>9.2f} GB",
    ]
    for axis, kinds in update_bytes(model, layout, table, precision=name).items():
        lines += [f"{f'sent over {axis}, {kind}':<48}{sent / GB:>9.2f} GB" for kind, sent in kinds.items() if sent]
    return lines
