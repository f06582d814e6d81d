"""The memory of a candidate in closed form is what the dry run counts; what its messages and imbalance can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from parallel.collectives import Traffic
from tests.studies.plan.test_dry_run import small
from train.assemble import assemble
from train.config import PretrainConfig, compose
from train.losses import LossWeights
from train.model.precision import Precision
from train.model.transformer import recompute_as_asked
from train.stage import StepMetrics, build_stages
from train.studies.plan.candidate import candidate_of
from train.studies.plan.dry_run import as_rank, plan_pipeline_rank
from train.studies.plan.footprint import Footprint, breaking_imbalance, footprint, rows_at
from train.studies.plan.kept import Work
from train.studies.plan.live_bytes import LiveBytes
from train.studies.plan.memory import Known, Memory, balanced_dispatcher
from train.studies.plan.moments import Moment, _in_flight, _messages, moments, moments_of
from train.studies.plan.orders import SCHEDULES, Action, Orders, orders
from train.studies.plan.stage_bytes import StageShape, stage_bytes
from train.studies.plan.stand_ins import ChunkBytes, StageKind, observe

# Every width is another number, so that no tensor passes for another.
WIDTHS: dict[str, object] = {
    "model_hidden_size": 384, "model_intermediate_size": 640, "model_moe_intermediate_size": 896,
    "model_kv_lora_rank": 256, "model_v_head_dim": 96, "layout_pp": 3, "layout_dp": 2, "model_num_hidden_layers": 3,
}  # fmt: skip


def work_of(config: PretrainConfig) -> Work:
    precision, layout = config.precision, config.layout
    return Work(
        config.model, config.run.micro_batch_sequences, config.data.sequence_length, layout.ep, precision.name,
        bool(config.run.recompute), precision.attention_output == "e5m6", precision.cache_swiglu_input, layout.pp > 1,
        ranks_per_node=layout.ranks_per_node if layout.two_hops else None,
        max_rows=layout.max_expert_rows,
        layers_again=config.run.recompute == "layers",
    )  # fmt: skip


def observed(config: PretrainConfig, rank: int) -> dict[StageKind, ChunkBytes]:
    """What one micro-batch of each stage of a rank allocates, counted."""
    recipe, shape = Precision.of(config.precision), (config.run.micro_batch_sequences, config.data.sequence_length)
    with as_rank(config, rank) as mesh, FakeTensorMode(), LiveBytes() as live:
        dispatcher = balanced_dispatcher(config.model, config.precision, mesh)
        stages = build_stages(config.model, recipe, mesh, dispatcher)
        for stage in stages.values():
            recompute_as_asked(stage.model, config.run.recompute)
        engine = assemble(stages, replace(config.optim, ema_decay=None), mesh)
        engine.optimizer.zero_grad()
        weights = LossWeights(0.1, 1e-4, torch.ones((), dtype=torch.int64), num_sequences=1)
        inputs = {name: torch.zeros(shape, dtype=torch.int64) for name in ("input_ids", "labels")}
        hidden = torch.empty((*shape, config.model.hidden_size), dtype=recipe.dtype, device="meta", requires_grad=True)
        found = {}
        for stage in engine.stages.values():
            stage.begin(weights, StepMetrics(config.model, mesh.device))
            found[StageKind.of(config.model, stage.model.spec)] = observe(
                stage, hidden, inputs, live=live, traffic=Traffic()
            )
    return found


BY_NODE = {"layout_dispatch": "node", "layout_ranks_per_node": 2}
E5M6 = {"precision_attention_output": "e5m6", "run_recompute": "true"}


@pytest.mark.parametrize(
    ("changes", "ranks"),
    [
        ({"precision": "fp8", **E5M6, "layout_ep": 2, "run_micro_batch_sequences": 2}, (0, 4)),
        ({"precision": "bf16", "layout_ep": 2}, (2,)),
        ({"precision": "fp8", "layout_dp": 4, "layout_ep": 4, **BY_NODE}, (5,)),
        ({"precision": "fp8", "layout_ep": 2, "layout_max_expert_rows": 256}, (2,)),
        ({"precision": "fp8", "layout_ep": 2, "run_recompute": "layers"}, (2, 4)),
        pytest.param({"precision": "bf16", "run_recompute": "layers"}, (0, 4), marks=pytest.mark.long),
        pytest.param({"precision": "fp8", "layout_max_expert_rows": 1024}, (2, 4), marks=pytest.mark.long),
        pytest.param(
            {"precision": "bf16", "layout_ep": 2, "layout_max_expert_rows": 256}, (2, 4), marks=pytest.mark.long
        ),
        pytest.param({"precision": "bf16", "layout_max_expert_rows": 128}, (2,), marks=pytest.mark.long),
        pytest.param({"precision": "fp8"}, (0, 2, 4), marks=pytest.mark.long),
        pytest.param(
            {"precision": "fp8", "precision_cache_swiglu_input": "false", "layout_ep": 2},
            (0, 2),
            marks=pytest.mark.long,
        ),
        pytest.param({"precision": "bf16", "run_recompute": "true"}, (0, 2, 4), marks=pytest.mark.long),
        pytest.param({"precision": "fp32", "layout_ep": 2}, (2, 4), marks=pytest.mark.long),
    ],
)
def test_a_stage_holds_what_its_tensors_do(changes: dict[str, object], ranks: Sequence[int]) -> None:
    """Dense, MoE and last stage: kept and waiting to the byte."""
    config = small(**{**WIDTHS, **changes})
    work = work_of(config)
    for rank in ranks:
        ((kind, found),) = observed(config, rank).items()
        closed = stage_bytes(work, StageShape(*kind))
        inbound, outbound = work.hidden * (not kind.is_first), work.hidden * (not kind.is_last)
        # Outbound of the last stage: a loss, which is a number.
        assert closed.kept == found.forward_held + inbound + (outbound or 4)
        assert closed.waiting == found.wgrad_held + sum(found.wgrad_needs) * work.hidden
        # Measured: forward -7 to +2 %, backward -4 to +29 % (a dense stage in BF16); the largest operators only.
        # Of a layer that runs again forward is that with a graph, measured +15 to +23 %: backward is higher anyway.
        most = 1.05 if config.run.recompute != "layers" else 1.3
        assert 0.92 < closed.forward / (found.forward_peak + inbound) < most
        assert 0.94 < closed.backward / (found.backward_peak + (outbound or 4)) < 1.35


def check_against_dry_run(
    config: PretrainConfig, pp_ranks: Sequence[int], *, temporaries: float
) -> list[tuple[Footprint, Memory]]:
    """State within 2 %, activations and the highest moment within 5 %; `temporaries` relative."""
    layout = config.layout
    count = min(2 * layout.pp, config.schedule.batch_full_sequences // layout.dp // config.run.micro_batch_sequences)
    candidate = candidate_of(config)
    written = orders(layout.schedule, layout.pp, candidate.chunks, count)
    held = moments(written, max_waiting_wgrads=layout.max_waiting_wgrads)
    found, known = footprint(config, candidate, held), Known()
    pairs = [(found[pp_rank], plan_pipeline_rank(config, pp_rank, known).memory) for pp_rank in pp_ranks]
    for closed, counted in pairs:
        for name in ("weights", "fp8_copies", "gradients", "masters", "moments", "dispatch"):
            assert getattr(closed, name) == pytest.approx(getattr(counted, name), rel=0.02), name
        # Left out: token ids of all micro-batches, and cosines and sines of each stage, for MTP of another length.
        tokens, model = config.run.micro_batch_sequences * config.data.sequence_length, config.model
        tables = layout.chunks + model.num_nextn_predict_layers
        others = count * tokens * 16 + tables * config.data.sequence_length * model.qk_rope_head_dim * 4
        # Left out too: a message that has come and is not used yet, under `messages`.
        assert closed.activations == pytest.approx(counted.held - others, rel=0.05)
        highest = closed.activations + closed.temporaries + closed.dispatch
        assert highest == pytest.approx(counted.held + counted.transient - others, rel=0.05)
        assert closed.temporaries == pytest.approx(counted.transient - counted.dispatch, rel=temporaries)
    return pairs


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(
            {"layout_pp": 2, "layout_dp": 2, "layout_ep": 2, "precision": "fp8", "run_recompute": "true"},
            marks=pytest.mark.long,
        ),
        {"layout_pp": 2, "layout_schedule": "ZBVZeroBubble", "precision": "fp8_v3", "layout_max_waiting_wgrads": 1},
        {"layout_dp": 2, "precision": "bf16", "layout_zero": "false", "optim_moments_dtype": "fp32"},
    ],
    ids=["1f1b", "v", "one"],
)
def test_a_small_candidate_needs_what_the_dry_run_counts(changes: dict[str, Any]) -> None:
    # Enough tokens that the update, which is not in the closed form, holds less than activations do.
    config = small(
        **{
            **WIDTHS,
            "data_sequence_length": 384,
            "layout_pp": 1,
            "layout_dp": 1,
            "model_num_hidden_layers": 4,
            **changes,
        }
    )
    # Measured: up to 12 %; small differences of large numbers.
    check_against_dry_run(config, range(config.layout.pp), temporaries=0.2)


@pytest.mark.long
def test_the_ranks_of_h800_2048_need_what_the_dry_run_counts() -> None:
    """Pipeline ranks of rank 0, 1024 and 1920; a search asks for hundreds of candidates."""
    config = compose(["+cluster=h800_2048"])
    # Measured: temporaries -3.9, 0.0 and +2.1 %.
    pairs = check_against_dry_run(config, (0, 8, 15), temporaries=0.05)
    for closed, counted in pairs:
        # Measured: -0.03, -0.28 and -0.15 %; the turn of the V alone is 1.9 % of the last.
        assert closed.activations == pytest.approx(counted.held, rel=0.005)
        # Measured: -0.16, -0.21 and +0.09 %; messages between stages are the closed form's in both.
        assert closed.total - closed.reserved == pytest.approx(counted.total, rel=0.005)


@pytest.mark.long
@pytest.mark.parametrize("cluster", ["h100_8", "h100_256"])
def test_a_rank_of_the_h100_clusters_needs_what_the_dry_run_counts(cluster: str) -> None:
    check_against_dry_run(compose([f"+cluster={cluster}"]), (0,), temporaries=0.05)


def by_brute_force(written: Orders, rank: int, other: int) -> list[int]:
    """Both ranks run in every legal way; before each step, the most late gradients and the most early messages."""
    steps = [[step[0] for step in written[each]] for each in (rank, other)]
    makes = [{("F" if k == "F" else "B", s, m): i for i, (k, s, m) in enumerate(each) if k != "W"} for each in steps]

    def source(action: Action) -> Action:
        return (action[0], action[1] + (-1 if action[0] == "F" else 1), action[2])

    def crossing(user: int) -> list[tuple[Action, int, int]]:
        return [(a, i, makes[1 - user][source(a)]) for a, i in makes[user].items() if source(a) in makes[1 - user]]

    to_us, to_them = crossing(0), crossing(1)
    late, early = [0] * len(steps[0]), [0] * len(steps[0])
    seen, front = set[tuple[int, int]](), [(0, 0)]
    while front:
        ours, theirs = front.pop()
        seen.add((ours, theirs))
        if ours < len(steps[0]):
            held = sum(made < ours and used >= theirs and a[0] == "B" for a, used, made in to_them)
            late[ours] = max(late[ours], held)
            early[ours] = max(early[ours], sum(made < theirs and used >= ours for _, used, made in to_us))
        if ours < len(steps[0]) and all(made < theirs for _, used, made in to_us if used == ours):
            front.append((ours + 1, theirs))
        if theirs < len(steps[1]) and all(made < ours for _, used, made in to_them if used == theirs):
            front.append((ours, theirs + 1))
        front = [each for each in dict.fromkeys(front) if each not in seen]
    return [sum(each) for each in zip(late, early, strict=True)]


def test_messages_under_way_are_the_most_that_two_ranks_allow() -> None:
    for written in (orders("1F1B", 2, 1, 5), orders("ZBVZeroBubble", 2, 2, 5)):
        for rank in range(2):
            counted = _in_flight(len(written[rank]), _messages(written)[rank])
            assert counted == by_brute_force(written, rank, 1 - rank)


def test_imbalance_costs_memory_until_every_token_is_on_one_rank() -> None:
    config = compose(["+cluster=h800_2048", "layout.max_expert_rows=null"])
    candidate = candidate_of(config)
    # Rank 8's most: 16 and 15 micro-batches of its two stages.
    held = [[Moment(((r, 16), (31 - r, 15)), (), 0, (("F", r), ("B", 31 - r)))] for r in range(16)]

    def most(imbalance: float) -> float:
        return max(each.total for each in footprint(config, candidate, held, imbalance=imbalance))

    totals = [most(each) for each in (1.0, 1.2, 1.5, 2.0, 8.0, 32.0, 64.0)]
    assert totals[:-1] == sorted(set(totals[:-1]))
    # A token has 8 experts, of which a rank holds 4: 64 x 4 / 8.
    assert totals[-2] == totals[-1]
    limit = (totals[1] + totals[2]) / 2
    breaks = breaking_imbalance(config, candidate, most, limit=limit)
    assert breaks is not None
    assert most(breaks - 2e-3) <= limit < most(breaks)
    assert breaking_imbalance(config, candidate, most, limit=totals[-1]) is None
    assert breaking_imbalance(config, candidate, most, limit=totals[0] - 1) == 1.0


def test_beyond_a_limit_on_rows_a_popular_expert_costs_less_memory() -> None:
    """Falls where rows pass the limit and rises again from there; what breaks is found on either side."""
    config = compose(["+cluster=h800_2048", "layout.max_expert_rows=49152"])
    candidate = candidate_of(config)
    held = [[Moment(((r, 16), (31 - r, 15)), (), 0, (("F", r), ("B", 31 - r)))] for r in range(16)]

    def most(imbalance: float, limit: int | None = 49152) -> float:
        limited = replace(candidate, max_expert_rows=limit)
        return max(each.total for each in footprint(config, limited, held, imbalance=imbalance))

    # 4,096 tokens with 8 experts each, 4 of 256 experts a rank: 32,768 rows at an even share.
    assert [rows_at(config, candidate, each) for each in (1.0, 1.5, 1.51)] == [32768, 49152, 49664]
    assert most(1.5) == most(1.5, None)
    assert most(1.51) < 0.95 * most(1.5) < most(1.51, None)
    totals = [most(each) for each in (1.51, 2.0, 4.0, 64.0)]
    assert totals == sorted(totals)
    assert all(total < most(each, None) for total, each in zip(totals, (1.51, 2.0, 4.0, 64.0), strict=True))
    before = breaking_imbalance(config, candidate, most, limit=most(1.5) - 1e9)
    assert before is not None
    assert 1.2 < before < 1.5
    after = breaking_imbalance(config, candidate, most, limit=most(1.5))
    assert after is not None
    assert after > 1.6
    assert most(after - 2e-3) <= most(1.5) < most(after)


def test_v3_at_32k_leaves_room_for_cuda_and_nccl() -> None:
    """Its layers run again, and no weight gradient waits: with those of a layer that did it would be 81 GB of 80."""
    config = compose(["+cluster=h800_2048", "+stage=extend_32k", "run.init_from=runs/v3"])
    candidate, count = candidate_of(config), 1920 // 128
    found = footprint(config, candidate, moments_of(candidate, count, at_first=count))
    assert min(each.reserved for each in found) == 4e9
    assert max(each.total for each in found) < 76e9


def test_exchanges_in_flight_grow_with_the_imbalance() -> None:
    """Of each of a pair's two combines what the experts' rank holds, not what comes home; two nodes of two ranks."""
    changes = {"layout_pp": 2, "layout_dp": 4, "layout_ep": 4, "model_num_hidden_layers": 4, **BY_NODE}
    changes |= {"schedule_batch_start_sequences": 16, "schedule_batch_full_sequences": 16}
    config = small(layout_schedule="DualPipeV", **changes)
    candidate = candidate_of(config)
    held = moments_of(candidate, 4, at_first=4)
    even, more = (footprint(config, candidate, held, imbalance=load)[0].in_flight for load in (1.0, 1.5))
    # 80 token copies arrive at even load: of each rank 40 tokens, each on two ranks.
    assert more - even == pytest.approx(2 * 0.5 * 80 * config.model.hidden_size * 2, rel=1e-9)


def test_two_copies_of_every_stage_share_their_states() -> None:
    """As many gradients again on the pipeline, and the same masters and moments in all."""
    config = compose(["+cluster=h800_2048"])
    one = candidate_of(config)
    layers = (*(4,) * 15, 1)
    plain = replace(one, chunks=1, schedule="1F1B", stage_layers=layers)
    twice = replace(one, chunks=2, schedule="DualPipe", stage_layers=layers * 2)
    stages = [[(r,) for r in range(16)], [(r, 31 - r) for r in range(16)]]
    sums = []
    for candidate, of_rank in zip((plain, twice), stages, strict=True):
        held = [[Moment((), (), 0, tuple(("F", stage) for stage in each))] for each in of_rank]
        found = footprint(config, candidate, held)
        sums.append([sum(getattr(each, name) for each in found) for name in ("gradients", "masters", "moments")])
    embedding = config.model.vocab_size * config.model.hidden_size
    # Two ranks hold the embedding either way in `twice`: the first stage's serves the last one's MTP.
    assert sums[1][0] == pytest.approx(2 * sums[0][0] - 2 * 4 * embedding, rel=1e-6)
    assert sums[1][1] == pytest.approx(sums[0][1] - 4 * embedding / 128, rel=1e-3)


def chunks_held(name: str, pp: int, micro_batches: int) -> list[int]:
    """The most micro-batches of each rank from forward to their weight part, each stage's counted."""
    written = orders(name, pp, SCHEDULES[name].chunks or 2, micro_batches)
    return [
        max(
            sum(count for _, count in (*moment.live, *moment.waiting)) + sum(kind == "F" for kind, _ in moment.runs)
            for moment in of_rank
        )
        for of_rank in moments(written, max_waiting_wgrads=None)
    ]


@pytest.mark.parametrize("pp", [2, 4, 8])
def test_micro_batches_held_have_the_known_values(pp: int) -> None:
    """1F1B: rank r warms up with pp - r. ZBV holds 2 pp chunks of half the size, DualPipe(V) one more (table 2)."""
    assert chunks_held("1F1B", pp, 4 * pp) == [pp - rank for rank in range(pp)]
    assert chunks_held("ZB-H1", pp, 4 * pp) == [pp] * pp
    assert chunks_held("ZBVZeroBubble", pp, 4 * pp) == [2 * pp] * pp
    for micro_batches in (2 * pp, 2 * pp + 1, 3 * pp):
        assert max(chunks_held("DualPipeV", pp, micro_batches)) <= 2 * pp + 1
    assert chunks_held("DualPipeV", pp, 4 * pp) == [2 * pp + 1] * pp
    assert chunks_held("DualPipe", pp, 4 * pp) == [pp + 1] * pp
