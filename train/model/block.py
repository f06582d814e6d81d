"""One layer in phases: a dense block or a MoE block (arXiv:2412.19437 §2.1).

    dense    attend -> feed
    MoE      attend -> route -> dispatch -> experts -> shared -> combine

Each phase takes and returns explicit tensors: a pipeline schedule interleaves the phases of one micro-batch's forward
with another's backward (§3.2.1) without touching the math (`phases.py`). The shared expert stands before `combine`, so
that in backward, where phases run in reverse, the tokens' gradients are under way before it computes.

With `recompute` a layer is one phase and keeps its input only, to run again in backward: `layer_again.py`.

A block hands on the residual stream and what its FFN adds to it, not yet added: the next norm adds, normalises and
quantises in one pass. Shapes: residual, delta [sequences, tokens, hidden].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels.attention import Packed
from kernels.fp8_linear import LinearInput
from kernels.permute import Dispatched
from train.model.attention import MultiHeadLatentAttention, RopeTables
from train.model.config import ModelConfig
from train.model.layer_again import layer_again
from train.model.layers import FeedForward, RMSNorm
from train.model.moe import Experts, Router, Routing, TokenDispatcher
from train.model.phases import Run, Steps, Travel, at_once, finish
from train.model.precision import Precision

# The residual stream, what is to be added to it (None: nothing), and a MoE layer's routing.
LayerOutput = tuple[Tensor, Tensor | None, Routing | None]


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


class _Block(nn.Module):
    """Pre-norm attention, which every layer begins with."""

    # The layer of a kind, phase by phase.
    phases: Callable[[Run, Tensor, Tensor | None, Packed | None], Steps[LayerOutput]]

    def __init__(self, config: ModelConfig, precision: Precision, rope: RopeTables) -> None:
        super().__init__()
        self.recompute = False
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, precision)
        self.self_attn = MultiHeadLatentAttention(config, precision, rope)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, precision)

    def attend(self, residual: Tensor, delta: Tensor | None, documents: Packed | None) -> tuple[Tensor, Tensor]:
        """Norm and attention -> (residual + delta, attention's output), not added yet."""
        normed = self.input_layernorm.of_sum(residual, delta, linears=1)
        return normed.residual, self.self_attn(normed.linears[0], documents)

    def steps(self, run: Run, residual: Tensor, delta: Tensor | None, documents: Packed | None) -> Steps[LayerOutput]:
        """`forward`, phase by phase."""
        if not (self.recompute and torch.is_grad_enabled()):
            return (yield from self.phases(run, residual, delta, documents))

        def layer(run: Run, x: Tensor) -> LayerOutput:
            return finish(self.phases(run, x, None, documents))

        total, routing = yield from run("layer", layer_again, layer, residual, delta)
        return total, None, routing

    def forward(self, residual: Tensor, delta: Tensor | None, documents: Packed | None) -> LayerOutput:
        """Residual stream and what is to be added to it -> the same after this layer; a MoE layer's routing."""
        return finish(self.steps(at_once, residual, delta, documents))


class DenseBlock(_Block):
    """Attention and a dense SwiGLU FFN: the first `first_k_dense_replace` layers."""

    def __init__(self, config: ModelConfig, precision: Precision, rope: RopeTables) -> None:
        super().__init__(config, precision, rope)
        self.mlp = FeedForward(config, config.intermediate_size, precision)

    def feed(self, residual: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Norm of the sum and FFN -> (residual + delta, the FFN's output), not added yet."""
        normed = self.post_attention_layernorm.of_sum(residual, delta, linears=1)
        return normed.residual, self.mlp(normed.linears[0])

    def phases(self, run: Run, residual: Tensor, delta: Tensor | None, documents: Packed | None) -> Steps[LayerOutput]:
        """Attention, FFN."""
        residual, delta = yield from run("attend", self.attend, residual, delta, documents)
        residual, delta = yield from run("feed", self.feed, residual, delta)
        return residual, delta, None


class MoEBlock(_Block):
    """Attention and DeepSeekMoE."""

    def __init__(
        self, config: ModelConfig, precision: Precision, rope: RopeTables, dispatcher: TokenDispatcher
    ) -> None:
        super().__init__(config, precision, rope)
        self.mlp = MoE(config, precision, dispatcher)

    def route(self, residual: Tensor, delta: Tensor | None) -> DispatchInput:
        """Norm of the sum, scores, choice and gates."""
        shared = self.mlp.shared_experts is not None
        # Readers in the order in which they run: router, routed experts, shared expert.
        normed = self.post_attention_layernorm.of_sum(residual, delta, plain=1, linears=1 + int(shared))
        return DispatchInput(
            residual=normed.residual,
            tokens=normed.linears[0].flatten(0, 1),
            shared=normed.linears[1] if shared else None,
            routing=self.mlp.gate(normed.plain[0], normed.kept),
        )

    def dispatch(self, routed: DispatchInput, begun: object = None) -> Travel[Dispatched]:
        """Tokens travel to their experts; `begun` is the dispatcher's, None where it has not begun."""
        return self.mlp.dispatcher.dispatch(routed.tokens, routed.routing, begun)

    def experts(self, dispatched: Dispatched) -> Tensor:
        """The routed experts, each times its gate, summed for each token -> [dispatched tokens, hidden]."""
        sums: Tensor = self.mlp.experts(dispatched)
        return sums

    def shared(self, routed: DispatchInput) -> Tensor | None:
        """The shared expert of u, [sequences, tokens, hidden]; None where there is none."""
        return None if self.mlp.shared_experts is None else self.mlp.shared_experts(routed.shared)

    def combine(
        self, routed: DispatchInput, dispatched: Dispatched, sums: Tensor, shared: Tensor | None
    ) -> Travel[Tensor]:
        """Sums of g_i FFN_i(u) travel home; their sum + shared(u), to be added to the residual stream."""
        tokens = yield from self.mlp.dispatcher.combine(sums, dispatched)
        out = tokens.view_as(routed.residual)
        return out if shared is None else out + shared

    def _route_and_begin(self, residual: Tensor, delta: Tensor | None) -> tuple[DispatchInput, object]:
        """`route`, and what `dispatch` will wait for: the more is issued in between, the shorter."""
        routed = self.route(residual, delta)
        return routed, self.mlp.dispatcher.begin(routed.routing)

    def phases(self, run: Run, residual: Tensor, delta: Tensor | None, documents: Packed | None) -> Steps[LayerOutput]:
        """Attention, MoE."""
        residual, delta = yield from run("attend", self.attend, residual, delta, documents)
        routed, begun = yield from run("route", self._route_and_begin, residual, delta)
        del residual, delta
        # mypy does not see T in T | Travel[T].
        dispatched: Dispatched = yield from run("dispatch", self.dispatch, routed, begun)  # type: ignore[arg-type]
        del begun
        sums = yield from run("experts", self.experts, dispatched)
        shared = yield from run("shared", self.shared, routed)
        delta = yield from run("combine", self.combine, routed, dispatched, sums, shared)  # type: ignore[arg-type]
        return routed.residual, delta, routed.routing


def make_block(
    config: ModelConfig, precision: Precision, rope: RopeTables, dispatcher: TokenDispatcher, *, layer_id: int
) -> DenseBlock | MoEBlock:
    """The block of a layer id: dense below `first_k_dense_replace`, MoE from there on."""
    if config.is_moe(layer_id):
        return MoEBlock(config, precision, rope, dispatcher)
    return DenseBlock(config, precision, rope)
