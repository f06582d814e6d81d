r"""Exact match of generated answers: write a solution, find its final answer, compare it with the right one.

Problems come from JSONL files:

    MATH      {"problem", "solution": "... \boxed{...} ...", "level", "type"}
    AIME      {"problem" or "question", "answer": "042" or 42}

Prompt: `Problem:\n{problem}\n\nSolution:`, after as many examples with their solutions as are asked for. A base model
goes on with the next problem when it has finished, so its text is cut at "Problem:". The answer is the content of the
last `\boxed{...}` (braces may nest), else the last number of the text, and the report counts how often that was so.

Two answers are equal if `normalize` spells them alike. That is stricter than algebra (1/2 is not 0.5, x+1 is not 1+x)
and needs no computer-algebra system.

With n samples a problem, pass@1 is the mean over problems of the share of right samples (AIME in arXiv:2412.19437
§5.3.1: 16 runs at temperature 0.7); greedy (temperature 0) has n = 1. Its standard error is that of a mean over
problems, sqrt(sum (share - mean)^2) / problems: for one sample the binomial sqrt(p (1 - p) / n).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import TYPE_CHECKING

from train.evaluate.jsonl import Line, read_lines

if TYPE_CHECKING:
    # It loads torch; who compares answers does not need it.
    from train.evaluate.language_model import LanguageModel

# Where a base model begins the next problem.
STOP = "Problem:"
# Longest solution where none is asked for, tokens; half of the model's longest input where that is less. Room for a
# worked solution of MATH; lm-eval's tasks have a default of their own (`lm_eval_adapter.py`).
DEFAULT_SOLUTION_TOKENS = 512
# Samples draw from streams counted from seed * 2^32 (`LanguageModel.generate`), below 2^63.
SEEDS = 1 << 31

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
# A number with commas between thousands that is the whole answer, a unit aside, or fills braces that are no set's.
_THOUSANDS = re.compile(
    r"(?:^\s*|(?<=\{)(?<!\\\{)\s*)[+-]?\d{1,3}(?:,\d{3})+(?=(?:\.\d+)?\s*(?:$|\}|[A-Za-z][A-Za-z ]*$))"
)
_TEXT = r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)"


@dataclass(frozen=True)
class Problem:
    """A problem and its final answer, as written; what a file does not have is ""."""

    problem: str
    answer: str
    solution: str = ""
    category: str = ""
    level: str = ""


@dataclass(frozen=True)
class Attempts:
    """How solutions are written: how many a problem, at which temperature (0: greedy), how long, from which seed."""

    samples: int = 1
    temperature: float = 0.0
    # None: `DEFAULT_SOLUTION_TOKENS`, or what fits.
    max_new_tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for flag, value in (("--samples", self.samples), ("--max-new-tokens", self.max_new_tokens)):
            if value is not None and value < 1:
                raise ValueError(f"{flag} {value} must be 1 or more")
        if not 0 <= self.seed < SEEDS:
            raise ValueError(f"--seed {self.seed} must be in 0 .. 2^31 - 1")
        if self.temperature < 0 or not math.isfinite(self.temperature):
            raise ValueError(f"--temperature {self.temperature} must be 0 (greedy) or more")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"--samples {self.samples} of a greedy model are all the same; set --temperature 0.7")

    def new_tokens(self, max_tokens: int) -> int:
        """Longest solution of a model that reads `max_tokens` at once."""
        return self.max_new_tokens or max(1, min(DEFAULT_SOLUTION_TOKENS, max_tokens // 2))


def read_problems(path: Path) -> list[Problem]:
    """The problems of a JSONL file; ValueError names file, line and field."""
    return [_parse_problem(line) for line in read_lines(path)]


def _parse_problem(line: Line) -> Problem:
    text, solution = line.text("problem", "question"), line.optional("solution")
    if "answer" in line.fields:
        answer = str(line.fields["answer"]).strip()
        if type(line.fields["answer"]) not in (str, int) or not answer:
            raise line.error(f"has 'answer' = {short(line.fields['answer'])}; write text or a whole number")
    else:
        found = boxed(line.text("solution"))
        if found is None:
            raise line.error("has no 'answer', and its 'solution' has no \\boxed{...}")
        answer = found
    category = line.optional("type", "category", "subject")
    return Problem(text, answer, solution, category, line.optional("level"))


def first_examples(examples: Sequence[Problem], shots: int) -> Sequence[Problem]:
    """The first `shots` examples; ValueError where there are fewer."""
    if len(examples) < shots:
        raise ValueError(f"--dev holds {len(examples)} problems, but --shots asks for {shots}; lower --shots")
    return examples[:shots]


def problem_prompt(problem: Problem, examples: Sequence[Problem]) -> str:
    """Examples with their solutions, then the problem."""
    shown = ""
    for example in examples:
        solution = example.solution.strip() or f"The final answer is $\\boxed{{{example.answer}}}$."
        shown += f"Problem:\n{example.problem.strip()}\n\nSolution:\n{solution}\n\n"
    return f"{shown}Problem:\n{problem.problem.strip()}\n\nSolution:"


def score_exact_match(
    model: LanguageModel, problems: Sequence[Problem], *, attempts: Attempts, examples: Sequence[Problem] = ()
) -> dict[str, object]:
    """Solve every problem, each after all of the examples.

    Returns:
        {"pass@1", "by_category", "by_level", "without_box", "unfinished", "samples", "cut_tokens"}; shares are of all
        samples, "cut_tokens" is the most that a prompt lost.
    """
    new_tokens = attempts.new_tokens(model.max_tokens)
    texts = [problem_prompt(problem, examples) for problem in problems]
    fitted = [model.fit_prompt(ids, max_new_tokens=new_tokens) for ids in model.tokenizer.encode_batch(texts)]
    written = model.generate(
        [prompt for prompt, _ in fitted for _ in range(attempts.samples)],
        max_new_tokens=new_tokens,
        temperature=attempts.temperature,
        seed=attempts.seed,
    )
    assert len(written) == len(problems) * attempts.samples, (len(written), len(problems), attempts.samples)
    end = model.tokenizer.special_ids.eos
    found = [answer_of(model.text_of(ids)) for ids in written]
    shares = []
    for number, problem in enumerate(problems):
        answers = found[number * attempts.samples : (number + 1) * attempts.samples]
        shares.append(sum(is_equal(answer, problem.answer) for answer, _ in answers) / attempts.samples)
    return {
        "pass@1": mean_of(shares),
        "by_category": _grouped([p.category for p in problems], shares),
        "by_level": _grouped([p.level for p in problems], shares),
        "without_box": sum(fallback for _, fallback in found) / len(found),
        "unfinished": sum(end not in ids for ids in written) / len(written),
        "samples": attempts.samples,
        "cut_tokens": max(cut for _, cut in fitted),
    }


def mean_of(shares: Sequence[float]) -> dict[str, float]:
    """Mean over problems, its standard error, and their number."""
    number = len(shares)
    mean = math.fsum(shares) / number
    error = math.sqrt(math.fsum((share - mean) ** 2 for share in shares)) / number
    return {"value": mean, "standard_error": error, "problems": number}


def _grouped(keys: Sequence[str], shares: Sequence[float]) -> dict[str, dict[str, float]]:
    return {
        key: mean_of([share for other, share in zip(keys, shares, strict=True) if other == key])
        for key in sorted(set(keys) - {""})
    }


def answer_of(text: str) -> tuple[str | None, bool]:
    """The final answer of a solution, and whether it had to be the last number."""
    text = text.split(STOP, maxsplit=1)[0]
    found = boxed(text)
    if found is not None:
        return found, False
    numbers = _NUMBER.findall(text)
    return (numbers[-1].rstrip(",") if numbers else None), True


def boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` (or `\fbox{...}`); None without one, or where its braces do not close."""
    begin = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if begin < 0:
        return None
    rest = text[begin:].removeprefix("\\boxed").removeprefix("\\fbox").lstrip()
    if not rest.startswith("{"):
        # `\boxed 5` holds one word.
        words = rest.split("$")[0].split()
        return words[0] if words else None
    depth, escaped = 0, False
    for index, letter in enumerate(rest):
        if not escaped:
            depth += (letter == "{") - (letter == "}")
        if not depth:
            return rest[1:index].strip()
        escaped = letter == "\\" and not escaped
    return None


