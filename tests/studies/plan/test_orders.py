"""The lists of `orders` against torch's own, read from its schedules when the tests run; legality against its refusals.

1F1B against the order in which `Schedule1F1B.step` works: the list that torch 2.13 keeps of it lacks a forward on the
last rank, and nothing executes that list.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.pipelining import schedules as torch_schedules

from parallel.layout import Layout
from parallel.schedules import SCHEDULES as RUNNABLE
from train.studies.plan.orders import (
    SCHEDULES,
    Action,
    Orders,
    fallback,
    num_stages,
    orders,
    rank_of_stage,
    refusal,
    stages_of_rank,
)

TORCH_KINDS = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}
SEVERAL_STAGES = ["Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"]


class StandIn:
    """A stage as far as torch's schedules look at it: it notes what it is asked to compute, and computes nothing."""

    has_backward = True
    device = torch.device("cpu")
    submod = torch.nn.Identity()

    def __init__(self, stage: int, stages: int, *, rank: int, ranks: int) -> None:
        self.stage_index, self.num_stages = stage, stages
        self.is_first, self.is_last = stage == 0, stage == stages - 1
        self.group_rank, self.group_size = rank, ranks
        self.ran: list[Action] = []

    def _nothing(self, *_: object) -> list[object]:
        return []

    clear_runtime_states = perform_reduce_grad = _nothing
    get_fwd_recv_ops = get_fwd_send_ops = get_bwd_recv_ops = get_bwd_send_ops = _nothing

    def forward_one_chunk(self, micro_batch: int, *_: object, **__: object) -> Tensor:
        self.ran.append(Action("F", self.stage_index, micro_batch))
        return torch.zeros(())

    def backward_one_chunk(self, micro_batch: int, **_: object) -> None:
        self.ran.append(Action("B", self.stage_index, micro_batch))


def torch_schedule(name: str, pp: int, chunks: int, micro_batches: int) -> Any:
    """torch's schedule object of rank 0; ValueError where it refuses."""
    stages = pp * chunks
    ids = (0, stages - 1) if SCHEDULES[name].placement == "v" and chunks == 2 else range(0, stages, pp)
    given: Any = [StandIn(stage, stages, rank=0, ranks=pp) for stage in ids]
    schedule = torch_schedules.get_schedule_class(name)
    return schedule(given if name != "1F1B" else given[0], micro_batches, loss_fn=lambda output, _: output)


def as_ours(action: Any) -> tuple[Action, ...]:
    parts = action.sub_actions or (action,)
    return tuple(Action(TORCH_KINDS[p.computation_type.name], p.stage_index, p.microbatch_index) for p in parts)


