"""The commands that README and docs/first_hour.md show, run as they stand (the two `make` commands apart).

Shell blocks are read from the documents themselves: a command that changes there is tested as changed. Training
commands get a smaller budget appended; nothing else is touched.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ("README.md", "docs/first_hour.md")
SHORT = ["schedule.total_tokens=1024", "data.sequence_length=64", "schedule.batch_start_sequences=2"]
SHORT += ["schedule.batch_full_sequences=2", "run.micro_batch_sequences=2", "run.threads=1", "run.device=cpu"]


def shell_blocks(document: str) -> list[str]:
    """Lines of fenced blocks without a language; a line that begins with `$` shows output and is left out."""
    text = (ROOT / document).read_text(encoding="utf-8")
    lines = []
    for block in re.findall(r"^```\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
        if not block.startswith("$"):
            lines += [line.split("#")[0].strip() for line in block.splitlines()]
    return [line for line in lines if line]


def run(command: str, place: Path) -> subprocess.CompletedProcess[str]:
    words = shlex.split(command)
    if "launch/pretrain.py" in words and "--config" not in words:
        words += [word for word in SHORT if word.split("=")[0] not in command]
    binaries = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(place)
    return subprocess.run(
        words,
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        stdin=subprocess.DEVNULL,
    )


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_of_the_document_runs(document: str, checkout: Path) -> None:
    commands = shell_blocks(document)
    assert commands
    ran = 0
    for command in commands:
        if command.startswith((". ", "make ", "git ", "cd ")) or command == "make demo":
            continue
        done = run(command, checkout)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        ran += 1
    assert ran >= 3


def test_a_mistyped_key_is_refused_as_the_document_shows(checkout: Path) -> None:
    text = (ROOT / "docs/first_hour.md").read_text(encoding="utf-8")
    shown = re.search(r"^\$ torchrun (launch/pretrain.py .*)\n(pretrain: .*)$", text, flags=re.MULTILINE)
    assert shown is not None
    before = sorted(checkout.glob("runs/*"))
    done = run(f"python {shown[1]}", checkout)
    assert done.returncode == 2
    assert done.stderr.strip() == shown[2]
    assert sorted(checkout.glob("runs/*")) == before, "refused before anything is made"


def test_the_h100_cluster_says_what_it_needs_or_composes(checkout: Path) -> None:
    done = run("python launch/pretrain.py +cluster=h100_1 --config", checkout)
    assert done.returncode == 0, done.stderr
    assert "device: cuda" in done.stdout
    refused = run("python launch/pretrain.py +cluster=h100_1 run.device=cuda", checkout)
    assert refused.returncode == 2
    assert refused.stderr.startswith("pretrain: ")
    assert len(refused.stderr.strip().splitlines()) == 1
