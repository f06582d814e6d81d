"""The dashboard's file holds every run's numbers, asks no network for anything, survives odd runs, stays bounded.

What the browser shows of it is tested in `test_browser.py`.
"""

from __future__ import annotations

import base64
import json
import math
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from launch.dashboard import main
from tests.studies.dashboard.synthetic_runs import record, with_tables, write_run
from tests.studies.parsed_page import Page, check_nothing_is_loaded
from train.observe.metrics import FP8_OPERANDS
from train.observe.sinks import read_run
from train.studies.dashboard import page as pages
from train.studies.dashboard.page import CURVE_BYTES, TABLE_BYTES, names, render
from train.studies.dashboard.run_reader import RunReader
from train.studies.dashboard.series import MAX_COLUMNS

HUGE = 10**400


class RunsPage(Page):
    """The page of runs, with their curves."""

    def curve(self, run: int, metric: str, array: str = "mean") -> list[float]:
        packed = self.data["runs"][run]["series"][metric]
        assert packed["width"] == 1
        return np.frombuffer(base64.b64decode(packed[array]), "<u4" if array == "key" else "<f4").tolist()


def two_runs(folder: Path) -> list[Path]:
    events = [{"event": "checkpoint", "step": 20}, {"event": "skip", "step": 30}]
    bf16 = [record(step) for step in range(1, 41)]
    fp8 = [record(step, factor=1.001) for step in range(1, 41)]
    return [
        write_run(folder / "a", bf16, name="tiny_bf16", precision="bf16", parameters={"total": 12_345_678}),
        write_run(folder / "b", [*fp8, *events], name="tiny_fp8", precision="fp8", device="one H100"),
    ]


SCORES, BASELINES = (1.81, 1.82), {"unigram": 2.9, "bigram": 1.87, "xz -9": 1.95}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> RunsPage:
    """Two runs with a configuration and summaries."""
    folder = tmp_path_factory.mktemp("page")
    runs = two_runs(folder)
    (runs[0] / "config.yaml").write_text("optim:\n  lr: 0.5\n")
    for run_dir, score in zip(runs, SCORES, strict=True):
        summary = {"heldout_bits_per_byte": score, "baselines_bits_per_byte": BASELINES}
        (run_dir / "summary.json").write_text(json.dumps(summary))
    return drawn(runs, title="BF16 & FP8")


def drawn(run_dirs: list[Path], title: str = "Training runs") -> RunsPage:
    out = run_dirs[0].parent / "pages" / "page.html"
    render(run_dirs, out, title)
    return RunsPage(out.read_text(encoding="utf-8"))


def test_the_curves_of_both_runs_are_in_the_page(page: RunsPage):
    assert [run["name"] for run in page.data["runs"]] == ["tiny_bf16", "tiny_fp8"]
    drawn_metrics = {chart["metric"] for chart in page.data["charts"]}
    for index, run in enumerate(page.data["runs"]):
        records = read_run(Path(run["directory"]))
        for name in ("loss/main", "loss/mtp", "grad/norm", "optim/lr", "speed/tokens_per_s", "moe/max_violation_ratio"):
            # The page keeps f32: 24 bits.
            assert page.curve(index, name) == pytest.approx([r[name] for r in records], rel=2**-24)
            assert page.curve(index, name, "key") == list(range(1, 41))
            assert name in drawn_metrics


def test_every_metric_that_is_logged_has_a_chart_or_a_picture(tmp_path: Path):
    page = drawn([write_run(tmp_path / "c", [record(1) | {"speed/bubble_ratio": 0.25, "no_area": 1.0}])])
    charts = {chart["metric"]: chart["section"] for chart in page.data["charts"]}
    assert charts["speed/bubble_ratio"] == charts["no_area"] == "more"
    assert {"speed/mfu_ratio", "moe/dead_experts", "schedule/bias_speed", "schedule/mtp_weight"} <= charts.keys()
    assert {"tokens_seen", "time_unix_s", "step", "loss/total"}.isdisjoint(charts)


