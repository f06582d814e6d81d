"""A run that is asked to stop does so within a step, whatever it does: start, training, evaluation; all ranks together.

The signal comes to the last rank alone, at a moment that the test chooses; `tests/system/test_torchrun.py` has the
moments that it does not choose.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import train.worker
from launch import ending, meeting, pretrain
from tests.ranks import run_ranks
from tests.system.lives import trainer_on
from train.assemble import build_alone
from train.config import PretrainConfig, compose
from train.observe.guards import AskedToStop, TerminationGuard
from train.observe.sinks import read_events
from train.studies.plan import dry_run as planner
from train.trainer import Trainer
from train.worker import WorkerInfo

Overrides = Callable[..., list[str]]
# Few batches are the whole held-out text.
LONG = ("data.sequence_length=128", "run.micro_batch_sequences=1")


def signalled(function: Callable[..., Any], *, call: int) -> Callable[..., Any]:
    """`function`, with SIGTERM in its n-th call; 0: never."""
    calls = iter(range(1, 10**6))

    def wrapped(*arguments: Any, **named: Any) -> Any:
        if next(calls) == call:
            signal.raise_signal(signal.SIGTERM)
        return function(*arguments, **named)

    return wrapped


# Method and call in which the signal comes -> last step on one rank and on two, batches scored. Two ranks learn of it
# in the step after.
MOMENTS = {
    ("resume", 1): (0, 0, 0),
    ("take_step", 2): (2, 2, 0),
    ("save", 1): (2, 3, 0),
    ("negative_log_likelihood", 3): (3, 3, 3),
}


def life(rank: int, world: int, config: PretrainConfig, method: str = "resume", call: int = 0) -> tuple[int, int]:
    """One life of a run with a signal in the n-th call of a method at the last rank: its last step, batches scored."""
    with TerminationGuard():
        trainer = trainer_on(config, world)
        scored: list[int] = []
        count = trainer.negative_log_likelihood
        trainer.negative_log_likelihood = lambda batch: scored.append(1) or count(batch)  # type: ignore[method-assign]
        setattr(trainer, method, signalled(getattr(trainer, method), call=call * (rank == world - 1)))
        trainer.resume()
        return trainer.fit().step, len(scored)


def lives(rank: int, world: int, config: PretrainConfig) -> list[tuple[int, int]]:
    """A stopped run for each moment, and the rest of the last one."""
    runs = {name: replace(config, run=replace(config.run, name=name)) for name, _ in MOMENTS}
    stopped = [life(rank, world, runs[name], name, call) for name, call in MOMENTS]
    return [*stopped, life(rank, world, runs[list(MOMENTS)[-1][0]])]


@pytest.mark.parametrize("world", [1, 2])
def test_all_ranks_stop_within_a_step_and_the_same_command_finishes(
    world: int, small_run: Overrides, tmp_path: Path
) -> None:
    layout = ("layout.dp=2", "layout.ep=2") if world == 2 else ()
    changes = ("run.eval_every_steps=3", "checkpoint.every_steps=2", "schedule.total_tokens=1024", *LONG)
    config = compose(small_run(*layout, *changes, f"run.directory={tmp_path}"))
    by_rank = run_ranks(world, lives, config) if world > 1 else [lives(0, 1, config)]
    wanted = [(steps[world - 1], batches) for *steps, batches in MOMENTS.values()]
    assert [ends[:-1] for ends in by_rank] == [wanted] * world
    for (name, _), (step, _) in zip(MOMENTS, wanted, strict=True):
        checkpoints = sorted(path.name for path in (tmp_path / name / "checkpoints").glob("*"))
        assert checkpoints[-1:] == ([f"step_{step:08d}"] if step else []) or name == "negative_log_likelihood"
        events = read_events(tmp_path / name)
        stop = next(event for event in events if event["event"] == "stop")
        assert (stop["step"], stop["reason"]) == (step, "asked to stop; the same command resumes")
    # Of the last: an interrupted evaluation is no result, and is made by the process that goes on.
    kinds = [(event["event"], event["step"]) for event in events if event["event"] != "checkpoint"]
    assert kinds == [("start", 0), ("stop", 3), ("resume", 3), ("evaluation", 3), ("evaluation", 4), ("stop", 4)]


def test_asked_to_stop_in_the_last_evaluation_the_next_start_scores_the_same(
    small_run: Overrides, tmp_path: Path
) -> None:
    scores = []
    for name, call in (("whole", 0), ("stopped", 2)):
        overrides = small_run("schedule.total_tokens=256", *LONG, f"run.directory={tmp_path}", f"run.name={name}")
        trainer = Trainer(compose(overrides), build_alone(compose(overrides)))
        trainer.negative_log_likelihood = signalled(trainer.negative_log_likelihood, call=call)  # type: ignore[method-assign]
        trainer.fit()
        if call:
            assert read_events(tmp_path / name)[-1]["reason"].startswith("token budget spent; asked to stop before the")
            assert pretrain.main(overrides) == 0
        events = read_events(tmp_path / name)
        scores.append([event["eval/bits_per_byte"] for event in events if event["event"] == "evaluation"])
        assert events[-1]["reason"] == "token budget spent"
    assert len(scores[0]) == 1
    assert scores[0] == scores[1]


def test_a_signal_to_one_of_several_ranks_before_they_meet_ends_all_of_them(
    small_run: Overrides, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal comes while rank 1 starts; it goes on until the others know, and leaves with them."""
    infos: list[WorkerInfo] = []

    def pretrain_on_both_ranks(config: PretrainConfig, info: WorkerInfo) -> None:
        infos.extend((info, replace(info, rank=0, is_asked_to_stop=lambda: False)))
        with ThreadPoolExecutor() as ranks, ExitStack() as held:
            starts = [ranks.submit(train.worker.open_on_every_rank, config, each, held) for each in infos]
            errors = [start.exception() for start in starts]
        assert [type(error) for error in errors] == [AskedToStop] * 2
        raise AskedToStop

    store = dist.HashStore()

    def met(*_: object) -> Iterator[tuple[dist.Store, int, int]]:
        signal.raise_signal(signal.SIGTERM)
        yield store, 1, 2

    monkeypatch.setattr(meeting, "rendezvous", met)
    monkeypatch.setattr(train.worker, "open_here", lambda *_: None)
    monkeypatch.setattr(train.worker, "pretrain", pretrain_on_both_ranks)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert pretrain.main(small_run("layout.dp=2", "layout.ep=2", "run.micro_batch_sequences=1")) == 0
    assert len(infos) == 2


