"""Reports of many ranks are judged as those of few: planted figures of 256 and of 2,048 ranks, without a process."""

from __future__ import annotations

from typing import Any

import pytest

from train.job import ExpectConfig
from train.studies.preflight.arguments import expected
from train.studies.preflight.judge import Bench, Fault, failed, group_faults, local_faults, silent
from train.studies.preflight.links import rounds
from train.studies.preflight.table import conclusion, table

WORLD, PER_NODE, GROUP = 256, 8, 64
BENCH = Bench(PER_NODE, ExpectConfig(rail_gb_per_s=25.0))
SPEED = {"node": 200.0, "rail": 45.0, "all_to_all": 40.0}


def local(rank: int) -> dict[str, Any]:
    """What a healthy rank reports of itself."""
    found: dict[str, Any] = {
        "host": f"host{rank // PER_NODE}",
        "errors": {},
        "gpu": [],
        "versions": {"torch": "2.13.0", "driver": "580.1"},
        "product": {"wrong": 0, "values": 100, "tflops": 650.0 + rank % 7},
    }
    return found | ({"disk": {"free_gb": 900.0, "gb_per_s": 2.0}} if rank % PER_NODE == 0 else {})


def together(rank: int, world: int = WORLD, slow: set[int] = frozenset()) -> dict[str, Any]:  # type: ignore[assignment]
    """What a healthy rank reports of its links; those from and to a slow node have a tenth of their speed."""
    plan = rounds(rank, world, per_node=PER_NODE, group=GROUP)
    links = [
        (each.kind, each.source, rank, SPEED[each.kind] * (0.1 if crosses(each.source, rank, slow) else 1.0))
        for each in plan
        if each.source is not None
    ]
    return {"links": links, "sum": {"wrong": 0, "gb_per_s": 35.0}, "clock": [10.0, 11.0, 12.0], "shared": True}


def crosses(source: int, to: int, slow: set[int]) -> bool:
    """Whether a message leaves its node and has an end on a slow one."""
    ends = {source // PER_NODE, to // PER_NODE}
    return len(ends) == 2 and bool(ends & slow)


def test_2048_healthy_ranks_have_no_fault() -> None:
    reports = [local(rank) for rank in range(2048)]
    groups = [together(rank, 2048) for rank in range(2048)]
    assert local_faults(reports, BENCH) == group_faults(groups, BENCH) == failed(reports, BENCH) == []
    assert conclusion(reports, [], BENCH) == "preflight: nothing is wrong with 256 nodes"
    _, row = table(reports, groups, [], BENCH)
    assert row.split()[:2] == ["all", "256"]
    assert "650" in row


def test_a_slow_card_is_told_apart_from_its_neighbours() -> None:
    """Every link of node 17 is slow, so each of its neighbours has slow links too: only 17 explains all."""
    groups = [together(rank, slow={17, 30}) for rank in range(WORLD)]
    faults = group_faults(groups, BENCH)
    assert {fault.node for fault in faults} == {17, 30}
    rail, spread = (fault.what for fault in faults if fault.node == 17)
    # 8 cards, each with the node before it and the one behind.
    assert rail == "rail: 4.5 GB/s from rank 128 to 136, 25 expected, and 15 more slow links"
    assert spread.startswith("all_to_all: 4 GB/s from rank ")
    # 8 ranks and 56 others of their 64, both ways.
    assert spread.endswith(" 20 expected, and 895 more slow links")


def test_of_two_nodes_with_one_slow_link_both_are_named() -> None:
    groups = [together(rank, world=16, slow={1}) for rank in range(16)]
    assert {fault.node for fault in group_faults(groups, BENCH)} == {0, 1}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"versions": {"torch": "2.13.0", "driver": "570.9"}}, "driver 570.9, the others have 580.1"),
        ({"versions": {"torch": "2.13.0"}}, "driver none, the others have 580.1"),
        ({"gpu": ["slowed down by heat (driver) (Active)"]}, "GPU of rank 100: slowed down by heat (driver) (Active)"),
        (
            {"product": {"wrong": 3, "values": 100, "tflops": 650.0}},
            "3 of 100 values of a product are wrong on rank 100",
        ),
        ({"product": {"wrong": 0, "values": 100, "tflops": 300.0}}, "rank 100 multiplies at 300 TFLOP/s, 326 expected"),
        ({"disk": {"free_gb": 10.0, "gb_per_s": 2.0}}, "10 GB free on its disk, 500 needed"),
        ({"disk": {"free_gb": 900.0, "gb_per_s": 0.4}}, "its disk takes 0.4 GB/s, 1 expected"),
    ],
)
def test_what_a_rank_finds_at_home_is_its_nodes_fault(change: dict[str, Any], sentence: str) -> None:
    reports = [local(rank) for rank in range(WORLD)]
    reports[100] |= change
    found = local_faults(reports, Bench(PER_NODE, ExpectConfig(free_gb=500.0)))
    assert found == [Fault(100 // PER_NODE, sentence)]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"shared": False}, "does not see rank 0's file: the run's folder is not shared"),
        ({"clock": [7.5, 8.5, 9.4]}, "its clock is 2.5 s behind"),
        ({"sum": {"wrong": 8, "gb_per_s": 35.0}}, "8 values of a sum over all ranks are wrong on rank 103"),
    ],
)
def test_what_ranks_find_together_is_one_nodes_fault(change: dict[str, Any], sentence: str) -> None:
    groups = [together(rank) for rank in range(WORLD)]
    # The last rank of its node, whose clock is the node's.
    groups[103] |= change
    assert group_faults(groups, BENCH) == [Fault(12, sentence)]


