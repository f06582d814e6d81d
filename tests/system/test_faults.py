"""Faults done to a real training, and what holds: docs/reliability.md has the table.

Runs are small (`small_run`): 10 steps of 2 x 32 tokens, a checkpoint every 5 steps.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest

from launch import pretrain
from tests.huggingface.hf_folders import flip_a_bit
from tests.system.lives import losses, wait_for_step
from train.assemble import build_alone
from train.checkpoint import publish
from train.config import PretrainConfig, compose
from train.observe.guards import SavesFailed, TrainingStopped
from train.observe.sinks import read_events, read_run
from train.spikes import SpikeState
from train.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 300
Overrides = Callable[..., list[str]]
on_linux = pytest.mark.skipif(
    sys.platform != "linux",
    reason="/proc and the kernel's signal on a parent's death are Linux's; `.ci/run` runs it there",
)


@pytest.fixture
def config(small_config: Callable[..., PretrainConfig], tmp_path: Path) -> PretrainConfig:
    return small_config(tmp_path, "schedule.total_tokens=640")


@pytest.fixture(scope="module")
def unbroken(small_config: Callable[..., PretrainConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `config` without a fault."""
    folder = tmp_path_factory.mktemp("unbroken")
    trainer_of(small_config(folder, "schedule.total_tokens=640")).fit()
    return folder / "run"


def trainer_of(config: PretrainConfig) -> Trainer:
    trainer = Trainer(config, build_alone(config))
    trainer.resume()
    return trainer


