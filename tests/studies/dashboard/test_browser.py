"""The page in a real browser: curves are seen, zoom and toggles work, a live run grows, an alarm shows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.studies.dashboard.chromium import Chromium, Tab
from tests.studies.dashboard.synthetic_runs import append, record, with_tables, write_run
from train.observe.sinks import read_run
from train.studies.compare import ema, mean_smoothed_gap, relative_gap
from train.studies.dashboard.page import render
from train.studies.dashboard.server import Server

PLOT = "document.querySelector('#loss-main .plot')"
# Plotly draws f32 values (24 bits) of numbers below 10.
F32 = 2**-23
STEPS = range(1, 61)


def two_runs(folder: Path, steps: range = STEPS) -> list[Path]:
    bf16 = [*(with_tables(record(step)) for step in steps), {"event": "skip", "step": 30}]
    fp8 = [with_tables(record(step, factor=1.001)) for step in steps]
    card: dict[str, Any] = {"layer_ids": [0, 1, 4, 5], "first_k_dense_replace": 1}
    return [
        write_run(folder / "a", bf16, name="tiny_bf16", precision="bf16", seed=1, layer_ids=[0, 1, 4]),
        write_run(folder / "b", fp8, name="tiny_fp8", precision="fp8", seed=2, **card),
    ]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("offline")
    render(two_runs(folder), folder / "page.html", "Two runs")
    return folder / "page.html"


@contextmanager
def opened(chromium: Chromium, url: str, **options: bool) -> Iterator[Tab]:
    """A tab that draws the losses, and in which nothing fails until it is closed."""
    tab = chromium.open(url, **options)
    tab.wait(f"{PLOT}?.data")
    yield tab
    assert tab.problems() == []
    tab.close()


@contextmanager
def followed(chromium: Chromium, folder: Path) -> Iterator[Tab]:
    """The page of a server that follows a folder of runs."""
    with Server([folder], port=0, period_s=0.05) as server, opened(chromium, server.url) as tab:
        yield tab


@pytest.fixture(scope="module")
def offline(chromium: Chromium, page: Path) -> Iterator[Tab]:
    with opened(chromium, page.as_uri()) as tab:
        yield tab


@pytest.fixture
def seen(offline: Tab) -> Tab:
    """The offline page as it opens, for tests that leave it so."""
    if offline.value("window.used"):
        offline.send("Page.reload")
        offline.wait("!window.used && document.readyState === 'complete'")
    # The browser scrolls back to where it was, and only charts in view are drawn.
    show(offline, "loss-main")
    return offline


@pytest.fixture
def fresh(seen: Tab) -> Tab:
    """The offline page as it opens; loaded again for the next test."""
    seen.value("window.used = true")
    return seen


def show(tab: Tab, figure: str) -> None:
    """Scroll to a figure and wait until what it should show is drawn."""
    name = json.dumps(figure)
    tab.wait(f"figures.some(f => f.id === {name})")
    tab.value(f"document.getElementById({name}).scrollIntoView({{block: 'center'}})")
    tab.wait(f"!figures.find(f => f.id === {name}).dirty")


def lines_in(tab: Tab, key: int, figure: str = "loss-main") -> list[dict[str, Any]]:
    """x and y of the run's lines in a figure, the faint one first."""
    return tab.value(
        f"document.querySelector('#{figure} .plot').data.filter(t => t.meta === {key} && t.mode.startsWith('lines'))"
        ".map(t => ({x: Array.from(t.x), y: Array.from(t.y)}))"
    )


def painted(tab: Tab, key: int) -> int:
    """Pixels of the loss chart, as the browser paints it, in the run's colour."""
    script = f"""(async () => {{
      const image = new Image();
      image.src = "data:image/png;base64,{tab.screenshot("#loss-main .plot")}";
      await image.decode();
      const canvas = new OffscreenCanvas(image.width, image.height).getContext("2d");
      canvas.drawImage(image, 0, 0);
      const wanted = color({key}).match(/\\w\\w/g).map(part => parseInt(part, 16));
      const pixels = canvas.getImageData(0, 0, image.width, image.height).data;
      let count = 0;
      for (let i = 0; i < pixels.length; i += 4)
        if (wanted.every((part, c) => Math.abs(part - pixels[i + c]) < 12)) count++;
      return count;
    }})()"""
    return int(tab.value(script))


