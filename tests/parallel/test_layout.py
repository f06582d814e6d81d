"""Impossible layouts are refused with the numbers and the cure; the facts about schedules are torch's own."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining._utils import generate_rank_to_stage_mapping
from torch.distributed.pipelining.schedules import get_schedule_class

from parallel.layout import (
    SCHEDULES,
    Layout,
    Workload,
    check_layout,
    check_world,
    num_stages,
    rank_of_stage,
    schedule_facts,
    stage_ids,
)
from tests.ranks import run_ranks

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
BY_ITSELF = [
    ({"pp": 0}, "layout.pp=0 is too small: use 1 or more"),
    ({"dp": -2}, "layout.dp=-2 is too small: use 1 or more"),
    ({"max_waiting_wgrads": -1}, "layout.max_waiting_wgrads=-1 is negative: use 0 or more, or null"),
    (
        {"max_expert_rows": 127},
        "layout.max_expert_rows=127 is less than a tile of 128 rows: use 128 or more, or null for no limit",
    ),
    ({"ranks_per_node": 0}, "layout.ranks_per_node=0 is too small: use 1 or more"),
    ({"dp": 8, "ep": 3}, "layout.ep=3 does not divide layout.dp=8: use layout.ep=2 or 4, or layout.dp=6 or 9"),
    ({"dp": 2, "ep": 4}, "layout.ep=4 does not divide layout.dp=2: use layout.ep=2, or layout.dp=4"),
    pytest.param(
        {"schedule": "ZBV"},
        "layout.schedule=ZBV is not a pipeline schedule: did you mean layout.schedule=ZBVZeroBubble? "
        "(1F1B, ZBVZeroBubble)",
    ),
    pytest.param(
        {"pp": 2, "schedule": "ZBVZeroBubble", "stage_layers": (3, 3)},
        "layout.stage_layers=[3, 3] names 2 stages, but layout.schedule=ZBVZeroBubble on layout.pp=2 has 4: "
        "give 4 numbers, or null to balance them by cost",
    ),
    (
        {"pp": 2, "stage_layers": (6, 0)},
        "layout.stage_layers=[6, 0] leaves a stage without layers: give each 1 or more",
    ),
]

# Layout, changes to SMALL -> the whole sentence.
WITH_WORKLOAD = [
    (
        Layout(dp=24, ep=8, ranks_per_node=24),
        {},
        "layout.ep=8 does not divide model.n_routed_experts=12: on layout.dp=24 use layout.ep=6 or 12",
    ),
    # On nodes of 8, ep 6 would put experts 3-5 of the expert-parallel group that starts at rank 6 on ranks 7 and 8.
    (Layout(dp=24, ep=8), {}, "layout.ep=8 does not divide model.n_routed_experts=12: on layout.dp=24 use layout.ep=4"),
    # ep 6 of 12 experts: group 1 is experts 3-5 on ranks 1-2, on either side of the border of a node of 2.
    pytest.param(
        Layout(dp=12, ep=6, ranks_per_node=2),
        {},
        "layout.ep=6 spreads expert group 1 of model.n_group=4 over ranks 1 to 2, which lie on two nodes of "
        "layout.ranks_per_node=2, so that node-limited routing would not limit nodes: use layout.ep=4",
    ),
    pytest.param(
        Layout(dp=12, ep=12, pp=2, ranks_per_node=16),
        {"n_group": 2},
        "layout.ep=12 spreads expert group 0 of model.n_group=2 over ranks 12 to 17, which lie on two nodes of "
        "layout.ranks_per_node=16, so that node-limited routing would not limit nodes: use layout.ep=4",
    ),
    pytest.param(
        Layout(pp=4, dp=1, schedule="ZBVZeroBubble"),
        {},
        "layout.pp=4 with layout.schedule=ZBVZeroBubble makes 8 stages of model.num_hidden_layers=6, less than one "
        "layer each: use layout.pp=3 or less",
    ),
    (
        Layout(pp=2, stage_layers=(2, 3)),
        {},
        "layout.stage_layers=[2, 3] sums to 5, but model.num_hidden_layers=6: add 1, or use null",
    ),
    (
        Layout(pp=2, stage_layers=(4, 4)),
        {},
        "layout.stage_layers=[4, 4] sums to 8, but model.num_hidden_layers=6: take away 2, or use null",
    ),
    pytest.param(
        Layout(dp=4, ep=2),
        {"batch_multiple_sequences": 12},
        "schedule.batch_multiple_sequences=12 is not a multiple of layout.dp=4 x run.micro_batch_sequences=2 = 8, "
        "so a step would not split into micro-batches: use schedule.batch_multiple_sequences=8 or 16, or "
        "layout.dp=2 or 6",
    ),
    pytest.param(
        Layout(dp=4),
        {"batch_start_sequences": 4, "batch_multiple_sequences": 8},
        "schedule.batch_start_sequences=4 is not a multiple of layout.dp=4 x run.micro_batch_sequences=2 = 8, so a "
        "step would not split into micro-batches: use schedule.batch_start_sequences=8, or layout.dp=2",
    ),
    pytest.param(
        Layout(dp=4),
        {"batch_full_sequences": 44, "batch_multiple_sequences": 8},
        "schedule.batch_full_sequences=44 is not a multiple of layout.dp=4 x run.micro_batch_sequences=2 = 8, so a "
        "step would not split into micro-batches: use schedule.batch_full_sequences=40 or 48, or layout.dp=2",
    ),
    # 24 / (4 x 2) = 3 micro-batches for 4 stages.
    pytest.param(
        Layout(pp=4, dp=4),
        {"batch_multiple_sequences": 8},
        "schedule.batch_start_sequences=24 gives each of layout.dp=4 pipelines 3 micro-batches of "
        "run.micro_batch_sequences=2, but layout.schedule=1F1B on layout.pp=4 needs 4: "
        "use schedule.batch_start_sequences=32, layout.pp=3, layout.dp=3 or layout.schedule=ZBVZeroBubble",
    ),
]

WORLDS = [
    (
        Layout(pp=2, dp=8),
        8,
        "8 processes were started, but layout.pp=2 x layout.dp=8 needs 16: start 16, or set layout.dp=4",
    ),
    pytest.param(
        Layout(pp=2, dp=8, ep=8),
        4,
        "4 processes were started, but layout.pp=2 x layout.dp=8 needs 16: "
        "start 16, or set layout.dp=2 and layout.ep=2",
    ),
    pytest.param(
        V3_LAYOUT,
        1,
        "1 process was started, but layout.pp=16 x layout.dp=128 needs 2048: "
        "start 2048, or set layout.pp=1 and layout.dp=1 and layout.ep=1",
    ),
    (Layout(), 6, "6 processes were started, but layout.pp=1 x layout.dp=1 needs 1: start 1, or set layout.dp=6"),
]


@pytest.mark.parametrize(("fields", "sentence"), BY_ITSELF)
def test_a_layout_that_no_model_could_run_is_refused(fields: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=r"^layout\.") as refused:
        Layout(**fields)  # type: ignore[arg-type]
    assert str(refused.value) == sentence


@pytest.mark.parametrize(("layout", "changes", "sentence"), WITH_WORKLOAD)
def test_a_layout_that_cannot_carry_the_workload_is_refused(
    layout: Layout, changes: dict[str, int], sentence: str
) -> None:
    with pytest.raises(ValueError, match=r"^(layout|schedule)\.") as refused:
        check_layout(layout, replace(SMALL, **changes))
    assert str(refused.value) == sentence


@pytest.mark.parametrize(("layout", "world", "sentence"), WORLDS)
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
    """The sentence is parsed, and what it suggests is accepted."""
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
        # One group is no limit on nodes: its experts may be anywhere.
        (Layout(dp=12, ep=12, ranks_per_node=2), replace(SMALL, n_group=1)),
        # Four groups on two ranks: each is on one.
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


WIDTH = 3


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("pp", [2, 3, 4, 7, 16])
def test_stages_are_where_torch_puts_them(name: str, pp: int) -> None:
    """Against torch's own table; every stage has one owner and `rank_of_stage` inverts `stage_ids`."""
    stages = num_stages(name, pp)
    expected = generate_rank_to_stage_mapping(pp, stages, style=SCHEDULES[name].placement)
    owned = [stage_ids(name, pp, rank) for rank in range(pp)]
    assert owned == [tuple(sorted(expected[rank])) for rank in range(pp)]
    assert sorted(stage for ids in owned for stage in ids) == list(range(stages))
    assert all(rank_of_stage(name, pp, stage) == rank for rank in range(pp) for stage in owned[rank])