def handlers() -> list[object]:
    return [signal.getsignal(each) for each in TerminationGuard.SIGNALS]


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The handlers in force while a plan or a configuration is made in `main`."""
    found: list[object] = []

    def look(_: object) -> str:
        found.extend(handlers())
        return ""

    monkeypatch.setattr(planner, "dry_run", look)
    monkeypatch.setattr(pretrain, "to_yaml", look)
    return found


@pytest.mark.parametrize("argument", ["dry_run=true", "--config"])
def test_what_does_not_train_dies_by_a_signal(argument: str, small_run: Overrides, planned: list[object]) -> None:
    before = handlers()
    arguments = small_run(argument)
    assert not ending.trains(arguments)
    assert ending.trains([*small_run(), "dry_run=false"])
    ending.handle_early(arguments)
    assert pretrain.main(arguments) == 0
    assert planned == before


def test_a_plan_that_a_file_asks_for_dies_by_a_signal_too(
    small_run: Overrides, planned: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command line does not say it: it is known once the file has been read, under the handlers of a start."""
    before = handlers()
    monkeypatch.setattr(pretrain, "compose", lambda overrides: replace(compose(overrides), dry_run=True))
    arguments = small_run()
    ending.handle_early(arguments)
    assert handlers() != before
    assert pretrain.main(arguments) == 0
    assert planned == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_start_is_left_at_once(
    number: signal.Signals,
    small_run: Overrides,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def built(*_: object) -> None:
        signal.raise_signal(number)
        pytest.fail("the start went on")

    monkeypatch.setattr(train.worker, "build", built)
    assert pretrain.main(small_run(f"run.directory={tmp_path}", "run.name=run")) == 0
    assert capsys.readouterr().err == pretrain.STOPPED
    assert [path.name for path in (tmp_path / "run").glob("*")] == ["lock"]
