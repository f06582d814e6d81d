"""The facts about schedules are torch's own: placement, and the smallest number of micro-batches it accepts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining._utils import generate_rank_to_stage_mapping
from torch.distributed.pipelining.schedules import get_schedule_class

from parallel.layout import SCHEDULES, num_stages, rank_of_stage, schedule_facts, stage_ids
from tests.ranks import run_ranks

WIDTH = 3


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("pp", [2, 3, 4, 7, 16])
def test_stages_lie_where_torch_puts_them(name: str, pp: int) -> None:
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
            modules = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in ids]
            for module, stage in zip(modules, ids, strict=True):
                nn.init.constant_(module.weight, 0.5 + stage)
            stages = [
                PipelineStage(module, stage, num_stages(name, world), torch.device("cpu"))
                for module, stage in zip(modules, ids, strict=True)
            ]
            first = stages[0] if SCHEDULES[name].stages_per_rank == 1 else stages
            try:
                schedule = get_schedule_class(name)(first, count, loss_fn=sum_of, scale_grads=False)
            except ValueError as error:
                outcomes[name, count] = str(error)
                continue
            # Each micro-batch is one row: torch cuts the batch into `count` of them.
            batch = torch.ones(count, WIDTH)
            inputs = (batch,) if 0 in ids else ()
            target = batch if num_stages(name, world) - 1 in ids else None
            schedule.step(*inputs, target=target)
            for module in modules:
                module.zero_grad()
            # The first step runs an extra backward for shape inference; the second one counts.
            schedule.step(*inputs, target=target)
            outcomes[name, count] = {
                stage: float(module.weight.grad.sum())  # type: ignore[union-attr]
                for stage, module in zip(ids, modules, strict=True)
            }
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
        loss = 3.0
        for stage in range(stages):
            loss *= 3 * (0.5 + stage)
        for count in counts:
            outcomes = [outcome[name, count] for outcome in by_rank]
            if count < facts.min_micro_batches(2):
                assert all("microbatches" in outcome for outcome in outcomes), outcomes
                continue
            found = outcomes[0] | outcomes[1]
            assert found == {stage: count * loss / (0.5 + stage) for stage in range(stages)}
    assert [SCHEDULES[name].min_micro_batches(2) for name in ("1F1B", "ZBVZeroBubble")] == [2, 1]
