"""The largest attention logit of each head, for QK-clip (arXiv:2507.20534 §2.1).

    S_max[h] = max over sequences, queries i and keys j <= i of their document:   scale * q[h, i] . k[h, j]

Fused attention gives the log-sum-exp of a row and not its maximum, so some rows are multiplied once more: of a sequence
at most QUERIES queries, evenly spaced, the last one among them, against all their keys, in every head. Up to that
length it is all of them. At 4096 tokens and V3's widths that is an eighth of one of seven products of the core's
forward and backward: 2 % of its FLOPs, counted. Not differentiable.

Shapes: q, k [sequences, heads, tokens, qk].
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from kernels.attention import Packed
from kernels.formats import ceil_div

QUERIES = 512
# Queries and keys of one product at most: 67 MB of scores with V3's heads in BF16, less than attention writes after it.
BLOCK, KEYS = 64, 4096


@torch.no_grad()
def max_logits(q: Tensor, k: Tensor, *, scale: float, documents: Packed | None) -> Tensor:
    """[heads] fp32, of the sampled queries; scores are rounded once to q's dtype, as attention on a CPU rounds them.

    Args:
        scale: of the softmax, above 0.
        documents: no query reads another one.
    """
    tokens, stride = q.shape[-2], ceil_div(q.shape[-2], QUERIES)
    places, starts = torch.arange(tokens, device=q.device), _document_starts(q, documents)
    sampled = places.flip(0)[::stride].flip(0)  # [queries]
    found = torch.full(q.shape[1:2], float("-inf"), device=q.device)  # [heads]
    # Of one sequence at a time: a product of several would copy all keys.
    for (queries, every_key, start), first in product(zip(q, k, starts, strict=True), range(0, len(sampled), BLOCK)):
        # Keys after the last query of the block are read by none; its place is known without asking the device.
        end = tokens - stride * max(len(sampled) - first - BLOCK, 0)
        rows = sampled[first : first + BLOCK]
        for keys, of_keys in zip(places[:end].split(KEYS), every_key[:, :end].split(KEYS, dim=1), strict=True):
            hidden = (keys > rows[:, None]) | (keys < start[rows, None])  # [rows, keys]
            found = torch.maximum(found, _largest_scores(queries[:, rows], of_keys, hidden) * scale)
    return found


def _largest_scores(q: Tensor, k: Tensor, hidden: Tensor) -> Tensor:
    """[heads] fp32; the scores, [heads, rows, keys], are gone at the end, so that two products never hold theirs."""
    return (q @ k.mT).masked_fill_(hidden, float("-inf")).amax((1, 2)).float()


def _document_starts(q: Tensor, documents: Packed | None) -> Tensor:
    """Where each token's document begins in its sequence, [sequences, tokens] int64."""
    sequences, _, tokens, _ = q.shape
    if documents is None:
        return torch.zeros(sequences, tokens, dtype=torch.int64, device=q.device)
    starts, begin = [], 0
    for lengths, sums in zip(documents.lengths, documents.cumulative, strict=True):
        starts.append(sums[:-1].long() + begin)
        begin += sum(lengths)
    firsts = torch.cat(starts)  # [documents], in all sequences end to end
    flat = torch.arange(sequences * tokens, device=q.device)
    owner = torch.searchsorted(firsts, flat, right=True) - 1
    return (firsts[owner] - flat // tokens * tokens).view(sequences, tokens)
