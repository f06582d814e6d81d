"""Local JSONL files of questions: one object a line, names of fields in any case, errors with file and line number.

read_lines   path -> its lines, blank ones left out
Line         fields by lower-case name; `text` and `optional` take the first of several spellings that is there
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from reprlib import repr as short
from typing import Any


@dataclass(frozen=True)
class Line:
    """One object of a file."""

    path: Path
    number: int
    fields: Mapping[str, Any]

    def error(self, what: str) -> ValueError:
        """An error that names file and line."""
        return ValueError(f"{self.path} line {self.number} {what}")

    def text(self, *names: str) -> str:
        """The first of some fields that is there, which must be text."""
        for name in names:
            if name in self.fields:
                value = self.fields[name]
                if not isinstance(value, str) or not value.strip():
                    raise self.error(f"has {name!r} = {short(value)}, which is no text")
                return value
        raise self.error(f"has no {' or '.join(map(repr, names))}; it has {', '.join(map(repr, self.fields))}")

    def optional(self, *names: str) -> str:
        """The first of some fields that is there, a text or a number, as text; without one, or null, ""."""
        name = next((name for name in names if name in self.fields), "")
        value = self.fields.get(name)
        if value is not None and type(value) not in (str, int, float):
            raise self.error(f"has {name!r} = {short(value)}, which is no text")
        return "" if value is None else str(value)


def read_lines(path: Path) -> Iterator[Line]:
    """The objects of a file; ValueError where it is missing or empty, or a line is no JSON object in UTF-8."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}; give a JSONL file of questions")
    found = False
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    found = True
                    yield _parse(Line(path, number, {}), line)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}); give a JSONL file of questions") from None
    if not found:
        raise ValueError(f"{path} holds no questions; write one JSON object a line")


def _parse(place: Line, line: bytes) -> Line:
    try:
        fields = json.loads(line.decode("utf-8-sig"))
        # Half of a surrogate pair is legal in JSON but no text.
        json.dumps(fields, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise place.error(f"is not JSON in UTF-8 ({error}); write one object a line") from None
    if not isinstance(fields, dict):
        raise place.error("is no JSON object; write one object a line")
    lower = {name.lower(): value for name, value in fields.items()}
    if len(lower) < len(fields):
        raise place.error(f"has two fields of one name but for its case: {', '.join(fields)}; keep one")
    return replace(place, fields=lower)
