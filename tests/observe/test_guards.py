"""The guards stop a hopeless run in words, and turn a kill into a flag exactly while they are in force."""

from __future__ import annotations

import os
import signal
import time

import pytest

from train.observe.guards import (
    AskedToStop,
    CheckpointAge,
    DeadExpertGuard,
    SpeedGuard,
    TerminationGuard,
    TrainingStopped,
    check_consecutive_skips,
)


def test_the_run_stops_at_the_limit_and_not_before():
    for skips in (0, 1, 2):
        check_consecutive_skips(skips, limit=3, step=8)
    with pytest.raises(TrainingStopped, match=r"step 9: .* not finite 3 steps in a row"):
        check_consecutive_skips(3, limit=3, step=9)


def test_an_expert_is_told_of_once_for_each_time_it_dies():
    guard = DeadExpertGuard(3)
    idle = [{(1, 5)}, {(1, 5), (2, 0)}, {(1, 5), (2, 0)}, {(1, 5)}, set(), *[{(1, 5)}] * 4]
    assert [guard.note(sorted(experts)) for experts in idle] == [[], [], [(1, 5)], *[[]] * 4, [(1, 5)], []]


def test_no_expert_is_told_of_with_a_limit_of_0():
    guard = DeadExpertGuard(0)
    assert [guard.note([(1, 5)]) for _ in range(5)] == [[]] * 5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_sets_the_flag_and_the_old_handler_returns(number: signal.Signals):
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    with TerminationGuard() as guard:
        assert not guard.requested
        os.kill(os.getpid(), number)
        assert guard.requested
        assert guard.received == number
    assert {n: signal.getsignal(n) for n in before} == before


def test_only_the_second_ctrl_c_interrupts_and_its_echo_does_not(monkeypatch: pytest.MonkeyPatch):
    clock = iter([10.0, 11.0, 11.9])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with TerminationGuard() as guard:
        # The first reads the clock, and so does the first Ctrl-C.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGINT):
            os.kill(os.getpid(), number)
            assert guard.requested
        monkeypatch.setattr(time, "monotonic", lambda: 11.0 + guard.ECHO_S + 0.1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_guard_interrupts_until_one_inside_it_is_entered():
    with TerminationGuard(interrupts=True) as outer:
        with pytest.raises(AskedToStop):
            signal.raise_signal(signal.SIGTERM)
        with TerminationGuard() as inner:
            assert inner.received == signal.SIGTERM
            signal.raise_signal(signal.SIGINT)
            assert inner.received == signal.SIGINT
            # The echo of a Ctrl-C may come to the one inside.
            with TerminationGuard() as innermost:
                signal.raise_signal(signal.SIGINT)
                assert innermost.received == signal.SIGINT
        signal.raise_signal(signal.SIGTERM)
        assert outer.requested


@pytest.mark.parametrize(
    ("speeds", "step_s", "slow_at"),
    [
        ([1300.0] * 10 + [17.0] * 40, 5.0, [15]),  # five steps that last 25 s
        ([1300.0] * 10 + [17.0] * 400, 0.1, [210]),  # 20 s, of many steps
        ([1300.0] * 10 + ([17.0] * 4 + [1300.0]) * 20, 60.0, []),  # long pauses of a few steps
        ([500.0] * 10 + [1300.0] * 10 + [326.0] * 100, 5.0, []),  # a batch ramp, then just above a quarter
        ([17.0] * 100, 60.0, []),
        ([900.0] * 9 + [9.0] * 60 + [900.0] + [9.0] * 50, 5.0, [14, 75]),  # again after it had recovered
    ],
)
def test_a_run_far_below_its_own_best_is_reported_once_until_it_recovers(
    speeds: list[float], step_s: float, slow_at: list[int]
) -> None:
    clock = iter(range(len(speeds)))
    guard = SpeedGuard(lambda: step_s * next(clock))
    assert [step for step, speed in enumerate(speeds, 1) if guard.note(speed)] == slow_at
    assert guard.best == max(speeds)
    assert guard.median == sorted(speeds)[(len(speeds) - 1) // 2]


def test_an_age_is_reported_at_each_multiple_of_its_limit_since_the_last_checkpoint():
    now = [0.0]
    age, never = (CheckpointAge(limit_s, lambda: now[0]) for limit_s in (10.0, 0.0))
    reported = []
    for second in range(60):
        now[0] = second
        if second == 35:
            age.published()
        reported.append((second, age.note()))
        assert never.note() is None
    assert [each for each in reported if each[1]] == [(10, 10), (20, 20), (30, 30), (45, 10), (55, 20)]
