"""Choice of experts: node-limited top-k by biased score, gates from the un-biased score, balance terms.

arXiv:2412.19437 §2.1.2. With logits u . e (made by the caller, fp32) and balancing bias b, `route` is one kernel for
    sigmoid            s, the affinities                                   eq. 15
    select_experts     top-K_r of s + b inside the best groups             eq. 16 and "Node-Limited Routing"
    gate_weights       g = scale * s_i / sum of the selected s             eq. 13, times routed_scaling_factor
    expert_counts      tokens per expert, for the bias update
and `sequence_balance` is sum_i f_i P_i per sequence                       eq. 17-20
`route_softmax` is DeepSeek-V2-Lite's router: softmax, no bias, no groups   arXiv:2405.04434 §2.2, §B.1

Backward of `route` is one kernel as well; it keeps the scores and the ids.
Shapes: logits, scores [tokens, experts] fp32; ids [tokens, topk] int64. Tokens may be sharded on any axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.operators import operator


@dataclass(frozen=True)
class RouterOutput:
    """What `route` decides for each token."""

    scores: Tensor  # [tokens, experts], sigmoid of the logits; carries gradient
    ids: Tensor  # [tokens, topk] int64, highest biased score first
    gates: Tensor  # [tokens, topk] in scores.dtype; carries gradient
    counts: Tensor  # [experts] int64, tokens that chose each expert


def _best(values: Tensor, count: int) -> Tensor:
    """Ids of the `count` largest along the last dim, largest first; of equal values the lowest id wins."""
    # A copy: the slice would keep the ids of all experts alive as long as those of the best.
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :count].contiguous()


@torch.no_grad()
def select_experts(scores: Tensor, bias: Tensor, *, n_group: int, topk_group: int, topk: int) -> Tensor:
    """Choose each token's experts by biased score, inside its best groups: [tokens, topk] int64, highest first.

    A group's score is the sum of its two highest biased scores; `n_group` groups of equal size hold the experts in
    order of id. Ties go to the lowest id, on every device.
    """
    experts = scores.shape[-1]
    group_size = experts // n_group
    assert group_size * n_group == experts, (experts, n_group)
    assert topk <= topk_group * group_size, (topk, topk_group, group_size)
    biased = scores + bias  # [tokens, experts]
    if topk_group < n_group:
        grouped = biased.unflatten(-1, (n_group, group_size))  # [tokens, groups, group_size]
        group_scores = grouped.topk(min(2, group_size), dim=-1).values.sum(-1)
        kept = _best(group_scores, topk_group)  # [tokens, topk_group]
        excluded = torch.ones_like(group_scores, dtype=torch.bool).scatter_(-1, kept, False)
        # -inf, not 0: a biased score may be negative.
        biased = grouped.masked_fill(excluded[..., None], float("-inf")).flatten(-2)
    return _best(biased, topk)


def gate_weights(scores: Tensor, ids: Tensor, *, scale: float, normalize: bool) -> Tensor:
    """Gates of the chosen experts from the un-biased scores; `scale` is routed_scaling_factor, eq. 13."""
    chosen = scores.gather(-1, ids)  # [tokens, topk]
    if normalize:
        # 1e-20 as in transformers 5.23.
        chosen = chosen / (chosen.sum(-1, keepdim=True) + 1e-20)
    return chosen * scale


def expert_counts(ids: Tensor, experts: int) -> Tensor:
    """How many tokens chose each expert: [experts] int64. Integers, so any order of addition gives the same."""
    flat = ids.flatten()
    return torch.zeros(experts, dtype=torch.int64, device=ids.device).scatter_add_(0, flat, torch.ones_like(flat))


def route_reference(
    logits: Tensor, bias: Tensor, n_group: int, topk_group: int, topk: int, scale: float, normalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four steps one after the other. Same arguments as `route`; returns scores, ids, gates, counts."""
    scores = logits.sigmoid()  # [tokens, experts]
    ids = select_experts(scores, bias, n_group=n_group, topk_group=topk_group, topk=topk)  # [tokens, topk]
    gates = gate_weights(scores, ids, scale=scale, normalize=normalize)  # [tokens, topk]
    return scores, ids, gates, expert_counts(ids, logits.shape[1])


def route_backward_reference(
    scores: Tensor, ids: Tensor, grad_scores: Tensor | None, grad_gates: Tensor | None, scale: float, normalize: bool
) -> Tensor:
    """Gradient of the logits as autograd makes it of `route_reference`; a gradient of None stands for zeros."""
    grad = torch.zeros_like(scores)
    if grad_gates is not None:
        grad_chosen = grad_gates * scale  # [tokens, topk]
        if normalize:
            chosen = scores.gather(-1, ids)
            total = chosen.sum(-1, keepdim=True) + 1e-20  # [tokens, 1]
            grad_total = (-grad_chosen * ((chosen / total) / total)).sum(-1, keepdim=True)
            grad_chosen = grad_chosen / total + grad_total
        grad.scatter_add_(-1, ids, grad_chosen)
    if grad_scores is not None:
        grad += grad_scores
    grad_logits: Tensor = torch.ops.aten.sigmoid_backward(grad, scores)
    return grad_logits