def test_a_slow_network_without_a_slow_link_is_nobodys_fault() -> None:
    groups = [together(rank) for rank in range(WORLD)]
    bench = Bench(PER_NODE, ExpectConfig(all_reduce_gb_per_s=100.0))
    (fault,) = group_faults(groups, bench)
    assert fault == Fault(None, "a sum over all ranks runs at 35 GB/s, 100 expected, and no link is slow")
    assert table([local(rank) for rank in range(WORLD)], groups, [fault], bench)[-1].startswith(
        "all nodes together: a sum"
    )
    assert conclusion(groups, [fault], bench) == "preflight: something is wrong with all 32 nodes"


def test_where_no_majority_agrees_all_are_named() -> None:
    reports = [local(rank) for rank in range(16)]
    for rank in range(8, 16):
        reports[rank]["versions"] = {"torch": "2.12.0", "driver": "580.1"}
    assert {fault.node for fault in local_faults(reports, BENCH)} == {0, 1}
    groups = [together(rank, world=16) for rank in range(16)]
    for rank in range(8, 16):
        groups[rank]["clock"] = [110.0, 111.0, 112.0]
    assert [fault.what for fault in group_faults(groups, BENCH)] == ["its clock differs from another's by 100.0 s"] * 2


def test_the_silent_and_the_failed_are_named_with_their_announced_names() -> None:
    reports: list[dict[str, Any] | None] = [local(rank) for rank in range(24)]
    reports[9] = None
    reports[16:24] = [None] * 8
    reports[2]["errors"] = {"product": "CUDA error"}  # type: ignore[index]
    faults = silent(reports, lambda rank: "disk" if rank == 9 else None, BENCH, timeout_s=60)
    assert faults[:2] == [Fault(1, "rank 9 did not answer, in: disk (60 s)"), Fault(2, "rank 16 did not come (60 s)")]
    assert failed(reports, BENCH) == [Fault(0, "product on rank 2: CUDA error")]
    said = conclusion(reports, faults, BENCH, names=("a", "b", "c"))
    assert said == "preflight: 2 of 3 nodes must not be used: b (node 1), c (node 2)"
    assert "unknown host (node 2)" in conclusion(reports, faults, BENCH)


def test_an_expectation_is_a_name_and_a_number() -> None:
    assert expected(["gemm_tflops=500", "clock_s=0.1"]) == ExpectConfig(gemm_tflops=500.0, clock_s=0.1)
    for word, sentence in (("gem=5", "gem is none of gemm_tflops,"), ("free_gb=x", "x"), ("free_gb=-1", "is negative")):
        with pytest.raises(ValueError, match=sentence):
            expected([word])
