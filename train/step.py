"""One optimizer step on this rank: losses and gradients over all micro-batches, then the update.

    sum the numbers of targets over ranks -> N                         one small collective
    for each micro-batch: forward -> sums of losses -> backward        `parallel/pipeline.py`; sums, never means
      sums over ranks begin under the last backward                    `parallel/early_reduction.py`
    wait for all sums, divide by N, norm, clip                         `parallel/grads.py`
    AdamW on this rank's share; new weights to every rank              `train/optim/adamw.py`, or muon.py
      heads whose logits grew too large are clipped under it           `train/optim/qk_clip.py`
    b_i += gamma * sign(mean load - load_i)                            `train/optim/balance.py`, loads of all ranks

The caller reads one tensor in between: all ranks skip the update of a step whose gradients are not finite, or whose
loss is no part of the run. One thing waits for the device inside a step, under expert parallelism only: a read of
counts per MoE layer and micro-batch (docs/parallelism.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.fp8_linear import has_numbers
from parallel.collectives import sum_over
from parallel.early_reduction import EarlyReduction
from parallel.grads import reduce_and_clip
from parallel.mesh import Mesh
from parallel.pipeline import Pipeline
from parallel.shards import LocalShard
from train.data.batch import Batch
from train.losses import LossWeights
from train.model.transformer import Transformer
from train.observe.fp8_health import Fp8Health
from train.optim.adamw import AdamW
from train.optim.balance import update_biases
from train.optim.ema import Ema
from train.optim.qk_clip import begin_logits, largest_logits, row_factors
from train.schedules import ScheduledValues
from train.stage import Stage, StepMetrics, expert_shards


@dataclass(frozen=True)
class Engine:
    """What a step works with on this rank."""

    mesh: Mesh
    stages: Mapping[int, Stage]  # by index
    pipeline: Pipeline
    optimizer: AdamW
    reduction: EarlyReduction
    ema: Ema | None

    @property
    def models(self) -> list[Transformer]:
        """The model's stages on this rank, in order."""
        return [stage.model for _, stage in sorted(self.stages.items())]


@dataclass(frozen=True)
class StepGradients:
    """Results of a step's forward and backward besides gradients; the same on every rank.

    Losses are means in nats per main-model target.
    """

    loss_total: Tensor
    loss_main: Tensor
    loss_mtp: Tensor  # mean over depths; each has T - k targets but is divided by the same N
    loss_balance: Tensor  # mean over sequences of the sum over layers, without alpha
    grad_norm: Tensor
    finite: Tensor  # whether losses and gradients are
    stop: Tensor  # whether any rank was asked to stop
    damaged: Tensor  # whether any rank's batch is
    busy_us: Tensor  # [ranks, phases] int64, what each rank gave as `busy_s`
    counts: dict[int, Tensor]  # layer id -> [experts] int64 over the whole step
    max_logits: Tensor | None  # [layers, heads], MTP layers last, with `optim.qk_clip`

    @property
    def verdict(self) -> Tensor:
        """[5] fp64: finite, stop, damaged, main loss and norm; the host reads it before the update."""
        numbers = (self.finite, self.stop, self.damaged, self.loss_main, self.grad_norm)
        return torch.stack([number.double() for number in numbers])

    @property
    def logged(self) -> dict[str, Tensor]:
        """Metric -> 0-d tensor."""
        return {
            "loss/total": self.loss_total,
            "loss/main": self.loss_main,
            "loss/mtp": self.loss_mtp,
            "loss/balance": self.loss_balance,
            "grad/norm": self.grad_norm,
        }


