"""Sizes of a model and of a rank's share of it: one table of weights; parameters and FLOPs are sums over it.

Integer arithmetic on shapes; nothing is built. `weights` lists every matrix and gain that a rank holds
(arXiv:2412.19437 §2.1, §2.2 for the shapes). FLOPs follow the 6N rule (§4.2 for V3's sizes):

    GEMMs            6 x rows x cols per token and use: fprop, dgrad and wgrad, 2 FLOPs per multiplication and addition
    attention core   causal, half of tokens^2: per layer and token 3 x 2 x (tokens / 2) x heads x (qk + v)

V3 at 4096 tokens: 219.75 GFLOP of GEMMs and 30.70 of attention a token, 250.4 in all without MTP. Softmax, norms, the
embedding's lookup and the scores that a fused backward computes again are not counted. An MTP depth counts as if it saw
every token (it sees `tokens - k`).

Shapes: matrices are [rows, cols] = [out, in]; `copies` counts the experts of a stack.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from train.model.config import ModelConfig, StageSpec

FP32_BYTES, BF16_BYTES, E4M3_BYTES = 4, 2, 1


@dataclass(frozen=True)
class Held:
    """Which parts of the model a rank holds, over all its stages.

    Args:
        layer_ids: main and MTP layers, by id.
        embedding: the token embedding, or a copy of it.
        head: final norm and output head.
    """

    layer_ids: tuple[int, ...]
    embedding: bool
    head: bool


def held_by(config: ModelConfig, stages: Iterable[StageSpec]) -> Held:
    """What the stages of one rank hold together; an embedding that two of them need is held once.

    Args:
        config: of the whole model.
        stages: of the rank.
    Returns:
        MTP layers are on the last stage, and with them an embedding.
    """
    stages = tuple(stages)
    first, last = any(stage.is_first for stage in stages), any(stage.is_last for stage in stages)
    mtp_layer_ids = tuple(config.mtp_layer_ids) if last else ()
    layer_ids = sorted(layer_id for stage in stages for layer_id in stage.layer_ids)
    return Held((*layer_ids, *mtp_layer_ids), embedding=first or bool(mtp_layer_ids), head=last)


@dataclass(frozen=True)
class Weight:
    """`copies` equal tensors [rows, cols] on one rank; a gain or bias is one row.

    Args:
        part: what it belongs to, the row of a table of FLOPs.
        uses: products with one [rows, cols] matrix that a token takes part in; 0 for what is no GEMM.
        fp8: multiplied in FP8 when the recipe is fp8.
        fp32: stored FP32 in every recipe.
        expert: replicated over the expert-data axis only; else over the data axis.
        trained: has a gradient; only the router's bias has none.
        parts: rows of the tensors of the released checkpoint that are fused in it; (): it is one of them.
    """

    part: str
    rows: int
    cols: int
    copies: int = 1
    uses: int = 0
    fp8: bool = False
    fp32: bool = False
    expert: bool = False
    trained: bool = True
    parts: tuple[int, ...] = ()

    @property
    def elements(self) -> int:
        """Elements of all copies."""
        return self.copies * self.rows * self.cols

    @property
    def by_muon(self) -> bool:
        """Whether `optim=muon` moves it: linears and experts, not embedding, head, router and norms."""
        return self.fp8 or self.part == "mtp_projection"

    def matrices(self) -> Iterator[tuple[int, int]]:
        """[rows, cols] of the tensors of the released checkpoint, in order."""
        for _ in range(self.copies):
            yield from ((rows, self.cols) for rows in self.parts or (self.rows,))

    def stored_fp32(self, precision: str) -> bool:
        """Whether the weight itself is FP32 in a recipe, 'fp32', 'bf16' or 'fp8'."""
        return self.fp32 or precision == "fp32"

    def bytes(self, precision: str) -> int:
        """Bytes of the stored weight."""
        return self.elements * (FP32_BYTES if self.stored_fp32(precision) else BF16_BYTES)


def weights(config: ModelConfig, held: Held, *, ep: int) -> list[Weight]:
    """Every weight of a rank, the router's bias included.

    Args:
        config: of the whole model.
        held: what this rank holds.
        ep: ranks that share one copy of the experts.
    Returns:
        The table, in the order of the model's parameters; its elements over one column of the pipeline and one expert
        group are the whole model's.
    """
    hidden, vocab = config.hidden_size, config.vocab_size
    table: list[Weight] = []
    if held.embedding:
        table.append(Weight("embedding", vocab, hidden))
    mtp_layer_ids = [layer_id for layer_id in held.layer_ids if layer_id in config.mtp_layer_ids]
    for layer_id in held.layer_ids:
        if layer_id not in mtp_layer_ids:
            table += _layer(config, layer_id, ep=ep)
    if held.head:
        # One head serves the main model and every MTP depth.
        table += [Weight("norms", 1, hidden), Weight("head", vocab, hidden, uses=1 + len(mtp_layer_ids))]
    for layer_id in mtp_layer_ids:
        # enorm and hnorm; at the end the depth's own last norm.
        table += [Weight("norms", 1, hidden)] * 2 + [Weight("mtp_projection", hidden, 2 * hidden, uses=1)]
        table += [*_layer(config, layer_id, ep=ep), Weight("norms", 1, hidden)]
    return table


def _layer(config: ModelConfig, layer_id: int, *, ep: int) -> Iterator[Weight]:
    yield from _attention(config)
    yield from _experts(config, ep=ep) if config.is_moe(layer_id) else _feed_forward(config)


def _attention(config: ModelConfig) -> Iterator[Weight]:
    """MLA and the two norms of its block, eq. 1-11."""
    hidden, heads, latent = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    linear = partial(Weight, "attention", uses=1, fp8=True)
    a_parts = (config.q_width, latent + config.qk_rope_head_dim)
    yield Weight("norms", 1, hidden)
    yield linear(sum(a_parts), hidden, parts=a_parts)
    if config.q_lora_rank is not None:
        yield Weight("norms", 1, config.q_lora_rank)
        yield linear(heads * config.qk_head_dim, config.q_lora_rank)
    yield Weight("norms", 1, latent)
    yield linear(heads * (config.qk_nope_head_dim + config.v_head_dim), latent)
    yield linear(hidden, heads * config.v_head_dim)
    yield Weight("norms", 1, hidden)


def _feed_forward(config: ModelConfig) -> Iterator[Weight]:
    hidden, inter = config.hidden_size, config.intermediate_size
    yield Weight("dense_ffn", 2 * inter, hidden, uses=1, fp8=True, parts=(inter, inter))
    yield Weight("dense_ffn", hidden, inter, uses=1, fp8=True)


def _experts(config: ModelConfig, *, ep: int) -> Iterator[Weight]:
    """Router with its bias, shared expert, and this rank's share of the routed ones, eq. 12-16."""
    hidden, inter, routed = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
    assert routed % ep == 0, (routed, ep)
    yield Weight("router", routed, hidden, uses=1, fp32=True)
    if config.scoring_func == "sigmoid":
        yield Weight("router_bias", 1, routed, fp32=True, trained=False)
    shared = config.n_shared_experts * inter
    if shared:
        yield Weight("shared_experts", 2 * shared, hidden, uses=1, fp8=True, parts=(shared, shared))
        yield Weight("shared_experts", hidden, shared, uses=1, fp8=True)
    # A token of this rank meets topk experts somewhere in the group; balanced, this rank serves as many in return.
    local, topk = routed // ep, config.num_experts_per_tok
    for rows, cols, parts in ((2 * inter, hidden, (inter, inter)), (hidden, inter, ())):
        yield Weight("routed_experts", rows, cols, copies=local, uses=topk, fp8=True, expert=True, parts=parts)


