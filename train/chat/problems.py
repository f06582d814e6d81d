r"""Problems with a way to check an answer: from JSONL files in published formats, or made by reasoning-gym.

    math   {"problem" | "question", "answer"} or, for MATH, {"problem", "solution": "... \boxed{...}"}
    choice MMLU-Pro {"question", "options", "answer"}, MMLU, GPQA, as `--choice` reads them: the letter is the answer
    code   HumanEval {"task_id", "prompt", "entry_point", "test"}; MBPP {"task_id", "text" | "prompt", "test_list"}
    reasoning-gym:FAMILY   as many problems as are asked for, from a seed; its own verifier

A problem's key is a hash of what is asked and how it is checked: an edited problem is another one.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from train.chat.answers import final_answer, same_answer
from train.evaluate.exact_match import read_problems
from train.evaluate.jsonl import Line, read_lines
from train.evaluate.unit_tests import CodeLimits, run_tests

GYM = "reasoning-gym:"
GYM_PACKAGE = "reasoning-gym"
GYM_INSTALL = "reasoning-gym is not installed; it is optional: pip install 'reasoning-gym==0.1.25'"
# Families of 0.1.25 whose verifiers evaluate the text that they are given, as Python or by sympy: it may be hostile.
EVALUATING = frozenset(
    (
        "binary_matrix",
        "countdown",
        "intermediate_integration",
        "n_queens",
        "polynomial_multiplication",
        "puzzle24",
        "simple_integration",
        "spiral_matrix",
        "string_insertion",
    )
)
# Families of 0.1.25 that are of no use for other reasons -> the reason, the rest of a sentence.
_CHANGES = "has problems that depend on Python's hash seed or on --size, so that a later call makes other ones"
UNUSABLE = {
    **dict.fromkeys(
        ("ransom_note", "isomorphic_strings", "word_ladder", "knight_swap", "list_functions", "acre"), _CHANGES
    ),
    "game_of_life_halting": "has a verifier that accepts any answer",
    "coin_flip": "may never end making a problem",
}
BOX = "Put your final answer within \\boxed{}."
BLOCK = "Write the whole solution in one Python code block."
LETTER = "Put the letter of the right option within \\boxed{}."
# Any of them makes a line a question with options.
CHOICE_FIELDS = frozenset(("options", "choices", "correct answer"))
# The line that begins a block of Markdown, and what the block is marked as.
# Possessive: what does not match is given up at once.
_FENCE = re.compile(r"[^`]*+(`{3,}+)[ \t]*+([^\s`]*+)[^`]*+")
_PYTHON = re.compile(r"(python|py)[\d.]*", re.IGNORECASE)


@dataclass(frozen=True)
class CheckedProblem:
    """What is asked, whether an answer is right, what else is known: its number or name in its source, its category."""

    text: str
    # What a right answer is compared with, as text: a part of the key.
    expected: str
    accepts: Callable[[str], bool] = field(compare=False, repr=False)
    name: str = ""
    category: str = ""

    @property
    def key(self) -> str:
        """16 hexadecimal digits."""
        return hashlib.sha256(json.dumps([self.text, self.expected]).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class ProblemSet:
    """Problems, how answers are asked for, and who checks them."""

    problems: Sequence[CheckedProblem]
    instruction: str
    verifier: str
    # Answers can be counted: a majority of them means something.
    votes: bool = True

    @cached_property
    def distinct(self) -> dict[str, CheckedProblem]:
        """By key, in order."""
        return {problem.key: problem for problem in self.problems}


def open_problems(source: str, *, size: int, seed: int, run_code: bool) -> ProblemSet:
    """The problems of a file, all of them, or `size` of a family of reasoning-gym; ValueError for what is wrong."""
    if source.startswith(GYM):
        return gym_problems(source.removeprefix(GYM), size=size, seed=seed)
    path = Path(source)
    first = next(read_lines(path))
    if {"test", "test_list"} & first.fields.keys():
        if not run_code:
            raise ValueError(f"{path} has tests to run on what a model wrote; allow that with --run-code, in a sandbox")
        return code_problems(path)
    return choice_problems(path, seed=seed) if CHOICE_FIELDS & first.fields.keys() else math_problems(path)


def math_problems(path: Path) -> ProblemSet:
    """Problems with final answers."""

    def checked(problem: str, answer: str, category: str, name: str) -> CheckedProblem:
        return CheckedProblem(problem, answer, lambda text: same_answer(final_answer(text), answer), name, category)

    problems = [checked(p.problem, p.answer, p.category, str(i)) for i, p in enumerate(read_problems(path))]
    return ProblemSet(problems, BOX, "final answer: spelling or exact fraction")


def choice_problems(path: Path, *, seed: int) -> ProblemSet:
    """Questions with options; the seed shuffles those of GPQA."""
    # It loads torch.
    from train.evaluate.multiple_choice import LETTERS, read_questions

    def checked(number: int, question: str, options: Sequence[str], letter: str, category: str) -> CheckedProblem:
        listed = "\n".join(f"{mark}. {option}" for mark, option in zip(LETTERS, options, strict=False))
        text = f"{question.strip()}\n\n{listed}"

        def accepts(said: str) -> bool:
            return same_answer((final_answer(said) or "").upper(), letter)

        return CheckedProblem(text, letter, accepts, str(number), category)

    questions = read_questions(path, seed=seed)
    problems = [checked(i, q.question, q.options, LETTERS[q.answer], q.category) for i, q in enumerate(questions)]
    return ProblemSet(problems, LETTER, "letter of the right option")


def code_problems(path: Path, limits: CodeLimits | None = None) -> ProblemSet:
    """Problems with unit tests, which run what is written."""
    limits = limits or CodeLimits()

    def checked(line: Line) -> CheckedProblem:
        text, before, tests = _tests_of(line)
        name = line.optional("task_id", "id") or str(line.number)

        def accepts(answer: str) -> bool:
            return run_tests(before + code_of(answer), tests, limits) == "passed"

        return CheckedProblem(text, tests, accepts, name)

    verifier = f"unit tests, {limits.cpu_s} s of CPU time"
    return ProblemSet([checked(line) for line in read_lines(path)], BLOCK, verifier, votes=False)


def _tests_of(line: Line) -> tuple[str, str, str]:
    """What is asked, the code that stands before an answer, and the tests."""
    text = line.text("prompt", "text")
    if "test" in line.fields:
        entry = line.text("entry_point")
        before, found, _ = text.partition(f"def {entry}(")
        if not found:
            raise line.error(f"has a 'prompt' without 'def {entry}(', its 'entry_point'")
        # Imports and helpers, which an answer may leave out.
        return (
            f"Complete this function:\n\n```python\n{text.rstrip()}\n```",
            before,
            f"{line.text('test')}\ncheck({entry})",
        )
    tests = line.fields["test_list"]
    if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
        raise line.error("has a 'test_list' that is no list of texts")
    imports = line.fields.get("test_imports") or []
    if not isinstance(imports, list) or not all(isinstance(each, str) for each in imports):
        raise line.error("has 'test_imports' that are no list of texts")
    setup = "\n".join([*imports, line.optional("test_setup_code")])
    shown = "\n".join(tests)
    return f"{text.strip()}\nThe solution must pass these tests:\n\n```python\n{shown}\n```", "", f"{setup}\n{shown}"


def code_of(answer: str) -> str:
    """The last whole block that is marked as Python; else the last one without a mark; else the whole answer."""
    blocks = list(_blocks(answer))
    python = [code for mark, code in blocks if _PYTHON.fullmatch(mark)] or [code for mark, code in blocks if not mark]
    return textwrap.dedent(python[-1]) if python else answer


def _blocks(text: str) -> Iterator[tuple[str, str]]:
    """(mark, lines) of each block that has an end, which is a line of its own, indented or not."""
    fence, mark, lines = "", "", list[str]()
    for line in text.replace("\r\n", "\n").split("\n"):
        if fence and line.strip().startswith(fence) and not line.strip(" \t`"):
            yield mark, "\n".join([*lines, ""])
            fence = ""
        elif fence:
            lines.append(line)
        elif found := _FENCE.fullmatch(line):
            fence, mark, lines = found[1], found[2], []


def gym_problems(family: str, *, size: int, seed: int) -> ProblemSet:
    """Problems of a family of reasoning-gym, checked by its own verifier: right is a score of 1."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ModuleNotFoundError:
        raise ValueError(GYM_INSTALL) from None
    if family not in DATASETS:
        raise ValueError(f"reasoning-gym has no family {family!r}; it has {', '.join(sorted(DATASETS))}")
    if family in EVALUATING:
        raise ValueError(f"the verifier of {GYM}{family} evaluates what a model wrote; take another family")
    if family in UNUSABLE:
        raise ValueError(f"{GYM}{family} {UNUSABLE[family]}; take another family")
    if size < 1:
        raise ValueError(f"--size {size} must be 1 or more")
    try:
        made = reasoning_gym.create_dataset(family, size=size, seed=seed)
    except AssertionError as error:
        raise ValueError(f"{GYM}{family} cannot be made without settings of its own ({error})") from None

    def checked(index: int, entry: dict[str, Any]) -> CheckedProblem:
        def accepts(text: str) -> bool:
            found = final_answer(text)
            try:
                return found is not None and made.score_answer(found, entry) == 1.0
            # Verifiers fail on what they cannot read, each in its own way.
            except Exception:  # noqa: BLE001
                return False

        return CheckedProblem(entry["question"], str(entry["answer"]), accepts, str(index), family)

    verifier = f"{GYM_PACKAGE} {importlib.metadata.version(GYM_PACKAGE)} {family}"
    # By number: not every family ends an iteration by itself.
    return ProblemSet([checked(index, made[index]) for index in range(size)], BOX, verifier)
