"""Main, MTP and balance loss as sums (arXiv:2412.19437 eq. 17-20, 24, 25).

Every loss is a *sum*; backward runs on the sum and the gradients are divided once, after reduction, by N = number of
main-model targets of the whole step (`parallel/grads.py`). Divided beforehand, V3's activation gradients (62.9 M tokens
a step) would sink below what FP8 scales resolve. With N targets and S sequences in the step:

    total = sum CE_main  +  lambda / D * sum_k sum CE_mtp_k  +  alpha * (N / S) * sum over sequences, layers of balance

so that total / N is the report's objective: MTP depth k has T - k targets but divides by the same N (eq. 24).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.cross_entropy import cross_entropy_sum
from train.model.transformer import ModelOutput, Transformer


@dataclass(frozen=True)
class LossWeights:
    """Weights of one optimizer step: lambda, alpha, and the step's N targets and S sequences (all ranks)."""

    mtp_weight: float
    balance_alpha: float
    num_targets: int
    num_sequences: int


@dataclass(frozen=True)
class LossSums:
    """Sums over one micro-batch, FP32 scalars. `total` carries the graph; the parts are for the log."""

    total: Tensor
    main: Tensor
    mtp: tuple[Tensor, ...]
    balance: Tensor


def loss_sums(model: Transformer, output: ModelOutput, labels: Tensor, weights: LossWeights) -> LossSums:
    """All losses of one micro-batch.

    Args:
        model: supplies the shared head.
        output: of `model` on this micro-batch.
        labels: [sequences, tokens] int64, IGNORE where there is no target; labels[i] = t_{i+1}.
        weights: of the step.
    Returns:
        LossSums in nats (balance: dimensionless).
    """
    main = cross_entropy_sum(model.logits(output.hidden).flatten(0, 1), labels.flatten())
    mtp = tuple(
        cross_entropy_sum(model.logits(hidden).flatten(0, 1), labels[:, depth:].flatten())
        for depth, hidden in enumerate(output.mtp_hidden, start=1)
    )
    balance = sum((r.balance for r in output.routings.values()), start=torch.zeros_like(main))
    total = main + weights.balance_alpha * weights.num_targets / max(weights.num_sequences, 1) * balance
    depths = model.config.num_nextn_predict_layers
    for loss in mtp:
        total = total + weights.mtp_weight / depths * loss
    return LossSums(total, main.detach(), tuple(loss.detach() for loss in mtp), balance.detach())
