"""Multi-head Latent Attention (arXiv:2412.19437 §2.1.1, eq. 1-11).

    c_Q, c_KV, k_R = W_DQ h, W_DKV h, W_KR h        one GEMM: `q_kv_a_proj`, rows [q latent | kv latent | rope key]
    q_C, q_R       = W_UQ norm(c_Q), RoPE(W_QR norm(c_Q))
    k_C, v_C       = W_UK norm(c_KV), W_UV norm(c_KV)
    o              = softmax([q_C; q_R] [k_C; k_R]^T * scale) v_C          k_R is one vector for all heads
    u              = W_O o

FP8 computes all up to the core in one operation (`kernels/heads.py`), to the same bits.

Shapes: sequences, tokens, heads; qk = qk_nope_head_dim + qk_rope_head_dim. Without a query latent
(`q_lora_rank=None`) the first rows of `q_kv_a_proj` are the heads' queries themselves and `q_b_proj` is absent.
The block scales of FP8 split cleanly at 1536, a multiple of 128.

With `recompute` a layer keeps the latents, o and the softmax statistics; queries, keys and values are made again in
backward (§3.2.3). At V3's size that is 0.15 instead of 0.82 GB a layer and sequence, for one more pass of both
up-projections; the core itself does not run again. Same bits either way. `train/generate/latent_cache.py` restates
these equations in absorbed form.

With `precision.attention_output=e5m6` o_proj keeps o, and attention does not: `kept_output.py`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from kernels.attention import CORE_OPERATORS, Packed, causal_attention, causal_attention_of_output
from kernels.fp8_linear import LinearInput
from kernels.heads import HeadSizes, UpProjection, latents_to_heads
from kernels.rope import apply_rope, rope_tables, yarn_softmax_factor
from train.model.config import ModelConfig
from train.model.kept_output import KeptOutput
from train.model.layers import KeptLinear, NormedLinear, RMSNorm
from train.model.max_logits import max_logits
from train.model.precision import Precision


class RopeTables:
    """cos and sin for one model, computed once per (length, device): [tokens, qk_rope_head_dim / 2] FP32."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._tables: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    def at(self, num_tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Tables for positions 0 .. num_tokens - 1."""
        key = (num_tokens, device)
        if key not in self._tables:
            cos, sin = rope_tables(
                num_tokens, self._config.qk_rope_head_dim, self._config.rope_theta, yarn=self._config.rope_scaling
            )
            self._tables[key] = (cos.to(device), sin.to(device))
        return self._tables[key]


def softmax_scale(config: ModelConfig) -> float:
    """qk_head_dim^-0.5, times m^2 under YaRN (fact: 0.0721688 and 0.135234 for V3)."""
    scale = float(config.qk_head_dim**-0.5)
    if config.rope_scaling is not None:
        scale *= yarn_softmax_factor(config.rope_scaling)
    return scale


# Of the latents' norms, whatever `rms_norm_eps` says. Source: the default of `RMSNorm` in the released inference code
# (deepseek-ai/DeepSeek-V3, inference/model.py) and of `DeepseekV3RMSNorm` in `transformers`; neither sets another.
LATENT_NORM_EPS = 1e-6


def _policy(context: object, operator: Any, *args: object, **kwargs: object) -> CheckpointPolicy:
    """Recomputation does not repeat the core."""
    is_core = operator.name() in CORE_OPERATORS
    return CheckpointPolicy.MUST_SAVE if is_core else CheckpointPolicy.PREFER_RECOMPUTE


_keep_core = partial(create_selective_checkpoint_contexts, _policy)


