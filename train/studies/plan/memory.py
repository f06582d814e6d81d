"""Bytes that one rank holds in a step: its model, optimizer and schedule run on fake tensors and are counted.

State is counted from the tensors that were built, activations from what is alive during the schedule (arXiv:2412.19437
§3.2.1; `live_bytes.py`). What this leaves out: `dry_run.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from parallel.collectives import Traffic
from parallel.expert import ExpertParallelDispatcher
from parallel.grads import reduce_and_clip
from parallel.mesh import Mesh
from parallel.pipeline import Pipeline
from train.assemble import assemble
from train.config import PretrainConfig
from train.losses import LossWeights
from train.model.config import ModelConfig
from train.model.precision import Precision
from train.model.precision_config import PrecisionConfig
from train.model.sizes import FP32_BYTES, held_by, weights
from train.model.transformer import recompute_as_asked
from train.optim import offload
from train.optim.config import MOMENT_BYTES
from train.schedules import scheduled_values
from train.stage import StepMetrics, build_stages, stage_specs
from train.step import Engine
from train.studies.plan.bucketed import buckets_of, groups_of
from train.studies.plan.live_bytes import LiveBytes
from train.studies.plan.stand_ins import ChunkBytes, StageKind, StandIn, fp8_copy, observe, storage_bytes
from train.studies.plan.traffic import most_nodes


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    held: kept for backward at the schedule's peak. transient: above that, for a moment. dispatch: buffers of one
    exchange of a MoE layer, counted in transient too. messages: between stages; in_flight: exchanges of a pair beside
    both micro-batches; one process sees neither, and `measure` leaves them 0. With `optim.offload=cpu`, host: pinned
    blocks of masters and moments, not in the total; staging: the buffers on the device through which they pass.
    """

    weights: int
    fp8_copies: int
    gradients: int
    masters: int
    moments: int
    held: int
    transient: int
    dispatch: int
    messages: int = 0
    in_flight: int = 0
    staging: int = 0
    host: int = 0

    @property
    def state(self) -> int:
        """What is there between steps."""
        return self.weights + self.fp8_copies + self.gradients + self.masters + self.moments + self.staging

    @property
    def total(self) -> int:
        """At the highest moment of the step."""
        return self.state + self.held + self.transient + self.messages + self.in_flight


class RankBytes(NamedTuple):
    """A rank that was just built, and how far an update rises above what is there before it."""

    built: Memory
    update_rise: int


@dataclass(frozen=True)
class Known:
    """What is measured once: kinds of stages, and ranks by the kinds of their stages and their data rank."""

    stages: dict[StageKind, ChunkBytes] = field(default_factory=dict)
    ranks: dict[tuple[tuple[StageKind, ...], int], RankBytes] = field(default_factory=dict)


def measure(config: PretrainConfig, mesh: Mesh, *, num_micro_batches: int, known: Known | None = None) -> Memory:
    """Build this rank's stages of fake tensors, run one step, and count; `mesh` is of the fake process group.

    With `known` the stages of a pipeline are stand-ins, and what it lacks is built and measured first: each kind of
    stage and of rank once. Without, every micro-batch runs through the real stages, and the figures are the same (32
    micro-batches of V3: a minute).
    """
    if known is not None and mesh.pp.size > 1:
        return _measure_stand_ins(config, mesh, num_micro_batches, known)
    traffic = Traffic()
    with FakeTensorMode(), LiveBytes() as live:
        engine = _engine(config, mesh, traffic)
        built, step = _built(engine, live), _FakeStep(config, mesh, num_micro_batches)
        step.begin(engine)
        live.peak = live.now
        held = step.run(live, engine.stages)
        step.update(engine)
        # Without BF16 weights they are part of the state, else made by the first forward.
        built = replace(built, fp8_copies=_copies(engine))
        peak = live.peak
    return _with_step(built, held=held - built.state, peak=peak - built.state, dispatch=traffic.largest_exchange)


