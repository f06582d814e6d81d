"""`launch/score.py` on a run: its last logged score again, every kind of question, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest

from launch.convert import main as convert
from launch.score import main, model_of, parse
from tests.evaluate.planted import write_lines
from train.data.ingest import Recipe, prepare
from train.data.store import TokenStore
from train.data.tokenizer import load_tokenizer
from train.data.trained_on import KEY, TrainedOn
from train.evaluate import language_model, suite
from train.huggingface.weights import open_weights
from train.observe.sinks import read_run
from train.studies import ngram_baselines
from train.studies.ngram_baselines import measure_baselines

CHOICE = {"question": "Who?", "options": ["king", "people", "lord"], "answer": "C", "category": "prose"}
PROBLEM = {"problem": "1 + 1?", "answer": "2"}


def scored(out: Path, *arguments: object) -> dict[str, Any]:
    assert main([*map(str, arguments), "--device", "cpu", "--out", str(out)]) == 0
    return json.loads(out.read_text())  # type: ignore[no-any-return]


def test_a_store_costs_what_training_logged(
    trained_run: Path, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logged = read_run(trained_run)[-1]["eval/bits_per_byte"]
    # Two samples a batch, as the trainer had it: the same sums in the same order, so the same bits.
    found = scored(tmp_path / "a.json", trained_run, "--store", store / "heldout", "--batch-tokens", 64)
    assert found["stores"][str(store / "heldout")]["bits_per_byte"] == logged
    # In larger batches the products are the same; FP32 sums of up to 128 losses are rounded otherwise.
    capsys.readouterr()
    found = scored(tmp_path / "b.json", trained_run, "--store", f"held={store / 'heldout'}", "--store", store / "train")
    assert found["stores"]["held"]["bits_per_byte"] == pytest.approx(logged, rel=1e-5)
    parts = [found["stores"][name] for name in ("held", str(store / "train"))]
    assert found["stores"]["total"]["tokens"] == sum(part["tokens"] for part in parts)
    assert found["stores"]["total"]["nats"] == pytest.approx(sum(part["nats"] for part in parts), rel=1e-15)
    # The command prints its scores.
    printed = capsys.readouterr().out
    assert f"held: {found['stores']['held']['bits_per_byte']:.4f} bits per byte, perplexity " in printed


def test_what_has_to_be_beaten_is_shown_beside_each_store(
    trained_run: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    held, train = (f"{name}={store / name}" for name in ("heldout", "train"))
    found = scored(tmp_path / "a.json", trained_run, "--store", held, "--store", train)["baselines"]
    expected = measure_baselines(TokenStore.open(store / "train"), TokenStore.open(store / "heldout"))
    assert found["heldout"] == {**vars(expected), "learn_from": str(store / "train")}
    assert found["train"]["left_out"].startswith(f"no store `train` is beside {store / 'train'}")
    shown = capsys.readouterr().out.splitlines()
    assert f"to beat: bigram {expected.bigram:.4f}, xz {expected.xz:.4f}, unigram {expected.unigram:.4f}" in shown[1]
    assert shown[3].startswith("  baselines left out: no store")
    # Of a store elsewhere, learnt from the one that is named; too long without being asked for.
    elsewhere = shutil.copytree(store, tmp_path / "copy") / "heldout"
    (elsewhere.parent / "train").rename(learn := elsewhere.parent / "learn")
    asked = [trained_run, "--store", f"heldout={elsewhere}", "--learn-from", learn]
    monkeypatch.setattr(ngram_baselines, "UNASKED_BYTES", 1000)
    refused = scored(tmp_path / "b.json", *asked)["baselines"]["heldout"]
    assert "--baselines measures them all the same" in refused["left_out"]
    moved = scored(tmp_path / "c.json", *asked, "--baselines")["baselines"]["heldout"]
    assert moved == found["heldout"] | {"learn_from": str(learn)}
    assert "baselines" not in scored(tmp_path / "d.json", *asked, "--no-baselines")


def test_questions_are_asked_and_problems_solved(trained_run: Path, tmp_path: Path) -> None:
    choice, problems = write_lines(tmp_path / "c.jsonl", CHOICE, CHOICE), write_lines(tmp_path / "p.jsonl", PROBLEM)
    arguments = [trained_run, "--choice", choice, "--max-length", 200]
    found = scored(tmp_path / "a.json", *arguments, "--dev", choice, "--shots", 2)["choice"][str(choice)]
    assert found["letters"]["acc"]["questions"] == 2
    assert found["letters"]["cut_tokens"] == 0
    assert set(found["texts"]) == {"acc", "acc_norm", "acc_bytes", "by_category", "cut_tokens"}
    options = ["--exact", problems, "--max-new-tokens", 5, "--samples", 3, "--temperature", 0.7]
    once, again = (scored(tmp_path / name, trained_run, *options)["exact"][str(problems)] for name in ("b", "d"))
    assert once == again
    assert (once["samples"], once["pass@1"]["problems"]) == (3, 1)
    # Another seed writes something else: bytes of 15 tokens agree by chance with no weight worth naming.
    model = model_of(parse([str(trained_run), "--exact", "x", "--device", "cpu"]))
    prompts = [[1, 20, 30]] * 3
    texts = [model.generate(prompts, max_new_tokens=5, temperature=1.0, seed=seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert len({tuple(ids) for ids in texts[0]}) == 3


def test_an_export_and_its_import_score_as_the_run_does(trained_run: Path, store: Path, tmp_path: Path) -> None:
    # Sample length and first token travel along: both are the run's, not a released model's.
    models = trained_run, tmp_path / "hf", tmp_path / "back"
    assert convert(["export", *map(str, models[:2])]) == 0
    assert convert(["import", *map(str, models[1:])]) == 0
    sha256 = load_tokenizer(store / "tokenizer.json").sha256
    for model in models:
        assert open_weights(model).trained_on == TrainedOn("eos", 32, mask_documents=False, tokenizer_sha256=sha256)
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
    out, problems = tmp_path / "out.json", write_lines(tmp_path / "p.jsonl", PROBLEM)
    asked = [trained_run, "--store", f"held={store / 'heldout'}", "--exact", problems]

    def fails(*arguments: object, **options: object) -> None:
        assert set(json.loads(out.read_text())["stores"]) == {"held", "total"}
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(suite, "score_exact_match", fails)
        assert main([*map(str, asked), "--out", str(out), "--device", "cpu"]) == 130
    assert json.loads(out.read_text())["finished"] is False
    shown = capsys.readouterr()
    assert shown.err == "score: interrupted\n"
    assert shown.out.startswith("held: ")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    finished = scored(tmp_path / "again.json", *asked)
    assert finished["finished"] is True
    assert finished["stores"] == json.loads(out.read_text())["stores"]


def test_numbers_that_are_not_finite_are_no_json(tmp_path: Path) -> None:
    suite.SuiteScores(tmp_path / "out.json").add("stores", "held", {"perplexity": float("inf"), "tokens": 3})
    written = json.loads((tmp_path / "out.json").read_text(), parse_constant=pytest.fail)
    assert written == {"finished": False, "stores": {"held": {"perplexity": None, "tokens": 3}}}


def test_what_a_user_can_get_wrong_is_one_sentence(
    trained_run: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    datasets.disable_progress_bars()
    source = write_lines(tmp_path / "text.jsonl", *({"text": f"other words {n}"} for n in range(9)))
    other = prepare(Recipe(source=str(source), vocab_size=280), tmp_path / "other")
    bad = write_lines(tmp_path / "bad.jsonl", CHOICE, {"question": "?"})
    long = write_lines(tmp_path / "long.jsonl", CHOICE, CHOICE | {"options": ["a", "qx" * 20], "answer": "A"})
    good, problems = write_lines(tmp_path / "good.jsonl", CHOICE), write_lines(tmp_path / "p.jsonl", PROBLEM)
    (gzipped := tmp_path / "tokenizer.gz").write_bytes(b"\x1f\x8b")
    held, tokenizer = f"--store {store / 'heldout'}", f"--tokenizer {other.heldout.tokenizer_path}"
    cases = {
        "nothing to score: give --store, --choice, --exact or --tasks": "",
        "was made with tokeniser": f"--store {other.heldout.path}",
        "was trained with tokeniser": f"--choice {good} {tokenizer}",
        f"{bad} line 2 has no 'options'": f"--choice {bad}",
        "--shots 1 asks for examples": f"--choice {good} --shots 1",
        "--shots -1 must be 0 or more": f"--choice {good} --shots -1",
        "--limit 0 must be 1 or more": "--tasks mmlu --limit 0",
        f"tokenizer: {gzipped} cannot be read as UTF-8 text": f"--choice {good} --tokenizer {gzipped}",
        "exists already": f"--choice {good} --out {good}",
        "the name 'a' is taken": "--store a=x --store a=y",
        "positions for 1 to": f"--choice {good} --max-length {10**6}",
        "--kernels deepgemm runs on a CUDA GPU, and the device is cpu": f"{held} --kernels deepgemm",
        "lm-eval": "--tasks no_such_task",
        "1 questions of category 'prose', but --shots asks for 2": f"{held} --choice {good} --dev {good} --shots 2",
        "--dev holds 1 problems, but --shots asks for 2": f"{held} --exact {problems} --dev {problems} --shots 2",
        "--seed -1 must be in 0 .. 2^31 - 1": f"--exact {problems} --seed -1",
        "32 new tokens leave no room for a prompt in 32": f"{held} --exact {problems} --max-new-tokens 32",
        "a continuation of 41 tokens is longer": f"{held} --choice {long}",
        "is in a folder that is not there": f"--choice {good} --out {tmp_path / 'none' / 'x.json'}",
        "none holds no manifest.json": f"{held} --learn-from {tmp_path / 'none'}",
        "trained with tokeniser": f"{held} --choice {good} {tokenizer}",
    }
    commands = {sentence: [str(trained_run), *flags.split()] for sentence, flags in cases.items()}
    commands["there is no folder"] = [str(tmp_path / "none"), *held.split()]

    # A score that is made before all is checked fails: there is nothing to call.
    monkeypatch.setattr(language_model, "score_store", None)
    for name in ("score_multiple_choice", "score_exact_match"):
        monkeypatch.setattr(suite, name, None)
    capsys.readouterr()
    for sentence, command in commands.items():
        assert main([*command, "--device", "cpu"]) == 2, sentence
        error = capsys.readouterr().err
        assert error.startswith("score: "), error
        assert sentence in error
        assert error.count("\n") == 1
