"""Seconds of a layer, a stage and an update against closed forms, the planner study's figures and brute force."""

from __future__ import annotations

from dataclasses import replace

import pytest

from train.model.config import ModelConfig
from train.model.sizes import Held
from train.studies.plan.candidate import Candidate
from train.studies.plan.costs import (
    TOKENS,
    StageCosts,
    exchange_s,
    expected_shares,
    head_passes,
    layer_parts,
    layer_phases,
    p2p_s,
    projection_passes,
)
from train.studies.plan.lanes import in_line
from train.studies.plan.orders import Action
from train.studies.plan.products import Implementation, Setup, machine, product_s, speed
from train.studies.plan.traffic import expected_destinations
from train.studies.plan.update import update_s
from train.studies.smoke_runs import model_config

V3 = model_config("v3_671b")
SPLIT = (1, *(2,) * 30, 0)
OURS = Candidate(16, 128, 64, "ZBVZeroBubble", 2, SPLIT, attention_output="e5m6", keep_bf16_weights=False)
DEEPSEEK = Candidate(16, 128, 64, "DualPipe", 2, ((4,) * 15 + (1,)) * 2, dispatch="deepep", overlap=True)
DEEPGEMM = Implementation("DeepGEMM", "deepgemm", memory="fused", router="bf16", head="apart")


def setup_of(
    candidate: Candidate = OURS,
    implementation: Implementation = DEEPGEMM,
    *,
    model: ModelConfig = V3,
    tokens: int = 4096,
) -> Setup:
    return Setup(model, candidate, implementation, machine("H800"), tokens)


@pytest.mark.parametrize(
    ("phase", "study_ms"),
    [
        ("attend forward", 1.46), ("experts forward", 3.08), ("attend backward", 1.91), ("experts backward", 2.99),
        ("attend weights", 2.20), ("experts weights", 4.48),
    ],
)  # fmt: skip
def test_products_are_those_of_the_planner_study(phase: str, study_ms: float) -> None:
    """Measured speeds over 112 of 132 multiprocessors; the study rounds to 0.01 ms."""
    setup = setup_of(DEEPSEEK)
    share = setup.sms_share(beside_exchange=True)
    part = layer_parts(setup, moe=True, beside_exchange=True)[phase]
    assert part.products / share * 1e3 == pytest.approx(study_ms, abs=0.006)
    # The router's 15 GFLOP in each direction and pass.
    expected = 0.0 if phase.startswith("experts") else 2 * 4096 * 256 * 7168 / 330e12
    assert part.router == pytest.approx(expected)


def test_a_measured_product_is_exact_and_others_lie_between_their_neighbours() -> None:
    setup = setup_of(DEEPSEEK)
    shape = 4, 32768, 4096, 7168
    seconds = product_s(setup, "grouped fprop", shape) / setup.sms_share(beside_exchange=True)
    assert seconds * 1e3 == pytest.approx(1.767, abs=1e-3)  # the study's, where the profile has 1.766
    tables = setup.machine.tables
    assert speed(tables, "deepgemm", "grouped fprop", shape) == (1283e12, 0.0)
    found = speed(tables, "deepgemm", "grouped fprop", (8, 32768, 4096, 7168))
    # One octave of groups from G4, two from G32; the third nearest is G4's other shape, 2.8 octaves away.
    assert found.octaves == 1.0
    octaves, speeds = (1.0, 2.0, 1.0 + 0.8073549 + 1.8073549), (1283e12, 1242e12, 1174e12)
    weights = [1 / each for each in octaves]
    mean = sum(w * s for w, s in zip(weights, speeds, strict=True)) / sum(weights)
    assert found.flop_per_s == pytest.approx(mean, rel=1e-6)


def test_recomputation_costs_one_more_pass_of_the_up_projections() -> None:
    again, kept = (
        layer_parts(setup_of(replace(OURS, recompute=recompute)), moe=True, beside_exchange=False)
        for recompute in (True, False)
    )
    extra = 2 * 4096 * 24576 * 1536 / 1151e12 + 2 * 4096 * 32768 * 512 / 984e12
    for phase, part in again.items():
        expected = extra if phase == "attend backward" else 0.0
        assert part.products - kept[phase].products == pytest.approx(expected, abs=1e-12)