def test_tables_of_experts_and_fp8_are_in_the_page(tmp_path: Path):
    lines = [with_tables(record(step)) for step in range(1, 9)]
    page = drawn([write_run(tmp_path / "run", lines, layer_ids=[0, 1, 4], first_k_dense_replace=1)])
    run = page.data["runs"][0]
    assert run["table_names"] == sorted(run["tables"])
    assert run["tables"]["moe/expert_bias"]["reduction"] == "last"
    assert run["tables"]["fp8/snr_db"]["reduction"] == "min"
    assert run["tables"]["fp8/amax"]["shape"] == [len(FP8_OPERANDS)] * 3
    assert run["tables"]["fp8/amax"]["first"] == list(range(1, 9))
    assert (run["layer_ids"], run["moe_layer_ids"]) == ([0, 1, 4], [1, 4])
    assert page.data["fp8_operands"] == ["x fprop", "w fprop", "dy dgrad", "w dgrad", "dy wgrad", "x wgrad"]


def test_the_heat_map_averages_neighbouring_steps(tmp_path: Path):
    steps = 2 * MAX_COLUMNS + 30
    lines = [record(s) | {"moe/expert_load": [[2 * s / steps, 1.0], [0.5, 1.5]]} for s in range(1, steps + 1)]
    load = drawn([write_run(tmp_path / "run", lines)]).data["runs"][0]["tables"]["moe/expert_load"]
    spans = np.stack([load["first"], load["last"]], axis=1)
    assert len(spans) <= MAX_COLUMNS
    assert (spans[1:, 0] == spans[:-1, 1] + 1).all()
    assert (spans[0, 0], spans[-1, 1]) == (1, steps)
    bits = np.frombuffer(base64.b64decode(load["cells"]), "<u2").astype("<u4") << 16
    cells = bits.view("<f4").reshape(-1, 4)
    assert (cells[:, 1:] == [1.0, 0.5, 1.5]).all()
    # Each cell is the mean of its own steps, within BF16's 2^-8.
    assert cells[:, 0] == pytest.approx(spans.sum(axis=1) / steps, rel=2**-8)


def test_cards_name_the_runs_and_what_they_are(page: RunsPage):
    first, second = page.data["runs"]
    assert page.text.count("BF16 & FP8") == 2
    assert ["Model", "12.3 M parameters"] in first["facts"]
    assert ["Device", "one H100"] in second["facts"]
    assert ["Tokens", "20.5 k"] in first["row"]
    assert (first["precision"], second["precision"]) == ("bf16", "fp8")
    fields = {"name": "tiny_bf16", "precision": "bf16", "parameters.total": "12345678", "config.optim.lr": "0.5"}
    assert first["fields"] == fields


def test_nothing_is_loaded_from_anywhere(page: RunsPage):
    check_nothing_is_loaded(page)


def test_events_are_in_the_page(page: RunsPage):
    events = page.data["runs"][1]["events"]
    assert events == {"checkpoint": {"total": 1, "steps": [20]}, "skip": {"total": 1, "steps": [30]}}


def test_baselines_stand_beside_the_runs(page: RunsPage):
    for run, score in zip(page.data["runs"], SCORES, strict=True):
        assert (run["bits_per_byte"], run["baselines"]) == (score, BASELINES)


def test_the_last_evaluation_is_the_score_of_a_run_without_summary(tmp_path: Path):
    scores = {4: 2.0, 8: 1.75}
    lines = [record(step) | ({"eval/bits_per_byte": scores[step]} if step in scores else {}) for step in range(1, 9)]
    page = drawn([write_run(tmp_path / "run", lines)])
    assert page.data["runs"][0]["bits_per_byte"] == 1.75
    assert page.curve(0, "eval/bits_per_byte") == [2.0, 1.75]
    assert page.curve(0, "eval/bits_per_byte", "key") == [4, 8]


def test_a_run_with_nan_draws_a_gap_where_the_step_was_skipped(tmp_path: Path):
    lines = [record(step) for step in range(1, 6)]
    lines[2] |= {"loss/main": math.nan, "grad/norm": math.inf}
    page = drawn([write_run(tmp_path / "run", lines)])
    for metric in ("loss/main", "grad/norm"):
        assert [math.isnan(y) for y in page.curve(0, metric)] == [False, False, True, False, False]


def test_odd_runs_do_not_break_the_page(tmp_path: Path):
    odd = [
        write_run(tmp_path / "empty", []),
        write_run(tmp_path / "only_events", [{"event": "start", "step": 0}, {"event": "stop", "step": 0}]),
        write_run(tmp_path / "one_step", [record(1)]),
        write_run(tmp_path / "all_nan", [record(step) | {"loss/main": math.nan} for step in (1, 2)]),
        write_run(tmp_path / "bare", [{"step": 1, "tokens_seen": 2, "time_unix_s": 3.0}]),
    ]
    for run_dir in odd:
        assert [run["name"] for run in drawn([run_dir]).data["runs"]] == [run_dir.name]
    assert len(drawn([*two_runs(tmp_path), *odd]).data["runs"]) == 7


