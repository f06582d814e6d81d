r"""Final answers of chat models, thoughts apart, and programs run against their tests: hand-made cases."""

from __future__ import annotations

import os
import random
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from train.chat.answers import canonical, final_answer, same_answer
from train.chat.problems import code_of
from train.chat.thinking import Solution, solution_of, split_thinking
from train.evaluate.unit_tests import CodeLimits, run_tests

FOUND = {
    r"so \boxed{5}.": "5",
    r"\boxed{4}, no: \boxed{\frac{1}{2}}": r"\frac{1}{2}",
    "<answer> 7 </answer> and more": "7",
    "<answer>1</answer>\n<answer>\n2</answer>": "2",
    "<answer>1</answer> <Answer> <ANSWER>3</answer> <answer>": "3",
    "The final answer is 12.": "12",
    "the answer is: $x+1$": "x+1",
    "**Answer:** 42": "42",
    "**Final Answer: 3/4**": "3/4",
    "The answer is 1.\nNo, the answer is 2.\nDone.": "2",
    r"Answer: \(7\)": "7",
    "17": "17",
    " $-3$. ": "-3",
    "It is 5\nor 6": None,
    "": None,
    r"\boxed{open": None,
}


@pytest.mark.parametrize(("text", "answer"), FOUND.items())
def test_the_final_answer_is_what_the_text_states_last(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


def test_a_model_that_repeats_itself_costs_no_time() -> None:
    text = "<answer>" * 50000
    assert final_answer(text) == text
    # Quadratic, it would take minutes.
    text = "```" + " " * 500_000 + "`"
    assert code_of(text) == text


SAME = [
    ("0.5", r"\frac{1}{2}"), ("2/4", "1/2"), ("-0.25", r"-\frac14"), ("1,000", "1000.0"), ("007", "7"),
    (r"\frac{6}{3}", "2"), ("(A)", "A"), ("b", "(B)"), ("C.", "C"), (r"\text{(D)}", "D"), ("3.140", "3.14"),
]  # fmt: skip
OTHER = [
    ("x", "X"),
    ("1 1/2", "11/2"),
    ("1 2", "12"),
    ("0.333", r"\frac{1}{3}"), ("1", "-1"), ("A", "B"), ("ab", "AB"), ("1/0", "1"), (None, "1"), ("", "1"),
    ("12", "1 2 3"), ("x+1", "1+x"), ("__import__('os')", "1"), ("1" * 5000, "1" * 5000), ("9**9**9", "9"),
    ("1_0", "10"), ("٣", "3"),
]  # fmt: skip


def test_answers_are_the_same_as_spelling_option_or_exact_fraction() -> None:
    assert [pair for pair in SAME if not (same_answer(*pair) and same_answer(pair[1], str(pair[0])))] == []
    assert [pair for pair in OTHER if same_answer(*pair)] == []


def test_numbers_are_equal_as_fractions_are() -> None:
    """An independent truth: `fractions.Fraction` of what was written."""
    chooser = random.Random(0)
    values = [Fraction(chooser.randint(-20, 20), chooser.choice([1, 2, 4, 5, 8, 10])) for _ in range(60)]
    for value in values:
        n, d, times = value.numerator, value.denominator, chooser.randint(1, 9)
        spellings = [
            f"{n * times}/{d * times}",
            rf"\frac{{{n * times}}}{{{d * times}}}",
            f"{float(value):.4f}",
            f"{n}/{d}",
        ]
        assert {canonical(each) for each in spellings} == {value}
        assert [other for other in values if same_answer(spellings[2], f"{other.numerator}/{other.denominator}")] == [
            other for other in values if other == value
        ]


def test_an_answer_of_many_digits_is_spelled() -> None:
    digits = "1" * 5000
    assert [canonical(text) for text in (digits, f"0.{digits}")] == [digits, f"0.{digits}"]
    assert canonical(f"{digits}/2") == rf"\frac{{{digits}}}{{2}}"


THOUGHTS = {
    "<think>a</think>b": ("a", "b"),
    "a</think>b": ("a", "b"),
    "\n<think>\na\n</think>\n\nb": ("\na\n", "\n\nb"),
    "b": ("", "b"),
    "<think></think>b": ("", "b"),
}


@pytest.mark.parametrize(("text", "parts"), THOUGHTS.items())
def test_thoughts_and_answer_are_told_apart(text: str, parts: tuple[str, str]) -> None:
    assert split_thinking(text) == parts


@pytest.mark.parametrize("text", ["<think>a", "x<think>a</think>b", "a</think>b</think>c", "a</think>b<think>c"])
def test_marks_that_do_not_pair_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="do not enclose one beginning"):
        split_thinking(text)


