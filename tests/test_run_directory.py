"""A run's directory is made, locked and tidied first; what is wrong with it is one sentence."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from train.run_directory import locked

ROOT = Path(__file__).resolve().parents[1]
HOLD = (
    "import sys, time; from pathlib import Path; from train.run_directory import locked\n"
    "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(600)"
)


def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path: Path) -> None:
    run = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with (
            pytest.raises(ValueError, match=rf"{run} is in use: process {holder.pid} on \S+ trains there"),
            locked(run),
        ):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with locked(run):
            pass
    finally:
        holder.kill()
        holder.wait()


def test_a_lock_that_says_nothing_still_refuses(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="in use: another process trains there"), locked(tmp_path):
            pass


def test_a_file_system_without_locks_is_used_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with caplog.at_level(logging.WARNING), locked(tmp_path):
        pass
    assert "has no locks" in caplog.text


def test_a_directory_that_cannot_be_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(ValueError, match=r"file/run, which cannot be used: Not a directory"),
        locked(tmp_path / "file/run"),
    ):
        pass
    with pytest.raises(ValueError, match="File name too long"), locked(tmp_path / ("x" * 300)):
        pass

    def refused(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "pwrite", lambda *_: 4096)
    with pytest.raises(ValueError, match="No space left on device"), locked(tmp_path / "nearly full"):
        pass
    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(ValueError, match="Read-only file system"), locked(tmp_path / "other"):
        pass


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints", "wandb", ".writing-config.yaml", "lock"])
def test_a_link_out_of_the_directory_is_refused_and_its_target_untouched(tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    outside.write_text("another's")
    run = tmp_path / "run"
    run.mkdir()
    (run / name).symlink_to(outside)
    with pytest.raises(ValueError, match=rf"run/{name} is a link to {outside}"), locked(run):
        pass
    assert outside.read_text() == "another's"


def test_a_link_to_itself_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with locked(tmp_path):
        pass


def test_what_a_killed_save_left_is_cleared_away_and_links_inside_stay(tmp_path: Path) -> None:
    half = tmp_path / "checkpoints" / ".writing-step_00000005"
    half.mkdir(parents=True)
    (half / "shard").write_bytes(b"x" * 1000)
    (tmp_path / "best").symlink_to(tmp_path / "checkpoints")
    with locked(tmp_path):
        assert not half.exists()
        assert (tmp_path / "best").is_symlink()