def launched(overrides: list[str], *, ranks: int = 0) -> subprocess.Popen[str]:
    """`launch/pretrain.py`, under torchrun if ranks are given."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks else []
    command = [sys.executable, *torchrun, "launch/pretrain.py", *overrides]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_two_trainers_in_one_directory_the_second_is_refused_and_the_first_unharmed(
    small_run: Overrides, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    overrides = small_run(f"run.directory={tmp_path}", "run.name=run", "schedule.total_tokens=640000")
    first = launched(overrides)
    try:
        wait_for_step(first, run, lambda step: step >= 1)
        assert pretrain.main(overrides) == 2
        assert f"run is in use: process {first.pid} on " in capsys.readouterr().err
        seen = read_run(run)[-1]["step"]
        wait_for_step(first, run, lambda step: step > seen)
        first.terminate()
        output, _ = first.communicate(timeout=TIMEOUT_S)
    finally:
        first.kill()
    assert first.returncode == 0, output
    # Each step once, and the last one saved.
    assert publish.published(run / "checkpoints")[0].name == f"step_{len(losses(run)):08d}"
    assert [event["event"] for event in read_events(run)].count("start") == 1


@on_linux
def test_a_worker_whose_torchrun_was_killed_saves_and_stops(small_run: Overrides, tmp_path: Path) -> None:
    run = tmp_path / "run"
    overrides = small_run(f"run.directory={tmp_path}", "run.name=run", "schedule.total_tokens=640000")
    launcher = launched(overrides, ranks=1)
    wait_for_step(launcher, run, lambda step: step >= 2)
    (worker,) = children(launcher.pid)
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + TIMEOUT_S
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{worker}").exists()
    stop = read_events(run)[-1]
    assert (stop["event"], stop["reason"]) == ("stop", "asked to stop; the same command resumes")
    assert publish.published(run / "checkpoints")[0].name == f"step_{stop['step']:08d}", "nothing done is lost"


def rank_of(pid: int) -> int:
    environment = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return int(next(pair for pair in environment if pair.startswith("RANK="))[5:])


@on_linux
@pytest.mark.long
def test_a_rank_killed_under_torchrun_is_named_and_another_layout_goes_on(small_run: Overrides, tmp_path: Path) -> None:
    """Of four; torchrun ends the others by SIGTERM at once, and they say first who died (of two: test_torchrun.py)."""
    batch = [f"schedule.batch_{which}_sequences=4" for which in ("start", "full")]
    common = [f"run.directory={tmp_path}", "run.name=run", "run.micro_batch_sequences=1", *batch]
    first = small_run("schedule.total_tokens=640000", "layout.dp=4", "layout.ep=2", *common)
    launcher = launched(first, ranks=4)
    run = tmp_path / "run"
    wait_for_step(launcher, run, lambda step: step >= 2 and bool(publish.published(run / "checkpoints")))
    victim = {rank_of(pid): pid for pid in children(launcher.pid)}[2]
    os.kill(victim, signal.SIGKILL)
    output, _ = launcher.communicate(timeout=TIMEOUT_S)
    assert launcher.returncode != 0
    # By the ranks themselves; torchrun's table, where it has one, repeats it indented.
    sentences = [line for line in output.splitlines() if line.startswith("rank ") and "ends because" in line]
    assert sentences
    for sentence in sentences:
        assert " ends because rank 2 (" in sentence
        # It goes on: who has seen it.
        assert f"pid {victim}) is dead: its process has ended" in sentence
    steps = read_run(run)[-1]["step"] + 2
    again = launched(small_run(f"schedule.total_tokens={steps * 4 * 32}", "layout.pp=2", *common), ranks=2)
    output, _ = again.communicate(timeout=TIMEOUT_S)
    assert again.returncode == 0, output
    assert len(losses(run)) == steps


def test_when_every_checkpoint_is_damaged_nothing_is_trained_and_each_is_named(
    config: PretrainConfig, unbroken: Path, tmp_path: Path
) -> None:
    shutil.copytree(unbroken, tmp_path / "run")
    checkpoints = publish.published(tmp_path / "run/checkpoints")
    assert len(checkpoints) == 2
    flip_a_bit(next(checkpoints[0].glob("*.safetensors")))
    (checkpoints[1] / "state.json").unlink()
    with pytest.raises(ValueError, match="is whole, so the run cannot go on") as refused:
        trainer_of(config)
    for path, what in zip(checkpoints, ("does not have the sha256", "state.json is missing"), strict=True):
        assert f"checkpoint {path} is damaged" in str(refused.value)
        assert what in str(refused.value)


@pytest.mark.parametrize(
    ("part", "value", "what"),
    [
        ("train_state", None, "lacks 'train_state' with the fields step,"),
        ("train_state", {"step": 1}, "lacks 'train_state' with the fields step,"),
        ("identity", [], "lacks 'identity'"),
        ("config", "x", "lacks 'config'"),
    ],
)
def test_a_state_that_is_none_is_named_although_its_hash_is_right(
    config: PretrainConfig, trained_run: Path, tmp_path: Path, part: str, value: object, what: str
) -> None:
    shutil.copytree(trained_run, tmp_path / "run")
    (checkpoint,) = publish.published(tmp_path / "run/checkpoints")
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps(state | {part: value}))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    publish.write_manifest(checkpoint, manifest["tensors"])
    with pytest.raises(ValueError, match=f"step_00000003 is damaged: state.json {what}"):
        trainer_of(config)


class Full:
    """A disk that is full for some saves: `publish.write_manifest` fails so often."""

    def __init__(self, failures: int) -> None:
        self.failures, self._write = failures, publish.write_manifest

    def __call__(self, *arguments: object) -> None:
        if self.failures:
            self.failures -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        self._write(*arguments)


def test_two_failed_saves_are_logged_and_the_run_goes_on_bit_for_bit(
    config: PretrainConfig, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "write_manifest", Full(failures=2))
    state = trainer_of(replace(config, checkpoint=replace(config.checkpoint, every_steps=2))).fit()
    events = read_events(tmp_path / "run")
    assert [event["step"] for event in events if event["event"] == "save_failed"] == [4, 6]
    assert "No space left on device" in events[1]["error"]
    assert losses(tmp_path / "run") == losses(unbroken)
    assert publish.published(tmp_path / "run/checkpoints")[0].name == f"step_{state.step:08d}"
    assert not list((tmp_path / "run/checkpoints").glob(".writing-*"))


@pytest.mark.usefixtures("as_root")
def test_on_a_disk_that_is_full_saves_fail_and_records_wait_and_a_start_says_so(
    small_run: Overrides, unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file system of its own, without a byte left from step 4 to step 8."""
    overrides = small_run("schedule.total_tokens=640", f"run.directory={tmp_path}/disk", "checkpoint.every_steps=2")
    filler = tmp_path / "disk/filler"
    filler.parent.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", filler.parent], check=True)
    try:
        trainer = trainer_of(compose([*overrides, "run.name=run"]))
        take_step = trainer.take_step

        def on_a_full_disk(*arguments: object, **named: object) -> None:
            if trainer.state.step == 3:
                trainer.wait_for_save(arguments[0])  # type: ignore[arg-type]
                fill(filler)
            if trainer.state.step == 7:
                filler.unlink()
            take_step(*arguments, **named)  # type: ignore[arg-type]

        trainer.take_step = on_a_full_disk  # type: ignore[method-assign]
        trainer.fit()
        events = read_events(filler.parent / "run")
        assert [event["step"] for event in events if event["event"] == "save_failed"] == [6, 8]
        assert losses(filler.parent / "run") == losses(unbroken)
        fill(filler)
        assert pretrain.main([*overrides, "run.name=run"]) == 2
        assert "No space left on device" in capsys.readouterr().err
    finally:
        subprocess.run(["umount", "-l", filler.parent], check=True)


