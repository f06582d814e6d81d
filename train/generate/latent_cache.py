"""The model token by token, with a latent cache: absorbed MLA (arXiv:2412.19437 §2.1.1; arXiv:2405.04434 §2.1.2).

An up-projection and the score, or the output projection, that follows it are one product, so keys and values need
never be made. Per head, with W_UK [nope, kv_rank] and W_UV [v, kv_rank], the two halves of `kv_b_proj`, and
c_j = norm(c_KV) of token j:

    q_C . k_C,j  =  q_C^T W_UK c_j           =  (W_UK^T q_C) . c_j              queries go into latent space once
    o            =  sum_j p_j W_UV c_j       =  W_UV (sum_j p_j c_j)            outputs leave it once
    cached per token and layer: [c_j ; k_R,j], kv_lora_rank + qk_rope_head_dim values (512 + 64 at V3's size)

This file restates two computations of the training model; tests/generate/test_latent_cache.py ties both to it:

    eq. 1-11, train/model/attention.py   `test_a_ragged_batch_from_the_cache_has_the_logits_of_each_full_forward`
    eq. 21, train/model/mtp.py           `test_each_mtp_depth_from_its_cache_has_the_hidden_state_of_the_full_forward`

Everything else is the training model's own code: linears in their precision, norms, router, dispatch, experts.

A pass adds tokens to some sequences of the cache: any number to each, from a whole prompt to one token. They form one
flat sequence without padding, except in the attention core, which pads groups of similar lengths (`_Group`). Positions
are explicit and a query reads positions up to its own only, so the next tokens simply overwrite rejected ones.

Shapes: tokens = all new tokens of a pass, sequence after sequence; slots = positions a sequence may hold; keys = slots
that a pass may read; width = kv_lora_rank + qk_rope_head_dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate, chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kernels.fp8_linear import LinearInput, weight_fp8
from kernels.quantize import dequantize_blocks
from kernels.rope import apply_rope, rope_tables
from train.model.attention import MultiHeadLatentAttention
from train.model.block import DenseBlock, MoEBlock
from train.model.config import ModelConfig, whole
from train.model.mtp import MultiTokenPredictor
from train.model.phases import arrived
from train.model.transformer import Transformer

# Queries of a sequence that are scored at a time: bounds the scores, [heads, 128, keys], during a long prompt.
QUERY_BLOCK = 128


class Span(NamedTuple):
    """Consecutive new tokens of one sequence: its row in the cache, the first one's position, how many."""

    row: int
    start: int
    num_tokens: int


class LatentCache:
    """The normed latent and the rotated key of every token and layer; with `drafting`, of the MTP layers too."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        sequences: int,
        slots: int,
        dtype: torch.dtype,
        device: torch.device,
        drafting: bool,
    ) -> None:
        width = config.kv_lora_rank + config.qk_rope_head_dim
        layer_ids = [*config.layer_ids, *(config.mtp_layer_ids if drafting else ())]
        self.slots = slots
        # [sequences, slots, width], zeros until written; on `meta` they count bytes without any memory.
        self.layers = {i: torch.zeros(sequences, slots, width, dtype=dtype, device=device) for i in layer_ids}
        # [slots, qk_rope_head_dim / 2] FP32
        cos, sin = rope_tables(slots, config.qk_rope_head_dim, config.rope_theta, yarn=config.rope_scaling)
        self.cos, self.sin = cos.to(device), sin.to(device)


class _Group(NamedTuple):
    """Sequences of a pass whose attention is computed together, as a grid padded to the longest of them."""

    # [sequences] rows of the cache; None where they are all of its rows in order.
    rows: Tensor | None
    # Slots read.
    keys: int
    # [tokens of the group] indices into the pass's tokens, and into the flat grid [sequences * longest].
    tokens: Tensor
    cells: Tensor
    # [sequences, longest] newest slot that a query may read; 0 at padding.
    last_key: Tensor

    def to_grid(self, x: Tensor) -> Tensor:
        """[tokens of the pass, ...] -> [sequences, longest, ...]; zeros at padding."""
        grid = x.new_zeros(self.last_key.numel(), *x.shape[1:])
        return grid.index_copy_(0, self.cells, x.index_select(0, self.tokens)).view(*self.last_key.shape, *x.shape[1:])

    def from_grid(self, grid: Tensor, out: Tensor) -> None:
        """Write a grid's tokens to their rows of `out` [tokens of the pass, ...]."""
        out.index_copy_(0, self.tokens, grid.flatten(0, 1).index_select(0, self.cells))


