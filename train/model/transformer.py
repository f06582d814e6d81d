"""The main model, its MTP chain and what they return (arXiv:2412.19437 §2.1, §2.2).

The model returns hidden states; losses are taken in `train/losses.py`. A pipeline stage is the same class with fewer
layers: `layers` and `mtp` are ModuleDicts keyed by layer id, so every parameter has its name on every stage. The first
stage holds the embedding; the last one norm, head and MTP, and for MTP an embedding too.

Shapes: hidden [sequences, tokens, hidden].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from kernels.attention import documents_of
from kernels.cross_entropy import linear_cross_entropy_sum
from train.model.attention import MultiHeadLatentAttention, RopeTables
from train.model.block import DenseBlock, MoEBlock, make_block
from train.model.config import ModelConfig, StageSpec, whole
from train.model.layers import Embedding, HighLinear, Linear, RMSNorm
from train.model.moe import Experts, LocalDispatcher, Routing, TokenDispatcher
from train.model.mtp import MultiTokenPredictor
from train.model.phases import Run, Steps, at_once, finish
from train.model.precision import Precision


@dataclass(frozen=True)
class ModelOutput:
    """One micro-batch's forward."""

    hidden: Tensor  # [sequences, tokens, hidden], after the final norm on the last stage
    mtp_hidden: tuple[Tensor, ...]  # [k-1]: [sequences, tokens - k, hidden] after the depth's norm; last stage only
    routings: dict[int, Routing]  # by layer id, MTP layers included


