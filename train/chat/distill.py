"""Distillation by rejection sampling: problems -> a teacher's solutions -> those that a verifier accepts, as messages.

(arXiv:2412.19437 §5.1: reasoning data of a DeepSeek-R1 model, by rejection sampling; §5.4.1 what it gains.)

    OUT/settings.json    what was asked for; the same command goes on, another one is refused
    OUT/samples.jsonl    every solution as it came (`answer_log.py`): only this file costs anything
    OUT/messages.jsonl   the accepted ones, a conversation a line, with where it is from
    OUT/report.json      how many, and why the others were rejected

The last two are made anew from the first two by each call, each in one rename: what stands there is whole, and nothing
in it was not verified.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from reprlib import repr as short
from typing import Any

from train.chat.answer_log import AnswerLog, read_answers
from train.chat.endpoint import Request
from train.chat.problems import CheckedProblem, ProblemSet
from train.chat.thinking import Solution, solution_of
from train.data.store import strict_json
from train.data.whole_file import write_whole

SAMPLES, MESSAGES, REPORT, SETTINGS = "samples.jsonl", "messages.jsonl", "report.json", "settings.json"
ACCEPTED = "accepted"
# What all solutions of a folder share; of problems and samples there may be more in a later call.
SAME_FOR_ALL = ("source", "model", "seed", "temperature", "top_p", "max_tokens", "instruction", "extra", "verifier")
# Why solutions are rejected, in the order in which it is asked.
REASONS = ("refused", "malformed", "cut off", "empty", "too short", "too long", "wrong", "repeated", "beyond --keep")


@dataclass(frozen=True)
class Distillation:
    """What is asked of the teacher, and which solutions are kept; lengths are of thoughts and answer, characters."""

    source: str
    model: str
    size: int = 1000
    seed: int = 0
    samples: int = 4
    keep: int = 1
    temperature: float = 0.6
    top_p: float = 0.95
    max_tokens: int = 32768
    # After each problem; None: what its kind asks for.
    instruction: str | None = None
    min_characters: int = 1
    max_characters: int = 65536
    # More fields of each request, such as {"chat_template_kwargs": {"thinking": true}}.
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in (("size", 1), ("samples", 1), ("keep", 1), ("max_tokens", 1), ("min_characters", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} must be {least} or more")
        if not 0 <= self.temperature <= 2 or not 0 < self.top_p <= 1:
            raise ValueError(f"--temperature {self.temperature} must be in 0 .. 2, --top-p {self.top_p} in 0 .. 1")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"--samples {self.samples} at --temperature 0 are all the same; set --temperature 0.6")
        if self.max_characters < self.min_characters:
            raise ValueError(f"--max-characters {self.max_characters} is below --min-characters {self.min_characters}")

    def requests(self, problems: ProblemSet) -> Iterator[Request]:
        """Every sample of every problem, each with a seed of its own."""
        for key, problem in problems.distinct.items():
            for sample in range(self.samples):
                yield Request(
                    f"{key}/{sample}", self._body(self.question(problem, problems), self.seed_of(key, sample))
                )

    def seed_of(self, key: str, sample: int) -> int:
        """Independent of the other problems and of how many samples there are; below 2^31."""
        return (self.seed + int(key, 16) + sample) % (1 << 31)

    def question(self, problem: CheckedProblem, problems: ProblemSet) -> str:
        """What the teacher reads, and the student after it."""
        instruction = problems.instruction if self.instruction is None else self.instruction
        return f"{problem.text}\n\n{instruction}" if instruction else problem.text

    def _body(self, question: str, seed: int) -> dict[str, Any]:
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_tokens,
            "seed": seed,
            **self.extra,
        }


def claim(folder: Path, settings: Distillation, problems: ProblemSet) -> None:
    """Make the folder, or find the one of the same settings and problems.

    Raises:
        ValueError: another process asks for it, or settings or problems are others; names the first that differs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Not while another process asks: the settings are its own.
    with AnswerLog(folder / SAMPLES) as samples:
        wanted = asdict(settings) | {"verifier": problems.verifier}
        _check_settings(folder, wanted, begun=bool(samples.ids))
        _check_problems(samples, problems)
        write_whole(folder / SETTINGS, strict_json(wanted))


def _check_settings(folder: Path, wanted: Mapping[str, Any], *, begun: bool) -> None:
    """Refuse other settings than those with which the samples were made."""
    path = folder / SETTINGS
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else wanted
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); name another folder with --out") from None
    if not isinstance(found, Mapping):
        raise ValueError(f"{path} holds no settings of a distillation; name another folder with --out")
    if begun and not path.exists():
        raise ValueError(f"{folder} has {SAMPLES} but no {SETTINGS}; name another folder with --out")
    for name in SAME_FOR_ALL:
        if found.get(name) != wanted[name]:
            raise ValueError(
                f"{folder} was begun with {name} = {short(found.get(name))}, not {short(wanted[name])}; "
                "say the same again, or name another folder with --out"
            )


