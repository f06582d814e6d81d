"""`launch/score.py` on a run: its last logged score again, every kind of question, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from launch.convert import main as convert
from launch.score import main, parse, subject_of
from train.data.ingest import Recipe, prepare
from train.data.tokenizer import load_tokenizer
from train.data.trained_on import KEY, TrainedOn
from train.evaluate import subject, suite
from train.huggingface.weights import open_weights
from train.observe.sinks import read_run

CHOICE = {"question": "Who?", "options": ["king", "people", "lord"], "answer": "C", "category": "prose"}
PROBLEM = {"problem": "1 + 1?", "answer": "2"}


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def scored(out: Path, *arguments: object) -> dict:  # type: ignore[type-arg]
    assert main([*map(str, arguments), "--device", "cpu", "--out", str(out)]) == 0
    return json.loads(out.read_text())  # type: ignore[no-any-return]


def test_a_store_costs_what_training_logged(trained_run: Path, store: Path, tmp_path: Path) -> None:
    logged = read_run(trained_run)[-1]["eval/bits_per_byte"]
    # One sample a batch, as the trainer had it: the same sums in the same order, so the same bits.
    found = scored(tmp_path / "a.json", trained_run, "--store", store / "heldout", "--batch-tokens", 32)
    assert found["stores"][str(store / "heldout")]["bits_per_byte"] == logged
    # In larger batches the products are the same; FP32 sums of up to 128 losses are rounded otherwise.
    found = scored(tmp_path / "b.json", trained_run, "--store", f"held={store / 'heldout'}", "--store", store / "train")
    assert found["stores"]["held"]["bits_per_byte"] == pytest.approx(logged, rel=1e-5)
    parts = [found["stores"][name] for name in ("held", str(store / "train"))]
    assert found["stores"]["total"]["tokens"] == sum(part["tokens"] for part in parts)
    assert found["stores"]["total"]["nats"] == pytest.approx(sum(part["nats"] for part in parts), rel=1e-15)


def test_questions_are_asked_and_problems_solved(trained_run: Path, tmp_path: Path) -> None:
    choice, problems = write(tmp_path / "c.jsonl", CHOICE, CHOICE), write(tmp_path / "p.jsonl", PROBLEM)
    arguments = [trained_run, "--choice", choice, "--max-length", 200]
    found = scored(tmp_path / "a.json", *arguments, "--dev", choice, "--shots", 2)["choice"][str(choice)]
    assert found["letters"]["acc"]["questions"] == 2
    assert found["letters"]["cut_tokens"] == 0
    assert set(found["texts"]) == {"acc", "acc_norm", "acc_bytes", "by_category", "cut_tokens"}
    options = ["--max-new-tokens", 5, "--samples", 3, "--temperature", 0.7]
    once = scored(tmp_path / "b.json", trained_run, "--exact", problems, *options)["exact"][str(problems)]
    again = scored(tmp_path / "d.json", trained_run, "--exact", problems, *options)["exact"][str(problems)]
    assert once == again
    # Another seed writes something else: bytes of 15 tokens agree by chance with no weight worth naming.
    texts = []
    for seed in (0, 0, 1):
        respondent = subject_of(parse([str(trained_run), "--exact", "x", "--device", "cpu"])).respondent()
        texts.append(respondent.generate([[1, 20, 30]] * 3, max_new_tokens=5, temperature=1.0, seed=seed))
    assert texts[0] == texts[1] != texts[2]
    assert len({tuple(ids) for ids in texts[0]}) == 3
    assert (once["samples"], once["pass@1"]["problems"]) == (3, 1)


def test_the_command_prints_its_scores(
    trained_run: Path, store: Path, run_command: Callable[..., object], tmp_path: Path
) -> None:
    done = run_command("launch/score.py", trained_run, "--store", f"held={store / 'heldout'}", "--device", "cpu")
    assert "held: " in done.stdout  # type: ignore[attr-defined]
    assert " bits per byte, perplexity " in done.stdout  # type: ignore[attr-defined]


def test_an_export_and_its_import_score_as_the_run_does(trained_run: Path, store: Path, tmp_path: Path) -> None:
    """Sample length and first token travel along: both are the run's, not a released model's."""
    assert convert(["export", str(trained_run), str(tmp_path / "hf")]) == 0
    assert convert(["import", str(tmp_path / "hf"), str(tmp_path / "back")]) == 0
    models = trained_run, tmp_path / "hf", tmp_path / "back"
    known = [open_weights(model).trained_on for model in models]
    sha256 = load_tokenizer(store / "tokenizer.json").sha256
    assert known == [TrainedOn("eos", 32, mask_documents=False, tokenizer_sha256=sha256)] * 3
    found = [scored(tmp_path / f"{n}.json", model, "--store", store / "heldout") for n, model in enumerate(models)]
    assert found[1] == found[2]
    # Only the router, FP32 in the run, was rounded to BF16: by up to 2^-9, and it decides a part of the loss only.
    costs = [report["stores"]["total"]["nats"] for report in found]
    assert costs[1] == pytest.approx(costs[0], rel=2**-9)
    # Without the mark the same folder is a released model: it begins with bos, and its samples are longer.
    config = tmp_path / "hf" / "config.json"
    values = json.loads(config.read_text())
    del values[KEY]
    config.write_text(json.dumps(values))
    assert open_weights(tmp_path / "hf").trained_on.first_token == "bos"
    longer = scored(tmp_path / "longer.json", tmp_path / "hf", "--store", store / "heldout")
    assert longer["stores"]["total"]["nats"] != costs[1]
    again = scored(tmp_path / "same.json", tmp_path / "hf", "--store", store / "heldout", "--max-length", 32)
    assert again["stores"] == found[1]["stores"]


def test_what_was_measured_is_on_the_disk_when_a_later_part_fails(
    trained_run: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, problems = tmp_path / "out.json", write(tmp_path / "p.jsonl", PROBLEM)
    asked = [trained_run, "--store", f"held={store / 'heldout'}", "--exact", problems, "--out", out, "--device", "cpu"]

    def fails(*arguments: object, **options: object) -> None:
        kept = json.loads(out.read_text())
        assert set(kept["stores"]) == {"held", "total"}
        raise KeyboardInterrupt

    monkeypatch.setattr(suite, "score_exact", fails)
    assert main([*map(str, asked)]) == 130
    assert json.loads(out.read_text())["finished"] is False
    shown = capsys.readouterr()
    assert shown.err == "score: interrupted\n"
    assert shown.out.startswith("held: ")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    monkeypatch.undo()
    finished = scored(tmp_path / "again.json", *asked[:5])
    assert finished["finished"] is True
    assert finished["stores"] == json.loads(out.read_text())["stores"]


def test_numbers_that_are_not_finite_are_no_json(tmp_path: Path) -> None:
    report = suite.Report(tmp_path / "out.json")
    report.keep("stores", "held", {"perplexity": float("inf"), "tokens": 3})
    assert json.loads((tmp_path / "out.json").read_text(), parse_constant=pytest.fail) == {
        "finished": False,
        "stores": {"held": {"perplexity": None, "tokens": 3}},
    }


def test_what_a_user_can_get_wrong_is_one_sentence(
    trained_run: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    datasets.disable_progress_bars()
    source = write(tmp_path / "text.jsonl", *({"text": f"other words {n}"} for n in range(9)))
    other = prepare(Recipe(source=str(source), vocab_size=280), tmp_path / "other")
    assert other.heldout is not None
    bad = write(tmp_path / "bad.jsonl", CHOICE, {"question": "?"})
    long_option = write(tmp_path / "long.jsonl", CHOICE, CHOICE | {"options": ["a", "qx" * 20], "answer": "A"})
    good, problems = write(tmp_path / "good.jsonl", CHOICE), write(tmp_path / "p.jsonl", PROBLEM)
    cases = {
        "nothing to score: give --store, --choice, --exact or --tasks": [trained_run],
        "there is no folder": [tmp_path / "none", "--store", store / "heldout"],
        "was made with tokeniser": [trained_run, "--store", other.heldout.path],
        "was trained with tokeniser": [trained_run, "--choice", good, "--tokenizer", other.heldout.tokenizer_path],
        f"{bad} line 2 has no 'options'": [trained_run, "--choice", bad],
        "--shots 1 asks for examples": [trained_run, "--choice", good, "--shots", 1],
        "exists already": [trained_run, "--choice", good, "--out", good],
        "the name 'a' is taken": [trained_run, "--store", "a=x", "--store", "a=y"],
        "positions for 1 to": [trained_run, "--choice", good, "--max-length", 10**6],
        "lm-eval": [trained_run, "--tasks", "no_such_task"],
        "--dev holds 1 questions of category 'prose', but --shots asks for 2": [
            *(trained_run, "--store", store / "heldout"),
            *("--choice", good, "--dev", good, "--shots", 2),
        ],
        "--dev holds 1 problems, but --shots asks for 2": [
            *(trained_run, "--store", store / "heldout"),
            *("--exact", problems, "--dev", problems, "--shots", 2),
        ],
        "--seed -1 must be in 0 .. 2^31 - 1": [trained_run, "--exact", problems, "--seed", -1],
        "32 new tokens leave no room for a prompt in 32": [
            *(trained_run, "--store", store / "heldout", "--exact", problems, "--max-new-tokens", 32),
        ],
        "a continuation of 41 tokens is longer": [
            *(trained_run, "--store", store / "heldout", "--choice", long_option),
        ],
        "lies in a folder that is not there": [trained_run, "--choice", good, "--out", tmp_path / "none" / "x.json"],
        "trained with tokeniser": [
            *(trained_run, "--store", store / "heldout"),
            *("--choice", good, "--tokenizer", other.heldout.tokenizer_path),
        ],
    }

    def scores(*arguments: object, **options: object) -> None:
        raise AssertionError("it is scored before all is checked")

    for name in ("score_store", "score_choices", "score_exact"):
        monkeypatch.setattr(subject if name == "score_store" else suite, name, scores)
    capsys.readouterr()
    for sentence, arguments in cases.items():
        assert main([*map(str, arguments), "--device", "cpu"]) == 2, sentence
        error = capsys.readouterr().err
        assert error.startswith("score: "), error
        assert sentence in error
        assert error.count("\n") == 1
