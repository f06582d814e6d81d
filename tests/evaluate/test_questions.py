"""Files of questions: each format read, and what is wrong named with file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from train.evaluate.questions import Choice, Problem, read_choices, read_problems

PRO = {"question": "Which is a colour?", "options": ["two", "red", "up"], "answer": "B", "answer_index": 1}
GPQA = {"Question": "2 + 2?", "Correct Answer": "four", "Incorrect Answer 1": "five", "Incorrect Answer 2": "six"}


def write(folder: Path, *lines: Any) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_every_format_of_multiple_choice_is_read(tmp_path: Path) -> None:
    mmlu = {"question": "Which is a colour?", "choices": ["two", "red", "up"], "answer": 1, "subject": "art"}
    found = read_choices(write(tmp_path, PRO | {"category": "art"}, "", mmlu, PRO), seed=0)
    expected = Choice("Which is a colour?", ("two", "red", "up"), 1, "art")
    assert found == [expected, expected, Choice("Which is a colour?", ("two", "red", "up"), 1)]


def test_shuffled_options_keep_the_right_answer_and_depend_on_the_seed_alone(tmp_path: Path) -> None:
    other = GPQA | {"Question": "2 * 2?"}
    orders = set()
    for seed in range(20):
        (first, second) = read_choices(write(tmp_path, GPQA, other), seed=seed)
        assert first.options[first.answer] == "four"
        assert sorted(first.options) == ["five", "four", "six"]
        # Neither the place in the file nor its neighbours matter.
        assert read_choices(write(tmp_path, other, GPQA), seed=seed) == [second, first]
        orders.add(first.options)
    assert len(orders) == 6


def test_problems_of_both_formats_are_read(tmp_path: Path) -> None:
    solution = r"We add. The answer is $\boxed{\frac{1}{2}}$."
    math = {"problem": "Add.", "solution": solution, "level": "Level 1", "type": "Algebra"}
    path = write(tmp_path, math, {"question": "Count.", "answer": 7}, {"Problem": "Count.", "Answer": "007"})
    assert read_problems(path) == [
        Problem("Add.", r"\frac{1}{2}", solution, "Algebra", "Level 1"),
        Problem("Count.", "7"),
        Problem("Count.", "007"),
    ]


def without(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (without(PRO, "options"), "line 2 has no 'options', 'choices' or 'Correct Answer'"),
        (without(PRO, "question"), "line 2 has no 'question' or 'problem'; it has 'options'"),
        (without(PRO, "answer", "answer_index"), "line 2 has no 'answer' or 'answer_index'"),
        (PRO | {"options": ["one"]}, "line 2 has 'options' = .*; list 2 to 26 texts"),
        (PRO | {"options": ["one", 2]}, "line 2 has 'options' = .* not each of them is a text"),
        (PRO | {"answer": "D"}, "line 2 has 'answer' = 'D'; write a letter from A to C or 0 to 2"),
        (PRO | {"answer": True}, "line 2 has 'answer' = True"),
        (PRO | {"answer_index": -1}, "line 2 has 'answer_index' = -1"),
        (PRO | {"answer": "A"}, "line 2 has 'answer' and 'answer_index' that disagree"),
        (PRO | {"question": " "}, "line 2 has 'question' = ' ', which is no text"),
        (without(GPQA, "Incorrect Answer 1", "Incorrect Answer 2"), "line 2 has 'Correct Answer' but no 'Incorrect"),
        ("{", "line 2 is not JSON"),
        ("[]", "line 2 is no JSON object"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read_choices(write(tmp_path, PRO, line), seed=0)
    assert str(error.value).startswith(f"{tmp_path / 'questions.jsonl'} line 2 ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"problem": "p", "solution": "no box"}, r"line 1 has no 'answer', and its 'solution' has no \\boxed"),
        ({"problem": "p"}, "line 1 has no 'solution'"),
        ({"problem": "p", "answer": 0.5}, "line 1 has 'answer' = 0.5; write text or a whole number"),
        ({"answer": "1"}, "line 1 has no 'problem' or 'question'"),
    ],
)
def test_a_bad_problem_is_named(tmp_path: Path, line: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_problems(write(tmp_path, line))


def test_a_line_that_is_not_utf_8_is_named_and_a_byte_order_mark_is_none(tmp_path: Path) -> None:
    path = write(tmp_path, PRO)
    good = path.read_bytes()
    path.write_bytes(good + b'{"question": "caf\xe9"}\n')
    with pytest.raises(
        ValueError, match=r"questions\.jsonl line 2 is not JSON in UTF-8 \(.*0xe9.*\); write one object"
    ):
        read_choices(path, seed=0)
    path.write_bytes(b"\xef\xbb\xbf" + good)
    assert len(read_choices(path, seed=0)) == 1


def test_an_empty_or_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no questions"):
        read_choices(write(tmp_path, ""), seed=0)
    with pytest.raises(ValueError, match="there is no file"):
        read_problems(tmp_path / "none.jsonl")
