"""One depth of multi-token prediction (arXiv:2412.19437 §2.2, eq. 21-23).

    h'_i^k = M_k [RMSNorm(Emb(t_{i+k})) ; RMSNorm(h_i^{k-1})]       `eh_proj`, kept in BF16
    h^k    = RMSNorm(TRM_k(h'^k))                                   `shared_head.norm`, a norm of the depth's own

Embedding and output head are the main model's. The order of the halves is that of the released weights, opposite to
eq. 21 (from scratch the two are equivalent). h^0 is the main model's hidden state *after* its final norm and each
depth hands on its normed state, as the shipped modelling code does; the report leaves it open.
See docs/decisions/0003-mtp.md.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kernels.attention import Packed
from train.model.attention import RopeTables
from train.model.block import make_block
from train.model.config import ModelConfig
from train.model.layers import HighLinear, RMSNorm
from train.model.moe import Routing, TokenDispatcher
from train.model.phases import Run, Steps
from train.model.precision import Precision


class MultiTokenPredictor(nn.Module):
    """Depth k as layer `num_hidden_layers + k - 1` of the checkpoint: enorm, hnorm, eh_proj, a block, a norm."""

    def __init__(
        self, config: ModelConfig, precision: Precision, rope: RopeTables, dispatcher: TokenDispatcher, *, layer_id: int
    ) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = RMSNorm(hidden, eps, precision)
        self.hnorm = RMSNorm(hidden, eps, precision)
        self.eh_proj = HighLinear(2 * hidden, hidden, precision)
        self.block = make_block(config, precision, rope, dispatcher, layer_id=layer_id)
        self.norm = RMSNorm(hidden, eps, precision)

    def join(self, previous: Tensor, next_ids: Tensor, embed: Callable[[Tensor], Tensor]) -> Tensor:
        """h^{k-1} [sequences, T - k + 1, hidden] and t_{i+k} [sequences, T - k] -> h'^k [sequences, T - k, hidden]."""
        embeds = embed(next_ids)
        joined = torch.cat((self.enorm(embeds), self.hnorm(previous[:, : next_ids.shape[1]])), dim=-1)
        projected: Tensor = self.eh_proj(joined)
        return projected

    def steps(
        self, run: Run, previous: Tensor, next_ids: Tensor, embed: Callable[[Tensor], Tensor], documents: Packed | None
    ) -> Steps[tuple[Tensor, Routing | None]]:
        """Arguments of `join` -> (h^k normed, routing), phase by phase."""
        residual = yield from run("join", self.join, previous, next_ids, embed)
        residual, delta, routing = yield from self.block.steps(run, residual, None, documents)
        hidden: Tensor = yield from run("norm", self.norm, residual, delta)
        return hidden, routing
