"""Which rank is slow: its work is told apart from its waiting on every kind of layout, and it is named once.

Time is a clock of our own: every message takes 1000 s, a stage's forward 1 s, on the slow rank 3 s, the batch and the
update less than one, all else none. So a message that were counted as work, a chunk of work as waiting, or work in
another phase, shows in every digit.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from parallel import waiting
from tests.ranks import run_ranks
from tests.system.lives import trainer_on
from train.config import PretrainConfig
from train.data.stream import TokenStream
from train.observe.guards import Straggler, StragglerGuard
from train.observe.sinks import read_events, read_run
from train.optim.adamw import AdamW
from train.stage import Stage

SLOW_RANK, FACTOR, STEPS, MESSAGE_S = 1, 3.0, 2, 1000.0
DATA_S, UPDATE_S = 0.25, 0.125
# Layout -> stages on a rank; four sequences a step are 4 / dp micro-batches.
LAYOUTS = {
    "dp=2,ep=2": 1,
    "dp=2,zero=false": 1,
    "pp=2,dp=2,ep=2,schedule=1F1B": 1,
    "pp=2,dp=2,schedule=ZBVZeroBubble": 2,
}


def train(rank: int, world: int, config: PretrainConfig) -> None:
    clock = SimpleNamespace(s=0.0)

    def taking(seconds: float, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            clock.s += seconds
            return function(*arguments, **named)

        return call

    waiting.time = SimpleNamespace(perf_counter=lambda: clock.s)  # type: ignore[assignment]
    waiting.without_core_s = lambda: 0.0
    for owner, name in ((dist, "all_reduce"), (dist, "all_to_all_single"), (dist.Work, "wait")):
        setattr(owner, name, taking(MESSAGE_S, getattr(owner, name)))
    TokenStream.take = taking(DATA_S, TokenStream.take)  # type: ignore[method-assign]
    AdamW.step = taking(UPDATE_S, AdamW.step)  # type: ignore[method-assign]
    Stage.forward = taking(FACTOR if rank == SLOW_RANK else 1.0, Stage.forward)  # type: ignore[method-assign]
    trainer_on(config, world).fit()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_work_is_told_apart_from_waiting_and_the_slow_rank_is_named_once(
    small_config: Callable[..., PretrainConfig], tmp_path: Path, layout: str
) -> None:
    axes = dict(each.split("=") for each in layout.split(","))
    pp, dp = int(axes.get("pp", 1)), int(axes["dp"])
    changes = [f"layout.{axis}={value}" for axis, value in axes.items()]
    # A stage's time is the clock's, however few layers it has; two steps more than it takes to name a rank.
    changes += [f"model.num_hidden_layers={2 * pp}", "data.heldout=null"]
    changes += ["run.micro_batch_sequences=1", f"schedule.total_tokens={128 * (STEPS + 3)}"]
    # A save has messages in a thread of its own.
    changes += ["checkpoint.every_steps=1000"]
    changes += [
        "schedule.batch_start_sequences=4",
        "schedule.batch_full_sequences=4",
        f"observe.straggler_steps={STEPS}",
    ]
    run_ranks(pp * dp, train, small_config(tmp_path, *changes))
    gradients_ms = [1e3 * LAYOUTS[layout] * 4 / dp * (FACTOR if rank == SLOW_RANK else 1.0) for rank in range(pp * dp)]
    phases_ms = {"data": [1e3 * DATA_S] * pp * dp, "gradients": gradients_ms, "update": [1e3 * UPDATE_S] * pp * dp}
    busy_ms = [sum(phases) for phases in zip(*phases_ms.values(), strict=True)]
    for name, times in {"busy": busy_ms, **phases_ms}.items():
        table = [times[stage * dp : (stage + 1) * dp] for stage in range(pp)]
        logged = [record.get(f"step/{name}_ms") for record in read_run(tmp_path / "run")]
        assert logged == [None, *[table] * (STEPS + 2)], name
    (event,) = [event for event in read_events(tmp_path / "run") if event["event"] == "straggler"]
    expected = {"step": STEPS + 1, "rank": SLOW_RANK, "pipeline_rank": 0, "data_rank": 1, "steps": STEPS}
    expected |= {"busy_ms": busy_ms[SLOW_RANK], "usual_ms": busy_ms[0], "phase": "gradients"}
    assert {name: event[name] for name in expected} == expected


def test_a_rank_is_named_once_an_episode_and_short_ones_are_none() -> None:
    guard = StragglerGuard(1.5, 3)
    slow, even = [[10.0, 10.0, 15.1, 9.0]], [[10.0, 10.0, 15.0, 9.0]]
    found = [guard.note(step) for step in (slow, slow, even, *[slow] * 5, even, *[slow] * 3, *[even] * 3, *[slow] * 3)]
    expected = Straggler(rank=2, pipeline_rank=0, data_rank=2, busy_ms=15.1, usual_ms=10.0, steps=3)
    assert found == [[expected] if at in (5, 17) else [] for at in range(18)]
    never = StragglerGuard(1.5, 0)
    assert not any(never.note(slow) for _ in range(9))


def test_a_rank_alone_in_its_stage_is_compared_with_its_own_past_share() -> None:
    """Stages differ by nature, and a batch that grows makes all of them work longer; neither is a slow rank."""
    guard = StragglerGuard(1.5, 3)
    steps = [[[10.0 * (1 + at / 10)], [40.0 * (1 + at / 10)]] for at in range(40)]
    assert not any(guard.note(step) for step in steps)
    found = [guard.note([[50.0], [400.0]]) for _ in range(4)]
    assert found == [[], [], [Straggler(1, 1, 0, busy_ms=400.0, usual_ms=200.0, steps=3)], []]
