"""Crash safety, proved by killing the run: what resumes is bit for bit the run that was never broken.

Equality is exact (deterministic algorithms, one thread): losses of every step, and every tensor of the last
checkpoint: parameters, FP32 masters, moments, router biases, RNG.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from launch import pretrain
from tests.huggingface.hf_folders import tensors_of
from tests.system.lives import losses, wait_for_step
from train.assemble import build_alone
from train.checkpoint.dcp import latest
from train.config import compose
from train.observe.sinks import read_events, read_run
from train.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
# EVERY as in the fixture `small_run`.
STEPS, EVERY = 20, 5
TIMEOUT_S = 300


def start(overrides: list[str], directory: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "launch/pretrain.py", *overrides, f"run.directory={directory}", "run.name=run"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, output


def state(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = run / "checkpoints" / f"step_{STEPS:08d}"
    assert latest(checkpoint.parent) == checkpoint
    return tensors_of(checkpoint)


@pytest.fixture(scope="module", params=["bf16", pytest.param("fp8", marks=pytest.mark.long)])
def overrides(request: pytest.FixtureRequest, small_run: Callable[..., list[str]]) -> list[str]:
    return small_run(f"precision={request.param}", f"schedule.total_tokens={STEPS * 64}", "data.heldout=null")


@pytest.fixture(scope="module")
def unbroken(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In this process."""
    directory = tmp_path_factory.mktemp("unbroken")
    config = compose([*overrides, f"run.directory={directory}", "run.name=run"])
    Trainer(config, build_alone(config)).fit()
    return directory / "run"


def assert_same_run(broken: Path, unbroken: Path) -> None:
    assert losses(broken) == losses(unbroken)
    assert len(losses(broken)) == STEPS
    expected, actual = state(unbroken), state(broken)
    assert actual.keys() == expected.keys()
    assert {name.partition(".")[0] for name in expected} == {"model", "optim", "rng"}
    assert any("e_score_correction_bias" in name for name in expected)
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not different
    assert not [event for event in read_events(broken) if event["event"] == "replay_differs"]


def test_kill_9_loses_only_the_steps_since_the_last_save_and_sigterm_none(
    overrides: list[str], unbroken: Path, tmp_path: Path
) -> None:
    """Killed after a checkpoint was published, then, in the next process, asked to stop; the third one ends the run."""
    run = tmp_path / "run"
    checkpoint = run / "checkpoints/step_00000005"
    process = start(overrides, tmp_path)
    wait_for_step(process, run, lambda step: checkpoint.exists() and step % EVERY in (2, 3))
    process.send_signal(signal.SIGKILL)
    process.wait(TIMEOUT_S)
    logged = read_run(run)[-1]["step"]
    saved = latest(run / "checkpoints")
    assert saved is not None
    # At most the interval under way, and the one before it while its save is still being written.
    assert logged - int(saved.name.removeprefix("step_")) < 2 * EVERY, (logged, saved.name)

    process = start(overrides, tmp_path)
    wait_for_step(process, run, lambda step: step > logged)
    process.terminate()
    finish(process)
    stopped = read_run(run)[-1]["step"]
    assert stopped < STEPS
    assert latest(run / "checkpoints") == run / "checkpoints" / f"step_{stopped:08d}", "nothing done is lost"

    finish(start(overrides, tmp_path))
    assert_same_run(run, unbroken)
    resumed = [event["step"] for event in read_events(run) if event["event"] == "resume"]
    assert resumed == [int(saved.name.removeprefix("step_")), stopped]
    assert resumed[0] % EVERY == 0


# A refusal does not depend on the precision.
@pytest.mark.parametrize("overrides", ["bf16"], indirect=True)
def test_a_checkpoint_of_another_model_is_refused_with_the_field(
    overrides: list[str], unbroken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = [*overrides, f"run.directory={unbroken.parent}", "run.name=run"]
    assert pretrain.main([*again, "model.routed_scaling_factor=3.5"]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert "saved with another model: routed_scaling_factor was 1.25, now 3.5" in sentence
