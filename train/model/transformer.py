"""The main model, its MTP chain and what they return (arXiv:2412.19437 §2.1, §2.2).

The model returns hidden states; losses are taken in `train/losses.py`. `layers` and `mtp` are ModuleDicts keyed by
layer id: a pipeline stage deletes what it does not own and every parameter keeps its name.

Shapes: hidden [sequences, tokens, hidden]. Not here: losses, parallelism, initial values (`init.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from train.model.attention import RopeTables
from train.model.block import make_block
from train.model.config import ModelConfig
from train.model.layers import Embedding, HighLinear, RMSNorm
from train.model.moe import LocalDispatcher, Routing, TokenDispatcher
from train.model.mtp import MultiTokenPredictor
from train.model.precision import Precision


@dataclass(frozen=True)
class ModelOutput:
    """One micro-batch's forward.

    hidden [sequences, tokens, hidden] after the final norm; mtp_hidden[k-1] [sequences, tokens - k, hidden] after the
    depth's own norm; routings: layer id -> Routing, MTP layers included.
    """

    hidden: Tensor
    mtp_hidden: tuple[Tensor, ...]
    routings: dict[int, Routing]


class Transformer(nn.Module):
    """The whole model of one process. Parameter names are the released ones without the leading `model.`."""

    def __init__(self, config: ModelConfig, precision: Precision, dispatcher: TokenDispatcher | None = None) -> None:
        super().__init__()
        self.config, self.precision = config, precision
        dispatcher = dispatcher or LocalDispatcher(config.n_routed_experts)
        rope = RopeTables(config)
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, precision)
        self.layers = nn.ModuleDict(
            {str(i): make_block(config, precision, rope, dispatcher, layer_id=i) for i in config.layer_ids}
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, precision)
        self.lm_head = HighLinear(config.hidden_size, config.vocab_size, precision)
        self.mtp = nn.ModuleDict(
            {str(i): MultiTokenPredictor(config, precision, rope, dispatcher, layer_id=i) for i in config.mtp_layer_ids}
        )

    def forward(self, input_ids: Tensor, document_ids: Tensor | None = None) -> ModelOutput:
        """[sequences, tokens] int64 -> ModelOutput, MTP chain included."""
        routings: dict[int, Routing] = {}
        embeds = self.embed_tokens(input_ids)  # [sequences, tokens, hidden]
        hidden = self._main(embeds, document_ids, routings)
        return ModelOutput(hidden, self._predict_further(hidden, embeds, document_ids, routings), routings)

    def next_token_hidden(self, input_ids: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """The main model alone, for evaluation: [sequences, tokens] -> [sequences, tokens, hidden], normed."""
        return self._main(self.embed_tokens(input_ids), document_ids, {})

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden] -> [..., vocab]; the head is shared by the main model and every MTP depth."""
        scores: Tensor = self.lm_head(hidden)
        return scores

    def _main(self, embeds: Tensor, document_ids: Tensor | None, routings: dict[int, Routing]) -> Tensor:
        """Every layer and the final norm; notes each layer's routing in `routings`."""
        hidden = embeds
        for layer_id, block in self.layers.items():
            hidden, routing = block(hidden, document_ids)
            if routing is not None:
                routings[int(layer_id)] = routing
        normed: Tensor = self.norm(hidden)
        return normed

    def _predict_further(
        self, hidden: Tensor, embeds: Tensor, document_ids: Tensor | None, routings: dict[int, Routing]
    ) -> tuple[Tensor, ...]:
        """The MTP chain (§2.2): depth k turns positions 1..T-k of depth k-1 and Emb(t_{i+k}) into its own hidden."""
        chain = []
        for depth, (layer_id, predictor) in enumerate(self.mtp.items(), start=1):
            num_tokens = embeds.shape[1] - depth
            if num_tokens < 1:
                break
            ids = None if document_ids is None else document_ids[:, :num_tokens]
            hidden, routing = predictor(hidden[:, :num_tokens], embeds[:, depth:], ids)
            chain.append(hidden)
            if routing is not None:
                routings[int(layer_id)] = routing
        return tuple(chain)
