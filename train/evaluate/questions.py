r"""Questions from local JSONL files: one object a line, read into one shape, refused with file and line number.

Multiple choice, by the fields that are there:

    MMLU-Pro  {"question", "options": [...], "answer": "C", "answer_index": 2, "category"}
    MMLU      {"question", "choices": [...], "answer": 2 or "C", "subject"}
    GPQA      {"Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", ..., "Subdomain"}

GPQA lists the right option first, so its options are always shuffled: the order is drawn from the seed and the
question's text, so it depends on neither the file's order nor on what else is in it.

Problems with a final answer:

    MATH      {"problem", "solution": "... \boxed{...} ...", "level", "type"}
    AIME      {"problem" or "question", "answer": "042" or 42}

Names of fields may begin with a capital. Not here: prompts and scores (`choice.py`, `exact.py`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.evaluate.answers import boxed

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
CATEGORY_FIELDS = ("category", "subject", "subdomain", "high-level domain", "type")


@dataclass(frozen=True)
class Choice:
    """One multiple-choice question.

    Args:
        question: its text.
        options: texts to choose from, two or more, in the order they are shown.
        answer: index of the right one.
        category: for the table by category; "" where the file has none.
    """

    question: str
    options: tuple[str, ...]
    answer: int
    category: str = ""


@dataclass(frozen=True)
class Problem:
    """One problem with a final answer.

    Args:
        problem: its text.
        answer: the final answer, as written.
        solution: a worked solution, for examples in the prompt; "" where the file has none.
        category: MATH's type; "" where the file has none.
        level: MATH's level; "" where the file has none.
    """

    problem: str
    answer: str
    solution: str = ""
    category: str = ""
    level: str = ""


def read_choices(path: Path, *, seed: int) -> list[Choice]:
    """The questions of a file.

    Args:
        path: JSONL.
        seed: of the order of GPQA's options.
    Raises:
        ValueError: names file, line and field.
    """
    return [_choice(_Line(path, number, fields), seed) for number, fields in _lines(path)]


def read_problems(path: Path) -> list[Problem]:
    """The problems of a file.

    Raises:
        ValueError: names file, line and field.
    """
    return [_problem(_Line(path, number, fields)) for number, fields in _lines(path)]


@dataclass(frozen=True)
class _Line:
    """A line's fields, by lower-case name, and where it stands, for messages."""

    path: Path
    number: int
    fields: Mapping[str, Any]

    def error(self, what: str) -> ValueError:
        return ValueError(f"{self.path} line {self.number} {what}")

    def text(self, *names: str) -> str:
        """The first of some fields that is there, which must be text."""
        for name in names:
            if name in self.fields:
                value = self.fields[name]
                if not isinstance(value, str) or not value.strip():
                    raise self.error(f"has {name!r} = {value!r}, which is no text")
                return value
        raise self.error(f"has no {' or '.join(map(repr, names))}; it has {', '.join(map(repr, self.fields))}")

    def optional(self, *names: str) -> str:
        values = (self.fields[name] for name in names if name in self.fields)
        return str(next(values, "") or "")


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if not path.is_file():
        raise ValueError(f"there is no file {path}; give a JSONL file of questions")
    found = False
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                fields = json.loads(line.decode("utf-8-sig"))
            except ValueError as error:
                raise ValueError(
                    f"{path} line {number} is not JSON in UTF-8 ({error}); write one object a line"
                ) from None
            if not isinstance(fields, dict):
                raise ValueError(f"{path} line {number} is no JSON object; write one object a line")
            found = True
            yield number, {name.lower(): value for name, value in fields.items()}
    if not found:
        raise ValueError(f"{path} holds no questions; write one JSON object a line")


def _choice(line: _Line, seed: int) -> Choice:
    question = line.text("question", "problem")
    category = line.optional(*CATEGORY_FIELDS)
    if "correct answer" in line.fields:
        wrong = [name for name in line.fields if name.startswith("incorrect answer")]
        if not wrong:
            raise line.error("has 'Correct Answer' but no 'Incorrect Answer 1'")
        options = [line.text(name).strip() for name in ("correct answer", *sorted(wrong))]
        order = list(range(len(options)))
        random.Random(f"{seed} {question}").shuffle(order)
        return Choice(question, tuple(options[i] for i in order), order.index(0), category)
    name = "choices" if "choices" in line.fields else "options"
    listed: object = line.fields.get(name)
    if listed is None:
        raise line.error("has no 'options', 'choices' or 'Correct Answer'")
    if not isinstance(listed, list) or not 2 <= len(listed) <= len(LETTERS):
        raise line.error(f"has {name!r} = {listed!r}; list 2 to {len(LETTERS)} texts")
    if not all(isinstance(option, str) and option.strip() for option in listed):
        raise line.error(f"has {name!r} = {listed!r}, and not each of them is a text")
    return Choice(question, tuple(listed), _answer_index(line, len(listed)), category)


def _answer_index(line: _Line, options: int) -> int:
    """From a letter, an index, or both, which must then agree."""
    found: dict[str, int] = {}
    for name in ("answer", "answer_index"):
        value = line.fields.get(name)
        if value is None:
            continue
        index = LETTERS.find(value) if isinstance(value, str) and len(value) == 1 else value
        if type(index) is not int or not 0 <= index < options:
            last = LETTERS[options - 1]
            raise line.error(f"has {name!r} = {value!r}; write a letter from A to {last} or 0 to {options - 1}")
        found[name] = index
    if not found:
        raise line.error("has no 'answer' or 'answer_index'")
    if len(set(found.values())) > 1:
        raise line.error(f"has 'answer' and 'answer_index' that disagree: {found}")
    return next(iter(found.values()))


def _problem(line: _Line) -> Problem:
    text, solution = line.text("problem", "question"), line.optional("solution")
    if "answer" in line.fields:
        answer = str(line.fields["answer"]).strip()
        if type(line.fields["answer"]) not in (str, int) or not answer:
            raise line.error(f"has 'answer' = {line.fields['answer']!r}; write text or a whole number")
    else:
        found = boxed(line.text("solution"))
        if found is None:
            raise line.error("has no 'answer', and its 'solution' has no \\boxed{...}")
        answer = found
    category = line.optional("type", "category", "subject")
    return Problem(text, answer, solution, category, line.optional("level"))
