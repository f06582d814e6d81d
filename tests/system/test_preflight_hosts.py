"""A preflight on hosts with networks of their own: network namespaces behind one bridge, commands as they are typed.

A card is slowed down by `tc` on both ends of its cable, and a cable is cut; nothing in the program is replaced.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PORT, TIMEOUT_S, CUT_TIMEOUT_S = 29521, 40, 8
# 40 Mbit/s are 0.005 GB/s; what is not slowed down has some hundred times that.
SLOW = "tbf rate 40mbit burst 32kb latency 400ms"
LEAST_GB_PER_S = 0.02
pytestmark = pytest.mark.long
StartHosts = Callable[[int], "Hosts"]


def run(*words: str) -> None:
    subprocess.run([each for word in words for each in word.split()], check=True)


class Hosts:
    """Namespaces `a`, `b`, ... and one that is their switch; a cable runs from each host's veth0 to its port there."""

    def __init__(self, count: int, folder: Path) -> None:
        self.folder, self.prefix = folder, f"v3fp8-pf-{os.getpid()}"
        self.names = [f"{self.prefix}-{node}" for node in range(count)]
        self.switch = f"{self.prefix}-switch"
        self.commands: list[subprocess.Popen[str]] = []
        for name in (*self.names, self.switch):
            run("ip netns add", name)
            run("ip -n", name, "link set lo up")
        run("ip -n", self.switch, "link add bridge0 type bridge")
        run("ip -n", self.switch, "link set bridge0 up")
        for node, name in enumerate(self.names):
            run("ip link add veth0 netns", name, f"type veth peer name port{node} netns", self.switch)
            run("ip -n", self.switch, f"link set port{node} master bridge0 up")
            run("ip -n", name, f"addr add {self.address(node)}/24 dev veth0")
            run("ip -n", name, "link set veth0 up")

    @staticmethod
    def address(node: int) -> str:
        return f"10.78.0.{node + 1}"

    def slow_down(self, node: int) -> None:
        """What a host sends, and what the switch sends to it."""
        run("tc -n", self.names[node], "qdisc add dev veth0 root", SLOW)
        run("tc -n", self.switch, f"qdisc add dev port{node} root", SLOW)

    def cut(self, node: int) -> None:
        run("ip -n", self.names[node], "link set veth0 down")

    def preflight(self, *options: str) -> list[tuple[int, str, str]]:
        """(exit code, output, errors) of each host's command."""
        announced = ",".join(f"gpu{node:02}" for node in range(len(self.names)))
        for node, name in enumerate(self.names):
            command = ["ip", "netns", "exec", name, sys.executable, str(ROOT / "launch/preflight.py")]
            command += ["--nnodes", str(len(self.names)), "--node-rank", str(node), "--nodes", announced]
            command += ["--endpoint", f"{self.address(0)}:{PORT}", "--device", "cpu", "--share", "0"]
            command += ["--out", str(self.folder / "run"), *options]
            environment = os.environ | {"GLOO_SOCKET_IFNAME": "veth0", "OMP_NUM_THREADS": "1"}
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
            self.commands.append(subprocess.Popen(command, text=True, env=environment, cwd=self.folder, **pipes))
        said = [each.communicate(timeout=240) for each in self.commands]
        return [(each.returncode, *texts) for each, texts in zip(self.commands, said, strict=True)]

    def end(self) -> None:
        for each in self.commands:
            each.kill()
            each.wait()
        for name in (*self.names, self.switch):
            run("ip netns del", name)


@pytest.fixture
def start_hosts(as_root: None, tmp_path: Path) -> Iterator[StartHosts]:
    started: list[Hosts] = []

    def start(count: int) -> Hosts:
        started.append(Hosts(count, tmp_path))
        return started[-1]

    yield start
    for each in started:
        each.end()


def test_a_host_with_a_slow_card_is_named_and_no_other(start_hosts: StartHosts) -> None:
    hosts = start_hosts(3)
    hosts.slow_down(1)
    least = [f"--expect={kind}_gb_per_s={LEAST_GB_PER_S}" for kind in ("rail", "all_to_all")]
    ended = hosts.preflight("--all-to-all-ranks", "3", "--timeout-s", str(TIMEOUT_S), *least)
    assert [code for code, _, _ in ended] == [1, 1, 1], ended
    said = ended[0][1]
    assert said.splitlines()[-1] == "preflight: 1 of 3 nodes must not be used: gpu01 (node 1)", said
    faults = [line.strip() for line in said.splitlines() if line.startswith("    ")]
    assert [fault.partition(":")[0] for fault in faults] == ["rail", "all_to_all"]
    # A ring of three has two links that touch it, an exchange four.
    for fault, more in zip(faults, (1, 3), strict=True):
        assert fault.endswith(f"0.02 expected, and {more} more slow links")


def test_a_host_behind_a_cut_cable_is_named_and_says_whom_it_lost(start_hosts: StartHosts) -> None:
    hosts = start_hosts(2)
    hosts.cut(1)
    (first, said, _), (second, _, errors) = hosts.preflight("--timeout-s", str(CUT_TIMEOUT_S))
    assert (first, second) == (1, 1)
    assert f"rank 1 did not come ({CUT_TIMEOUT_S} s)" in said
    assert said.splitlines()[-1] == "preflight: 1 of 2 nodes must not be used: gpu01 (node 1)"
    assert errors.startswith(f"preflight: rank 1 has lost rank 0 at {hosts.address(0)}:{PORT}: "), errors
