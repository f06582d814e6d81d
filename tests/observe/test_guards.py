"""The guards stop a hopeless run in words, and turn a kill into a flag exactly while they are in force."""

from __future__ import annotations

import os
import signal
import time

import pytest

from train.observe.guards import (
    AskedToStop,
    DeadExpertGuard,
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
        signal.raise_signal(signal.SIGTERM)
        assert outer.requested
