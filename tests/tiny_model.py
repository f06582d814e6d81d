"""The smallest model with every part of V3: a dense and a MoE layer, groups, two MTP depths. Milliseconds a step."""

from __future__ import annotations

from dataclasses import replace

from train.model.config import ModelConfig
from train.model.init import initialize
from train.model.precision import Precision
from train.model.transformer import Transformer

FP32 = Precision("fp32")
TINY = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_hidden_layers=2,
    first_k_dense_replace=1,
    num_attention_heads=2,
    q_lora_rank=16,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    routed_scaling_factor=2.5,
    max_position_embeddings=64,
    num_nextn_predict_layers=2,
    initializer_range=0.1,
)
# No two widths alike: a dim that is taken for another one shows.
DISTINCT = replace(
    TINY,
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    moe_intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=3,
    q_lora_rank=20,
    kv_lora_rank=12,
    qk_nope_head_dim=10,
    qk_rope_head_dim=6,
    v_head_dim=14,
    num_nextn_predict_layers=1,
)


def frozen(config: ModelConfig = TINY, *, seed: int = 1, std: float = 0.3, precision: Precision = FP32) -> Transformer:
    """An initialised model that is only read: no gradients."""
    net = Transformer(config, precision)
    initialize(net, seed=seed, std=std)
    return net.requires_grad_(requires_grad=False).eval()
