"""The smallest model with every part of V3: a dense and a MoE layer, groups, two MTP depths. Milliseconds a step."""

from __future__ import annotations

from train.model.config import ModelConfig

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