def is_equal(found: str | None, expected: str) -> bool:
    """Whether two answers have the same spelling; None equals nothing."""
    return found is not None and normalize(found) == normalize(expected)


def normalize(answer: str) -> str:
    """One spelling of an answer."""
    text = answer.strip().removesuffix(".")
    # Dollar and per cent signs, degrees, the size of brackets, and small spaces.
    text = re.sub(r"\\?\$|\\?%|\^\{?\\circ\}?|\\left|\\right|\\[!,;:]", "", text)
    # \dfrac, \tfrac -> \frac; \frac12, \frac1{2} -> \frac{1}{2}; \sqrt3 -> \sqrt{3}
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{", text)
    text = re.sub(r"(\\frac\{[^{}]*\})\s*(\d)", r"\1{\2}", text)
    text = re.sub(r"\\sqrt\s*(\w)", r"\\sqrt{\1}", text)
    # A unit follows a number and may carry a power: 5\text{ cm}^2. Any text after a number is taken for a unit.
    text = re.sub(rf"(?<=[\d}}])\s*{_TEXT}\{{[^{{}}]*\}}(?:\^\{{?\d\}}?)?\s*$", "", text)
    # Other text stays without its command.
    text = re.sub(rf"{_TEXT}\{{([^{{}}]*)\}}", r"\1", text)
    # x=5 -> 5
    text = re.sub(r"^\s*[A-Za-z]\s*=", "", text)
    text = _THOUSANDS.sub(lambda number: number[0].replace(",", ""), text.replace("{,}", ","))
    text = re.sub(r"\s+", "", text)
    while text.startswith("{") and text.endswith("}") and text.count("{") == 1:
        text = text[1:-1]
    # 1/2 -> \frac{1}{2}; \frac{-1}{2} -> -\frac{1}{2}
    text = re.sub(r"^(-?)(\d+)/(\d+)$", r"\1\\frac{\2}{\3}", text)
    text = re.sub(r"^\\frac\{(?:-(\d+)\}\{(\d+)|(\d+)\}\{-(\d+))\}$", r"-\\frac{\1\3}{\2\4}", text)
    # A plain number: 007 -> 7, .5 -> 0.5, 2.50 -> 2.5, +3 -> 3
    match = re.fullmatch(r"([+-]?)0*(\d*)(?:\.(\d*))?", text)
    if match is None or not re.search(r"\d", text):
        return text
    sign, whole, decimals = match[1].replace("+", ""), match[2] or "0", (match[3] or "").rstrip("0")
    value = f"{whole}.{decimals}" if decimals else whole
    return value if value == "0" else sign + value