@pytest.fixture
def without_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what torch does after its lists are made, seconds at 16 x 120: sends and receives between actions."""
    runtime = torch_schedules._PipelineScheduleRuntime
    monkeypatch.setattr(runtime, "_prepare_schedule_with_comms", lambda self, actions: None)


@pytest.mark.parametrize("name", SEVERAL_STAGES)
@pytest.mark.usefixtures("without_messages")
def test_every_ranks_list_is_torchs(name: str) -> None:
    sizes = [(2, 4), (3, 7), (4, 8), (4, 12), (5, 20), (8, 16)]
    # 120 is what V3 has (arXiv:2412.19437 §4.2). The interleaved ones do not take it.
    sizes += [(16, 112 if SCHEDULES[name].whole_rounds else 120)]
    compared = 0
    for pp, micro_batches in sizes:
        for chunks in (1, 2, 3) if SCHEDULES[name].chunks is None else (2,):
            if refusal(name, pp, chunks, micro_batches) or (pp == 16 and chunks > 2):
                continue
            ours = orders(name, pp, chunks, micro_batches)
            theirs = torch_schedule(name, pp, chunks, micro_batches).pipeline_order
            for rank in range(pp):
                assert ours[rank] == tuple(as_ours(action) for action in theirs[rank] if action is not None), (pp, rank)
            compared += pp * (micro_batches >= 112)
    assert compared >= 16


@pytest.mark.parametrize(("pp", "micro_batches"), [(2, 2), (2, 5), (4, 4), (4, 12), (16, 120)])
def test_1f1b_is_what_torch_executes(pp: int, micro_batches: int) -> None:
    ours = orders("1F1B", pp, 1, micro_batches)
    rows = torch.zeros(micro_batches, 1)
    for rank in range(pp):
        stage: Any = StandIn(rank, pp, rank=rank, ranks=pp)
        schedule = torch_schedules.Schedule1F1B(stage, micro_batches, loss_fn=lambda output, _: output)
        schedule._initialize_stage = lambda *_, **__: None  # type: ignore[method-assign]
        schedule.step(rows, target=rows, return_outputs=False)
        assert [(action,) for action in stage.ran] == list(ours[rank])


@pytest.mark.usefixtures("without_messages")
def test_refused_is_what_torch_refuses() -> None:
    refused = Counter[str]()
    for name in RUNNABLE:
        for pp in (2, 3, 4, 7):
            for chunks in (1,) if name == "1F1B" else (1, 2, 3):
                for micro_batches in range(1, 31):
                    try:
                        torch_schedule(name, pp, chunks, micro_batches)
                        legal = True
                    except ValueError:
                        legal = False
                    assert (refusal(name, pp, chunks, micro_batches) is None) == legal, (
                        name,
                        pp,
                        chunks,
                        micro_batches,
                    )
                    refused[name] += not legal
    assert min(refused.values()) > 10


def all_legal(most_ranks: int = 5) -> list[tuple[str, int, int, int]]:
    """(name, pp, chunks, micro-batches) of every schedule at small sizes."""
    return [
        (name, pp, chunks, micro_batches)
        for name in SCHEDULES
        for pp in range(1, most_ranks + 1)
        for chunks in (1, 2, 3)
        for micro_batches in [*range(1, 2 * pp + 2), 3 * pp, 4 * pp + 2]
        if refusal(name, pp, chunks, micro_batches) is None
    ]


def test_every_action_is_there_once_and_on_its_stages_rank() -> None:
    for name, pp, chunks, micro_batches in all_legal():
        written = orders(name, pp, chunks, micro_batches)
        copies = SCHEDULES[name].copies if pp > 1 else 1
        stages, share = num_stages(name, pp, chunks), micro_batches // copies
        wanted = {
            (copy * stages + stage, copy * share + i)
            for copy in range(copies)
            for stage in range(stages)
            for i in range(share)
        }
        seen: dict[str, Counter[tuple[int, int]]] = {kind: Counter() for kind in "FBIW"}
        for rank, steps in enumerate(written):
            for action in (action for step in steps for action in step):
                assert rank_of_stage(name, pp, chunks, action.stage) == rank
                seen[action.kind][action.stage, action.micro_batch] += 1
        assert seen["F"] == seen["B"] + seen["I"] == Counter(wanted)
        assert seen["I"] == seen["W"]


def test_pairs_are_one_forward_and_one_whole_backward_where_the_rule_says_so() -> None:
    for name, pp, chunks, micro_batches in all_legal():
        pairs = [step for steps in orders(name, pp, chunks, micro_batches) for step in steps if len(step) > 1]
        assert all([action.kind for action in pair] == ["F", "B"] for pair in pairs)
        assert bool(pairs) == (SCHEDULES[name].pairs and pp > 1)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize(("pp", "micro_batches"), [(4, 8), (6, 14), (8, 22), (16, 120)])
def test_half_of_dual_pipe_is_dual_pipe_v(pp: int, micro_batches: int, mirrored: bool) -> None:
    """Either half of DualPipe's ranks does, in order, what DualPipeV's ranks do, whose lists are torch's."""
    half, whole = orders("DualPipeV", pp // 2, 2, micro_batches // 2), orders("DualPipe", pp, 2, micro_batches)

    def renamed(action: Action, rank: int) -> Action:
        # A V's way back is the other copy's way in; the upper half of the ranks begins with that copy.
        second_copy = (action.stage >= pp // 2) != mirrored
        stage = 2 * pp - 1 - rank if second_copy else rank
        return Action(action.kind, stage, action.micro_batch + second_copy * micro_batches // 2)

    for place in range(pp // 2):
        rank = pp - 1 - place if mirrored else place
        assert whole[rank] == tuple(tuple(renamed(action, rank) for action in step) for step in half[place])


@pytest.mark.parametrize("name", RUNNABLE)
def test_stages_and_ranks_are_those_of_the_layout(name: str) -> None:
    for pp in range(1, 9):
        layout = Layout(pp=pp, schedule=name)
        assert num_stages(name, pp, layout.chunks) == layout.num_stages
        for rank in range(pp):
            assert tuple(stages_of_rank(name, pp, layout.chunks, rank)) == layout.stages_of_rank(rank)


@pytest.mark.parametrize("name", SCHEDULES)
def test_one_rank_runs_forward_and_backward_by_turns(name: str) -> None:
    written: Orders = (((Action("F", 0, 0),), (Action("B", 0, 0),), (Action("F", 0, 1),), (Action("B", 0, 1),)),)
    assert orders(name, 1, 1, 2) == written


def test_the_batch_ramp_of_v3_runs_zbv_until_dual_pipe_v_has_enough() -> None:
    """h800_2048 starts with 24 micro-batches a pipeline; both schedules put the same stages on the same ranks."""
    assert [fallback("DualPipeV", 16, 2, m) for m in (1, 24, 31, 32, 120)] == [
        *["ZBVZeroBubble"] * 3,
        *["DualPipeV"] * 2,
    ]
    placed = [[stages_of_rank(name, 16, 2, rank) for rank in range(16)] for name in ("DualPipeV", "ZBVZeroBubble")]
    assert placed[0] == placed[1]
    assert fallback("1F1B", 16, 1, 15) is None
    assert fallback("Interleaved1F1B", 16, 2, 120) is None


REFUSALS = {
    ("DualPipeV", 16, 2, 24): """
        24 micro-batches do not fit layout.schedule=DualPipeV on layout.pp=16, which takes 32 or more:
        use 32 micro-batches, or layout.pp=12, or layout.schedule=ZBVZeroBubble""",
    ("Interleaved1F1B", 16, 2, 120): """
        120 micro-batches do not fit layout.schedule=Interleaved1F1B on layout.pp=16, which takes a multiple of
        120 // 16 = 7: use 119 or 126 micro-batches, or layout.pp=15 or 18""",
    ("DualPipe", 3, 2, 12): """
        layout.schedule=DualPipe mirrors ranks, but layout.pp=3 is odd: use layout.pp=2 or 4""",
    ("ZBVZeroBubble", 4, 3, 12): """
        chunks=3 stages on each rank do not fit layout.schedule=ZBVZeroBubble on layout.pp=4: use chunks=2""",
    ("DualPipeW", 4, 2, 12): """
        layout.schedule=DualPipeW is not a pipeline schedule: did you mean DualPipe?
        (1F1B, Interleaved1F1B, InterleavedZeroBubble, ZBVZeroBubble, DualPipeV, ZB-H1, DualPipe)""",
}


@pytest.mark.parametrize("asked", REFUSALS, ids=lambda asked: asked[0])
def test_a_refusal_is_one_sentence(asked: tuple[str, int, int, int]) -> None:
    sentence = " ".join(REFUSALS[asked].split())
    assert refusal(*asked) == sentence
    with pytest.raises(ValueError, match=re.escape(sentence)):
        orders(*asked)


def test_what_a_refusal_advises_is_legal_and_nothing_nearer_is() -> None:
    advised = 0
    for name, rule in SCHEDULES.items():
        for pp in range(2, 18):
            for micro_batches in range(40):
                chunks = rule.chunks or 2
                sentence = refusal(name, pp, chunks, micro_batches)
                if sentence is None or "odd" in sentence:
                    continue
                advice = sentence.partition(": use ")[2].split(", or ")
                counts = [int(number) for number in re.findall(r"\d+", advice[0])]
                assert counts
                for count in counts:
                    assert refusal(name, pp, chunks, count) is None
                between = range(max([0, *(c for c in counts if c < micro_batches)]) + 1, max(counts))
                assert all(refusal(name, pp, chunks, count) for count in between), "a nearer one is legal"
                for number in re.findall(r"\d+", advice[1]) if len(advice) > 1 and "pp" in advice[1] else []:
                    assert refusal(name, int(number), chunks, micro_batches) is None
                if "schedule=" in advice[-1]:
                    assert refusal(advice[-1].partition("=")[2], pp, chunks, micro_batches) is None
                advised += 1
    assert advised > 1000
