"""Impossible layouts are refused with the numbers and the cure; the facts about schedules are torch's own."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining._utils import generate_rank_to_stage_mapping
from torch.distributed.pipelining.schedules import get_schedule_class

from parallel.layout import Layout, Workload, check_layout, check_world
from parallel.schedules import SCHEDULES, schedule_facts
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
        "(1F1B, Interleaved1F1B, InterleavedZeroBubble, ZBVZeroBubble, DualPipeV)",
    ),
    (
        {"schedule": "1F1B", "stages_per_rank": 2},
        "layout.stages_per_rank=2 does not fit layout.schedule=1F1B: use 1, or null",
    ),
    (
        {"schedule": "DualPipeV", "stages_per_rank": 3},
        "layout.stages_per_rank=3 does not fit layout.schedule=DualPipeV: use 2, or null",
    ),
    (
        {"schedule": "Interleaved1F1B", "stages_per_rank": 0},
        "layout.stages_per_rank=0 does not fit layout.schedule=Interleaved1F1B: use 1 or more",
    ),
    pytest.param(
        {"pp": 2, "schedule": "Interleaved1F1B", "stage_layers": (1, 1, 1, 1, 1, 1)},
        "layout.stage_layers=[1, 1, 1, 1, 1, 1] names 6 stages, but layout.schedule=Interleaved1F1B on layout.pp=2 "
        "has 4: give 4 numbers, or null to balance them by cost, or set layout.stages_per_rank=3",
    ),
    pytest.param(
        {"pp": 2, "schedule": "ZBVZeroBubble", "stage_layers": (3, 3)},
        "layout.stage_layers=[3, 3] names 2 stages, but layout.schedule=ZBVZeroBubble on layout.pp=2 has 4: "
        "give 4 numbers, or null to balance them by cost",
    ),
    pytest.param(
        {"pp": 3, "stage_layers": (6, 0, 2)},
        "layout.stage_layers=[6, 0, 2] leaves a stage without anything: only the first, which has the embedding, and "
        "the last, which has head and MTP, may have 0 layers",
    ),
    pytest.param(
        {"pp": 2, "stage_layers": (7, -1)},
        "layout.stage_layers=[7, -1] leaves a stage without anything: only the first, which has the embedding, and the "
        "last, which has head and MTP, may have 0 layers",
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
    # One and a half nodes: no rank of the second has a fellow on each node.
    pytest.param(
        Layout(dp=12, ep=12, ranks_per_node=8, dispatch="node"),
        {"n_group": 1},
        "layout.dispatch=node passes tokens on inside whole nodes, but layout.ep=12 is no multiple of "
        "layout.ranks_per_node=8: use layout.ep=4, layout.ranks_per_node=6 or 12, or layout.dispatch=direct",
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
        "run.micro_batch_sequences=2, but layout.schedule=1F1B on layout.pp=4 takes 4 or more: "
        "use schedule.batch_start_sequences=32, layout.pp=3 or layout.dp=2",
    ),
    # 48 / (8 x 2) = 3 when the ramp ends, where 2 pp = 4 are needed: it would run another schedule for ever.
    pytest.param(
        Layout(pp=2, dp=8, schedule="DualPipeV"),
        {"batch_start_sequences": 16, "batch_multiple_sequences": 16},
        "schedule.batch_full_sequences=48 gives each of layout.dp=8 pipelines 3 micro-batches of "
        "run.micro_batch_sequences=2, but layout.schedule=DualPipeV on layout.pp=2 takes 4 or more: "
        "use schedule.batch_full_sequences=64, layout.pp=1, layout.dp=4 or layout.schedule=ZBVZeroBubble",
    ),
    # 12 to 24 micro-batches: 12 are 4 rounds of 3, 13 are 4 rounds and one more.
    pytest.param(
        Layout(pp=3, schedule="Interleaved1F1B"),
        {"batch_multiple_sequences": 2},
        "schedule.batch_multiple_sequences=2 makes a step of 26 sequences, which gives each of layout.dp=1 pipelines "
        "13 micro-batches of run.micro_batch_sequences=2, but layout.schedule=Interleaved1F1B on layout.pp=3 takes "
        "a multiple of 13 // 3 = 4: use schedule.batch_multiple_sequences=6, layout.pp=1 or "
        "layout.schedule=ZBVZeroBubble",
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


def test_what_a_refusal_of_micro_batches_advises_passes() -> None:
    """Each choice of each sentence, parsed and applied.

    Steps of the ramp follow the batches, as in most of configs/schedule, or are one sequence a data rank.
    """
    advised = Counter[str]()
    starts = [
        (start, full, math.gcd(start, full)) for start, full in itertools.product(range(2, 15, 3), range(8, 21, 3))
    ]
    starts += [(12, 24, 1), (12, 48, 1), (24, 24, 1)]
    for name, pp, dp, (start, full, multiple) in itertools.product(SCHEDULES, (2, 3, 4), (1, 2), starts):
        layout = Layout(pp=pp, dp=dp, schedule=name)
        workload = Workload(24, 12, 1, dp * start, dp * full, dp * multiple, 1)
        if start > full or (sentence := micro_batches_refused(layout, workload)) is None:
            continue
        for choice in re.split(r", (?=layout|schedule)| or (?=layout|schedule)", sentence.partition(": use ")[2]):
            keys, _, values = choice.rpartition("=")
            for value in values.split(" or "):
                fields = [key.split(".") for key in keys.split(" and ")]
                changed: dict[str, dict[str, Any]] = {"layout": {}, "schedule": {}}
                for group, field in fields:
                    changed[group][field] = int(value) if value.isdigit() else value
                other = replace(workload, **changed["schedule"])
                if multiple == math.gcd(start, full):
                    both = math.gcd(other.batch_start_sequences, other.batch_full_sequences)
                    other = replace(other, batch_multiple_sequences=both)
                check_layout(replace(layout, **changed["layout"]), other)
                advised[keys] += 1
    assert len(advised) == 7, advised
    assert min(advised.values()) > 3


def micro_batches_refused(layout: Layout, workload: Workload) -> str | None:
    """The sentence, if there is one."""
    try:
        check_layout(layout, workload)
    except ValueError as error:
        return str(error)
    return None


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
        # One hop to each rank needs no whole nodes, nor do two of which one is idle.
        (Layout(dp=12, ep=12, ranks_per_node=8), replace(SMALL, n_group=1)),
        (Layout(dp=12, ep=12, ranks_per_node=4, dispatch="node"), replace(SMALL, n_group=1)),
        (Layout(dp=4, ep=4, ranks_per_node=6, dispatch="node"), replace(SMALL, n_group=1)),
        (replace(V3_LAYOUT, dispatch="node"), V3),
        # Four groups on two ranks: each is on one.
        (Layout(dp=2, ep=2, ranks_per_node=1), SMALL),
        # Fewer micro-batches (3) than stages (8): legal where the schedule says so.
        (Layout(pp=3, dp=4, schedule="ZBVZeroBubble"), replace(SMALL, batch_multiple_sequences=8)),
        (Layout(pp=3, dp=4), replace(SMALL, batch_multiple_sequences=8)),
        # The ramp gives 24 micro-batches at first, for 32 stages: until then another schedule on the same V runs.
        (replace(V3_LAYOUT, schedule="DualPipeV"), V3),
        # Embedding alone, head and MTP alone: 8 stages of 6 layers.
        (Layout(pp=4, dp=1, schedule="ZBVZeroBubble", stage_layers=(0, 1, 1, 1, 1, 1, 1, 0)), SMALL),
        # Rounds of 3: 12, 15, ..., 24 micro-batches.
        (Layout(pp=3, schedule="InterleavedZeroBubble"), replace(SMALL, batch_multiple_sequences=6)),
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


@pytest.mark.parametrize(
    ("ep", "ranks_per_node", "two"), [(64, 8, True), (8, 8, False), (4, 8, False), (64, 1, False), (64, 64, False)]
)
def test_tokens_take_two_hops_where_neither_would_be_idle(ep: int, ranks_per_node: int, two: bool) -> None:
    layout = Layout(dp=64, ep=ep, ranks_per_node=ranks_per_node)
    assert not layout.two_hops
    assert replace(layout, dispatch="node").two_hops == two


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
    """Against torch's own table; every stage has one owner and `rank_of_stage` inverts `stages_of_rank`."""
    for chunks in (None, 1, 3) if SCHEDULES[name].chunks is None else (None,):
        layout = Layout(pp=pp, schedule=name, stages_per_rank=chunks)
        stages = layout.num_stages
        assert stages == pp * (chunks or SCHEDULES[name].chunks or 2)
        expected = generate_rank_to_stage_mapping(pp, stages, style=SCHEDULES[name].placement)
        owned = [layout.stages_of_rank(rank) for rank in range(pp)]
        assert owned == [tuple(sorted(expected[rank])) for rank in range(pp)]
        assert sorted(stage for ids in owned for stage in ids) == list(range(stages))
        assert all(layout.rank_of_stage(stage) == rank for rank in range(pp) for stage in owned[rank])


