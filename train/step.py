"""One optimizer step on this rank: losses and gradients over all micro-batches, then the update.

    sum the numbers of targets over ranks -> N                         one small collective
    for each micro-batch: forward -> sums of losses -> backward        `parallel/pipeline.py`; sums, never means
    reduce over ranks, divide by N, norm, clip                         `parallel/grads.py`
    AdamW on this rank's share; new weights to every rank              `train/optim/adamw.py`
    b_i += gamma * sign(mean load - load_i)                            `train/optim/balance.py`, loads of all ranks

The step is cut in two, because the caller must read one flag in between: a step whose gradients are not finite is
skipped, by all ranks alike. One thing waits for the device inside a step, and only under expert parallelism: a read of
counts per MoE layer and micro-batch (docs/parallelism.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.collectives import sum_over
from parallel.grads import reduce_and_clip
from parallel.mesh import Mesh
from parallel.pipeline import Pipeline
from train.data.batch import Batch
from train.losses import LossWeights
from train.model.moe import Router
from train.model.transformer import Transformer
from train.observe.fp8_health import Fp8Health
from train.optim.adamw import AdamW
from train.optim.balance import update_bias
from train.optim.ema import Ema
from train.schedules import Now
from train.stage import Stage, Tally


@dataclass(frozen=True)
class Engine:
    """What a step works with on this rank.

    stages: index -> stage. ema: the moving average of the weights, or None.
    """

    mesh: Mesh
    stages: Mapping[int, Stage]
    pipeline: Pipeline
    optimizer: AdamW
    ema: Ema | None

    @property
    def models(self) -> list[Transformer]:
        """The parts of the model on this rank, in order of stage."""
        return [stage.model for _, stage in sorted(self.stages.items())]


@dataclass(frozen=True)
class StepGradients:
    """What a step's forward and backward leave behind besides gradients; the same on every rank.

    Losses are means in nats per main-model target (MTP: mean over depths, each over T - k targets but divided by the
    same N); balance is the mean over sequences of the sum over layers, without alpha. counts: layer id -> [experts]
    int64 over the whole step. finite: whether losses and gradients are. stop: whether any rank was asked to stop.
    """

    loss_total: Tensor
    loss_main: Tensor
    loss_mtp: Tensor
    loss_balance: Tensor
    grad_norm: Tensor
    finite: Tensor
    stop: Tensor
    counts: dict[int, Tensor]


def routers(models: list[Transformer]) -> dict[int, Router]:
    """Layer id -> router, for every MoE layer this rank holds, MTP layers included."""
    found: dict[int, Router] = {}
    for model in models:
        for layer_id, layer in (*model.layers.items(), *model.mtp.items()):
            found |= {int(layer_id): module for module in layer.modules() if isinstance(module, Router)}
    return found


def expert_biases(engine: Engine) -> Tensor:
    """The selection biases of all MoE layers, MTP layers last, [layers, experts] fp32: one small collective."""
    mesh, config = engine.mesh, engine.models[0].config
    layer_ids = [i for i in (*config.layer_ids, *config.mtp_layer_ids) if config.is_moe(i)]
    biases = torch.zeros(len(layer_ids), config.n_routed_experts, device=mesh.device)
    # The ranks of a stage hold the same biases: the first one speaks.
    if mesh.dp.rank == 0:
        for layer_id, router in routers(engine.models).items():
            biases[layer_ids.index(layer_id)] = router.e_score_correction_bias
    return sum_over(biases, mesh.world)


def compute_gradients(
    engine: Engine,
    batch: Batch,
    *,
    num_micro_batches: int,
    now: Now,
    stop: bool = False,
    health: Fp8Health | None = None,
) -> StepGradients:
    """Forward and backward over every micro-batch; leaves clipped mean gradients in what the optimizer updates.

    Args:
        engine: models in training mode.
        batch: this data rank's share of the step, on the host; the same on every rank of a pipeline. Any micro-batch
            may lack targets.
        num_micro_batches: pieces the share is cut into.
        now: schedule values of this step; its batch is that of all ranks.
        stop: whether this rank was asked to stop.
        health: what looks at the FP8 operands of the first micro-batch; on all ranks or on none.
    Returns:
        StepGradients; reading any of its tensors synchronises.
    """
    mesh, optimizer, config = engine.mesh, engine.optimizer, engine.models[0].config
    optimizer.zero_grad()
    # Ranks of one pipeline hold the same tokens: only its first one counts them.
    own = torch.tensor([batch.num_targets if mesh.pp.rank == 0 else 0, int(stop)])
    shared = sum_over(own.to(mesh.device, non_blocking=True), mesh.world)
    num_targets, num_stops = shared.unbind()
    weights = LossWeights(now.mtp_weight, now.balance_alpha, num_targets, now.batch_sequences)
    tally = Tally(config, mesh.device)
    for stage in engine.stages.values():
        stage.begin(weights, tally, health)
    engine.pipeline.run(batch.inputs(mesh.device), num_micro_batches=num_micro_batches)
    norm = reduce_and_clip(
        optimizer.buckets, num_targets=num_targets, max_norm=optimizer.config.clip_norm, world=mesh.world
    )
    tally.reduce(mesh.world)
    if health is not None:
        health.reduce(mesh.world)
    main, *further = (tally.losses / num_targets.clamp(min=1)).unbind()
    mtp = torch.stack(further).mean() if further else torch.zeros_like(main)
    balance = tally.balance.sum() / now.batch_sequences
    total = main + now.mtp_weight * mtp + now.balance_alpha * balance
    return StepGradients(
        loss_total=total,
        loss_main=main,
        loss_mtp=mtp,
        loss_balance=balance,
        grad_norm=norm.norm,
        finite=norm.finite & torch.isfinite(total),
        stop=num_stops > 0,
        counts=dict(zip(tally.layer_ids, tally.counts.unbind(), strict=True)),
    )


def apply_update(engine: Engine, gradients: StepGradients, *, now: Now, update: int) -> None:
    """AdamW on the clipped gradients, then the routers' bias.

    Args:
        engine: as in `compute_gradients`.
        gradients: of this step; must be finite.
        now: schedule values of this step.
        update: number of this update, counted from 1 (skipped steps do not count).
    """
    if engine.ema is not None:
        engine.ema.before_write()
    engine.optimizer.step(lr=now.lr, step=update)
    if engine.ema is not None:
        engine.ema.update()
    for layer_id, router in routers(engine.models).items():
        update_bias(router.e_score_correction_bias, gradients.counts[layer_id], now.bias_speed)
