"""The page of a plan holds the document's numbers, asks for nothing, and refuses what is no whole document.

What a browser shows of it is tested in `test_plan_browser.py`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from tests.studies.parsed_page import Page, check_nothing_is_loaded
from tests.studies.plan.plan_documents import plan_document
from train.studies.plan.page import render
from train.studies.plan.schema import SHAPE
from train.studies.plan.trace import write_trace

HOSTILE = "</script><script>alert(1)</script>{{data}}<b onclick=x>&amp;"


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return plan_document()


@pytest.fixture(scope="module")
def page(document: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Page:
    out = tmp_path_factory.mktemp("page") / "new" / "plan.html"
    render(document, out)
    return Page(out.read_text(encoding="utf-8"))


def test_every_number_of_the_document_is_in_the_page(page: Page, document: dict[str, Any]):
    plan = page.data["plan"]
    timelines = plan.pop("timeline"), document["timeline"]
    assert plan == {key: value for key, value in document.items() if key != "timeline"}
    boxes, spans = (timeline["ranks"] for timeline in timelines)
    assert [len(row) for row in boxes] == [len(row) for row in spans]
    for (start_us, length_us, *parts), (start_s, end_s, actions) in zip(chain(*boxes), chain(*spans), strict=True):
        assert parts == list(chain(*actions))
        # Whole microseconds: half of one at each end.
        assert start_us == pytest.approx(1e6 * start_s, abs=0.5)
        assert start_us + length_us == pytest.approx(1e6 * end_s, abs=0.5)


def test_nothing_is_loaded_from_anywhere(page: Page):
    check_nothing_is_loaded(page)


def test_a_hostile_text_stays_text(tmp_path: Path):
    document = plan_document(2, 8) | {"name": HOSTILE, "words": [HOSTILE], "why_not": HOSTILE}
    render(document, tmp_path / "plan.html")
    page = Page((tmp_path / "plan.html").read_text(encoding="utf-8"))
    assert len(page.scripts) == 5
    assert page.data["plan"]["words"] == [HOSTILE]
    assert page.text.count(f"Plan of {HOSTILE}") == 2
    assert not any("onclick" in attributes for _, attributes in page.elements)


def paths(shape: Any, *before: str | int) -> Iterator[tuple[str | int, ...]]:
    """Every named value that a reader needs; of a list its first item."""
    if isinstance(shape, list):
        yield from paths(shape[0], *before, 0)
    elif isinstance(shape, dict):
        for key in (key for key in shape if key is not str):
            yield (*before, key)
            yield from paths(shape[key], *before, key)


def shown(path: tuple[str | int, ...]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)[1:]


def refused(document: Any, out: Path) -> str:
    with pytest.raises(ValueError, match="make") as refusal:
        render(document, out / "plan.html")
    with pytest.raises(ValueError, match="make") as same:
        write_trace(document, out / "trace.json")
    assert str(refusal.value) == str(same.value)
    assert list(out.iterdir()) == []
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_whatever_is_missing_or_of_another_type_is_named(tmp_path: Path):
    document = plan_document(2, 8)
    # A layout is enough: the document is copied and read some 300 times.
    del document["search"]["rows"][1:]
    named = list(paths(SHAPE))
    # A schema that asks for less would make this test empty.
    assert len(named) > 80
    for path in named:
        for wrong in ("missing", [{}], float("nan")):
            *before, last = path
            place = damaged = copy.deepcopy(document)
            for part in before:
                place = place[part]
            if wrong == "missing":
                del place[last]
            else:
                place[last] = wrong
            complaint = refused(damaged, tmp_path)
            assert shown(path) in complaint, complaint


@pytest.mark.parametrize(
    ("span", "why"),
    [
        ([0.5, 0.25, [["F", 0, 0]]], "ends before it starts"),
        ([0.0, 0.01, [["F", 0, 0]]], "begins before the one before it ends"),
        ([9.0, 9.1, [["X", 0, 0]]], "is of no kind"),
        ([9.0, 9.1, []], "has no action"),
        ([9.0, 9.1, [["F", 0, 0]] * 3], "has three actions"),
        ([9.0, 9.1, [["F", -1, 0]]], "has a negative stage"),
        ([9.0, float("inf"), [["F", 0, 0]]], "never ends"),
        ([9.0, 9.1], "is no triple"),
        ("F", "is a text"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_timeline_is_one_sentence(span: Any, why: str, tmp_path: Path):
    document = plan_document(2, 8)
    document["timeline"]["ranks"][1][1] = span
    assert "timeline.ranks[1][1] is " in refused(document, tmp_path), why


def test_a_foreign_document_is_one_sentence(tmp_path: Path):
    document = plan_document(2, 8)
    assert "no plan document" in refused([document], tmp_path)
    assert "no plan document" in refused({"runs": []}, tmp_path)
    assert "version 2, this code reads 1" in refused(document | {"version": 2}, tmp_path)
    document["memory"]["ranks"][0]["total_bytes"] += 1e3
    assert "memory.ranks[0] has a total that is not the sum" in refused(document, tmp_path)
    document["memory"]["ranks"] = []
    assert "memory.ranks is empty" in refused(document, tmp_path)
    document = plan_document(2, 8)
    document["sources"][0]["label"] = "guessed"
    assert "'guessed', which is none of measured, published, modelled, counted" in refused(document, tmp_path)


def test_what_a_document_holds_besides_is_kept(tmp_path: Path):
    render(json.loads(json.dumps(plan_document(2, 8) | {"note": [1]})), tmp_path / "plan.html")
    assert Page((tmp_path / "plan.html").read_text(encoding="utf-8")).data["plan"]["note"] == [1]
