"""The bubble of sleeping stages: no step is shorter than its simulation, for a sleep is never shorter than asked."""

from __future__ import annotations

import pytest

from parallel.schedules import SCHEDULES
from train.studies.bench import bubble


@pytest.mark.long
def test_every_schedule_takes_at_least_its_simulated_step() -> None:
    rows = bubble.measure_bubbles(bubble.SleepSizes(ranks=2, micro_batches=4, forward_s=0.02, repeats=2))
    assert [row.schedule for row in rows] == list(SCHEDULES)
    for row in rows:
        assert len(row.steps_s) == 2
        # Wakings are rounded to the clock's tick of some nanoseconds.
        assert min(row.steps_s) >= row.simulated_s - 1e-6, row
        assert all(0 <= measured < 1 for measured in row.bubbles), row
    # Closed form of 1F1B with equal stages: m + pp - 1 forwards and backwards.
    one = next(row for row in rows if row.schedule == "1F1B")
    assert one.simulated_s == pytest.approx((4 + 2 - 1) * 3 * 0.02)


def test_a_number_of_micro_batches_that_a_schedule_refuses_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert bubble.main(["--ranks", "4", "--micro-batches", "7"]) == 2
    assert capsys.readouterr().err == "bubble: --micro-batches 7: DualPipeV takes 8 or more\n"
