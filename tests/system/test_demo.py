"""`make demo`'s own program with a budget of 20 steps: every part runs, and everything it promises is printed."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import demo
from tests.system.conftest import SMALLER
from train.observe.sinks import read_run

# The held-out text is 35,000 tokens, so long sequences make the scores cheap.
STEPS, TOKENS = 20, 256
BATCH = "schedule.batch_start_sequences=2 schedule.batch_full_sequences=2 run.micro_batch_sequences=2"
BUDGET = f"data.sequence_length={TOKENS} schedule.total_tokens={STEPS * 2 * TOKENS}"
SHORT = [*SMALLER, *f"{BUDGET} {BATCH} run.threads=1 run.device=cpu".split()]


def table(output: str) -> list[tuple[str, str]]:
    """Rows of the printed table: (model, bits per byte)."""
    return re.findall(r"│ (\S+).*? │ +(\d+\.\d{3}) +│", output)


@pytest.fixture(scope="module")
def ran(checkout: Path, run_command: Callable[..., subprocess.CompletedProcess[str]]) -> tuple[Path, str]:
    """The checkout after a demo in it, and what that printed."""
    command = [checkout / "launch/demo.py", *SHORT]
    return checkout, run_command(*command, cwd=checkout, PYTHONPATH=str(checkout), timeout_s=600).stdout


def test_both_runs_saw_the_same_tokens_for_twenty_steps(ran: tuple[Path, str]) -> None:
    place, _ = ran
    bf16, fp8 = (read_run(place / "runs/demo" / name) for name in ("bf16", "fp8"))
    assert [r["step"] for r in bf16] == [r["step"] for r in fp8] == list(range(1, STEPS + 1))
    assert bf16[-1]["tokens_seen"] == fp8[-1]["tokens_seen"] == STEPS * 2 * TOKENS
    # Same tokens and initial values: the first losses differ by FP8's rounding of one forward only (a few per mille
    # of ln 512), while two different batches would differ by more than a hundredth.
    assert abs(bf16[0]["loss/main"] / fp8[0]["loss/main"] - 1) < 0.01
    assert bf16[0]["loss/main"] != fp8[0]["loss/main"], "FP8 must not be BF16 under another name"


def test_scores_baselines_and_gap_are_printed(ran: tuple[Path, str]) -> None:
    place, output = ran
    for name in ("bf16", "fp8", "bigram", "unigram", "xz"):
        assert re.search(rf"{name}.*?\d\.\d{{3}}", output), output
    assert re.search(r"smoothed loss gap [+-]\d+\.\d\d%", output)
    summary = json.loads((place / "runs/demo/fp8/summary.json").read_text())
    assert f"{summary['heldout_bits_per_byte']:.3f}" in output


def test_the_page_is_self_contained_and_shows_both_runs(ran: tuple[Path, str]) -> None:
    place, output = ran
    page = place / "runs/demo/loss_curves.html"
    assert str(page) in output
    text = page.read_text(encoding="utf-8")
    assert all(name in text for name in ("bf16", "fp8"))
    assert not re.search(r"<(script|link|img|iframe)[^>]*(src|href)=[\"']https?://", text)


def test_a_finished_demo_is_shown_again_without_training(
    ran: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process."""
    place, output = ran
    log = place / "runs/demo/bf16/metrics.jsonl"
    records = [line for line in log.read_text().splitlines() if '"event"' not in line]
    monkeypatch.chdir(place)
    assert demo.main(SHORT) == 0
    again = capsys.readouterr().out
    assert [line for line in log.read_text().splitlines() if '"event"' not in line] == records
    assert table(again) == table(output)
    assert len(table(output)) == 5
