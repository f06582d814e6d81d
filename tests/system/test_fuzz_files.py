"""Damaged files of every kind give one sentence or a right answer, and what tries them sees each kind of defect."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import fuzz_files
from tests.fuzz_readers import Reader


@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.long)])
def test_damaged_files_each_give_a_sentence_or_a_right_answer(count: int) -> None:
    command = [sys.executable, "-m", "tests.fuzz_files", "--count", str(count), "--seed", "2"]
    done = subprocess.run(command, cwd=fuzz_files.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def no_sentence(folder: Path) -> None:
    raise ValueError("invalid literal")


def two_lines(folder: Path) -> None:
    raise ValueError("file.json is damaged\nsee above")


DEFECTS: dict[str, Callable[[Path], object]] = {
    "wrong answer": lambda _: 2,
    "traceback of KeyError": lambda _: {}["x"],
    "names neither file nor field": no_sentence,
    "has several lines": two_lines,
    "hang": lambda _: time.sleep(60),
    "process died (-9)": lambda _: os.kill(os.getpid(), signal.SIGKILL),
    "read outside its folder": lambda folder: (folder.parents[1] / "secret").read_bytes(),
}


@pytest.mark.parametrize("kind", DEFECTS)
def test_each_kind_of_defect_is_seen(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_files, "HANG_S", 0.2)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/file.json").write_text('{"field": 1}')
    (tmp_path / "secret").write_text("")

    def read(folder: Path) -> object:
        file = folder / "file.json"
        return 1 if file.is_file() and file.read_text() == '{"field": 1}' else DEFECTS[kind](folder)

    reader = Reader(tmp_path / "corpus", read, share=1, equal=True)
    # Damage that happens to change nothing is read rightly.
    found = fuzz_files.outcomes("any", reader, tmp_path / "work", 1, range(5))
    assert {outcome.kind for _, _, outcome in found.values()} - {"right"} == {kind}
