"""What a rank finds at home: nvidia-smi's line, a product whose bits are known, a disk; and who exchanges with whom."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from train.studies.preflight import machine
from train.studies.preflight.links import rounds

CPU = torch.device("cpu")
HEALTHY = "580.95.05, 0, No, No, Not Active, Not Active, Not Active\n"


def test_a_healthy_gpu_has_no_fault_and_a_sick_one_says_which() -> None:
    assert machine.faults_of(HEALTHY) == ([], "580.95.05")
    sick = "580.95.05, 2, No, Yes, Not Active, Active, Not Active\n"
    assert machine.faults_of(sick)[0] == [
        "uncorrected ECC errors (2)",
        "a remapped row of memory waits for a reset (Yes)",
        "slowed down by heat (driver) (Active)",
    ]
    # A field that this device does not have is no fault.
    assert machine.faults_of(HEALTHY.replace(" 0,", " [N/A],")) == ([], "580.95.05")


def test_each_field_of_health_is_looked_at() -> None:
    for at in range(1, 1 + len(machine.HEALTH)):
        values = HEALTHY.strip().split(", ")
        values[at] = "Active"
        assert machine.faults_of(", ".join(values))[0] == [f"{list(machine.HEALTH.values())[at - 1]} (Active)"]


def test_a_cpu_has_no_gpu_to_look_at() -> None:
    assert machine.gpu_health(CPU) == ([], "")


@pytest.mark.parametrize("order", [1, -1])
def test_the_product_is_known_to_the_bit_in_any_order_of_its_sums(order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Summed forwards and backwards in FP32, in chunks of 16: every partial sum is a whole number below 2^24."""

    def by_chunks(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        total = torch.zeros(left.shape[0], right.shape[1])
        for k in list(range(0, left.shape[1], 16))[::order]:
            total += left[:, k : k + 16].float() @ right[k : k + 16].float()
        return total.bfloat16()

    monkeypatch.setattr(machine, "product", by_chunks)
    assert machine.examine_product(CPU)["wrong"] == 0


def test_one_wrong_bit_of_a_product_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = machine.product

    def flipped(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        found = real(left, right)
        found.view(torch.int16)[0, 0] ^= 1
        return found

    monkeypatch.setattr(machine, "product", flipped)
    assert machine.examine_product(CPU)["wrong"] == 1


def test_the_largest_product_stays_exact() -> None:
    """On a GPU the factors have 8,192 terms of at most 4 x 4 a sum: below 2^24, the whole numbers of FP32."""
    assert 8192 * 4 * 4 < 2**24


def test_a_disk_gives_back_what_was_written_and_keeps_nothing(tmp_path: Path) -> None:
    found = machine.examine_disk(tmp_path / "new", "rank-0")
    assert found["free_gb"] > 0
    assert list((tmp_path / "new").iterdir()) == []


def test_the_digest_of_the_code_is_stable_and_sees_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for room in ("configs", "launch"):
        (tmp_path / room).mkdir()
    (tmp_path / "launch" / "a.py").write_text("x = 1\n")
    values = tmp_path / "configs" / "a.yaml"
    values.write_text("x: 1\n")
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    first = machine.code_digest()
    assert machine.code_digest() == first
    values.write_text("x: 2\n")
    assert machine.code_digest() != first


@pytest.mark.parametrize(("world", "per_node", "group"), [(2, 1, 2), (16, 8, 16), (24, 8, 16), (6, 2, 4), (8, 8, 8)])
def test_in_every_round_whoever_receives_is_sent_to_and_every_pair_of_a_group_meets(
    world: int, per_node: int, group: int
) -> None:
    plans = [rounds(rank, world, per_node=per_node, group=group) for rank in range(world)]
    assert len({len(plan) for plan in plans}) == 1, "ranks that count other rounds wait for ever"
    met = set()
    for index in range(len(plans[0])):
        each = [plan[index] for plan in plans]
        assert len({one.kind for one in each}) == 1
        sent = {(rank, one.to) for rank, one in enumerate(each) if one.to is not None}
        received = {(one.source, rank) for rank, one in enumerate(each) if one.source is not None}
        assert sent == received
        met |= {(each[0].kind, *pair) for pair in sent}
    pairs = {(a, b) for a in range(world) for b in range(world) if a != b and a // group == b // group}
    assert {(a, b) for kind, a, b in met if kind == "all_to_all"} == pairs
    # Every card of a node, both ways.
    rails = {(a, b) for kind, a, b in met if kind == "rail"}
    nodes = world // per_node
    assert rails == {(r, (r + per_node) % world) for r in range(world) if nodes > 1}