@dataclass(frozen=True)
class Parameters:
    """Elements on one rank, the router's bias included; see `Weight.expert`."""

    dense: int
    expert: int


def parameters(table: Iterable[Weight]) -> Parameters:
    """Count the elements of a table."""
    table = tuple(table)
    expert = sum(weight.elements for weight in table if weight.expert)
    return Parameters(dense=sum(weight.elements for weight in table) - expert, expert=expert)


# fprop, dgrad, wgrad; one multiplication and one addition each.
FLOPS_PER_WEIGHT = 6


def flops_per_token(
    config: ModelConfig, table: Iterable[Weight], held: Held, *, sequence_length: int
) -> dict[str, int]:
    """FLOPs of forward and backward on one token of this rank, under balanced routing.

    Args:
        config: of the whole model.
        table: of the rank, from `train.model.sizes.weights`.
        held: the same rank's layers.
        sequence_length: tokens that attention runs over.
    Returns:
        part -> FLOPs; "attention_core" beside the parts of the table. Parts without a GEMM are absent.
    """
    flops: Counter[str] = Counter()
    for weight in table:
        if weight.uses:
            flops[weight.part] += FLOPS_PER_WEIGHT * weight.uses * weight.rows * weight.cols
    per_layer = 3 * sequence_length * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    flops["attention_core"] = len(held.layer_ids) * per_layer
    return dict(flops)


def layer_costs(config: ModelConfig) -> tuple[float, ...]:
    """Work of each layer on one token, in weights it multiplies with; MTP and heads are counted into the last.

    Enough to balance a pipeline: attention's own products are the same in every layer and left out.
    """

    def cost(*layer_ids: int, head: bool = False) -> float:
        table = weights(config, Held(layer_ids, embedding=False, head=head), ep=1)
        return float(sum(weight.uses * weight.rows * weight.cols for weight in table))

    *others, last = config.layer_ids
    return (*(cost(layer_id) for layer_id in others), cost(last, *config.mtp_layer_ids, head=True))


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Parameters in total and active per token (topk of the routed experts), MTP layers apart; over all ranks.

    Returns:
        {"total", "active", "mtp"}: `total` and `active` leave the MTP layers out.
    """

    def trained(held: Held, *parts: str) -> int:
        table = weights(config, held, ep=1)
        return sum(weight.elements for weight in table if weight.trained and (not parts or weight.part in parts))

    main = Held(tuple(config.layer_ids), embedding=True, head=True)
    total, routed = trained(main), trained(main, "routed_experts")
    idle_share = 1 - config.num_experts_per_tok / config.n_routed_experts
    mtp = trained(Held(tuple(config.mtp_layer_ids), embedding=False, head=False))
    return {"total": total, "active": round(total - idle_share * routed), "mtp": mtp}


def model_flops_per_token(config: ModelConfig, *, sequence_length: int) -> int:
    """FLOPs of forward and backward on one token, without MTP and router, as published figures count them.

    Source: arXiv:2505.09343 table 4: 38.94 % MFU on causal FLOPs of so many a token.
    """
    held = Held(tuple(config.layer_ids), embedding=True, head=True)
    table = [weight for weight in weights(config, held, ep=1) if weight.part != "router"]
    return sum(flops_per_token(config, table, held, sequence_length=sequence_length).values())