def test_attention_grows_with_tokens_times_sequence() -> None:
    short, long = (
        layer_parts(setup_of(tokens=tokens), moe=True, beside_exchange=False)["attend backward"].attention
        for tokens in (4096, 32768)
    )
    assert short == pytest.approx(4.56e-3)
    assert long == pytest.approx(64 * short)
    two = setup_of(replace(OURS, micro_batch_sequences=2))
    assert layer_parts(two, moe=True, beside_exchange=False)["attend backward"].attention == pytest.approx(2 * short)


def test_counted_bytes_over_the_memory_rate() -> None:
    """Of h800_2048's layer: the table's row times the tokens, at V3's widths; only experts feel imbalance."""
    setup = setup_of(implementation=replace(DEEPGEMM, memory="counted"))
    rate, tables = setup.machine.memory, setup.machine.tables
    parts = layer_parts(setup, moe=True, beside_exchange=False)
    values = tables.values("moe fp8 recompute e5m6, experts backward")
    assert parts["experts backward"].memory == pytest.approx((TOKENS * (values[0] + values[1]) + values[2]) / rate)
    skewed = replace(setup, implementation=replace(setup.implementation, imbalance=1.5))
    skewed_parts = layer_parts(skewed, moe=True, beside_exchange=False)
    # Eight of a token's nine experts are routed.
    ratio = skewed_parts["experts backward"].memory / parts["experts backward"].memory
    assert ratio == pytest.approx((8 * 1.5 + 1) / 9, rel=1e-4)
    assert skewed_parts["attend weights"].memory == parts["attend weights"].memory
    by_node = setup_of(replace(OURS, dispatch="deepep"), replace(DEEPGEMM, memory="counted"))
    by_hidden, others, *_ = tables.values("moe fp8 recompute e5m6, exchange forward")
    saved = (
        parts["attend forward"].memory - layer_parts(by_node, moe=True, beside_exchange=False)["attend forward"].memory
    )
    assert saved == pytest.approx(TOKENS * (by_hidden + others) * expected_shares(V3, shares=64) / 8 / rate, rel=1e-4)


def test_a_token_goes_to_as_many_nodes_as_the_router_sends_it_to() -> None:
    """200,000 tokens drawn with numpy gave 3.954 nodes and 7.494 ranks; a thousand know them to 0.3 %."""
    assert expected_shares(V3, shares=8) == pytest.approx(3.954, rel=0.01)
    assert expected_shares(V3, shares=64) == pytest.approx(7.494, rel=0.01)
    # Without groups there is nothing to spread, and chance has a closed form.
    plain = replace(V3, n_group=1, topk_group=1)
    for ranks in (8, 64):
        assert expected_shares(plain, shares=ranks) == pytest.approx(expected_destinations(plain, ep=ranks), rel=0.01)


def test_exchange_in_closed_form() -> None:
    ranks, nodes = expected_shares(V3, shares=64), expected_shares(V3, shares=8)
    direct = 4096 * ranks * 56 / 64 / 40e9
    assert exchange_s(setup_of()) == pytest.approx((7392 * direct, 14336 * direct))
    assert exchange_s(setup_of(DEEPSEEK)) == pytest.approx((4096 * nodes * 7392 / 51e9, 4096 * nodes * 14336 / 50e9))
    # Once to each node, 7 of 8 of them others; then to the ranks of a node, 7 of 8 of them others.
    in_series = 4096 * 7 / 8 * (nodes / 40e9 + ranks / 160e9)
    by_node = exchange_s(setup_of(replace(OURS, dispatch="node")))
    assert by_node == pytest.approx((7392 * in_series, 14336 * in_series))
    inside = setup_of(replace(OURS, ep=8))
    assert exchange_s(setup_of(replace(OURS, ep=8, dispatch="node"))) == exchange_s(inside)
    assert exchange_s(inside)[1] == pytest.approx(4096 * expected_shares(V3, shares=8) * 14336 / 160e9)
    assert exchange_s(setup_of(replace(OURS, ep=1))) == (0.0, 0.0)
    plain = setup_of(replace(OURS, precision="bf16", attention_output="bf16"))
    assert exchange_s(plain)[0] == exchange_s(plain)[1]


