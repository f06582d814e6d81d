"""A plan beside what a run measured: every figure by hand, what is refused, and the correction that is stored."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from parallel.balance import balanced_layers
from parallel.layout import Layout
from parallel.mesh import single
from tests.studies.plan.plan_documents import BY_HAND, plan_by_hand
from tests.tiny_model import TINY
from train.assemble import build_engine
from train.config import PretrainConfig, compose
from train.model.precision import Precision
from train.model.sizes import layer_costs
from train.observe.sinks import JsonlSink, Sinks, open_sinks
from train.optim.config import OptimConfig
from train.studies.plan import witness
from train.studies.plan.candidate import run_of
from train.studies.plan.dry_run import as_rank
from train.studies.plan.judged import Compared, Measured, calibrate, compare, correction_for, verdict
from train.studies.plan.memory import measure
from train.studies.plan.witness import Witness, compared, device_bytes, state_bytes

# One process; four sequences of 256 tokens a step, later eight.
RUN = ["experiment=tiny", "run.micro_batch_sequences=1", "observe.wandb=off"]
RUN += ["schedule.batch_start_sequences=4", "schedule.batch_full_sequences=8"]


@pytest.fixture(scope="module")
def config() -> PretrainConfig:
    return compose(RUN)


STATE = ("weights", "fp8_copies", "gradients", "masters", "moments")


def measured_of(config: PretrainConfig, **changes: Any) -> Measured:
    """Steps of the full batch: 2.5 s, and memory that is half of what `BY_HAND` says."""
    figures = Measured(
        run=run_of(config),
        candidate=compared(config),
        where={"date": "2026-12-01", "commit": "c" * 40, "versions": {"torch": "2.13.0"}, "device": "cpu"}
        | {"precision": config.precision.name, "rank": 0},
        steps=(4, 10),
        batch_sequences=config.schedule.batch_full_sequences,
        step_s=2.5,
        walls_s={"data": 0.1, "gradients": 2.25, "update": 0.16},
        busy_s={"data": 0.1, "gradients": 2.0, "update": 0.15},
        memory_bytes={
            name: BY_HAND[name] // 2 for name in ("weights", "fp8_copies", "gradients", "masters", "moments")
        },
    )
    return replace(figures, **changes)


def document_of(measured: Measured) -> Any:
    return json.loads(json.dumps(plan_by_hand(measured.run, measured.candidate)))


def rows_of(document: Any, measured: Measured) -> dict[str, Compared]:
    return {row.name: row for row in compare(document, measured)}


def test_every_figure_stands_beside_its_own_and_the_error_is_that_of_the_prediction(config: PretrainConfig) -> None:
    measured = measured_of(config)
    on_gpu = {**measured.memory_bytes, "step": 1250, "reserved": 500}
    rows = rows_of(document_of(measured), replace(measured, memory_bytes=on_gpu))
    tokens = 8 * 256
    expected = {
        "step_s": (2.0, 2.5, -0.2),
        "tokens_per_s": (tokens / 2.0, tokens / 2.5, 0.25),
        "gradients_s": (1.8, 2.25, -0.2),
        "work_s": (1.5, 2.0, -0.25),
        # One rank has no bubble: what it waited for was a core.
        "waiting_s": (0.3, 0.25, None),
        "update_s": (0.2, 0.16, 0.25),
        "data_s": (None, 0.1, None),
        "weights_bytes": (1000, 500, 1.0),
        "fp8_copies_bytes": (500, 250, 1.0),
        "gradients_bytes": (2000, 1000, 1.0),
        "masters_bytes": (1600, 800, 1.0),
        "moments_bytes": (1200, 600, 1.0),
        # Activations, messages, temporaries and dispatch.
        "step_bytes": (1000, 1250, -0.2),
        "reserved_bytes": (400, 500, -0.2),
        "total_bytes": (7700, 3150 + 1250 + 500, 7700 / 4900 - 1),
    }
    assert rows.keys() == expected.keys()
    for name, (predicted, found, error) in expected.items():
        row = rows[name]
        # Sums of a few doubles.
        for figure, value in ((row.predicted, predicted), (row.measured, found), (row.error, error)):
            assert figure == (None if value is None else pytest.approx(value, rel=1e-12)), name
    on_cpu = rows_of(document_of(measured), measured)
    assert [name for name, row in on_cpu.items() if row.measured is None] == [
        "step_bytes", "reserved_bytes", "total_bytes",
    ]  # fmt: skip


def test_what_two_sides_mean_differently_has_no_error(config: PretrainConfig) -> None:
    """A run waits for experts and reductions of other data ranks too; a plan's bubble is the pipeline's alone."""
    errors = {}
    for pp, dp in ((2, 1), (2, 2)):
        measured = measured_of(replace(config, layout=Layout(pp=pp, dp=dp)))
        rows = rows_of(document_of(measured), measured)
        errors[pp, dp] = [rows[name].error for name in ("gradients_s", "work_s", "waiting_s")]
    assert errors[2, 1] == pytest.approx([-0.2, -0.25, 0.2], rel=1e-12)
    assert errors[2, 2] == [pytest.approx(-0.2), None, None]


def test_in_the_batch_ramp_the_step_of_that_batch_is_compared(config: PretrainConfig, tmp_path: Path) -> None:
    measured = measured_of(config, batch_sequences=4)
    document = document_of(measured)
    rows = rows_of(document, measured)
    assert (rows["step_s"].predicted, rows["work_s"].predicted) == (1.25, 1.0)
    assert rows["tokens_per_s"].error == pytest.approx(2.5 / 1.25 - 1, rel=1e-12)
    del document["ramp"]
    assert rows_of(document, measured)["step_s"].error is None
    (tmp_path / "plan.json").write_text(json.dumps(document))
    lines, found = verdict(tmp_path, measured)
    assert "the plan has no step of 4 sequences, so times stand alone" in lines
    assert found is not None
    assert found["rows"]["weights_bytes"]["error"] == 1.0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("layout.pp=2", "pp is 1 in the plan and 2 here"),
        ("layout.zero=false", "zero is True in the plan and False here"),
        ("model.num_hidden_layers=4", "parameters is "),
        ("schedule.batch_full_sequences=16", "batch_sequences is 8 in the plan and 16 here"),
        ("precision=fp8", "precision is 'bf16' in the plan and 'fp8' here"),
        ("run.recompute=true", "recompute is False in the plan and True here"),
        ("run.micro_batch_sequences=2", "micro_batch_sequences is 1 in the plan and 2 here"),
    ],
)
def test_a_plan_of_another_run_is_one_sentence(
    config: PretrainConfig, tmp_path: Path, change: str, sentence: str
) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(document_of(measured_of(config))))
    others = [text for text in RUN if text.partition("=")[0] != change.partition("=")[0]]
    lines, found = verdict(tmp_path, measured_of(compose([*others, change])))
    assert len(lines) == 1
    assert "is not of this run, so nothing is compared: " in lines[0]
    assert sentence in lines[0]
    assert found is None


def test_a_plan_whose_run_the_trainer_cannot_do_is_of_another_run(config: PretrainConfig, tmp_path: Path) -> None:
    document = document_of(measured_of(config))
    document["candidate"] |= {"overlap": True, "dispatch": "node", "comm_sms": 6}
    (tmp_path / "plan.json").write_text(json.dumps(document))
    ((line,), _) = verdict(tmp_path, measured_of(config))
    assert "dispatch is 'node' in the plan and 'direct' here; overlap is True in the plan and False here" in line
    assert "comm_sms" not in line


def test_no_plan_is_silence(config: PretrainConfig, tmp_path: Path) -> None:
    assert verdict(tmp_path, measured_of(config)) == ([], None)


def everywhere(document: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value."""
    found: list[tuple[Any, Any]] = []
    for key, value in list(document.items() if isinstance(document, dict) else enumerate(document)):
        found.append((document, key))
        if isinstance(value, dict | list):
            found += everywhere(value)
    return found


