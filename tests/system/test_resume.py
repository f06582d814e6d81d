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

from tests.huggingface.hf_folders import tensors_of
from tests.system.lives import losses, wait_for_step
from train.checkpoint.dcp import latest
from train.observe.sinks import read_events, read_run

ROOT = Path(__file__).resolve().parents[2]
# As in the fixture `small_run`.
STEPS, EVERY = 24, 5
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
    return small_run(f"precision={request.param}")


@pytest.fixture(scope="module")
def unbroken(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("unbroken")
    finish(start(overrides, directory))
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


def test_kill_9_loses_only_the_steps_since_the_last_save(overrides: list[str], unbroken: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    # Killed twice, each time some steps after a new checkpoint was published.
    for published in ("step_00000005", "step_00000015"):
        process = start(overrides, tmp_path)
        checkpoint = run / "checkpoints" / published
        wait_for_step(process, run, lambda step, path=checkpoint: path.exists() and step % EVERY in (2, 3))
        process.send_signal(signal.SIGKILL)
        process.wait(TIMEOUT_S)
        logged = read_run(run)[-1]["step"]
        saved = latest(run / "checkpoints")
        assert saved is not None
        # At most the interval under way, and the one before it while its save is still being written.
        assert logged - int(saved.name.removeprefix("step_")) < 2 * EVERY, (logged, saved.name)
    finish(start(overrides, tmp_path))
    assert_same_run(run, unbroken)
    resumed = [event["step"] for event in read_events(run) if event["event"] == "resume"]
    assert len(resumed) == 2
    assert all(step % EVERY == 0 for step in resumed)


# How a run ends does not depend on its precision.
only_bf16 = pytest.mark.parametrize("overrides", ["bf16"], indirect=True)


@only_bf16
def test_sigterm_finishes_the_step_saves_and_exits_0(overrides: list[str], unbroken: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(overrides, tmp_path)
    wait_for_step(process, run, lambda step: step >= 8)
    process.terminate()
    finish(process)
    stopped = read_run(run)[-1]["step"]
    assert stopped < STEPS
    assert latest(run / "checkpoints") == run / "checkpoints" / f"step_{stopped:08d}", "nothing done is lost"
    finish(start(overrides, tmp_path))
    assert_same_run(run, unbroken)


@only_bf16
def test_a_checkpoint_of_another_model_is_refused_with_the_field(overrides: list[str], unbroken: Path) -> None:
    process = start([*overrides, "model.routed_scaling_factor=3.5"], unbroken.parent)
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 2
    assert "saved with another model: routed_scaling_factor was 1.25, now 3.5" in output
    assert "Traceback" not in output