def drag(tab: Tab, selector: str, *, start: float, end: float) -> None:
    """A horizontal drag over part of an element, given as fractions of its width."""
    box = tab.box(selector)
    xs = [box["x"] + box["width"] * (start + (end - start) * part / 5) for part in range(6)]
    kinds = ["moved", "pressed", *["moved"] * 5, "released"]
    for kind, x in zip(kinds, [xs[0], *xs, xs[-1]], strict=True):
        tab.mouse(kind, x, box["y"] + box["height"] / 2)


def x_range(tab: Tab, figure: str) -> list[float]:
    return tab.value(f"document.querySelector('#{figure} .plot').layout.xaxis.range")


def test_the_offline_page_draws_every_figure_without_an_error(seen: Tab):
    figures = seen.value("figures.map(f => f.id)")
    assert len(figures) >= 15
    for figure in figures:
        show(seen, figure)
    sizes = seen.value(
        "figures.flatMap(f => f.plots.map(p => [f.id, p.plot.clientWidth, p.plot.querySelector('svg').clientHeight]))"
    )
    assert all(width > 250 and height > 150 for _, width, height in sizes), sizes
    assert seen.problems() == []
    assert seen.value("document.documentElement.scrollWidth <= innerWidth"), "the page must not scroll sideways"


def test_the_curves_of_both_runs_are_painted_and_a_toggle_hides_one(seen: Tab):
    chip = ".chip[data-run='1']"
    # A curve of 60 points crosses a chart more than 1000 pixels wide.
    assert painted(seen, 0) > 500
    assert painted(seen, 1) > 500
    seen.click(chip)
    seen.wait(f'document.querySelector("{chip}").getAttribute("aria-pressed") === "false"')
    assert painted(seen, 1) == 0
    assert painted(seen, 0) > 500
    seen.click(chip)
    seen.wait(f'document.querySelector("{chip}").getAttribute("aria-pressed") === "true"')
    assert painted(seen, 1) > 500


def test_the_drawn_numbers_are_the_logged_and_the_smoothed_ones(seen: Tab):
    for key, factor in ((0, 1.0), (1, 1.001)):
        raw, smoothed = lines_in(seen, key)
        logged = [record(step, factor=factor)["loss/main"] for step in STEPS]
        assert raw["y"] == pytest.approx(logged, rel=F32)
        assert smoothed["y"] == pytest.approx(ema(logged, 0.9), rel=4 * F32)
        assert raw["x"] == smoothed["x"] == list(STEPS)


def test_the_gap_is_that_of_compare(seen: Tab, page: Path):
    reference, tested = (read_run(page.parent / name) for name in ("a", "b"))
    show(seen, "gap")
    (line,) = lines_in(seen, 1, "gap")
    # Percent of a difference of f32 values near each other.
    assert line["y"] == pytest.approx([100 * gap for gap in relative_gap(tested, reference)], abs=100 * 4 * F32)
    badge = seen.value("[document.querySelector('#gap .badge')].map(one => [one.textContent, one.className])[0]")
    assert badge == [f"+{100 * mean_smoothed_gap(tested, reference):.3f} %", "badge good"]
    shapes = seen.value(
        "document.querySelector('#gap .plot').layout.shapes.map(s => [s.type, s.y0, s.y1, s.line.color])"
    )
    good = seen.value("css('good')")
    assert shapes[:3] == [["rect", -0.25, 0.25, None], ["line", 0.25, 0.25, good], ["line", -0.25, -0.25, good]]
    assert "against tiny_bf16" in seen.value("document.querySelector('#gap figcaption').textContent")


def test_incidents_stand_on_the_curves(seen: Tab):
    marks = seen.value(
        f"{PLOT}.data.filter(t => t.mode === 'markers').map(t => [t.meta, Array.from(t.x), Array.from(t.y), t.text])"
    )
    smoothed = lines_in(seen, 0)[1]["y"]
    assert marks == [[0, [30], [smoothed[29]], ["step skipped at step 30"]]]
    assert "1 step was skipped" in seen.value("by('notes').textContent")


