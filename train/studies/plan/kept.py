"""Bytes that one micro-batch of a layer holds, in closed form from shapes (arXiv:2412.19437 §3.2.3, §3.3.3).

    kept      from forward to the end of backward
    waiting   from backward to the weight gradients: operands of products that have not run
    peaks     for a moment, above what is kept when it begins: temporaries, the exchange's buffers among them

They follow `train/model/{attention,block,moe,mtp}.py` and `parallel/expert.py` tensor by tensor. The ledger of a layer
and the dry run count the same from the code that runs; tests compare. Left out: temporaries inside kernels. With
`data.mask_documents` flash keeps v and o as wide as q, which is not counted either.

Shapes: tokens of a micro-batch; received = tokens that arrive at this rank's experts; rows = one for each of their
experts here, each expert's padded to 128.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from kernels.formats import TILE, ceil_div
from train.model.config import ModelConfig
from train.model.sizes import BF16_BYTES, E4M3_BYTES, FP32_BYTES
from train.studies.plan.traffic import INT32_BYTES, INT64_BYTES, most_nodes

# Rows whose logits exist at once (`kernels/cross_entropy.py`).
HEAD_ROWS = 2048
# Bytes of each storage, by what it is.
Storages = Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class Work:
    """One micro-batch on one rank, and how it is computed.

    Args:
        length: tokens of each sequence.
        ep: ranks that share one copy of the experts.
        recompute: queries, keys and values are made again in backward.
        layers_again: so are whole layers, and `recompute` is said too.
        e5m6: attention's output is kept in 12 bits.
        swiglu_input: FP8 keeps the input of SwiGLU only (`precision.cache_swiglu_input`).
        deferred: weight gradients wait for the end of the stage's backward, as in every pipeline.
        imbalance: how many times its even share a rank's experts receive; what it sends stays.
        ranks_per_node: with two hops to the experts, ranks of the second one.
        max_rows: of a rank's experts, beyond which they keep only tokens (`layout.max_expert_rows`).
    """

    model: ModelConfig
    sequences: int
    length: int
    ep: int
    precision: str
    recompute: bool
    e5m6: bool = False
    swiglu_input: bool = True
    deferred: bool = True
    imbalance: float = 1.0
    ranks_per_node: int | None = None
    max_rows: int | None = None
    layers_again: bool = False

    @property
    def tokens(self) -> int:
        """Of the micro-batch."""
        return self.sequences * self.length

    @property
    def fp8(self) -> bool:
        """Whether linears multiply in FP8."""
        return self.precision == "fp8"

    @property
    def local_experts(self) -> int:
        """Experts of a layer on this rank."""
        return self.model.n_routed_experts // self.ep

    @property
    def sent(self) -> int:
        """Tokens to experts, each once to every rank that it can reach; of two hops, what this rank passes on."""
        ranks = self.ranks_per_node or self.ep
        return ceil_div(self.tokens * min(self.model.num_experts_per_tok, self.ep), ranks) * ranks

    @property
    def crossing(self) -> int:
        """With two hops: tokens to nodes, each once to every one that it can reach; as many come to be passed on."""
        if self.ranks_per_node is None:
            return 0
        nodes, topk = self.ep // self.ranks_per_node, self.model.num_experts_per_tok
        return ceil_div(self.tokens * min(topk, nodes, most_nodes(self.model) or nodes), nodes) * nodes

    @property
    def received(self) -> int:
        """Tokens that arrive at this rank's experts; at most all of the group."""
        return self.tokens if self.ep == 1 else min(round(self.sent * self.imbalance), self.tokens * self.ep)

    @property
    def rows(self) -> int:
        """Rows that the experts here multiply."""
        slots, local = self.tokens * self.model.num_experts_per_tok, self.local_experts
        if self.ep == 1:
            # A bound for any routing (`kernels/permute.py`).
            return (slots + min(local, slots) * (TILE - 1)) // TILE * TILE
        most = self.tokens * self.ep * min(self.model.num_experts_per_tok, local) // local
        return local * ceil_div(min(round(ceil_div(slots, local) * self.imbalance), most), TILE) * TILE

    @property
    def again(self) -> bool:
        """Whether the experts have more rows than they may keep."""
        return self.max_rows is not None and self.rows > self.max_rows

    @property
    def regroups(self) -> bool:
        """Whether experts gather their rows out of the tokens' tiles."""
        return self.fp8 and self.swiglu_input

    @property
    def most_imbalance(self) -> float:
        """Every token of the group has as many experts on one rank as it can."""
        topk = self.model.num_experts_per_tok
        return max(self.ep * min(topk, self.local_experts) / topk, self.ep / min(topk, self.ep))

    @property
    def imbalance_at_limit(self) -> float:
        """The largest at which experts do not have more rows than they may keep; infinite without a limit."""
        if self.max_rows is None or self.ep == 1:
            return math.inf
        each = self.max_rows // (self.local_experts * TILE) * TILE
        return each / ceil_div(self.tokens * self.model.num_experts_per_tok, self.local_experts)

    def plain(self, rows: int, cols: int) -> tuple[float, ...]:
        """Numbers as they pass between operations."""
        return (rows * cols * (FP32_BYTES if self.precision == "fp32" else BF16_BYTES),)

    def tiles(self, rows: int, cols: int) -> tuple[float, ...]:
        """E4M3 in 1x128 tiles: payload and scales."""
        return rows * cols * E4M3_BYTES, rows * ceil_div(cols, TILE) * FP32_BYTES

    def gradient(self, rows: int, cols: int) -> tuple[float, ...]:
        """What a weight gradient multiplies: 128x1 tiles in FP8, else plain numbers."""
        if not self.fp8:
            return self.plain(rows, cols)
        return rows * cols * E4M3_BYTES, ceil_div(rows, TILE) * cols * FP32_BYTES

    @property
    def hidden(self) -> float:
        """Bytes of one hidden state."""
        return sum(self.plain(self.tokens, self.model.hidden_size))