def test_v_placement_by_hand() -> None:
    """16 ranks of DeepSeek-V3: rank r owns r and 31 - r; embedding (0) and head (31) share rank 0."""
    assert [stage_ids("ZBVZeroBubble", 16, rank) for rank in (0, 1, 15)] == [(0, 31), (1, 30), (15, 16)]
    assert [stage_ids("1F1B", 4, rank) for rank in range(4)] == [(0,), (1,), (2,), (3,)]


@pytest.mark.parametrize("name", SCHEDULES)
def test_one_rank_is_one_stage(name: str) -> None:
    assert (num_stages(name, 1), stage_ids(name, 1, 0), rank_of_stage(name, 1, 0)) == (1, (0,), 0)
    assert SCHEDULES[name].min_micro_batches(1) == 1


def test_an_unknown_schedule_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match=r"^layout\.schedule=1f1b is not .* did you mean layout\.schedule=1F1B\?"):
        schedule_facts("1f1b")
    with pytest.raises(ValueError, match=r"ZeroBubble is not .* did you mean layout\.schedule=ZBVZeroBubble\?"):
        schedule_facts("ZeroBubble")


def accepted_counts(rank: int, world: int, names: list[str], counts: list[int]) -> dict[tuple[str, int], Any]:
    """For each schedule and number of micro-batches: the gradients' sum on this rank, or torch's refusal."""
    outcomes: dict[tuple[str, int], Any] = {}
    for name in names:
        ids = stage_ids(name, world, rank)
        for count in counts:
            modules = {stage: nn.Linear(WIDTH, WIDTH, bias=False) for stage in ids}
            for stage, module in modules.items():
                nn.init.constant_(module.weight, 0.5 + stage)
            total = num_stages(name, world)
            stages = [PipelineStage(module, stage, total, torch.device("cpu")) for stage, module in modules.items()]
            first = stages[0] if SCHEDULES[name].stages_per_rank == 1 else stages
            try:
                schedule = get_schedule_class(name)(first, count, loss_fn=sum_of, scale_grads=False)
            except ValueError as error:
                outcomes[name, count] = str(error)
                continue
            # Each micro-batch is one row: torch cuts the batch into `count` of them.
            batch = torch.ones(count, WIDTH)
            inputs = (batch,) if 0 in ids else ()
            target = batch if total - 1 in ids else None
            schedule.step(*inputs, target=target)
            for module in modules.values():
                module.zero_grad()
            # The first step runs an extra backward for shape inference; the second one counts.
            schedule.step(*inputs, target=target)
            outcomes[name, count] = {stage: float(module.weight.grad.sum()) for stage, module in modules.items()}
    return outcomes


