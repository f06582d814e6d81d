"""QK-clip: the largest logits against every score written out, and what the factors do to logits and weights."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from kernels.attention import documents_of
from parallel.layout import Layout
from parallel.mesh import make_mesh, single
from tests.ranks import run_ranks
from tests.tiny_model import DISTINCT, FP32
from train.assemble import build_engine
from train.data.batch import Batch
from train.model import max_logits as sampled
from train.model.attention import MultiHeadLatentAttention
from train.model.config import ModelConfig
from train.model.max_logits import max_logits
from train.observe.metrics import check_record, logit_table
from train.optim.adamw import scale_rows
from train.optim.config import OptimConfig
from train.optim.qk_clip import attentions, row_factors
from train.schedules import ScheduledValues
from train.step import apply_update, compute_gradients
from train.studies.plan.live_bytes import LiveBytes
from train.studies.plan.memory import measure

CPU, ROUNDING = torch.device("cpu"), 100 * 2**-24
NOW = ScheduledValues(lr=0.02, batch_sequences=2, bias_speed=0.0, mtp_weight=0.3, balance_alpha=0.0)


def queries_and_keys(tokens: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    q, k = torch.randn(2, 2, 3, tokens, 10, generator=generator)
    return q, k


def every_logit(q: Tensor, k: Tensor, ids: Tensor | None) -> Tensor:
    """[sequences, heads, tokens, tokens] fp64, -inf where a query does not read."""
    tokens = q.shape[-2]
    hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1).repeat(len(q), 1, 1)
    if ids is not None:
        hidden |= ids[:, :, None] != ids[:, None, :]
    return (q.double() @ k.double().mT * 0.3).masked_fill(hidden[:, None], float("-inf"))


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 129])
def test_short_sequences_show_every_query(tokens: int) -> None:
    q, k = queries_and_keys(tokens)
    ids = torch.arange(tokens).div(50, rounding_mode="floor").repeat(2, 1)
    ids[1] = 0
    for given in (None, ids):
        found = max_logits(q, k, scale=0.3, documents=documents_of(given, CPU))
        # Products of ten terms, in another order: 10 * 2^-24 of the sum of magnitudes, here below 10.
        torch.testing.assert_close(found.double(), every_logit(q, k, given).amax((0, 2, 3)), rtol=0, atol=ROUNDING)


def test_of_a_long_sequence_every_stride_th_query_up_to_the_last_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampled, "QUERIES", 33)
    monkeypatch.setattr(sampled, "BLOCK", 4)
    monkeypatch.setattr(sampled, "KEYS", 10)
    q, k = queries_and_keys(129)
    expected = every_logit(q, k, None)[:, :, torch.arange(0, 129, 4)].amax((0, 2, 3))
    found = max_logits(q, k, scale=0.3, documents=None)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=ROUNDING)


def test_at_4096_tokens_it_takes_two_percent_of_the_cores_products() -> None:
    """V3's heads; fused attention makes four products as wide as q and three as wide as v, forward and backward."""
    q, k = torch.empty(2, 1, 128, 4096, 192, device="meta")
    with FlopCounterMode(display=False) as counter:
        max_logits(q, k, scale=0.1, documents=None)
    core = 128 * 4096**2 * (4 * 192 + 3 * 128)
    assert 0.02 < counter.get_total_flops() / core < 0.025


