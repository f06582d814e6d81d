"""The console shows loss, MTP loss, tokens/s, MaxVio and ETA, and says no more than that."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest
from rich.console import Console

from train.assemble import at_first
from train.config import compose
from train.observe.console import ConsoleSink
from train.observe.sentences import opening
from train.schedules import scheduled_values


def show(*, terminal: bool, steps: range) -> str:
    """What a run prints that sees 100 tokens in 0.5 s a step."""
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=110, color_system=None)
    sink = ConsoleSink(progress=True, every_steps=10, total_tokens=13_000, name="tiny_fp8", console=console)
    losses = {"loss/main": 3.2144, "loss/mtp": 3.8756}
    others = {"speed/tokens_per_s": 12345.6, "moe/max_violation_ratio": 0.3149}
    for step in steps:
        sink.write({"step": step, "tokens_seen": 100 * step, "time_unix_s": 1000.0 + 0.5 * step} | losses | others)
    sink.event({"event": "checkpoint", "step": steps[-1]})
    sink.event({"event": "skip", "step": steps[-1]})
    sink.close()
    return screen.getvalue()


def test_without_a_terminal_there_is_one_line_every_few_steps():
    lines = show(terminal=False, steps=range(1, 26)).splitlines()
    # Steps 10 and 20 are due; step 25 is the last one known when something is announced.
    assert [line.split()[2] for line in lines[:3]] == ["10", "20", "25"]
    assert lines[3] == "tiny_fp8  step 25 skipped: loss or gradient not finite"
    assert len(lines) == 4


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_output_that_cannot_be_written_ends_no_run(terminal: bool, full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full" if full else writer, "w") as output:
        # rich puts another file in the place of stdout.
        monkeypatch.setattr(sys, "stdout", output)
        console = Console(file=output, force_terminal=terminal, width=110)
        sink = ConsoleSink(progress=True, every_steps=1, total_tokens=None, name="x", console=console)
        for step in (1, 2):
            sink.write({"step": step, "tokens_seen": step, "time_unix_s": float(step)})
            sink.event({"event": "resume", "step": step})
        sink.close()
        assert console.quiet


def test_a_line_holds_every_number_and_a_right_eta():
    line = show(terminal=False, steps=range(1, 11)).splitlines()[0]
    # 13 000 - 1 000 tokens to come at 200 tokens/s is a minute.
    assert line.split("  ")[-5:] == ["loss 3.214", "mtp 3.876", "MaxVio 0.31", "12.3k tok/s", "ETA 1:00"]


def test_a_terminal_gets_a_bar_with_the_same_numbers():
    text = show(terminal=True, steps=range(1, 66))
    last = text[text.rindex("tiny_fp8") :]
    assert "━" in last
    assert " 50 %" in last
    for part in ("loss 3.214", "mtp 3.876", "12.3k tok/s", "MaxVio 0.31", "ETA 0:32"):
        assert part in last


def test_a_record_without_optional_numbers_is_shown():
    screen = io.StringIO()
    console = Console(file=screen, width=80)
    sink = ConsoleSink(progress=True, every_steps=1, total_tokens=None, name="x", console=console)
    sink.write({"step": 1, "tokens_seen": 10, "time_unix_s": 0.0})
    sink.event({"event": "evaluation", "step": 1, "time_unix_s": 0.0, "eval/bits_per_byte": 1.81})
    sink.close()
    assert screen.getvalue().splitlines()[1] == "x  step 1: held-out 1.8100 bits per byte"


def test_a_run_says_until_when_another_schedule_runs():
    """h800_2048 under DualPipeV: the last step with fewer than 32 micro-batches a pipeline, by walking the ramp."""
    config = compose(["+cluster=h800_2048", "layout.schedule=DualPipeV"])
    step = tokens_seen = 0
    while (now := scheduled_values(config.schedule, step=step, tokens_seen=tokens_seen)).batch_sequences < 32 * 128:
        tokens_seen += 4096 * now.batch_sequences
        step += 1
    first = at_first(config)
    assert first == {"schedule": "ZBVZeroBubble", "until_step": step, "micro_batches": 32}
    card = {
        "layout": {"pp": 16, "dp": 128, "ep": 64, "schedule": "DualPipeV"}, "at_first": first, "device": "cpu",
        "parameters": {"total": 1, "active": 1, "mtp": 0}, "threads": 1, "precision": "fp8", "torch": "2",
        "tokens_total": 1, "sequence_length": 1, "deterministic": True,
    }  # fmt: skip
    sentence = (
        f"pipeline: ZBVZeroBubble until step {step:,}, on the same stages: the batch ramp gives fewer than the 32 "
    )
    lines = [opening(card, directory=Path("runs"), num_steps=9, step=at, every_steps=1) for at in (0, step - 1, step)]
    assert [f"{sentence}micro-batches of DualPipeV" in each for each in lines] == [True, True, False]
    # Under ZBV itself there is nothing to say.
    assert at_first(compose(["+cluster=h800_2048"])) is None