def test_a_damaged_plan_is_one_sentence_whatever_is_damaged(config: PretrainConfig, tmp_path: Path) -> None:
    measured, path = measured_of(config), tmp_path / "plan.json"
    whole = document_of(measured)
    texts = ["", "{", "[]", "null", "7", '"plan"', "[" * 100_000, "\ud800".encode("utf-16-le", "surrogatepass")]
    # Every value in turn: gone, and of other kinds.
    for index in range(len(everywhere(whole))):
        for damage in (..., None, "text", -1.0, float("nan"), 10**400, [], {}):
            document = copy.deepcopy(whole)
            container, key = everywhere(document)[index]
            container[key] = damage
            if damage is ...:
                del container[key]
            texts.append(json.dumps(document))
    outcomes = set()
    for text in texts:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        lines, found = verdict(tmp_path, measured)
        outcomes.add((len(lines) == 1, found is None))
        assert (len(lines) == 1) == (found is None), text[:200]
        json.dumps(found, allow_nan=False)
    # What a comparison does not read may be anything.
    assert outcomes == {(True, True), (False, False)}
    path.unlink()
    path.mkdir()
    assert "is no plan (OSError: no file), so nothing is compared: make it again" in verdict(tmp_path, measured)[0][0]


def judged_run(directory: Path, measured: Measured) -> Path:
    """A run whose card has its verdict."""
    directory.mkdir()
    (directory / "plan.json").write_text(json.dumps(document_of(measured)))
    _, found = verdict(directory, measured)
    (directory / "run_card.json").write_text(json.dumps({"predicted_vs_measured": found}))
    return directory