def test_smoothing_follows_the_slider(fresh: Tab):
    logged = [record(step)["loss/main"] for step in STEPS]
    fresh.value("by('smoothing').value = 3, by('smoothing').dispatchEvent(new Event('input'))")
    assert fresh.value("by('smoothing-text').textContent") == "30 steps"
    assert lines_in(fresh, 0)[1]["y"] == pytest.approx(ema(logged, 1 - 1 / 30), rel=4 * F32)
    fresh.value("by('smoothing').value = 0, by('smoothing').dispatchEvent(new Event('input'))")
    (line,) = lines_in(fresh, 0)
    assert line["y"] == pytest.approx(logged, rel=F32)


def test_the_axis_can_be_tokens_or_hours_and_logarithmic(fresh: Tab):
    fresh.click("[data-axis=tokens]")
    assert lines_in(fresh, 0)[0]["x"] == [512 * step for step in STEPS]
    fresh.click("[data-axis=hours]")
    assert lines_in(fresh, 0)[0]["x"] == pytest.approx([3 * step / 3600 for step in range(60)], abs=1e-9)
    fresh.click("#log-x")
    fresh.click("#log-y")
    assert fresh.value(f"[{PLOT}.layout.xaxis.type, {PLOT}.layout.yaxis.type]") == ["log", "log"]
    assert fresh.problems() == []


def test_a_drag_zooms_every_curve_and_a_button_goes_back(fresh: Tab):
    before = x_range(fresh, "loss-main")
    drag(fresh, "#loss-main .nsewdrag", start=0.25, end=0.5)
    fresh.wait("state.range !== null")
    low, high = x_range(fresh, "loss-main")
    width = before[1] - before[0]
    # A quarter of the axis, to a few pixels of more than a thousand.
    assert high - low == pytest.approx(width / 4, rel=0.02)
    assert low == pytest.approx(before[0] + width / 4, abs=0.02 * width)
    show(fresh, "grad-norm")
    assert x_range(fresh, "grad-norm") == pytest.approx([low, high])
    fresh.click("#reset")
    show(fresh, "loss-main")
    assert x_range(fresh, "loss-main") == pytest.approx(before)


def test_a_click_on_a_layer_shows_it_over_time(fresh: Tab):
    show(fresh, "fp8-health")
    shown = "figures.find(f => f.id === 'fp8-health').plots[1].plot"
    box = fresh.box("#fp8-health .nsewdrag")
    for kind in ("moved", "pressed", "released"):
        fresh.mouse(kind, box["x"] + box["width"] / 2, box["y"] + box["height"] * 5 / 6)
    fresh.wait("state.fp8Layer === 2")
    fresh.wait(f"{shown}.layout.title.text === 'Layer 4 over time'")
    # amax of the third row in synthetic_runs: 3 * (column + 1) / 8, exact in BF16.
    assert fresh.value(f"{shown}.data.map(t => t.y[0])") == [3 * (column + 1) / 8 for column in range(6)]
    assert fresh.value(f"{shown}.data.map(t => t.name)")[:2] == ["x fprop", "w fprop"]


def test_the_heat_map_moves_in_time_with_the_slider(fresh: Tab):
    slider = "document.querySelector('#expert-load input[type=range]')"
    show(fresh, "expert-load")
    fresh.wait(slider)
    assert fresh.value(f"{slider}.max") == "59"
    fresh.value(f"{slider}.value = 9, {slider}.oninput()")
    # Charts are drawn once the browser has seen them come into view.
    fresh.wait("document.querySelector('#expert-load figcaption p').textContent.endsWith('step 10')")
    z = fresh.value("document.querySelector('#expert-load .plot').data[0].z")
    assert z == [[1.5, 0.5, 1, 1], [1, 1, 0.25, 1.75], [1, 1, 1, 1]]


def test_the_slow_rank_stands_out_among_its_stage(seen: Tab):
    show(seen, "rank-busy")
    trace = "document.querySelector('#rank-busy .plot').data[0]"
    assert seen.value(f"{trace}.z.map(row => row[59])") == [1, 3, 1, 1]
    text = seen.value(f"{trace}.text[1][59]").replace("</b>", "")
    assert text.split("<br>")[0] == "pipeline rank 0, data rank 1, step 60"
    assert text.split("<br><b>")[1] == "300 ms<br>data 210 ms<br>forward and backward 80 ms<br>update 10 ms"


