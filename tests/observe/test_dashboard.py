"""The dashboard holds every run's numbers in one page, asks no network for anything, survives odd runs."""

from __future__ import annotations

import json
import math
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from launch.dashboard import main
from train.observe.compare import ema, relative_gap
from train.observe.dashboard import MAX_COLUMNS, render
from train.observe.metrics import Record, encode
from train.observe.sinks import read_run

REPOSITORY = Path(__file__).resolve().parents[2]
LOADING_ATTRIBUTES = {"src", "href", "srcset", "action", "formaction", "data", "poster", "background", "ping"}


@dataclass
class Page(HTMLParser):
    """What a browser would find: elements with attributes, scripts, styles and visible text."""

    elements: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    scripts: list[str] = field(default_factory=list)
    styles: list[str] = field(default_factory=list)
    text: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._open = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open = tag
        if tag in ("script", "style"):
            (self.scripts if tag == "script" else self.styles).append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open == "script":
            self.scripts[-1] += data
        elif self._open == "style":
            self.styles[-1] += data
        elif data.strip():
            self.text.append(data.strip())

    @property
    def data(self) -> Any:
        return json.loads(self.scripts[1])

    def figure(self, name: str) -> dict[str, Any]:
        return {figure["id"]: figure for figure in self.data["figures"]}[name]


def record(step: int, *, factor: float = 1.0) -> Record:
    return {
        "step": step,
        "tokens_seen": 512 * step,
        "time_unix_s": 1000.0 + 3.0 * step,
        "loss/main": factor * (2.0 + 1 / step + 0.1 * math.sin(step)),
        "loss/mtp": factor * (3.0 + 1 / step),
        "grad/norm": 1.0 + 1 / step,
        "optim/lr": 1e-3 / step,
        "speed/tokens_per_s": 1000.0 + step,
        "moe/max_violation_ratio": 1 / step,
        "moe/expert_load": [[1.5, 0.5, 1.0, 1.0], [1.0, 1.0, 0.25, 1.75]],
        "guard/skipped_steps": 0,
    }


def write_run(run_dir: Path, lines: list[Record], **card: object) -> Path:
    run_dir.mkdir(parents=True)
    (run_dir / "metrics.jsonl").write_text("".join(encode(line) + "\n" for line in lines))
    if card:
        (run_dir / "run_card.json").write_text(json.dumps(card))
    return run_dir


@pytest.fixture
def two_runs(tmp_path: Path) -> list[Path]:
    events = [{"event": "checkpoint", "step": 20}, {"event": "skip", "step": 30}]
    bf16 = [record(step) for step in range(1, 41)]
    fp8 = [record(step, factor=1.001) for step in range(1, 41)]
    return [
        write_run(tmp_path / "a", bf16, name="tiny_bf16", precision="bf16", parameters={"total": 12_345_678}),
        write_run(tmp_path / "b", [*fp8, *events], name="tiny_fp8", precision="fp8", device="one H100"),
    ]


def drawn(run_dirs: list[Path], title: str = "Training runs") -> Page:
    out = run_dirs[0].parent / "pages" / "page.html"
    render(run_dirs, out, title)
    page = Page()
    page.feed(out.read_text(encoding="utf-8"))
    page.close()
    return page


def test_the_curves_of_both_runs_are_in_the_page(two_runs: list[Path]):
    page = drawn(two_runs)
    assert [run["name"] for run in page.data["runs"]] == ["tiny_bf16", "tiny_fp8"]
    for index, run_dir in enumerate(two_runs):
        records = read_run(run_dir)
        assert page.data["runs"][index]["axes"]["step"] == list(range(1, 41))
        assert page.data["runs"][index]["axes"]["tokens"][-1] == 512 * 40
        for name in ("loss/main", "loss/mtp", "grad/norm", "speed/tokens_per_s", "moe/max_violation_ratio"):
            traces = [t for t in page.figure(name.replace("/", "-"))["traces"] if t["run"] == index]
            logged = [r[name] for r in records]
            # The page keeps six digits.
            assert traces[0]["y"] == pytest.approx(logged, rel=5e-6)
            assert traces[1]["y"] == pytest.approx(ema(logged, 0.9), rel=5e-6)
        (rate,) = [t for t in page.figure("optim-lr")["traces"] if t["run"] == index]
        assert rate["y"] == pytest.approx([r["optim/lr"] for r in records], rel=5e-6)


