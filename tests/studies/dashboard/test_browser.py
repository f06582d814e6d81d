"""The page in a real browser: curves are seen, zoom and toggles work, a live run grows, an alarm shows.

Needs Debian's `chromium` (`.ci/setup dev` installs it). Without it these tests skip aloud; where CI=true they fail.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.studies.dashboard.chromium import Chromium, Tab, find_chromium
from tests.studies.dashboard.synthetic_runs import lines_of, record, with_tables, write_run
from train.observe.sinks import read_run
from train.studies.compare import ema, mean_smoothed_gap, relative_gap
from train.studies.dashboard.page import render
from train.studies.dashboard.server import Server

PLOT = "document.querySelector('#loss-main .plot')"
# Plotly draws f32 values (24 bits) of numbers below 10.
F32 = 2**-23


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    path = find_chromium()
    if path is None:
        say = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        say("no chromium here; CI installs one and fails without it: apt install chromium, or .ci/setup dev as root")
    with Chromium(path, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def two_runs(place: Path, *, steps: int = 60, dead: bool = False) -> list[Path]:
    bf16 = [with_tables(record(step)) for step in range(1, steps + 1)]
    fp8 = [with_tables(record(step, factor=1.001), dead=dead and step > 5) for step in range(1, steps + 1)]
    return [
        write_run(
            place / "a",
            [*bf16, {"event": "skip", "step": 30}],
            name="tiny_bf16",
            precision="bf16",
            seed=1,
            layer_ids=[0, 1, 4],
        ),
        write_run(
            place / "b",
            fp8,
            name="tiny_fp8",
            precision="fp8",
            seed=2,
            layer_ids=[0, 1, 4, 5],
            first_k_dense_replace=1,
        ),
    ]


@pytest.fixture(scope="module")
def offline(chromium: Chromium, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    place = tmp_path_factory.mktemp("offline")
    render(two_runs(place), place / "page.html", "Two runs")
    tab = chromium.open((place / "page.html").as_uri())
    tab.wait(f"{PLOT}.data")
    yield tab
    tab.close()


@pytest.fixture
def fresh(offline: Tab) -> Tab:
    """The offline page, loaded again."""
    offline.value("window.old = true")
    offline.send("Page.reload")
    offline.wait("!window.old && document.readyState === 'complete'")
    # The browser scrolls back to where it was, and only charts in view are drawn.
    offline.value("scrollTo(0, 0)")
    offline.wait(f"{PLOT}.data")
    return offline


def lines_in(tab: Tab, key: int, figure: str = "loss-main") -> list[dict[str, Any]]:
    """x, y and visibility of the run's lines in a figure, the faint one first."""
    return tab.value(
        f"document.querySelector('#{figure} .plot').data.filter(t => t.meta === {key} && t.mode.startsWith('lines'))"
        ".map(t => ({x: Array.from(t.x), y: Array.from(t.y), visible: t.visible}))"
    )


