"""From logits to tokens: temperature, top-p, and speculative sampling (arXiv:2211.17192 §2.3).

    p = softmax(logits / temperature), kept on the fewest tokens that together weigh top_p, made to sum to 1
    a draft x, drawn from q, is accepted with probability min(1, p(x) / q(x));
    if it is rejected, the token is drawn from max(p - q, 0), made to sum to 1, and later drafts are rejected too

What is drawn so has distribution p, whatever q is. Temperature 0 is the limit: all weight on the largest logit (of
equal ones the lowest id), so a draft is accepted exactly if it is the greedy choice.

Everything here is FP64 on the CPU, for one sequence and from its own stream of uniform numbers: the rest of the batch
and the model's device change only the logits' rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen."""

    # Divides the logits; 0 takes the largest.
    temperature: float = 0.0
    # Weight of the tokens that are kept, in (0, 1]; 1 keeps all.
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature: {self.temperature} must be zero (take the likeliest token) or positive")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p: {self.top_p} must be above 0 and at most 1 (1 keeps every token)")


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution that tokens are drawn from: [..., vocab] -> the same, FP64 on the CPU."""
    wide = logits.to("cpu", torch.float64)
    check_finite(wide)
    if sampling.temperature == 0.0:
        # torch's argmax is the first of equal values: the lowest id.
        return torch.zeros_like(wide).scatter_(-1, wide.argmax(-1, keepdim=True), 1.0)
    # The largest is taken off first: a tiny temperature must not overflow.
    weights = ((wide - wide.amax(-1, keepdim=True)) / sampling.temperature).softmax(-1)
    if sampling.top_p == 1.0:
        return weights
    ordered = weights.sort(dim=-1, descending=True, stable=True)
    heavier = ordered.values.cumsum(-1) - ordered.values  # [..., vocab], weight of all that come before
    kept = ordered.values.masked_fill(heavier >= sampling.top_p, 0.0)
    kept /= kept.sum(-1, keepdim=True)
    return torch.zeros_like(wide).scatter_(-1, ordered.indices, kept)


def check_finite(values: Tensor) -> None:
    """Raise ValueError for logits or losses that are not finite, before they are taken for an answer."""
    if not bool(values.isfinite().all()):
        raise ValueError(
            "the model gives logits or losses that are not finite numbers: its weights are damaged, or it diverged"
        )


def draw(weights: Tensor, uniform: float) -> int:
    """The token at which the cumulative weight passes `uniform`, in [0, 1), of the total; `weights` [vocab] FP64."""
    cumulative = weights.cumsum(0)
    token = int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True))
    # uniform * total may round to the total itself.
    return min(token, int(weights.nonzero()[-1]))


def verify(
    drafts: Sequence[int], proposed: Sequence[Tensor], wanted: Tensor, uniform: Callable[[], float]
) -> list[int]:
    """The accepted drafts and one token more: drawn in place of the first rejected draft, or after all.

    Args:
        drafts: ids, the k-th drawn from proposed[k].
        proposed: each [vocab] FP64, q.
        wanted: [drafts + 1, vocab] FP64, p at every position, given the drafts before it.
        uniform: gives the next number of the sequence's stream, in [0, 1).
    Source: arXiv:2211.17192 algorithm 1.
    """
    for k, (token, q) in enumerate(zip(drafts, proposed, strict=True)):
        p = wanted[k]
        if uniform() * q[token] >= p[token] and p[token] < q[token]:
            left = (p - q).clamp_min(0.0)
            # Where p and q differ by rounding alone nothing may be left; then they are the same distribution.
            return [*drafts[:k], draw(left if bool(left.any()) else p, uniform())]
    return [*drafts, draw(wanted[-1], uniform())]
