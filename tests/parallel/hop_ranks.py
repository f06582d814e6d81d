"""What the ranks of the two-hop tests run: routed experts under `layout.dispatch=node` beside `direct`.

Numbers of tokens decide whether a mistake shows: with a rank 1 that has none, tokens that come by (index of the source,
its node, token) are in order of (source rank, token) on 2 nodes of 2.
"""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

import parallel.hops
from kernels.permute import group_tokens
from kernels.quantize import dequantize_carried
from parallel.collectives import Traffic
from parallel.expert import ExpertParallelDispatcher, Wire
from parallel.layout import Layout
from parallel.mesh import Axis, Mesh, make_mesh
from tests.parallel.moe_ranks import (
    EXPERTS,
    KINDS,
    TOPK,
    Case,
    choose,
    exchanges,
    host_reads,
    over_the_wire,
    routed_experts,
    routing_of,
    there_and_back,
)
from train.model.moe import LocalDispatcher
from train.model.phases import arrived

TOKENS = {4: (131, 29, 37, 0), 8: (131, 29, 37, 0, 5, 0, 90, 17)}
HIDDEN = 160
WIRES: tuple[Wire, ...] = get_args(Wire)
# Those in which no token has two ranks on one node and one on another: no sum has another order.
ONE_ORDER = ("all to one expert", "all to the last rank", "own node only", "own rank only")
ALL_KINDS = (*KINDS, "node-limited", "own node only", "own rank only")
Squares = dict[str, tuple[bool, float, float]]


def homes(world: int) -> list[int]:
    """The rank of each token."""
    return [rank for rank in range(world) for _ in range(TOKENS[world][rank])]


