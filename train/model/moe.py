"""DeepSeekMoE: router, experts, and the door to expert parallelism (arXiv:2412.19437 §2.1.2, eq. 12-20).

    s_i = sigmoid(u . e_i)                         FP32, `Router`
    choose 8 of 256 by s_i + b_i in the 4 best groups; gate g_i = 2.5 s_i / sum of the chosen s_j
    h'  = u + shared(u) + sum_i g_i FFN_i(u),     g_i inside FFN_i, before its down_proj (`kernels.swiglu`)

A `TokenDispatcher` brings tokens to experts: `LocalDispatcher` in one process, `parallel/expert.py` over ranks.
No token is ever dropped. `train/optim/balance.py` updates the bias.

Shapes: tokens = sequences * tokens of a micro-batch, or those that arrived at an expert's rank; rows = one for each of
their experts there, grouped by expert, each group padded with zeros to 128 rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kernels.fp8_linear import LinearInput
from kernels.permute import Dispatched, group_gates, grouping
from kernels.rmsnorm import KeptNorm
from kernels.router import route, route_softmax, sequence_balance
from train.model.config import ModelConfig
from train.model.phases import Travel
from train.model.precision import Precision


@dataclass(frozen=True)
class Routing:
    """The router's decision for one micro-batch of one layer.

    topk_ids [tokens, topk] int64; gates [tokens, topk] FP32; counts [experts] int64, tokens per expert;
    balance: FP32 scalar, sum over sequences of sum_i f_i P_i (eq. 17-20, without alpha).
    """

    topk_ids: Tensor
    gates: Tensor
    counts: Tensor
    balance: Tensor


class TokenDispatcher(Protocol):
    """Brings tokens to experts and results back. A protocol, so that the model does not import `parallel`."""

    @property
    def experts(self) -> range:
        """Global ids of the experts that live on this process."""
        ...

    def begin(self, routing: Routing) -> object:
        """Start to find out how many tokens will travel; `dispatch` takes the answer and waits for it."""
        ...

    def dispatch(self, tokens: LinearInput, routing: Routing, begun: object = None) -> Travel[Dispatched]:
        """[tokens, hidden] -> tokens where their experts are, and how these group them."""
        ...

    def combine(self, sums: Tensor, dispatched: Dispatched) -> Travel[Tensor]:
        """Sums of the experts, gates included, of the dispatched tokens -> [tokens, hidden]."""
        ...


class LocalDispatcher:
    """All experts on this process: no token travels."""

    def __init__(self, n_routed_experts: int) -> None:
        self.experts = range(n_routed_experts)

    def begin(self, routing: Routing) -> object:
        """Nothing to find out."""
        return None

    def dispatch(self, tokens: LinearInput, routing: Routing, begun: object = None) -> Travel[Dispatched]:
        """[tokens, hidden] as they are, and gates [rows], grouped by expert."""
        yield from ()
        slots = grouping(routing.topk_ids, len(self.experts))
        return Dispatched(tokens, group_gates(routing.gates, slots), slots, gradient=None, handle=None)

    def combine(self, sums: Tensor, dispatched: Dispatched) -> Travel[Tensor]:
        """[tokens, hidden] as they are: the experts have summed."""
        yield from ()
        return sums


class Router(nn.Module):
    """FP32 router, named `mlp.gate` in the checkpoint: sigmoid with bias-only selection, or V2-Lite's softmax.

    `e_score_correction_bias` [experts] FP32 is no parameter: `balance.update_bias` moves it after each step. A softmax
    router has none in its files, and here zeros.
    """

    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig, precision: Precision) -> None:
        super().__init__()
        self.config, self.precision = config, precision
        shape = (config.n_routed_experts, config.hidden_size)
        self.weight = nn.Parameter(torch.empty(shape, dtype=torch.float32))
        bias = torch.zeros(config.n_routed_experts, dtype=torch.float32)
        self.register_buffer("e_score_correction_bias", bias, persistent=config.scoring_func == "sigmoid")

    def forward(self, x: Tensor, norm: KeptNorm | None = None) -> Routing:
        """[sequences, tokens, hidden] -> Routing over sequences * tokens; with x's `norm`, x is not kept."""
        config = self.config
        logits = self.precision.fp32(x, self.weight, norm)  # [sequences, tokens, experts] fp32
        how: dict[str, Any] = {
            "topk": config.num_experts_per_tok,
            "scale": config.routed_scaling_factor,
            "normalize": config.norm_topk_prob,
        }
        if config.scoring_func == "softmax":
            routed = route_softmax(logits.flatten(0, 1), **how)
        else:
            how |= {"n_group": config.n_group, "topk_group": config.topk_group}
            routed = route(logits.flatten(0, 1), self.e_score_correction_bias, **how)
        return Routing(
            topk_ids=routed.ids,
            gates=routed.gates,
            counts=routed.counts,
            balance=sequence_balance(routed.scores.view_as(logits), config.num_experts_per_tok),
        )


class Experts(nn.Module):
    """The routed experts held by this process, stored stacked: one grouped GEMM serves them all.

    gate_up_proj [experts, 2 * moe_intermediate, hidden], gate rows first;
    down_proj [experts, hidden, moe_intermediate].
    """

    # With more rows in a micro-batch backward makes again what is not kept (`layout.max_expert_rows`); None: never.
    max_rows: int | None = None

    def __init__(self, config: ModelConfig, precision: Precision, experts: range) -> None:
        super().__init__()
        # The global id of expert 0 of the stack: initial values and checkpoints do not depend on the layout.
        self.precision, self.first_expert = precision, experts.start
        hidden, inter, dtype = config.hidden_size, config.moe_intermediate_size, precision.dtype
        self.gate_up_proj = nn.Parameter(torch.empty(len(experts), 2 * inter, hidden, dtype=dtype))
        self.down_proj = nn.Parameter(torch.empty(len(experts), hidden, inter, dtype=dtype))

    def forward(self, dispatched: Dispatched) -> Tensor:
        """Each dispatched token's sum of g_i FFN_i(token) over the experts here, [tokens, hidden]."""
        return self.precision.experts(dispatched, self.gate_up_proj, self.down_proj, max_rows=self.max_rows)
