"""The text that ships with the repository is the one its SOURCE.md describes."""

from __future__ import annotations

import hashlib
import json
import re
import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "data" / "king_james_bible"
BUILD = runpy.run_path(str(FOLDER / "build_text.py"))
PRINTED = """
Genesis 50

  25 And Joseph took an oath of the children of Israel, saying, God will surely
visit you.
  26 So Joseph died.

Psalms 1

  1 Blessed is the man.

1 Samuel 31

  1 Now the Philistines fought
against Israel.
"""


@pytest.fixture(scope="module")
def documents() -> list[dict[str, str]]:
    return [json.loads(line) for line in (FOLDER / "text.jsonl").read_text().splitlines()]


def test_the_text_has_the_recorded_hash_and_size() -> None:
    contents = (FOLDER / "text.jsonl").read_bytes()
    recorded = re.search(r"([0-9a-f]{64})  text\.jsonl", (FOLDER / "SOURCE.md").read_text())
    assert recorded is not None
    assert hashlib.sha256(contents).hexdigest() == recorded[1]
    assert 0.9e6 < len(contents) <= 1.1e6


def test_the_text_is_whole_chapters_without_verse_numbers(documents: list[dict[str, str]]) -> None:
    ids = [document["id"] for document in documents]
    # Chapters of Genesis, Exodus, Joshua, Judges, Ruth, 1-2 Samuel, 1-2 Kings.
    assert len(set(ids)) == len(ids) == 50 + 40 + 24 + 21 + 4 + 31 + 24 + 22 + 25
    assert {id_.rpartition(" ")[0] for id_ in ids} == set(BUILD["BOOKS"])
    assert not any(re.search(r"[^\n -~]|\d", document["text"]) for document in documents)
    assert next(d["text"] for d in documents if d["id"] == "Genesis 1").count("\n") == 31 - 1


def test_chapters_are_in_the_order_of_their_hashes(documents: list[dict[str, str]]) -> None:
    ids = [document["id"] for document in documents]
    assert ids == sorted(ids, key=lambda id_: hashlib.sha256(id_.encode()).hexdigest())


def test_held_out_chapters_come_from_most_books(documents: list[dict[str, str]]) -> None:
    heldout = [document["id"] for document in documents[-24:]]
    assert len({id_.rpartition(" ")[0] for id_ in heldout}) >= 6


def test_printed_chapters_become_documents() -> None:
    made = BUILD["documents"](BUILD["chapters"](PRINTED.splitlines(keepends=True)))
    expected = {
        "1 Samuel 31": "Now the Philistines fought against Israel.",
        "Genesis 50": "And Joseph took an oath of the children of Israel, saying, God will surely visit you."
        "\nSo Joseph died.",
    }
    assert {document["id"]: document["text"] for document in made} == expected
