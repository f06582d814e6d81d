"""Simulated steps against closed forms, against their own definition, and against the receives that torch posts."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest

from train.studies.plan.orders import SCHEDULES, Action, Orders, Step, num_stages, orders, refusal
from train.studies.plan.timeline import Timeline, link, seconds_by_class, simulate

Time = Callable[[int, Step], float]


def seconds(*, pair: float | None = None, **kinds: float) -> Time:
    """Time by kind; B is I + W, and a pair takes the sum of its chunks or `pair`."""
    of = {**kinds, "B": kinds["I"] + kinds["W"]}
    return lambda rank, step: pair if pair and len(step) > 1 else sum(of[action.kind] for action in step)


def random_seconds(rng: random.Random) -> Time:
    """Time by kind and stage, drawn when first asked for."""
    drawn: dict[tuple[str, int], float] = {}
    return lambda rank, step: sum(drawn.setdefault((a.kind, a.stage), rng.random() + 0.1) for a in step)


def run(name: str, pp: int, micro_batches: int, time: Time, **more: Any) -> Timeline:
    chunks = SCHEDULES[name].chunks or 2
    stages = num_stages(name, pp, chunks)
    return simulate(link(orders(name, pp, chunks, micro_batches), stages), time=time, **more)


Closed = Callable[..., float]
# Bubble of the rank that idles most on pp ranks, B = I + W, FB a pair, and where it is exact, for any FB. The forms are
# those of arXiv:2412.19437 table 2, which states no conditions.
CLOSED_FORMS: dict[str, tuple[Closed, Closed]] = {
    "1F1B": (lambda pp, f, i, w, fb: (pp - 1) * (f + i + w), lambda f, i, w: True),
    "ZB-H1": (lambda pp, f, i, w, fb: (pp - 1) * (f + i - w), lambda f, i, w: w <= min(f, i)),
    "DualPipe": (lambda pp, f, i, w, fb: (pp // 2 - 1) * (fb + i - 2 * w), lambda f, i, w: w <= f == i),
    "DualPipeV": (lambda pp, f, i, w, fb: (pp - 1) * (fb + i - 2 * w), lambda f, i, w: w <= f == i),
}


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_without_messages_the_bubble_is_the_closed_form_exactly_where_that_holds(name: str) -> None:
    """Whole seconds, so that equal means equal: seconds of 1 to 3, and pairs that save nothing or half a second."""
    closed, holds = CLOSED_FORMS[name]
    for f, i, w, saved in product((1, 2, 3), (1, 2, 3), (1, 2, 3), (0, 0.5)):
        fb = f + i + w - saved
        equal = [
            max(run(name, pp, m, seconds(F=f, I=i, W=w, pair=fb)).bubble_s) == closed(pp, f, i, w, fb)
            for pp, m in ((2, 4), (4, 9 if name != "DualPipe" else 10), (6, 12))
        ]
        assert all(equal) == holds(f, i, w), (f, i, w, saved)


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_the_closed_form_holds_at_v3s_size(name: str) -> None:
    found = run(name, 16, 120, seconds(F=3.0, I=3.0, W=2.0, pair=7.0))
    assert max(found.bubble_s) == CLOSED_FORMS[name][0](16, 3, 3, 2, 7)


@pytest.mark.parametrize(("pp", "micro_batches"), [(2, 4), (4, 18), (16, 120)])
def test_zbv_idles_one_chunk_a_rank_until_the_last_has_ended(pp: int, micro_batches: int) -> None:
    """The zero of arXiv:2401.10241 leaves out that a step ends for all ranks together. A chunk is half of a rank."""
    assert run("ZBVZeroBubble", pp, micro_batches, seconds(F=1.0, I=1.0, W=1.0)).bubble_s == [pp - 1] * pp


def legal_sizes() -> list[tuple[str, int, int, int]]:
    return [
        (name, pp, chunks, micro_batches)
        for name in SCHEDULES
        for pp in range(1, 6)
        for chunks in (1, 2, 3)
        for micro_batches in [*range(1, 2 * pp + 2), 3 * pp]
        if refusal(name, pp, chunks, micro_batches) is None
    ]


def needed(action: Action, stages: int) -> set[tuple[str, int, int]]:
    """What must have run before an action, from its definition."""
    kind, stage, i = action
    first, last = stage % stages == 0, stage % stages == stages - 1
    before = {
        "F": {("F", stage - 1, i)} if not first else set(),
        "B": {("F", stage, i), *([] if last else [("B", stage + 1, i)])},
        "W": {("B", stage, i)},
    }
    return before["B" if kind == "I" else kind]


def made(action: Action) -> tuple[str, int, int]:
    return "B" if action.kind == "I" else action.kind, action.stage, action.micro_batch


def test_no_legal_size_deadlocks_and_every_step_starts_when_it_can() -> None:
    """A start is the latest of the rank's last end and the arrivals, so no rank runs two steps and no work is lost."""
    rng = random.Random(20241227)
    for name, pp, chunks, micro_batches in legal_sizes():
        stages, time, p2p = num_stages(name, pp, chunks), random_seconds(rng), rng.random()
        written = orders(name, pp, chunks, micro_batches)
        found = simulate(link(written, stages), time=time, p2p_s=p2p)
        ended = {
            made(action): (end, rank) for rank, ran in enumerate(found.spans) for _, end, step in ran for action in step
        }
        for rank, ran in enumerate(found.spans):
            assert tuple(step for _, _, step in ran) == written[rank]
            free = 0.0
            for start, end, step in ran:
                arrivals = [ended[need] for action in step for need in needed(action, stages)]
                assert start == max([free, *(at if maker == rank else at + p2p for at, maker in arrivals)])
                assert end == start + time(rank, step)
                free = end
            assert found.busy_s[rank] == pytest.approx(sum(time(rank, step) for step in written[rank]))
            assert found.busy_s[rank] + found.bubble_s[rank] == pytest.approx(found.step_s)
        assert found.step_s == max(end for ran in found.spans for _, end, _ in ran)