class MultiHeadLatentAttention(nn.Module):
    """MLA over whole sequences; parameters as in the released checkpoint, the down-projections fused."""

    def __init__(self, config: ModelConfig, precision: Precision, rope: RopeTables) -> None:
        super().__init__()
        self.recompute = False
        # [heads] fp32, the largest of the step, where somebody wants to know (`train/optim/qk_clip.py`).
        self.max_logit: Tensor | None = None
        self.config, self.rope, self.scale = config, rope, softmax_scale(config)
        heads, kv_rank, rope_dim = config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim
        self.a_widths = (config.q_width, kv_rank, rope_dim)
        self.q_kv_a_proj = NormedLinear(config.hidden_size, sum(self.a_widths), precision)
        if config.q_lora_rank is not None:
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS, precision)
            self.q_b_proj = NormedLinear(config.q_lora_rank, heads * config.qk_head_dim, precision)
        self.kv_a_layernorm = RMSNorm(kv_rank, LATENT_NORM_EPS, precision)
        self.kv_b_proj = NormedLinear(kv_rank, heads * (config.qk_nope_head_dim + config.v_head_dim), precision)
        self.o_proj = KeptLinear(heads * config.v_head_dim, config.hidden_size, precision)

    def forward(self, x: LinearInput, documents: Packed | None) -> Tensor:
        """[sequences, tokens, hidden] -> the same; no token reads another of the `documents`."""
        num_sequences, num_tokens, _ = x.shape
        latents, graph = self.q_kv_a_proj(x), torch.is_grad_enabled()
        output = KeptOutput() if graph and self.o_proj.precision.attention_output == "e5m6" else None
        if self.recompute and graph:
            o: Tensor = checkpoint(
                self.attend, latents, documents, output, use_reentrant=False, preserve_rng_state=False,
                context_fn=_keep_core if output is None else output.recorded,
            )  # fmt: skip
        else:
            o = self.attend(latents, documents, output)
        heads = o.transpose(1, 2).reshape(num_sequences, num_tokens, -1)  # [sequences, tokens, heads * v]
        u: Tensor = self.o_proj(heads) if output is None else self.o_proj(heads, output.put)
        return u

    def attend(self, latents: Tensor, documents: Packed | None, output: KeptOutput | None) -> Tensor:
        """Latents -> heads -> attention core: [sequences, tokens, a_widths] -> [sequences, heads, tokens, v]."""
        make = self._heads_in_fp8 if self.kv_b_proj.precision.reads_tiles else self._heads_apart
        q, k, v = make(latents, *self.rope.at(latents.shape[1], latents.device))
        if self.max_logit is not None and torch.is_grad_enabled():
            largest = max_logits(q, k, scale=self.scale, documents=documents)
            torch.maximum(self.max_logit, largest, out=self.max_logit)
        if output is None:
            return causal_attention(q, k, v, scale=self.scale, documents=documents)
        core = partial(causal_attention_of_output, q, k, v, scale=self.scale, documents=documents)
        return core() if self.recompute else output.not_saved_by(core)

    def _heads_in_fp8(self, latents: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> q, k [sequences, heads, tokens, qk], v [sequences, heads, tokens, v], in memory token by token.

        Fused attention then lays out o in the same way, and `o_proj` reads it as it is.
        """
        config, precision = self.config, self.kv_b_proj.precision
        q_up = None if config.q_lora_rank is None else self._up(self.q_a_layernorm, self.q_b_proj)
        kv_up = self._up(self.kv_a_layernorm, self.kv_b_proj)
        sizes = HeadSizes(
            config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim, precision.power_of_two_scales
        )
        q, k, v = latents_to_heads(latents.flatten(0, 1), cos, sin, sizes, q=q_up, kv=kv_up)
        q, k, v = (x.unflatten(0, latents.shape[:2]).transpose(1, 2) for x in (q, k, v))
        return q, k, v

    def _up(self, norm: RMSNorm, linear: NormedLinear) -> UpProjection:
        return UpProjection(norm.weight, norm.eps, linear.weight, linear)

    def _heads_apart(self, latents: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same, one operation after the other."""
        config = self.config
        q, kv_latent, k_rope = latents.split(self.a_widths, dim=-1)
        if config.q_lora_rank is not None:
            q = self.q_b_proj(self.q_a_layernorm.for_linear(q))
        kv = self.kv_b_proj(self.kv_a_layernorm.for_linear(kv_latent))

        q, kv = (x.unflatten(-1, (config.num_attention_heads, -1)) for x in (q, kv))  # [sequences, tokens, heads, dim]
        q_nope, q_rope = q.split((config.qk_nope_head_dim, config.qk_rope_head_dim), dim=-1)
        q_rope = apply_rope(q_rope.transpose(1, 2), cos, sin).transpose(1, 2)
        q = torch.cat((q_nope, q_rope), dim=-1)
        k_nope, v = kv.split((config.qk_nope_head_dim, config.v_head_dim), dim=-1)
        k_rope = apply_rope(k_rope, cos, sin).unsqueeze(2)  # [sequences, tokens, 1, rope]
        k = torch.cat((k_nope, k_rope.expand(-1, -1, config.num_attention_heads, -1)), dim=-1)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
