"""Two hosts and the network between them: two network namespaces joined by a pair of virtual cards.

Cut for less than `network.peer_timeout_s` and healed, a run goes on as if nothing had been; cut for good, both sides
end by themselves, and each says whom it lost. Deadlines are TIMEOUT_S, far below the 600 s of a collective.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from parallel.watchdog import DEATH_EXIT_CODE
from tests.ranks import run_ranks
from tests.system.lives import Plan, live, losses, wait_for_step
from tests.system.test_torchrun import TWO_RANKS, Launch
from train.config import compose

ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT, PEER_TIMEOUT_S, CUT_S = 29511, 10, 4
pytestmark = pytest.mark.long
Overrides = Callable[..., list[str]]


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


class Hosts:
    """Two namespaces; `begin` starts a node of the run in each, `link` cuts and heals."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = [f"v3fp8-{os.getpid()}-{side}" for side in "ab"]
        self.nodes: list[Launch] = []
        for name in self.names:
            ip("netns", "add", name)
        ip(
            "link",
            "add",
            "veth0",
            "netns",
            self.names[0],
            "type",
            "veth",
            "peer",
            "name",
            "veth0",
            "netns",
            self.names[1],
        )
        for name, address in zip(self.names, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "veth0")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "veth0", "up")

    def begin(self, overrides: list[str]) -> None:
        options = f"--nnodes 2 --nproc-per-node 1 --master-addr {ADDRESSES[0]} --master-port {PORT} --node-rank".split()
        for rank, name in enumerate(self.names):
            place = ("ip", "netns", "exec", name)
            settings = {"GLOO_SOCKET_IFNAME": "veth0"}
            self.nodes.append(Launch(self.folder, (*options, str(rank)), overrides, settings, through=place))

    def link(self, state: str) -> None:
        ip("-n", self.names[1], "link", "set", "veth0", state)

    def end(self) -> None:
        for node in self.nodes:
            node.end()
        for name in self.names:
            ip("netns", "del", name)


@pytest.fixture
def hosts(as_root: None, tmp_path: Path) -> Iterator[Hosts]:
    both = Hosts(tmp_path / "said")
    yield both
    both.end()


def test_a_cut_that_heals_changes_no_bit(hosts: Hosts, small_run: Overrides, tmp_path: Path) -> None:
    overrides = partial(small_run, *TWO_RANKS, f"run.directory={tmp_path}", f"network.peer_timeout_s={PEER_TIMEOUT_S}")
    hosts.begin(overrides())
    wait_for_step(hosts.nodes[0].torchrun, tmp_path / "run", lambda step: step >= 2, output=hosts.nodes[0].said)
    hosts.link("down")
    time.sleep(CUT_S)
    hosts.link("up")
    assert [node.wait() for node in hosts.nodes] == [0, 0], [node.said() for node in hosts.nodes]
    run_ranks(2, live, [Plan(compose(overrides("run.name=unbroken")), "after")])
    assert losses(tmp_path / "run") == losses(tmp_path / "unbroken")


def test_a_cut_for_good_ends_both_sides_and_each_says_whom_it_lost(
    hosts: Hosts, small_run: Overrides, tmp_path: Path
) -> None:
    settings = (
        f"run.directory={tmp_path}",
        f"network.peer_timeout_s={PEER_TIMEOUT_S}",
        "schedule.total_tokens=1000000",
    )
    hosts.begin(small_run(*TWO_RANKS, *settings))
    wait_for_step(hosts.nodes[0].torchrun, tmp_path / "run", lambda step: step >= 2, output=hosts.nodes[0].said)
    hosts.link("down")
    for rank, node in enumerate(hosts.nodes):
        assert node.wait() == 1
        assert node.reported() == {rank: DEATH_EXIT_CODE}
        assert node.alive() == {}
    ((first,), (second,)) = (node.sentences() for node in hosts.nodes)
    assert first.startswith("rank 0 ends because rank 1 (pipeline rank 0, data rank 1, host ")
    assert first.endswith(f"is dead: no heartbeat for {PEER_TIMEOUT_S} s")
    assert second.startswith(f"rank 1 ends because the run is dead: the store at {ADDRESSES[0]}:{PORT} is gone ")
    assert second.endswith("its host, the first node's launcher, has ended (read its log) or cannot be reached")