def test_a_correction_is_stored_for_its_machine_and_the_newest_is_found(config: PretrainConfig, tmp_path: Path) -> None:
    store = tmp_path / "runs" / "corrections.json"
    assert correction_for("cpu", "bf16", store) is None
    measured = measured_of(config)
    sentence = calibrate(judged_run(tmp_path / "first", measured), store)
    assert sentence == (
        f"stored in {store}: x 1.250, measured: a step of first took 2.5 s where 2 s were predicted "
        "(cpu, bf16, pp 1, dp 1, ep 1, 2026-12-01, commit cccccccccccc)"
    )
    h800 = dict(measured.where) | {"device": "NVIDIA H800"}
    calibrate(judged_run(tmp_path / "h800", replace(measured, where=h800, step_s=3.0)), store)
    pcie = h800 | {"device": "NVIDIA H800 PCIe"}
    calibrate(judged_run(tmp_path / "pcie", replace(measured, where=pcie, step_s=5.0)), store)
    again = calibrate(judged_run(tmp_path / "again", replace(measured, step_s=1.5)), store)
    assert again.endswith(", in place of x 1.250 of 2026-12-01")
    ratios = {}
    for device in ("cpu", "NVIDIA H800", "H800", "NVIDIA H800 PCIe"):
        found = correction_for(device, "bf16", store)
        assert found is not None
        ratios[device] = found.ratio
    assert ratios == {"cpu": 0.75, "NVIDIA H800": 1.5, "H800": 1.5, "NVIDIA H800 PCIe": 2.5}
    assert correction_for("cpu", "fp8", store) is None
    assert correction_for("H100", "bf16", store) is None
    assert len(json.loads(store.read_text())["corrections"]) == 3


