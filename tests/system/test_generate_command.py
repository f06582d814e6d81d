"""`launch/generate.py` as a user meets it: on a run's folder, its two streams, its exit codes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.convert import main as convert
from launch.generate import main
from train.huggingface.weights import open_weights
from train.model.precision import Precision

ROOT = Path(__file__).resolve().parents[2]
LINE = r"(\d+) tokens, N tokens/s with the prompts, N% of \d+ drafts accepted, N tokens a pass of the model\n"


@pytest.fixture
def generated(capsys: pytest.CaptureFixture[str]) -> Any:
    """Both streams of the command."""

    def run(model: Path, *flags: str, code: int = 0) -> Any:
        capsys.readouterr()
        assert main([str(model), *flags]) == code
        return capsys.readouterr()

    return run


def test_text_goes_to_stdout_and_one_line_to_stderr(trained_run: Path, generated: Any) -> None:
    done = generated(trained_run, "--prompt", "the king", "--max-tokens", "12", "--seed", "3", "--draft")
    assert done.out.startswith("the king")
    assert done.out.endswith("\n")
    (found,) = re.fullmatch(LINE.replace("N", r"[\d.]+"), done.err).groups()  # type: ignore[union-attr]
    assert 1 <= int(found) <= 12


def test_greedy_text_is_the_same_with_and_without_drafts(trained_run: Path, generated: Any) -> None:
    # FP32: a rounding can hardly turn a choice here.
    common = ["--prompt", "the king", "--prompt", "", "--max-tokens", "10", "--precision", "fp32"]
    common += ["--temperature", "0"]
    drafted, plain = generated(trained_run, *common, "--draft"), generated(trained_run, *common, "--no-draft")
    assert drafted.out == plain.out
    assert plain.out.startswith("--- 1 of 2 ---\nthe king")
    assert "drafts" in drafted.err
    assert "drafts" not in plain.err


def test_a_run_that_kept_least_is_read_in_any_precision(
    trained_run: Path, generated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*given: Any) -> Any:
        source = open_weights(*given)
        source.precision = Precision("fp8", attention_output="e5m6", keep_bf16_weights=False)
        return source

    monkeypatch.setattr("train.huggingface.weights.open_weights", opened)
    for precision in ([], ["--precision", "bf16"]):
        generated(trained_run, "--prompt", "a", "--max-tokens", "1", *precision)


def test_prompts_come_from_a_pipe(trained_run: Path, generated: Any) -> None:
    given = ["--max-tokens", "4", "--stop", "zzz", "--precision", "fp32"]
    expected = generated(trained_run, "--prompt", "the king", "--prompt", "", "--prompt", "a", *given).out
    ours, theirs = os.pipe()
    # The empty line within is a prompt; the one at the end comes from the command before.
    os.write(theirs, b"the king\n\na\n\n")
    os.close(theirs)
    before = os.dup(0)
    os.dup2(ours, 0)
    try:
        assert generated(trained_run, *given).out == expected
    finally:
        os.dup2(before, 0)
        os.close(before)
        os.close(ours)


def test_a_seed_repeats_its_text_and_another_does_not(trained_run: Path, generated: Any) -> None:
    sampled = ["--max-tokens", "30", "--temperature", "1", "--top-p", "0.9"]
    texts = [generated(trained_run, *sampled, "--seed", seed).out for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_an_export_and_its_import_write_what_the_run_writes(trained_run: Path, tmp_path: Path, generated: Any) -> None:
    # FP32, so that the router is not rounded on the way.
    models = trained_run, tmp_path / "hf", tmp_path / "back"
    assert convert(["export", *map(str, models[:2]), "--format", "fp32"]) == 0
    assert convert(["import", *map(str, models[1:])]) == 0
    sampled = ["--prompt", "the", "--max-tokens", "20", "--temperature", "1", "--seed", "4", "--precision", "fp32"]
    texts = [generated(model, *sampled).out for model in models]
    assert texts[0] == texts[1] == texts[2]


def test_a_reader_that_has_seen_enough_ends_it_without_a_word(trained_run: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the king\n" * 300)
    command = [sys.executable, "launch/generate.py", trained_run, "--prompts-file", prompts, "--max-tokens", "40"]
    options = {"cwd": ROOT, "env": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as process:
        assert process.stdout.read(8) == b"--- 1 of"
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == -signal.SIGPIPE


def test_measure_says_what_drafting_gains(trained_run: Path, store: Path, generated: Any) -> None:
    measured = ["--measure", str(store / "heldout"), "--prompt-tokens", "8", "--max-tokens", "5"]
    lines = generated(trained_run, *measured).out.splitlines()
    assert lines[0].startswith("3 prompts, 5 new tokens each")
    assert re.match(r"acceptance rate [\d.]+% of \d+ drafts", lines[1])


# Command after `launch/generate.py` -> what its one sentence says; RUN is the trained run.
WRONG = {
    "runs/none": "there is no folder runs/none",
    "tests": "tests holds no model: give a run's folder with checkpoints",
    "RUN --temperature -1": "temperature: -1.0 must be",
    "RUN --top-p 0": "top_p: 0.0 must be",
    "RUN --max-tokens 0": "max_tokens: 0 must be at least 1",
    "RUN --tokenizer none.json": "there is no file none.json",
    "RUN --device tpu": "device: tpu is not available here",
    "RUN --kernels portible": "--kernels portible is not one of gluon, portable, reference, deepgemm: did you mean",
    "RUN --kernels deepgemm": "--kernels deepgemm runs on a CUDA GPU, and the device is cpu",
    "RUN --weights ema": "holds no moving average",
    "RUN --prompts-file none.txt": "none.txt cannot be read",
    "RUN --measure tests": "tests holds no manifest.json",
    "RUN --stop=": "--stop is empty",
    "RUN --prompts-file -": "prompts-file: - reads a pipe, and there is none",
    "RUN --batch-tokens 0": "--batch-tokens 0 must be 1 or more",
}


@pytest.mark.parametrize(("command", "sentence"), WRONG.items())
def test_bad_input_is_one_sentence_and_exit_code_2(
    command: str, sentence: str, trained_run: Path, generated: Any
) -> None:
    model, *flags = command.split()
    shown = generated(trained_run if model == "RUN" else Path(model), *flags, code=2)
    assert shown.out == ""
    assert shown.err.startswith("generate: ")
    assert sentence in shown.err
    assert shown.err.count("\n") == 1


def test_a_run_whose_store_is_gone_asks_for_the_tokenizer(trained_run: Path, store: Path, generated: Any) -> None:
    hidden = store.with_name("moved")
    store.rename(hidden)
    try:
        assert "give --tokenizer tokenizer.json" in generated(trained_run, code=2).err
        generated(trained_run, "--max-tokens", "3", "--tokenizer", str(hidden / "tokenizer.json"))
    finally:
        hidden.rename(store)
