"""What a rank holds: its weights as a table, and the bytes of weights, FP8 copies, gradients, masters and moments.

Everything here is integer arithmetic on shapes; nothing is built. One table, `weights`, lists every matrix and gain
that a rank holds (arXiv:2412.19437 §2.1, §2.2 for the shapes); parameters, bytes and, in `train/plan/flops.py`, FLOPs
are sums over it.

    weights      BF16, 2 bytes; router FP32 with its bias, 4 bytes
    FP8 copies   1 byte and one FP32 scale per 128x128 block, for every linear of attention, FFN and experts; the
                 transposed copy that dgrad reads is a view
    gradients    FP32, 4 bytes, whole on every rank (`parallel/zero.py` scatters the sums, not the buffers)
    masters      FP32, 4 bytes, sharded; an FP32 weight is its own master
    moments      two, BF16 by default, sharded

Sharded means over the data axis (dense) or the expert-data axis (experts). A rank's share is the even one: the real cut
follows bucket borders and adds at most 127 elements of padding per parameter and 128 x ranks - 1 per bucket.

Shapes: matrices are [rows, cols] = [out, in]; `copies` counts the experts of a stack. Not here: activations, buffers of
collectives and temporaries, which the dry run counts from the operators themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from kernels.formats import TILE, ceil_div
from parallel.mesh import Layout
from train.model.config import ModelConfig
from train.model.transformer import Part

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


def held_by(config: ModelConfig, parts: Iterable[Part]) -> Held:
    """What the stages of one rank hold together; an embedding that two of them need is held once.

    Args:
        config: of the whole model.
        parts: the stages of the rank.
    Returns:
        MTP layers are with the part that ends, and with them an embedding.
    """
    parts = tuple(parts)
    begins, ends = any(part.begins for part in parts), any(part.ends for part in parts)
    mtp_layer_ids = tuple(config.mtp_layer_ids) if ends else ()
    layer_ids = sorted(layer_id for part in parts for layer_id in part.layer_ids)
    return Held((*layer_ids, *mtp_layer_ids), embedding=begins or bool(mtp_layer_ids), head=ends)


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

    @property
    def elements(self) -> int:
        """Elements of all copies."""
        return self.copies * self.rows * self.cols

    def stored_fp32(self, precision: str) -> bool:
        """Whether the weight itself is FP32 in a recipe, 'fp32', 'bf16' or 'fp8'."""
        return self.fp32 or precision == "fp32"

    def bytes(self, precision: str) -> int:
        """Bytes of the stored weight."""
        return self.elements * (FP32_BYTES if self.stored_fp32(precision) else BF16_BYTES)

    def fp8_bytes(self, precision: str) -> int:
        """Bytes of the E4M3 copy, of the same stored transposed, and of block scales; 0 outside the fp8 recipe."""
        if not self.fp8 or precision != "fp8":
            return 0
        blocks = self.copies * ceil_div(self.rows, TILE) * ceil_div(self.cols, TILE)
        return 2 * self.elements * E4M3_BYTES + blocks * FP32_BYTES


def weights(config: ModelConfig, held: Held, *, ep: int) -> list[Weight]:
    """Every weight of a rank, the router's bias included.

    Args:
        config: of the whole model.
        held: what this rank holds.
        ep: ranks that share one copy of the experts.
    Returns:
        The table; its elements over one column of the pipeline and one expert group are the whole model's.
    """
    hidden, vocab = config.hidden_size, config.vocab_size
    table: list[Weight] = []
    if held.embedding:
        table.append(Weight("embedding", vocab, hidden))
    for layer_id in held.layer_ids:
        if layer_id in config.mtp_layer_ids:
            # enorm, hnorm and the depth's own last norm.
            table += [Weight("norms", 3, hidden), Weight("mtp_projection", hidden, 2 * hidden, uses=1)]
        table += _attention(config)
        table += _experts(config, ep=ep) if config.is_moe(layer_id) else _feed_forward(config)
    if held.head:
        depths = len([layer_id for layer_id in held.layer_ids if layer_id in config.mtp_layer_ids])
        # One head serves the main model and every MTP depth.
        table += [Weight("norms", 1, hidden), Weight("head", vocab, hidden, uses=1 + depths)]
    return table


def _attention(config: ModelConfig) -> Iterator[Weight]:
    """MLA and the two norms of its block, eq. 1-11."""
    hidden, heads, latent = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    shapes = [
        (config.q_width + latent + config.qk_rope_head_dim, hidden),
        (heads * (config.qk_nope_head_dim + config.v_head_dim), latent),
        (hidden, heads * config.v_head_dim),
    ]
    gains = [hidden, hidden, latent]
    if config.q_lora_rank is not None:
        shapes.append((heads * config.qk_head_dim, config.q_lora_rank))
        gains.append(config.q_lora_rank)
    yield from (Weight("norms", 1, gain) for gain in gains)
    yield from (Weight("attention", rows, cols, uses=1, fp8=True) for rows, cols in shapes)


def _feed_forward(config: ModelConfig) -> Iterator[Weight]:
    hidden, inter = config.hidden_size, config.intermediate_size
    for rows, cols in ((2 * inter, hidden), (hidden, inter)):
        yield Weight("dense_ffn", rows, cols, uses=1, fp8=True)


def _experts(config: ModelConfig, *, ep: int) -> Iterator[Weight]:
    """Router with its bias, shared expert, and this rank's share of the routed ones, eq. 12-16."""
    hidden, inter, routed = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
    assert routed % ep == 0, (routed, ep)
    yield Weight("router", routed, hidden, uses=1, fp32=True)
    yield Weight("router_bias", 1, routed, fp32=True, trained=False)
    shared = config.n_shared_experts * inter
    for rows, cols in ((2 * shared, hidden), (hidden, shared)):
        if shared:
            yield Weight("shared_experts", rows, cols, uses=1, fp8=True)
    # A token of this rank meets topk experts somewhere in the group; balanced, this rank serves as many in return.
    topk = config.num_experts_per_tok
    for rows, cols in ((2 * inter, hidden), (hidden, inter)):
        yield Weight("routed_experts", rows, cols, copies=routed // ep, uses=topk, fp8=True, expert=True)


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


@dataclass(frozen=True)
class StateBytes:
    """Bytes that a rank holds for the whole run."""

    weights: int
    fp8_copies: int
    gradients: int
    masters: int
    moments: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.fp8_copies + self.gradients + self.masters + self.moments


def share(elements: int, *, ranks: int, rank: int) -> int:
    """A rank's even share of a flat tensor: the shares of all ranks add up to it, and differ by one at most."""
    assert 0 <= rank < ranks, (rank, ranks)
    return elements // ranks + (rank < elements % ranks)


def state_bytes(
    table: Iterable[Weight], layout: Layout, *, precision: str, dp_rank: int, moment_bytes: int = BF16_BYTES
) -> StateBytes:
    """Bytes of a rank's weights, copies, gradients and optimizer states.

    Args:
        table: of the rank, from `weights`.
        layout: axes and ZeRO.
        precision: 'fp32', 'bf16' or 'fp8'.
        dp_rank: index on the data axis, for the share of what does not divide evenly.
        moment_bytes: of one element of one moment.
    Returns:
        StateBytes; sharded parts without padding.
    Source: arXiv:2412.19437 §3.2, §3.3.3.
    """
    table = tuple(table)
    masters = moments = 0
    for expert in (False, True):
        ranks = (layout.edp if expert else layout.dp) if layout.zero else 1
        # ep is the innermost axis (`parallel/mesh.py`).
        rank = (dp_rank // layout.ep if expert else dp_rank) if layout.zero else 0
        trained = [weight for weight in table if weight.trained and weight.expert == expert]
        own_master = sum(weight.elements for weight in trained if not weight.stored_fp32(precision))
        masters += FP32_BYTES * share(own_master, ranks=ranks, rank=rank)
        moments += 2 * moment_bytes * share(sum(weight.elements for weight in trained), ranks=ranks, rank=rank)
    return StateBytes(
        weights=sum(weight.bytes(precision) for weight in table),
        fp8_copies=sum(weight.fp8_bytes(precision) for weight in table),
        gradients=FP32_BYTES * sum(weight.elements for weight in table if weight.trained),
        masters=masters,
        moments=moments,
    )
