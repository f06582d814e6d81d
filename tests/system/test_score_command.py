"""`launch/score.py` on a run: its last logged score again, every kind of question, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from launch.score import main
from train.build import build
from train.config import compose
from train.data.ingest import Recipe, prepare
from train.observe.sinks import read_run
from train.trainer import Trainer

CHOICE = {"question": "Who?", "options": ["king", "people", "lord"], "answer": "C", "category": "prose"}
PROBLEM = {"problem": "1 + 1?", "answer": "2"}


@pytest.fixture(scope="module")
def run(small_run: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of the small model in BF16, scored at the end."""
    folder = tmp_path_factory.mktemp("runs")
    kept = [item for item in small_run if not item.startswith("schedule.total_tokens")]
    config = compose([*kept, "schedule.total_tokens=192", f"run.directory={folder}", "run.name=run"])
    Trainer(config, build(config)).fit()
    return folder / "run"


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def scored(out: Path, *arguments: object) -> dict:  # type: ignore[type-arg]
    assert main([*map(str, arguments), "--device", "cpu", "--out", str(out)]) == 0
    return json.loads(out.read_text())  # type: ignore[no-any-return]


def test_a_store_costs_what_training_logged(run: Path, store: Path, tmp_path: Path) -> None:
    logged = read_run(run)[-1]["eval/bits_per_byte"]
    # One sample a batch, as the trainer had it: the same sums in the same order, so the same bits.
    found = scored(tmp_path / "a.json", run, "--store", store / "heldout", "--batch-tokens", 32)
    assert found["stores"][str(store / "heldout")]["bits_per_byte"] == logged
    # In larger batches the products are the same; FP32 sums of up to 128 losses are rounded otherwise.
    found = scored(tmp_path / "b.json", run, "--store", f"held={store / 'heldout'}", "--store", store / "train")
    assert found["stores"]["held"]["bits_per_byte"] == pytest.approx(logged, rel=1e-5)
    parts = [found["stores"][name] for name in ("held", str(store / "train"))]
    assert found["stores"]["total"]["tokens"] == sum(part["tokens"] for part in parts)
    assert found["stores"]["total"]["nats"] == pytest.approx(sum(part["nats"] for part in parts), rel=1e-15)


def test_questions_are_asked_and_problems_solved(run: Path, tmp_path: Path) -> None:
    choice, problems = write(tmp_path / "c.jsonl", CHOICE, CHOICE), write(tmp_path / "p.jsonl", PROBLEM)
    arguments = [run, "--choice", choice, "--max-length", 200]
    found = scored(tmp_path / "a.json", *arguments, "--dev", choice, "--shots", 2)["choice"][str(choice)]
    assert found["letters"]["acc"]["questions"] == 2
    assert found["letters"]["cut_tokens"] == 0
    assert set(found["texts"]) == {"acc", "acc_norm", "acc_bytes", "by_category", "cut_tokens"}
    options = ["--max-new-tokens", 5, "--samples", 3, "--temperature", 0.7]
    once = scored(tmp_path / "b.json", run, "--exact", problems, *options)["exact"][str(problems)]
    again = scored(tmp_path / "d.json", run, "--exact", problems, *options)["exact"][str(problems)]
    assert once == again
    assert (once["samples"], once["pass@1"]["problems"]) == (3, 1)


def test_the_command_prints_its_scores(
    run: Path, store: Path, run_command: Callable[..., object], tmp_path: Path
) -> None:
    done = run_command("launch/score.py", run, "--store", f"held={store / 'heldout'}", "--device", "cpu")
    assert "held: " in done.stdout  # type: ignore[attr-defined]
    assert " bits per byte, perplexity " in done.stdout  # type: ignore[attr-defined]


def test_what_a_user_can_get_wrong_is_one_sentence(
    run: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    datasets.disable_progress_bars()
    source = write(tmp_path / "text.jsonl", *({"text": f"other words {n}"} for n in range(9)))
    other = prepare(Recipe(source=str(source), vocab_size=280), tmp_path / "other")
    assert other.heldout is not None
    bad = write(tmp_path / "bad.jsonl", CHOICE, {"question": "?"})
    good = write(tmp_path / "good.jsonl", CHOICE)
    cases = {
        "nothing to score: give --store, --choice, --exact or --tasks": [run],
        "there is no folder": [tmp_path / "none", "--store", store / "heldout"],
        "was made with tokeniser": [run, "--store", other.heldout.path],
        "was trained with tokeniser": [run, "--choice", good, "--tokenizer", other.heldout.tokenizer_path],
        f"{bad} line 2 has no 'options'": [run, "--choice", bad],
        "--shots 1 asks for examples": [run, "--choice", good, "--shots", 1],
        "exists already": [run, "--choice", good, "--out", good],
        "the name 'a' is taken": [run, "--store", "a=x", "--store", "a=y"],
        "positions for 1 to": [run, "--choice", good, "--max-length", 10**6],
        "lm-eval": [run, "--tasks", "no_such_task"],
    }

    capsys.readouterr()
    for sentence, arguments in cases.items():
        assert main([*map(str, arguments), "--device", "cpu"]) == 2, sentence
        error = capsys.readouterr().err
        assert error.startswith("score: "), error
        assert sentence in error
        assert error.count("\n") == 1