def test_the_largest_logit_of_each_head_is_a_map(seen: Tab):
    show(seen, "head-logits")
    z = seen.value("document.querySelector('#head-logits .plot').data[0].z")
    assert z == [[10.0 * (layer + 1) + head for head in range(5)] for layer in range(3)]


def test_the_page_follows_the_reader_into_the_dark(chromium: Chromium, page: Path):
    light = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).reduce((sum, part) => sum + +part, 0)"
    with opened(chromium, page.as_uri(), dark=True) as tab:
        assert tab.value(light) < 150
        tab.click("#theme")
        assert tab.value(light) > 600


def test_long_runs_are_thinned_and_say_so(chromium: Chromium, tmp_path: Path):
    for name, factor in (("a", 1.0), ("b", 1.002)):
        lines = [record(step, factor=factor) for step in range(1, 5_001)]
        lines[2_344]["loss/main"] = 77.0
        write_run(tmp_path / name, lines)
    render([tmp_path], tmp_path / "page.html")
    with opened(chromium, (tmp_path / "page.html").as_uri()) as tab:
        raw, smoothed = lines_in(tab, 0)
        assert len(smoothed["x"]) <= 2048
        assert len(raw["x"]) <= 4096
        assert raw["y"][raw["x"].index(2_345)] == 77.0
        assert "buckets of up to" in tab.value("by('footer').textContent")
        show(tab, "gap")
        # The mean of the gap loses nothing that three digits show: both runs are thinned alike.
        assert tab.value("document.querySelector('#gap .badge').textContent") == "+0.200 %"


def test_a_live_page_gains_points_and_a_third_run_and_tells_of_a_dead_expert(chromium: Chromium, tmp_path: Path):
    _, second = two_runs(tmp_path, range(1, 21))
    with followed(chromium, tmp_path) as tab:
        tab.wait(f"data.runs.length === 2 && {PLOT}.data.some(t => t.meta === 1)")
        tab.value("window.notReloaded = true")
        assert lines_in(tab, 1)[0]["x"] == list(range(1, 21))
        append(second, [with_tables(record(step, factor=1.001), dead=True) for step in range(21, 91)], '{"step":91,"to')
        tab.wait(f"{PLOT}.data.some(t => t.meta === 1 && t.x.length === 90)")
        assert painted(tab, 1) > 500
        tab.wait("document.querySelector('.note.alarm')")
        alarm = tab.value("document.querySelector('.note.alarm').textContent")
        assert "tiny_fp8: 1 expert got no token since step 21, 70 logged steps in a row: MoE layer 4 expert 2" in alarm
        third = write_run(tmp_path / "c", [record(step, factor=1.1) for step in range(1, 11)])
        tab.wait("document.querySelector('.chip[data-run=\"2\"]')?.textContent === 'c'")
        # The card comes later and replaces the entry under the folder's name.
        (third / "run_card.json").write_text('{"name": "late"}')
        tab.wait("[...document.querySelectorAll('.chip')].map(c => c.textContent).join() === 'tiny_bf16,tiny_fp8,late'")
        tab.wait(f"{PLOT}.data.some(t => t.meta === 2)")
        assert lines_in(tab, 2)[0]["y"][0] == pytest.approx(record(1, factor=1.1)["loss/main"], rel=F32)
        show(tab, "expert-load")
        tab.wait("document.querySelector('#expert-load .plot').data?.[0]?.z?.[1][2] === 0")
        assert tab.value("window.notReloaded")


def test_a_run_that_has_not_logged_yet_leaves_the_page_of_the_others_whole(chromium: Chromium, tmp_path: Path):
    empty = write_run(tmp_path / "a", [])
    write_run(tmp_path / "b", [record(step) for step in range(1, 11)], name="logging")
    with followed(chromium, tmp_path) as tab:
        tab.wait("data.runs.length === 2")
        assert lines_in(tab, 1)[0]["x"] == list(range(1, 11))
        append(empty, [record(step) for step in range(1, 6)])
        tab.wait(f"{PLOT}.data.some(t => t.meta === 0 && t.x.length === 5)")