def completion(message: Any, finish: str = "stop") -> dict[str, Any]:
    return {"choices": [{"message": message, "finish_reason": finish}], "usage": {"completion_tokens": 9}}


def test_a_solution_is_read_from_every_form_of_server() -> None:
    expected = Solution("b", "a", completion_tokens=9)
    for message in ({"content": "b", "reasoning_content": "a"}, {"content": "b", "reasoning": "a"}):
        assert solution_of(completion(message)) == expected
    assert solution_of(completion({"content": "<think> a </think> b"})) == expected
    # Half of a surrogate pair, as it comes out of JSON: no file could hold it.
    for message in ({"content": "\ud83d"}, {"content": "b", "reasoning_content": "\ud83d"}):
        with pytest.raises(ValueError, match="surrogates not allowed"):
            solution_of(completion(message))
    assert expected.message == {"role": "assistant", "content": "b", "reasoning_content": "a"}
    assert Solution("b").message == {"role": "assistant", "content": "b"}
    # In the middle of its thoughts, and without content.
    assert solution_of(completion({"content": "<think>a"}, "length")) == Solution("", "a", True, 9)
    assert solution_of(completion({"content": None, "reasoning_content": "a"}, "length")) == Solution("", "a", True, 9)
    for body in ({}, {"choices": []}, {"choices": [{"message": None}]}, completion({"content": 5}), completion([])):
        with pytest.raises(ValueError, match="the answer is no"):
            solution_of(body)


LIMITS = CodeLimits(cpu_s=20, wall_s=60, memory_bytes=1 << 29)
PROGRAMS = {
    "def f(x): return x + 1": "passed",
    "def f(x): return x": "failed",
    "def f(x: return": "failed",
    # Leaving early is no success, however it says so.
    "def f(x): return x + 1\nexit(0)": "failed",
    "import os\nos._exit(0)": "failed",
    "print('f' * 10**7)\ndef f(x): return x + 1": "passed",
    # What is left open does not swallow the tests.
    "def f(x): return x\n'''": "failed",
    # Limits: memory, size of files, open files.
    "f = lambda x: x + 1\nx = bytearray(1 << 30)": "failed",
    "f = lambda x: x + 1\nopen('a', 'wb').write(b'x' * (2 << 20))": "failed",
    "f = lambda x: x + 1\nfiles = [open('tests.py') for _ in range(20)]": "failed",
    "import os\nassert set(os.environ) <= {'LC_CTYPE'}, os.environ\ndef f(x): return x + 1": "passed",
    "import dataclasses\n@dataclasses.dataclass\nclass A:\n    b: 'int'\ndef f(x): return A(x).b + 1": "passed",
}


@pytest.mark.parametrize(("program", "outcome"), PROGRAMS.items())
def test_a_program_passes_only_with_its_last_test(program: str, outcome: str) -> None:
    assert run_tests(program, "'''a'''\nassert f(1) == 2", LIMITS) == outcome


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie whose parent has not asked for it runs no more.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_endless_programs_end_with_all_that_they_started(tmp_path: Path) -> None:
    assert run_tests("while True: pass", "", CodeLimits(cpu_s=1, wall_s=60)) == "timed out"
    assert run_tests("import time\ntime.sleep(600)", "", CodeLimits(wall_s=0.5)) == "timed out"
    # As root the limit on processes does not hold; what is left of the group is killed.
    note = tmp_path / "pid"
    program = (
        f"import os, time\npid = os.fork()\nif pid:\n    open({str(note)!r}, 'w').write(str(pid))\n    os._exit(0)\n"
    )
    assert run_tests(f"{program}time.sleep(600)", "", CodeLimits(wall_s=60)) == "failed"
    pids = [int(note.read_text())] if note.exists() else []
    assert pids or os.geteuid()
    deadline = time.monotonic() + 20
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(alive, pids))
