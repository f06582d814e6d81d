"""`launch/generate.py` as a user meets it: on a run's folder, its two streams, its exit codes."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.generate import main
from train.build import build
from train.config import compose
from train.trainer import Trainer

LINE = re.compile(
    r"(\d+) tokens, [\d.]+ tokens/s with the prompts, [\d.]+% of \d+ drafts accepted, "
    r"[\d.]+ tokens a pass of the model\n"
)


@pytest.fixture(scope="module")
def trained(small_run: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    directory = tmp_path_factory.mktemp("runs")
    kept = [item for item in small_run if not item.startswith("schedule.total_tokens")]
    config = compose([*kept, "schedule.total_tokens=128", f"run.directory={directory}", "run.name=run"])
    Trainer(config, build(config)).fit()
    return directory / "run"


def test_text_goes_to_stdout_and_one_line_to_stderr(
    trained: Path, run_command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = run_command("launch/generate.py", trained, "--prompt", "the king", "--max-tokens", "12", "--seed", "3")
    assert done.stdout.startswith("the king")
    assert done.stdout.endswith("\n")
    (found,) = LINE.fullmatch(done.stderr).groups()  # type: ignore[union-attr]
    assert 1 <= int(found) <= 12


def test_greedy_text_is_the_same_with_and_without_drafts(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # FP32: a rounding can hardly turn a choice here.
    common = [str(trained), "--prompt", "the king", "--prompt", "", "--max-tokens", "10", "--precision", "fp32"]
    assert main([*common, "--draft"]) == 0
    drafted = capsys.readouterr()
    assert main([*common, "--no-draft"]) == 0
    plain = capsys.readouterr()
    assert drafted.out == plain.out
    assert plain.out.startswith("--- 1 of 2 ---\nthe king")
    assert "drafts" in drafted.err
    assert "drafts" not in plain.err


def test_a_seed_repeats_its_text_and_another_does_not(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        assert main([str(trained), "--max-tokens", "30", "--temperature", "1", "--top-p", "0.9", "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_measure_says_what_drafting_gains(trained: Path, store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured = ["--measure", str(store / "heldout"), "--prompt-tokens", "8", "--max-tokens", "5"]
    assert main([str(trained), *measured]) == 0
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
}


@pytest.mark.parametrize(("arguments", "sentence"), WRONG.values(), ids=WRONG.keys())
def test_bad_input_is_one_sentence_and_exit_code_2(
    arguments: list[str], sentence: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(trained) if word == "RUN" else word for word in arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("generate: ")
    assert sentence in shown.err
    assert shown.err.count("\n") == 1


def test_a_run_whose_store_is_gone_asks_for_the_tokenizer(
    trained: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hidden = store.with_name("moved")
    store.rename(hidden)
    try:
        assert main([str(trained)]) == 2
        assert "give --tokenizer tokenizer.json" in capsys.readouterr().err
        assert main([str(trained), "--max-tokens", "3", "--tokenizer", str(hidden / "tokenizer.json")]) == 0
    finally:
        hidden.rename(store)
