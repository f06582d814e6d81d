"""Impossible layouts are refused with the numbers and the cure; possible ones become the groups of arithmetic."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from parallel.layout import Layout, Workload, check_layout, check_world
from parallel.mesh import (
    AXES,
    Axis,
    Mesh,
    NetworkConfig,
    axis_ranks,
    cpu_group,
    init_processes,
    make_mesh,
    shutdown,
    single,
)
from tests.ranks import run_ranks

CPU = torch.device("cpu")
V3_LAYOUT = Layout(pp=16, dp=128, ep=64, schedule="ZBVZeroBubble")
V3 = Workload(
    num_layers=61,
    n_routed_experts=256,
    n_group=8,
    batch_start_sequences=3072,
    batch_full_sequences=15360,
    batch_multiple_sequences=128,
    micro_batch_sequences=1,
)
SMALL = Workload(
    num_layers=6,
    n_routed_experts=12,
    n_group=4,
    batch_start_sequences=24,
    batch_full_sequences=48,
    batch_multiple_sequences=24,
    micro_batch_sequences=2,
)

# Fields of Layout -> the whole sentence.
BY_ITSELF = {
    "no rank": ({"pp": 0}, "layout.pp=0 is too small: use 1 or more"),
    "negative": ({"dp": -2}, "layout.dp=-2 is too small: use 1 or more"),
    "negative wait": (
        {"max_waiting_wgrads": -1},
        "layout.max_waiting_wgrads=-1 is negative: use 0 or more, or null",
    ),
    "no rank on a node": ({"ranks_per_node": 0}, "layout.ranks_per_node=0 is too small: use 1 or more"),
    "ep that does not divide": (
        {"dp": 8, "ep": 3},
        "layout.ep=3 does not divide layout.dp=8: use layout.ep=2 or 4, or layout.dp=6 or 9",
    ),
    "ep above dp": ({"dp": 2, "ep": 4}, "layout.ep=4 does not divide layout.dp=2: use layout.ep=2, or layout.dp=4"),
    "schedule": (
        {"schedule": "ZBV"},
        (
            "layout.schedule=ZBV is not a pipeline schedule: did you mean layout.schedule=ZBVZeroBubble? "
            "(1F1B, ZBVZeroBubble)"
        ),
    ),
    "stages": (
        {"pp": 2, "schedule": "ZBVZeroBubble", "stage_layers": (3, 3)},
        (
            "layout.stage_layers=[3, 3] names 2 stages, but layout.schedule=ZBVZeroBubble on layout.pp=2 has 4: "
            "give 4 numbers, or null to balance them by cost"
        ),
    ),
    "empty stage": (
        {"pp": 2, "stage_layers": (6, 0)},
        "layout.stage_layers=[6, 0] leaves a stage without layers: give each 1 or more",
    ),
}

# Layout, changes to SMALL -> the whole sentence.
WITH_WORKLOAD = {
    "experts": (
        Layout(dp=24, ep=8, ranks_per_node=24),
        {},
        "layout.ep=8 does not divide model.n_routed_experts=12: on layout.dp=24 use layout.ep=6 or 12",
    ),
    # On nodes of 8, ep 6 would put experts 3-5 of the expert-parallel group that starts at rank 6 on ranks 7 and 8.
    "experts, and the next choices would leave the node": (
        Layout(dp=24, ep=8),
        {},
        "layout.ep=8 does not divide model.n_routed_experts=12: on layout.dp=24 use layout.ep=4",
    ),
    # ep 6 of 12 experts: group 1 is experts 3-5 on ranks 1-2, on either side of the border of a node of 2.
    "routing group on two nodes": (
        Layout(dp=12, ep=6, ranks_per_node=2),
        {},
        (
            "layout.ep=6 spreads expert group 1 of model.n_group=4 over ranks 1 to 2, which lie on two nodes of "
            "layout.ranks_per_node=2, so that node-limited routing would not limit nodes: use layout.ep=4"
        ),
    ),
    "routing group on two nodes, only in the second expert-parallel group": (
        Layout(dp=12, ep=12, pp=2, ranks_per_node=16),
        {"n_group": 2},
        (
            "layout.ep=12 spreads expert group 0 of model.n_group=2 over ranks 12 to 17, which lie on two nodes of "
            "layout.ranks_per_node=16, so that node-limited routing would not limit nodes: use layout.ep=4"
        ),
    ),
    "stages": (
        Layout(pp=4, dp=1, schedule="ZBVZeroBubble"),
        {},
        (
            "layout.pp=4 with layout.schedule=ZBVZeroBubble makes 8 stages of model.num_hidden_layers=6, less than one "
            "layer each: use layout.pp=3 or less"
        ),
    ),
    "missing layers": (
        Layout(pp=2, stage_layers=(2, 3)),
        {},
        "layout.stage_layers=[2, 3] sums to 5, but model.num_hidden_layers=6: add 1, or use null",
    ),
    "surplus layers": (
        Layout(pp=2, stage_layers=(4, 4)),
        {},
        "layout.stage_layers=[4, 4] sums to 8, but model.num_hidden_layers=6: take away 2, or use null",
    ),
    "granularity": (
        Layout(dp=4, ep=2),
        {"batch_multiple_sequences": 12},
        (
            "schedule.batch_multiple_sequences=12 is not a multiple of layout.dp=4 x run.micro_batch_sequences=2 = 8, "
            "so a step would not split into micro-batches: use schedule.batch_multiple_sequences=8 or 16, or "
            "layout.dp=2 or 6"
        ),
    ),
    "start": (
        Layout(dp=4),
        {"batch_start_sequences": 4, "batch_multiple_sequences": 8},
        (
            "schedule.batch_start_sequences=4 is not a multiple of layout.dp=4 x run.micro_batch_sequences=2 = 8, so a "
            "step would not split into micro-batches: use schedule.batch_start_sequences=8, or layout.dp=2"
        ),
    ),
    "end": (
        Layout(dp=4),
        {"batch_full_sequences": 44, "batch_multiple_sequences": 8},
        (
            "schedule.batch_full_sequences=44 is not a multiple of layout.dp=4 x run.micro_batch_sequences=2 = 8, so a "
            "step would not split into micro-batches: use schedule.batch_full_sequences=40 or 48, or layout.dp=2"
        ),
    ),
    # 24 / (4 x 2) = 3 micro-batches for 4 stages.
    "micro-batches": (
        Layout(pp=4, dp=4),
        {"batch_multiple_sequences": 8},
        (
            "schedule.batch_start_sequences=24 gives each of layout.dp=4 pipelines 3 micro-batches of "
            "run.micro_batch_sequences=2, but layout.schedule=1F1B on layout.pp=4 needs 4: "
            "use schedule.batch_start_sequences=32, layout.pp=3, layout.dp=3 or layout.schedule=ZBVZeroBubble"
        ),
    ),
}

WORLDS = {
    "half": (
        Layout(pp=2, dp=8),
        8,
        "8 processes were started, but layout.pp=2 x layout.dp=8 needs 16: start 16, or set layout.dp=4",
    ),
    "experts follow": (
        Layout(pp=2, dp=8, ep=8),
        4,
        (
            "4 processes were started, but layout.pp=2 x layout.dp=8 needs 16: "
            "start 16, or set layout.dp=2 and layout.ep=2"
        ),
    ),
    "laptop": (
        V3_LAYOUT,
        1,
        (
            "1 process was started, but layout.pp=16 x layout.dp=128 needs 2048: "
            "start 2048, or set layout.pp=1 and layout.dp=1 and layout.ep=1"
        ),
    ),
    "too many": (
        Layout(),
        6,
        "6 processes were started, but layout.pp=1 x layout.dp=1 needs 1: start 1, or set layout.dp=6",
    ),
}


@pytest.mark.parametrize(("fields", "sentence"), BY_ITSELF.values(), ids=BY_ITSELF.keys())
def test_a_layout_that_no_model_could_run_is_refused(fields: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=r"^layout\.") as refused:
        Layout(**fields)  # type: ignore[arg-type]
    assert str(refused.value) == sentence


@pytest.mark.parametrize(("layout", "changes", "sentence"), WITH_WORKLOAD.values(), ids=WITH_WORKLOAD.keys())
def test_a_layout_that_cannot_carry_the_workload_is_refused(
    layout: Layout, changes: dict[str, int], sentence: str
) -> None:
    with pytest.raises(ValueError, match=r"^(layout|schedule)\.") as refused:
        check_layout(layout, replace(SMALL, **changes))
    assert str(refused.value) == sentence


@pytest.mark.parametrize(("layout", "world", "sentence"), WORLDS.values(), ids=WORLDS.keys())
def test_a_wrong_number_of_processes_is_refused_with_a_layout_that_fits_it(
    layout: Layout, world: int, sentence: str
) -> None:
    with pytest.raises(ValueError, match="started") as refused:
        check_world(layout, world)
    assert str(refused.value) == sentence
    check_world(layout, layout.world)


@pytest.mark.parametrize("layout", [Layout(pp=3, dp=10, ep=5), V3_LAYOUT, Layout(pp=2, dp=6, ep=6)])
@pytest.mark.parametrize("world", [1, 2, 7, 8, 60, 1024])
def test_the_suggested_layout_has_as_many_ranks_as_were_started(layout: Layout, world: int) -> None:
    """The sentence is taken at its word."""
    with pytest.raises(ValueError, match="or set ") as refused:
        check_world(layout, world)
    changes = str(refused.value).partition("or set ")[2].split(" and ")
    values = {name.removeprefix("layout."): int(value) for name, value in (change.split("=") for change in changes)}
    check_world(replace(layout, **values), world)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("layout", "workload"),
    [
        (V3_LAYOUT, V3),
        (Layout(), SMALL),
        # One group is no limit on nodes: its experts may lie anywhere.
        (Layout(dp=12, ep=12, ranks_per_node=2), replace(SMALL, n_group=1)),
        # Four groups on two ranks: each lies on one.
        (Layout(dp=2, ep=2, ranks_per_node=1), SMALL),
        # Fewer micro-batches (3) than stages (8): legal where the schedule says so.
        (Layout(pp=3, dp=4, schedule="ZBVZeroBubble"), replace(SMALL, batch_multiple_sequences=8)),
        (Layout(pp=3, dp=4), replace(SMALL, batch_multiple_sequences=8)),
    ],
)
def test_a_possible_layout_passes(layout: Layout, workload: Workload) -> None:
    check_layout(layout, workload)


@pytest.mark.parametrize(("ep", "ranks_per_node", "legal"), [(64, 8, True), (128, 8, False), (128, 16, True)])
def test_a_routing_group_of_v3_is_one_node(ep: int, ranks_per_node: int, legal: bool) -> None:
    """§2.1.2: 8 groups of 32 experts. On 64 ranks a group has 8, on 128 it has 16."""
    layout = replace(V3_LAYOUT, ep=ep, ranks_per_node=ranks_per_node)
    if legal:
        check_layout(layout, V3)
    else:
        with pytest.raises(ValueError, match=r"expert group 0 .* ranks 0 to 15, .* use layout.ep=64$"):
            check_layout(layout, V3)


def test_an_expert_group_that_fits_a_node_may_not_straddle_two() -> None:
    one_group = replace(SMALL, n_group=1, n_routed_experts=12)
    check_layout(Layout(dp=12, ep=3, ranks_per_node=6), one_group)
    check_layout(Layout(dp=4, ep=4, ranks_per_node=6), one_group)
    with pytest.raises(ValueError, match=r"ep=4 does not divide layout.ranks_per_node=6.* use layout.ep=3 or 6$"):
        check_layout(Layout(dp=12, ep=4, ranks_per_node=6), one_group)


def expected_ranks(layout: Layout, axis: str, rank: int) -> list[int]:
    """By definition: the ranks that share every coordinate but those of the axis."""

    def coordinates(other: int) -> tuple[int, int, int]:
        pp_i, dp_i = divmod(other, layout.dp)
        return (pp_i, dp_i // layout.ep, dp_i % layout.ep)

    free = {"world": (0, 1, 2), "pp": (0,), "dp": (1, 2), "edp": (1,), "ep": (2,), "tied": (0,)}[axis]
    mine = coordinates(rank)
    ranks = [
        other
        for other in range(layout.world)
        if all(index in free or coordinates(other)[index] == mine[index] for index in range(3))
    ]
    if axis == "tied":
        # Embedding on the first pipeline rank; the last stage is on the last one, or on the first of a V.
        ends = {0} if layout.schedule == "ZBVZeroBubble" else {0, layout.pp - 1}
        ranks = [other for other in ranks if coordinates(other)[0] in ends] if mine[0] in ends else [rank]
    return ranks


@pytest.mark.parametrize(
    "layout",
    [Layout(), Layout(pp=3, dp=6, ep=2), Layout(pp=2, dp=4, ep=4), Layout(pp=2, dp=3, schedule="ZBVZeroBubble")],
)
def test_axes_are_the_ranks_that_differ_in_one_coordinate(layout: Layout) -> None:
    for axis in AXES:
        for rank in range(layout.world):
            assert list(axis_ranks(layout, axis, rank)) == expected_ranks(layout, axis, rank), (axis, rank)


def test_one_process_needs_no_group() -> None:
    mesh = single("cpu")
    assert (mesh.rank, mesh.device, mesh.layout) == (0, CPU, Layout())
    for name in AXES:
        assert getattr(mesh, name) == Axis(name, size=1, rank=0, group=None)
    assert not dist.is_initialized()
    assert cpu_group() is None
    shutdown()


def described(mesh: Mesh) -> dict[str, tuple[int, int, list[int]]]:
    """Axis -> (size, rank, global ranks of its group as torch knows them)."""
    found = {}
    for name in AXES:
        axis = getattr(mesh, name)
        members = [mesh.rank] if axis.group is None else dist.get_process_group_ranks(axis.group)
        assert axis.group is None or dist.get_rank(axis.group) == axis.rank
        found[name] = (axis.size, axis.rank, members)
    return found


@pytest.fixture
def no_group_left() -> Iterator[None]:
    """End a fake process group also when the test fails."""
    yield
    shutdown()


@pytest.mark.usefixtures("no_group_left")
@pytest.mark.parametrize("schedule", ["1F1B", "ZBVZeroBubble"])
@pytest.mark.parametrize("rank", [0, 1000, 2047])
def test_any_rank_of_2048_is_played_by_one_process(rank: int, schedule: str) -> None:
    layout = replace(V3_LAYOUT, schedule=schedule)
    init_processes(rank=rank, world=2048, backend="fake", store=None)
    mesh = make_mesh(layout, device=CPU, tied_embedding=True)
    assert mesh.rank == rank
    for name, (size, index, members) in described(mesh).items():
        expected = expected_ranks(layout, name, rank)
        assert (size, index, members) == (len(expected), expected.index(rank), expected), name
    # On a V embedding and head share rank 0; in a loop they lie on ranks 0 and 15 of the column.
    assert mesh.tied.size == (2 if schedule == "1F1B" and rank != 1000 else 1)
    assert cpu_group() is not None


@pytest.mark.usefixtures("no_group_left")
def test_without_a_tied_embedding_there_is_no_tied_axis_and_equal_axes_share_a_group() -> None:
    init_processes(rank=5, world=8, backend="fake", store=None)
    mesh = make_mesh(Layout(pp=2, dp=4, ep=4), device=CPU, tied_embedding=False)
    assert mesh.tied == Axis("tied", size=1, rank=0, group=None)
    assert mesh.dp.group is mesh.ep.group
    assert mesh.edp.group is None
    assert mesh.world.group is dist.group.WORLD


@pytest.mark.usefixtures("no_group_left")
def test_every_group_has_the_configured_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch gives a new group its own default, whatever the default group has: half an hour on gloo."""
    seconds = []
    original = dist.new_group

    def recorded(*args: object, timeout: object, **kwargs: object) -> object:
        seconds.append(timeout.total_seconds())  # type: ignore[attr-defined]
        return original(*args, timeout=timeout, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(dist, "new_group", recorded)
    init_processes(rank=0, world=8, backend="fake", store=None, timeout_s=77)
    make_mesh(Layout(pp=2, dp=4, ep=2), device=CPU, tied_embedding=True, timeout_s=77)
    cpu_group(timeout_s=77)
    # pp: 4 groups, dp: 2, edp: 4, ep: 4, tied: those of pp, cpu: 1.
    assert seconds == [77.0] * 15


def gathered(rank: int, world: int, layouts: list[Layout]) -> list[dict[str, object]]:
    """For each layout, on each axis: the ranks that really answer."""
    return [gathered_on(layout, rank) for layout in layouts]


def gathered_on(layout: Layout, rank: int) -> dict[str, object]:
    mesh = make_mesh(layout, device=CPU, tied_embedding=True, timeout_s=60)
    found: dict[str, object] = {}
    for name in AXES:
        axis = getattr(mesh, name)
        if axis.group is None:
            found[name] = [rank]
            continue
        answers = [torch.full((1,), -1, dtype=torch.int64) for _ in range(axis.size)]
        dist.all_gather(answers, torch.tensor([rank]), group=axis.group)
        found[name] = [int(answer) for answer in answers]
        assert found[name][axis.rank] == rank  # type: ignore[index]
    group = cpu_group(timeout_s=60)
    total = torch.tensor([rank])
    dist.all_reduce(total, group=group)
    return found | {"total": int(total), "tied_size": mesh.tied.size}


def test_on_gloo_each_axis_reaches_exactly_its_ranks() -> None:
    """4 ranks, pp2 x edp1 x ep2 and pp1 x edp2 x ep2; with pp 2 the tied axis is the pipeline's."""
    layouts = [Layout(pp=2, dp=2, ep=2), Layout(dp=4, ep=2)]
    for rank, by_layout in enumerate(run_ranks(4, gathered, layouts)):
        for layout, found in zip(layouts, by_layout, strict=True):
            assert found.pop("total") == 0 + 1 + 2 + 3
            assert found.pop("tied_size") == layout.pp
            assert found == {axis: expected_ranks(layout, axis, rank) for axis in AXES}


ORDERLY = """
import sys, torch, torch.distributed as dist
from parallel.layout import Layout
from parallel.mesh import cpu_group, init_processes, make_mesh, shutdown
rank, path = int(sys.argv[1]), sys.argv[2]
init_processes(rank=rank, world=2, backend="gloo", store=dist.FileStore(path, 2), timeout_s=60)
mesh = make_mesh(Layout(pp=2), device=torch.device("cpu"), tied_embedding=True, timeout_s=60)
group = cpu_group(timeout_s=60)
values = [torch.tensor([float(rank)]) for _ in range(3)]
for value, group in zip(values, (mesh.pp.group, group, None)):
    dist.all_reduce(value, group=group)
shutdown()
assert not dist.is_initialized()
print([float(value) for value in values])
"""


def test_an_orderly_end_exits_zero_on_every_rank(tmp_path: Path) -> None:
    """Real interpreters that end by themselves, with the mesh still alive: no thread of gloo aborts them."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", ORDERLY, str(rank), str(tmp_path / "store")],
            env=environment,
            cwd=Path(__file__).resolve().parent.parent.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [(process.returncode, out) for process, (out, _) in zip(ranks, outputs, strict=True)] == [
        (0, "[1.0, 1.0, 1.0]\n")
    ] * 2, outputs


def test_the_transport_follows_the_device() -> None:
    assert [NetworkConfig().backend_for(device) for device in ("cpu", "cuda")] == ["gloo", "nccl"]
    with pytest.raises(ValueError, match=r"gloo cannot exchange tensors of CUDA GPUs: use .*nccl or auto$"):
        NetworkConfig(backend="gloo").backend_for("cuda")
    with pytest.raises(ValueError, match=r"^network\.backend=nccl moves .* between CUDA GPUs, but the device is cpu"):
        NetworkConfig(backend="nccl").backend_for("cpu")


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"timeout_s": 0}, "network.timeout_s=0 is too small: use 2 or more"),
        ({"peer_timeout_s": 0}, "network.peer_timeout_s=0 is too small: use 1 or more"),
        ({"peer_timeout_s": 9, "timeout_s": 9}, "network.peer_timeout_s=9 is not below network.timeout_s=9, .*=4$"),
        ({"environment": {"nccl_net": "IB"}}, "network.environment.nccl_net is no variable of the network"),
    ],
)
def test_a_network_that_cannot_work_is_refused(fields: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}"):
        NetworkConfig(**fields)  # type: ignore[arg-type]


def test_layout_and_mesh_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        V3_LAYOUT.pp = 2  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        single("cpu").rank = 1  # type: ignore[misc]
