"""The plan answers for the fullest rank: stand-ins hold what stages hold, and the rank is found by brute force too."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from launch import pretrain
from parallel.mesh import Mesh, init_processes, make_mesh
from tests.studies.plan.test_dry_run import small
from train.config import ConfigError, PretrainConfig, changed_world, compose
from train.studies.plan import dry_run as planner
from train.studies.plan.dry_run import dry_run, plan_pipeline_rank, size
from train.studies.plan.memory import Known, Memory, measure

V = {"layout_pp": 2, "layout_schedule": "ZBVZeroBubble", "model_num_hidden_layers": 4, "run_recompute": "true"}


def by_brute_force(config: PretrainConfig, rank: int, *, num_micro_batches: int) -> Memory:
    """A rank whose real stages run every micro-batch."""
    init_processes(rank=rank, world=config.layout.world, backend="fake", store=None)
    try:
        mesh = make_mesh(config.layout, device=torch.device("cpu"), tied_embedding=True)
        return measure(config, mesh, num_micro_batches=num_micro_batches)
    finally:
        dist.destroy_process_group()


def check_against_brute_force(config: PretrainConfig) -> Known:
    """Every rank of the world is measured, to 4 bytes: the first step of a process makes one constant more."""
    world, known = range(config.layout.world), Known()
    plans = [plan_pipeline_rank(config, pp_rank, known) for pp_rank in range(config.layout.pp)]
    real = [by_brute_force(config, rank, num_micro_batches=2 * config.layout.pp) for rank in world]
    for plan in plans:
        # Messages of other ranks do not exist in a world of one process.
        alone = replace(plan.memory, messages=0)
        assert vars(alone) == pytest.approx(vars(real[plan.rank]), rel=0, abs=4)
        shares = [real[rank].masters + real[rank].moments for rank in plan.ranks]
        assert plan.spread == max(shares) - min(shares)
        assert abs(alone.total - max(real[rank].total for rank in plan.ranks)) <= 4
    assert [rank for plan in plans for rank in plan.ranks] == list(world)
    assert len({plan.memory.total for plan in plans}) > 1, "ranks that are equal would prove nothing"
    return known


def test_the_fullest_rank_is_that_of_brute_force() -> None:
    check_against_brute_force(small(precision="fp8", **V))


def test_with_an_offloaded_state_it_is_the_data_rank_of_the_largest_buffers() -> None:
    config = small(layout_dp=4, optim_offload="cpu")
    plan = plan_pipeline_rank(config, 0, Known())
    real = [by_brute_force(config, rank, num_micro_batches=1) for rank in range(4)]
    buffers = [memory.staging for memory in real]
    assert plan.rank == buffers.index(max(buffers))
    assert plan.spread == max(buffers) - min(buffers) > 0
    assert plan.memory.staging == max(buffers)


@pytest.mark.long
@pytest.mark.parametrize(
    "changes",
    [
        {**V, "layout_dp": 4, "layout_ep": 2, "precision": "fp8"},
        {**V, "layout_pp": 3, "model_num_hidden_layers": 7, "layout_max_waiting_wgrads": 1, "precision": "fp8"},
        {"layout_pp": 3, "layout_dp": 2, "model_num_hidden_layers": 4, "precision": "bf16"},
        {"layout_pp": 2, "layout_dp": 3, "layout_zero": "false", "precision": "fp32"},
    ],
    ids=["experts", "waiting", "1f1b", "unsharded"],
)
def test_the_fullest_rank_of_larger_worlds_is_that_of_brute_force(changes: dict[str, Any]) -> None:
    check_against_brute_force(small(**changes))


@pytest.mark.long
def test_a_rank_like_another_is_not_built_again() -> None:
    """Of four ranks with a layer each the inner two differ in their place alone."""
    layers = {"model_num_hidden_layers": 4, "layout_stage_layers": "[1,1,1,1]"}
    known = check_against_brute_force(small(layout_pp=4, precision="fp8", **layers))
    assert len(known.ranks) == len(known.stages) == 3


def made_up(gigabytes: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each pipeline rank hold so much."""

    def found(_: PretrainConfig, mesh: Mesh, **__: object) -> Memory:
        return Memory(int(gigabytes[mesh.pp.rank] * 1e9), 2_500_000, 0, 0, 0, 0, 7_300, 20)

    monkeypatch.setattr(planner, "measure", found)
    monkeypatch.setattr(planner, "share_bytes", lambda config, _: [7, 9, 9, 5][: config.layout.dp])


def test_the_fullest_is_shown_without_a_rank_and_every_kind_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    made_up([20, 120.7], monkeypatch)
    config = small(layout_dp=4, **V)
    shown = dry_run(config)
    assert shown.startswith("the fullest of 8 ranks is rank 5 (")
    assert "\nrank 5 of 8: " in shown
    assert "does not fit: 40.7 GB too much" in shown
    assert re.search(r"^FP8 copies of weights +2\.50 MB$", shown, re.MULTILINE)
    assert re.search(r"^dispatch buffers +0\.02 kB$", shown, re.MULTILINE)
    assert "GFLOP\n" in shown
    assert "fits 80 GB, 60.0 GB left" in dry_run(replace(config, rank=0))
    lines = dry_run(replace(config, rank="all")).splitlines()
    words = [line.split() for line in lines]
    assert words[1] == [
        "0-3",
        "0",
        "20.00",
        "GB",
        "0.00",
        "GB",
        "0.01",
        "MB",
        "0.05",
        "MB",
        "20.00",
        "GB",
        "60.0",
        "GB",
        "left",
    ]
    assert words[2][:2] + words[2][-3:] == ["4-7", "1", "40.7", "GB", "over"]
    assert lines[3].startswith("4 of 8 ranks do not fit; the fullest is rank 5,")
    assert "the others hold up to 4.00 B less" in lines[4]


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0.00 GB"), (5.1e6, "0.01 GB"), (4.9e6, "4.90 MB"), (5100, "0.01 MB"), (4900, "4.90 kB"), (3, "3.00 B")],
)
def test_what_would_read_nothing_is_shown_in_a_smaller_unit(num_bytes: float, text: str) -> None:
    assert size(num_bytes) == text


def test_a_layout_that_changes_the_world_of_the_files_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made_up([1] * 8, monkeypatch)
    assert pretrain.main(["+cluster=h800_2048", "layout.pp=8", "dry_run=true", "rank=all"]) == 0
    said = "layout.pp=8 makes it 1,024 ranks (pp 8 x dp 128) where the named files have 2,048 (pp 16 x dp 128)"
    assert capsys.readouterr().out.startswith(f"{said}\n\nranks ")
    for same in (["layout.pp=8", "layout.dp=256", "schedule.batch_multiple_sequences=256"], ["layout.zero=false"], []):
        overrides = ["+cluster=h800_2048", *same]
        assert changed_world(overrides, compose(overrides)) is None


@pytest.mark.parametrize(("given", "rank"), {"rank=all": "all", "rank=3": 3, "rank=null": None}.items())
def test_rank_is_a_number_or_all(given: str, rank: object) -> None:
    assert compose([given]).rank == rank
    assert compose([]).rank is None
    with pytest.raises(ConfigError, match="rank=some must be a whole number or all"):
        compose(["rank=some"])