def test_the_page_of_many_runs_stays_within_its_budget(tmp_path: Path):
    reader = RunReader(write_run(tmp_path / "run", [with_tables(record(step)) for step in range(1, 600)]))
    reader.poll()
    readers = [reader] * 50
    curves = [run["series"] | run["axes"] for run in pages.runs_json(readers, 0.0)]
    tables = [pages.tables_json(reader, pages.table_limit(readers)) for reader in readers]
    assert sum(len(json.dumps(run)) for run in curves) < CURVE_BYTES
    assert sum(len(json.dumps(run)) for run in tables) < TABLE_BYTES
    assert pages.curve_limit(readers, CURVE_BYTES) < 599, "the budget must bind in this test"
    highest = np.frombuffer(base64.b64decode(curves[7]["loss/main"]["high"]), "<f4").max()
    assert highest == np.float32(max(r["loss/main"] for r in read_run(tmp_path / "run")))


def test_a_loss_is_known_by_the_model_and_the_data(tmp_path: Path):
    def identity(name: str, model: str, data: str, **card: object) -> dict[str, str]:
        run_dir = write_run(tmp_path / name, [record(1)], **card)
        (run_dir / "config.yaml").write_text(f"model: {model}\ndata: {data}\noptim: {{lr: {len(name)}}}\n")
        return drawn([run_dir]).data["runs"][0]["identity"]

    model, data = "{hidden_size: 256, initializer_range: 0.1}", "{store: a, sequence_length: 64}"
    card = {"store": {"tokenizer": "1f", "tokens.bin": "2e"}, "parameters": {"total": 12345}, "seed": 1}
    found = identity("a", model, data, **card)
    assert found == {
        "hidden_size": "256", "sequence_length": "64", "tokeniser": "1f", "text": "{'tokens.bin': '2e'}",
        "parameters": "12,345",
    }  # fmt: skip
    # Another seed, place of the same text, optimiser and spread of initial values: the same losses in all but chance.
    other = "{hidden_size: 256, initializer_range: 0.2}", "{store: b, sequence_length: 64}"
    assert identity("bb", *other, **card | {"seed": 2}) == found
    assert identity("c", "[1]", "null", store="a", parameters=HUGE) == {}


def test_runs_of_one_name_are_told_apart(tmp_path: Path):
    runs = [RunReader(write_run(tmp_path / place / "tiny", [record(1)])) for place in ("x", "y")]
    assert names(runs) == ["tiny", f"tiny ({runs[1].directory})"]


def test_a_hostile_name_stays_text(tmp_path: Path):
    name = "</script><script>alert(1)</script>{{data}}<b onclick=x>&amp;"
    page = drawn([write_run(tmp_path / "run", [record(1), record(2)], name=name, store=name)], title=name)
    assert len(page.scripts) == 5
    assert page.data["runs"][0]["name"] == name
    assert page.text.count(name) == 2
    assert not any("onclick" in attributes for _, attributes in page.elements)


def test_a_bad_directory_or_card_is_refused_in_words(tmp_path: Path):
    with pytest.raises(ValueError, match=r"nothing_here has no metrics\.jsonl: give the directory of a run"):
        render([tmp_path / "nothing_here"], tmp_path / "page.html")
    with pytest.raises(ValueError, match="no run given"):
        render([], tmp_path / "page.html")
    run_dir = write_run(tmp_path / "run", [record(1)])
    for text, complaint in (("{", "is not JSON"), ("[1]", "holds a list, not an object")):
        (run_dir / "run_card.json").write_text(text)
        with pytest.raises(ValueError, match=rf"run_card\.json {complaint}"):
            render([run_dir], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_the_entrypoint_writes_the_page(tmp_path: Path, run_command: Callable[..., subprocess.CompletedProcess[str]]):
    out = tmp_path / "new" / "compare.html"
    done = run_command("launch/dashboard.py", *two_runs(tmp_path), "--out", out)
    assert re.search(r"compare\.html \(\d\.\d MB\)", done.stdout)
    assert out.stat().st_size > 1e6


def test_the_entrypoint_refuses_with_a_sentence_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(tmp_path), "--out", str(tmp_path / "page.html")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dashboard: ")
    assert error.count("\n") == 1
    with pytest.raises(SystemExit) as refusal:
        main(["--ouput", "x"])
    assert refusal.value.code == 2