def test_a_zoom_stays_while_new_points_arrive(chromium: Chromium, tmp_path: Path):
    first, _ = two_runs(tmp_path, range(1, 21))
    with followed(chromium, tmp_path) as tab:
        drag(tab, "#loss-main .nsewdrag", start=0.25, end=0.5)
        tab.wait("state.range !== null")
        zoomed = x_range(tab, "loss-main")
        append(first, [record(step) for step in range(21, 41)])
        tab.wait(f"{PLOT}.data.some(t => t.meta === 0 && t.x.length === 40)")
        assert x_range(tab, "loss-main") == zoomed


def test_an_empty_folder_says_what_to_do_and_a_server_that_ends_is_told(chromium: Chromium, tmp_path: Path):
    with Server([tmp_path], port=0, period_s=0.05) as server:
        tab = chromium.open(server.url)
        tab.wait("state.live === 'live'")
        assert "Start one, and it appears" in tab.value("by('table').textContent")
        assert tab.problems() == []
    tab.wait("document.querySelector('.live.lost')")
    tab.close()


def test_a_hostile_name_stays_text(chromium: Chromium, tmp_path: Path):
    name = "</script><img src=x onerror='window.hurt=1'>{{data}}<b>&amp;"
    lines = [with_tables(record(step)) | {"<img src=x onerror='window.hurt=1'>": 1.0} for step in range(1, 5)]
    run = write_run(tmp_path / "run", lines, name=name, precision=name, device=name)
    render([run], tmp_path / "page.html", name)
    with opened(chromium, (tmp_path / "page.html").as_uri()) as tab:
        assert tab.value("document.querySelector('h1').textContent") == name
        assert tab.value("document.querySelector('.chip').textContent") == name
        for figure in tab.value("figures.map(f => f.id)"):
            show(tab, figure)
        assert tab.value("window.hurt") is None
        assert tab.value("document.images.length") == 0


# A tab in the background draws nothing: these come after the tests of the offline page.
ODD: dict[str, Any] = {"name": "odd", "store": {"tokenizer": "2"}, "parameters": {"total": 9}}


