"""Sums with a teacher that writes its working, and what guesses without a model: nearest neighbour, most frequent.

    0347+0285=      7+5+0=12 4+8+1=13 3+2+1=06 0+0+0=00      00632
    problem         working, units first, with the carry     answer

Operands have four places and the answer five, so a digit of a sum stands where it stands in all others: a small model
learns such places soon. The larger operand has two to four digits. a+b and b+a are one problem.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PLACES = 4
DIGITS = (2, 3, 4)
# Of the teacher's solutions: one wrong carry; an end before the answer.
SLIPS, CUT_OFF = 0.25, 0.05
TEACHER = "scripted"


@dataclass(frozen=True)
class Sum:
    """Two operands below 10^4."""

    first: int
    second: int

    @property
    def text(self) -> str:
        """The problem as it is asked."""
        return f"{self.first:0{PLACES}}+{self.second:0{PLACES}}="

    @property
    def total(self) -> int:
        """The truth, by Python's integers."""
        return self.first + self.second

    @property
    def num_digits(self) -> int:
        """Of the larger operand."""
        return len(str(max(self.first, self.second)))

    @property
    def either_order(self) -> tuple[int, int]:
        """The same for a+b and b+a."""
        return min(self.first, self.second), max(self.first, self.second)

    @classmethod
    def of(cls, text: str) -> Sum:
        """The inverse of `text`."""
        first, second = text.removesuffix("=").split("+")
        return cls(int(first), int(second))


def family_size(num_digits: int) -> int:
    """Problems whose larger operand has so many digits, two or more; n (n + 1) / 2 are of numbers below n."""
    below: int = 10**num_digits
    smaller = below // 10
    return (below * (below + 1) - smaller * (smaller + 1)) // 2


def draw(num_training: int, num_test: int, *, seed: int) -> tuple[list[Sum], list[Sum]]:
    """Problems for training and for the test, none in both, as many of each number of digits.

    Raises:
        ValueError: no multiple of the numbers of digits, or more than half of a number's family: it would be held.
    """
    if num_training % len(DIGITS) or num_test % len(DIGITS):
        raise ValueError(f"{num_training} and {num_test} problems: give multiples of {len(DIGITS)}")
    each_training, each_test = num_training // len(DIGITS), num_test // len(DIGITS)
    if each_training + each_test > family_size(DIGITS[0]) // 2:
        raise ValueError(f"{num_training} and {num_test} problems are more than half of those of {DIGITS[0]} digits")
    chance = random.Random(seed)
    training, test = list[Sum](), list[Sum]()
    for num_digits in DIGITS:
        found: dict[tuple[int, int], Sum] = {}
        while len(found) < each_training + each_test:
            problem = Sum(chance.randrange(10**num_digits), chance.randrange(10**num_digits))
            if problem.num_digits == num_digits:
                found.setdefault(problem.either_order, problem)
        drawn = list(found.values())
        test += drawn[:each_test]
        training += drawn[each_test:]
    chance.shuffle(training)
    return training, test


def write_problems(problems: Sequence[Sum], path: Path) -> None:
    """As `launch/distill.py` reads them."""
    lines = (json.dumps({"problem": problem.text, "answer": str(problem.total)}) for problem in problems)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def solve(problem: Sum, *, slip_at: int | None = None) -> tuple[str, str]:
    """Working and answer, by columns; at one of them, the units being 0, the carry may be taken wrong."""
    columns, digits, carry = list[str](), "", 0
    for place in range(PLACES):
        a, b = (operand // 10**place % 10 for operand in (problem.first, problem.second))
        carry = 1 - carry if place == slip_at else carry
        total = a + b + carry
        columns.append(f"{a}+{b}+{carry}={total:02}")
        digits, carry = f"{total % 10}{digits}", total // 10
    return " ".join(columns), f"{carry}{digits}"


def answer_as_teacher(request: Mapping[str, Any]) -> dict[str, Any]:
    """The chat completion for a request's body, right or not: a function of its problem and its seed."""
    problem = Sum.of(request["messages"][0]["content"])
    chance = random.Random(f"{problem.text} {request['seed']}")
    drawn = chance.random()
    thoughts, answer = solve(problem, slip_at=chance.randrange(PLACES) if drawn < SLIPS else None)
    finish = "stop"
    if SLIPS <= drawn < SLIPS + CUT_OFF:
        thoughts, answer, finish = thoughts[: chance.randrange(1, len(thoughts))], "", "length"
    message = {"role": "assistant", "content": answer, "reasoning_content": thoughts}
    choice = {"index": 0, "message": message, "finish_reason": finish}
    usage = {"completion_tokens": len(thoughts) + len(answer)}
    return {"object": "chat.completion", "model": TEACHER, "choices": [choice], "usage": usage}


def nearest_answers(training: Sequence[Sum], test: Sequence[Sum]) -> list[int]:
    """The answer of the training problem whose operands, in either order, are nearest, |a - a'| + |b - b'|."""
    known = sorted({problem.either_order for problem in training})

    def nearest(low: int, high: int) -> tuple[int, int]:
        return min(known, key=lambda pair: abs(pair[0] - low) + abs(pair[1] - high))

    return [sum(nearest(*asked.either_order)) for asked in test]


def most_frequent_answer(training: Sequence[Sum]) -> int:
    """Of all training problems; of equally frequent ones the first."""
    return Counter(problem.total for problem in training).most_common(1)[0][0]


def share_right(right: Sequence[bool], problems: Sequence[Sum]) -> dict[str, float]:
    """The share of right answers, of all problems (`all`) and by number of digits."""
    parts = {"all": list(right)}
    for each, asked in sorted(zip(right, problems, strict=True), key=lambda pair: pair[1].num_digits):
        parts.setdefault(str(asked.num_digits), []).append(each)
    return {name: sum(part) / len(part) for name, part in parts.items()}