def _measure_stand_ins(config: PretrainConfig, mesh: Mesh, num_micro_batches: int, known: Known) -> Memory:
    """Run the schedule alone."""
    specs = stage_specs(config.model, mesh)
    kinds = tuple(StageKind.of(config.model, spec) for spec in specs.values())
    if (kinds, mesh.dp.rank) not in known.ranks:
        known.ranks[kinds, mesh.dp.rank] = _observe_rank(config, mesh, known)
    built, update_rise = known.ranks[kinds, mesh.dp.rank]
    found = [known.stages[kind] for kind in kinds]
    with FakeTensorMode(), LiveBytes() as live:
        step = _FakeStep(config, mesh, num_micro_batches)
        modules = {
            index: StandIn(each, output=step.loss if spec.is_last else step.hidden)
            for (index, spec), each in zip(specs.items(), found, strict=True)
        }
        live.peak = live.now
        held = step.run(live, modules)
        peak = max(live.peak, live.now + update_rise)
    # Where the state has none, stages make the copies, and keep them.
    made = 0 if built.fp8_copies else sum(each.fp8_copies for each in found)
    built = replace(built, fp8_copies=built.fp8_copies + made)
    return _with_step(built, held=held - made, peak=peak - made, dispatch=max(each.exchange for each in found))


def _observe_rank(config: PretrainConfig, mesh: Mesh, known: Known) -> RankBytes:
    """Build a rank, observe its stages of new kinds, and run the update."""
    traffic = Traffic()
    with FakeTensorMode(), LiveBytes() as live:
        engine = _engine(config, mesh, traffic)
        built, step = _built(engine, live), _FakeStep(config, mesh, 1)
        step.begin(engine)
        for stage in engine.stages.values():
            kind = StageKind.of(config.model, stage.model.spec)
            if kind not in known.stages:
                known.stages[kind] = observe(stage, step.hidden, step.inputs, live=live, traffic=traffic)
        engine.optimizer.zero_grad()
        live.peak = before = live.now
        step.update(engine)
        return RankBytes(built, live.peak - before)


def _engine(config: PretrainConfig, mesh: Mesh, traffic: Traffic) -> Engine:
    """Stages and optimizer of this rank; `traffic` counts their exchanges."""
    dispatcher = balanced_dispatcher(config.model, config.precision, mesh, traffic=traffic)
    stages = build_stages(config.model, config.precision, mesh, dispatcher)
    for stage in stages.values():
        recompute_as_asked(stage.model, config.run.recompute)
    # The moving average is stored in CPU memory and not counted; DeepSpeed's flat memory is as large as ours.
    return assemble(stages, replace(config.optim, ema_decay=None, backend="native"), mesh)


def _copies(engine: Engine) -> int:
    """Bytes of the FP8 copies that exist."""
    parameters = (parameter for model in engine.models for parameter in model.parameters())
    return storage_bytes(tensor for parameter in parameters for tensor in fp8_copy(parameter))


def _built(engine: Engine, live: LiveBytes) -> Memory:
    """What is alive when a rank has just been built, masters and moments wherever they are."""
    optimizer, copies, staging = engine.optimizer.state_shards(), _copies(engine), engine.optimizer.staging
    masters, moments = (
        storage_bytes(piece.tensor for name, piece in optimizer.items() if name.startswith("master.") == are_masters)
        for are_masters in (True, False)
    )
    gradients = sum(bucket.grad_bytes for bucket in engine.optimizer.buckets)
    buffers = staging.num_bytes if staging else 0
    return Memory(
        weights=live.now - copies - gradients - masters - moments - buffers,
        fp8_copies=copies,
        gradients=gradients,
        masters=masters,
        moments=moments,
        held=0,
        transient=0,
        dispatch=0,
        staging=buffers,
        host=sum(offload.pinned_bytes(piece.tensor) for piece in optimizer.values()) if staging else 0,
    )


def _with_step(built: Memory, *, held: int, peak: int, dispatch: int) -> Memory:
    """A rank with the most that a step holds and its highest moment, both above the state."""
    memory = replace(built, held=held, transient=peak - held, dispatch=dispatch)
    return replace(memory, masters=0, moments=0) if memory.host else memory


def balanced_dispatcher(
    model: ModelConfig, precision: PrecisionConfig, mesh: Mesh, *, traffic: Traffic | None = None
) -> ExpertParallelDispatcher | None:
    """The dispatcher of a run, for fake tensors: as if routing were perfectly even; None with one expert rank."""
    if mesh.ep.size == 1:
        return None
    return ExpertParallelDispatcher(
        model.n_routed_experts,
        mesh.ep,
        hops=mesh.hops,
        wire=precision.wire,
        power_of_two=precision.power_of_two_scales,
        assume_balanced=True,
        most_nodes=most_nodes(model),
        traffic=traffic,
    )