@pytest.mark.parametrize("tokens", [64, 8192])
def test_scores_take_bounded_memory_at_any_length(tokens: int) -> None:
    """V3's widths, 8 heads, keys in memory token by token; two sequences take as much as one."""
    heads, peaks = 8, []
    with FakeTensorMode(), LiveBytes() as live:
        for sequences in (1, 2):
            q, k = (torch.empty(sequences, tokens, heads, 192, dtype=torch.bfloat16).transpose(1, 2) for _ in range(2))
            live.peak = before = live.now
            max_logits(q, k, scale=0.1, documents=None)
            peaks.append(live.peak - before)
    # BF16 scores of at most 64 queries, and 2^18 a head; three masks of a byte; the queries of a block; and of each
    # token its place and the start of its document, int64, flipped and compared.
    scores = heads * min(64 * tokens, 2**18) * 2
    assert peaks[0] <= scores + 3 * min(64 * tokens, 2**18) + 64 * heads * 192 * 2 + 8 * 8 * tokens
    assert peaks[1] <= peaks[0] + 2 * 8 * tokens
    # The core's output comes right after them.
    assert scores <= heads * tokens * 128 * 2 / 2


def test_the_peak_that_is_planned_does_not_move() -> None:
    """One number a head and layer more is there between steps; `run.recompute` multiplies the scores again."""
    # Here: it imports Hydra's commands, which ranks do not need.
    from tests.studies.plan.test_dry_run import small

    config = small(run_recompute="true", model_num_hidden_layers=1, model_num_nextn_predict_layers=0)
    memory, watched = (
        measure(replace(config, optim=replace(config.optim, qk_clip=clip)), single("cpu"), num_micro_batches=1)
        for clip in (None, 100.0)
    )
    logits = config.model.num_attention_heads * 4
    assert watched.state - memory.state == logits
    assert 0 <= watched.total - memory.total <= 2 * logits