@pytest.fixture(scope="module")
def ended(chromium: Chromium, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    """A run stopped with a dead expert, one that paused for 25 hours, one of another text and one step."""
    folder = tmp_path_factory.mktemp("ended")
    events = [{"event": kind, "step": 20} for kind in ("straggler", "spike", "stop")]
    lines = [with_tables(record(step), dead=True) for step in range(1, 21)]
    for line in lines:
        line |= {"moe/expert_load": [[0.0, *[1.0] * 10, 2.0]] * 3, "moe/expert_bias": [[-0.2, 0.0, 0.4, 0.1]] * 3}
        line["fp8/amax"] = [[1.25e-5] * 6] * 3
    card = {"store": {"tokenizer": "1"}, "parameters": {"total": 9}}
    write_run(folder / "a", [*lines, *events], **card, precision="bf16")
    lines = [record(step) for step in range(1, 21)]
    for line in lines[10:]:
        line["time_unix_s"] += 90_000
    lines.insert(10, {"event": "resume", "step": 10})
    write_run(folder / "b", [*lines, {"event": "evaluation", "step": 20, "eval/bits_per_byte": 1.5}], **card)
    write_run(folder / "c", [record(1)], **ODD)
    render([folder], folder / "page.html")
    with opened(chromium, (folder / "page.html").as_uri()) as tab:
        yield tab


def test_the_hours_leave_out_a_pause_and_say_so(ended: Tab):
    ended.click("[data-axis=hours]")
    (line,) = lines_in(ended, 1)[1:]
    # Three seconds a step; the first after the pause takes its 512 tokens at 1,011 tokens/s.
    seconds = [3.0 * step for step in range(10)] + [27 + 512 / 1011 + 3 * step for step in range(10)]
    assert line["x"] == pytest.approx([each / 3600 for each in seconds], abs=1e-9)
    assert "pauses left out" in ended.value(f"{PLOT}.layout.xaxis.title.text")
    assert "left out" in ended.value("document.querySelector('[data-axis=hours]').title")
    ended.click("[data-axis=step]")


def test_a_gap_is_of_one_model_and_text_else_the_page_says_why_not(ended: Tab):
    gap = "document.querySelector('#gap')"
    show(ended, "gap")
    assert ended.value(f"{gap}.querySelectorAll('.badge').length") == 1
    assert "no gap of odd, it is no run of one model and text with a: another tokeniser" in ended.value(
        f"{gap}.innerText"
    )
    ended.value("state.reference = 2, redraw()")
    ended.wait(f"{gap}.querySelectorAll('.badge').length === 0")
    assert "no gap of a (and of 1 more)" in ended.value(f"{gap}.innerText")
    assert ended.value(f"{gap}.querySelector('.plot').clientHeight") == 0
    ended.value("state.reference = null, redraw()")


def test_one_point_has_an_axis_from_zero(ended: Tab):
    show(ended, "eval-bits_per_byte")
    # At step 20 a score of 1.5: in the right part of the axis and in its upper part.
    (x, y) = ended.value(
        "(l => [l.xaxis.range, l.yaxis.range])(document.querySelector('#eval-bits_per_byte .plot').layout)"
    )
    assert (x[0], y[0]) == (0, 0)
    assert 20 < x[1] < 24
    assert 1.5 < y[1] < 2
    ended.value("toggle([0, 1], true)")
    show(ended, "grad-norm")
    assert x_range(ended, "grad-norm")[0] == 0
    ended.value("toggle([0, 1], false)")


def test_a_run_that_has_ended_raises_no_alarm(ended: Tab):
    assert ended.value("data.runs.map(run => [run.status.state, run.dead?.level])")[0] == ["stopped", "idle"]
    notes = ended.value("[...document.querySelectorAll('.note')].map(note => note.textContent)")
    assert notes == ["Notea: 1 step was skipped: the loss left its band (▲ on the curves)."]
    ended.value("data.runs[0].status.state = 'running', fillNotes()")
    assert ended.value("document.querySelectorAll('.note').length") == 3
    ended.value("data.runs[0].status.state = 'stopped', fillNotes()")


def test_biases_are_coloured_by_sign_and_zero_is_neutral(ended: Tab):
    show(ended, "expert-bias")
    colors = ended.value("document.querySelector('#expert-bias .plot').data.map(trace => trace.line.color)")
    blue, grey, orange = (ended.value(f"css('{name}')") for name in ("idle", "soft", "busy"))
    half = ended.value("mixed(css('soft'), css('busy'), .5)")
    # 0.4 is the largest: 0.1 and -0.2 are a half and 0.71 of the way to the colours of their signs.
    assert colors == [ended.value(f"mixed('{grey}', '{blue}', Math.SQRT1_2)"), grey, orange, half]
    assert half == "#" + "".join(
        f"{round((a + b) / 2 + 1e-9):02x}" for a, b in zip(*map(bytes.fromhex, (grey[1:], orange[1:])), strict=True)
    )


# Pairs of numbers in the left maps that cover each other.
OVERLAPS = """(() => {
  const maps = ["#expert-load", "#fp8-health"].map(id => `${id} .plot:first-child .heatmap-label`).join();
  const boxes = [...document.querySelectorAll(maps)].map(one => one.getBoundingClientRect());
  const covers = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
  return boxes.filter((a, i) => boxes.slice(i + 1).some(b => covers(a, b))).length;
})()"""


def test_on_a_phone_the_bar_is_one_line_the_table_is_cards_and_numbers_are_apart(ended: Tab):
    cell = "document.querySelector('#table tbody td:last-child')"
    for width, phone in ((390, True), (1440, False)):
        ended.send("Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=phone)
        ended.wait(f"innerWidth === {width}")
        assert ended.value("by('bar').offsetHeight") < 60
        assert (ended.value("getComputedStyle(document.querySelector('.controls')).display") == "none") is phone
        assert (ended.value(f"{cell}.getBoundingClientRect().left") < 100) is phone
        assert (ended.value(f"getComputedStyle({cell}, '::before').content") == '"Time"') is phone
        for figure in ("expert-load", "fp8-health"):
            show(ended, figure)
        # Twelve experts leave 20 pixels each.
        ended.wait(f"document.querySelectorAll('#expert-load .heatmap-label').length === {0 if phone else 36}")
        # plotly follows the window's width a moment later.
        ended.wait(f"{OVERLAPS} === 0")
        assert ended.value("document.documentElement.scrollWidth <= innerWidth"), width
        if phone:
            ended.click("#menu")
            assert ended.value("getComputedStyle(document.querySelector('.controls')).display") == "flex"
            assert ended.value("by('menu').getAttribute('aria-expanded')") == "true"
            ended.click("#menu")
