"""`launch/generate.py` as a user meets it: on a run's folder, its two streams, its exit codes."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.convert import main as convert
from launch.generate import main

ROOT = Path(__file__).resolve().parents[2]
LINE = re.compile(
    r"(\d+) tokens, [\d.]+ tokens/s with the prompts, [\d.]+% of \d+ drafts accepted, "
    r"[\d.]+ tokens a pass of the model\n"
)


def test_text_goes_to_stdout_and_one_line_to_stderr(
    trained_run: Path, run_command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = run_command("launch/generate.py", trained_run, "--prompt", "the king", "--max-tokens", "12", "--seed", "3")
    assert done.stdout.startswith("the king")
    assert done.stdout.endswith("\n")
    (found,) = LINE.fullmatch(done.stderr).groups()  # type: ignore[union-attr]
    assert 1 <= int(found) <= 12


def test_greedy_text_is_the_same_with_and_without_drafts(trained_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # FP32: a rounding can hardly turn a choice here.
    common = [str(trained_run), "--prompt", "the king", "--prompt", "", "--max-tokens", "10", "--precision", "fp32"]
    assert main([*common, "--draft"]) == 0
    drafted = capsys.readouterr()
    assert main([*common, "--no-draft"]) == 0
    plain = capsys.readouterr()
    assert drafted.out == plain.out
    assert plain.out.startswith("--- 1 of 2 ---\nthe king")
    assert "drafts" in drafted.err
    assert "drafts" not in plain.err


def test_a_seed_repeats_its_text_and_another_does_not(trained_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        assert (
            main([str(trained_run), "--max-tokens", "30", "--temperature", "1", "--top-p", "0.9", "--seed", seed]) == 0
        )
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_an_export_and_its_import_write_what_the_run_writes(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # FP32, so that the router is not rounded on the way.
    assert convert(["export", str(trained_run), str(tmp_path / "hf"), "--format", "fp32"]) == 0
    assert convert(["import", str(tmp_path / "hf"), str(tmp_path / "back")]) == 0
    capsys.readouterr()
    texts, sampled = [], ["--temperature", "1", "--seed", "4", "--precision", "fp32"]
    for model in (trained_run, tmp_path / "hf", tmp_path / "back"):
        assert main([str(model), "--prompt", "the", "--max-tokens", "20", *sampled]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2]


def test_a_reader_that_has_seen_enough_ends_it_without_a_word(trained_run: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the king\n" * 3000)
    command = [
        sys.executable,
        "launch/generate.py",
        str(trained_run),
        "--prompts-file",
        str(prompts),
        "--max-tokens",
        "40",
    ]
    with subprocess.Popen(
        command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(8) == b"--- 1 of"
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == -signal.SIGPIPE


def test_measure_says_what_drafting_gains(trained_run: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured = ["--measure", str(store / "heldout"), "--prompt-tokens", "8", "--max-tokens", "5"]
    assert main([str(trained_run), *measured]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("6 prompts, 5 new tokens each")
    assert re.match(r"acceptance rate [\d.]+% of \d+ drafts", lines[1])


WRONG = {
    "no folder": (["runs/none"], "there is no folder runs/none"),
    "no checkpoint": (["tests"], "tests holds no model: give a run's folder with checkpoints"),
    "temperature": (["RUN", "--temperature", "-1"], "temperature: -1.0 must be"),
    "top-p": (["RUN", "--top-p", "0"], "top_p: 0.0 must be"),
    "max tokens": (["RUN", "--max-tokens", "0"], "max_tokens: 0 must be at least 1"),
    "tokenizer": (["RUN", "--tokenizer", "none.json"], "there is no file none.json"),
    "device": (["RUN", "--device", "tpu"], "device: tpu is not available here"),
    "average": (["RUN", "--weights", "ema"], "holds no moving average"),
    "prompts": (["RUN", "--prompts-file", "none.txt"], "none.txt cannot be read"),
    "store": (["RUN", "--measure", "tests"], "tests holds no manifest.json"),
    "batch": (["RUN", "--batch-tokens", "0"], "--batch-tokens 0 must be 1 or more"),
}


@pytest.mark.parametrize(("arguments", "sentence"), WRONG.values(), ids=WRONG.keys())
def test_bad_input_is_one_sentence_and_exit_code_2(
    arguments: list[str], sentence: str, trained_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(trained_run) if word == "RUN" else word for word in arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("generate: ")
    assert sentence in shown.err
    assert shown.err.count("\n") == 1


def test_a_run_whose_store_is_gone_asks_for_the_tokenizer(
    trained_run: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hidden = store.with_name("moved")
    store.rename(hidden)
    try:
        assert main([str(trained_run)]) == 2
        assert "give --tokenizer tokenizer.json" in capsys.readouterr().err
        assert main([str(trained_run), "--max-tokens", "3", "--tokenizer", str(hidden / "tokenizer.json")]) == 0
    finally:
        hidden.rename(store)