def test_every_figure_has_its_place_in_the_page(two_runs: list[Path]):
    page = drawn(two_runs)
    places = [attributes["id"] for tag, attributes in page.elements if tag == "figure"]
    assert places == [figure["id"] for figure in page.data["figures"]]
    assert {"loss-main", "gap", "loss-mtp", "grad-norm", "optim-lr", "expert-load"} <= set(places)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_cards_and_table_name_both_runs_and_what_they_are(two_runs: list[Path]):
    text = drawn(two_runs, title="BF16 & FP8").text
    # Chip, card, the card's list of all fields, and table row.
    assert all(text.count(name) == 4 for name in ("tiny_bf16", "tiny_fp8"))
    assert {"BF16 & FP8", "12.3 M parameters", "one H100", "bf16", "fp8", "20.5 k"} <= set(text)


def test_nothing_is_loaded_from_anywhere(two_runs: list[Path]):
    page = drawn(two_runs)
    for tag, attributes in page.elements:
        for name in LOADING_ATTRIBUTES & attributes.keys():
            assert str(attributes[name]).startswith("data:"), (tag, attributes)
        assert "url(" not in str(attributes.get("style"))
    assert all("url(" not in style and "@import" not in style for style in page.styles)
    # Plotly's own text names sites it could link to; ours names none, and the policy forbids every request.
    plotly, data, ours = page.scripts
    assert "plotly.js v" in plotly[:200]
    assert "://" not in ours + data
    (policy,) = [a["content"] for tag, a in page.elements if tag == "meta" and "http-equiv" in a]
    directives = dict(part.strip().split(" ", 1) for part in str(policy).split(";"))
    assert directives == {
        "default-src": "'none'",
        "script-src": "'unsafe-inline'",
        "style-src": "'unsafe-inline'",
        "img-src": "data: blob:",
    }


@pytest.mark.parametrize("reverse", [False, True])
def test_two_runs_get_their_gap_with_bf16_as_reference(two_runs: list[Path], reverse: bool):
    order = two_runs[::-1] if reverse else two_runs
    gap = drawn(order).figure("gap")
    records = [read_run(run_dir) for run_dir in two_runs]
    expected = [100 * value for value in relative_gap(records[1], records[0])]
    assert gap["traces"][0]["y"] == pytest.approx(expected, rel=1e-5)
    assert gap["hint"].startswith("tiny_fp8 against tiny_bf16")
    # The second run is the first times 1.001, and smoothing is linear.
    assert gap["badge"] == "+0.100 %"
    assert gap["good"]
    assert gap["band"] == 0.25
    assert gap["traces"][0]["by"] == (0 if reverse else 1)


def test_a_gap_beyond_the_band_is_marked_bad(tmp_path: Path):
    runs = [
        write_run(tmp_path / name, [record(step, factor=factor) for step in range(1, 20)])
        for name, factor in (("reference", 1.0), ("worse", 1.004))
    ]
    gap = drawn(runs).figure("gap")
    assert (gap["badge"], gap["good"]) == ("+0.400 %", False)


def test_one_or_three_runs_have_no_gap(two_runs: list[Path]):
    for runs in (two_runs[:1], [*two_runs, two_runs[0]]):
        assert "gap" not in [figure["id"] for figure in drawn(runs).data["figures"]]


def test_events_are_marked_on_the_loss_curve(two_runs: list[Path]):
    loss = drawn(two_runs).figure("loss-main")
    (marks,) = [trace for trace in loss["traces"] if trace["style"] == "events"]
    (smooth,) = [t["y"] for t in loss["traces"] if t["run"] == 1 and t["style"] == "line"]
    assert (marks["run"], marks["rows"], marks["kinds"]) == (1, [19, 29], ["checkpoint", "skip"])
    assert marks["y"] == [smooth[19], smooth[29]]
    assert "○ checkpoint" in loss["hint"]


def test_the_heat_map_averages_neighbouring_steps(tmp_path: Path):
    steps = 2 * MAX_COLUMNS + 30
    lines = [record(s) | {"moe/expert_load": [[2 * s / steps, 1.0], [0.5, 1.5]]} for s in range(1, steps + 1)]
    load = drawn([write_run(tmp_path / "run", lines)]).figure("expert-load")["traces"][0]
    sizes = [last - first + 1 for first, last in load["ranges"]]
    assert len(sizes) <= MAX_COLUMNS
    assert sum(sizes) == steps
    assert load["layers"] == [2, 2]
    assert [len(row) for row in load["z"]] == [len(sizes)] * 4
    assert load["z"][1:] == [[1.0] * len(sizes), [0.5] * len(sizes), [1.5] * len(sizes)]
    # Each cell is the mean of its own steps; the page keeps three digits.
    middles = [(first + last) / steps for first, last in load["ranges"]]
    assert load["z"][0] == pytest.approx(middles, rel=5e-3)