def test_placement_by_hand() -> None:
    """16 ranks of DeepSeek-V3: rank r owns r and 31 - r; embedding (0) and head (31) share rank 0."""
    v, loop = Layout(pp=16, schedule="DualPipeV"), Layout(pp=4, schedule="Interleaved1F1B", stages_per_rank=3)
    assert [v.stages_of_rank(rank) for rank in (0, 1, 15)] == [(0, 31), (1, 30), (15, 16)]
    assert [Layout(pp=4).stages_of_rank(rank) for rank in range(4)] == [(0,), (1,), (2,), (3,)]
    assert [loop.stages_of_rank(rank) for rank in (0, 3)] == [(0, 4, 8), (3, 7, 11)]


@pytest.mark.parametrize("name", SCHEDULES)
def test_one_rank_is_one_stage(name: str) -> None:
    layout = Layout(schedule=name)
    assert (layout.num_stages, layout.stages_of_rank(0), layout.rank_of_stage(0)) == (1, (0,), 0)
    assert SCHEDULES[name].fewest(1) == 1


def test_a_step_with_few_micro_batches_runs_on_the_same_stages_of_the_same_ranks() -> None:
    for name, facts in SCHEDULES.items():
        for pp, count in ((2, 1), (2, 3), (2, 4), (16, 24), (16, 32), (16, 120)):
            found = facts.of_step(pp, count)
            if facts.takes(pp, count):
                assert found is facts
            elif found is not None:
                assert found.takes(pp, count)
                layouts = [Layout(pp=pp, schedule=each) for each in (name, found.name)]
                assert len({tuple(map(layout.stages_of_rank, range(pp))) for layout in layouts}) == 1
    assert [SCHEDULES["DualPipeV"].of_step(16, count).name for count in (24, 31, 32)] == [  # type: ignore[union-attr]
        "ZBVZeroBubble", "ZBVZeroBubble", "DualPipeV",
    ]  # fmt: skip
    assert SCHEDULES["1F1B"].of_step(16, 15) is SCHEDULES["Interleaved1F1B"].of_step(16, 120) is None


