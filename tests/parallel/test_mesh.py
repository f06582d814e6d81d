"""A layout becomes the groups of its arithmetic, with the network's settings."""

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

from parallel.layout import Layout
from parallel.mesh import AXES, Axis, Mesh, axis_ranks, cpu_group, init_processes, make_mesh, shutdown, single
from parallel.network import NetworkConfig
from tests.ranks import run_ranks

CPU = torch.device("cpu")
V3_LAYOUT = Layout(pp=16, dp=128, ep=64, schedule="ZBVZeroBubble")


def expected_ranks(layout: Layout, axis: str, rank: int) -> list[int]:
    """By definition: the ranks that share every coordinate but those of the axis."""

    def coordinates(other: int) -> tuple[int, int, int]:
        pp_i, dp_i = divmod(other, layout.dp)
        return (pp_i, dp_i // layout.ep, dp_i % layout.ep)

    if axis in ("rail", "node"):
        # Of the ranks of ep: those on one node, or with one index on theirs; alone where tokens take one hop.
        size = layout.ranks_per_node
        if layout.dispatch == "direct" or size == 1 or layout.ep <= size:
            return [rank]
        ranks = expected_ranks(layout, "ep", rank)
        same = (lambda other: other // size) if axis == "node" else (lambda other: other % size)
        return [other for other in ranks if same(other) == same(rank)]
    free = {"world": (0, 1, 2), "pp": (0,), "dp": (1, 2), "edp": (1,), "ep": (2,), "tied": (0,)}[axis]
    mine = coordinates(rank)
    ranks = [
        other
        for other in range(layout.world)
        if all(index in free or coordinates(other)[index] == mine[index] for index in range(3))
    ]
    if axis == "tied":
        # Embedding on the first pipeline rank; the last stage is on the last one, or on the first of a V.
        ends = {0} if layout.schedule in ("ZBVZeroBubble", "DualPipeV") else {0, layout.pp - 1}
        ranks = [other for other in ranks if coordinates(other)[0] in ends] if mine[0] in ends else [rank]
    return ranks


@pytest.mark.parametrize(
    "layout",
    [
        Layout(),
        Layout(pp=3, dp=6, ep=2),
        Layout(pp=2, dp=4, ep=4),
        Layout(pp=2, dp=3, schedule="ZBVZeroBubble"),
        Layout(pp=2, dp=12, ep=6, ranks_per_node=3, dispatch="node"),
        Layout(dp=8, ep=8, ranks_per_node=2, dispatch="node"),
        Layout(dp=8, ep=4, ranks_per_node=4, dispatch="node"),
        Layout(dp=4, ep=4, ranks_per_node=1, dispatch="node"),
        Layout(pp=3, dp=2, schedule="Interleaved1F1B", stages_per_rank=3),
    ],
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
@pytest.mark.parametrize(
    ("layout", "sizes"),
    [
        (Layout(dp=8, ep=8, ranks_per_node=2), ()),
        (Layout(dp=8, ep=8, ranks_per_node=2, dispatch="node"), (4, 4, 2, 2, 2, 2)),
        # One hop would be idle: a group of experts on one node, or nodes of one rank.
        (Layout(dp=8, ep=8, dispatch="node"), ()),
        (Layout(dp=8, ep=8, ranks_per_node=1, dispatch="node"), ()),
    ],
)
def test_only_two_hops_make_groups_for_them(
    layout: Layout, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    original = dist.new_group

    def recorded(ranks: list[int], **named: object) -> object:
        made.append(len(ranks))
        return original(ranks, **named)

    monkeypatch.setattr(dist, "new_group", recorded)
    init_processes(rank=5, world=8, backend="fake", store=None)
    mesh = make_mesh(layout, device=CPU, tied_embedding=False)
    # dp and ep are the world.
    assert made == list(sizes)
    assert mesh.hops == ((mesh.rail, mesh.node) if sizes else (mesh.ep,))


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
    """4 ranks, pp2 x edp1 x ep2, pp1 x edp2 x ep2 and ep4 on two nodes; with pp 2 the tied axis is the pipeline's."""
    layouts = [Layout(pp=2, dp=2, ep=2), Layout(dp=4, ep=2), Layout(dp=4, ep=4, ranks_per_node=2, dispatch="node")]
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
