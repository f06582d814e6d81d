"""Problems of published formats and of reasoning-gym, each with its check."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import reasoning_gym
from reasoning_gym.factory import DATASETS

from train.chat import problems
from train.chat.problems import EVALUATING, UNUSABLE, code_of, code_problems, open_problems
from train.evaluate.jsonl import Line


def write(path: Path, *lines: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


HUMAN_EVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'from math import sqrt\n\ndef root(x):\n    """The root."""\n',
    "entry_point": "root",
    "test": "def check(candidate):\n    assert candidate(9) == 3",
}
MBPP = {"task_id": 2, "text": "Add one.", "test_list": ["assert add(1) == 2", "assert add(-1) == 0"]}


def test_problems_with_final_answers(tmp_path: Path) -> None:
    lines = [
        {"problem": "Half?", "solution": r"It is $\boxed{\frac12}$.", "type": "A"},
        {"question": "n?", "answer": 7},
    ]
    found = open_problems(write(tmp_path / "p.jsonl", *lines, lines[1]), size=1, seed=0, run_code=False)
    half, seven, _ = found.problems
    assert [(p.text, p.expected, p.category) for p in (half, seven)] == [("Half?", r"\frac12", "A"), ("n?", "7", "")]
    assert (half.accepts("The answer is 0.5."), half.accepts(r"\boxed{2}"), half.accepts("")) == (True, False, False)
    # The same line twice is one problem; another answer makes another one.
    assert list(found.distinct) == [half.key, seven.key]
    assert len({p.key for p in (half, seven)}) == 2


def test_problems_with_unit_tests(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", HUMAN_EVAL, MBPP)
    with pytest.raises(
        ValueError, match=r"p\.jsonl has tests to run on what a model wrote; allow that with --run-code"
    ):
        open_problems(path, size=1, seed=0, run_code=False)
    root, add = open_problems(path, size=1, seed=0, run_code=True).problems
    # What stands before the function need not be written again; the last block counts.
    assert root.accepts("First\n```python\nx = 1\n```\nthen\n```python\ndef root(x):\n    return sqrt(x)\n```")
    assert not root.accepts("```python\ndef root(x):\n    return x\n```")
    assert add.accepts("def add(x): return x + 1")
    assert not add.accepts("def add(x): return 2")
    assert [problem.name for problem in (root, add)] == ["HumanEval/0", "2"]
    assert "assert add(-1) == 0" in add.text
    with pytest.raises(ValueError, match=r"line 1 has a 'prompt' without 'def other\(', its 'entry_point'"):
        open_problems(write(tmp_path / "q.jsonl", HUMAN_EVAL | {"entry_point": "other"}), size=1, seed=0, run_code=True)
    for wrong in ([], "assert", [1]):
        with pytest.raises(ValueError, match="'test_list' that is no list of texts"):
            problems._tests_of(Line(Path("p"), 1, MBPP | {"test_list": wrong}))


BLOCKS = {
    "a name for Python": "```{}\nx = 1\n```",
    "ends of lines as Windows has them": "so\r\n```python\r\nx = 1\r\n```\r\n",
    "indented": "    ```py\n    x = 1\n    ```",
    "of a list": "1. so\n\n   ```python\n   x = 1\n   ```\n2. done",
    "behind words": "Solution: ```python\nx = 1\n```",
    "with a title": '```python title="a.py"\nx = 1\n```',
    "a longer fence": "````python\nx = 1\n````",
    "the last of two": "```python\nx = 0\n```\n```python\nx = 1\n```",
    "its output after it": "```python\nx = 1\n```\nIt prints\n```\n1\n```",
    "another language before it": "```bash\npip install x\n```\nthen\n```python\nx = 1\n```\nthat is all",
    "another language after it": "```python\nx = 1\n```\n```text\n1\n```",
    "code in its line before it": "Use ```x``` in\n```python\nx = 1\n```",
    "no mark": "```\nx = 1\n```",
    "one that was cut off after it": "```python\nx = 1\n```\n```python\nx = ",
    "no fence": "x = 1",
}


@pytest.mark.parametrize("name", BLOCKS)
def test_the_code_of_an_answer_is_its_last_whole_block(name: str) -> None:
    for mark in ("python", "py", "python3", "Python3.11") if "{}" in BLOCKS[name] else ("",):
        assert code_of(BLOCKS[name].replace("{}", mark)).strip("\n") == "x = 1"


def test_what_a_block_holds_is_taken_whole() -> None:
    lines = 'def f():\n\n    """```x```"""\n    return "`"\n'
    assert code_of(f"```python\n{lines}```") == lines
    # Cut off: there is no whole block, and so nothing that runs. A model that repeats itself costs no time.
    for answer in ("```python\nx = 1", "```python x\n" * 20000):
        assert code_of(answer) == answer


def test_problems_of_reasoning_gym_are_checked_by_its_own_verifier() -> None:
    found = open_problems("reasoning-gym:chain_sum", size=20, seed=3, run_code=False)
    assert found.verifier == "reasoning-gym 0.1.25 chain_sum"
    made = reasoning_gym.create_dataset("chain_sum", size=20, seed=3)
    for entry, problem in zip((made[i] for i in range(20)), found.problems, strict=True):
        # A truth of our own: the sum that the question asks for.
        total = sum(map(int, entry["metadata"]["expression"].replace("- ", "-").replace("+ ", "").split()))
        assert problem.text == entry["question"]
        assert problem.accepts(f"So it is \\boxed{{{total}}}.")
        # The verifier's 0.5 for an answer that holds the right one is not enough.
        assert not any(
            problem.accepts(text) for text in (f"\\boxed{{{total + 1}}}", f"\\boxed{{{total} or so}}", "", "\n")
        )
    # A verifier that fails on what it cannot read rejects it.
    (primes,) = open_problems("reasoning-gym:prime_factorization", size=1, seed=3, run_code=False).problems
    assert primes.accepts(primes.expected)
    assert not primes.accepts("x")


REFUSED = {
    "reasoning-gym:nope": "reasoning-gym has no family 'nope'; it has ab, ",
    "reasoning-gym:countdown": "the verifier of reasoning-gym:countdown evaluates what a model wrote; take another",
    "reasoning-gym:ransom_note": "has problems that depend on Python's hash seed or on --size",
    "reasoning-gym:game_of_life_halting": "has a verifier that accepts any answer; take another family",
    "reasoning-gym:coin_flip": "reasoning-gym:coin_flip may never end making a problem; take another family",
    "reasoning-gym:composite": r"reasoning-gym:composite cannot be made without settings of its own \(Must specify",
    "nowhere.jsonl": r"there is no file nowhere\.jsonl",
}


@pytest.mark.parametrize(("source", "message"), REFUSED.items())
def test_sources_that_cannot_be_used_are_refused(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_problems(source, size=1, seed=0, run_code=False)
    with pytest.raises(ValueError, match="--size 0 must be 1 or more"):
        open_problems("reasoning-gym:chain_sum", size=0, seed=0, run_code=False)


def test_the_families_that_are_refused_are_there() -> None:
    assert UNUSABLE.keys() <= DATASETS.keys()
    assert len(UNUSABLE) == 8
    assert not UNUSABLE.keys() & EVALUATING


@pytest.mark.long
def test_the_verifiers_that_evaluate_an_answer_are_known(tmp_path: Path) -> None:
    """Each family of reasoning-gym gets an answer that makes a file where it is evaluated."""
    mark, found = tmp_path / "evaluated", set()
    hostile = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    for family in sorted(DATASETS.keys() - {"composite"}):
        made = reasoning_gym.create_dataset(family, size=1, seed=3)
        entry = made[0]
        for answer in (hostile, f"[{hostile}]"):
            # Whatever a verifier makes of it.
            with suppress(Exception):
                made.score_answer(answer, entry)
            if mark.exists():
                found.add(family)
                mark.unlink()
    assert found == EVALUATING


def test_the_imports_of_sanitized_mbpp_stand_before_its_tests(tmp_path: Path) -> None:
    line = {"prompt": "Halve.", "test_imports": ["import math"], "test_list": ["assert math.isclose(half(3), 1.5)"]}
    (tmp_path / "mbpp.jsonl").write_text(json.dumps(line) + "\n")
    (problem,) = code_problems(tmp_path / "mbpp.jsonl").problems
    assert problem.accepts("```python\ndef half(x):\n    return x / 2\n```")
    assert not problem.accepts("```python\ndef half(x):\n    return x\n```")
