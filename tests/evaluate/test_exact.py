"""Exact match with a writer that is told what to write."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest

from tests.evaluate.planted import PlantedModel, respondent, small_tokenizer
from train.evaluate.exact import Attempts, answer_of, examples_of, prompt_of, score_exact
from train.evaluate.questions import Problem
from train.evaluate.respondent import Generate

TOKENIZER = small_tokenizer()
EOS = TOKENIZER.special_ids.eos
PROBLEMS = [
    Problem("one?", "1", category="Algebra", level="Level 1"),
    Problem("half?", r"\frac{1}{2}", category="Algebra", level="Level 2"),
    Problem("three?", "003", category="Geometry", level="Level 1"),
]


def writer(write: Callable[[str, int], str], *, ends: bool = True) -> Generate:
    """Answers the n-th prompt by `write(prompt, n)`."""

    def run(prompts: list[list[int]], *, max_new_tokens: int, temperature: float, seed: int) -> list[list[int]]:
        assert all(prompt[0] == EOS for prompt in prompts)
        texts = [write(TOKENIZER.decode(prompt[1:]), n) for n, prompt in enumerate(prompts)]
        return [[*TOKENIZER.encode_batch([text])[0], *([EOS] if ends else [])] for text in texts]

    return run


def solve(
    generate: Generate,
    attempts: Attempts | None = None,
    examples: Sequence[Problem] = (),
    max_tokens: int = 4096,
) -> dict:  # type: ignore[type-arg]
    asked = respondent(PlantedModel(), start=EOS, generate=generate, max_tokens=max_tokens)
    return score_exact(asked, PROBLEMS, attempts=attempts or Attempts(), examples=examples)


def knows(prompt: str, n: int) -> str:
    right = {"one?": r"\boxed{1}", "half?": r"so $\boxed{\frac12}$.", "three?": "it is 3"}
    return right[prompt.rsplit("Problem:\n", maxsplit=1)[-1].split("\n", maxsplit=1)[0]]


def test_a_writer_that_knows_the_answers_scores_all_of_them() -> None:
    found = solve(writer(knows))
    assert found["pass@1"] == {"value": 1.0, "standard_error": 0.0, "problems": 3}
    assert (found["without_box"], found["unfinished"]) == (pytest.approx(1 / 3), 0)


def test_what_a_base_model_writes_after_its_solution_is_not_read() -> None:
    found = solve(writer(lambda prompt, n: knows(prompt, n) + "\n\nProblem:\nnext\n\nSolution:\\boxed{9}"))
    assert found["pass@1"]["value"] == 1


def test_scores_are_told_apart_by_category_and_level() -> None:
    found = solve(writer(lambda prompt, n: r"\boxed{1}", ends=False))
    assert found["pass@1"]["value"] == pytest.approx(1 / 3)
    # One of three: the binomial error.
    assert found["pass@1"]["standard_error"] == pytest.approx(math.sqrt(1 / 3 * 2 / 3 / 3), rel=1e-14)
    assert {name: part["value"] for name, part in found["by_category"].items()} == {"Algebra": 0.5, "Geometry": 0}
    assert {name: part["value"] for name, part in found["by_level"].items()} == {"Level 1": 0.5, "Level 2": 0}
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
    expected = (
        "Problem:\np1\n\nSolution:\nIt is \\boxed{1}.\n\n"
        "Problem:\np2\n\nSolution:\nThe final answer is $\\boxed{2}$.\n\nProblem:\none?\n\nSolution:"
    )
    assert prompt_of(PROBLEMS[0], examples) == expected
    seen: list[str] = []
    solve(writer(lambda prompt, n: seen.append(prompt) or "0"), examples=examples)  # type: ignore[func-returns-value]
    assert seen[0] == expected
    assert examples_of(examples, 1) == examples[:1]
    with pytest.raises(ValueError, match="--dev holds 2 problems, but --shots asks for 3"):
        examples_of(examples, 3)


@pytest.mark.parametrize(
    ("max_tokens", "asked", "new_tokens", "cut"), [(40, 10, 10, 2), (64, None, 32, 0), (40, 39, None, None)]
)
def test_a_prompt_keeps_its_start_token_and_its_end_and_leaves_room_for_the_solution(
    max_tokens: int, asked: int | None, new_tokens: int | None, cut: int | None
) -> None:
    # "Problem:\nthree?\n\nSolution:", the longest, has 26 bytes; with the start token 27 of 30 or fewer are left.
    assert len(prompt_of(PROBLEMS[2], [])) == 26
    seen: list[tuple[list[int], int]] = []

    def run(prompts: list[list[int]], *, max_new_tokens: int, temperature: float, seed: int) -> list[list[int]]:
        seen.extend((prompt, max_new_tokens) for prompt in prompts)
        return [[EOS] for _ in prompts]

    attempts, shown = Attempts(max_new_tokens=asked), [Problem("p", "1")] if cut else []
    if new_tokens is None:
        with pytest.raises(ValueError, match="39 new tokens leave no room for a prompt in 40; raise --max-length"):
            solve(run, attempts, max_tokens=max_tokens)
        return
    found = solve(run, attempts, shown, max_tokens=max_tokens)
    whole = [prompt_of(problem, shown) for problem in PROBLEMS]
    lost = [max(0, len(text) + 1 + new_tokens - max_tokens) for text in whole]
    assert found["cut_tokens"] == max(lost)
    assert bool(max(lost)) == bool(cut)
    assert [(prompt[0], TOKENIZER.decode(prompt[1:])) for prompt, _ in seen] == [
        (EOS, text[first:]) for text, first in zip(whole, lost, strict=True)
    ]
    assert {new for _, new in seen} == {new_tokens}


def test_the_last_number_stands_in_for_a_missing_box() -> None:
    assert answer_of("1 and 2 make 3.") == ("3", True)
    assert answer_of(r"\boxed{5} or 3") == ("5", False)
    assert answer_of("none") == (None, True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"samples": 0}, "--samples 0 must be 1 or more"),
        ({"max_new_tokens": 0}, "--max-new-tokens 0 must be 1 or more"),
        ({"seed": -1}, "--seed -1 must be in 0"),
        ({"seed": 2**31}, "--seed 2147483648 must be in 0"),
        ({"temperature": -1.0}, "must be 0"),
        ({"samples": 16}, "--samples 16 of a greedy model are all the same"),
    ],
)
def test_attempts_that_make_no_sense_are_refused(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Attempts(**fields)  # type: ignore[arg-type]
