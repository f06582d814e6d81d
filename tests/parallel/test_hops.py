"""`layout.dispatch=node`: two hops against one, and against one process (`hop_ranks.py`)."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from parallel.collectives import Traffic
from parallel.expert import ExpertParallelDispatcher, Wire
from parallel.layout import Layout
from parallel.mesh import Mesh, init_processes, make_mesh
from tests.parallel.hop_ranks import ALL_KINDS, HIDDEN, ONE_ORDER, TOKENS, WIRES, Squares, measure
from tests.parallel.moe_ranks import EXPERTS, TOPK, identity_experts
from tests.ranks import run_ranks
from train.model.phases import arrived


@pytest.fixture(
    scope="module",
    params=[(4, 2), pytest.param((8, 2), marks=pytest.mark.long), pytest.param((8, 4), marks=pytest.mark.long)],
    ids=["2 nodes of 2", "4 nodes of 2", "2 nodes of 4"],
)
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What every rank measured."""
    world, node = request.param
    return run_ranks(world, measure, node)


def relative(parts: list[Squares], key: str) -> float:
    """Relative Frobenius error over all ranks."""
    return float((sum(part[key][1] for part in parts) / sum(part[key][2] for part in parts)) ** 0.5)


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_experts_see_the_rows_of_one_hop_in_its_order(ranks: list[dict[str, Any]], kind: str, wire: Wire) -> None:
    """Expert inputs, gradients of gates and of expert weights: every bit, and every bit again."""
    cases = [result["cases"][kind, wire] for result in ranks]
    for case in cases:
        assert case["rows"]
        assert case["repeats"]
        assert {key for key, (equal, *_) in case["direct"].items() if not equal} <= {"y", "x"}
    if kind in ONE_ORDER:
        assert all(case["direct"][key][0] for case in cases for key in ("y", "x"))


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("other", ["direct", "one process"])
def test_results_differ_by_the_order_of_sums_or_one_rounding_for_bf16(
    ranks: list[dict[str, Any]], kind: str, wire: Wire, other: str
) -> None:
    cases = [result["cases"][kind, wire][other] for result in ranks]
    assert relative(cases, "gates") == 0
    for key in ("gate_up_proj", "down_proj"):
        # Underflow in FP8, against one process only: `test_expert.py`.
        assert relative(cases, key) <= (1e-6 if (wire, other) == ("fp8", "one process") else 0), key
    for key in ("y", "x"):
        # FP32: three terms in another order, three roundings of 2^-24. Else BF16 roundings: on each rank, once more for
        # each node, once at home, and one in the reference: sqrt(4) * 0.7 * 2^-8 / sqrt(3) = 3.2e-3.
        assert relative(cases, key) < (3 * 2**-24 if wire == "fp32" else 2**-8), key


def test_without_the_order_of_one_hop_weight_gradients_lose_their_bits(ranks: list[dict[str, Any]]) -> None:
    """So these numbers of tokens can see it; y and dx do not change with it."""
    parts = [result["out of order"] for result in ranks]
    assert relative(parts, "gate_up_proj") > 0
    assert relative(parts, "down_proj") > 0
    assert relative(parts, "gates") == 0


@pytest.mark.parametrize("wire", WIRES)
def test_two_hops_there_and_back_are_the_identity_for_unit_gates(ranks: list[dict[str, Any]], wire: Wire) -> None:
    """To the bit; in FP8 what arrives is what was quantised at home, forward and backward."""
    assert [result["identity"][wire] for result in ranks] == [[]] * len(ranks)


