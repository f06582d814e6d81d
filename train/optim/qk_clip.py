"""QK-clip: queries and keys of a head are made shorter when its largest logit passes a threshold.

arXiv:2507.20534 §2.1, for MLA. After each update, with S_max of the step's forward and for each head h on its own:

    gamma = min(1, threshold / S_max)
    q_C, k_C    rows of q_b (or of the queries in q_kv_a) and of kv_b     * sqrt(gamma)
    q_R         rope rows of the same queries                              * gamma
    k_R, v_C    shared by all heads, and values                            unchanged

so that every logit of the head becomes gamma times what it was. A factor of 1 changes no bit, and nothing waits for the
device. `train/model/max_logits.py` says which queries S_max is of.

Shapes: logits [layers, heads], MTP layers last; factors [rows] of a weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from parallel.collectives import max_over
from parallel.mesh import Axis
from train.model.attention import MultiHeadLatentAttention
from train.model.config import ModelConfig
from train.model.transformer import Transformer


def attentions(models: Sequence[Transformer]) -> Iterator[tuple[int, str, MultiHeadLatentAttention]]:
    """Row of a table of all layers, name and module of each attention on this rank."""
    for model in models:
        ids = [*model.config.layer_ids, *model.config.mtp_layer_ids]
        for name, module in model.named_modules():
            if isinstance(module, MultiHeadLatentAttention):
                # "layers.3.self_attn", "mtp.61.block.self_attn"
                yield ids.index(int(name.split(".")[1])), name, module


def watch_logits(models: Sequence[Transformer]) -> None:
    """From now on each attention notes its largest logits in training, 0 where none is above."""
    for _, _, attention in attentions(models):
        weight = attention.kv_a_layernorm.weight
        attention.max_logit = torch.zeros(attention.config.num_attention_heads, device=weight.device)


def begin_logits(models: Sequence[Transformer]) -> None:
    """Start a step."""
    for _, _, attention in attentions(models):
        if attention.max_logit is not None:
            attention.max_logit.zero_()


def largest_logits(models: Sequence[Transformer], config: ModelConfig, world: Axis, *, device: torch.device) -> Tensor:
    """[layers, heads] fp32 of the step, over all ranks: those without an attention take part too."""
    layers = len(config.layer_ids) + len(config.mtp_layer_ids)
    table = torch.zeros(layers, config.num_attention_heads, device=device)
    for row, _, attention in attentions(models):
        if attention.max_logit is not None:
            table[row] = attention.max_logit
    return max_over(table, world)


def row_factors(models: Sequence[Transformer], logits: Tensor, threshold: float) -> dict[str, Tensor]:
    """Parameter name -> what its rows are to be multiplied by."""
    factors: dict[str, Tensor] = {}
    gammas = torch.where(logits > threshold, threshold / logits, 1.0)  # [layers, heads]
    for row, name, attention in attentions(models):
        config, gamma = attention.config, gammas[row, :, None]  # [heads, 1]
        root = gamma.sqrt().expand(-1, config.qk_nope_head_dim)
        queries = torch.cat((root, gamma.expand(-1, config.qk_rope_head_dim)), dim=1).flatten()
        values = torch.ones_like(gamma).expand(-1, config.v_head_dim)
        factors[f"{name}.kv_b_proj.weight"] = torch.cat((root, values), dim=1).flatten()
        if config.q_lora_rank is None:
            latents = queries.new_ones(sum(attention.a_widths) - len(queries))
            factors[f"{name}.q_kv_a_proj.weight"] = torch.cat((queries, latents))
        else:
            factors[f"{name}.q_b_proj.weight"] = queries
    return factors
