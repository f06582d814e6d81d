"""Bytes that one rank holds in a step: its model, optimizer and schedule run on fake tensors and are counted.

State is counted from the tensors that were built, activations from what is alive during the schedule (arXiv:2412.19437
§3.2.1; `live_bytes.py`). What this leaves out: `dry_run.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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


def measure(
    config: PretrainConfig, mesh: Mesh, *, num_micro_batches: int, known: dict[StageKind, ChunkBytes] | None = None
) -> Memory:
    """Build this rank's stages of fake tensors, run one step, and count; `mesh` is of the fake process group.

    With `known` the stages of a pipeline are stand-ins: a kind that it lacks is observed and added. Without, every
    micro-batch runs through the real stages, and the figures are the same (32 micro-batches of V3: a minute).
    """
    traffic, precision = Traffic(), config.precision
    dispatcher = balanced_dispatcher(config.model, precision, mesh, traffic=traffic)
    with FakeTensorMode(), LiveBytes() as live:
        stages = build_stages(config.model, precision, mesh, dispatcher)
        for stage in stages.values():
            recompute_as_asked(stage.model, config.run.recompute)
        # The moving average is stored in CPU memory and not counted; DeepSpeed's flat memory is as large as ours.
        engine = assemble(stages, replace(config.optim, ema_decay=None, backend="native"), mesh)
        state = live.now
        parameters = [parameter for model in engine.models for parameter in model.parameters()]
        # Without BF16 weights they are part of the state, else made by the first forward.
        copies = storage_bytes(tensor for parameter in parameters for tensor in fp8_copy(parameter))
        state -= copies
        gradients = sum(bucket.grad_bytes for bucket in engine.optimizer.buckets)
        optimizer = engine.optimizer.state_shards()
        masters = storage_bytes(piece.tensor for name, piece in optimizer.items() if name.startswith("master."))
        moments = storage_bytes(piece.tensor for name, piece in optimizer.items() if not name.startswith("master."))
        step = _FakeStep(config, engine, num_micro_batches)
        stood_in = step.replace_stages(live, traffic, known) if known is not None and mesh.pp.size > 1 else []
        live.peak = live.now
        held = step.run(live)
        staging = engine.optimizer.staging.num_bytes if engine.optimizer.staging else 0
        host = sum(offload.pinned_bytes(piece.tensor) for piece in optimizer.values()) if staging else 0
        if not copies and stood_in:
            copies = sum(found.fp8_copies for found in stood_in)
        elif not copies:
            copies = storage_bytes(tensor for parameter in parameters for tensor in fp8_copy(parameter))
        peak = live.peak
    return Memory(
        weights=state - gradients - masters - moments - staging,
        fp8_copies=copies,
        gradients=gradients,
        masters=0 if host else masters,
        moments=0 if host else moments,
        held=held - state - copies,
        transient=peak - held,
        dispatch=max((found.exchange for found in stood_in), default=traffic.largest_exchange),
        staging=staging,
        host=host,
    )


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
    """One step of a rank: inputs, stages and the update."""

    def __init__(self, config: PretrainConfig, engine: Engine, num_micro_batches: int) -> None:
        self._config, self._engine, self._count = config, engine, num_micro_batches
        shape = (num_micro_batches * config.run.micro_batch_sequences, config.data.sequence_length)
        self._inputs = {name: torch.zeros(shape, dtype=torch.int64) for name in ("input_ids", "labels")}
        self._now = scheduled_values(config.schedule, step=0, tokens_seen=0)
        targets = torch.ones((), dtype=torch.int64)
        self._weights = LossWeights(self._now.mtp_weight, self._now.balance_alpha, targets, num_sequences=1)
        metrics = StepMetrics(config.model, engine.mesh.device)
        for stage in engine.stages.values():
            stage.begin(self._weights, metrics)
        self._modules: dict[int, nn.Module] = dict(engine.stages)

    def replace_stages(self, live: LiveBytes, traffic: Traffic, known: dict[StageKind, ChunkBytes]) -> list[ChunkBytes]:
        """Put stand-ins in the place of the stages; returns what they allocate."""
        config = self._config
        chunk = {name: tensor[: config.run.micro_batch_sequences] for name, tensor in self._inputs.items()}
        shape = (*chunk["input_ids"].shape, config.model.hidden_size)
        # Shapes only: the meta device has no memory.
        hidden = torch.empty(shape, dtype=Precision.of(config.precision).dtype, device="meta", requires_grad=True)
        loss = torch.empty((), dtype=torch.float32, device="meta")
        for index, stage in self._engine.stages.items():
            kind, new = StageKind.of(stage), False
            if new := kind not in known:
                known[kind] = observe(stage, hidden, chunk, live=live, traffic=traffic)
            # A stage that was observed has the copies and tables already.
            self._modules[index] = StandIn(known[kind], output=loss if kind.is_last else hidden, keeps=not new)
        return [known[StageKind.of(stage)] for stage in self._engine.stages.values()]

    def run(self, live: LiveBytes) -> int:
        """Run the schedule and the update; returns the bytes alive after the forward at which most is held."""
        config, engine, most_held = self._config, self._engine, 0

        def look(*_: object) -> None:
            nonlocal most_held
            most_held = max(most_held, live.now)

        for module in self._modules.values():
            module.register_forward_hook(look)
        engine.optimizer.zero_grad()
        dtype = Precision.of(config.precision).dtype
        pipeline = Pipeline(self._modules, mesh=engine.mesh, hidden_size=config.model.hidden_size, dtype=dtype)
        pipeline.run(self._inputs, num_micro_batches=self._count)
        buckets, targets = engine.optimizer.buckets, self._weights.num_targets
        reduce_and_clip(buckets, num_targets=targets, max_norm=config.optim.clip_norm, world=engine.mesh.world)
        engine.optimizer.step(lr=self._now.lr, step=1)
        return most_held