def test_what_gives_no_correction_is_one_sentence_and_the_store_stays(config: PretrainConfig, tmp_path: Path) -> None:
    store = tmp_path / "corrections.json"
    measured = measured_of(config)
    run = judged_run(tmp_path / "run", measured)
    calibrate(run, store)
    before = store.read_bytes()
    with pytest.raises(ValueError, match=r"has no predicted_vs_measured: put the plan there as plan\.json"):
        calibrate(tmp_path / "nowhere", store)
    card = json.loads((run / "run_card.json").read_text())
    for damage in ({"predicted": None}, {"predicted": 0}, {"measured": "x"}, {"measured": 0}):
        changed = copy.deepcopy(card)
        changed["predicted_vs_measured"]["rows"]["step_s"] |= damage
        (run / "run_card.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=r"gives no correction"):
            calibrate(run, store)
    assert store.read_bytes() == before
    (run / "run_card.json").write_text(json.dumps(card))
    (stored,) = json.loads(before)["corrections"]
    wrong = json.dumps({"corrections": [stored | {"versions": "2.13"}]})
    for text in ("{", "[]", '{"corrections": [{"device": "cpu"}]}', '{"corrections": [7]}', wrong):
        store.write_text(text)
        with pytest.raises(ValueError, match=r"is no list of corrections .*: delete it and calibrate again"):
            correction_for("cpu", "bf16", store)
        with pytest.raises(ValueError, match=r"is no list of corrections"):
            calibrate(run, store)
    with pytest.raises(ValueError, match=r"cannot be written"):
        calibrate(run, run / "run_card.json" / "corrections.json")


def test_it_reads_and_stores_without_torch() -> None:
    """So that a plan is corrected on a laptop."""
    code = "import sys; import train.studies.plan.judged; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[3])


@pytest.mark.parametrize("keep", [True, False], ids=["bf16 kept", "fp8 only"])
def test_measured_state_is_what_a_dry_run_counts(keep: bool) -> None:
    """Of real tensors against fake ones of the same rank."""
    config = compose([*RUN, "precision=fp8", f"precision.keep_bf16_weights={str(keep).lower()}"])
    config = replace(config, model=TINY, data=replace(config.data, sequence_length=32))
    with as_rank(config, 0) as mesh:
        planned = measure(config, mesh, num_micro_batches=1)
    engine = build_engine(TINY, config.precision, config.optim, single(torch.device("cpu")), seed=0)
    if keep:
        # Made by the first forward.
        engine.models[0](torch.zeros(1, 8, dtype=torch.int64))
    found = state_bytes(engine)
    expected = {name: getattr(planned, name) for name in found}
    assert found == expected
    assert all(found.values())


def test_offloaded_state_is_not_on_the_device() -> None:
    engine = build_engine(TINY, Precision("bf16"), OptimConfig(offload="cpu"), single(torch.device("cpu")), seed=0)
    assert (state_bytes(engine)["masters"], state_bytes(engine)["moments"]) == (0, 0)


def test_a_gpus_peak_is_split_into_state_what_a_step_adds_and_what_is_not_torchs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10_000, 80_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 65_000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 60_000)
    monkeypatch.setattr(witness, "state_bytes", lambda _: {"weights": 20_000, "moments": 30_000})
    engine: Any = SimpleNamespace(mesh=SimpleNamespace(device=torch.device("cuda")))
    assert device_bytes(engine) == {"step": 10_000, "reserved": 5_000}


def played(config: PretrainConfig, directory: Path, record_of: Callable[[int], dict[str, Any]]) -> list[str]:
    """Twelve steps of a trainer that only has records; what was said."""
    engine: Any = SimpleNamespace(mesh=single(torch.device("cpu")), models=[], optimizer=SimpleNamespace(buckets=[]))
    engine.optimizer.staging, engine.optimizer.state_shards = None, dict
    trainer: Any = SimpleNamespace(config=config, directory=directory, mesh=engine.mesh, engine=engine)
    trainer.run_card, trainer.busy, trainer.busy_s = lambda: {"name": "run"}, SimpleNamespace(), [0.125, 3.0, 0.25]
    said: list[str] = []
    sinks = Sinks(JsonlSink(directory / "metrics.jsonl"), console=None, wandb=None)
    sinks.say = said.extend  # type: ignore[method-assign]
    look = Witness()
    for step in range(1, 13):
        trainer.last_record = {"step": step, "schedule/batch_sequences": 8, **record_of(step)}
        # The first three would pull every median.
        trainer.busy.walls_s = [9.0] * 3 if step < 4 else [0.125, 3.5, 0.5]
        look(trainer, sinks)
    sinks.close()
    return said


