"""Will it fit? One rank of a cluster, built and run for one step without memory, network or GPU.

    fake process group      this process plays any rank of any world; collectives move nothing
    fake tensors            operators allocate nothing and say what they would (`kernels/operators.py`)
    assumed routing         every expert gets the same number of tokens, every token goes to as many ranks as it can

The rank's own model, optimizer and pipeline schedule run: forward, backward, reduction, update. State is counted from
the tensors that were built, activations from what is alive during the schedule (`live_bytes.py`); FLOPs and bytes
on the wire are closed forms (`train/model/sizes.py`, `traffic.py`).

Left out: what CUDA, NCCL and the allocator take for themselves (some GB), messages to other stages that are still on
their way, the masks of `data.mask_documents`, and temporaries inside kernels. Routing is never perfectly balanced, so a
real rank needs room above the figure.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable
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
from train.assemble import assemble, build_stages, parts_of_stages
from train.config import PretrainConfig
from train.losses import LossWeights
from train.model.sizes import flops_per_token, held_by, parameters, weights
from train.model.transformer import Part, recompute_up_projections
from train.schedules import at
from train.stage import Tally
from train.step import Engine
from train.studies.plan.live_bytes import LiveBytes
from train.studies.plan.ramp import RampPoint, ramp_points
from train.studies.plan.traffic import expected_destinations, expert_bytes, pipeline_bytes, update_bytes

GB = 1e9
# An H100 or H800 says 80 GB and has 80 GiB less what the driver keeps.
DEVICE_GB = 80.0


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    held: kept for backward when the schedule's peak is reached. transient: above that, for a moment. dispatch: the send
    and receive buffers of one exchange of a MoE layer, part of transient.
    """

    weights: int
    fp8_copies: int
    gradients: int
    masters: int
    moments: int
    held: int
    transient: int
    dispatch: int

    @property
    def total(self) -> int:
        """At the highest moment of the step."""
        state = self.weights + self.fp8_copies + self.gradients + self.masters + self.moments
        return state + self.held + self.transient


def dry_run(config: PretrainConfig) -> str:
    """Plan the configured rank of the configured layout.

    Args:
        config: `rank` says which one.
    Returns:
        A table for the terminal.
    Raises:
        ValueError: there is no such rank.
    """
    layout = config.layout
    if not 0 <= config.rank < layout.world:
        raise ValueError(f"rank={config.rank} is not one of the {layout.world} ranks: use 0 to {layout.world - 1}")
    started = time.perf_counter()
    init_processes(rank=config.rank, world=layout.world, backend="fake", store=None)
    try:
        tied = config.model.num_nextn_predict_layers > 0
        mesh = make_mesh(layout, device=torch.device("cpu"), tied_embedding=tied)
        parts = parts_of_stages(config.model, mesh)
        idle = Pipeline(
            {index: nn.Identity() for index in parts}, mesh=mesh, hidden_size=1, dtype=config.precision.dtype
        )
        points = ramp_points(
            config.schedule, layout, config.run.micro_batch_sequences, functools.cache(idle.most_in_flight)
        )
        memory = measure(config, mesh, num_micro_batches=_enough(points, layout))
    finally:
        dist.destroy_process_group()
    lines = [
        *_place(config, mesh, parts),
        "",
        *_memory_table(memory),
        "",
        *_ramp_table(points),
        "",
        *_work_table(config, mesh, parts.values(), points[-1]),
        "",
        f"planned in {time.perf_counter() - started:.0f} s",
    ]
    return "\n".join(lines)


def _enough(points: list[RampPoint], layout: Layout) -> int:
    """Micro-batches at which the full batch's peak is reached: more only repeat the same round.

    What is in flight may be most with fewer; but weight gradients that wait for their slot hold more than the
    activations that they replace, and most of them wait from 2 pp - 1 micro-batches on. One more lets a receive buffer
    meet them.
    """
    return min(2 * layout.pp, points[-1].micro_batches)


def measure(config: PretrainConfig, mesh: Mesh, *, num_micro_batches: int) -> Memory:
    """Build this rank's parts of fake tensors, run one step, and count.

    Args:
        config: of the run.
        mesh: under the fake process group.
        num_micro_batches: of the step.
    Returns:
        Memory, at the peak over the step.
    """
    traffic = Traffic()
    precision = config.precision
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
        # The moving average lives in CPU memory and is not counted.
        engine = assemble(stages, replace(config.optim, ema_decay=None), mesh)
        state = live.now
        gradients = sum(bucket.grad_bytes for bucket in engine.optimizer.buckets)
        optimizer = engine.optimizer.state_shards()
        masters = _storage_bytes(piece.tensor for name, piece in optimizer.items() if name.startswith("master."))
        moments = _storage_bytes(piece.tensor for name, piece in optimizer.items() if name.startswith("exp_avg"))
        live.peak = live.now
        held = _run_step(config, engine, live, num_micro_batches)
        copies = _storage_bytes(
            tensor for model in engine.models for parameter in model.parameters() for tensor in _fp8_copy(parameter)
        )
        peak = live.peak
    return Memory(
        weights=state - gradients - masters - moments,
        fp8_copies=copies,
        gradients=gradients,
        masters=masters,
        moments=moments,
        held=held - state - copies,
        transient=peak - held,
        dispatch=traffic.largest_exchange,
    )