def attention_kept(work: Work) -> Storages:
    """What attention and the two norms of a block keep."""
    model, tokens = work.model, work.tokens
    hidden, root = work.plain(tokens, model.hidden_size), (tokens * FP32_BYTES,)
    kept = {
        "the layer's input": hidden,
        "sum of it and attention": hidden,
        "1 / RMS of both norms": root * 2,
        "latents and RoPE key": work.plain(tokens, _latents(model)),
        "output of attention": kept_output(work),
        "log-sums of attention": (tokens * model.num_attention_heads * FP32_BYTES,),
    }
    if not work.fp8:
        kept["both norms' outputs"] = hidden * 2
    if not work.recompute:
        kept["queries, keys and values"] = heads(work)
        kept["norms of latents"] = _latent_norms(work)
    return kept


def _latents(model: ModelConfig) -> int:
    return model.q_width + model.kv_lora_rank + model.qk_rope_head_dim


def _outputs(model: ModelConfig) -> int:
    return model.num_attention_heads * model.v_head_dim


def kept_output(work: Work) -> tuple[float, ...]:
    """Attention's output as it is kept: in full, or 12 bits a number and a scale per 128."""
    cols = _outputs(work.model)
    if not work.e5m6:
        return work.plain(work.tokens, cols)
    return work.tokens * cols * 12 / 8, work.tokens * ceil_div(cols, TILE) * FP32_BYTES


def heads(work: Work) -> tuple[float, ...]:
    """Queries, keys, and the product that holds keys without rotary dims and values."""
    model, tokens = work.model, work.tokens
    wide = work.plain(tokens, model.num_attention_heads * model.qk_head_dim)
    return wide * 2 + work.plain(tokens, model.num_attention_heads * (model.qk_nope_head_dim + model.v_head_dim))


def _latent_norms(work: Work) -> tuple[float, ...]:
    """Their roots; but in FP8 their outputs too."""
    ranks = [rank for rank in (work.model.q_lora_rank, work.model.kv_lora_rank) if rank is not None]
    outputs = () if work.fp8 else tuple(size for rank in ranks for size in work.plain(work.tokens, rank))
    return *outputs, *(work.tokens * FP32_BYTES for _ in ranks)


def swiglu_kept(work: Work, rows: int, inter: int) -> tuple[float, ...]:
    """What one SwiGLU FFN keeps: its input in FP8, or input and output."""
    if work.fp8 and work.swiglu_input:
        return work.tiles(rows, 2 * inter)
    return *work.plain(rows, 2 * inter), *(work.tiles if work.fp8 else work.plain)(rows, inter)


def moe_kept(work: Work) -> Storages:
    """What router, exchange and experts keep."""
    model, tokens, rows = work.model, work.tokens, work.rows
    topk, experts, inter = model.num_experts_per_tok, model.n_routed_experts, model.moe_intermediate_size
    scores = tokens * experts * FP32_BYTES, tokens * topk * INT64_BYTES, work.sequences * experts * FP32_BYTES
    kept: dict[str, tuple[float, ...]] = {
        "router: scores, ids, shares of the experts": scores,
        "exchange: which token each copy is, and back": _exchange(work),
        "grouping: slots, rows of a token, gates, ends": (_rows_of_token(work), *_grouping(work)),
        "tokens that arrived": _tokens(work) if work.again else _arrived(work),
        "gate and up of experts": () if work.again else swiglu_kept(work, rows, inter),
    }
    if model.n_shared_experts:
        kept["gate and up of the shared expert"] = swiglu_kept(work, tokens, model.n_shared_experts * inter)
    return kept


