"""The theorem under every pipeline schedule: one step and its update on pipelines of two and four ranks.

Cases of `tests/fuzz_cases.py`, each compared with one process as the fuzzer does: losses, every gradient, norm, expert
counts, the state after an update, within the bounds of docs/numerics.md, "Layouts". All have two MTP depths, uneven
stages, and a micro-batch without targets. On one data rank the losses are those of one process bit for bit.
"""

from __future__ import annotations

import pytest

from parallel.schedules import SCHEDULES
from tests.fuzz_cases import Case, why_illegal
from tests.fuzz_layouts import Pools, judge

# An end without layers has the embedding alone, or head and MTP alone.
QUICK = [
    "pp=2 schedule=Interleaved1F1B layers=5 stages=1,2,1,1 sequences=4 seed=11",
    "pp=2 schedule=InterleavedZeroBubble chunks=3 layers=6 stages=1,1,2,1,1,0 sequences=6 recompute=1 seed=12",
    "pp=2 schedule=DualPipeV layers=5 stages=2,1,1,1 sequences=7 seed=14",
    "pp=2 schedule=DualPipeV layers=4 stages=1,2,1,0 sequences=5 precision=fp8 bf16_weights=0 recompute=1 seed=15",
]
LONG = [
    "pp=2 schedule=ZBVZeroBubble layers=4 stages=0,2,1,1 sequences=4 seed=13",
    "pp=2 schedule=DualPipeV dp=2 ep=2 layers=5 stages=1,2,1,1 sequences=8 seed=16",
    "pp=2 schedule=DualPipeV dp=2 ep=2 layers=4 sequences=8 steps=2 precision=fp8 recompute=1 seed=17",
    "pp=2 schedule=DualPipeV dp=4 ep=2 layers=4 stages=1,1,2,0 sequences=16 seed=18",
    "pp=2 schedule=DualPipeV dp=4 ep=4 node=2 dispatch=node layers=4 stages=1,1,2,0 sequences=16 precision=fp8 seed=20",
    "pp=2 schedule=DualPipeV dp=2 zero=0 layers=4 sequences=8 wgrads=0 backend=native mask=1 seed=19",
    "pp=4 schedule=1F1B layers=5 stages=1,2,1,1 sequences=6 seed=21",
    "pp=4 schedule=Interleaved1F1B layers=9 stages=1,1,2,1,1,1,1,1 sequences=8 seed=22",
    "pp=4 schedule=InterleavedZeroBubble layers=8 stages=1,1,2,1,1,1,1,0 sequences=8 wgrads=1 seed=23",
    "pp=4 schedule=ZBVZeroBubble layers=9 stages=1,1,2,1,1,1,1,1 sequences=8 seed=24",
    "pp=4 schedule=DualPipeV layers=9 stages=1,1,2,1,1,1,1,1 sequences=10 seed=25",
    "pp=4 schedule=DualPipeV layers=7 stages=0,1,1,2,1,1,1,0 sequences=8 precision=fp8 recompute=1 seed=26",
]


def test_every_schedule_is_here_on_two_ranks_and_on_four() -> None:
    cases = [Case.parse(text) for text in QUICK + LONG]
    # 1F1B on two ranks is in test_layouts.py.
    assert {case.schedule for case in cases if case.pp == 2} == SCHEDULES.keys() - {"1F1B"}
    assert {case.schedule for case in cases if case.pp == 4} == SCHEDULES.keys()


@pytest.mark.parametrize("text", [*QUICK, *(pytest.param(text, marks=pytest.mark.long) for text in LONG)])
def test_a_step_and_its_update_are_those_of_one_process(text: str, ranks: Pools) -> None:
    case = Case.parse(f"{text} mtp=2")
    assert why_illegal(case) is None
    # A schedule that takes fewer would run another one.
    assert SCHEDULES[case.schedule].takes(case.pp, case.micro_batches)
    outcome = judge(case, ranks.answers(case))
    assert not outcome.faults, outcome.faults
