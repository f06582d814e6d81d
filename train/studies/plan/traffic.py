"""Bytes that a rank sends, by axis: tokens to experts, hidden states between stages, gradients and weights.

Expert axis, per micro-batch and MoE layer (arXiv:2412.19437 §3.2.2). A token goes once to each rank that holds one of
its experts, or once to each node and from there to the ranks; `destinations` is how many those are:

    forward    counts, routing (ids and gates), dispatch, combine
    backward   dispatch (of combine's gradient), combine (of dispatch's gradient), gates

Pipeline axis, per micro-batch (§3.2.1): the hidden state forward and its gradient back, at each border to another rank.

Data axes, per optimizer step (§3.2): reduce-scatter of FP32 gradients, all-gather of weights. A rank sends
(ranks - 1) / ranks of a buffer in either, which is what a ring does and no algorithm beats. Without BF16 weights those
of FP8 linears are gathered in E4M3, behind an all-reduce of four bytes a block.

Like `parallel.collectives.Traffic.sent`, the expert axis counts what a rank keeps for itself; a share of
(ep - 1) / ep leaves it under uniform routing, and (nodes - 1) / nodes of what goes over rail crosses nodes. Left out:
the norm, the losses and the balancing counts, a few kilobytes a step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import combinations
from math import comb

from kernels.formats import TILE, ceil_div
from parallel.layout import Layout
from train.model.config import ModelConfig
from train.model.sizes import BF16_BYTES, E4M3_BYTES, FP32_BYTES, Held, Weight

INT64_BYTES, INT32_BYTES = 8, 4


def expected_destinations(config: ModelConfig, *, ep: int) -> float:
    """Ranks that a token goes to on average, when every choice of groups and of experts in them is equally likely.

    V3 on 64 ranks: 7.36; on their 8 nodes, as `ep` of 8: 3.63. The router chooses groups by their two best experts,
    which spreads a token more evenly than chance: 7.49 and 3.95 with independent scores.
    """
    groups, chosen, topk = config.n_group, config.topk_group, config.num_experts_per_tok
    reachable, local = chosen * config.experts_per_group, config.n_routed_experts // ep
    total = 0.0
    for rank in range(ep):
        of_group = Counter(expert // config.experts_per_group for expert in range(rank * local, (rank + 1) * local))
        for number in range(min(len(of_group), chosen) + 1):
            # So many of the rank's groups are chosen, and the others elsewhere.
            likely = comb(groups - len(of_group), chosen - number) / comb(groups, chosen)
            for experts in combinations(of_group.values(), number):
                # A rank with c of the E reachable experts is missed with probability C(E - c, k) / C(E, k).
                total += likely * (1 - comb(reachable - sum(experts), topk) / comb(reachable, topk))
    return total


def most_nodes(config: ModelConfig) -> int | None:
    """Nodes to which routing sends a token at most, each group of experts being on one; None: it has no limit."""
    return config.topk_group if config.n_group > 1 else None


def dispatch_bytes(hidden_size: int, *, precision: str) -> int:
    """One token copy on its way to an expert: E4M3 with one FP32 scale per 128, or the recipe's own dtype."""
    if precision == "fp8":
        return hidden_size * E4M3_BYTES + ceil_div(hidden_size, TILE) * FP32_BYTES
    return hidden_bytes(hidden_size, precision=precision)


def hidden_bytes(hidden_size: int, *, precision: str) -> int:
    """One token on its way home from an expert, or between stages: BF16, FP32 in the fp32 recipe."""
    return hidden_size * (FP32_BYTES if precision == "fp32" else BF16_BYTES)


def share(elements: int, *, ranks: int, rank: int) -> int:
    """A rank's even share of a flat tensor: the shares of all ranks add up to it, and differ by one at most."""
    assert 0 <= rank < ranks, (rank, ranks)
    return elements // ranks + (rank < elements % ranks)


