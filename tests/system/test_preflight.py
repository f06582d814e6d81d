"""A preflight as ranks run it: real processes, a real store and gloo, each with the fault that is planted in it.

A node is a process of its own with one rank, forked where torch is loaded; two network namespaces as hosts, with
commands as an engineer types them, are in `tests/system/test_preflight_hosts.py`.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from launch import preflight
from tests.ranks import PRELOAD
from train.studies.preflight import links, machine, rank
from train.studies.preflight.arguments import parse

ROOT = Path(__file__).resolve().parents[2]
# Of each phase; a rank that is there needs a tenth of it.
TIMEOUT_S = 20
HANG_TIMEOUT_S = 6
AHEAD_S = 3600
Plant = Callable[[], None]


def other_torch() -> None:
    torch.__version__ = "2.12.1"


def wrong_product() -> None:
    real = machine.product

    def product(left: Tensor, right: Tensor) -> Tensor:
        found = real(left, right)
        # One bit of one value.
        found.view(torch.int16)[3, 5] ^= 1
        return found

    machine.product = product


def fast_clock() -> None:
    real = links.wall_s
    links.wall_s = lambda: real() + AHEAD_S


def hang_in_product() -> None:
    machine.product = lambda *_: time.sleep(600)


def die_in_links() -> None:
    links.examine_sum = lambda *_: os._exit(9)


def wait_less() -> None:
    rank.SLACK_S = 2


def be_node(node: int, arguments: list[str], plant: Plant | None, said: Path, world: int) -> None:
    """One node with one rank, in a process of its own; its output goes into a file."""
    for stream in (1, 2):
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    options = parse([*arguments, "--nnodes", str(world), "--node-rank", str(node)], "")
    host, _, port = options.endpoint.rpartition(":")
    os.environ |= {"RANK": str(node), "WORLD_SIZE": str(world), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    if plant is not None:
        plant()
    code = preflight.be_rank(options)
    sys.stdout.flush()
    os._exit(code)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Ended:
    """What the nodes of a preflight left: exit codes by node (None: never started), and what rank 0 printed."""

    codes: list[int | None]
    said: str

    def faults(self) -> dict[int, list[str]]:
        """Node -> what the table has below its row."""
        found: dict[int, list[str]] = {}
        for line in self.said.splitlines():
            if "(node " in line and not line.startswith("preflight:"):
                node = int(line.partition("(node ")[2].partition(")")[0])
                found[node] = []
            elif line.startswith("    "):
                found[node].append(line.strip())
        return found


def nodes(
    folder: Path, plants: Mapping[int, Plant], *, world: int, absent: int | None = None, timeout_s: float = TIMEOUT_S,
    out: Mapping[int, Path] | None = None,
) -> Ended:  # fmt: skip
    """Run a preflight of so many nodes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    # What is planted in speeds is planted with `tc`; two cores that others use are no measure.
    arguments = ["--device", "cpu", "--share", "0", "--timeout-s", str(timeout_s)]
    arguments += ["--endpoint", f"localhost:{free_port()}", "--all-to-all-ranks", str(world)]
    arguments += ["--nodes", ",".join(f"gpu{node:02}" for node in range(world))]
    processes = {}
    for node in range(world):
        own = [*arguments, "--out", str((out or {}).get(node, folder / "run"))]
        process = context.Process(target=be_node, args=(node, own, plants.get(node), folder / f"{node}.txt", world))
        if node != absent:
            process.start()
            processes[node] = process
    for process in processes.values():
        process.join(3 * timeout_s)
    outlived = [node for node, process in processes.items() if process.exitcode is None]
    for node in outlived:
        processes[node].kill()
    assert not outlived, "a rank outlived the preflight"
    codes = [processes[node].exitcode if node in processes else None for node in range(world)]
    return Ended(codes, (folder / "0.txt").read_text())


@pytest.fixture
def full_disk(as_root: None, tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "full"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], check=True)
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_healthy_nodes_pass(tmp_path: Path) -> None:
    ended = nodes(tmp_path, {}, world=2)
    assert ended.codes == [0, 0], ended.said
    assert ended.faults() == {}
    assert ended.said.splitlines()[-1] == "preflight: nothing is wrong with 2 nodes"
    assert list((tmp_path / "run").iterdir()) == [], "what was written is gone"


def test_each_sick_node_is_named_with_what_is_wrong(full_disk: Path, tmp_path: Path) -> None:
    plants = {1: other_torch, 2: wrong_product, 4: fast_clock}
    ended = nodes(tmp_path, plants, world=6, out={3: full_disk})
    assert ended.codes == [1] * 6, ended.said
    faults = ended.faults()
    assert set(faults) == {1, 2, 3, 4}, ended.said
    assert faults[1] == [f"torch 2.12.1, the others have {torch.__version__}"]
    assert faults[2] == ["1 of 65,536 values of a product are wrong on rank 2"]
    assert faults[3][0] == "disk on rank 3: [Errno 28] No space left on device"
    assert faults[3][1:] == ["does not see rank 0's file: the run's folder is not shared"]
    (clock,) = faults[4]
    # To 10 s: six processes on two cores leave a meeting one after the other.
    ahead_s = float(clock.removeprefix("its clock is ").removesuffix(" s ahead").replace(",", ""))
    assert abs(ahead_s - AHEAD_S) < 10
    assert ended.said.splitlines()[-1].startswith("preflight: 4 of 6 nodes must not be used: gpu01 (node 1), gpu02 ")


@pytest.mark.long
def test_who_does_not_come_or_hangs_is_named_instead_of_waited_for(tmp_path: Path) -> None:
    ended = nodes(tmp_path, {1: hang_in_product}, world=3, absent=2, timeout_s=HANG_TIMEOUT_S)
    assert (ended.codes[0], ended.codes[2]) == (1, None)
    assert ended.faults() == {
        1: [f"rank 1 did not answer, in: product ({HANG_TIMEOUT_S} s)"],
        2: [f"rank 2 did not come ({HANG_TIMEOUT_S} s)"],
    }
    assert "links were not measured: not every rank could take part" in ended.said
    assert ended.said.splitlines()[-1].endswith("gpu01 (node 1), gpu02 (node 2)")


@pytest.mark.long
def test_a_rank_that_dies_among_the_others_is_named(tmp_path: Path) -> None:
    ended = nodes(tmp_path, {0: wait_less, 1: die_in_links}, world=2, timeout_s=HANG_TIMEOUT_S)
    assert ended.codes == [1, 9]
    assert "rank 1 did not answer, in: links" in ended.faults()[1][0], ended.said


@pytest.mark.long
def test_under_torchrun_it_is_one_of_its_processes(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "launch/preflight.py"), "--device", "cpu", "--share", "0", "--out", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "preflight: nothing is wrong with 1 nodes"