def share_bytes(config: PretrainConfig, mesh: Mesh) -> list[int]:
    """Bytes of masters and moments on each data rank's device, for this pipeline rank; they differ by padding.

    With `optim.offload=cpu` of the buffers through which they pass: they differ by where the longest shard is cut.
    """
    layout, name, moment = config.layout, config.precision.name, MOMENT_BYTES[config.optim.moments_dtype]
    held = held_by(config.model, stage_specs(config.model, mesh).values())
    table = weights(config.model, held, ep=layout.ep)
    sizes: list[list[tuple[int, int, bool]]] = [[] for _ in range(layout.dp)]
    for group in groups_of(table, precision=name, tied=mesh.tied.size > 1):
        # Data ranks that hold the same experts are `ep` apart.
        ranks, apart = (layout.edp, layout.ep) if any(weight.expert for weight in group) else (layout.dp, 1)
        ranks = ranks if layout.zero else 1
        for bucket in buckets_of(group, shards=ranks, precision=name):
            for dp_rank, of_rank in enumerate(sizes):
                for each, start, stop in bucket.owned(dp_rank // apart % ranks, shards=ranks):
                    weight = group[int(each.name)]
                    count = config.optim.moments_of_matrices if weight.by_muon else 2
                    of_rank.append((max(0, stop - start), count, bucket.dtype))
    if config.optim.offload == "cpu":
        longest = (max((elements for elements, *_ in of_rank), default=0) for of_rank in sizes)
        return [2 * min(offload.SEGMENT_ELEMENTS, each) * (FP32_BYTES + 2 * moment) for each in longest]
    return [
        sum(elements * (count * moment + (0 if is_own else FP32_BYTES)) for elements, count, is_own in of_rank)
        for of_rank in sizes
    ]


class _FakeStep:
    """One step of a rank: inputs, schedule and update."""

    def __init__(self, config: PretrainConfig, mesh: Mesh, num_micro_batches: int) -> None:
        self._config, self._mesh, self._count = config, mesh, num_micro_batches
        shape = (num_micro_batches * config.run.micro_batch_sequences, config.data.sequence_length)
        self.inputs = {name: torch.zeros(shape, dtype=torch.int64) for name in ("input_ids", "labels")}
        self._now = scheduled_values(config.schedule, step=0, tokens_seen=0)
        targets = torch.ones((), dtype=torch.int64)
        self._weights = LossWeights(self._now.mtp_weight, self._now.balance_alpha, targets, num_sequences=1)
        self._metrics = StepMetrics(config.model, mesh.device)
        # What leaves a stage, of one micro-batch. Shapes only: the meta device has no memory.
        self._dtype = Precision.of(config.precision).dtype
        travels = (config.run.micro_batch_sequences, config.data.sequence_length, config.model.hidden_size)
        self.hidden = torch.empty(travels, dtype=self._dtype, device="meta", requires_grad=True)
        self.loss = torch.empty((), dtype=torch.float32, device="meta")

    def begin(self, engine: Engine) -> None:
        """Before a stage runs."""
        for stage in engine.stages.values():
            stage.begin(self._weights, self._metrics)
        engine.optimizer.zero_grad()

    def run(self, live: LiveBytes, modules: Mapping[int, nn.Module]) -> int:
        """Run the schedule on these stages; returns the bytes alive after the forward at which most is held."""
        most_held = 0

        def look(*_: object) -> None:
            nonlocal most_held
            most_held = max(most_held, live.now)

        for module in modules.values():
            module.register_forward_hook(look)
        hidden_size = self._config.model.hidden_size
        pipeline = Pipeline(modules, mesh=self._mesh, hidden_size=hidden_size, dtype=self._dtype)
        pipeline.run(self.inputs, num_micro_batches=self._count)
        return most_held

    def update(self, engine: Engine) -> None:
        """Reduce, clip and move the weights."""
        buckets, targets = engine.optimizer.buckets, self._weights.num_targets
        reduce_and_clip(buckets, num_targets=targets, max_norm=self._config.optim.clip_norm, world=self._mesh.world)
        engine.optimizer.step(lr=self._now.lr, step=1)