class Transformer(nn.Module):
    """The model, or one stage of it. Parameter names are the released ones without the leading `model.`."""

    def __init__(
        self,
        config: ModelConfig,
        precision: Precision,
        dispatcher: TokenDispatcher | None = None,
        spec: StageSpec | None = None,
    ) -> None:
        super().__init__()
        self.config, self.precision, self.spec = config, precision, spec or whole(config)
        dispatcher = dispatcher or LocalDispatcher(config.n_routed_experts)
        rope = RopeTables(config)
        mtp_layer_ids = config.mtp_layer_ids if self.spec.is_last else range(0)
        if self.spec.is_first or mtp_layer_ids:
            self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, precision)
        self.layers = nn.ModuleDict(
            {str(i): make_block(config, precision, rope, dispatcher, layer_id=i) for i in self.spec.layer_ids}
        )
        if self.spec.is_last:
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, precision)
            self.lm_head = HighLinear(config.hidden_size, config.vocab_size, precision)
        self.mtp = nn.ModuleDict(
            {str(i): MultiTokenPredictor(config, precision, rope, dispatcher, layer_id=i) for i in mtp_layer_ids}
        )

    def forward(
        self, input_ids: Tensor, document_ids: Tensor | None = None, hidden: Tensor | None = None
    ) -> ModelOutput:
        """One micro-batch through the layers of this stage, and the MTP chain on the last one.

        Args:
            input_ids: [sequences, tokens] int64.
            document_ids: [sequences, tokens] int64 on the host limits attention to a document, or None.
            hidden: [sequences, tokens, hidden] from the stage before; None on the first.
        """
        return finish(self.steps(at_once, input_ids, document_ids, hidden))

    def steps(
        self, run: Run, input_ids: Tensor, document_ids: Tensor | None = None, hidden: Tensor | None = None
    ) -> Steps[ModelOutput]:
        """`forward`, phase by phase."""
        routings: dict[int, Routing] = {}
        hidden = yield from self._main(run, input_ids, document_ids, hidden, routings)
        chain = yield from self._predict_further(run, hidden, input_ids, document_ids, routings)
        return ModelOutput(hidden, chain, routings)

    def next_token_hidden(
        self, input_ids: Tensor, document_ids: Tensor | None = None, hidden: Tensor | None = None
    ) -> Tensor:
        """The main model alone, for evaluation: arguments of `forward` -> [sequences, tokens, hidden]."""
        return finish(self._main(at_once, input_ids, document_ids, hidden, {}))

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden] -> [..., vocab]; the head is shared by the main model and every MTP depth."""
        scores: Tensor = self.lm_head(hidden)
        return scores

    def cross_entropy(self, hidden: Tensor, labels: Tensor, *, scale: float = 1.0) -> Tensor:
        """Sum of the targets' cross entropy, nats, without the logits of all tokens; `linear_cross_entropy_sum`.

        hidden [sequences, tokens, hidden], labels [sequences, tokens] int64; `scale` weights it in the total loss.
        """
        rows, weight = hidden.flatten(0, 1), self.lm_head.weight
        return linear_cross_entropy_sum(rows, weight, labels.flatten(), scale=scale)

    def _main(
        self,
        run: Run,
        input_ids: Tensor,
        document_ids: Tensor | None,
        hidden: Tensor | None,
        routings: dict[int, Routing],
    ) -> Steps[Tensor]:
        """Embedding on the first stage, every layer, `_end`; adds each layer's routing to `routings`."""
        if self.spec.is_first:
            hidden = yield from run("embed", self.embed_tokens, input_ids)
        assert hidden is not None, "a stage after the first needs the hidden state of the one before"
        documents = documents_of(document_ids, input_ids.device)
        residual, delta = hidden, None
        for layer_id, block in self.layers.items():
            assert isinstance(block, DenseBlock | MoEBlock)
            residual, delta, routing = yield from block.steps(run, residual, delta, documents)
            if routing is not None:
                routings[int(layer_id)] = routing
        return (yield from run("end", self._end, residual, delta))

    def _end(self, residual: Tensor, delta: Tensor | None) -> Tensor:
        """The final norm on the last stage; elsewhere the sum, for one tensor travels to the next stage."""
        if self.spec.is_last:
            normed: Tensor = self.norm(residual, delta)
            return normed
        return residual if delta is None else residual + delta

    def _predict_further(
        self, run: Run, hidden: Tensor, input_ids: Tensor, document_ids: Tensor | None, routings: dict[int, Routing]
    ) -> Steps[tuple[Tensor, ...]]:
        """The MTP chain (§2.2): depth k turns positions 1..T-k of depth k-1 and Emb(t_{i+k}) into its own hidden."""
        chain = []
        for depth, (layer_id, predictor) in enumerate(self.mtp.items(), start=1):
            num_tokens = input_ids.shape[1] - depth
            if num_tokens < 1:
                break
            assert isinstance(predictor, MultiTokenPredictor)
            ids = None if document_ids is None else document_ids[:, :num_tokens]
            documents = documents_of(ids, input_ids.device)
            # A lookup for each depth: the gradients meet in FP32, in the weight's, not in the activation's dtype; and a
            # pipeline, whose last stage cannot reach the first one's lookup, computes the same.
            next_ids = input_ids[:, depth:]  # [sequences, tokens - depth]
            hidden, routing = yield from predictor.steps(run, hidden, next_ids, self.embed_tokens, documents)
            chain.append(hidden)
            if routing is not None:
                routings[int(layer_id)] = routing
        return tuple(chain)


def fp8_weights(model: nn.Module, precision: Precision) -> dict[str, nn.Parameter]:
    """The parameters that are read in E4M3 blocks, by name: our FP8 linears; none in another recipe."""
    if precision.name != "fp8":
        return {}
    linears = (
        (name, module) for name, module in model.named_modules()
        if isinstance(module, Linear | Experts) and not isinstance(module, HighLinear)
    )  # fmt: skip
    return {f"{name}.{leaf}": weight for name, module in linears for leaf, weight in module.named_parameters()}


def recompute_up_projections(model: Transformer) -> None:
    """Make queries, keys and values again in backward instead of keeping them (§3.2.3); values stay the same bits."""
    for module in model.modules():
        if isinstance(module, MultiHeadLatentAttention):
            module.recompute = True


def recompute_as_asked(model: Transformer, what: bool | Literal["layers"]) -> None:
    """Keep less for backward (`run.recompute`): nothing less, no queries, keys and values, or layers' inputs only."""
    if what:
        recompute_up_projections(model)
    if what == "layers":
        for module in model.modules():
            if isinstance(module, DenseBlock | MoEBlock):
                module.recompute = True


def limit_expert_rows(model: Transformer, rows: int | None) -> None:
    """Let experts keep only their tokens where a layer has more than so many rows here; values stay the same bits."""
    for module in model.modules():
        if isinstance(module, Experts):
            module.max_rows = rows