def heads_of(attention: MultiHeadLatentAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of some hidden states, apart from the core."""
    with torch.no_grad():
        return attention._heads_apart(attention.q_kv_a_proj(x), *attention.rope.at(x.shape[1], CPU))


@pytest.mark.parametrize("config", [DISTINCT, replace(DISTINCT, q_lora_rank=None)], ids=["q latent", "no q latent"])
def test_every_logit_of_a_clipped_head_becomes_gamma_times_itself(config: ModelConfig) -> None:
    engine = build_engine(config, FP32, OptimConfig(), single(CPU), seed=3)
    row, name, attention = list(attentions(engine.models))[-1]
    assert (row, name) == (3, "mtp.3.block.self_attn")
    x = torch.randn(2, 9, config.hidden_size)
    before = heads_of(attention, x)
    logits = torch.full((4, 3), 50.0)
    logits[3] = torch.tensor([400.0, 99.0, 200.0])
    factors = row_factors(engine.models, logits, 100.0)
    parameters = dict(engine.models[0].named_parameters())
    keys = parameters[f"{name}.q_kv_a_proj.weight"].detach()[-config.qk_rope_head_dim :].clone()
    with torch.no_grad():
        for weight, factor in factors.items():
            parameters[weight].mul_(factor[:, None])
    after = heads_of(attention, x)
    scores, clipped = (q.double() @ k.double().mT for q, k, _ in (before, after))
    gammas = torch.tensor([0.25, 1.0, 0.5], dtype=torch.float64)[:, None, None]
    # FP32 heads of sums of up to 48 terms: sqrt(48) 2^-24 of them, in both factors, four times that for cancellation.
    torch.testing.assert_close(clipped, gammas * scores, rtol=4e-6, atol=4e-6 * float(scores.abs().max()))
    assert torch.equal(after[2], before[2]), "values"
    # The rope key of all heads.
    assert torch.equal(parameters[f"{name}.q_kv_a_proj.weight"][-config.qk_rope_head_dim :], keys), (
        "the shared rope key"
    )
    assert all(torch.equal(a[:, 1], b[:, 1]) for a, b in zip(after, before, strict=True)), "a head below the threshold"
    assert all(bool((factor == 1).all()) for weight, factor in factors.items() if not weight.startswith("mtp"))


def test_shards_of_any_cut_are_scaled_by_their_rows() -> None:
    whole, factors = torch.randn(7, 5), torch.rand(7)
    expected = whole * factors[:, None]
    for cuts in ([0, 35], [0, 1, 4, 5, 17, 34, 35], [0, 12, 13, 35]):
        flat = whole.clone().flatten()
        for first, stop in pairwise(cuts):
            scale_rows(flat[first:stop], factors, first=first, cols=5)
        assert torch.equal(flat.view(7, 5), expected), cuts


def driven(threshold: float, optim: str, *, lr: float = 0.5, steps: int = 6) -> list[Tensor]:
    """[layers, heads] of each step, while gradients push the up-projections of queries and keys outwards."""
    config = OptimConfig(name=optim, qk_clip=threshold, weight_decay=0.0)  # type: ignore[arg-type]
    engine = build_engine(replace(DISTINCT, initializer_range=0.2), FP32, config, single(CPU), seed=3)
    tokens = torch.randint(0, DISTINCT.vocab_size, (2, 17), generator=torch.Generator().manual_seed(1))
    batch, found = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()), list[Tensor]()
    for step in range(1, steps + 1):
        result = compute_gradients(engine, batch, num_micro_batches=2, now=NOW)
        assert result.max_logits is not None
        found.append(result.max_logits)
        for bucket in engine.optimizer.buckets:
            for held in bucket.parameter_shards():
                if "_b_proj" in held.name:
                    held.grad.copy_(-held.parameter.detach().flatten())
        apply_update(engine, result, now=replace(NOW, lr=lr), update=step)
    return found


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_logits_that_are_driven_up_stay_bounded(optim: str) -> None:
    free, bounded = ([float(each.max()) for each in driven(threshold, optim)] for threshold in (1e9, 3.0))
    # An update between two clips makes 12 of 4 with Muon, 50 with AdamW: it starts there again each time.
    assert max(bounded[2:]) <= bounded[1]
    assert free[-1] > 10 * bounded[-1]


def test_without_an_update_between_the_first_layer_is_at_the_threshold() -> None:
    """Later layers read what it gives, which is another thing then."""
    before, after = driven(2.4, "muon", lr=1e-12, steps=2)
    assert float(before[0].max()) > 2.4
    expected = before[0].clamp(max=2.4)
    # Roundings of FP32 in sums of up to 48 terms.
    torch.testing.assert_close(after[0], expected, rtol=4e-6, atol=0)


def test_the_metric_is_one_row_a_layer_and_the_worst_head() -> None:
    table = logit_table(torch.tensor([[1.0, 2.5], [0.25, -1.0]]))
    assert table == {"attention/max_logit": 2.5, "attention/head_max_logit": [[1.0, 2.5], [0.25, -1.0]]}
    check_record({"step": 1, "tokens_seen": 2, "time_unix_s": 3.0} | table)
    assert logit_table(None) == {}


def test_a_threshold_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^optim.qk_clip = 0.0 must be above 0; .* uses 100, null is none$"):
        OptimConfig(qk_clip=0.0)


def logits_on(rank: int, world: int, layout: Layout) -> list[list[float]]:
    """The table of one step on a layout, of the same four sequences."""
    mesh = make_mesh(layout, device=torch.device("cpu"), tied_embedding=True, timeout_s=60)
    engine = build_engine(DISTINCT, FP32, OptimConfig(qk_clip=100.0), mesh, seed=2)
    tokens = torch.randint(DISTINCT.vocab_size, (4, 17), generator=torch.Generator().manual_seed(9))
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    now = ScheduledValues(lr=1e-3, batch_sequences=4, bias_speed=0.0, mtp_weight=0.3, balance_alpha=0.01)
    table = compute_gradients(engine, batch, num_micro_batches=2, now=now).max_logits
    assert table is not None
    return table.tolist()


def test_a_stage_without_attention_takes_part_and_every_rank_has_the_table_of_one_process() -> None:
    (alone,) = run_ranks(1, logits_on, Layout())
    assert min(map(min, alone)) > 0
    ranks = run_ranks(2, logits_on, Layout(pp=2, stage_layers=(0, DISTINCT.num_hidden_layers)))
    assert ranks == [alone, alone]
