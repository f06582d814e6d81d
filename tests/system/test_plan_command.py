"""`launch/plan.py` as its user meets it: what it prints and writes, what a run then says, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch import plan
from train.config import compose
from train.studies.amounts import amount
from train.studies.plan import words
from train.studies.plan.candidate import candidate_of
from train.studies.plan.schema import check

CLUSTER = "+cluster=h100_8"


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a plan, and what was printed."""
    out, run = tmp_path_factory.mktemp("plan"), tmp_path_factory.mktemp("run")
    # One expert of 64 has 1.63 times the mean, the others 0.99: of 8 ranks the fullest has 1.07 times.
    experts = [1.63 if expert == 9 else 0.99 for expert in range(64)]
    (run / "metrics.jsonl").write_text(json.dumps({"step": 7, "moe/expert_load": [experts]}) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda *texts, **_: printed.append(" ".join(map(str, texts))))
        arguments = ["--out", str(out), "--dollars", "3", "--loads", str(run)]
        assert plan.main([CLUSTER, *arguments]) == 0
    return out, "\n".join(printed)


def test_a_plan_is_words_tables_and_three_files(planned: tuple[Path, str]) -> None:
    out, printed = planned
    document = json.loads((out / "plan.json").read_text())
    check(document)
    for sentence in document["words"]:
        assert sentence in printed
    both = [amount(document["cost"][each]["gpu_hours_per_trillion"]) for each in ("modelled", "corrected")]
    assert f"{both[0]} GPU-hours per trillion tokens as modelled, {both[1]} corrected" in printed
    assert f"at {3:g} a GPU-hour" in printed
    assert document["loads"][0]["in_time"] == document["loads"][0]["in_memory"] == pytest.approx(1.07)
    assert "steps 7 to 7: of layout.ep=8 ranks the fullest has 1.07 times the mean in a layer" in printed
    assert "<title>" in (out / "plan.html").read_text()
    assert json.loads((out / "plan_trace.json").read_text())["traceEvents"]


def test_the_totals_of_a_plan_are_sums_of_their_parts(planned: tuple[Path, str]) -> None:
    document = json.loads((planned[0] / "plan.json").read_text())
    step, cost, run = document["step"], document["cost"], document["run"]
    assert sum(step["phases_s"].values()) == pytest.approx(step["time_s"], rel=1e-9)
    tokens = run["batch_sequences"] * run["sequence_length"]
    assert step["tokens_per_s"] == pytest.approx(tokens / step["time_s"], rel=1e-12)
    hours = sum(part["modelled_gpu_hours"] for part in cost["parts"]) / cost["effective_training_time"]
    assert cost["modelled"]["gpu_hours"] == pytest.approx(hours, rel=1e-9)
    assert cost["modelled"]["dollars"] == pytest.approx(3 * hours, rel=1e-9)
    assert cost["modelled"]["days"] == pytest.approx(hours / run["world"] / 24, rel=1e-9)
    for key, value in cost["modelled"].items():
        assert cost["corrected"][key] == pytest.approx(cost["bias"] * value, rel=1e-9)
    per_trillion = step["time_s"] * run["world"] / 3600 / tokens * 1e12
    assert cost["modelled"]["gpu_hours_per_trillion"] == pytest.approx(per_trillion, rel=1e-9)
    assert document["bound"]["modelled"] < min(row["modelled"] for row in document["changes"])


def test_what_a_plan_advises_is_a_configuration_that_the_trainer_takes(planned: tuple[Path, str]) -> None:
    """Every layout that runs today, by the overrides that the plan would print for it."""
    rows = json.loads((planned[0] / "plan.json").read_text())["search"]["rows"]
    today = [row for row in rows if row["runs_today"] and row["fits"]]
    assert len(today) > 10
    for row in today[::3]:
        config = compose([CLUSTER, *words.overrides(row).split()])
        taken = candidate_of(config)
        for field in ("pp", "dp", "ep", "micro_batch_sequences", "recompute", "precision"):
            assert getattr(taken, field) == row[field], (field, row)
        if row["pp"] > 1:
            assert (taken.schedule, taken.chunks, list(taken.stage_layers)) == (
                row["schedule"], row["chunks"], row["stage_layers"],
            )  # fmt: skip
        if row["precision"] == "fp8":
            assert taken.keep_bf16_weights == row["keep_bf16_weights"]
            assert taken.attention_output == row["attention_output"]


def test_a_split_by_time_is_an_override_that_makes_the_modelled_step_shorter(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """V3's last stage has MTP and two products with the head, so it gets no layer besides."""
    assert plan.main(["split", "+cluster=h800_2048"]) == 0
    override, *figures = capsys.readouterr().out.splitlines()
    layers = compose(["+cluster=h800_2048", override]).layout.stage_layers
    assert layers is not None
    assert (len(layers), sum(layers), layers[-1]) == (32, 61, 0)
    seconds = [float(line.split("a step of ")[1].split()[0]) for line in figures]
    assert seconds[0] < seconds[1]
    assert plan.main(["split", CLUSTER]) == 2
    assert "plan: layout.pp=1 has one stage, which nothing can split: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["+cluster=h100_88"], "plan: "),
        ([CLUSTER, "precision=fp32"], "plan: precision=fp32: speeds of bf16 and fp8 are known"),
        (["calibrate", "nowhere"], "plan: "),
        ([CLUSTER, "--report", "README.md"], "plan: README.md is no report of `make gpu`"),
    ],
    ids=["cluster", "fp32", "calibrate", "report"],
)
def test_a_mistake_is_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert plan.main(arguments if arguments[0] == "calibrate" else [*arguments, "--out", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(sentence)
    assert captured.err.count("\n") == 1
    assert not captured.out


def test_residuals_are_printed_with_their_signs(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["residuals"]) == 0
    printed = capsys.readouterr().out
    assert "peer Megatron-Bridge FP8" in printed
    assert "19.93 s" in printed
    assert printed.count("%") == 6 + 2 + 4 * 7 + 3