def sequence_balance_reference(scores: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """The loss, and f [sequences, experts], exact below 2^24 tokens. Same arguments as `sequence_balance`."""
    sequences, tokens, experts = scores.shape
    chosen = _best(scores, topk).flatten(1)  # [sequences, tokens * topk]
    counts = scores.new_zeros(sequences, experts).scatter_add_(1, chosen, torch.ones_like(chosen, dtype=scores.dtype))
    f = counts * (experts / (topk * tokens))  # eq. 18
    p = (scores / scores.sum(-1, keepdim=True)).mean(1)  # eq. 19-20 [sequences, experts]
    return (f * p).sum(), f  # eq. 17


def sequence_balance_backward_reference(grad: Tensor, scores: Tensor, f: Tensor) -> Tensor:
    """Gradient of the scores as autograd makes it of eq. 17 with constant f; grad is that of the loss, a scalar."""
    total = scores.sum(-1, keepdim=True)  # [sequences, tokens, 1]
    grad_share = (grad * f)[:, None] / scores.shape[1]  # [sequences, 1, experts]
    grad_total = (-grad_share * ((scores / total) / total)).sum(-1, keepdim=True)
    return grad_share / total + grad_total


def _allocate_routed(
    logits: Tensor, bias: Tensor, n_group: int, topk_group: int, topk: int, scale: float, normalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, experts = logits.shape
    ids = logits.new_empty(tokens, topk, dtype=torch.int64)
    counts = logits.new_empty(experts, dtype=torch.int64)
    return logits.new_empty(tokens, experts), ids, logits.new_empty(tokens, topk), counts


_route = operator("route", route_reference, fake=_allocate_routed, gpu="router")
_route_backward = operator(
    "route_backward",
    route_backward_reference,
    fake=lambda scores, ids, grad_scores, grad_gates, scale, normalize: scores.new_empty(scores.shape),
    gpu="router",
)
_sequence_balance = operator(
    "sequence_balance",
    sequence_balance_reference,
    fake=lambda scores, topk: (scores.new_empty(()), scores.new_empty(scores.shape[0], scores.shape[2])),
    gpu="router",
)
_sequence_balance_backward = operator(
    "sequence_balance_backward",
    sequence_balance_backward_reference,
    fake=lambda grad, scores, f: scores.new_empty(scores.shape),
    gpu="router",
)


class _Route(torch.autograd.Function):
    """Keeps scores and ids; a gradient that was not computed is None and costs nothing."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, bias: Tensor, *how: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        scores, ids, gates, counts = _route(logits, bias, *how)
        ctx.save_for_backward(scores, ids)
        *_, ctx.scale, ctx.normalize = how
        ctx.mark_non_differentiable(ids, counts)
        ctx.set_materialize_grads(False)
        return scores, ids, gates, counts

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_scores, _, grad_gates, _ = grads
        grad = None
        if grad_scores is not None or grad_gates is not None:
            scores, ids = ctx.saved_tensors
            grad = _route_backward(scores, ids, grad_scores, grad_gates, ctx.scale, ctx.normalize)
        return grad, None, None, None, None, None, None


def route(
    logits: Tensor, bias: Tensor, *, n_group: int, topk_group: int, topk: int, scale: float, normalize: bool
) -> RouterOutput:
    """Score the experts, choose by biased score, weigh by the un-biased one, and count.

    logits [tokens, experts] fp32; bias [experts] fp32, for the choice only, without gradient; `scale` is
    routed_scaling_factor, `normalize` norm_topk_prob. A token uses at most topk_group groups, and topk experts, at most
    topk_group * experts / n_group. One with NaN logits still gets topk distinct ids.
    """
    how = (n_group, topk_group, topk, scale, normalize)
    return RouterOutput(*_Route.apply(logits, bias.detach(), *how))  # type: ignore[no-untyped-call]


def route_softmax(logits: Tensor, *, topk: int, scale: float, normalize: bool) -> RouterOutput:
    """`route` with softmax scores, without bias or groups, in torch's own operations."""
    scores = logits.softmax(-1)  # [tokens, experts]
    ids = _best(scores.detach(), topk)  # [tokens, topk]
    gates = gate_weights(scores, ids, scale=scale, normalize=normalize)  # [tokens, topk]
    return RouterOutput(scores, ids, gates, expert_counts(ids, logits.shape[1]))


class _SequenceBalance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, topk: int) -> Tensor:
        loss, f = _sequence_balance(scores, topk)
        ctx.save_for_backward(scores, f)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _sequence_balance_backward(grads[0], *ctx.saved_tensors), None


def sequence_balance(scores: Tensor, topk: int) -> Tensor:
    """Sum over sequences of sum_i f_i P_i, without the factor alpha; 1 per sequence under perfect balance.

    f_i counts the plain top-k of the scores [sequences, tokens, experts] (no bias, no groups) and carries no gradient;
    P_i is the mean over the sequence of the scores normalised over all experts.
    """
    return _SequenceBalance.apply(scores, topk)  # type: ignore[no-any-return, no-untyped-call]


def select_experts_reference(scores: Tensor, bias: Tensor, *, n_group: int, topk_group: int, topk: int) -> Tensor:
    """The same choice token by token in Python. Same arguments as `select_experts`."""
    size = scores.shape[-1] // n_group
    rows = []
    for row in (scores + bias).tolist():
        groups = [row[g * size : (g + 1) * size] for g in range(n_group)]
        best_groups = sorted(range(n_group), key=lambda g: -sum(sorted(groups[g])[-2:]))[:topk_group]
        allowed = [i for i in range(len(row)) if i // size in best_groups]
        rows.append(sorted(allowed, key=lambda i: -row[i])[:topk])
    return torch.tensor(rows, dtype=torch.int64, device=scores.device)