def test_the_work_of_all_stages_is_that_of_all_layers_however_they_are_split() -> None:
    implementation = replace(DEEPGEMM, memory="counted")

    def whole(split: tuple[int, ...]) -> float:
        costs = StageCosts(setup_of(replace(OURS, stage_layers=split), implementation))
        return sum(costs.time((Action(kind, stage, 0),)) for kind in "FIW" for stage in range(32))

    setup = setup_of(OURS, implementation)
    dense, moe = (layer_phases(setup, moe=moe, beside_exchange=False) for moe in (False, True))
    by_layer = [
        sum(in_line("F", each.forward()) + in_line("B", each.backward()) for each in (dense,) * 3 + (moe,) * 59)
    ]
    by_layer += [
        2 * sum(head_passes(setup, beside_exchange=False)),
        sum(projection_passes(setup, beside_exchange=False)),
    ]
    assert whole(SPLIT) == pytest.approx(sum(by_layer), rel=1e-9)
    assert whole((2,) * 30 + (1, 0)) == pytest.approx(sum(by_layer), rel=1e-9)


def test_stages_hold_what_their_candidate_says() -> None:
    costs = StageCosts(setup_of())
    assert list(costs.layer_ids(2)) == [3, 4]
    assert costs.held([0, 31]) == Held((0, 61), embedding=True, head=True)
    assert [phase.name for phase in costs.phases("F", 31, beside_exchange=False)] == [
        "head", "projection", "attend", "dispatch", "experts", "combine", "head",
    ]  # fmt: skip
    backward = costs.phases("B", 1, beside_exchange=False)
    # Layer 2, a MoE layer is 3 on; layer 1 and 2 are dense.
    assert [phase.name for phase in backward] == ["experts", "attend"] * 2
    assert [phase.name for phase in costs.phases("B", 2, beside_exchange=False)] == [
        "combine", "experts", "dispatch", "attend",
    ] * 2  # fmt: skip
    # The copies of DualPipe's stages are numbered on.
    mirrored = StageCosts(setup_of(DEEPSEEK))
    assert mirrored.stages == 16
    assert mirrored.layer_ids(15) == mirrored.layer_ids(31) == range(60, 61)
    assert mirrored.held([0, 31]) == Held((0, 0, 0, 60, 60, 61), embedding=True, head=True)


def test_a_pair_hides_its_exchange_and_computes_on_fewer_multiprocessors() -> None:
    costs = StageCosts(setup_of(DEEPSEEK))
    pair = costs.time((Action("F", 3, 1), Action("B", 5, 0)))
    assert pair == costs.time((Action("B", 5, 0), Action("F", 3, 1)))
    phases = [*costs.phases("F", 3, beside_exchange=True), *costs.phases("B", 5, beside_exchange=True)]
    lanes = {
        lane: sum(p.seconds + p.weight_s for p in phases if p.lane == lane) for lane in ("computation", "exchange")
    }
    apart = costs.time((Action("F", 3, 1),)) + costs.time((Action("B", 5, 0),))
    assert max(lanes.values()) <= pair < sum(lanes.values())
    assert pair < apart
    plain = StageCosts(setup_of(replace(DEEPSEEK, overlap=False)))
    assert plain.time((Action("F", 3, 1), Action("B", 5, 0))) == pytest.approx(apart)


