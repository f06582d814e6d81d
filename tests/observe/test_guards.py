"""The guards stop a hopeless run in words, and turn a kill into a flag exactly while they are in force."""

from __future__ import annotations

import os
import signal

import pytest

from train.observe.guards import NonFiniteGuard, TerminationGuard, TrainingStopped


def test_only_steps_in_a_row_stop_the_run():
    guard = NonFiniteGuard(3)
    for step, finite in enumerate([False, False, True, False, False, True], start=1):
        guard.observe(finite, step)
    assert (guard.skipped_steps, guard.consecutive_skips) == (4, 0)
    guard.observe(finite=False, step=7)
    guard.observe(finite=False, step=8)
    with pytest.raises(TrainingStopped, match=r"step 9: .* not finite 3 steps in a row"):
        guard.observe(finite=False, step=9)
    assert (guard.skipped_steps, guard.consecutive_skips) == (7, 3)


def test_a_resumed_run_keeps_its_count():
    guard = NonFiniteGuard(3, skipped_steps=5, consecutive_skips=2)
    with pytest.raises(TrainingStopped):
        guard.observe(finite=False, step=20)
    assert guard.skipped_steps == 6


def test_a_limit_below_one_is_refused():
    with pytest.raises(ValueError, match="max_consecutive is 0"):
        NonFiniteGuard(0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_sets_the_flag_and_the_old_handler_returns(number: signal.Signals):
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    with TerminationGuard() as guard:
        assert not guard.requested
        os.kill(os.getpid(), number)
        assert guard.requested
        assert guard.received == number
    assert {n: signal.getsignal(n) for n in before} == before


def test_only_the_second_ctrl_c_interrupts():
    with TerminationGuard() as guard:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
            assert guard.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