def test_medians_leave_the_first_three_steps_out_and_all_ranks_are_in_what_was_work(
    config: PretrainConfig, tmp_path: Path
) -> None:
    config = replace(config, layout=Layout(pp=2, dp=2))
    (tmp_path / "plan.json").write_text(json.dumps(document_of(measured_of(config))))
    tokens = 8 * config.data.sequence_length

    def record(step: int) -> dict[str, Any]:
        # Steps 4 to 10 take 4, 5, 6, ... s: the median is 7.
        seconds = 100.0 if step < 4 else float(step)
        tables = {f"step/{name}_ms": [[1000.0, 2000.0], [3000.0, 6000.0]] for name in ("data", "gradients", "update")}
        return {"speed/tokens_per_s": tokens / seconds, **tables}

    said = played(config, tmp_path, record)
    card = json.loads((tmp_path / "run_card.json").read_text())
    judged = card["predicted_vs_measured"]
    assert (judged["steps"], judged["batch_sequences"], judged["rank"]) == ([4, 10], 8, 0)
    measured = {name: row["measured"] for name, row in judged["rows"].items()}
    assert measured["step_s"] == pytest.approx(7.0, rel=1e-12)
    assert (measured["gradients_s"], measured["update_s"], measured["data_s"]) == (3.5, 0.5, 0.125)
    # Mean over four ranks, and what is left of the wall time.
    assert (measured["work_s"], measured["waiting_s"]) == (3.0, 0.5)
    assert said[0] == "predicted vs measured: plan by hand of 2026-11-30, medians of steps 4 to 10, rank 0"
    assert said[2] == f"{'step':<34}{'2 s':>12}{'7 s':>12}{'-71%':>9}"
    again = played(config, tmp_path, record)
    assert again == [], "a run is judged once"


def test_of_steps_that_grow_in_the_ramp_the_last_ones_count(config: PretrainConfig, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(document_of(measured_of(config))))

    def record(step: int) -> dict[str, Any]:
        sequences = 8 if step >= 9 else 4
        return {"schedule/batch_sequences": sequences, "speed/tokens_per_s": 256.0 * sequences / step}

    played(config, tmp_path, record)
    judged = json.loads((tmp_path / "run_card.json").read_text())["predicted_vs_measured"]
    assert (judged["steps"], judged["batch_sequences"]) == ([9, 10], 8)
    assert judged["rows"]["step_s"]["measured"] == 9.5
    # One rank has no tables: its own times.
    assert judged["rows"]["work_s"]["measured"] == 3.0


def test_the_card_keeps_what_was_found_out_through_later_writes(tmp_path: Path, config: PretrainConfig) -> None:
    with open_sinks(config.observe, tmp_path, {"name": "run", "products": 1}) as sinks:
        sinks.write_card({"name": "run", "predicted_vs_measured": {"rows": {}}})
        # As a rollback and a resume do.
        sinks.write_card({"name": "run", "dropped_sequences": 3})
    open_sinks(config.observe, tmp_path, {"name": "again"}).close()
    card = json.loads((tmp_path / "run_card.json").read_text())
    assert card == {"name": "again", "predicted_vs_measured": {"rows": {}}}


def test_the_split_of_a_pipeline_is_the_one_that_runs() -> None:
    """Against the stages that every rank builds."""
    config = compose(["+cluster=h800_2048", "run.name=first"])
    candidate = compared(config)
    assert (candidate["chunks"], sum(candidate["stage_layers"]), len(candidate["stage_layers"])) == (2, 61, 32)
    assert candidate["stage_layers"] == list(balanced_layers(layer_costs(config.model), config.layout))
    assert json.loads(json.dumps(candidate)) == candidate