def _check_problems(samples: AnswerLog, problems: ProblemSet) -> None:
    """Refuse solutions, which were paid for, of problems that are not among today's."""
    if lost := next((name for name in samples.ids if name.rpartition("/")[0] not in problems.distinct), None):
        raise ValueError(
            f"{samples.path} has a solution {lost!r} of a problem that is not among today's; give the source and "
            "--size as they were, or name another folder with --out"
        )


def select(folder: Path, settings: Distillation, problems: ProblemSet) -> dict[str, Any]:
    """Verify every solution in the folder; write the accepted ones and the report, which is returned."""
    solutions = _SolutionsOnDisk(folder / SAMPLES)
    verdicts, solved = Counter[str](), 0

    def rows() -> Iterator[str]:
        nonlocal solved
        for key, problem in problems.distinct.items():
            kept: list[Solution] = []
            for sample in range(settings.samples):
                line = solutions.get(f"{key}/{sample}")
                if line is None:
                    continue
                solution, verdict = judge(line, problem, settings, kept)
                verdicts[verdict] += 1
                if solution and verdict == ACCEPTED:
                    kept.append(solution)
                    row = _row(settings, problems, problem, sample, line, solution)
                    yield json.dumps(row, ensure_ascii=False) + "\n"
            solved += bool(kept)

    write_whole(folder / MESSAGES, rows())
    asked = len(problems.distinct) * settings.samples
    report = {
        "problems": len(problems.distinct),
        "repeated_problems": len(problems.problems) - len(problems.distinct),
        "solved": solved,
        "samples": asked,
        "missing": asked - verdicts.total(),
        ACCEPTED: verdicts[ACCEPTED],
        "rejected": {reason: verdicts[reason] for reason in REASONS if verdicts[reason]},
        "verifier": problems.verifier,
    }
    write_whole(folder / REPORT, strict_json(report))
    return report


def judge(
    line: Mapping[str, Any], problem: CheckedProblem, settings: Distillation, kept: list[Solution]
) -> tuple[Solution | None, str]:
    """The solution of a line of the log, and `ACCEPTED` or one of `REASONS`."""
    if line["response"]["body"] is None:
        return None, "refused"
    try:
        solution = solution_of(line["response"]["body"])
    except ValueError:
        return None, "malformed"
    length = len(solution.thoughts) + len(solution.answer)
    verdicts: dict[str, Callable[[], bool]] = {
        "cut off": lambda: solution.cut_off,
        "empty": lambda: not solution.answer,
        "too short": lambda: length < settings.min_characters,
        "too long": lambda: length > settings.max_characters,
        "wrong": lambda: not problem.accepts(solution.answer),
        "repeated": lambda: (solution.thoughts, solution.answer) in {(each.thoughts, each.answer) for each in kept},
        "beyond --keep": lambda: len(kept) >= settings.keep,
    }
    return solution, next((reason for reason, holds in verdicts.items() if holds()), ACCEPTED)


def _row(
    settings: Distillation,
    problems: ProblemSet,
    problem: CheckedProblem,
    sample: int,
    line: Mapping[str, Any],
    solution: Solution,
) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": settings.question(problem, problems)}, solution.message],
        "provenance": {
            "teacher": line["response"]["body"].get("model", settings.model),
            # Answers of another program, such as OpenAI's own batches, have neither.
            "endpoint": line.get("endpoint"),
            "time_unix_s": line.get("time_unix_s"),
            "completion_tokens": solution.completion_tokens,
            "source": settings.source,
            "problem": problem.name,
            "problem_key": problem.key,
            "sample": sample,
            "sampling": {name: getattr(settings, name) for name in ("temperature", "top_p", "max_tokens")},
            "seed": settings.seed_of(problem.key, sample),
            "verifier": problems.verifier,
        },
    }


class _SolutionsOnDisk:
    """Lines of the log by id, read when they are needed: thoughts are long, and there may be a million."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._offsets: dict[str, int] = {}
        for offset, line in read_answers(path):
            self._offsets[line["custom_id"]] = offset

    def get(self, key: str) -> dict[str, Any] | None:
        if key not in self._offsets:
            return None
        self._file.seek(self._offsets[key])
        found: dict[str, Any] = json.loads(self._file.readline())
        return found