def _run_step(config: PretrainConfig, engine: Engine, live: LiveBytes, num_micro_batches: int) -> int:
    """One step of the schedule on fake tensors.

    Returns:
        Bytes alive after the forward at which most is held.
    """
    shape = (num_micro_batches * config.run.micro_batch_sequences, config.data.sequence_length)
    inputs = {name: torch.zeros(shape, dtype=torch.int64) for name in ("input_ids", "labels")}
    now = at(config.schedule, step=0, tokens_seen=0)
    step = LossWeights(now.mtp_weight, now.balance_alpha, torch.ones((), dtype=torch.int64), num_sequences=1)
    tally = Tally(config.model, engine.mesh.device)
    most_held = 0

    def look(*_: object) -> None:
        nonlocal most_held
        most_held = max(most_held, live.now)

    for stage in engine.stages.values():
        stage.begin(step, tally)
        stage.register_forward_hook(look)
    engine.optimizer.zero_grad()
    engine.pipeline.run(inputs, num_micro_batches=num_micro_batches)
    reduce_and_clip(
        engine.optimizer.buckets,
        num_targets=step.num_targets,
        max_norm=config.optim.clip_norm,
        world=engine.mesh.world,
    )
    engine.optimizer.step(lr=now.lr, step=1)
    return most_held


def _fp8_copy(parameter: Tensor) -> tuple[Tensor, ...]:
    cached = getattr(parameter, "_fp8_copy", None)
    if cached is None:
        return ()
    copy: Quantized = cached[1]
    return tuple(tensor for tensor in (copy.payload, copy.scale, copy.payload_t) if tensor is not None)


def _storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages of some tensors."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _place(config: PretrainConfig, mesh: Mesh, parts: dict[int, Part]) -> list[str]:
    layout: Layout = mesh.layout
    held = held_by(config.model, parts.values())
    local = config.model.n_routed_experts // layout.ep
    first = mesh.ep.rank * local
    count = parameters(weights(config.model, held, ep=layout.ep))
    holds = [f"stage {index}: {_layers(part)}" for index, part in parts.items()]
    where = f"node {mesh.rank // layout.ranks_per_node}, pipeline rank {mesh.pp.rank} of {layout.pp}"
    dense, experts = count.dense / 1e9, count.expert / 1e9
    return [
        f"rank {mesh.rank} of {layout.world}: {where}, data rank {mesh.dp.rank} of {layout.dp}",
        f"holds {'; '.join(holds)}; experts {first}-{first + local - 1} of {config.model.n_routed_experts}",
        f"parameters {dense + experts:.3f} B: dense {dense:.3f} B, experts {experts:.3f} B",
    ]


def _layers(part: Part) -> str:
    words = [f"layers {part.layer_ids.start}-{part.layer_ids.stop - 1}" if len(part.layer_ids) else "no layer"]
    if part.begins:
        words.insert(0, "embedding")
    if part.ends:
        words.append("head and MTP")
    return ", ".join(words)


def _memory_table(memory: Memory) -> list[str]:
    rows = [
        ("weights", memory.weights),
        ("FP8 copies of weights", memory.fp8_copies),
        ("FP32 gradients", memory.gradients),
        ("FP32 masters, this rank's share", memory.masters),
        ("moments, this rank's share", memory.moments),
        ("activations at the schedule's peak", memory.held),
        ("temporaries above that, dispatch buffers apart", memory.transient - memory.dispatch),
        ("dispatch buffers", memory.dispatch),
        ("total", memory.total),
    ]
    left = DEVICE_GB - memory.total / GB
    verdict = f"fits {DEVICE_GB:.0f} GB, {left:.1f} GB left" if left >= 0 else f"does not fit: {-left:.1f} GB too much"
    return [*(f"{name:<48}{size / GB:>9.2f} GB" for name, size in rows), verdict]


def _ramp_table(points: list[RampPoint]) -> list[str]:
    head = f"{'batch ramp':<34}{'tokens seen':>14}{'sequences':>11}{'micro-batches':>15}{'in flight':>11}"
    rows = (
        f"{point.what:<34}{point.tokens_seen:>14.3e}{point.batch_sequences:>11}{point.micro_batches:>15}"
        f"{point.in_flight:>11}"
        for point in points
    )
    return [head, *rows]


def _work_table(config: PretrainConfig, mesh: Mesh, parts: Iterable[Part], point: RampPoint) -> list[str]:
    """FLOPs and bytes of one step at a point of the ramp."""
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
