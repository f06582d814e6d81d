"""Main, MTP and balance loss as sums (arXiv:2412.19437 eq. 17-20, 24, 25).

Every loss is a *sum*; backward runs on the sum and the gradients are divided once, after reduction, by N = number of
main-model targets of the whole step (`parallel/grads.py`). Divided beforehand, V3's activation gradients (62.9 M tokens
a step) would sink below what FP8 scales resolve. With N targets and S sequences in the step, over all ranks:

    total = sum CE_main  +  lambda / D * sum_k sum CE_mtp_k  +  alpha * (N / S) * sum over sequences, layers of balance

so that total / N is the report's objective: MTP depth k has T - k targets but divides by the same N (eq. 24).

Main and MTP loss arise where the model ends. The balance loss arises at every MoE layer, on whichever pipeline stage
holds it: `attach_loss` adds its gradient there, so no scalar has to travel to the last stage and back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from train.model.transformer import ModelOutput, Transformer


@dataclass(frozen=True)
class LossWeights:
    """Weights of one optimizer step: lambda, alpha, and the step's N targets and S sequences over all ranks."""

    mtp_weight: float
    balance_alpha: float
    num_targets: Tensor  # 0-d, on the model's device: ranks sum their counts without the host waiting
    num_sequences: int

    def balance_weight(self) -> Tensor:
        """alpha * N / S, FP32 0-d."""
        return (self.balance_alpha * self.num_targets.double() / self.num_sequences).float()


@dataclass(frozen=True)
class LossSums:
    """Sums over one micro-batch, FP32 scalars. `total` carries the graph, balance apart; the others are for the log."""

    total: Tensor
    main: Tensor
    mtp: tuple[Tensor, ...]


def loss_sums(model: Transformer, output: ModelOutput, labels: Tensor, weights: LossWeights) -> LossSums:
    """Main and MTP losses of one micro-batch, in nats.

    Args:
        model: the last stage; supplies the shared head.
        labels: [sequences, tokens] int64, IGNORE where there is no target; labels[i] = t_{i+1}.
    """
    share = weights.mtp_weight / max(1, model.config.num_nextn_predict_layers)
    # The last depth first, as autograd would come to them: the sums of the head's gradient keep that order.
    mtp = [
        model.cross_entropy(hidden, labels[:, depth:], scale=share)
        for depth, hidden in reversed([*enumerate(output.mtp_hidden, start=1)])
    ][::-1]
    main = model.cross_entropy(output.hidden, labels)
    total = main
    for loss in mtp:
        total = total + share * loss
    return LossSums(total, main.detach(), tuple(loss.detach() for loss in mtp))


def balance_sum(output: ModelOutput, weights: LossWeights) -> Tensor | None:
    """alpha * N / S * the balance losses of this stage's layers, with graph; None where it has no router."""
    losses = [routing.balance for routing in output.routings.values()]
    return weights.balance_weight() * torch.stack(losses).sum() if losses else None


class _AttachLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return hidden

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (loss,) = ctx.saved_tensors
        return grads[0], torch.ones_like(loss)


def attach_loss(hidden: Tensor, loss: Tensor) -> Tensor:
    """`hidden` unchanged; when gradients reach it, the scalar `loss` is differentiated too, as if added to the total.

    Use the return value: without it `loss` has no effect. Megatron-LM treats its auxiliary losses the same way.
    """
    attached: Tensor = _AttachLoss.apply(hidden, loss)  # type: ignore[no-untyped-call]
    return attached
