r"""Scores of a chat model behind an endpoint: what it answers is checked, its thoughts are not read.

    pass@1    mean over problems of the share of right samples
    pass@k    1 - C(n - c, k) / C(n, k) for n samples of which c are right, the unbiased estimator; k = 2, 4, ... and n
              (Chen et al., arXiv:2107.03374, eq. 1)
    cons@n    the answer that most samples give is right; of t answers that are given equally often, 1/t for a right
              one; samples without an answer do not vote

Answers are equal as `answers.py` says. A sample that was cut off or is malformed is wrong.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from train.chat.answer_log import read_answers
from train.chat.answers import canonical, final_answer
from train.chat.asking import ask_into
from train.chat.endpoint import Endpoint, Request, fields_of, first_model
from train.chat.problems import GYM, CheckedProblem, ProblemSet, open_problems
from train.chat.thinking import Solution, solution_of
from train.evaluate.exact_match import Attempts, mean_of
from train.evaluate.suite import Suite, SuiteScores


@dataclass(frozen=True)
class ChatExam:
    """How problems are asked: of which model, how often, with which fields of a request besides."""

    endpoint: Endpoint
    model: str
    attempts: Attempts
    extra: Mapping[str, Any] = field(default_factory=dict)
    # Kept answers, JSONL; equal requests are not asked again. None: a temporary file.
    answers: Path | None = None

    def request(self, problem: CheckedProblem, instruction: str, sample: int) -> Request:
        """The request of one sample; its id is a hash of all that is sent."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": f"{problem.text}\n\n{instruction}"}],
            "temperature": self.attempts.temperature,
            "seed": self.attempts.seed + sample,
            **({"max_tokens": self.attempts.max_new_tokens} if self.attempts.max_new_tokens else {}),
            **self.extra,
        }
        digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        return Request(digest[:32], body)


def score_endpoint(url: str, key: str, suite: Suite, scores: SuiteScores) -> bool:
    """Score the first model of an endpoint, or the one that `extra` names; returns whether all was answered."""
    if suite.stores or suite.choice or suite.exact or suite.tasks or not suite.chat:
        raise ValueError(f"{url} is asked by --chat FILE, and by nothing else; a run or a folder is scored otherwise")
    extra = fields_of(suite.extra)
    files = {source: _problems(source, suite) for source in suite.chat}
    endpoint = Endpoint(url, key)
    model = extra.get("model") or asyncio.run(first_model(endpoint))
    exam = ChatExam(endpoint, model, suite.attempts, extra, suite.answers)
    for file, problems in files.items():
        scores.add("chat", file, score_chat(exam, problems))
    return scores.finish([])


def _problems(source: str, suite: Suite) -> ProblemSet:
    """Those of a file, or made; the first `limit`."""
    if source.startswith(GYM) and suite.limit is None:
        raise ValueError(f"--chat {source} can make any number of problems; say how many with --limit")
    problems = open_problems(source, size=suite.limit or 1, seed=suite.seed, run_code=suite.run_code)
    return replace(problems, problems=problems.problems[: suite.limit])


def score_chat(exam: ChatExam, problems: ProblemSet) -> dict[str, Any]:
    """Ask every problem and score the answers; {"failed": sentence} where some were not answered."""
    wanted = {
        key: [exam.request(problem, problems.instruction, sample) for sample in range(exam.attempts.samples)]
        for key, problem in problems.distinct.items()
    }
    # Two problems that ask the same and differ in their answers share a request.
    requests = {request.id: request for of_problem in wanted.values() for request in of_problem}
    with tempfile.TemporaryDirectory() as folder:
        path = exam.answers or Path(folder) / "answers.jsonl"
        asked = ask_into(path, exam.endpoint, requests.values(), total=len(requests))
        if not asked.complete:
            return {"failed": f"{len(requests) - asked.done} of {len(requests)} requests were not answered"}
        lines = ((line["custom_id"], line) for _, line in read_answers(path))
        solutions = {name: _solution(line) for name, line in lines if name in requests}
    answered = {key: [solutions[request.id] for request in of_problem] for key, of_problem in wanted.items()}
    return figures_of(problems, answered) | {
        "verifier": problems.verifier,
        "samples": exam.attempts.samples,
        "repeated_problems": len(problems.problems) - len(problems.distinct),
    }


def _solution(line: Mapping[str, Any]) -> Solution | None:
    """What a line holds; None for a refusal, or what is no answer."""
    try:
        return solution_of(line["response"]["body"] or {})
    except ValueError:
        return None


def figures_of(problems: ProblemSet, answered: Mapping[str, Sequence[Solution | None]]) -> dict[str, Any]:
    """The scores of samples by problem, as many of each."""
    right = {
        key: [
            solution is not None and not solution.cut_off and problem.accepts(solution.answer)
            for solution in answered[key]
        ]
        for key, problem in problems.distinct.items()
    }
    samples = len(next(iter(right.values())))
    shares = {key: sum(of_problem) / samples for key, of_problem in right.items()}
    every = [solution for of_problem in answered.values() for solution in of_problem]
    categories = {key: problem.category for key, problem in problems.distinct.items()}
    figures: dict[str, Any] = {
        "pass@1": mean_of(list(shares.values())),
        "pass@k": {str(k): mean_of([pass_at(samples, sum(c), k) for c in right.values()]) for k in _ks(samples)},
        "by_category": {
            name: mean_of([share for key, share in shares.items() if categories[key] == name])
            for name in sorted(set(categories.values()) - {""})
        },
        "unfinished": sum(solution is not None and solution.cut_off for solution in every) / len(every),
        "malformed": sum(solution is None for solution in every) / len(every),
    }
    if problems.votes:
        figures["cons@n"] = mean_of([majority(answered[key], of_problem) for key, of_problem in right.items()])
    return figures


def _ks(samples: int) -> Iterator[int]:
    yield from (1 << i for i in range(1, samples.bit_length()) if 1 << i < samples)
    if samples > 1:
        yield samples


def pass_at(samples: int, right: int, k: int) -> float:
    """The chance that one of k samples, drawn without replacement, is right."""
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def majority(solutions: Sequence[Solution | None], right: Sequence[bool]) -> float:
    """1 where the most frequent answer is right, a share where several are the most frequent, 0 without an answer."""
    votes = Counter[object]()
    is_right: dict[object, bool] = {}
    for solution, accepted in zip(solutions, right, strict=True):
        found = None if solution is None or solution.cut_off else final_answer(solution.answer)
        if found is not None:
            answer = canonical(found)
            votes[answer] += 1
            is_right[answer] = is_right.get(answer, False) or accepted
    first = [answer for answer, number in votes.items() if number == max(votes.values())]
    return sum(is_right[answer] for answer in first) / len(first) if first else 0.0
