"""Links among checkpoints: none is read, replaced or deleted through; an archived checkpoint ends no run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from train.checkpoint import publish
from train.checkpoint.config import CheckpointConfig
from train.checkpoint.dcp import Saver, latest, load

TENSORS = {"w": torch.arange(6.0)}


def save_steps(directory: Path, *steps: int, keep: int = 2) -> None:
    saver = Saver(directory, CheckpointConfig(every_steps=1, keep=keep))
    for step in steps:
        saver.save_async(step, dict(TENSORS), {"step": step})
    saver.close()


def archive(checkpoint: Path, archived: Path) -> Path:
    """Move a checkpoint elsewhere and leave a link, as users do with a full disk."""
    shutil.move(checkpoint, archived)
    checkpoint.symlink_to(archived)
    return archived


def test_an_archived_checkpoint_is_passed_by_and_survives_pruning_and_saving_again(tmp_path: Path) -> None:
    save_steps(tmp_path / "run", 1, 2)
    archived = archive(tmp_path / "run/step_00000002", tmp_path / "archived")
    assert latest(tmp_path / "run") == tmp_path / "run/step_00000001"
    save_steps(tmp_path / "run", 3, 4, 5)
    assert [path.name for path in publish.published(tmp_path / "run")] == ["step_00000005", "step_00000004"]
    assert (tmp_path / "run/step_00000002").is_symlink()
    publish.verify(archived)
    save_steps(tmp_path / "run", 2, keep=9)
    assert latest(tmp_path / "run") == tmp_path / "run/step_00000005"
    assert not (tmp_path / "run/step_00000002").is_symlink(), "a step saved again replaces the link, not what it shows"
    publish.verify(archived)


@pytest.mark.parametrize("file", ["state.json", "manifest.json", "shard-00001-model-00001-of-00001.safetensors"])
def test_a_file_that_is_a_link_is_damage(tmp_path: Path, file: str) -> None:
    save_steps(tmp_path / "run", 1)
    path = tmp_path / "run/step_00000001" / file
    shutil.move(path, tmp_path / file)
    path.symlink_to(tmp_path / file)
    with pytest.raises(ValueError, match=f"step_00000001 is damaged: {file} is a link"):
        load(path.parent, {"w": torch.zeros(6)})


def test_a_link_that_leads_nowhere_gives_way_to_a_save_of_its_step(tmp_path: Path) -> None:
    (tmp_path / "step_00000001").symlink_to(tmp_path / "gone")
    save_steps(tmp_path, 1)
    assert latest(tmp_path) == tmp_path / "step_00000001"


@pytest.mark.parametrize("hidden", [".writing-step_00000001", ".pruned-step_00000001"])
def test_sweeping_removes_a_planted_link_and_not_its_target(tmp_path: Path, hidden: str) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/file").write_text("another's")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / hidden).symlink_to(tmp_path / "outside")
    save_steps(tmp_path / "run", 1)
    assert (tmp_path / "outside/file").read_text() == "another's"
    publish.verify(tmp_path / "run/step_00000001")
