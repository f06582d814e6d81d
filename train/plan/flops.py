"""Training FLOPs per token, by part of the model (arXiv:2412.19437 §4.2 for the sizes; the 6N rule).

    GEMMs            6 x rows x cols per token and use: fprop, dgrad and wgrad, 2 FLOPs per multiplication and addition
    attention core   causal, half of tokens^2: per layer and token 3 x 2 x (tokens / 2) x heads x (qk + v)

V3 at 4096 tokens: 219.75 GFLOP of GEMMs and 30.70 of attention a token, 250.4 in all without MTP. Softmax, norms, the
embedding's lookup and the scores that a fused backward computes again are not counted. A MTP depth counts as if it saw
every token (it sees `tokens - k`). Published figures leave out MTP and router: take those parts away to compare.

Pure arithmetic over the table of `train/plan/memory.py`. Not here: time, overlap, bubbles.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from train.model.config import ModelConfig
from train.plan.memory import Held, Weight

# fprop, dgrad, wgrad; one multiplication and one addition each.
FLOPS_PER_WEIGHT = 6


def flops_per_token(
    config: ModelConfig, table: Iterable[Weight], held: Held, *, sequence_length: int
) -> dict[str, int]:
    """FLOPs of forward and backward on one token of this rank, under balanced routing.

    Args:
        config: of the whole model.
        table: of the rank, from `train.plan.memory.weights`.
        held: the same rank's layers.
        sequence_length: tokens that attention runs over.
    Returns:
        part -> FLOPs; "attention_core" beside the parts of the table. Parts without a GEMM are absent.
    """
    flops: Counter[str] = Counter()
    for weight in table:
        if weight.uses:
            flops[weight.part] += FLOPS_PER_WEIGHT * weight.uses * weight.rows * weight.cols
    per_layer = 3 * sequence_length * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    flops["attention_core"] = len(held.layer_ids) * per_layer
    return dict(flops)
