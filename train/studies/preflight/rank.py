"""One rank of a preflight, from its first check to the verdict of all.

    local phase    versions, GPU, product, disk            each rank alone
    group phase    links, a sum, clocks, a shared folder   all together, if all are there and fit to talk
    verdict        rank 0 prints the table; every rank ends with its exit code

A rank that hangs is waited for `timeout_s` in each phase and then named; nothing waits for it any longer.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.distributed.distributed_c10d import Store

from parallel.mesh import init_processes
from train.studies.preflight import judge, links, machine
from train.studies.preflight.meeting import Meeting
from train.studies.preflight.table import conclusion, table

# What the slowest rank may come later than rank 0 out of a phase that both were in.
SLACK_S = 10


@dataclass(frozen=True)
class Place:
    """A rank among all, and how it is examined.

    Args:
        out: the run's folder.
        group: ranks that share experts.
        names: of the nodes in order of rank, if they were announced.
    """

    rank: int
    world: int
    local_rank: int
    device_type: str
    out: Path
    group: int
    names: tuple[str, ...]
    timeout_s: float
    bench: judge.Bench

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return torch.device("cuda", self.local_rank) if self.device_type == "cuda" else torch.device("cpu")


def examine(place: Place, store: Store) -> int:
    """Examine this rank and its links, and wait for the verdict; on rank 0 print it.

    Returns:
        The exit code: 0, or 1 where something is wrong.
    Raises:
        TimeoutError: rank 0 is silent.
    """
    meeting = Meeting(store, rank=place.rank, world=place.world)
    report = _bounded(lambda: _local(place, meeting), place)
    if report is not None:
        meeting.say("local", report)
    if place.rank == 0:
        return _lead(place, meeting, store)
    if meeting.decision("go", timeout_s=2 * place.timeout_s + SLACK_S) == "together":
        _together(place, meeting, store)
    return int(meeting.decision("verdict", timeout_s=2 * place.timeout_s + SLACK_S))


def _lead(place: Place, meeting: Meeting, store: Store) -> int:
    """Rank 0's side: hear all, decide, print."""
    bench, timeout_s = place.bench, place.timeout_s
    local = meeting.hear("local", timeout_s=timeout_s)
    faults = judge.silent(local, meeting.last_word, bench, timeout_s=timeout_s)
    mute = bool(faults) or any("GPU" in report["errors"] for report in local if report)
    faults += [*judge.failed(local, bench), *judge.local_faults(local, bench)]
    group: judge.Reports = [None] * place.world
    if not mute:
        meeting.decide("go", "together")
        _together(place, meeting, store)
        group = meeting.hear("group", timeout_s=SLACK_S)
        faults += judge.silent(group, meeting.last_word, bench, timeout_s=timeout_s)
        faults += [*judge.failed(group, bench), *judge.group_faults(group, bench)]
    else:
        meeting.decide("go", "alone")
    print("\n".join(table(local, group, faults, bench, names=place.names)))
    if mute:
        print("links were not measured: not every rank could take part")
    if place.device_type == "cpu":
        print("--device cpu: no GPU was looked at")
    print(conclusion(local, faults, bench, place.names), flush=True)
    meeting.decide("verdict", str(int(bool(faults))))
    readers = sum(report is not None for report in (local if mute else group)) - 1
    meeting.wait_for_readers("verdict", readers, timeout_s=SLACK_S)
    return int(bool(faults))


def _local(place: Place, meeting: Meeting) -> dict[str, Any]:
    """Checks of this rank alone; one that fails is an entry in `errors`."""
    report: dict[str, Any] = {"host": socket.gethostname(), "errors": {}, "gpu": []}

    def check(name: str, work: Callable[[], None]) -> None:
        meeting.begin(name)
        try:
            work()
        # Whatever a sick machine raises is what is asked for.
        except Exception as error:  # noqa: BLE001
            report["errors"][name] = " ".join((str(error) or type(error).__name__).split())

    def gpu() -> None:
        if place.device_type == "cuda":
            if torch.cuda.device_count() <= place.local_rank:
                raise RuntimeError(
                    f"{torch.cuda.device_count()} CUDA GPUs seen, and rank {place.rank} needs number {place.local_rank}"
                )
            torch.cuda.set_device(place.device)
        report["gpu"], driver = machine.gpu_health(place.device)
        report["versions"] = machine.versions(place.device, driver)

    def product() -> None:
        report["product"] = machine.examine_product(place.device)

    def disk() -> None:
        report["disk"] = machine.examine_disk(place.out, f"rank-{place.rank}")

    check("GPU", gpu)
    if "GPU" not in report["errors"]:
        check("product", product)
    if place.local_rank == 0:
        check("disk", disk)
    return report


def _together(place: Place, meeting: Meeting, store: Store) -> None:
    """Checks that need the others; what does not end in time is reported with the round that was under way."""
    at: dict[str, str] = {"round": "the first meeting"}
    token = place.out / ".preflight-shared"

    def work() -> dict[str, Any]:
        if place.device_type == "cuda":
            # A thread begins on the first device.
            torch.cuda.set_device(place.device)
        backend: Literal["nccl", "gloo"] = "nccl" if place.device_type == "cuda" else "gloo"
        # Ours ends first: what the group raises names nobody.
        timeout_s = int(4 * place.timeout_s)
        init_processes(rank=place.rank, world=place.world, backend=backend, store=store, timeout_s=timeout_s)
        if place.rank == 0:
            token.touch()
        clock = links.examine_clock(place.device)
        shared = token.exists()
        plan = links.rounds(place.rank, place.world, per_node=place.bench.per_node, group=place.group)
        found = links.examine_links(plan, place.device, at)
        at["round"] = "a sum over all ranks"
        return {"links": found, "sum": links.examine_sum(place.device), "clock": clock, "shared": shared}

    meeting.begin("links")
    try:
        report = _bounded(work, place)
        report = report or {"errors": {"links": f"no end within {place.timeout_s:.0f} s: {at['round']}"}}
    except Exception as error:  # noqa: BLE001
        report = {"errors": {"links": f"{at['round']}: {' '.join(str(error).split())}"}}
    if place.rank == 0:
        token.unlink(missing_ok=True)
    meeting.say("group", report)


def _bounded(work: Callable[[], dict[str, Any]], place: Place) -> dict[str, Any] | None:
    """The result, or None after the time; a thread that hangs ends with the process."""
    result: dict[str, Any] = {}

    def run() -> None:
        try:
            result["value"] = work()
        except Exception as error:  # noqa: BLE001
            result["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(place.timeout_s)
    if "error" in result:
        raise result["error"]
    return result.get("value")