def test_faster_links_memory_or_products_never_slow_a_step() -> None:
    base = setup_of(DEEPSEEK, replace(DEEPGEMM, memory="counted"))
    steps = [(Action("F", 3, 1), Action("B", 5, 0)), (Action("F", 15, 0),), (Action("I", 15, 0),), (Action("W", 0, 0),)]
    for name in ("infiniband", "infiniband_nccl", "nvlink", "memory", "memory_under_exchange", "sms"):
        for dispatch in ("direct", "node", "deepep"):
            setup = replace(base, candidate=replace(base.candidate, dispatch=dispatch))
            faster = replace(setup, machine=replace(setup.machine, **{name: 2 * getattr(setup.machine, name)}))
            slow, fast = StageCosts(setup), StageCosts(faster)
            assert all(fast.time(step) <= slow.time(step) for step in steps), (name, dispatch)
            assert p2p_s(faster) <= p2p_s(setup)


def test_our_fused_loss_does_all_three_products_in_forward() -> None:
    apart = head_passes(setup_of(), beside_exchange=False)
    together = head_passes(setup_of(implementation=replace(DEEPGEMM, head="in forward")), beside_exchange=False)
    assert together == pytest.approx((sum(apart), 0.0, 0.0))
    assert apart.forward * 1e3 == pytest.approx(2 * 4096 * 129280 * 7168 / 0.705e15 * 1e3, rel=0.12)


@pytest.mark.parametrize("keep", [True, False])
def test_an_update_in_closed_form(keep: bool) -> None:
    """One MoE layer: 44.04 M a routed expert, four of them here and two replicas; the rest over 128 data ranks."""
    setup = setup_of(replace(OURS, keep_bf16_weights=keep))
    found = update_s(setup, Held((7,), embedding=False, head=False))
    expert = 4 * 3 * 2048 * 7168
    attention = 7168 * 2112 + 1536 * 24576 + 512 * 32768 + 16384 * 7168
    shared, router, gains = 3 * 2048 * 7168, 256 * 7168, 2 * 7168 + 1536 + 512
    dense = attention + shared + router + gains
    a_dense_byte = 7 / 8 / 160e9 + 15 / 16 / 8 / 50e9
    assert found["reduce gradients"] == pytest.approx(4 * expert / 2 / 50e9 + 4 * dense * a_dense_byte)
    width = 2 if keep else 1
    sent = width * (attention + shared) + 2 * gains + 4 * router
    # An all-reduce of an FP32 maximum for each block of 128 x 128; of 2112 rows the last block has half.
    blocks = 0 if keep else (attention + 7168 * 64 + shared) / 128**2
    maxima = 0 if keep else 8 * expert / 128**2
    gathered = (width * expert + maxima) / 2 / 50e9 + (sent + 8 * blocks) * a_dense_byte
    assert found["gather weights"] == pytest.approx(gathered)
    # E4M3 reads the FP32 master twice more.
    again = 0 if keep else 8 * (expert / 2 + (attention + shared) / 128)
    shard = 24 * (expert / 2 + dense / 128) + width * expert / 2 + sent / 128 + again
    assert found["AdamW"] == pytest.approx(shard / setup.machine.memory)
    casts = (expert + attention + shared) * (4 if keep else 2)
    assert found["FP8 copies"] == pytest.approx(casts / setup.machine.memory)


def test_every_member_of_the_family_has_a_time() -> None:
    """v3_16b on one node: no measured row has its shapes, and the nearest is said to be far."""
    small = model_config("v3_16b")
    for precision in ("fp8", "bf16"):
        for dispatch in ("direct", "node", "deepep"):
            candidate = Candidate(1, 8, 8, "1F1B", 1, (27,), precision=precision, dispatch=dispatch)
            costs = StageCosts(setup_of(candidate, Implementation("today"), model=small))
            step = costs.time((Action("F", 0, 0),)) + costs.time((Action("B", 0, 0),))
            assert 0.02 < step < 1.0, (precision, dispatch)
            assert 0 < costs.bound_s() < step
    tables = machine("H800").tables
    assert speed(tables, "ours", "fprop", (1, 4096, 2816, 2048)).octaves > 1
