"""A loss that leaves its band in a real training: skipped, gone back from, left out; or the run stops.

The fault: an update at 3,000 times the learning rate, so that the loss of the following steps is far off. What holds:
from the rollback on the run is, bit for bit, one that had no fault and left out the same windows of its data.

Runs are `small_run`: 20 steps of 2 x 32 tokens, a checkpoint every 5 steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import train.trainer
from tests.ranks import run_ranks
from tests.system.lives import Look, copied_state, look, losses, trainer_on, whole
from train.checkpoint import publish
from train.config import PretrainConfig
from train.observe.guards import Diverged, TrainingStopped
from train.observe.sinks import NoSinks, read_events, read_run
from train.spikes import SpikeState
from train.trainer import Trainer

Composed = Callable[..., PretrainConfig]
STEPS = 20
COMMON = (f"schedule.total_tokens={64 * STEPS}", "data.heldout=null")


@pytest.fixture
def composed(small_config: Composed, tmp_path: Path) -> Composed:
    return lambda *changes: small_config(tmp_path, *COMMON, *changes)


@pytest.fixture
def config(composed: Composed) -> PretrainConfig:
    return composed()


def resumed(config: PretrainConfig, world: int = 1) -> Trainer:
    trainer = trainer_on(config, world)
    trainer.resume()
    return trainer


def broken(monkeypatch: pytest.MonkeyPatch, *, times: int = 1) -> None:
    """The 12th update of all trainers, the first so many times that it comes, is 3,000 times as long."""
    apply_update, left = train.trainer.apply_update, times

    def too_far(*arguments: Any, now: Any, update: int) -> None:
        nonlocal left
        is_broken = update == 12 and left > 0
        left -= is_broken
        apply_update(*arguments, now=replace(now, lr=now.lr * (3000 if is_broken else 1)), update=update)

    monkeypatch.setattr(train.trainer, "apply_update", too_far)


def events_of(run: Path, *kinds: str) -> list[dict[str, Any]]:
    return [event for event in read_events(run) if event["event"] in kinds]


def without_the_windows(config: PretrainConfig, windows: list[list[int]], world: int = 1) -> Trainer:
    """A run that had no fault and leaves out these windows from its start."""
    trainer = resumed(replace(config, run=replace(config.run, name="reference")), world)
    trainer.spikes = SpikeState(dropped=tuple((first, count) for first, count in windows))
    return trainer


# By precision and windows.
References = dict[tuple[str, str], Trainer]


@pytest.fixture(scope="module")
def references() -> References:
    """Runs without a fault that have ended, for all tests."""
    return {}


def assert_is_the_reference(trainer: Trainer, config: PretrainConfig, run: Path, references: References) -> None:
    (rollback,) = events_of(run, "rollback")
    windows = rollback["dropped_positions"]
    key = config.precision.name, str(windows)
    if key not in references:
        references[key] = without_the_windows(config, windows)
        references[key].fit()
    reference = references[key]
    assert reference.state == trainer.state
    assert losses(run) == losses(reference.directory)
    assert len(losses(run)) == STEPS
    expected, actual = copied_state(reference), copied_state(trainer)
    assert expected.keys() == actual.keys()
    assert not [name for name in expected if not torch.equal(expected[name], actual[name])]


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp8", marks=pytest.mark.long)])
def test_after_three_spikes_the_run_is_bit_for_bit_the_one_without_those_data(
    composed: Composed, references: References, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    config = composed(f"precision={precision}")
    with monkeypatch.context() as patch:
        broken(patch)
        trainer = resumed(config)
        trainer.fit()
    run = tmp_path / "run"
    spikes = events_of(run, "spike")
    first = spikes[0]["step"]
    assert [spike["step"] for spike in spikes] == [first, first + 1, first + 2]
    # Step n has the sequences 2 n - 2 and 2 n - 1; no window was left out before.
    assert [spike["positions"] for spike in spikes] == [[2 * n - 2, 2 * n] for n in range(first, first + 3)]
    assert all(spike["loss_z"] >= 8 for spike in spikes)
    (rollback,) = events_of(run, "rollback")
    assert (rollback["step"], rollback["left_at_step"]) == (5, first + 2)
    ((start, count),) = rollback["dropped_positions"]
    assert 10 <= start <= spikes[0]["positions"][0] - 2, "a batch before the spikes, none before the checkpoint"
    assert start + count == spikes[-1]["positions"][1] + 2, "a batch after them"
    assert_is_the_reference(trainer, config, run, references)


def test_killed_between_two_spikes_or_after_the_rollback_it_goes_the_same_way(
    config: PretrainConfig, references: References, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    with monkeypatch.context() as patch:
        broken(patch)
        for last in (14, 5, None):
            trainer = resumed(config)

            def dies(*arguments: Any, take=trainer.take_step, trainer=trainer, last=last, **named: Any) -> None:
                take(*arguments, **named)
                if trainer.state.step == last and (last > 5 or trainer.spikes.rollbacks):
                    if last > 5:
                        trainer.save(arguments[0])
                    raise Killed

            trainer.take_step = dies  # type: ignore[method-assign]
            if last is None:
                trainer.fit()
            else:
                with pytest.raises(Killed):
                    trainer.fit()
    assert [event["step"] for event in events_of(tmp_path / "run", "resume")] == [14, 5]
    assert_is_the_reference(trainer, config, tmp_path / "run", references)


def life_with_a_fault(rank: int, world: int, config: PretrainConfig) -> Look:
    with pytest.MonkeyPatch.context() as patch:
        broken(patch)
        trainer = resumed(config, world)
        trainer.fit()
    return look(trainer, score=False)


def life_without(rank: int, world: int, config: PretrainConfig, windows: list[list[int]]) -> Look:
    trainer = without_the_windows(config, windows, world)
    trainer.fit()
    return look(trainer, score=False)


@pytest.mark.long
@pytest.mark.parametrize("changes", [(), ("optim.backend=deepspeed", "precision=fp8")])
def test_two_ranks_go_back_together(composed: Composed, tmp_path: Path, changes: tuple[str, ...]) -> None:
    config = composed("layout.dp=2", "layout.ep=2", "run.micro_batch_sequences=1", *changes)
    looks = run_ranks(2, life_with_a_fault, config)
    (rollback,) = events_of(tmp_path / "run", "rollback")
    reference = run_ranks(2, life_without, config, rollback["dropped_positions"])
    assert losses(tmp_path / "run") == losses(tmp_path / "reference")
    actual, expected = whole(looks), whole(reference)
    assert actual.keys() == expected.keys()
    assert not [name for name in expected if (actual[name][1] != expected[name][1]).any()]


def test_where_going_back_does_not_help_the_run_ends_with_a_code_of_its_own_and_loses_nothing(
    config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch, times=9)
    with pytest.raises(Diverged, match=r"left its band again after 1 rollbacks in a row") as stopped:
        resumed(replace(config, spikes=replace(config.spikes, max_rollbacks=1))).fit()
    assert stopped.value.exit_code == 5
    assert events_of(tmp_path / "run", "stop")[-1]["reason"] == str(stopped.value)
    kept = [path.name for path in publish.published(tmp_path / "run/checkpoints")]
    assert "step_00000005" in kept
    assert f"The last checkpoint from before is {tmp_path}/run/checkpoints/step_" in str(stopped.value)
    with pytest.raises(Diverged):
        resumed(replace(config, spikes=replace(config.spikes, max_rollbacks=1))).fit()


def test_a_run_of_which_no_step_was_applied_does_not_end_well(
    composed: Composed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = train.trainer.compute_gradients
    monkeypatch.setattr(
        train.trainer, "compute_gradients", lambda *a, **k: replace(compute(*a, **k), finite=torch.tensor(False))
    )
    config = composed("schedule.total_tokens=192", "run.max_consecutive_nonfinite=99")
    with pytest.raises(TrainingStopped, match="no step was ever applied"):
        resumed(config).fit()
    assert len(read_run(tmp_path / "run")) == 3


def test_the_checkpoint_of_a_stop_is_no_candidate_and_where_none_is_whole_the_run_has_diverged(
    composed: Composed, tmp_path: Path
) -> None:
    trainer = resumed(composed("schedule.total_tokens=192"))
    trainer.fit()
    (path,) = publish.published(tmp_path / "run/checkpoints")
    assert (path.name, trainer.spikes.candidate) == ("step_00000003", 0)
    (path / publish.STATE).write_text("{}")
    trainer.spikes = replace(trainer.spikes, in_a_row=3, first_skipped=4)
    with pytest.raises(Diverged, match=f"no checkpoint in {path.parent} is whole.*{publish.STATE} has 2 bytes"):
        trainer.go_back(NoSinks(), spike_end=12, batch_sequences=2)


@pytest.fixture(scope="module")
def calm(small_config: Composed, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """A whole run without a fault, compared with its last 8 steps, with a checkpoint every second step."""
    policy = ("spikes.window_steps=8", "checkpoint.every_steps=2", "checkpoint.keep=1", "checkpoint.keep_every_steps=8")
    trainer = resumed(small_config(tmp_path_factory.mktemp("calm"), *COMMON, *policy))
    trainer.fit()
    return trainer


def test_the_newest_good_checkpoint_and_every_nth_stay(calm: Trainer) -> None:
    # That of 14 proved to be good at step 19, that of 20 would at 25; 8 and 16 are every eighth.
    names = [path.name for path in publish.published(calm.directory / "checkpoints")]
    assert names == [publish.step_name(step) for step in (20, 16, 14, 8)]


def test_a_whole_run_of_the_small_model_is_left_alone(calm: Trainer) -> None:
    run = calm.directory
    assert not events_of(run, "spike", "rollback", "skip")
    history = [record["loss/main"] for record in read_run(run)][-8:]
    assert [each.loss for each in calm.spikes.history] == history
    norms = [record["grad/norm"] for record in read_run(run)][-8:]
    assert [each.log_norm for each in calm.spikes.history] == [math.log(norm) for norm in norms]
