"""A few of the layouts of `make fuzz`, and of the mistakes that it must find (`tests/fuzz_layouts.py`)."""

from __future__ import annotations

import pytest

from tests.fuzz_cases import Case
from tests.fuzz_layouts import Pools, Record, caught, fuzz, judge, legal_cases

# One of each kind: losses, sums over an axis, experts, FP8 wire, pipeline, update.
SOME_DEFECTS = (
    "the balance loss is lost",
    "expert gradients are summed over dp",
    "the gates' gradients are not sent back",
    "behind a stage border MTP reads the token one place too early",
    "new weights are gathered one element late",
    "tokens of two hops are grouped as if they had come in order",
)
# Two hops are rare among draws: they want four expert ranks or more.
TWO_HOPS = (
    "dp=4 ep=4 node=2 dispatch=node layers=2 sequences=8 tokens=21 mtp=2 seed=7",
    "dp=4 ep=4 node=2 dispatch=node layers=2 groups=1 shared=2 mask=1 precision=bf16 recompute=1 moments=fp32 seed=8",
    "dp=4 ep=4 node=2 dispatch=node layers=2 dense=0 experts=12 steps=2 precision=fp8 bf16_weights=0 seed=9",
)


def test_a_case_is_rebuilt_from_its_text() -> None:
    for case in legal_cases(50, 5, Record()):
        assert Case.parse(str(case)) == case


def test_an_illegal_layout_is_refused_in_one_sentence_and_a_legal_one_is_not() -> None:
    record = Record()
    legal_cases(300, 6, record)
    assert not record.failures
    # Of the reasons of `ILLEGAL` this seed draws these many.
    assert len(record.refused) >= 9, record.refused


def test_random_layouts_agree_with_one_process() -> None:
    # A seed whose four are small, and have two schedules, experts on two ranks in FP32 and FP8, and all precisions.
    assert not fuzz(4, 740, world=2, minimise=False).failures


@pytest.mark.long
def test_more_random_layouts_agree_with_one_process() -> None:
    assert not fuzz(20, 12, minimise=False).failures


@pytest.mark.long
@pytest.mark.parametrize("text", TWO_HOPS)
def test_tokens_over_two_hops_agree_with_one_process(text: str, ranks: Pools) -> None:
    case = Case.parse(text)
    assert case.hops == 2
    assert not judge(case, ranks.answers(case)).faults


@pytest.mark.long
@pytest.mark.parametrize("defect", SOME_DEFECTS)
def test_a_planted_mistake_is_found(defect: str, ranks: Pools) -> None:
    assert caught(defect, ranks) is not None
