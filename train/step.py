"""One optimizer step: losses and gradients over all micro-batches, then the update.

    for each micro-batch: forward -> sums of losses -> backward        sums, never means (`train/losses.py`)
    divide by N, norm, clip                                            `parallel/grads.py`
    AdamW; FP32 masters -> BF16 parameters                             `train/optim/adamw.py`
    b_i += gamma * sign(mean load - load_i)                            `train/optim/balance.py`

The step is cut in two, because the caller must read one flag in between: a step whose gradients are not finite is
skipped. Nothing in here waits for the device but the reference grouped GEMMs, which read their group ends
(`kernels/gemm_grouped.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.grads import reduce_and_clip
from train.data.batch import Batch
from train.losses import LossWeights, loss_sums
from train.model.moe import Router
from train.model.transformer import Transformer
from train.optim.adamw import AdamW
from train.optim.balance import update_bias
from train.optim.schedules import Now


@dataclass(frozen=True)
class StepGradients:
    """What a step's forward and backward leave behind besides `main_grad`.

    Losses are means in nats per main-model target (MTP: mean over depths, each over T - k targets but divided by the
    same N); balance is the mean over sequences of the sum over layers, without alpha. counts: layer id -> [experts]
    int64 over the whole step. finite: whether losses and gradients are.
    """

    loss_total: Tensor
    loss_main: Tensor
    loss_mtp: Tensor
    loss_balance: Tensor
    grad_norm: Tensor
    finite: Tensor
    counts: dict[int, Tensor]


def routers(model: Transformer) -> dict[int, Router]:
    """Layer id -> router, for every MoE layer this process holds, MTP layers included."""
    found: dict[int, Router] = {}
    for layer_id, layer in (*model.layers.items(), *model.mtp.items()):
        found |= {int(layer_id): module for module in layer.modules() if isinstance(module, Router)}
    return found


def compute_gradients(
    model: Transformer, optimizer: AdamW, batches: Sequence[Batch], *, num_targets: int, now: Now
) -> StepGradients:
    """Forward and backward over every micro-batch; leaves clipped mean gradients in `main_grad`.

    Args:
        model: in training mode; its parameters belong to `optimizer`.
        optimizer: its gradients are zeroed first.
        batches: micro-batches of the step on the model's device; any of them may lack targets.
        num_targets: N, labels of the whole step that are targets (known to the host before the transfer).
        now: schedule values of this step.
    Returns:
        StepGradients; reading any of its tensors synchronises.
    """
    optimizer.zero_grad()
    weights = LossWeights(
        mtp_weight=now.mtp_weight,
        balance_alpha=now.balance_alpha,
        num_targets=num_targets,
        num_sequences=sum(batch.labels.shape[0] for batch in batches),
    )
    sums = torch.zeros(4, dtype=torch.float32, device=batches[0].labels.device)  # total, main, mtp, balance
    counts: dict[int, Tensor] = {}
    for batch in batches:
        output = model(batch.input_ids, batch.document_ids)
        losses = loss_sums(model, output, batch.labels, weights)
        losses.total.backward()
        mtp = sum(losses.mtp, start=torch.zeros_like(losses.main)) / max(len(losses.mtp), 1)
        sums += torch.stack((losses.total.detach(), losses.main, mtp, losses.balance))
        for layer_id, routing in output.routings.items():
            counts[layer_id] = counts[layer_id] + routing.counts if layer_id in counts else routing.counts
    norm = reduce_and_clip(model.parameters(), num_targets=num_targets, max_norm=optimizer.config.clip_norm)
    total, main, mtp = (sums[:3] / max(num_targets, 1)).unbind()
    return StepGradients(
        loss_total=total,
        loss_main=main,
        loss_mtp=mtp,
        loss_balance=sums[3] / max(weights.num_sequences, 1),
        grad_norm=norm.norm,
        finite=norm.finite & torch.isfinite(total),
        counts=counts,
    )


def apply_update(model: Transformer, optimizer: AdamW, gradients: StepGradients, *, now: Now, update: int) -> None:
    """AdamW on the clipped gradients, then the routers' bias.

    Args:
        model: as in `compute_gradients`.
        optimizer: of the model.
        gradients: of this step; must be finite.
        now: schedule values of this step.
        update: number of this update, counted from 1 (skipped steps do not count).
    """
    optimizer.step(lr=now.lr, step=update)
    for layer_id, router in routers(model).items():
        update_bias(router.e_score_correction_bias, gradients.counts[layer_id], now.bias_speed)
