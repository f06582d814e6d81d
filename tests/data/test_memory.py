"""Preparing is bounded by bytes: the same 8 MB take as much memory as short documents, long ones or one line."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PEAK = """
import resource, subprocess, sys
subprocess.run([sys.executable, "launch/prepare.py", *sys.argv[1:]], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def peak(folder: Path, tokenizer: str, *, documents: int) -> int:
    """Of preparing 8 MB of words in so many documents; in the system's unit."""
    chooser, text = random.Random(0), (ROOT / "data/king_james_bible/text.jsonl").read_text()[:200_000].split()
    words = "".join(f"{chooser.choice(text)} " for _ in range(1_500_000))[:8_000_000]
    share, out = len(words) // documents, folder / str(documents)
    rows = (json.dumps({"text": words[start : start + share]}) + "\n" for start in range(0, len(words), share))
    (folder / "text.jsonl").write_text("".join(rows))
    options = ["--source", str(folder / "text.jsonl"), "--out", str(out), "--heldout", "0", "--tokenizer", tokenizer]
    command = [sys.executable, "-c", PEAK, *options]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, check=True
    )
    return int(done.stdout)


@pytest.mark.long
def test_memory_does_not_depend_on_the_length_of_documents(tmp_path: Path) -> None:
    short = peak(tmp_path, "bpe", documents=8000)
    tokenizer = str(tmp_path / "8000/tokenizer.json")
    # Measured: 218 MiB short, 207 long, 289 as one line (which is held whole, and its ids too); before, a batch was
    # 1,000 documents: 266 short, 679 long.
    assert peak(tmp_path, tokenizer, documents=8) < 1.25 * short
    assert peak(tmp_path, tokenizer, documents=1) < 1.8 * short
