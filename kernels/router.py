"""Choice of experts: node-limited top-k by biased score, gates from the un-biased score, balance terms.

arXiv:2412.19437 §2.1.2. With affinities s = sigmoid(u . e) (made by the caller, fp32) and balancing bias b:
    select_experts     top-K_r of s + b inside the best groups             eq. 16 and "Node-Limited Routing"
    gate_weights       g = scale * s_i / sum of the selected s             eq. 13, times routed_scaling_factor
    expert_counts      tokens per expert, for the bias update
    sequence_balance   sum_i f_i P_i per sequence                          eq. 17-20

Shapes: scores [tokens, experts] fp32; ids [tokens, topk] int64. Tokens may be sharded on any axis.
It does not compute the affinities, update the bias, or weigh the balance loss by alpha.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.bench_entry import Bench


def _best(values: Tensor, count: int) -> Tensor:
    """Ids of the `count` largest along the last dim, largest first; of equal values the lowest id wins."""
    # A copy: the slice would keep the ids of all experts alive as long as those of the best.
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :count].contiguous()


@torch.no_grad()
def select_experts(scores: Tensor, bias: Tensor, *, n_group: int, topk_group: int, topk: int) -> Tensor:
    """Choose each token's experts by biased score, inside its best groups.

    A group's score is the sum of its two highest biased scores. Experts of the other groups are masked with
    -inf (not 0: a biased score may be negative). Ties go to the lowest id, on every device.

    Args:
        scores: [tokens, experts] affinities.
        bias: [experts], added for the choice only.
        n_group: groups of equal size that experts fall into, in order of id.
        topk_group: groups a token may use.
        topk: experts a token uses; at most topk_group * experts / n_group.
    Returns:
        [tokens, topk] int64, highest biased score first; without gradient.
    Source: arXiv:2412.19437 eq. 16 and §2.1.2 "Node-Limited Routing".
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
        biased = grouped.masked_fill(excluded[..., None], float("-inf")).flatten(-2)
    return _best(biased, topk)


def gate_weights(scores: Tensor, ids: Tensor, *, scale: float, normalize: bool) -> Tensor:
    """Weights of the chosen experts, from the un-biased scores.

    Args:
        scores: [tokens, experts] affinities; the gradient flows through them.
        ids: [tokens, topk] int64, distinct within a row.
        scale: routed_scaling_factor.
        normalize: divide by the sum over the chosen (norm_topk_prob).
    Returns:
        [tokens, topk] in scores.dtype.
    Source: arXiv:2412.19437 eq. 13; 1e-20 as in transformers 5.23.
    """
    chosen = scores.gather(-1, ids)  # [tokens, topk]
    if normalize:
        chosen = chosen / (chosen.sum(-1, keepdim=True) + 1e-20)
    return chosen * scale


def expert_counts(ids: Tensor, experts: int) -> Tensor:
    """How many tokens chose each expert.

    Args:
        ids: [tokens, topk] int64.
        experts: number of experts.
    Returns:
        [experts] int64, tokens. Integers, so any order of addition gives the same.
    """
    flat = ids.flatten()
    return torch.zeros(experts, dtype=torch.int64, device=ids.device).scatter_add_(0, flat, torch.ones_like(flat))


def sequence_balance(scores: Tensor, topk: int) -> Tensor:
    """Sum over sequences of sum_i f_i P_i; 1 per sequence under perfect balance.

    f_i counts the plain top-k of the un-biased scores (no bias, no groups) and carries no gradient; P_i is
    the mean over the sequence of the scores normalised over all experts.

    Args:
        scores: [sequences, tokens, experts] affinities.
        topk: experts a token uses.
    Returns:
        Scalar in scores.dtype, without the factor alpha.
    Source: arXiv:2412.19437 eq. 17-20.
    """
    _, tokens, experts = scores.shape
    chosen = _best(scores.detach(), topk).flatten(1)  # [sequences, tokens * topk]
    counts = torch.zeros_like(scores[:, 0]).scatter_add_(1, chosen, torch.ones_like(chosen, dtype=scores.dtype))
    f = counts * (experts / (topk * tokens))  # eq. 18 [sequences, experts]
    p = (scores / scores.sum(-1, keepdim=True)).mean(1)  # eq. 19-20 [sequences, experts]
    return (f * p).sum()  # eq. 17


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


def _bench_inputs(device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2048, 8, generator=generator).sigmoid()
    bias = 0.01 * torch.randn(8, generator=generator)
    return scores.to(device), bias.to(device)


def _run(scores: Tensor, bias: Tensor) -> Tensor:
    ids = select_experts(scores, bias, n_group=4, topk_group=2, topk=2)
    return scores.new_zeros(scores.shape).scatter_(1, ids, gate_weights(scores, ids, scale=2.5, normalize=True))


def _peer(scores: Tensor, bias: Tensor) -> Tensor:
    biased = (scores + bias).view(-1, 4, 2)
    groups = biased.sum(-1).topk(2, dim=-1).indices
    mask = torch.zeros_like(biased[..., 0]).scatter_(1, groups, 1.0).bool()
    ids = biased.masked_fill(~mask[..., None], float("-inf")).flatten(1).topk(2, dim=-1).indices
    gates = F.normalize(scores.gather(1, ids), p=1.0, dim=-1) * 2.5
    return scores.new_zeros(scores.shape).scatter_(1, ids, gates)


BENCH = (
    Bench(
        name="router",
        make_inputs=_bench_inputs,
        run=_run,
        peer=_peer,
        peer_name="torch.topk",
        # The same fp32 division and product in another order: a few fp32 epsilons (2^-23).
        tolerance=4 * 2**-23,
        flops=0.0,
        bytes=4.0 * 2 * 2048 * 8,
    ),
)