def painted(tab: Tab, key: int) -> int:
    """Pixels of the loss chart, as the browser paints it, in the run's colour."""
    import base64

    clip = tab.box("#loss-main .plot")
    clip["y"] += tab.value("scrollY")
    picture = base64.b64encode(tab.screenshot(clip)).decode()
    return int(
        tab.value(
            f"""(async () => {{
              const image = new Image();
              image.src = "data:image/png;base64,{picture}";
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
        )
    )


def drag(tab: Tab, selector: str, *, start: float, end: float) -> None:
    """A horizontal drag over part of an element, given as fractions of its width."""
    box = tab.box(selector)
    y = box["y"] + box["height"] / 2
    xs = [box["x"] + box["width"] * (start + (end - start) * part / 5) for part in range(6)]
    tab.mouse("moved", xs[0], y)
    tab.mouse("pressed", xs[0], y)
    for x in xs[1:]:
        tab.mouse("moved", x, y)
    tab.mouse("released", xs[-1], y)


def x_range(tab: Tab, figure: str) -> list[float]:
    return tab.value(f"document.querySelector('#{figure} .plot').layout.xaxis.range")


def test_the_offline_page_draws_every_figure_without_an_error(fresh: Tab):
    count = fresh.value("figures.length")
    assert count >= 15
    for index in range(count):
        fresh.value(f"figures[{index}].place.scrollIntoView()")
        fresh.wait(f"figures[{index}].plots.every(part => part.plot.data && part.plot.querySelector('svg'))")
    sizes = fresh.value(
        "figures.flatMap(f => f.plots.map(p => [f.id, p.plot.clientWidth, p.plot.querySelector('svg').clientHeight]))"
    )
    assert all(width > 250 and height > 150 for _, width, height in sizes), sizes
    assert fresh.problems() == []
    assert fresh.value("document.documentElement.scrollWidth <= innerWidth"), "the page must not scroll sideways"


def test_the_curves_of_both_runs_are_painted_and_a_toggle_hides_one(fresh: Tab):
    # A curve of 60 points crosses a chart more than 1000 pixels wide.
    assert painted(fresh, 0) > 500
    assert painted(fresh, 1) > 500
    fresh.click(".chip[data-run='1']")
    fresh.wait("document.querySelector('.chip[data-run=\"1\"]').getAttribute('aria-pressed') === 'false'")
    assert painted(fresh, 1) == 0
    assert painted(fresh, 0) > 500
    fresh.click(".chip[data-run='1']")
    fresh.wait("document.querySelector('.chip[data-run=\"1\"]').getAttribute('aria-pressed') === 'true'")
    assert painted(fresh, 1) > 500


def test_the_drawn_numbers_are_the_logged_and_the_smoothed_ones(fresh: Tab):
    for key, factor in ((0, 1.0), (1, 1.001)):
        raw, smoothed = lines_in(fresh, key)
        logged = [record(step, factor=factor)["loss/main"] for step in range(1, 61)]
        assert raw["y"] == pytest.approx(logged, rel=F32)
        assert smoothed["y"] == pytest.approx(ema(logged, 0.9), rel=4 * F32)
        assert raw["x"] == smoothed["x"] == list(range(1, 61))


def test_smoothing_follows_the_slider(fresh: Tab):
    fresh.value("by('smoothing').value = 3, by('smoothing').dispatchEvent(new Event('input'))")
    logged = [record(step)["loss/main"] for step in range(1, 61)]
    assert fresh.value("by('smoothing-text').textContent") == "30 steps"
    assert lines_in(fresh, 0)[1]["y"] == pytest.approx(ema(logged, 1 - 1 / 30), rel=4 * F32)
    fresh.value("by('smoothing').value = 0, by('smoothing').dispatchEvent(new Event('input'))")
    (line,) = lines_in(fresh, 0)
    assert line["y"] == pytest.approx(logged, rel=F32)


def test_the_axis_can_be_tokens_or_hours_and_logarithmic(fresh: Tab):
    fresh.click("[data-axis=tokens]")
    assert lines_in(fresh, 0)[0]["x"] == [512 * step for step in range(1, 61)]
    fresh.click("[data-axis=hours]")
    assert lines_in(fresh, 0)[0]["x"] == pytest.approx([3 * step / 3600 for step in range(60)], abs=1e-9)
    fresh.click("#log-x")
    fresh.click("#log-y")
    axes = fresh.value(f"[{PLOT}.layout.xaxis.type, {PLOT}.layout.yaxis.type]")
    assert axes == ["log", "log"]
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
    fresh.value("document.querySelector('#grad-norm').scrollIntoView()")
    fresh.wait("document.querySelector('#grad-norm .plot').layout")
    assert x_range(fresh, "grad-norm") == pytest.approx([low, high])
    fresh.click("#reset")
    fresh.value("document.querySelector('#loss-main').scrollIntoView()")
    fresh.wait("!figures.find(figure => figure.id === 'loss-main').dirty")
    assert x_range(fresh, "loss-main") == pytest.approx(before)


def test_the_gap_is_that_of_compare(fresh: Tab, tmp_path: Path):
    reference, tested = map(read_run, two_runs(tmp_path))
    fresh.value("document.querySelector('#gap').scrollIntoView()")
    fresh.wait("document.querySelector('#gap .plot').data")
    (line,) = lines_in(fresh, 1, "gap")
    # Percent of a difference of f32 values near each other.
    assert line["y"] == pytest.approx([100 * gap for gap in relative_gap(tested, reference)], abs=100 * 4 * F32)
    badge = fresh.value("document.querySelector('#gap .badge').textContent")
    assert badge == f"+{100 * mean_smoothed_gap(tested, reference):.3f} %"
    assert fresh.value("document.querySelector('#gap .badge').classList.contains('good')")
    gap = "document.querySelector('#gap .plot')"
    assert fresh.value(f"{gap}.layout.shapes.map(s => [s.type, s.y0, s.y1, s.line.color])")[1:3] == [
        ["line", 0.25, 0.25, fresh.value("css('good')")],
        ["line", -0.25, -0.25, fresh.value("css('good')")],
    ]
    assert fresh.value(f"{gap}.layout.shapes.filter(s => s.type === 'rect').map(s => [s.y0, s.y1])") == [[-0.25, 0.25]]
    assert "against tiny_bf16" in fresh.value("document.querySelector('#gap figcaption').textContent")


def test_a_click_on_a_layer_shows_it_over_time(fresh: Tab):
    fresh.value("document.querySelector('#fp8-health').scrollIntoView({block: 'center'})")
    fresh.wait("document.querySelector('#fp8-health .plot').data")
    shown = "figures.find(f => f.id === 'fp8-health').plots[1].plot"
    box = fresh.box("#fp8-health .nsewdrag")
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] * 5 / 6
    for kind in ("moved", "pressed", "released"):
        fresh.mouse(kind, x, y)
    fresh.wait("state.fp8Layer === 2")
    fresh.wait(f"{shown}.layout.title.text === 'Layer 4 over time'")
    # amax of the third row in synthetic_runs: 3 * (column + 1) / 8, exact in BF16.
    assert fresh.value(f"{shown}.data.map(t => t.y[0])") == [3 * (column + 1) / 8 for column in range(6)]
    assert fresh.value(f"{shown}.data.map(t => t.name)")[:2] == ["x fprop", "w fprop"]


def test_the_heat_map_moves_in_time_with_the_slider(fresh: Tab):
    fresh.value("document.querySelector('#expert-load').scrollIntoView({block: 'center'})")
    fresh.wait("document.querySelector('#expert-load input[type=range]')")
    fresh.wait("document.querySelector('#expert-load .plot').data")
    slider = "document.querySelector('#expert-load input[type=range]')"
    assert fresh.value(f"{slider}.max") == "59"
    fresh.value(f"{slider}.value = 9, {slider}.oninput()")
    # Charts are drawn once the browser has seen them come into view.
    fresh.wait("document.querySelector('#expert-load figcaption p').textContent.endsWith('step 10')")
    z = fresh.value("document.querySelector('#expert-load .plot').data[0].z")
    assert z == [[1.5, 0.5, 1, 1], [1, 1, 0.25, 1.75], [1, 1, 1, 1]]


def test_incidents_stand_on_the_curves(fresh: Tab):
    marks = fresh.value(
        f"{PLOT}.data.filter(t => t.mode === 'markers').map(t => [t.meta, Array.from(t.x), Array.from(t.y), t.text])"
    )
    smoothed = lines_in(fresh, 0)[1]["y"]
    assert marks == [[0, [30], [smoothed[29]], ["step skipped at step 30"]]]
    assert "1 step was skipped" in fresh.value("by('notes').textContent")


def test_the_page_follows_the_reader_into_the_dark(chromium: Chromium, tmp_path: Path):
    render(two_runs(tmp_path), tmp_path / "page.html")
    tab = chromium.open((tmp_path / "page.html").as_uri(), dark=True)
    tab.wait(f"{PLOT}.data")
    light = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).reduce((sum, part) => sum + +part, 0)"
    assert tab.value(light) < 150
    tab.click("#theme")
    assert tab.value(light) > 600
    assert tab.problems() == []
    tab.close()


def test_long_runs_are_thinned_and_say_so(chromium: Chromium, tmp_path: Path):
    steps = 10_000
    spike = {"loss/main": 77.0}
    runs = [
        write_run(tmp_path / name, [record(s, factor=f) | (spike if s == 2_345 else {}) for s in range(1, steps + 1)])
        for name, f in (("a", 1.0), ("b", 1.002))
    ]
    render(runs, tmp_path / "page.html")
    tab = chromium.open((tmp_path / "page.html").as_uri())
    tab.wait(f"{PLOT}.data")
    raw, smoothed = lines_in(tab, 0)
    assert len(smoothed["x"]) <= 2048
    assert len(raw["x"]) <= 4096
    assert raw["y"][raw["x"].index(2_345)] == 77.0
    assert "buckets of up to" in tab.value("by('footer').textContent")
    tab.value("document.querySelector('#gap').scrollIntoView()")
    tab.wait("document.querySelector('#gap .badge')")
    # The mean of the gap loses nothing that three digits show: both runs are thinned alike.
    assert tab.value("document.querySelector('#gap .badge').textContent") == "+0.200 %"
    tab.close()


def test_a_live_page_gains_points_and_a_third_run_and_tells_of_a_dead_expert(chromium: Chromium, tmp_path: Path):
    first, second = two_runs(tmp_path / "runs", steps=20)
    with Server([tmp_path / "runs"], port=0, period_s=0.05) as server:
        tab = chromium.open(server.url)
        tab.wait("state.live === 'live' && data.runs.length === 2")
        tab.wait(f"{PLOT} && {PLOT}.data")
        tab.value("window.notReloaded = true")
        assert lines_in(tab, 1)[0]["x"] == list(range(1, 21))
        with (second / "metrics.jsonl").open("a") as file:
            file.write(lines_of([with_tables(record(step, factor=1.001), dead=True) for step in range(21, 91)]))
            file.write('{"step":91,"tokens')
        tab.wait(f"{PLOT}.data.some(t => t.meta === 1 && t.x.length === 90)")
        assert painted(tab, 1) > 500
        tab.wait("document.querySelector('.note.alarm')")
        alarm = tab.value("document.querySelector('.note.alarm').textContent")
        assert "tiny_fp8: 1 expert got no token since step 21, 70 logged steps in a row: MoE layer 4 expert 2" in alarm
        third = write_run(tmp_path / "runs" / "c", [record(step, factor=1.1) for step in range(1, 11)])
        tab.wait("document.querySelector('.chip[data-run=\"2\"]')?.textContent === 'c'")
        # The card comes later and replaces the entry under the folder's name.
        (third / "run_card.json").write_text('{"name": "late"}')
        tab.wait("[...document.querySelectorAll('.chip')].map(c => c.textContent).join() === 'tiny_bf16,tiny_fp8,late'")
        tab.wait(f"{PLOT}.data.some(t => t.meta === 2)")
        assert lines_in(tab, 2)[0]["y"][0] == pytest.approx(record(1, factor=1.1)["loss/main"], rel=F32)
        tab.value("document.querySelector('#expert-load').scrollIntoView({block: 'center'})")
        tab.wait("document.querySelector('#expert-load .plot').data?.[0]?.z?.[1][2] === 0")
        assert tab.value("window.notReloaded")
        assert tab.problems() == []
        tab.close()
    assert first.is_dir()


def test_a_run_that_has_not_logged_yet_leaves_the_page_of_the_others_whole(chromium: Chromium, tmp_path: Path):
    empty = write_run(tmp_path / "runs" / "a", [])
    write_run(tmp_path / "runs" / "b", [record(step) for step in range(1, 11)], name="logging")
    with Server([tmp_path / "runs"], port=0, period_s=0.05) as server:
        tab = chromium.open(server.url)
        tab.wait(f"state.live === 'live' && data.runs.length === 2 && {PLOT}?.data")
        assert lines_in(tab, 1)[0]["x"] == list(range(1, 11))
        (empty / "metrics.jsonl").write_text(lines_of([record(step) for step in range(1, 6)]))
        tab.wait(f"{PLOT}.data.some(t => t.meta === 0 && t.x.length === 5)")
        assert tab.problems() == []
        tab.close()


def test_a_zoom_stays_while_new_points_arrive(chromium: Chromium, tmp_path: Path):
    first, _ = two_runs(tmp_path / "runs", steps=20)
    with Server([tmp_path / "runs"], port=0, period_s=0.05) as server:
        tab = chromium.open(server.url)
        tab.wait(f"{PLOT} && {PLOT}.data")
        drag(tab, "#loss-main .nsewdrag", start=0.25, end=0.5)
        tab.wait("state.range !== null")
        zoomed = x_range(tab, "loss-main")
        with (first / "metrics.jsonl").open("a") as file:
            file.write(lines_of([record(step) for step in range(21, 41)]))
        tab.wait(f"{PLOT}.data.some(t => t.meta === 0 && t.x.length === 40)")
        assert x_range(tab, "loss-main") == zoomed
        tab.close()


def test_an_empty_folder_says_what_to_do_and_a_server_that_ends_is_told(chromium: Chromium, tmp_path: Path):
    server = Server([tmp_path], port=0, period_s=0.05)
    try:
        tab = chromium.open(server.url)
        tab.wait("state.live === 'live'")
        assert "Start one, and it appears" in tab.value("by('table').textContent")
        assert tab.problems() == []
    finally:
        server.close()
    tab.wait("document.querySelector('.live.lost')")
    tab.close()


def test_a_hostile_name_stays_text(chromium: Chromium, tmp_path: Path):
    name = "</script><img src=x onerror='window.hurt=1'>{{data}}<b>&amp;"
    lines = [with_tables(record(step)) | {"<img src=x onerror='window.hurt=1'>": 1.0} for step in range(1, 5)]
    run = write_run(tmp_path / "run", lines, name=name, precision=name, device=name)
    render([run], tmp_path / "page.html", name)
    tab = chromium.open((tmp_path / "page.html").as_uri())
    tab.wait(f"{PLOT}.data")
    assert tab.value("document.querySelector('h1').textContent") == name
    assert tab.value("document.querySelector('.chip').textContent") == name
    for index in range(tab.value("figures.length")):
        tab.value(f"figures[{index}].place.scrollIntoView()")
        tab.wait(f"figures[{index}].plots.every(part => part.plot.data)")
    assert tab.value("window.hurt") is None
    assert tab.value("document.images.length") == 0
    assert tab.problems() == []
    tab.close()