def test_an_unknown_schedule_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match=r"^layout\.schedule=1f1b is not .* did you mean layout\.schedule=1F1B\?"):
        schedule_facts("1f1b")
    with pytest.raises(ValueError, match=r"ZeroBubble is not .* did you mean layout\.schedule=ZBVZeroBubble\?"):
        schedule_facts("ZeroBubble")


def accepted_counts(rank: int, world: int, names: list[str], counts: list[int]) -> dict[tuple[str, int], Any]:
    """For each schedule and number of micro-batches: the gradients' sum on this rank, or torch's refusal."""
    outcomes: dict[tuple[str, int], Any] = {}
    for name in names:
        layout = Layout(pp=world, schedule=name)
        ids, total = layout.stages_of_rank(rank), layout.num_stages
        for count in counts:
            modules = {stage: nn.Linear(WIDTH, WIDTH, bias=False) for stage in ids}
            for stage, module in modules.items():
                nn.init.constant_(module.weight, 0.5 + stage)
            stages = [PipelineStage(module, stage, total, torch.device("cpu")) for stage, module in modules.items()]
            first = stages[0] if SCHEDULES[name].chunks == 1 else stages
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


def test_torch_accepts_exactly_the_counts_that_a_schedule_takes() -> None:
    """Two gloo ranks. Where torch accepts, the gradients are those of all micro-batches.

    Truth by hand: stage s multiplies each of 3 equal inputs by 3 (0.5 + s), so a row reaches the loss as a product and
    the 9 entries of stage s's weight gradient sum to loss / (0.5 + s), times the number of rows. All exact in FP32.
    """
    counts = [1, 2, 3, 4, 5]
    by_rank = run_ranks(2, accepted_counts, list(SCHEDULES), counts)
    for name, facts in SCHEDULES.items():
        stages = Layout(pp=2, schedule=name).num_stages
        loss = 3.0 * math.prod(3 * (0.5 + stage) for stage in range(stages))
        for count in counts:
            outcomes = [outcome[name, count] for outcome in by_rank]
            if not facts.takes(2, count):
                assert all("microbatches" in outcome for outcome in outcomes), outcomes
                continue
            found = outcomes[0] | outcomes[1]
            assert found == {stage: count * loss / (0.5 + stage) for stage in range(stages)}
    taken = {name: [count for count in counts if facts.takes(2, count)] for name, facts in SCHEDULES.items()}
    assert taken == {
        "1F1B": [2, 3, 4, 5],
        "Interleaved1F1B": [1, 2, 3, 4],
        "InterleavedZeroBubble": [1, 2, 3, 4],
        "ZBVZeroBubble": [1, 2, 3, 4, 5],
        "DualPipeV": [4, 5],
    }
