"""Decoding from the latent cache against the full forward, cache size at V3's size, and overwriting tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.config import YarnScaling
from tests.model.test_oracle import pair, relative
from tests.tiny_model import FP32, TINY, frozen
from train.config import compose
from train.generate import latent_cache
from train.generate.latent_cache import Decoder, LatentCache, Span, latent_attention
from train.model.config import ModelConfig
from train.model.moe import Router
from train.model.precision import Precision
from train.model.transformer import Transformer

# Logits, relative Frobenius, FP32: sums of at most 96 terms round by sqrt(96) * 2^-24 = 6e-7 at worst on average, in
# another order here than there; measured 2.3e-7 to 4.8e-7 over the cases below.
FP32_BOUND = 1e-6
YARN = YarnScaling(40.0, 8, 32.0, 1.0, 1.0, 1.0)
CASES: dict[str, dict[str, Any]] = {
    "groups": {},
    "YaRN": {"rope_scaling": YARN},
    "no query latent": {"q_lora_rank": None},
    "experts everywhere, one group": {"first_k_dense_replace": 0, "n_group": 1},
    "no MTP": {"num_nextn_predict_layers": 0},
}


def model(config: ModelConfig, precision: Precision = FP32) -> Transformer:
    net = frozen(config, seed=0, std=0.1, precision=precision)
    for name, tensor in net.state_dict().items():
        if "norm" in name:
            tensor.uniform_(0.5, 1.5)
        elif "e_score" in name:
            tensor.uniform_(-0.2, 0.2)
    return net


@pytest.fixture(scope="module")
def tiny() -> Transformer:
    """Read by several tests, changed by none."""
    return model(TINY)


def in_passes(
    decoder: Decoder, rows: Sequence[Tensor], first: Sequence[int], tokens: int, cache: LatentCache | None = None
) -> list[Tensor]:
    """Ragged prompts in one pass, then so many tokens of each row at a time; [tokens, hidden] of each row."""
    cache = cache or decoder.new_cache(sequences=len(rows), slots=max(map(len, rows)), drafting=False)
    done, parts = [0] * len(rows), [[] for _ in rows]
    wanted = list(first)
    while any(wanted):
        spans = [Span(r, done[r], n) for r, n in enumerate(wanted) if n]
        ids = [int(token) for span in spans for token in rows[span.row][span.start : span.start + span.num_tokens]]
        hidden = decoder.advance(ids, spans, cache).split([span.num_tokens for span in spans])
        for span, part in zip(spans, hidden, strict=True):
            parts[span.row].append(part)
            done[span.row] += span.num_tokens
        wanted = [min(tokens, len(row) - n) for row, n in zip(rows, done, strict=True)]
    return [torch.cat(part) for part in parts]


def assert_logits_of_the_full_forward(net: Transformer, rows: Sequence[Tensor], hidden: Sequence[Tensor]) -> None:
    for row, mine in zip(rows, hidden, strict=True):
        assert relative(net.logits(mine), net.logits(net(row[None]).hidden[0])) < FP32_BOUND


def ragged_rows(lengths: Sequence[int] = (23, 14, 1)) -> list[Tensor]:
    return [torch.randint(0, TINY.vocab_size, (n,)) for n in lengths]


@pytest.mark.parametrize("tokens", [1, 2, 7])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_ragged_batch_from_the_cache_has_the_logits_of_each_full_forward(case: dict[str, Any], tokens: int) -> None:
    net, rows = model(replace(TINY, **case)), ragged_rows()
    assert_logits_of_the_full_forward(net, rows, in_passes(Decoder(net), rows, (5, 9, 1), tokens))


def test_the_same_experts_are_chosen_from_the_cache() -> None:
    # The bounds of this file assume it: no near tie among these inputs is decided otherwise.
    net, (row,), seen = model(TINY), ragged_rows((23,)), []
    for module in net.modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda _, __, routing: seen.append(routing.topk_ids.sort(-1).values))
    net.next_token_hidden(row[None])
    (expected,) = seen
    seen.clear()
    in_passes(Decoder(net), [row], [5], 2)
    assert torch.equal(torch.cat(seen), expected)


def test_a_prompt_longer_than_a_block_of_queries_has_the_logits_of_the_full_forward(
    tiny: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latent_cache, "QUERY_BLOCK", 4)
    rows = ragged_rows()
    assert_logits_of_the_full_forward(tiny, rows, in_passes(Decoder(tiny), rows, (23, 14, 1), 1))


@pytest.mark.parametrize("tokens", [1, 3])
def test_each_mtp_depth_from_its_cache_has_the_hidden_state_of_the_full_forward(tiny: Transformer, tokens: int) -> None:
    (row,) = ragged_rows((20,))
    decoder, output = Decoder(tiny), tiny(row[None])
    cache = decoder.new_cache(sequences=1, slots=20, drafting=True)
    previous = output.hidden[0]
    for depth, expected in enumerate(output.mtp_hidden, start=1):
        parts = []
        for start in range(0, 20 - depth, tokens):
            stop = min(start + tokens, 20 - depth)
            next_ids = [int(token) for token in row[start + depth : stop + depth]]
            parts.append(decoder.predict(depth, previous[start:stop], next_ids, [Span(0, start, stop - start)], cache))
        previous = torch.cat(parts)
        assert relative(previous, expected[0]) < FP32_BOUND


@pytest.mark.parametrize("case", [{}, {"q_lora_rank": None}, {"rope_scaling": YARN}], ids=str)
def test_greedy_tokens_are_those_of_transformers(case: dict[str, Any]) -> None:
    oracle, ours = pair(case)
    prompt = torch.randint(0, 97, (1, 11))
    length = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    both = {"return_dict_in_generate": True, "output_logits": True}
    theirs = oracle.generate(prompt, attention_mask=torch.ones_like(prompt), **length, **both)
    decoder = Decoder(ours)
    cache = decoder.new_cache(sequences=1, slots=40, drafting=False)
    ids, start, compared = prompt[0].tolist(), 0, 0
    for step, logits in enumerate(theirs.logits):
        hidden = decoder.advance(ids[start:], [Span(0, start, len(ids) - start)], cache)
        mine = ours.logits(hidden[-1:])[0]
        assert relative(mine, logits[0]) < 1e-5  # tests/model/test_oracle.py
        best, second = (float(value) for value in logits[0].topk(2).values)
        if best - second <= 1e-5 * float(logits.norm()):
            break
        assert int(mine.argmax()) == int(theirs.sequences[0, 11 + step])
        compared += 1
        start = len(ids)
        ids.append(int(mine.argmax()))
    assert compared >= 20


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_low_precision_decodes_as_closely_to_fp32_as_the_training_forward(precision: str) -> None:
    # Dense: among experts a rounding may become another choice. Both computations round at the same places but for
    # keys, values and latent queries, so their errors against FP32 on the same weights are of one size: measured
    # 8.0e-3 against 7.8e-3 in BF16, 8.3e-2 against 8.3e-2 in FP8, at most 1.07 times over the rows here.
    dense = replace(TINY, first_k_dense_replace=2)
    low, exact = model(dense, Precision(precision)), model(dense)  # type: ignore[arg-type]
    exact.load_state_dict(low.state_dict())
    rows = ragged_rows((40, 33))
    for row, mine in zip(rows, in_passes(Decoder(low), rows, (7, 20), 3), strict=True):
        truth = exact.logits(exact(row[None]).hidden[0])
        trained = relative(low.logits(low(row[None]).hidden[0]).float(), truth)
        decoded = relative(low.logits(mine).float(), truth)
        assert decoded < 1.25 * trained


@pytest.mark.parametrize("power_of_two", [True, False])
def test_fp8_absorbs_the_payload_that_training_multiplies(power_of_two: bool) -> None:
    net = model(TINY, Precision("fp8", power_of_two_scales=power_of_two))
    attention = net.layers["0"].self_attn
    # Rows of the identity are exact in E4M3, so the FP8 linear gives back the weight as it multiplies it.
    weight = attention.kv_b_proj(torch.eye(TINY.kv_lora_rank, dtype=torch.bfloat16)).mT
    up_k, up_v = Decoder(net)._absorbed[0]
    mine = torch.cat((up_k, up_v.mT), dim=1).flatten(0, 1)
    # 1 / 448 is no E4M3 number: with plain scales the identity is off by an FP32 rounding, which BF16 may show once.
    tolerance = 0.0 if power_of_two else 2**-8
    torch.testing.assert_close(mine, weight, rtol=tolerance, atol=0.0)
    assert not torch.equal(mine, attention.kv_b_proj.weight)


def test_the_cache_holds_576_values_per_token_and_layer_at_the_size_of_v3() -> None:
    config = compose(["model=v3_671b"]).model
    sequences, slots = 3, 5
    memory = {"dtype": torch.bfloat16, "device": torch.device("meta")}
    cache = LatentCache(config, sequences=sequences, slots=slots, drafting=True, **memory)
    assert list(cache.layers) == list(range(62))
    assert all(layer.numel() == sequences * slots * (512 + 64) for layer in cache.layers.values())
    # The published 70,272 bytes a token of the main model (fact sheet, section 1), and 1,152 of the MTP layer.
    assert sum(layer.nbytes for layer in cache.layers.values()) == sequences * slots * (70_272 + 1_152)


def test_a_short_prompt_beside_long_ones_is_hardly_padded(tiny: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [60, 1, 1, 5, 2, 33, 1, 7, 3, 1]
    decoder, scored = Decoder(tiny), []

    def counted(queries: Tensor, entries: Tensor, *arguments: Any, **options: Any) -> Tensor:
        scored.append((queries.shape[0] * queries.shape[1], entries.shape[1]))
        return latent_attention(queries, entries, *arguments, **options)

    monkeypatch.setattr(latent_cache, "latent_attention", counted)
    cache = decoder.new_cache(sequences=len(lengths), slots=64, drafting=False)
    spans = [Span(row, 0, length) for row, length in enumerate(lengths)]
    hidden = decoder.advance([1] * sum(lengths), spans, cache)
    layers = TINY.num_hidden_layers
    # One grid of all would have 600 queries of 60 keys each.
    assert sum(queries for queries, _ in scored) < 2 * layers * sum(lengths)
    assert sum(queries * keys for queries, keys in scored) < 4 * layers * sum(length**2 for length in lengths)
    # The longest alone: nothing but roundings differ.
    alone = decoder.advance([1] * 60, [Span(0, 0, 60)], decoder.new_cache(sequences=1, slots=64, drafting=False))
    assert relative(hidden[:60], alone) < FP32_BOUND


def test_tokens_taken_back_leave_no_trace(tiny: Transformer) -> None:
    decoder, rows, kept = Decoder(tiny), ragged_rows((9, 12)), []
    for drafts in ([], [3, 5, 7]):
        cache = decoder.new_cache(sequences=2, slots=16, drafting=False)
        in_passes(decoder, rows, (9, 12), 1, cache)
        before = {i: layer.clone() for i, layer in cache.layers.items()}
        if drafts:
            decoder.advance(drafts + drafts[:2], [Span(0, 9, 3), Span(1, 12, 2)], cache)
        for layer_id, layer in cache.layers.items():
            assert torch.equal(layer[0, :9], before[layer_id][0, :9])
            assert torch.equal(layer[1, :12], before[layer_id][1, :12])
        hidden = decoder.advance([11, 13], [Span(0, 9, 1), Span(1, 12, 1)], cache)
        kept.append([hidden, *(layer[0, :10].clone() for layer in cache.layers.values())])
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))


def test_a_pass_writes_to_its_own_rows_only(tiny: Transformer) -> None:
    decoder, rows = Decoder(tiny), ragged_rows((6, 6, 6))
    cache = decoder.new_cache(sequences=3, slots=8, drafting=True)
    in_passes(decoder, rows, (6, 6, 6), 1, cache)
    before = {i: layer.clone() for i, layer in cache.layers.items()}
    hidden = decoder.advance([5], [Span(1, 6, 1)], cache)
    expected = tiny(torch.tensor([[*map(int, rows[1]), 5]])).hidden[0, -1]
    assert relative(hidden[0], expected) < FP32_BOUND
    for layer_id, layer in cache.layers.items():
        assert torch.equal(layer[[0, 2]], before[layer_id][[0, 2]])
        assert torch.equal(layer[1, 7], torch.zeros_like(layer[1, 7]))
