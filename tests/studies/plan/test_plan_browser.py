"""The page of a plan in a real browser: the timeline is painted, zooms and tells; charts, tables, themes, a phone."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.studies.dashboard.chromium import Chromium, Tab
from tests.studies.plan.plan_documents import BIAS, plan_document
from train.studies.plan.page import render

CANVAS = ".lanes canvas"
GUTTER = 34
FIGURES = {"timeline", "phases", "memory", "imbalance", "changes-chart", "found"}
HOSTILE = "<img src=x onerror=alert(1)>&amp;<b>"


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return plan_document()


@pytest.fixture(scope="module")
def url(document: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("plan") / "plan.html"
    render(document, out)
    return out.as_uri()


@pytest.fixture(scope="module")
def tab(chromium: Chromium, url: str) -> Iterator[Tab]:
    tab = chromium.open(url)
    yield tab
    assert tab.problems() == []
    tab.close()


@pytest.fixture
def whole(tab: Tab) -> Tab:
    """The page in its first size and theme, with the whole step in the window."""
    tab.send("Emulation.setDeviceMetricsOverride", width=1440, height=1000, deviceScaleFactor=1, mobile=False)
    tab.wait("innerWidth === 1440")
    tab.value("root.dataset.theme = 'light', show(0, timeline.end), paint(), drawWindow()")
    return tab


def draw_all(tab: Tab) -> None:
    tab.value("figures.forEach(figure => { figure.dirty = true; drawIfDue(figure); })")


def boxes_in(document: dict[str, Any], low_us: float, high_us: float) -> int:
    spans = itertools.chain(*document["timeline"]["ranks"])
    return sum(round(1e6 * end) > low_us and round(1e6 * start) < high_us for start, end, _ in spans)


def settled(tab: Tab) -> tuple[float, float, int]:
    """The window in microseconds, and the boxes that are drawn in it."""
    low, high, drawn = tab.value("[timeline.low, timeline.high, (drawWindow(), timeline.drawn)]")
    return low, high, drawn


def painted(tab: Tab, name: str) -> int:
    """Pixels of the timeline in a colour of the look."""
    return int(
        tab.value(f"""(() => {{
      const wanted = css("{name}").match(/\\w\\w/g).map(part => parseInt(part, 16)), canvas = timeline.canvas;
      const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
      let count = 0;
      for (let i = 0; i < pixels.length; i += 4) if (wanted.every((part, c) => part === pixels[i + c])) count++;
      return count;
    }})()""")
    )


def test_every_figure_is_drawn_and_the_page_asks_for_nothing(whole: Tab, url: str):
    draw_all(whole)
    assert set(whole.value("figures.map(figure => figure.id)")) == FIGURES
    sizes = whole.value(
        "figures.flatMap(f => f.plots.map(p => [p.plot.clientWidth, p.plot.querySelector('svg').clientHeight]))"
    )
    assert all(width > 300 and height > 180 for width, height in sizes), sizes
    assert whole.value("performance.getEntriesByType('resource').length") == 0
    assert whole.value("document.querySelectorAll('#charts > section').length") == 5
    assert whole.value("document.documentElement.scrollWidth <= innerWidth")
    assert whole.problems() == []


def test_the_headline_has_both_totals_and_the_held_out_errors(whole: Tab, document: dict[str, Any]):
    memory, step, per_trillion, run = (
        text.replace("\xa0", " ")
        for text in whole.value("[...document.querySelectorAll('.tile')].map(t => t.innerText)")
    )
    fullest = max(row["total_bytes"] for row in document["memory"]["ranks"])
    assert f"{(80e9 - fullest) / 1e9:.1f} GB\nleft on the fullest rank" in memory
    assert "fits" in memory
    assert f"{document['step']['time_s']:.1f} s" in step
    assert f"{BIAS * document['step']['time_s']:.1f} s" in step
    for number, text in (("152 k", "modelled"), (f"{152 * BIAS:.0f} k", f"corrected × {BIAS}")):
        assert f"{number}\n{text}" in per_trillion
    assert "held-out errors +15 %, +17 %, +15 %" in per_trillion
    for totals in (document["cost"]["modelled"], document["cost"]["corrected"]):
        assert f"{totals['days']:.1f} d" in run
        assert f"$ {totals['dollars'] / 1e6:.2f} M" in run
    assert whole.value("[...document.querySelectorAll('#words p')].map(p => p.textContent)") == document["words"]
    assert "layout.schedule=DualPipeV" in whole.value("by('notes').innerText")


def test_the_timeline_paints_every_kind_and_only_what_its_window_holds(whole: Tab, document: dict[str, Any]):
    low, high, drawn = settled(whole)
    assert (low, high) == (0, round(1e6 * document["timeline"]["step_s"]))
    assert drawn == boxes_in(document, low, high) > 4000
    assert all(painted(whole, name) > 500 for name in ("f", "f-2", "b", "b-2", "i", "i-2", "w", "w-2", "even"))
    whole.value("show(0, 300000)")
    low, high, drawn = settled(whole)
    assert drawn == boxes_in(document, low, high) < 400
    # Nothing but forward runs in the first 0.3 s.
    assert painted(whole, "f") > 5000
    assert painted(whole, "b") == painted(whole, "i") == painted(whole, "w") == 0


def test_buttons_wheel_drag_and_overview_move_the_window(whole: Tab, document: dict[str, Any]):
    end = settled(whole)[1]
    whole.click("#timeline button[title='Zoom in']")
    low, high, drawn = settled(whole)
    assert (low, high) == pytest.approx((0.2 * end, 0.8 * end))
    assert drawn == boxes_in(document, low, high)
    box = whole.box(CANVAS)
    # The time beneath the pointer stays there.
    x, y = box["x"] + GUTTER + 0.25 * (box["width"] - GUTTER), box["y"] + 100
    whole.send("Input.dispatchMouseEvent", type="mouseWheel", x=x, y=y, deltaX=0, deltaY=-300, modifiers=2)
    whole.wait(f"timeline.high - timeline.low < {0.5 * (high - low)}")
    zoomed = settled(whole)
    at = low + 0.25 * (high - low)
    assert zoomed[1] - zoomed[0] == pytest.approx((high - low) / 2.718281828, rel=1e-6)
    assert zoomed[0] + 0.25 * (zoomed[1] - zoomed[0]) == pytest.approx(at, rel=1e-6)
    for kind, moved in (("moved", 0), ("pressed", 0), ("moved", -150), ("released", -150)):
        whole.mouse(kind, x + moved, y)
    panned = settled(whole)
    assert panned[1] - panned[0] == pytest.approx(zoomed[1] - zoomed[0])
    assert panned[0] - zoomed[0] == pytest.approx(150 / (box["width"] - GUTTER) * (zoomed[1] - zoomed[0]))
    strip = whole.box(".overview")
    for kind, part in (("moved", 0.5), ("pressed", 0.5), ("moved", 0.6), ("released", 0.6)):
        whole.mouse(kind, strip["x"] + part * strip["width"], strip["y"] + 10)
    low, high, drawn = settled(whole)
    assert (low, high) == pytest.approx((0.5 * end, 0.6 * end))
    assert drawn == boxes_in(document, low, high)
    whole.value("timeline.canvas.focus()")
    whole.send("Input.dispatchKeyEvent", type="keyDown", key="0", text="0")
    assert settled(whole)[:2] == (0, end)


def test_resting_on_a_pair_tells_both_actions_and_frames_the_micro_batch(whole: Tab, document: dict[str, Any]):
    rank = 5
    start_s, end_s, pair = next(span for span in document["timeline"]["ranks"][rank] if len(span[2]) == 2)
    whole.value(f"show({1e6 * start_s - 200000}, {1e6 * end_s + 200000})")
    low, high, _ = settled(whole)
    box = whole.box(CANVAS)
    x = box["x"] + GUTTER + (1e6 * (start_s + end_s) / 2 - low) / (high - low) * (box["width"] - GUTTER)
    height = (box["height"] - 24) / 16
    before = painted(whole, "ink")
    whole.mouse("moved", x, box["y"] + rank * height + 5)
    whole.wait("!timeline.tip.hidden")
    text = whole.value("timeline.tip.innerText")
    for kind, (_, stage, micro_batch) in zip(("Forward", "Backward"), pair, strict=True):
        assert f"{kind} · stage {stage} · micro-batch {micro_batch}" in text
    assert f"pipeline rank {rank} · starts {start_s:.3f} s · takes {1e3 * (end_s - start_s):.2f} ms" in text
    # The upper half is the forward, the lower one the backward.
    assert whole.value("timeline.hover.microBatch") == pair[0][2]
    assert (settled(whole), painted(whole, "ink") > before + 100)[1]
    whole.mouse("moved", x, box["y"] + rank * height + height - 8)
    whole.wait(f"timeline.hover.microBatch === {pair[1][2]}")
    whole.mouse("moved", 5, 5)
    whole.wait("timeline.tip.hidden")
    idle = document["timeline"]["ranks"][15][0][0]
    whole.value("show(0, 300000)")
    settled(whole)
    whole.mouse("moved", box["x"] + GUTTER + 40, box["y"] + 15 * height + 8)
    whole.wait("!timeline.tip.hidden")
    assert f"Idle for {1e3 * idle:.2f} ms" in whole.value("timeline.tip.innerText")


def column(tab: Tab, label: str) -> list[str]:
    cells = f"[...document.querySelectorAll('#layouts td[data-label={label}]')].filter(cell => cell.offsetParent)"
    return [str(text) for text in tab.value(f"{cells}.map(cell => cell.textContent)")]


def test_the_table_of_layouts_sorts_and_hides_what_does_not_fit(whole: Tab, document: dict[str, Any]):
    rows = document["search"]["rows"]
    # Cheapest first, as it opens.
    assert column(whole, "Memory")[:2] == [
        f"{row['memory_bytes'] / 1e9:.1f}\xa0GB" for row in sorted(rows, key=lambda row: row["modelled"])[:2]
    ]
    sizes = [f"{size / 1e9:.1f}\xa0GB" for size in sorted(row["memory_bytes"] for row in rows)]
    whole.click("#layouts th:nth-child(9) button")
    assert column(whole, "Memory") == sizes
    whole.click("#layouts th:nth-child(9) button")
    assert column(whole, "Memory") == sizes[::-1]
    assert whole.value("document.querySelector('#layouts [aria-sort]').textContent") == "Memory"
    whole.click("#layouts .block .choice button")
    assert set(column(whole, "Fits")) == {"yes"}
    assert len(column(whole, "Fits")) == document["search"]["fit"]
    whole.click("#layouts .block .choice button")


def test_a_click_on_a_point_finds_its_row(whole: Tab):
    draw_all(whole)
    plot = "document.querySelector('#found .plot')"
    wanted = whole.value(f"{plot}.data.find(trace => trace.name === 'this plan').customdata[0][0]")
    box = whole.box("#found .plot")
    place = f"(axis, value) => {plot}._fullLayout[axis]._offset + {plot}._fullLayout[axis].d2p(value)"
    row = f"search.rows[{wanted}]"
    x, y = (
        whole.value(f"({place})('{a}', {v})")
        for a, v in (("xaxis", f"{row}.memory_bytes / GB"), ("yaxis", f"{row}.modelled"))
    )
    for kind in ("moved", "pressed", "released"):
        whole.mouse(kind, box["x"] + x, box["y"] + y)
    whole.wait("document.querySelector('#layouts .picked')")
    assert "chosen" in whole.value("document.querySelector('#layouts .picked').className")


def test_tables_hold_both_totals_and_every_source_its_label(whole: Tab, document: dict[str, Any]):
    text = whole.value("by('cost').innerText")
    for change in document["changes"]:
        assert change["what"] in text
        assert f"{change['modelled'] / 1e3:.0f} k" in text
        assert f"{change['corrected'] / 1e3:.0f} k" in text
    assert "whole recipe" in text
    labels = whole.value("[...document.querySelectorAll('#sources .label')].map(label => label.textContent)")
    assert labels == [row["label"] for row in document["sources"]]


def test_dark_and_light_repaint_everything(whole: Tab):
    light = painted(whole, "f"), whole.value("css('f')")
    # In one go: nothing else may have it drawn in between.
    whole.value("by('theme').click(), timeline.due = true")
    assert whole.value("root.dataset.theme") == "dark"
    assert whole.value("css('f')") != light[1]
    # Edges that share a pixel are mixed with another paper.
    assert painted(whole, "f") > 0.9 * light[0]
    draw_all(whole)
    assert whole.value("document.querySelector('#memory .plot').layout.font.color") == whole.value("css('ink')")


def test_on_a_phone_nothing_scrolls_sideways_but_inside_a_frame(whole: Tab):
    whole.send("Emulation.setDeviceMetricsOverride", width=400, height=844, deviceScaleFactor=2, mobile=True)
    whole.wait("innerWidth === 400 && timeline.canvas.width === 2 * timeline.canvas.clientWidth")
    whole.wait("timeline.canvas.clientWidth < 380")
    draw_all(whole)
    assert whole.value("document.documentElement.scrollWidth") == 400
    assert painted(whole, "f") > 500
    assert whole.value("(table => table.scrollWidth > table.clientWidth)(document.querySelector('#layouts .table'))")
    # Tables that are not sorted are cards.
    cell = "document.querySelector('#cost td')"
    assert whole.value(f"getComputedStyle({cell}, '::before').content") == '"Step"'


def test_odd_and_hostile_plans_open_without_an_error(chromium: Chromium, tmp_path: Path):
    odd = json.loads(json.dumps(plan_document(2, 8)).replace("DualPipeV", HOSTILE))
    odd["memory"]["ranks"][0]["components"]["<i>more"] = 20e9
    odd["memory"]["ranks"][0]["total_bytes"] += 20e9
    odd["memory"] |= {"breaks_at": None, "imbalance": []}
    odd["cost"] |= {"held_out": [], "parts": []}
    odd["search"]["rows"] = [row for row in odd["search"]["rows"] if row["schedule"] == HOSTILE]
    odd["timeline"]["ranks"][1] = []
    odd |= {"name": HOSTILE, "words": [HOSTILE], "changes": odd["changes"][:1], "sources": [], "runs_today": True}
    render(odd, tmp_path / "odd.html")
    tab = chromium.open((tmp_path / "odd.html").as_uri(), dark=True)
    draw_all(tab)
    assert tab.value("root.dataset.theme") == "dark"
    assert "does not fit" in tab.value("by('headline').innerText")
    assert tab.value("by('words').querySelector('p').textContent") == HOSTILE
    assert tab.value("document.querySelectorAll('img, #charts i').length") == 0
    # plotly reads some tags in texts.
    texts = tab.value(
        "JSON.stringify(figures.flatMap(f => f.plots.map(p => [p.plot.data, p.plot.layout.annotations])))"
    )
    assert "&lt;img" in texts
    assert "<img" not in texts
    assert "<i>" not in texts
    assert tab.problems() == []
    tab.close()
