"""One layer: a dense block or a MoE block in five phases (arXiv:2412.19437 §2.1).

    attend -> route -> dispatch -> experts -> combine

Each phase takes and returns explicit tensors: a pipeline schedule can interleave the phases of one micro-batch's
forward with another's backward (§3.2.1) without touching the math.

A block hands on the residual stream and what its FFN adds to it, not yet added: the next norm adds, normalises and
quantises in one pass. Shapes: residual, delta [sequences, tokens, hidden].
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from kernels.attention import Packed
from kernels.fp8_linear import LinearInput
from kernels.permute import Dispatched
from train.model.attention import MultiHeadLatentAttention, RopeTables
from train.model.config import ModelConfig
from train.model.layers import FeedForward, RMSNorm
from train.model.moe import Experts, Router, Routing, TokenDispatcher
from train.model.precision import Precision


@dataclass(frozen=True)
class DispatchInput:
    """What leaves `route`: the residual stream, its normed copy for each reader, and the router's decision."""

    residual: Tensor  # [sequences, tokens, hidden]
    tokens: LinearInput  # [sequences * tokens, hidden], for the routed experts
    shared: LinearInput | None  # [sequences, tokens, hidden], for the shared expert
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

    def forward(self, residual: Tensor, delta: Tensor | None, documents: Packed | None) -> tuple[Tensor, Tensor, None]:
        """Residual stream and what is to be added to it -> the same after this layer; no routing."""
        normed = self.input_layernorm.of_sum(residual, delta, linears=1)
        attended = self.self_attn(normed.linears[0], documents)
        normed = self.post_attention_layernorm.of_sum(normed.residual, attended, linears=1)
        return normed.residual, self.mlp(normed.linears[0]), None


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

    def attend(self, residual: Tensor, delta: Tensor | None, documents: Packed | None) -> tuple[Tensor, Tensor]:
        """Phase 1: norm and attention -> (residual + delta, attention's output), not added yet."""
        normed = self.input_layernorm.of_sum(residual, delta, linears=1)
        return normed.residual, self.self_attn(normed.linears[0], documents)

    def route(self, residual: Tensor, delta: Tensor | None) -> DispatchInput:
        """Phase 2: norm of the sum, scores, choice and gates."""
        shared = self.mlp.shared_experts is not None
        # Readers in the order in which they run: router, routed experts, shared expert.
        normed = self.post_attention_layernorm.of_sum(residual, delta, plain=1, linears=1 + int(shared))
        return DispatchInput(
            residual=normed.residual,
            tokens=normed.linears[0].flatten(0, 1),
            shared=normed.linears[1] if shared else None,
            routing=self.mlp.gate(normed.plain[0], normed.kept),
        )

    def dispatch(self, routed: DispatchInput) -> Dispatched:
        """Phase 3: tokens travel to their experts."""
        return self.mlp.dispatcher.dispatch(routed.tokens, routed.routing)

    def experts(self, dispatched: Dispatched) -> Tensor:
        """Phase 4: the routed experts, each times its gate, summed for each token -> [dispatched tokens, hidden]."""
        sums: Tensor = self.mlp.experts(dispatched)
        return sums

    def combine(self, routed: DispatchInput, dispatched: Dispatched, sums: Tensor) -> Tensor:
        """Phase 5: sums of g_i FFN_i(u) travel home; their sum + shared(u), to be added to the residual stream."""
        out = self.mlp.dispatcher.combine(sums, dispatched).view_as(routed.residual)
        if self.mlp.shared_experts is not None:
            out = out + self.mlp.shared_experts(routed.shared)
        return out

    def forward(
        self, residual: Tensor, delta: Tensor | None, documents: Packed | None
    ) -> tuple[Tensor, Tensor, Routing]:
        """The five phases in order: residual stream and what is to be added to it -> the same after this layer."""
        routed = self.route(*self.attend(residual, delta, documents))
        dispatched = self.dispatch(routed)
        return routed.residual, self.combine(routed, dispatched, self.experts(dispatched)), routed.routing


def make_block(
    config: ModelConfig, precision: Precision, rope: RopeTables, dispatcher: TokenDispatcher, *, layer_id: int
) -> DenseBlock | MoEBlock:
    """The block of a layer id: dense below `first_k_dense_replace`, MoE from there on."""
    if config.is_moe(layer_id):
        return MoEBlock(config, precision, rope, dispatcher)
    return DenseBlock(config, precision, rope)
