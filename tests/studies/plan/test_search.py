"""What the search answers is a layout that the trainer takes; more memory or a larger scope never slows it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Literal

import pytest

from train.config import PretrainConfig, compose
from train.studies.plan.candidate import candidate_of
from train.studies.plan.costs import StageCosts, layer_parts, p2p_s
from train.studies.plan.document import OURS, Assumptions, Planner
from train.studies.plan.footprint import footprint
from train.studies.plan.moments import moments_of
from train.studies.plan.products import Setup, machine
from train.studies.plan.search import ALL, TODAY, Found, flips, search
from train.studies.plan.update import update_s
from train.studies.plan.words import overrides

CLUSTER = ["+cluster=h100_8"]
LIMIT = 80e9


@functools.cache
def planner() -> Planner:
    config = compose(CLUSTER)
    return Planner(config, Assumptions(machine("H100"), LIMIT, 2.0, config.model))


@functools.cache
def found(scope: str = "today", *, limit: float = LIMIT) -> Sequence[Found]:
    it = planner()
    return search(
        it.config, {"today": TODAY, "all": ALL}[scope], implementation=it.ours, machine=it.assumed.machine,
        memory_of=it.fullest_bytes, limit_bytes=limit,
    )  # fmt: skip


def composed(one: Found) -> PretrainConfig:
    return compose([*CLUSTER, *overrides(asdict(one.candidate)).split()])


def test_every_layout_of_today_is_what_its_overrides_compose() -> None:
    """One of each pp, ep, precision and way to keep things: the trainer accepts it, and it is the same candidate."""
    kinds = {
        (each.candidate.pp, each.candidate.ep, each.candidate.precision, each.candidate.keep_bf16_weights): each
        for each in found()
        if each.fits
    }
    assert len(kinds) > 8
    for each in kinds.values():
        assert candidate_of(composed(each)) == each.candidate


@pytest.mark.long
@pytest.mark.parametrize("cluster", ["h100_256", "h800_2048"])
def test_the_best_layouts_of_large_clusters_compose(cluster: str) -> None:
    config = compose([f"+cluster={cluster}"])
    assumed = Assumptions(machine("H800"), LIMIT, 2.0, config.model)
    best = Planner(config, assumed).search(TODAY)[:20]
    for each in best:
        text = overrides(asdict(each.candidate)).split()
        assert candidate_of(compose([f"+cluster={cluster}", *text])) == each.candidate


def test_more_memory_never_gives_a_slower_winner() -> None:
    best = [found(limit=limit)[0] for limit in (60e9, LIMIT, 160e9)]
    assert all(each.fits for each in best)
    steps = [each.step.step_s for each in best]
    assert steps == sorted(steps, reverse=True)


def test_a_larger_scope_never_gives_a_slower_winner() -> None:
    assert found("all")[0].step.step_s <= found()[0].step.step_s


def test_where_nothing_fits_all_are_timed_and_nothing_flips() -> None:
    nothing = found(limit=1e9)
    assert nothing
    assert not any(each.fits for each in nothing)
    it = planner()
    assert flips(it.config, nothing, implementation=it.ours, machine=it.assumed.machine) == {}


def test_routing_is_no_more_uneven_than_so_many_ranks_allow() -> None:
    """Without the axis every rank has all experts, with two ranks one gets twice the mean at most."""
    it = planner()
    times = {}
    for ep in (1, 2, 8):
        one = replace(it.candidate, ep=ep)
        for imbalance in (1.0, 2.0, 4.0):
            setup = it.setup(one, replace(it.ours, imbalance=imbalance))
            times[ep, imbalance] = layer_parts(setup, moe=True, beside_exchange=False)["experts forward"].products
    assert times[1, 1.0] == times[1, 2.0] == times[1, 4.0]
    assert times[2, 1.0] < times[2, 2.0] == times[2, 4.0]
    assert times[8, 2.0] < times[8, 4.0]


def test_attention_is_of_the_kernel_that_the_run_takes() -> None:
    """Deterministic: flash; else cuDNN: 2.81 and 9.60 for 1.25 and 4.56 ms, measured."""
    it = planner()
    assert it.config.run.deterministic
    faster = replace(it.config, run=replace(it.config.run, deterministic=False))
    other = Planner(faster, it.assumed)
    ways = ("attend forward", "attend backward")
    slow, fast = (
        [layer_parts(each.setup(each.candidate), moe=True, beside_exchange=False)[way].attention for way in ways]
        for each in (it, other)
    )
    assert [a / b for a, b in zip(slow, fast, strict=True)] == pytest.approx([2.81 / 1.25, 9.60 / 4.56])


def test_stages_inside_a_node_send_over_nvlink() -> None:
    it = planner()
    inside = it.setup(replace(it.candidate, pp=2, dp=4, ep=4, chunks=1, stage_layers=(13, 14)))
    across = replace(inside, candidate=replace(inside.candidate, dp=8, ep=8))
    the = it.assumed.machine
    assert p2p_s(across) / p2p_s(inside) == pytest.approx(the.nvlink / the.infiniband)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("ep", [1, 8, 64])
def test_without_zero_a_rank_holds_and_sends_more(precision: Literal["bf16", "fp8"], ep: int) -> None:
    """So that the search need not ask for it."""
    config = compose(["+cluster=h800_2048", "precision=fp8"])
    one = replace(candidate_of(config), ep=ep, precision=precision)
    sharded, whole = (replace(one, zero=zero) for zero in (True, False))
    held = moments_of(one, 32, at_first=32)
    least, most = (max(each.total for each in footprint(config, candidate, held)) for candidate in (sharded, whole))
    assert least < most
    setups = [Setup(config.model, each, OURS, machine("H800"), 4096) for each in (sharded, whole)]
    shorter, longer = (sum(update_s(each, StageCosts(each).held((3, 28))).values()) for each in setups)
    assert shorter < longer