def _exchange(work: Work) -> tuple[float, ...]:
    if work.ep == 1:
        return ()
    topk, per_node = work.model.num_experts_per_tok, work.ranks_per_node
    if per_node is None:
        return work.sent * INT64_BYTES, work.tokens * min(topk, work.ep) * INT64_BYTES
    to_nodes = work.crossing, work.tokens * min(topk, work.ep // per_node)
    to_ranks = work.sent, work.crossing * min(topk, per_node)
    return tuple(rows * INT64_BYTES for rows in (*to_nodes, *to_ranks))


def _grouping(work: Work) -> tuple[float, ...]:
    return work.rows * INT64_BYTES, work.rows * FP32_BYTES, work.local_experts * INT32_BYTES


def _rows_of_token(work: Work) -> int:
    return work.received * min(work.model.num_experts_per_tok, work.local_experts) * INT64_BYTES


def _arrived(work: Work) -> tuple[float, ...]:
    """Each token once, as it travelled; or a row for each expert."""
    hidden = work.model.hidden_size
    if work.regroups:
        return _tokens(work)
    return (work.tiles if work.fp8 else work.plain)(work.rows, hidden)


def _tokens(work: Work) -> tuple[float, ...]:
    """Each token once, as it travelled. In BF16 without an exchange it is the norm's output, which is kept anyway."""
    hidden = work.model.hidden_size
    if work.regroups:
        tiles = work.tiles(work.received, hidden)
        return tiles if work.ep == 1 else (sum(tiles),)
    return () if work.ep == 1 and not work.fp8 else work.plain(work.received, hidden)


def attention_waiting(work: Work) -> float:
    """Operands of attention's products: gradients of their outputs, and what makes their inputs again."""
    model, tokens = work.model, work.tokens
    heads, hidden = model.num_attention_heads, model.hidden_size
    outputs = [_latents(model), hidden, heads * (model.qk_nope_head_dim + model.v_head_dim)]
    outputs += [heads * model.qk_head_dim] if model.q_lora_rank is not None else []
    found = sum(sum(work.gradient(tokens, cols)) for cols in outputs)
    found += sum((work.gradient if work.e5m6 else work.plain)(tokens, _outputs(model)))
    # FP8: the sums that norms read. Else what they made.
    found += 2 * work.hidden
    roots = 2 * tokens * FP32_BYTES
    if work.fp8:
        return found + sum(work.plain(tokens, _latents(model))) + roots + sum(_latent_norms(work))
    return found + sum(size for rank in _ranks(model) for size in work.plain(tokens, rank))


def _ranks(model: ModelConfig) -> list[int]:
    return [rank for rank in (model.q_lora_rank, model.kv_lora_rank) if rank is not None]


def swiglu_waiting(work: Work, rows: int, inter: int) -> float:
    """Operands of both products of one SwiGLU FFN, without the first one's input."""
    output = swiglu_kept(work, rows, inter)
    if not (work.fp8 and work.swiglu_input):
        output = output[1:]
    return sum((*output, *work.gradient(rows, 2 * inter), *work.gradient(rows, work.model.hidden_size)))


def moe_waiting(work: Work) -> float:
    """Operands of the products of router and experts."""
    model, inter = work.model, work.model.moe_intermediate_size
    found = work.tokens * model.n_routed_experts * FP32_BYTES + sum(_arrived(work))
    if model.n_shared_experts:
        found += swiglu_waiting(work, work.tokens, model.n_shared_experts * inter)
    if work.again and work.regroups:
        # The gradient of the tokens instead of that of rows; SwiGLU's output; no gate, which would hold the exchange.
        slots, _, ends = _grouping(work)
        found += slots + ends + _rows_of_token(work)
        return found + sum((*again(work, gradient=True), *_gradient_of_tokens(work)))
    found += swiglu_waiting(work, work.rows, inter)
    found += sum(_grouping(work)) if work.regroups else work.local_experts * INT32_BYTES
    return found + (sum(_exchange(work)) if work.regroups or not work.fp8 else 0)


def again(work: Work, *, gradient: bool) -> tuple[float, ...]:
    """What experts beyond their limit hold of all rows: SwiGLU's output, in backward its input's gradient too."""
    inter = work.model.moe_intermediate_size
    if not gradient:
        return work.tiles(work.rows, inter)
    return *work.gradient(work.rows, inter), *work.gradient(work.rows, 2 * inter)


def _gradient_of_tokens(work: Work) -> tuple[float, ...]:
    """As it arrived; without an exchange the numbers, which are regrouped when the weight gradient runs."""
    hidden = work.model.hidden_size
    return work.plain(work.tokens, hidden) if work.ep == 1 else (sum(work.tiles(work.received, hidden)),)