def test_an_order_that_cannot_run_is_an_error_that_names_the_ranks() -> None:
    first, second = orders("1F1B", 2, 1, 4)
    backward_first: Orders = ((first[2], *first[:2], *first[3:]), second)
    with pytest.raises(RuntimeError, match=r"deadlock.*\{0: .*'B'.*1: .*"):
        link(backward_first, 2)
    with pytest.raises(RuntimeError, match="deadlock"):
        link((first[:-1], (*second, (Action("B", 1, 9),))), 2)


@pytest.mark.parametrize("name", SCHEDULES)
def test_faster_messages_and_ranks_never_slow_a_step(name: str) -> None:
    rng = random.Random(5)
    faster = 0
    for _ in range(30):
        time, late, rank = random_seconds(rng), 0.5 * rng.random(), rng.randrange(6)
        base = run(name, 6, 12, time, p2p_s=late)
        # 1e-12: a path of some hundred sums, rounded otherwise.
        assert run(name, 6, 12, time, p2p_s=late * rng.random()).step_s <= base.step_s + 1e-12
        straggling = run(name, 6, 12, time, p2p_s=late, slow={rank: 1.5})
        assert base.step_s - 1e-12 <= straggling.step_s <= 1.5 * base.step_s
        assert straggling.busy_s == [pytest.approx(b * (1.5 if r == rank else 1)) for r, b in enumerate(base.busy_s)]
        faster += run(name, 6, 12, time).step_s < base.step_s
    assert faster == 30


def test_classes_add_up_to_the_step() -> None:
    """DualPipe on 16 ranks, 120 micro-batches, one second each: 19.6 F, 19.6 B or I, 11.5 W and 100.4 pairs a rank."""
    kinds = Counter(
        "pair" if len(step) > 1 else step[0].kind for steps in orders("DualPipe", 16, 2, 120) for step in steps
    )
    step = run("DualPipe", 16, 120, lambda rank, step: 1.0)
    found = seconds_by_class(step)
    assert found == {
        "1F": kinds["F"] / 16,
        "1B": (kinds["B"] + kinds["I"]) / 16,
        "1W": kinds["W"] / 16,
        "1F1B": kinds["pair"] / 16,
        "bubble": sum(step.bubble_s) / 16,
    }
    assert [found[name] for name in ("1F", "1B", "1W", "1F1B")] == [19.625, 19.625, 11.5, 100.375]
    assert sum(found.values()) == step.step_s