def expert_bytes(
    config: ModelConfig, layout: Layout, held: Held, *, tokens: int, precision: str, destinations: Sequence[float],
    forwards: int = 1,
) -> dict[str, float]:  # fmt: skip
    """Bytes that a rank sends to experts in forward and backward of one micro-batch, on average over the ranks.

    Args:
        forwards: of each layer; two where it runs again in backward, whose sums stay where they are.
    Returns:
        kind of `parallel.collectives.Traffic` -> bytes; empty without the axis. `destinations` are those of a token at
        each hop: ranks; or nodes, then ranks.
    """
    layers, topk = sum(config.is_moe(layer_id) for layer_id in held.layer_ids), config.num_experts_per_tok
    if layout.ep == 1 or not layers:
        return {}
    kinds = {
        "dispatch": (forwards + 1) * dispatch_bytes(config.hidden_size, precision=precision),
        "combine": 2 * hidden_bytes(config.hidden_size, precision=precision),
        "routing": forwards * topk * (INT32_BYTES + FP32_BYTES),
        "gates": topk * FP32_BYTES,
    }
    hops = ("rail.", "node.") if layout.two_hops else ("",)
    copies = {hop: layers * tokens * number for hop, number in zip(hops, destinations, strict=True)}
    sent = {f"{hop}{kind}": number * size for kind, size in kinds.items() for hop, number in copies.items()}
    # To each rank how many copies come; with two hops also how many tokens pass on, for each rank of a node.
    numbers = 1 + layout.ranks_per_node * layout.two_hops
    return sent | {"counts": forwards * layers * (layout.ep * numbers + config.n_routed_experts) * INT64_BYTES}


def destinations_by_hop(config: ModelConfig, layout: Layout) -> tuple[float, ...]:
    """Copies of a token at each hop, its own node and rank included, on average under uniform choice.

    V3: to 7.36 ranks; or to 3.63 nodes, and from there to 7.36 ranks.
    """
    shares = (layout.ep // layout.ranks_per_node, layout.ep) if layout.two_hops else (layout.ep,)
    return tuple(expected_destinations(config, ep=each) for each in shares)


def pipeline_bytes(config: ModelConfig, layout: Layout, *, pp_rank: int, tokens: int, precision: str) -> int:
    """Bytes that a rank sends to other stages in forward and backward of one micro-batch; a V turns without sending."""
    stages = layout.num_stages
    borders = 0
    for stage in layout.stages_of_rank(pp_rank):
        # Forward to the stage after, the gradient to the stage before.
        neighbours = [other for other in (stage + 1, stage - 1) if 0 <= other < stages]
        borders += sum(layout.rank_of_stage(other) != pp_rank for other in neighbours)
    return borders * tokens * hidden_bytes(config.hidden_size, precision=precision)


def ends_apart(config: ModelConfig, layout: Layout) -> bool:
    """Whether the first and the last pipeline rank both hold a copy of the embedding (the last one for MTP)."""
    return bool(config.mtp_layer_ids) and layout.rank_of_stage(layout.num_stages - 1) != 0


def gathered_bytes(weight: Weight, *, precision: str, keep_bf16_weights: bool) -> int:
    """A new weight on its way to every rank: as it is stored, or in E4M3 behind the maxima of its blocks."""
    if keep_bf16_weights or not weight.fp8:
        return weight.bytes(precision)
    # In an all-reduce a rank sends twice what it sends in an all-gather.
    blocks = weight.copies * ceil_div(weight.rows, TILE) * ceil_div(weight.cols, TILE)
    return weight.elements * E4M3_BYTES + 2 * blocks * INT32_BYTES


def update_bytes(
    config: ModelConfig, layout: Layout, table: Iterable[Weight], *, precision: str, keep_bf16_weights: bool = True
) -> dict[str, dict[str, float]]:
    """Bytes that a rank sends over the data axes in one optimizer step, whatever the number of micro-batches.

    Returns:
        axis "dp", "edp" or "tied" -> {"gradients": reduce-scatter, "weights": all-gather}; without ZeRO the summed
        FP32 gradients are gathered in place of the weights. Axes of one rank are absent. Where weights of FP8 linears
        travel in E4M3, "weights" has the all-reduce of their block maxima too.
    """
    gathered = partial(gathered_bytes, precision=precision, keep_bf16_weights=keep_bf16_weights)
    table = [weight for weight in table if weight.trained]
    sent: dict[str, dict[str, float]] = {}
    for axis, ranks in (("dp", layout.dp), ("edp", layout.edp)):
        mine = [weight for weight in table if weight.expert == (axis == "edp")]
        if ranks > 1 and mine:
            gradients = FP32_BYTES * sum(weight.elements for weight in mine)
            weights = sum(map(gathered, mine)) if layout.zero else gradients
            sent[axis] = {"gradients": gradients * (ranks - 1) / ranks, "weights": weights * (ranks - 1) / ranks}
    embedding = sum(weight.elements for weight in table if weight.part == "embedding")
    if embedding and ends_apart(config, layout):
        # An all-reduce between two ranks, on the shard of dp that each owns: half of it twice.
        sent["tied"] = {"gradients": FP32_BYTES * share(embedding, ranks=layout.dp, rank=0), "weights": 0.0}
    return sent