def sum_of(output: Tensor, target: Tensor) -> Tensor:
    return (output * target).sum()


def test_torch_accepts_exactly_the_counts_from_the_minimum_on() -> None:
    """Two gloo ranks. At and above the minimum the gradients are those of all micro-batches; below, torch refuses.

    Truth by hand: stage s multiplies each of 3 equal inputs by 3 (0.5 + s), so a row reaches the loss as a product and
    the 9 entries of stage s's weight gradient sum to loss / (0.5 + s), times the number of rows. All exact in FP32.
    """
    counts = [1, 2, 3]
    by_rank = run_ranks(2, accepted_counts, list(SCHEDULES), counts)
    for name, facts in SCHEDULES.items():
        stages = num_stages(name, 2)
        loss = 3.0 * math.prod(3 * (0.5 + stage) for stage in range(stages))
        for count in counts:
            outcomes = [outcome[name, count] for outcome in by_rank]
            if count < facts.min_micro_batches(2):
                assert all("microbatches" in outcome for outcome in outcomes), outcomes
                continue
            found = outcomes[0] | outcomes[1]
            assert found == {stage: count * loss / (0.5 + stage) for stage in range(stages)}
    assert [SCHEDULES[name].min_micro_batches(2) for name in ("1F1B", "ZBVZeroBubble")] == [2, 1]