def fill(filler: Path) -> None:
    """Take the last byte of a file system."""
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 16))


def test_a_clock_that_jumps_a_day_ahead_and_two_back_changes_no_number(
    config: PretrainConfig, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, now = trainer_of(config), time.time
    monkeypatch.setattr(
        time, "time", lambda: now() + 86_400 * ((trainer.state.step >= 3) - 2 * (trainer.state.step >= 6))
    )
    trainer.fit()
    assert losses(tmp_path / "run") == losses(unbroken)
    times = [record["time_unix_s"] for record in read_run(tmp_path / "run")]
    assert max(times) == times[4], "the clock did jump"
    assert trainer_of(config).state == trainer.state, "the newest checkpoint is that of the highest step"


def test_three_failed_saves_in_a_row_end_the_run_with_the_older_checkpoint_whole(
    config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(config)
    take_step = trainer.take_step

    def full_from_step_6_on(*arguments: object, **named: object) -> None:
        if trainer.state.step == 6:
            trainer.wait_for_save(arguments[0])  # type: ignore[arg-type]
            monkeypatch.setattr(publish, "write_manifest", Full(failures=99))
        take_step(*arguments, **named)  # type: ignore[arg-type]

    trainer.take_step = full_from_step_6_on  # type: ignore[method-assign]
    with pytest.raises(SavesFailed, match=r"No space left on device.*save 3 of that kind in a row") as stopped:
        trainer.fit()
    assert stopped.value.exit_code == 4
    stop = read_events(tmp_path / "run")[-1]
    assert (stop["event"], stop["exit_code"]) == ("stop", 4)
    assert [path.name for path in publish.published(tmp_path / "run/checkpoints")] == ["step_00000005"]
    monkeypatch.undo()
    assert trainer_of(config).state.step == 5


def test_a_run_that_stops_and_cannot_save_says_so_in_its_last_event(
    config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "write_manifest", Full(failures=99))
    trainer = trainer_of(config)
    monkeypatch.setattr(SpikeState, "score", Mock(side_effect=[None, TrainingStopped("hopeless")]))
    with pytest.raises(SavesFailed):
        trainer.fit()
    stop = read_events(tmp_path / "run")[-1]
    assert stop["event"] == "stop"
    assert "No space left on device" in stop["reason"]


def test_killed_in_the_last_evaluation_nothing_is_lost_and_the_next_start_scores(
    config: PretrainConfig, unbroken: Path, tmp_path: Path
) -> None:
    trainer = trainer_of(config)

    def killed() -> float:
        raise MemoryError

    trainer.evaluate = killed  # type: ignore[method-assign]
    with pytest.raises(MemoryError):
        trainer.fit()
    steps = trainer.state.step
    assert read_run(tmp_path / "run")[-1]["step"] == steps
    assert publish.published(tmp_path / "run/checkpoints")[0].name == f"step_{steps:08d}"
    trainer_of(config).fit()
    trainer_of(config).fit()
    scores = [event for event in read_events(tmp_path / "run") if event["event"] == "evaluation"]
    assert [score["step"] for score in scores] == [steps], "scored once, by the process that came next"
    assert read_run(unbroken)[-1]["eval/bits_per_byte"] == scores[0]["eval/bits_per_byte"]
