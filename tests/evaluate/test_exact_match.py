r"""Exact match: answers found in a text and spelled one way, problems from files, scores of a planted writer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.evaluate.planted import Generate, PlantedLanguageModel, PlantedModel, small_tokenizer, write_lines
from train.evaluate import exact_match
from train.evaluate.exact_match import Attempts, Problem, problem_prompt, score_exact_match

TOKENIZER = small_tokenizer()
EOS = TOKENIZER.special_ids.eos
PROBLEMS = [
    Problem("one?", "1", category="Algebra", level="Level 1"),
    Problem("half?", r"\frac{1}{2}", category="Algebra", level="Level 2"),
    Problem("three?", "003", category="Geometry", level="Level 1"),
]
BOXES = {
    r"so \boxed{5}.": "5",
    r"\boxed{\frac{1}{2}}": r"\frac{1}{2}",
    r"\boxed{ \{1, 2\} }": r"\{1, 2\}",
    r"first \boxed{1}, no: \boxed{2}": "2",
    r"\fbox{7}": "7",
    r"$\boxed 9$ and more": "9",
    r"\boxed{\text{(A)}}": r"\text{(A)}",
    r"\boxed{\left\{x\right\}}": r"\left\{x\right\}",
    **dict.fromkeys([r"\boxed{unfinished", "nothing 5", r"\boxed"]),
}
# Spellings that stay as they are; the commas in them are no thousands.
STABLE = [r"\frac{-x}{2}", "x^2+1", "", "1,2", "[100,200)", r"\{1,100\}", "12,345,6"]
# Spelling -> other ways to write it.
SPELLINGS = {
    "5": [" 5 ", "5.", "$5$", r"\$5", r"5\%", "5%", r"5\text{ cm}", r"5 \mbox{ cm}^2", "x=5"],
    "90": [r"90^\circ", r"90^{\circ}"],
    r"\frac{1}{2}": [r"\frac12", r"\frac1{2}", r"\frac{1}2", r"\dfrac{1}{2}", "1/2"],
    r"-\frac{1}{2}": ["-1/2", r"\frac{-1}{2}", r"\frac{1}{-2}"],
    r"-\frac{3}{4}": [r"-\tfrac 3 4"],
    r"\sqrt{3}": [r"\sqrt3"],
    r"2\sqrt{3}": [r"2\sqrt 3"],
    "Evelyn": [r"\text{Evelyn}"],
    "-5": ["x = -5"],
    "1204": ["1,204", r"1,\!204"],
    "10000": [r"10{,}000"],
    "-1234567.5": ["-1,234,567.50"],
    "1200300": ["1,200,300"],
    "1200": ["{1,200}"],
    "1200miles": ["1,200 miles"],
    "1200.5": ["+1,200.5"],
    r"\frac{1200}{7}": [r"\frac{1,200}{7}"],
    "1000": [r"1\,000"],
    # Commas between numbers are no thousands, however they are spaced.
    "(1,2)": [r"\left( 1, 2 \right)"],
    "(1,100)": ["(1, 100)", r"\left(1,\,100\right)"],
    "7": ["{7}", "007"],
    "0": ["000", "-0"],
    "0.5": [".5"],
    "2.5": ["2.50"],
    "3": ["+3"],
}


@pytest.mark.parametrize(("text", "found"), BOXES.items())
def test_the_box_is_found_with_its_braces(text: str, found: str | None) -> None:
    assert exact_match.boxed(text) == found


@pytest.mark.parametrize(("spelling", "written"), [*SPELLINGS.items(), *((spelling, []) for spelling in STABLE)])
def test_each_answer_has_one_spelling(spelling: str, written: list[str]) -> None:
    # Once normalised, it stays so.
    for answer in [spelling, *written]:
        assert exact_match.normalize(answer) == spelling


def test_equal_means_the_same_spelling() -> None:
    # A list is no number.
    same = [("042", "42"), ("42", "042"), (r"\frac12", "1/2"), ("1, 200, 300", "1, 200,300"), ("(1,100)", "(1, 100)")]
    other = [("0.5", r"\frac{1}{2}"), ("1+x", "x+1"), ("-3", "3"), ("30", "3"), ("12", r"\frac12"), (None, "3")]
    assert [pair for pair in same if not exact_match.is_equal(*pair)] == []
    assert [pair for pair in [*other, ("1, 200, 300", "1,200,300")] if exact_match.is_equal(*pair)] == []


NUMBERS = {"1 and 2 make 3.": "3", "3 apples and 1,204 pears.": "1,204", "it is -2.5": "-2.5", "about .5": ".5"}


@pytest.mark.parametrize(("text", "number"), [*NUMBERS.items(), ("none", None)])
def test_the_last_number_is_read_where_there_is_no_box(text: str, number: str | None) -> None:
    assert exact_match.answer_of(text) == (number, True)
    assert exact_match.answer_of(rf"\boxed{{5}} or {text}") == ("5", False)


def test_problems_of_both_formats_are_read(tmp_path: Path) -> None:
    solution = r"We add. The answer is $\boxed{\frac{1}{2}}$."
    math_line = {"problem": "Add.", "solution": solution, "level": "Level 1", "type": "Algebra"}
    aime = [{"question": "Count.", "answer": 7}, {"Problem": "Count.", "Answer": "007"}]
    assert exact_match.read_problems(write_lines(tmp_path / "p.jsonl", math_line, *aime)) == [
        Problem("Add.", r"\frac{1}{2}", solution, "Algebra", "Level 1"),
        Problem("Count.", "7"),
        Problem("Count.", "007"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"problem": "p", "solution": "no box"}', r"line 1 has no 'answer', and its 'solution' has no \\boxed"),
        ('{"problem": "p"}', "line 1 has no 'solution'"),
        ('{"problem": "p", "answer": 0.5}', "line 1 has 'answer' = 0.5; write text or a whole number"),
        ('{"answer": "1"}', "line 1 has no 'problem' or 'question'"),
        (None, "there is no file"),
    ],
)
def test_a_bad_problem_is_named(tmp_path: Path, line: Any, message: str) -> None:
    path = tmp_path / "p.jsonl"
    with pytest.raises(ValueError, match=message):
        exact_match.read_problems(write_lines(path, line) if line else path)


def writer(write: Callable[[str, int], str], *, ends: bool = True) -> Generate:
    """Answers the n-th prompt by `write(prompt, n)`."""

    def run(prompts: list[list[int]], **options: object) -> list[list[int]]:
        assert all(prompt[0] == EOS for prompt in prompts)
        texts = [write(TOKENIZER.decode(prompt[1:]), n) for n, prompt in enumerate(prompts)]
        return [[*TOKENIZER.encode_batch([text])[0], *([EOS] if ends else [])] for text in texts]

    return run


def solve(
    generate: Generate, attempts: Attempts | None = None, examples: Sequence[Problem] = (), max_tokens: int = 4096
) -> dict[str, Any]:
    model = PlantedLanguageModel(PlantedModel(), first_id=EOS, generate=generate, max_tokens=max_tokens)
    return score_exact_match(model, PROBLEMS, attempts=attempts or Attempts(), examples=examples)


def knows(prompt: str, n: int) -> str:
    right = {"one?": r"\boxed{1}", "half?": r"so $\boxed{\frac12}$.", "three?": "it is 3"}
    return right[prompt.rsplit("Problem:\n", maxsplit=1)[-1].split("\n", maxsplit=1)[0]]


def test_a_writer_that_knows_the_answers_scores_all_of_them() -> None:
    found = solve(writer(knows))
    assert found["pass@1"] == {"value": 1.0, "standard_error": 0.0, "problems": 3}
    assert (found["without_box"], found["unfinished"]) == (pytest.approx(1 / 3), 0)
    # What a base model writes after its solution is not read.
    found = solve(writer(lambda prompt, n: knows(prompt, n) + "\n\nProblem:\nnext\n\nSolution:\\boxed{9}"))
    assert found["pass@1"]["value"] == 1


def test_scores_are_reported_by_category_and_level() -> None:
    found = solve(writer(lambda prompt, n: r"\boxed{1}", ends=False))
    assert found["pass@1"]["value"] == pytest.approx(1 / 3)
    # One of three: the binomial error.
    assert found["pass@1"]["standard_error"] == pytest.approx(math.sqrt(1 / 3 * 2 / 3 / 3), rel=1e-14)
    parts = {name: part["value"] for key in ("by_category", "by_level") for name, part in found[key].items()}
    assert parts == {"Algebra": 0.5, "Geometry": 0, "Level 1": 0.5, "Level 2": 0}
    assert found["unfinished"] == 1


def test_samples_of_a_problem_are_averaged() -> None:
    # Of 4 samples each: 3 right, 2 right, none right.
    texts = [r"\boxed{1}"] * 3 + ["0"] + [r"\boxed{1/2}"] * 2 + ["0"] * 6
    found = solve(writer(lambda prompt, n: texts[n]), Attempts(samples=4, temperature=0.7))
    assert found["pass@1"]["value"] == pytest.approx((0.75 + 0.5 + 0) / 3)
    mean = 1.25 / 3
    spread = math.sqrt(((0.75 - mean) ** 2 + (0.5 - mean) ** 2 + mean**2) / 3)
    assert found["pass@1"]["standard_error"] == pytest.approx(spread / math.sqrt(3), rel=1e-14)


def test_examples_stand_before_the_problem_with_their_solutions() -> None:
    examples = [Problem("p1", "1", "It is \\boxed{1}."), Problem("p2", "2")]
    first = "Problem:\np1\n\nSolution:\nIt is \\boxed{1}.\n\n"
    second = "Problem:\np2\n\nSolution:\nThe final answer is $\\boxed{2}$.\n\n"
    expected = f"{first}{second}Problem:\none?\n\nSolution:"
    assert problem_prompt(PROBLEMS[0], examples) == expected
    seen: list[str] = []
    solve(writer(lambda prompt, n: seen.append(prompt) or "0"), examples=examples)  # type: ignore[func-returns-value]
    assert seen[0] == expected
    assert exact_match.first_examples(examples, 1) == examples[:1]
    with pytest.raises(ValueError, match="--dev holds 2 problems, but --shots asks for 3"):
        exact_match.first_examples(examples, 3)


@pytest.mark.parametrize(("max_tokens", "asked", "new_tokens", "shots"), [(40, 10, 10, 1), (64, None, 32, 0)])
def test_a_prompt_keeps_its_start_token_and_its_end_and_leaves_room_for_the_solution(
    max_tokens: int, asked: int | None, new_tokens: int, shots: int
) -> None:
    # "Problem:\nthree?\n\nSolution:", the longest, has 26 bytes; with the start token 27 of 30 or fewer are left.
    assert len(problem_prompt(PROBLEMS[2], [])) == 26
    seen: list[tuple[list[int], int]] = []

    def run(prompts: list[list[int]], *, max_new_tokens: int, **options: object) -> list[list[int]]:
        seen.extend((prompt, max_new_tokens) for prompt in prompts)
        return [[EOS] for _ in prompts]

    shown = [Problem("p", "1")] * shots
    found = solve(run, Attempts(max_new_tokens=asked), shown, max_tokens=max_tokens)
    whole = [problem_prompt(problem, shown) for problem in PROBLEMS]
    lost = [max(0, len(text) + 1 + new_tokens - max_tokens) for text in whole]
    assert found["cut_tokens"] == max(lost)
    assert bool(max(lost)) == bool(shots)
    assert [(prompt[0], TOKENIZER.decode(prompt[1:])) for prompt, _ in seen] == [
        (EOS, text[first:]) for text, first in zip(whole, lost, strict=True)
    ]
    assert {new for _, new in seen} == {new_tokens}
    with pytest.raises(ValueError, match=f"{max_tokens - 1} new tokens leave no room for a prompt in {max_tokens}; "):
        solve(run, Attempts(max_new_tokens=max_tokens - 1), max_tokens=max_tokens)


REFUSED = {
    "--samples 0 must be 1 or more": {"samples": 0},
    "--max-new-tokens 0 must be 1 or more": {"max_new_tokens": 0},
    "--seed -1 must be in 0": {"seed": -1},
    "--seed 2147483648 must be in 0": {"seed": 2**31},
    "must be 0": {"temperature": -1.0},
    "--samples 16 of a greedy model are all the same": {"samples": 16},
}


@pytest.mark.parametrize(("message", "fields"), REFUSED.items())
def test_attempts_that_make_no_sense_are_refused(message: str, fields: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=message):
        Attempts(**fields)  # type: ignore[arg-type]
