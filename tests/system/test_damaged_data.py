"""Token data altered under a run: refused with one sentence, or left out of the data order on every layout alike."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from parallel.layout import Layout
from tests.data.handmade import flip, resealed
from tests.ranks import run_ranks
from tests.system.lives import Plan, live, losses
from train.assemble import build_alone
from train.config import PretrainConfig, compose
from train.observe.guards import DataRefused
from train.observe.sinks import read_events
from train.trainer import Trainer

DATA = "data-00000-of-00001.arrow"
# The damaged sequence is the second of step 4, after a checkpoint: of two data ranks the second one reads it.
STEPS, SEQUENCES, SAVED_AT, POSITION = 6, 2, 3, 7


@pytest.fixture
def config(small_run: Callable[..., list[str]], store: Path, tmp_path: Path) -> PretrainConfig:
    """A run on its own copy of the store, in blocks of 1 KiB."""
    copy = resealed(shutil.copytree(store / "train", tmp_path / "store/train"), block_bytes=1024)
    shutil.copy(store / "tokenizer.json", copy.parent)
    budget = (f"schedule.total_tokens={STEPS * SEQUENCES * 32}", f"checkpoint.every_steps={SAVED_AT}")
    changes = (*budget, f"run.directory={tmp_path}", "run.name=run", "precision=fp32")
    return compose(small_run(*changes, f"data.store={copy}", "data.heldout=null", "data.fim_rate=0.0"))


def named(config: PretrainConfig, name: str) -> PretrainConfig:
    return replace(config, run=replace(config.run, name=name))


def trainer_of(config: PretrainConfig) -> Trainer:
    trainer = Trainer(config, build_alone(config))
    trainer.resume()
    return trainer


def place_of(config: PretrainConfig, position: int) -> int:
    """A byte of the data file that holds a token of a sample."""
    ids = build_alone(config).stream.take(position, 1).input_ids[0].numpy().astype("<u2")
    content = (Path(config.data.store) / DATA).read_bytes()
    return next(at for start in range(16) if (at := content.find(np.array(ids[start : start + 16]).tobytes())) >= 0)


def flip_after(trainer: Trainer, step: int, file: Path, at: int) -> None:
    take_step = trainer.take_step

    def flipped(*arguments: object, **options: object) -> None:
        take_step(*arguments, **options)  # type: ignore[arg-type]
        if trainer.state.step == step:
            flip(file, at)

    trainer.take_step = flipped  # type: ignore[method-assign]


def quarantined(run: Path) -> list[int]:
    events = [event for event in read_events(run) if event["event"] == "quarantine"]
    return sorted(window["position"] for event in events for window in event["windows"])


def test_a_flipped_byte_ends_the_run_before_the_step_and_restored_it_goes_on_bit_for_bit(
    config: PretrainConfig,
) -> None:
    unbroken = trainer_of(named(config, "unbroken"))
    unbroken.fit()
    file, at = Path(config.data.store) / DATA, place_of(config, POSITION)
    for flipped_after_step in (0, 2):
        broken = named(config, f"flipped_after_{flipped_after_step}")
        trainer = trainer_of(broken)
        if flipped_after_step:
            flip_after(trainer, flipped_after_step, file, at)
        else:
            flip(file, at)
        sentence = rf"{DATA} does not have the sha256 of its block {at // 1024} .*data.on_damage=quarantine goes on"
        with pytest.raises(DataRefused, match=sentence) as refused:
            trainer.fit()
        assert refused.value.exit_code == 2
        stop = read_events(trainer.directory)[-1]
        assert (stop["event"], stop["reason"]) == ("stop", str(refused.value))
        assert stop["step"] <= SAVED_AT
        flip(file, at)
        trainer_of(broken).fit()
        assert losses(trainer.directory) == losses(unbroken.directory)


def test_held_out_data_that_are_damaged_end_the_run_with_every_step_saved(
    config: PretrainConfig, store: Path, tmp_path: Path
) -> None:
    heldout = shutil.copytree(store / "heldout", tmp_path / "store/heldout")
    changed = replace(config, data=replace(config.data, heldout=str(heldout)))
    trainer = trainer_of(replace(changed, run=replace(config.run, eval_every_steps=3)))
    flip_after(trainer, 2, heldout / DATA, 1000)
    for _ in range(2):
        with pytest.raises(DataRefused, match=f"heldout/{DATA} does not have the sha256 of its block 0"):
            trainer.fit()
        assert trainer.state.step == 3
        assert read_events(trainer.directory)[-1]["event"] == "stop"
        # The process that comes next scores the step first.
        trainer = trainer_of(trainer.config)


def test_quarantine_leaves_samples_out_and_is_the_same_after_a_resume_and_on_any_layout(config: PretrainConfig) -> None:
    runs = Path(config.run.directory)
    quarantine = replace(config, data=replace(config.data, on_damage="quarantine"))
    place, whole = place_of(config, POSITION), trainer_of(named(config, "reference"))
    flip(Path(config.data.store) / DATA, place)
    trainer = trainer_of(quarantine)
    trainer.fit()
    dropped = trainer.spikes.dropped
    assert any(first <= POSITION < first + count for first, count in dropped)
    assert trainer.state.sequences_seen == STEPS * SEQUENCES, "as many as without damage"
    events = [event for event in read_events(runs / "run") if event["event"] == "quarantine"]
    assert all(DATA in window["error"] and window["block"] == place // 1024 for e in events for window in e["windows"])
    positions = quarantined(runs / "run")
    assert positions == [position for first, count in dropped for position in range(first, first + count)]
    assert json.loads((runs / "run/run_card.json").read_text())["dropped_sequences"] == len(positions)

    flip(Path(config.data.store) / DATA, place)
    whole.spikes = replace(whole.spikes, dropped=dropped)
    whole.fit()
    assert losses(runs / "reference") == losses(runs / "run"), "as if they had been left out from the first step on"
    flip(Path(config.data.store) / DATA, place)

    interrupted = trainer_of(named(quarantine, "resumed"))
    interrupted.evaluation_is_due = lambda: interrupted.state.step == SAVED_AT + 1 and 1 / 0 > 0  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        interrupted.fit()
    resumed = trainer_of(named(quarantine, "resumed"))
    assert resumed.state.step == SAVED_AT
    resumed.fit()
    assert losses(runs / "resumed") == losses(runs / "run")
    assert (resumed.state, resumed.spikes) == (trainer.state, trainer.spikes)

    for name, layout in {"dp2": Layout(dp=2), "pp2": Layout(pp=2)}.items():
        run = replace(quarantine.run, name=name, micro_batch_sequences=1)
        lives = run_ranks(2, live, [Plan(replace(quarantine, run=run, layout=layout), "after")])
        assert [life.look.counters for (life,) in lives] == [trainer.state.to_json()] * 2
        assert quarantined(runs / name) == positions
        # FP32 sums regrouped over ranks; bound and measurement: tests/system/test_layouts.py.
        np.testing.assert_allclose(losses(runs / name), losses(runs / "run"), rtol=1e-5)


def test_when_everything_is_damaged_quarantine_ends(config: PretrainConfig) -> None:
    config = replace(
        config, data=replace(config.data, on_damage="quarantine"), run=replace(config.run, max_consecutive_nonfinite=3)
    )
    trainer = trainer_of(config)
    (Path(config.data.store) / DATA).write_bytes(b"")
    with pytest.raises(DataRefused, match=f"{DATA} ends at byte 0 of .* damaged 3 times in a row"):
        trainer.fit()
