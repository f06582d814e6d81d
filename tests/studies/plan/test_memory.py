"""The closed forms of a plan equal the published sizes, the real model's tensors, and real routing and traffic."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, combinations, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from kernels.operators import FLOP_FORMULAS
from kernels.router import select_experts
from parallel.buckets import ALIGNMENT
from parallel.layout import Layout
from parallel.mesh import Axis
from parallel.zero import GradientBuckets
from tests.tiny_model import TINY
from train.config import compose
from train.model.attention import RopeTables
from train.model.block import make_block
from train.model.config import ModelConfig, StageSpec, whole
from train.model.moe import Experts, LocalDispatcher
from train.model.precision import Precision
from train.model.sizes import Held, flops_per_token, held_by, parameters, weights
from train.model.transformer import Transformer
from train.optim.adamw import AdamW
from train.optim.config import OptimConfig
from train.studies.plan.state_bytes import StateBytes, state_bytes
from train.studies.plan.traffic import (
    destinations_by_hop,
    dispatch_bytes,
    ends_apart,
    expected_destinations,
    expert_bytes,
    hidden_bytes,
    most_nodes,
    pipeline_bytes,
    share,
    update_bytes,
)

V3 = compose(["model=v3_671b", "data=text", "schedule=v3"]).model
RAGGED = compose(["model=ragged_test"]).model
H800 = Layout(pp=16, dp=128, ep=64, schedule="ZBVZeroBubble")
# deepseek-v3.md section 1 and tests/test_configs.py, router biases included.
V3_MAIN, V3_MTP = 671_026_419_200, 11_610_068_224


def held_by_rank(config: ModelConfig, layout: Layout, pp_rank: int) -> Held:
    """Layers spread evenly over the stages, the first ones taking the rest."""
    stages = layout.num_stages
    counts = (share(config.num_hidden_layers, ranks=stages, rank=stage) for stage in range(stages))
    bounds = list(pairwise(accumulate(counts, initial=0)))
    parts = [
        StageSpec(range(*bounds[stage]), is_first=stage == 0, is_last=stage == stages - 1)
        for stage in layout.stages_of_rank(pp_rank)
    ]
    return held_by(config, parts)


@pytest.mark.parametrize("schedule", ["1F1B", "ZBVZeroBubble"])
def test_the_parameters_of_all_ranks_are_those_of_v3(schedule: str) -> None:
    """Dense ones once per pipeline column, experts once per rank of an expert group."""
    layout = Layout(pp=16, dp=128, ep=64, schedule=schedule)
    columns = [parameters(weights(V3, held_by_rank(V3, layout, pp_rank), ep=64)) for pp_rank in range(16)]
    total = sum(held.dense + 64 * held.expert for held in columns)
    # Without a V the last rank holds a copy of the embedding for MTP.
    copy = V3.vocab_size * V3.hidden_size if schedule == "1F1B" else 0
    assert ends_apart(V3, layout) == (copy > 0)
    assert total == V3_MAIN + V3_MTP + copy


def test_the_state_of_all_2048_ranks_is_the_state_of_v3() -> None:
    """Sharded states exactly once; weights, copies and gradients 128 times (dense) and twice (experts)."""
    tables = [weights(V3, held_by_rank(V3, H800, pp_rank), ep=64) for pp_rank in range(16)]
    states = [state_bytes(table, H800, precision="fp8", dp_rank=dp) for table in tables for dp in range(128)]
    assert len(states) == 2048
    routers, biases = 59 * 256 * 7168, 59 * 256
    trained = V3_MAIN + V3_MTP - biases
    # An FP32 router is its own master; every trained element has two BF16 moments.
    assert sum(state.masters for state in states) == 4 * (trained - routers)
    assert sum(state.moments for state in states) == 4 * trained
    expert = 59 * 256 * 44_040_192
    dense = trained - expert
    assert sum(state.gradients for state in states) == 4 * (128 * dense + 2 * expert)
    wide = routers + biases
    assert sum(state.weights for state in states) == 128 * (2 * (dense - routers) + 4 * wide) + 2 * 2 * expert
    # FP8, twice, once transposed: every linear of 62 attentions, 3 dense FFNs, 59 shared and 59 x 256 routed experts.
    # All but the 2112 rows of q_kv_a_proj (16 x 128 + 64) fill their 128x128 blocks; there one row of 56 blocks is
    # half empty.
    fp8_dense = 62 * 187_105_280 + 3 * 396_361_728 + 59 * 44_040_192
    half_blocks = 62 * 56 * 64 * 128
    copies = 128 * (2 * fp8_dense + (fp8_dense + half_blocks) // 4096) + 2 * (2 * expert + expert // 4096)
    assert sum(state.fp8_copies for state in states) == copies


def test_the_rank_of_v3_with_the_most_state() -> None:
    """Rank 0 of 2048: embedding, head, MTP, and under this split 3 MoE layers and 2 dense ones; in bytes."""
    held = held_by_rank(V3, H800, 0)
    assert held == Held((0, 1, 60, 61), embedding=True, head=True)
    state = state_bytes(weights(V3, held, ep=64), H800, precision="fp8", dp_rank=0)
    experts = 2 * 4 * 44_040_192
    dense = 2 * 926_679_040 + 4 * (187_105_280 + 2_048 + 14_336) + 2 * 396_361_728 + 2 * (44_040_192 + 1_835_008)
    # Final norm; eh_proj and the three norms of MTP.
    dense += 7168 + 2 * 7168**2 + 3 * 7168
    assert state.gradients == 4 * (dense + experts)
    assert state.moments == 4 * (dense // 128 + experts // 2)


def real_state(model: Transformer, layout: Layout, *, dp_rank: int) -> StateBytes:
    """The same five numbers from tensors: FP8 copies made by a forward, states by the optimizer."""
    experts = {id(p) for module in model.modules() if isinstance(module, Experts) for p in module.parameters()}
    group: Any = object()
    buckets = []
    for axis, size, rank in (("dp", layout.dp, dp_rank), ("edp", layout.edp, dp_rank // layout.ep)):
        part = [(name, p) for name, p in model.named_parameters() if (id(p) in experts) == (axis == "edp")]
        place = Axis(axis, size=size, rank=rank, group=group if size > 1 else None)
        buckets.append(GradientBuckets(part, axis=place, sharded=layout.zero))
    pieces = AdamW(buckets, OptimConfig()).state_shards()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model(torch.randint(model.config.vocab_size, (1, 5)))
    copies = [q for p in model.parameters() if (q := getattr(p, "_fp8_copy", None)) is not None]
    return StateBytes(
        weights=sum(t.nbytes for t in (*model.parameters(), *model.buffers())),
        fp8_copies=sum(q.payload.nbytes + q.scale.nbytes + q.payload_t.nbytes for _, q in copies),
        gradients=sum(p.main_grad.nbytes for p in model.parameters()),  # type: ignore[attr-defined]
        masters=sum(piece.tensor.nbytes for name, piece in pieces.items() if name.startswith("master.")),
        moments=sum(piece.tensor.nbytes for name, piece in pieces.items() if name.startswith("exp_avg")),
    )


@pytest.mark.parametrize("config", [TINY, RAGGED], ids=["tiny", "ragged"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_the_bytes_of_one_process_are_those_of_its_tensors(config: ModelConfig, precision: Any) -> None:
    table = weights(config, held_by(config, [whole(config)]), ep=1)
    expected = real_state(Transformer(config, Precision(precision)), Layout(), dp_rank=0)
    assert state_bytes(table, Layout(), precision=precision, dp_rank=0) == expected
    assert (expected.fp8_copies > 0) == (precision == "fp8")


@pytest.mark.parametrize("zero", [True, False])
def test_the_shards_of_all_ranks_are_those_of_real_buckets(zero: bool) -> None:
    """The cut of a bucket differs from the even share by its padding only, and the sum does not differ at all."""
    layout = Layout(dp=3, zero=zero)
    table = weights(TINY, held_by(TINY, [whole(TINY)]), ep=1)
    plans = [state_bytes(table, layout, precision="bf16", dp_rank=rank) for rank in range(3)]
    reals = [real_state(Transformer(TINY, Precision("bf16")), layout, dp_rank=rank) for rank in range(3)]
    assert [sum(field) for field in zip(*plans, strict=True)] == [sum(field) for field in zip(*reals, strict=True)]
    trained = len([weight for weight in table if weight.trained]) * 2
    for plan, real in zip(plans, reals, strict=True):
        # Each tensor and the end of each of 3 buckets (dense BF16 and FP32, experts) may be padded to 128.
        assert abs(plan.masters - real.masters) <= 4 * ALIGNMENT * (trained + 3 * 3)
    whole_masters = sum(plan.masters for plan in plans)
    assert plans[0].masters == (share(whole_masters // 4, ranks=3, rank=0) * 4 if zero else whole_masters // 3)


def test_flops_of_a_token_are_the_published_ones() -> None:
    """deepseek-v3.md section 4: 219.75 GFLOP of GEMMs, 250.4 with causal attention, 10.19 more for MTP."""
    main = Held(tuple(V3.layer_ids), embedding=True, head=True)
    flops = flops_per_token(V3, weights(V3, main, ep=64), main, sequence_length=4096)
    gemms = sum(flops.values()) - flops["attention_core"]
    assert round(gemms / 1e9, 2) == 219.75
    assert round(flops["attention_core"] / 1e9, 2) == 30.70
    assert round(sum(flops.values()) / 1e9, 1) == 250.4
    # Without the router, as published figures are: 249.8.
    assert round((sum(flops.values()) - flops["router"]) / 1e9, 1) == 249.8
    full = held_by(V3, [whole(V3)])
    with_mtp = flops_per_token(V3, weights(V3, full, ep=64), full, sequence_length=4096)
    assert round((sum(with_mtp.values()) - sum(flops.values())) / 1e9, 2) == 10.19


@pytest.mark.parametrize("layer_id", [0, 3])
def test_flops_of_a_layer_are_those_its_operators_count(layer_id: int) -> None:
    """A layer of V3 run with fake tensors. Routed experts multiply padded rows; all else agrees to the FLOP."""
    tokens = 4096
    held = Held((layer_id,), embedding=False, head=False)
    flops = flops_per_token(V3, weights(V3, held, ep=1), held, sequence_length=tokens)
    with FakeTensorMode():
        block = make_block(V3, Precision("fp8"), RopeTables(V3), LocalDispatcher(256), layer_id=layer_id)
        x = torch.empty(1, tokens, V3.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        with FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as counter:
            _, y, _ = block(x, None, None)
            y.backward(torch.empty_like(y))
    counted = {str(op).rpartition(".")[2]: n for op, n in counter.get_flop_counts()["Global"].items()}
    grouped = sum(n for name, n in counted.items() if name.startswith("grouped"))
    routed = flops.pop("routed_experts", 0) * tokens
    assert sum(counted.values()) - grouped == tokens * sum(flops.values())
    # The static bound of rows: 8 slots a token and at most 127 rows of padding an expert (kernels/permute.py).
    rows = (tokens * 8 + 256 * 127) // 128 * 128
    assert grouped * tokens * 8 == routed * rows


def enumerated(config: ModelConfig, ep: int) -> float:
    """Mean of destinations over every legal choice of groups and experts."""
    size, local = config.experts_per_group, config.n_routed_experts // ep
    found = []
    for groups in combinations(range(config.n_group), config.topk_group):
        reachable = [e for g in groups for e in range(g * size, (g + 1) * size)]
        found += [len({e // local for e in chosen}) for chosen in combinations(reachable, config.num_experts_per_tok)]
    return sum(found) / len(found)


@pytest.mark.parametrize(("name", "ep"), [("ragged_test", 2), ("ragged_test", 3), ("ragged_test", 6), ("tiny", 4)])
def test_destinations_equal_the_enumeration_of_all_choices(name: str, ep: int) -> None:
    """Ranks within a group, groups within a rank, and both astride (ragged_test on 2: three experts a rank of two)."""
    config = compose([f"model={name}"]).model
    mean = enumerated(config, ep)
    assert expected_destinations(config, ep=ep) == pytest.approx(mean, rel=1e-12)


def test_destinations_of_v3_are_nearly_those_of_its_router() -> None:
    """Independent scores through the real selection: 7.49. Groups chosen by their two best give two experts each."""
    scores = torch.rand(8192, 256)
    ids = select_experts(scores, torch.zeros(256), n_group=8, topk_group=4, topk=8)
    ranks: Tensor = torch.zeros(8192, 64).scatter_(1, ids // 4, 1.0).sum(1)
    expected = expected_destinations(V3, ep=64)
    assert expected == pytest.approx(7.3594, abs=1e-4)
    # Measured 1.8 %; the standard error of the mean is 0.008 of 7.49, 0.1 %.
    assert 1.0 < float(ranks.mean()) / expected < 1.025
    assert int(ranks.max()) == 8
    assert expected_destinations(V3, ep=1) == pytest.approx(1.0, rel=1e-12)
    # On nodes of 8 ranks: a group of experts whose two best won is nearly always used, so its node is.
    nodes: Tensor = torch.zeros(8192, 8).scatter_(1, ids // 32, 1.0).sum(1)
    assert expected_destinations(V3, ep=8) == pytest.approx(3.6290, abs=1e-4)
    assert float(nodes.mean()) == pytest.approx(3.954, abs=0.01)
    assert int(nodes.max()) == 4
    assert most_nodes(V3) == 4


def test_bytes_of_the_expert_axis() -> None:
    """7392 and 14336 bytes a token copy (deepseek-v3.md section 3), twice each; 64 and 32 of routing."""
    assert dispatch_bytes(7168, precision="fp8") == 7392
    assert dispatch_bytes(7168, precision="bf16") == hidden_bytes(7168, precision="fp8") == 14336
    assert dispatch_bytes(320, precision="fp8") == 320 + 3 * 4
    assert dispatch_bytes(320, precision="fp32") == hidden_bytes(320, precision="fp32") == 1280
    held = Held((2, 3, 4), embedding=False, head=False)
    sent = expert_bytes(V3, H800, held, tokens=4096, precision="fp8", destinations=(8,))
    copies = 2 * 4096 * 8
    assert sent == {
        "dispatch": 2 * copies * 7392,
        "combine": 2 * copies * 14336,
        "routing": copies * 64,
        "gates": copies * 32,
        "counts": 2 * 64 * 5 * 8,
    }
    # Where layers run again, tokens go out once more, and no sums come home.
    twice = expert_bytes(V3, H800, held, tokens=4096, precision="fp8", destinations=(8,), forwards=2)
    more = {"dispatch": copies * 7392, "combine": 0, "routing": copies * 64, "gates": 0, "counts": sent["counts"]}
    assert {kind: twice[kind] - sent[kind] for kind in sent} == more
    # Each token to four nodes, 6,656 bytes of counts a layer.
    by_node = replace(H800, dispatch="node")
    sent = expert_bytes(V3, by_node, held, tokens=4096, precision="fp8", destinations=(4, 8))
    assert sent == {
        "rail.dispatch": copies * 7392,
        "node.dispatch": 2 * copies * 7392,
        "rail.combine": copies * 14336,
        "node.combine": 2 * copies * 14336,
        "rail.routing": copies / 2 * 64,
        "node.routing": copies * 64,
        "rail.gates": copies / 2 * 32,
        "node.gates": copies * 32,
        "counts": 2 * 6656,
    }
    assert destinations_by_hop(V3, H800) == (pytest.approx(7.3594, abs=1e-4),)
    assert destinations_by_hop(V3, by_node) == (pytest.approx(3.6290, abs=1e-4), pytest.approx(7.3594, abs=1e-4))
    assert expert_bytes(V3, Layout(dp=2), held, tokens=4096, precision="fp8", destinations=(1,)) == {}


def test_bytes_of_the_pipeline() -> None:
    """A micro-batch crosses 30 of the V's 31 borders forward and back; its turning point lies within one rank."""
    hidden = 4096 * 7168 * 2
    sent = [pipeline_bytes(V3, H800, pp_rank=rank, tokens=4096, precision="fp8") for rank in range(16)]
    assert sum(sent) == 2 * 30 * hidden
    # Rank 0 sends stage 0's output and stage 31's gradient; inner ranks send both ways from both stages.
    assert (sent[0], sent[1], sent[15]) == (2 * hidden, 4 * hidden, 2 * hidden)
    straight = Layout(pp=4, dp=8, ep=2)
    sent = [pipeline_bytes(V3, straight, pp_rank=rank, tokens=4096, precision="bf16") for rank in range(4)]
    assert sent == [hidden, 2 * hidden, 2 * hidden, hidden]
    assert pipeline_bytes(V3, Layout(), pp_rank=0, tokens=4096, precision="bf16") == 0