class _PassIndices:
    """Where the tokens of one pass are written and what each may read; made once a pass, used by every layer."""

    def __init__(self, spans: Sequence[Span], cache: LatentCache) -> None:
        self._device, self._cache_rows = cache.cos.device, len(next(iter(cache.layers.values())))
        assert max(span.start + span.num_tokens for span in spans) <= cache.slots, (spans, cache.slots)
        positions = self._ints(chain.from_iterable(range(span.start, span.start + span.num_tokens) for span in spans))
        first_slots = chain.from_iterable([span.row * cache.slots] * span.num_tokens for span in spans)
        # [tokens] in the cache, flattened over rows and slots.
        self.slots_of = positions + self._ints(first_slots)
        self.cos, self.sin = cache.cos.index_select(0, positions), cache.sin.index_select(0, positions)
        # Together: sequences with 2^(n-1) to 2^n - 1 new tokens, so less than half of a grid is padding.
        first_tokens = accumulate((span.num_tokens for span in spans), initial=0)
        members: dict[int, list[tuple[Span, int]]] = {}
        for span, first in zip(spans, first_tokens, strict=False):
            members.setdefault(span.num_tokens.bit_length(), []).append((span, first))
        self.groups = [self._group(pairs, positions) for pairs in members.values()]

    def _ints(self, values: Iterable[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.int64, device=self._device)

    def _group(self, members: Sequence[tuple[Span, int]], positions: Tensor) -> _Group:
        """Spans, each with the index of its first token in the pass."""
        rows = [span.row for span, _ in members]
        longest = max(span.num_tokens for span, _ in members)
        tokens = self._ints(chain.from_iterable(range(first, first + span.num_tokens) for span, first in members))
        cells = self._ints(
            chain.from_iterable(
                range(i * longest, i * longest + span.num_tokens) for i, (span, _) in enumerate(members)
            )
        )
        grid = torch.zeros(len(members) * longest, dtype=torch.int64, device=self._device)
        return _Group(
            rows=None if rows == list(range(self._cache_rows)) else self._ints(rows),
            keys=max(span.start + span.num_tokens for span, _ in members),
            tokens=tokens,
            cells=cells,
            last_key=grid.index_copy_(0, cells, positions.index_select(0, tokens)).view(len(members), longest),
        )


def latent_attention(queries: Tensor, entries: Tensor, last_key: Tensor, *, scale: float, kv_lora_rank: int) -> Tensor:
    """Attention of all heads over one shared row of keys, whose first columns are the values.

    Queries [sequences, queries, heads, width] read entries 0 .. last_key [sequences, queries] of [sequences, keys,
    width]. Returns [sequences, queries, heads, kv_lora_rank] in queries.dtype.
    """
    sequences, _, heads, _ = queries.shape
    key_ids = torch.arange(entries.shape[1], device=entries.device)
    outputs = []
    for block, last in zip(queries.split(QUERY_BLOCK, dim=1), last_key.split(QUERY_BLOCK, dim=1), strict=True):
        flat = block.flatten(1, 2)  # [sequences, queries * heads, width]
        # beta=0: the first operand only gives the shape.
        scores = torch.baddbmm(flat.new_zeros(1, 1, 1), flat, entries.mT, beta=0, alpha=scale)
        hidden_keys = key_ids > last[..., None, None]  # [sequences, queries, 1, keys]
        scores = scores.view(sequences, -1, heads, len(key_ids)).masked_fill_(hidden_keys, float("-inf"))
        # As in the training core on a CPU: scores are rounded to the activations' dtype once, the softmax is FP32.
        probabilities = scores.softmax(-1, dtype=torch.float32).to(queries.dtype).flatten(1, 2)
        outputs.append(torch.bmm(probabilities, entries[..., :kv_lora_rank]).view(*block.shape[:3], -1))
    return torch.cat(outputs, dim=1)


class Decoder:
    """A whole model, in one process, that continues from a cache. It keeps copies of weights, which must not change."""

    def __init__(self, model: Transformer) -> None:
        assert model.spec == whole(model.config), "generation needs the whole model in one process"
        self.model, self.config = model, model.config
        blocks = [(name, block) for name, block in model.layers.items()]
        blocks += [(name, predictor.get_submodule("block")) for name, predictor in model.mtp.items()]
        self._absorbed = {int(name): self._absorb(block) for name, block in blocks}

    @property
    def depths(self) -> int:
        """Tokens that the MTP chain can draft, D."""
        return self.config.num_nextn_predict_layers

    def new_cache(self, *, sequences: int, slots: int, drafting: bool) -> LatentCache:
        """An empty cache for this model: its dtype, its device."""
        weight = self.model.embed_tokens.weight
        assert isinstance(weight, Tensor)
        return LatentCache(
            self.config, sequences=sequences, slots=slots, dtype=weight.dtype, device=weight.device, drafting=drafting
        )

    # Not inference mode: `weight_fp8` keeps its copy on the weight, where training must be able to use it.
    @torch.no_grad()
    def advance(self, input_ids: Sequence[int], spans: Sequence[Span], cache: LatentCache) -> Tensor:
        """The main model over new tokens, those of `spans` one after another; writes their latents to the cache.

        A sequence's earlier positions must have been written, now or before. Returns [tokens, hidden] after the final
        norm; `model.logits` takes it.
        """
        indices = _PassIndices(spans, cache)
        residual, delta = self._embed(input_ids), None  # [1, tokens, hidden]
        for name, block in self.model.layers.items():
            residual, delta = self._block(int(name), block, residual, delta, cache, indices)
        normed: Tensor = self.model.norm(residual, delta)
        return normed[0]

    @torch.no_grad()
    def predict(
        self, depth: int, previous: Tensor, next_ids: Sequence[int], spans: Sequence[Span], cache: LatentCache
    ) -> Tensor:
        """MTP depth k over positions whose token i + k is known, or drafted (§2.2, eq. 21-23).

        Args:
            depth: k, from 1.
            previous: [tokens, hidden], h^{k-1} of these positions: of `advance` for k = 1, else of depth k - 1.
            next_ids: tokens, t_{i+k} of each position i.
            spans: the positions i.
            cache: made for drafting; the depth's own layer is read and written.
        Returns:
            [tokens, hidden], h^k after the depth's norm; its logits are for t_{i+k+1}.
        """
        layer_id = self.config.mtp_layer_ids[depth - 1]
        predictor = self.model.mtp[str(layer_id)]
        assert isinstance(predictor, MultiTokenPredictor)
        embeds = self._embed(next_ids)
        joined = torch.cat((predictor.enorm(embeds), predictor.hnorm(previous[None])), dim=-1)
        start, indices = predictor.eh_proj(joined), _PassIndices(spans, cache)
        normed: Tensor = predictor.norm(*self._block(layer_id, predictor.block, start, None, cache, indices))
        return normed[0]

    def _embed(self, input_ids: Sequence[int]) -> Tensor:
        """-> [1, tokens, hidden]: one flat sequence."""
        ids = torch.tensor([list(input_ids)], dtype=torch.int64, device=self.model.embed_tokens.weight.device)
        embeds: Tensor = self.model.embed_tokens(ids)
        return embeds

    @torch.no_grad()
    def _absorb(self, block: nn.Module) -> tuple[Tensor, Tensor]:
        """W_UK [heads, nope, kv_rank] and W_UV^T [heads, kv_rank, v] of a layer."""
        assert isinstance(block, DenseBlock | MoEBlock)
        config, up = self.config, block.self_attn.kv_b_proj
        precision, weight = up.precision, up.weight.detach()
        # Views of the weight; in FP8 a copy, the dequantised E4M3 payload that training multiplies. It is exact in BF16
        # with power-of-two scales, other scales cost one rounding. The latent is not quantised: one rounding fewer.
        if precision.name == "fp8":
            fp8 = weight_fp8(up.weight, power_of_two=precision.power_of_two_scales)
            weight = dequantize_blocks(fp8).to(weight.dtype)
        heads = weight.view(config.num_attention_heads, -1, config.kv_lora_rank)  # [heads, nope + v, kv_rank]
        up_k, up_v = heads.split((config.qk_nope_head_dim, config.v_head_dim), dim=1)
        return up_k, up_v.mT

    def _block(
        self,
        layer_id: int,
        block: nn.Module,
        residual: Tensor,
        delta: Tensor | None,
        cache: LatentCache,
        indices: _PassIndices,
    ) -> tuple[Tensor, Tensor]:
        """A layer of `train.model.block` whose attention reads the cache: residual, delta -> the same after it."""
        assert isinstance(block, DenseBlock | MoEBlock)
        normed = block.input_layernorm.of_sum(residual, delta, linears=1)
        attended = self._attend(layer_id, block.self_attn, normed.linears[0], cache, indices)
        if isinstance(block, DenseBlock):
            normed = block.post_attention_layernorm.of_sum(normed.residual, attended, linears=1)
            return normed.residual, block.mlp(normed.linears[0])
        routed = block.route(normed.residual, attended)
        dispatched = arrived(block.dispatch(routed))
        sums = block.experts(dispatched)
        return routed.residual, arrived(block.combine(routed, dispatched, sums, block.shared(routed)))

    def _attend(
        self,
        layer_id: int,
        attention: MultiHeadLatentAttention,
        x: LinearInput,
        cache: LatentCache,
        indices: _PassIndices,
    ) -> Tensor:
        """Absorbed MLA: writes the new entries, then reads. [1, tokens, hidden] -> the same."""
        config, (up_k, up_v) = self.config, self._absorbed[layer_id]
        q, kv_latent, k_rope = attention.q_kv_a_proj(x).split(attention.a_widths, dim=-1)
        if config.q_lora_rank is not None:
            q = attention.q_b_proj(attention.q_a_layernorm.for_linear(q))

        k_rope = apply_rope(k_rope, indices.cos, indices.sin)
        new = torch.cat((attention.kv_a_layernorm(kv_latent), k_rope), dim=-1)[0]  # [tokens, width]
        layer = cache.layers[layer_id]
        layer.view(-1, layer.shape[-1]).index_copy_(0, indices.slots_of, new)
        heads = q[0].unflatten(-1, (config.num_attention_heads, -1)).transpose(0, 1)  # [heads, tokens, qk]
        q_nope, q_rope = heads.split((config.qk_nope_head_dim, config.qk_rope_head_dim), dim=-1)
        queries = torch.cat((q_nope @ up_k, apply_rope(q_rope, indices.cos, indices.sin)), dim=-1)
        queries = queries.transpose(0, 1)  # [tokens, heads, width]
        latent = queries.new_empty(*queries.shape[:2], config.kv_lora_rank)  # [tokens, heads, kv_rank]
        for group in indices.groups:
            entries = layer[:, : group.keys]
            entries = entries if group.rows is None else entries.index_select(0, group.rows)
            o = latent_attention(
                group.to_grid(queries),  # [sequences, longest, heads, width]
                entries,
                group.last_key,
                scale=attention.scale,
                kv_lora_rank=config.kv_lora_rank,
            )
            group.from_grid(o, latent)
        o = latent.transpose(0, 1) @ up_v  # [heads, tokens, v]
        flat = o.transpose(0, 1).flatten(1)[None]  # [1, tokens, heads * v]
        u: Tensor = attention.o_proj(flat)
        return u