def test_bytes_of_each_hop_are_those_of_the_formula(ranks: list[dict[str, Any]]) -> None:
    """Handed to all_to_all_single, against copies counted on the ids: a token crosses once to each node."""
    packet, local = HIDDEN + 4 * -(-HIDDEN // 128), EXPERTS // len(ranks)
    for rank, result in enumerate(ranks):
        wire = result["bytes"]
        sent, passed, copies, arrived = (wire[key] for key in ("sent", "passed", "copies", "arrived"))
        peers = result["node"]
        assert wire["handed over"] == [
            ("int64", len(ranks) * 8 * (1 + peers + local)),
            ("int32", sent * 8 * TOPK),
            ("uint8", sent * packet),
            ("int32", copies * 8 * TOPK),
            ("uint8", copies * packet),
            # Home: from the experts' ranks, then from the ranks that passed on.
            ("bfloat16", arrived * 2 * HIDDEN),
            ("bfloat16", passed * 2 * HIDDEN),
            ("uint8", sent * packet),
            ("uint8", copies * packet),
            ("bfloat16", arrived * 2 * HIDDEN),
            ("float32", arrived * 4 * TOPK),
            ("bfloat16", passed * 2 * HIDDEN),
            ("float32", passed * 4 * TOPK),
        ], rank
        assert wire["traffic"]["rail.dispatch"] == 2 * sent * packet
        assert wire["traffic"]["node.combine"] == 2 * arrived * 2 * HIDDEN
        # `rail` to others is all that crosses nodes.
        assert wire["to others"]["rail.dispatch"] == 2 * wire["crossing"] * packet
    assert sum(result["bytes"]["crossing"] for result in ranks) < sum(
        result["bytes"]["direct crossing"] for result in ranks
    )


def test_two_hops_read_the_host_once(ranks: list[dict[str, Any]]) -> None:
    for result in ranks:
        assert result["host reads"] == {"dispatch": ["tolist"], "combine": [], "backward": []}


def test_no_token_anywhere_runs_every_exchange(ranks: list[dict[str, Any]]) -> None:
    assert [result["no tokens"] for result in ranks] == [(0, (0, HIDDEN), 13)] * len(ranks)


def test_these_tokens_are_not_those_that_come_in_order_by_chance() -> None:
    """Ranks 1 and 2 both have some: the order of arrival and of (source rank, token) differ on 2 nodes of 2."""
    assert all(all(tokens[:3]) and 0 in tokens for tokens in TOKENS.values())


@pytest.fixture
def mesh_of_v3() -> Iterator[Mesh]:
    """Rank 130 of 2,048."""
    init_processes(rank=130, world=2048, backend="fake", store=None)
    try:
        layout = Layout(pp=16, dp=128, ep=64, dispatch="node")
        yield make_mesh(layout, device=torch.device("cpu"), tied_embedding=True)
    finally:
        dist.destroy_process_group()


def test_one_rank_of_2048_is_planned_with_two_hops(mesh_of_v3: Mesh) -> None:
    """A token goes to 4 nodes and 8 ranks, forward and backward."""
    traffic, mesh = Traffic(), mesh_of_v3
    assert [(axis.size, axis.rank) for axis in mesh.hops] == [(8, 0), (8, 2)]
    dispatcher = ExpertParallelDispatcher(
        256, mesh.ep, hops=mesh.hops, wire="fp8", power_of_two=True, assume_balanced=True, most_nodes=4, traffic=traffic
    )
    with FakeTensorMode():
        x = torch.empty(4096, 7168, dtype=torch.bfloat16, requires_grad=True)
        gates = torch.empty(4096, 8, requires_grad=True)
        ids, counts = torch.empty(4096, 8, dtype=torch.int64), torch.empty(256, dtype=torch.int64)
        dispatched = arrived(dispatcher.dispatch(x, SimpleNamespace(topk_ids=ids, gates=gates, counts=counts)))
        assert dispatched.tokens.shape == (32768, 7168)
        y = arrived(dispatcher.combine(identity_experts(dispatched), dispatched))
        y.sum().backward()
        assert (x.grad.shape, gates.grad.shape) == (x.shape, gates.shape)
    assert traffic.sent["rail.dispatch"] == 2 * 4096 * 4 * 7392
    assert traffic.sent["node.dispatch"] == 2 * 4096 * 8 * 7392
    assert traffic.sent["rail.combine"] == 2 * 4096 * 4 * 14336
    assert traffic.to_others["node.combine"] == 2 * 4096 * 8 * 14336 * 7 // 8