def ids_of(kind: str, world: int, node: int) -> Tensor:
    """Expert ids [tokens, topk] of all ranks, distinct within a token."""
    home, local = torch.tensor(homes(world)), EXPERTS // world
    generator = torch.Generator().manual_seed(7)
    order = torch.rand(len(home), EXPERTS, generator=generator).argsort(-1)
    if kind == "node-limited":
        # Two of four groups.
        groups = torch.rand(len(home), 4, generator=generator).argsort(-1)[:, :2]
        allowed = (order[:, :, None] // 2 == groups[:, None]).any(-1)
        return order[allowed].view(len(home), 4)[:, :TOPK].contiguous()
    if kind in ("own node only", "own rank only"):
        size = local * (node if kind == "own node only" else 1)
        own = order[order // size == (home // (size // local))[:, None]].view(len(home), size)
        return own[:, :TOPK].contiguous()
    return choose(kind, len(home))


def case_of(kind: str, world: int, node: int, wire: str) -> Case:
    """All ranks' tokens."""
    ids, generator = ids_of(kind, world, node), torch.Generator().manual_seed(11)
    dtype = torch.float32 if wire == "fp32" else torch.bfloat16
    x, grad = torch.randn(2, len(ids), HIDDEN, generator=generator).to(dtype)
    gates = torch.rand(ids.shape, generator=generator) + 0.1
    return Case(x, grad, ids, gates / gates.sum(1, keepdim=True))


def span(rank: int, world: int) -> slice:
    """This rank's tokens among all."""
    start = sum(TOKENS[world][:rank])
    return slice(start, start + TOKENS[world][rank])


def part(whole: Case, rank: int, world: int) -> Case:
    """This rank's tokens."""
    mine = span(rank, world)
    return Case(*(each[mine].clone() for each in (whole.x, whole.grad, whole.ids, whole.gates)))


def dispatcher_on(mesh: Mesh, hops: tuple[Axis, ...], wire: Wire, **options: Any) -> ExpertParallelDispatcher:
    return ExpertParallelDispatcher(EXPERTS, mesh.ep, hops=hops, wire=wire, power_of_two=True, **options)


def differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> Squares:
    """Per tensor: equal to the bit, |difference|^2, |expected|^2."""
    result = {}
    for key, value in found.items():
        want = expected[key]
        error = float((value.double() - want.double()).square().sum())
        result[key] = (torch.equal(value, want), error, float(want.double().square().sum()))
    return result


def rows_at_experts(mine: Case, dispatcher: ExpertParallelDispatcher) -> list[Tensor]:
    """What the experts get: rows, gates, ends of their groups."""
    dispatched = arrived(dispatcher.dispatch(mine.x, routing_of(mine.ids, mine.gates)))
    tokens = dispatched.tokens if isinstance(dispatched.tokens, Tensor) else dequantize_carried(dispatched.tokens)
    return [group_tokens(tokens, dispatched.grouping), dispatched.gates, dispatched.grouping.group_ends]


def compared(mesh: Mesh, kind: str, wire: Wire) -> dict[str, Any]:
    """One kind of choice on one wire: `node` against `direct` and against one process."""
    rank, world, node = mesh.rank, mesh.ep.size, mesh.node.size
    whole = case_of(kind, world, node, wire)
    mine = part(whole, rank, world)
    direct, hops = (dispatcher_on(mesh, axes, wire) for axes in ((mesh.ep,), mesh.hops))
    expected, found = (routed_experts(mine, each, wire) for each in (direct, hops))
    alone = routed_experts(whole, LocalDispatcher(EXPERTS), wire)
    experts = slice(hops.experts.start, hops.experts.stop)
    alone = {key: each[experts if key.endswith("_proj") else span(rank, world)] for key, each in alone.items()}
    again = routed_experts(mine, hops, wire)
    rows = zip(*(rows_at_experts(mine, each) for each in (direct, hops)), strict=True)
    return {
        "direct": differences(found, expected),
        "one process": differences(found, alone),
        "rows": all(torch.equal(one, other) for one, other in rows),
        "repeats": all(torch.equal(again[key], found[key]) for key in found),
    }


def identity_faults(mesh: Mesh, wire: Wire) -> list[str]:
    """Unit gates and identity experts must give the token back, as it was quantised at home."""
    faults = []
    for kind in ALL_KINDS:
        mine = part(case_of(kind, mesh.ep.size, mesh.node.size, wire), mesh.rank, mesh.ep.size)
        expected = [mine.x, mine.grad]
        if wire == "fp8":
            expected = [over_the_wire(each, power_of_two=True).to(each.dtype) for each in expected]
        for slot, unit in enumerate(torch.eye(mine.ids.shape[1])):
            y, dx, _ = there_and_back(mine, dispatcher_on(mesh, mesh.hops, wire), unit.repeat(len(mine.ids), 1))
            if not (torch.equal(y, expected[0]) and torch.equal(dx, expected[1])):
                faults.append(f"{kind}, slot {slot}")
    return faults


def bytes_by_hop(mesh: Mesh) -> dict[str, Any]:
    """What went over each hop in FP8, and the copies that should have: of the ids, in plain Python."""
    rank, world, node = mesh.rank, mesh.ep.size, mesh.node.size
    whole, traffic = case_of("random", world, node, "fp8"), Traffic()
    mine = part(whole, rank, world)
    with exchanges() as seen:
        there_and_back(mine, dispatcher_on(mesh, mesh.hops, "fp8", traffic=traffic), mine.gates.requires_grad_())
    local = EXPERTS // world
    ranks = [{expert // local for expert in row} for row in whole.ids.tolist()]
    homed = list(zip(homes(world), ranks, strict=True))
    # What this rank passes on: tokens of its own index on their node, for ranks of its node.
    passed = [{r for r in to if r // node == rank // node} for home, to in homed if home % node == rank % node]
    return {
        "sent": sum(len({r // node for r in to}) for home, to in homed if home == rank),
        "crossing": sum(len({r // node for r in to} - {rank // node}) for home, to in homed if home == rank),
        "direct crossing": sum(r // node != rank // node for home, to in homed if home == rank for r in to),
        "passed": sum(map(bool, passed)),
        "copies": sum(map(len, passed)),
        "arrived": sum(rank in to for to in ranks),
        "handed over": seen,
        "traffic": dict(traffic.sent),
        "to others": dict(traffic.to_others),
    }


def without_tokens(mesh: Mesh) -> tuple[int, tuple[int, ...], int]:
    """Rows, shape of y and exchanges where no rank has a token; backward runs all the same."""
    none = part(case_of("random", mesh.ep.size, mesh.node.size, "fp8"), 3, mesh.ep.size)
    assert len(none.ids) == 0
    with exchanges() as seen:
        y, _, dispatched = there_and_back(none, dispatcher_on(mesh, mesh.hops, "fp8"), none.gates.requires_grad_())
    return dispatched.grouping.num_rows, tuple(y.shape), len(seen)


def out_of_order(mesh: Mesh) -> Squares:
    """`node` whose experts take tokens in order of arrival, against `direct`."""
    mine = part(case_of("random", mesh.ep.size, mesh.node.size, "fp32"), mesh.rank, mesh.ep.size)
    expected = routed_experts(mine, dispatcher_on(mesh, (mesh.ep,), "fp32"), "fp32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel.hops, "_source_order", lambda *_: None)
        return differences(routed_experts(mine, dispatcher_on(mesh, mesh.hops, "fp32"), "fp32"), expected)


def measure(rank: int, world: int, node: int) -> dict[str, Any]:
    """All measurements on nodes of so many ranks."""
    layout = Layout(dp=world, ep=world, ranks_per_node=node, dispatch="node")
    mesh = make_mesh(layout, device=torch.device("cpu"), tied_embedding=False)
    assert [axis.name for axis in mesh.hops] == ["rail", "node"]
    mine = part(case_of("random", world, node, "fp8"), rank, world)
    return {
        "cases": {(kind, wire): compared(mesh, kind, wire) for kind in ALL_KINDS for wire in WIRES},
        "identity": {wire: identity_faults(mesh, wire) for wire in WIRES},
        "node": node,
        "bytes": bytes_by_hop(mesh),
        "no tokens": without_tokens(mesh),
        "host reads": host_reads(mine, dispatcher_on(mesh, mesh.hops, "fp8")),
        "out of order": out_of_order(mesh),
    }