def test_baselines_stand_beside_the_runs(two_runs: list[Path]):
    baselines = {"unigram": 2.9, "bigram": 1.87, "xz -9": 1.95}
    for run_dir, score in zip(two_runs, (1.81, 1.82), strict=True):
        summary = {"heldout_bits_per_byte": score, "baselines_bits_per_byte": baselines}
        (run_dir / "summary.json").write_text(json.dumps(summary))
    page = drawn(two_runs)
    bars = [(bar["label"], bar["value"]) for bar in page.figure("bits-per-byte")["traces"]]
    assert bars == [
        ("tiny_bf16", 1.81),
        ("tiny_fp8", 1.82),
        ("bigram", 1.87),
        ("xz -9", 1.95),
        ("unigram", 2.9),
    ]
    assert {"1.8100", "1.8200", "1.8700", "1.9500", "2.9000", "xz -9"} <= set(page.text)


def test_the_last_evaluation_is_the_score_of_a_run_without_summary(tmp_path: Path):
    lines = [record(step) for step in range(1, 9)]
    lines[3]["eval/bits_per_byte"] = 2.0
    lines[7]["eval/bits_per_byte"] = 1.75
    page = drawn([write_run(tmp_path / "run", lines)])
    assert "1.7500" in page.text
    assert page.figure("eval-bits_per_byte")["traces"][0]["y"] == [None] * 3 + [2.0] + [None] * 3 + [1.75]


def test_a_run_with_nan_draws_a_gap_where_the_step_was_skipped(tmp_path: Path):
    lines = [record(step) for step in range(1, 6)]
    lines[2] |= {"loss/main": math.nan, "grad/norm": math.inf}
    page = drawn([write_run(tmp_path / "run", lines)])
    raw, smooth = page.figure("loss-main")["traces"]
    assert [y is None for y in raw["y"]] == [False, False, True, False, False]
    assert None not in smooth["y"]
    assert page.figure("grad-norm")["traces"][0]["y"][2] is None


def test_odd_runs_do_not_break_the_page(two_runs: list[Path], tmp_path: Path):
    nowhere = [record(step) | {"loss/main": math.nan} for step in (1, 2)]
    odd = [
        write_run(tmp_path / "empty", []),
        write_run(tmp_path / "only_events", [{"event": "start", "step": 0}, {"event": "stop", "step": 0}]),
        write_run(tmp_path / "one_step", [record(1)]),
        write_run(tmp_path / "all_nan", nowhere),
        write_run(tmp_path / "bare", [{"step": 1, "tokens_seen": 2, "time_unix_s": 3.0}]),
    ]
    for run_dir in odd:
        assert run_dir.name in drawn([run_dir]).text
        assert [run["name"] for run in drawn([run_dir, two_runs[0]]).data["runs"]] == [
            run_dir.name,
            "tiny_bf16",
        ]
    page = drawn([*two_runs, *odd])
    assert len(page.data["runs"]) == 7
    assert "No steps yet." in drawn(odd[:1]).text


def test_a_hostile_name_stays_text(tmp_path: Path):
    name = "</script><script>alert(1)</script>{{data}}<b onclick=x>&amp;"
    page = drawn([write_run(tmp_path / "run", [record(1), record(2)], name=name, store=name)], title=name)
    assert len(page.scripts) == 3
    assert page.data["runs"][0]["name"] == name
    assert page.text.count(name) >= 5
    assert not any("onclick" in attributes for _, attributes in page.elements)


def test_runs_of_one_name_are_told_apart(tmp_path: Path):
    runs = [write_run(tmp_path / place / "tiny", [record(1)]) for place in ("x", "y")]
    first, second = (run["name"] for run in drawn(runs).data["runs"])
    assert first == "tiny"
    assert second == f"tiny ({runs[1]})"


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


def test_the_entrypoint_writes_the_page(
    two_runs: list[Path], tmp_path: Path, run_command: Callable[..., subprocess.CompletedProcess[str]]
):
    out = tmp_path / "new" / "compare.html"
    done = run_command("launch/dashboard.py", *two_runs, "--out", out, PYTHONPATH=str(REPOSITORY))
    assert re.search(r"compare\.html \(2 runs, \d\.\d MB\)", done.stdout)
    assert out.stat().st_size > 1e6


def test_the_entrypoint_refuses_with_a_sentence_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(tmp_path), "--out", str(tmp_path / "page.html")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dashboard: ")
    assert error.count("\n") == 1
    with pytest.raises(SystemExit) as refusal:
        main(["--ouput", "x"])
    assert refusal.value.code == 2
