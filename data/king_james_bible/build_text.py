"""Make text.jsonl from the output of Debian's `bible` program: one JSON line a chapter.

    bible -l80 "gen1:1-rev22:21" </dev/null | python data/king_james_bible/build_text.py > text.jsonl

Chapter headings become ids, verse numbers are dropped, lines wrapped at 80 columns are joined; a verse is
one line of text. Chapters stand in the order of the SHA-256 of their id: a shuffle that anyone can repeat,
so that the last 10 % are like the rest.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterable

# Narrative books of one style, about 1 MB together.
BOOKS = ("Genesis", "Exodus", "Joshua", "Judges", "Ruth", "1 Samuel", "2 Samuel", "1 Kings", "2 Kings")
HEADING = re.compile(r"([1-3] )?[A-Z][A-Za-z ]* \d+")
VERSE = re.compile(r"  \d+ (.*)")


def chapters(lines: Iterable[str]) -> dict[str, list[str]]:
    """Verses of each chapter, by its heading."""
    found: dict[str, list[str]] = {}
    verses: list[str] = []
    blank_before = True
    for line in (line.rstrip("\n") for line in lines):
        verse = VERSE.fullmatch(line)
        if verse:
            verses.append(verse[1])
        elif blank_before and HEADING.fullmatch(line):
            verses = found.setdefault(line, [])
        elif line:
            verses[-1] += " " + line
        blank_before = not line
    return found


def documents(found: dict[str, list[str]]) -> list[dict[str, str]]:
    """The chapters of BOOKS in the order of the SHA-256 of their headings."""
    kept = [heading for heading in found if heading.rpartition(" ")[0] in BOOKS]
    kept.sort(key=lambda heading: hashlib.sha256(heading.encode()).hexdigest())
    return [{"id": heading, "text": "\n".join(found[heading])} for heading in kept]


if __name__ == "__main__":
    for document in documents(chapters(sys.stdin)):
        print(json.dumps(document))
