"""kill -9 at any moment of a save leaves a whole checkpoint, and finished processes exit with 0."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.checkpoint.killed_saves import ENDED, KILLED_AT_RANDOM, PHASES, tensors_of
from train.checkpoint.config import CheckpointConfig
from train.checkpoint.dcp import Saver, latest, load


@dataclass(frozen=True)
class Outcome:
    """What `killed_saves` left in `root` and reported."""

    root: Path
    returncode: int
    stderr: str
    signals: dict[str, int]
    statuses: list[int]


def value_of(path: Path) -> int:
    """Load a checkpoint; its tensors and its state must come from the same save."""
    tensors = {name: torch.zeros_like(tensor) for name, tensor in tensors_of(0).items()}
    value = int(load(path, tensors)["value"])
    assert all(torch.equal(tensors[name], tensor) for name, tensor in tensors_of(value).items())
    return value


@pytest.fixture(scope="module")
def killed(
    tmp_path_factory: pytest.TempPathFactory, run_command: Callable[..., subprocess.CompletedProcess[str]]
) -> Outcome:
    root = tmp_path_factory.mktemp("killed")
    done = run_command("-m", "tests.checkpoint.killed_saves", root, check=False)
    assert done.stdout, done.stderr
    return Outcome(root, done.returncode, done.stderr, **json.loads(done.stdout))


@pytest.mark.parametrize("phase", PHASES)
def test_a_whole_checkpoint_is_found_after_kill_9(killed: Outcome, phase: str) -> None:
    directory = killed.root / str(list(PHASES).index(phase))
    assert killed.signals[phase] == signal.SIGKILL, "the save was over before the fault"
    found = latest(directory)
    assert found is not None
    assert value_of(found) == (1 if phase.startswith("old") else 2)
    # The next process clears up and goes on.
    saver = Saver(directory, CheckpointConfig(every_steps=1, keep=1))
    saver.save_async(3, tensors_of(3), {"value": 3})
    saver.close()
    assert [path.name for path in directory.iterdir()] == ["step_00000003"]
    assert value_of(directory / "step_00000003") == 3


@pytest.mark.parametrize("number", range(KILLED_AT_RANDOM))
def test_saves_killed_at_random_moments_leave_whole_checkpoints(killed: Outcome, number: int) -> None:
    directory = killed.root / f"random_{number}"
    published = sorted(directory.glob("step_*"))
    assert latest(directory) == published[-1]
    for path in published:
        assert value_of(path) == int(path.name.removeprefix("step_"))


@pytest.mark.parametrize("number", range(ENDED))
def test_processes_exit_cleanly_with_and_without_close(killed: Outcome, number: int) -> None:
    """A thread that outlives the interpreter aborts it with signal 6, in one run of several."""
    assert killed.statuses[number] == 0
    assert value_of(killed.root / f"ended_{number}" / "step_00000003") == 3


def test_processes_that_were_not_forked_exit_cleanly(killed: Outcome) -> None:
    """The driver itself ends with 0 and a silent stderr, and so have all its children."""
    assert (killed.returncode, killed.stderr) == (0, "")