def compute_gradients(
    engine: Engine,
    batch: Batch,
    *,
    num_micro_batches: int,
    now: ScheduledValues,
    stop: bool = False,
    busy_s: Sequence[float] = (0.0,),
    health: Fp8Health | None = None,
) -> StepGradients:
    """Forward and backward over every micro-batch; leaves clipped mean gradients in what the optimizer updates.

    Args:
        engine: of this rank.
        batch: this data rank's share of the step, on the host; the same on every rank of a pipeline.
        num_micro_batches: of the share; any of them may lack targets.
        now: scheduled values of this step.
        stop: whether this rank was asked to stop.
        busy_s: how long this rank worked in each phase of the step before.
        health: observes the FP8 operands of the first micro-batch; on all ranks or on none.
    Returns:
        StepGradients; reading any of its tensors synchronises.
    """
    mesh, optimizer, config = engine.mesh, engine.optimizer, engine.models[0].config
    optimizer.zero_grad()
    engine.reduction.begin(num_micro_batches)
    metrics = StepMetrics(config, mesh.device)
    # Ranks of one pipeline hold the same tokens: its first rank counts them.
    busy = torch.zeros(mesh.world.size, len(busy_s), dtype=torch.int64)
    busy[mesh.rank] = torch.tensor([round(seconds * 1e6) for seconds in busy_s])
    flags = torch.tensor([batch.num_targets if mesh.pp.rank == 0 else 0, int(stop), len(batch.damaged)])
    own = torch.cat((flags, busy.flatten()))
    shared = sum_over(own.to(mesh.device, non_blocking=True), mesh.world)
    num_targets, num_stops, num_damaged = shared[:3].unbind()
    weights = LossWeights(now.mtp_weight, now.balance_alpha, num_targets, now.batch_sequences)
    for stage in engine.stages.values():
        stage.begin(weights, metrics, health)
    begin_logits(engine.models)
    engine.pipeline.run(batch.inputs(mesh.device), num_micro_batches=num_micro_batches)
    engine.reduction.finish()
    norm = reduce_and_clip(
        optimizer.buckets, num_targets=num_targets, max_norm=optimizer.config.clip_norm, world=mesh.world
    )
    metrics.reduce(mesh.world)
    if health is not None:
        health.reduce(mesh.world)
    main, *further = (metrics.losses / num_targets.clamp(min=1)).unbind()
    mtp = torch.stack(further).mean() if further else torch.zeros_like(main)
    balance = metrics.balance.sum() / now.batch_sequences
    total = main + now.mtp_weight * mtp + now.balance_alpha * balance
    watched = optimizer.config.qk_clip is not None
    max_logits = largest_logits(engine.models, config, mesh.world, device=mesh.device) if watched else None
    return StepGradients(
        loss_total=total,
        loss_main=main,
        loss_mtp=mtp,
        loss_balance=balance,
        grad_norm=norm.norm,
        finite=norm.finite & torch.isfinite(total),
        stop=num_stops > 0,
        damaged=num_damaged > 0,
        busy_us=shared[3:].view_as(busy),
        counts=dict(zip(metrics.layer_ids, metrics.counts.unbind(), strict=True)),
        max_logits=max_logits,
    )


def apply_update(engine: Engine, gradients: StepGradients, *, now: ScheduledValues, update: int) -> None:
    """The optimizer on the clipped gradients, QK-clip on its new weights, then the routers' bias.

    Args:
        engine: of this rank.
        gradients: of this step; finite.
        now: scheduled values of this step.
        update: number of this update from 1; skipped steps do not count.
    """
    if engine.ema is not None:
        engine.ema.before_write()
    factors, threshold = None, engine.optimizer.config.qk_clip
    if gradients.max_logits is not None and threshold is not None:
        factors = row_factors(engine.models, gradients.max_logits, threshold)
    engine.optimizer.step(lr=now.lr, step=update, row_factors=factors)
    if engine.ema is not None:
        engine.ema.update()
    update_biases(engine.models, gradients.counts, now.bias_speed)


def checkpoint_tensors(engine: Engine) -> dict[str, Tensor | LocalShard]:
    """This rank's part of a run's tensors, by name: live ones, so that loading a checkpoint fills them in place.

    Inside `engine.optimizer.whole_weights()`, where weights may be kept in FP8 only.
    """
    model: dict[str, Tensor | LocalShard] = {}
    for part in engine.models:
        assert all(map(has_numbers, part.parameters())), "weights have no values: call it inside whole_weights()"
        model |= {f"model.{name}": tensor for name, tensor in (part.state_dict() | expert_shards(part)).items()}
    optimizer = {f"optim.{name}": shard for name, shard in engine.optimizer.state_shards().items()}
    average = engine.ema.state_shards() if engine.ema else {}
    return model | optimizer | average