def test_bytes_of_an_update() -> None:
    """A ring sends (ranks - 1) / ranks of FP32 gradients and of weights as they are stored."""
    held = Held((3,), embedding=False, head=False)
    table = weights(V3, held, ep=64)
    dense, expert = 187_105_280 + 2_048 + 14_336 + 44_040_192, 4 * 44_040_192
    router = 1_835_008
    assert update_bytes(V3, H800, table, precision="fp8") == {
        "dp": {"gradients": 4 * (dense + router) * 127 / 128, "weights": (2 * dense + 4 * router) * 127 / 128},
        "edp": {"gradients": 4 * expert / 2, "weights": 2 * expert / 2},
    }
    # A byte an element, an all-reduce of four a block; gains and router as before.
    sent = update_bytes(V3, H800, table, precision="fp8", keep_bf16_weights=False)
    linears, gains = dense - 2_048 - 14_336, 2_048 + 14_336
    blocks = sum(w.copies * -(-w.rows // 128) * -(-w.cols // 128) for w in table if w.fp8 and not w.expert)
    assert sent["dp"]["weights"] == (linears + 8 * blocks + 2 * gains + 4 * router) * 127 / 128
    assert sent["edp"]["weights"] == (expert + 8 * expert // 128**2) / 2
    assert blocks == pytest.approx(linears / 128**2, rel=0.005), "576 + 1536 rows of latents are 16.5 blocks"
    whole_states = Layout(pp=16, dp=128, ep=128, schedule="ZBVZeroBubble", zero=False)
    sent = update_bytes(V3, whole_states, weights(V3, held, ep=128), precision="fp8")
    assert sent == {"dp": {"gradients": 4 * (dense + router) * 127 / 128, "weights": 4 * (dense + router) * 127 / 128}}
    assert update_bytes(V3, Layout(), table, precision="fp8") == {}


def test_two_copies_of_the_embedding_are_summed() -> None:
    layout = Layout(pp=4, dp=8, ep=2)
    sent = [update_bytes(V3, layout, weights(V3, held_by_rank(V3, layout, r), ep=2), precision="fp8") for r in range(4)]
    shard = 4 * 129280 * 7168 / 8
    assert [s.get("tied", {}).get("gradients") for s in sent] == [shard, None, None, shard]
