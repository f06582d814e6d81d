"""One layer: a dense block or a MoE block in five phases (arXiv:2412.19437 §2.1).

    attend -> route -> dispatch -> experts -> combine

Each phase takes and returns explicit tensors: a pipeline schedule can interleave the phases of one micro-batch's
forward with another's backward (§3.2.1) without touching the math.

Shapes: hidden [sequences, tokens, hidden]; rows as in `moe.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from kernels.permute import Dispatched
from train.model.attention import MultiHeadLatentAttention, RopeTables
from train.model.config import ModelConfig
from train.model.layers import FeedForward, RMSNorm
from train.model.moe import Experts, Router, Routing, TokenDispatcher
from train.model.precision import Precision


@dataclass(frozen=True)
class DispatchInput:
    """What leaves `route`: the residual stream, its normed copy as flat tokens, and the router's decision."""

    residual: Tensor
    tokens: Tensor
    routing: Routing


class MoE(nn.Module):
    """Router, routed experts and shared expert of one layer (`mlp` in the checkpoint)."""

    def __init__(self, config: ModelConfig, precision: Precision, dispatcher: TokenDispatcher) -> None:
        super().__init__()
        self.dispatcher = dispatcher
        self.gate = Router(config, precision)
        self.experts = Experts(config, precision, dispatcher.experts)
        shared_size = config.n_shared_experts * config.moe_intermediate_size
        self.shared_experts = FeedForward(config, shared_size, precision) if shared_size else None


class DenseBlock(nn.Module):
    """Pre-norm attention and a dense SwiGLU FFN: the first `first_k_dense_replace` layers."""

    def __init__(self, config: ModelConfig, precision: Precision, rope: RopeTables) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, precision)
        self.self_attn = MultiHeadLatentAttention(config, precision, rope)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, precision)
        self.mlp = FeedForward(config, config.intermediate_size, precision)

    def forward(self, hidden: Tensor, document_ids: Tensor | None) -> tuple[Tensor, None]:
        """[sequences, tokens, hidden] -> (the same, no routing)."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), document_ids)
        return hidden + self.mlp(self.post_attention_layernorm(hidden)), None


class MoEBlock(nn.Module):
    """Pre-norm attention and DeepSeekMoE, in five phases."""

    def __init__(
        self, config: ModelConfig, precision: Precision, rope: RopeTables, dispatcher: TokenDispatcher
    ) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, precision)
        self.self_attn = MultiHeadLatentAttention(config, precision, rope)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, precision)
        self.mlp = MoE(config, precision, dispatcher)

    def attend(self, hidden: Tensor, document_ids: Tensor | None) -> Tensor:
        """Phase 1: residual + attention. [sequences, tokens, hidden] -> the same."""
        attended: Tensor = hidden + self.self_attn(self.input_layernorm(hidden), document_ids)
        return attended

    def route(self, hidden: Tensor) -> DispatchInput:
        """Phase 2: norm, scores, choice and gates."""
        normed = self.post_attention_layernorm(hidden)
        return DispatchInput(residual=hidden, tokens=normed.flatten(0, 1), routing=self.mlp.gate(normed))

    def dispatch(self, routed: DispatchInput) -> Dispatched:
        """Phase 3: token copies travel to their experts."""
        return self.mlp.dispatcher.dispatch(routed.tokens, routed.routing)

    def experts(self, dispatched: Dispatched) -> Tensor:
        """Phase 4: the routed experts, each row times its gate. -> [rows, hidden]."""
        rows: Tensor = self.mlp.experts(dispatched.rows, dispatched.gates, dispatched.group_ends)
        return rows

    def combine(self, routed: DispatchInput, dispatched: Dispatched, rows: Tensor) -> Tensor:
        """Phase 5: results g_i FFN_i(u) travel home; residual + shared(u) + their sum."""
        out = self.mlp.dispatcher.combine(rows, dispatched)  # [tokens, hidden]
        if self.mlp.shared_experts is not None:
            out = out + self.mlp.shared_experts(routed.tokens)
        return routed.residual + out.view_as(routed.residual)

    def forward(self, hidden: Tensor, document_ids: Tensor | None) -> tuple[Tensor, Routing]:
        """The five phases in order."""
        routed = self.route(self.attend(hidden, document_ids))
        dispatched = self.dispatch(routed)
        return self.combine(routed, dispatched, self.experts(dispatched)), routed.routing


def make_block(
    config: ModelConfig, precision: Precision, rope: RopeTables, dispatcher: TokenDispatcher, *, layer_id: int
) -> DenseBlock | MoEBlock:
    """The block of a layer id: dense below `first_k_dense_replace`, MoE from there on."""
    if config.is_moe(layer_id):
        return MoEBlock(config, precision, rope, dispatcher)
    return DenseBlock(config, precision, rope)
