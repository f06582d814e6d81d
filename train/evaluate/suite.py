"""One evaluation of one model: stores, multiple choice, exact match, and tasks of lm-eval, in one report.

    read_files   files, names and numbers of what is asked, before a model is loaded
    evaluate     stores and tokeniser compared with the model's; then the scores, handed out as each is done

Whatever a user can get wrong is said in one sentence before the first forward pass, and what was measured is never
lost: with `--out` the report is written anew after each score, and it is printed however the command ends (`Report`).

Not here: the model (`subject.py`), the command line (`suite_options.py`, `launch/score.py`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.data.store import strict_json
from train.evaluate.benchmarks import Task, choose_tasks
from train.evaluate.choice import examples_for, requests_of, score_choices
from train.evaluate.exact import Attempts, examples_of, score_exact
from train.evaluate.lm_eval_adapter import check_tasks, run_tasks
from train.evaluate.questions import Choice, Problem, read_choices, read_problems
from train.evaluate.respondent import Respondent
from train.evaluate.score import total_score
from train.evaluate.subject import Subject

# Name of all stores together.
TOTAL = "total"
# Told of every part of the report as it is measured: "stores", "choice", "exact" or "tasks"; name; figures.
Keep = Callable[[str, str, Mapping[str, Any]], None]


@dataclass(frozen=True)
class Suite:
    """What to measure.

    Args:
        stores: domain -> folder.
        choice: files of multiple-choice questions.
        exact: files of problems with a final answer.
        dev: file that examples are taken from; of the same format as the questions.
        shots: examples before each question.
        attempts: how solutions are written.
        seed: of the order of GPQA's options.
        tasks: names for lm-eval, or "".
        limit: documents of each lm-eval task; None for all.
        run_code: whether lm-eval may run what the model wrote.
    """

    stores: Mapping[str, Path] = field(default_factory=dict)
    choice: Sequence[Path] = ()
    exact: Sequence[Path] = ()
    dev: Path | None = None
    shots: int = 0
    attempts: Attempts = field(default_factory=Attempts)
    seed: int = 0
    tasks: str = ""
    limit: int | None = None
    run_code: bool = False

    def __post_init__(self) -> None:
        if not (self.stores or self.choice or self.exact or self.tasks):
            raise ValueError("nothing to score: give --store, --choice, --exact or --tasks")
        if self.shots < 0 or (self.shots and self.dev is None):
            raise ValueError(f"--shots {self.shots} asks for examples: name their file with --dev, or leave it 0")


def named_stores(arguments: Sequence[str]) -> dict[str, Path]:
    """`NAME=PATH` or `PATH`, which is its own name -> stores by name.

    Raises:
        ValueError: a name twice, or one that the report needs itself.
    """
    stores: dict[str, Path] = {}
    for argument in arguments:
        name, _, path = argument.rpartition("=")
        name = name or path
        if name in stores or name == TOTAL:
            raise ValueError(f"--store {argument}: the name {name!r} is taken; choose another one with NAME=PATH")
        stores[name] = Path(path)
    return stores


@dataclass(frozen=True)
class Files:
    """What a suite's files hold.

    Args:
        choices: questions of each file.
        problems: of each file.
        choice_examples: what examples of questions are taken from.
        problem_examples: stand before each problem.
        tasks: for lm-eval.
        left_out: what `deepseek-base` names and is not run, one sentence each.
    """

    choices: Mapping[str, Sequence[Choice]]
    problems: Mapping[str, Sequence[Problem]]
    choice_examples: Sequence[Choice]
    problem_examples: Sequence[Problem]
    tasks: Sequence[Task]
    left_out: Sequence[str]


def read_files(suite: Suite) -> Files:
    """Read what is asked, and check all of it that needs no model.

    Raises:
        ValueError: a file, a number of examples, or a task's name; lm-eval is asked for but not installed.
    """
    choices = {str(path): read_choices(path, seed=suite.seed) for path in suite.choice}
    problems = {str(path): read_problems(path) for path in suite.exact}
    choice_examples = read_choices(suite.dev, seed=suite.seed) if suite.dev and choices else []
    for question in (question for asked in choices.values() for question in asked):
        examples_for(question, choice_examples, suite.shots)
    problem_examples = read_problems(suite.dev) if suite.dev and problems else []
    tasks, left_out = choose_tasks(suite.tasks, run_code=suite.run_code) if suite.tasks else ([], [])
    if tasks:
        check_tasks(tasks)
    return Files(
        choices,
        problems,
        choice_examples,
        examples_of(problem_examples, suite.shots) if problems else [],
        tasks,
        left_out,
    )


class Report:
    """Everything measured so far, in a JSON file where one is wanted.

    Args:
        out: the file; None: nothing is written.
    Attributes:
        results: {"stores": {domain: figures, "total": figures}, "choice": {file: figures}, "exact": {file: figures},
            "tasks": {task: figures}, "left_out": sentences}, each only where asked for; "finished": is it all there?
    Raises:
        ValueError: the file exists, or nothing can be written where it should be.
    """

    def __init__(self, out: Path | None) -> None:
        if out is not None and (out.exists() or not os.access(out.parent, os.W_OK | os.X_OK)):
            state = "exists already" if out.exists() else "lies in a folder that is not there or cannot be written to"
            raise ValueError(f"--out {out} {state}; name another file")
        self._out = out
        self.results: dict[str, Any] = {"finished": False}

    def keep(self, part: str, name: str, figures: Mapping[str, Any]) -> None:
        """A score is there."""
        self.results.setdefault(part, {})[name] = figures
        self._write()

    def finish(self, left_out: Sequence[str]) -> bool:
        """All scores are there; returns whether every task of lm-eval could be scored."""
        if left_out:
            self.results["left_out"] = list(left_out)
        self.results["finished"] = True
        self._write()
        return not any("failed" in figures for figures in self.results.get("tasks", {}).values())

    def show(self) -> None:
        """Print what was measured; a reader that has seen enough (`| head`) is no error."""
        try:
            for line in summary_lines(self.results):
                print(line, flush=True)
        except BrokenPipeError:
            # Nothing may be left for Python to write when it ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def _write(self) -> None:
        if self._out is None:
            return
        hidden = self._out.with_name(f".{self._out.name}.writing")
        with hidden.open("w", encoding="utf-8") as file:
            file.write(strict_json(self.results))
            file.flush()
            os.fsync(file.fileno())
        hidden.replace(self._out)


def evaluate(subject: Subject, suite: Suite, files: Files, keep: Keep) -> None:
    """Measure what the suite asks for.

    Args:
        subject: the model.
        suite: what to measure.
        files: of the suite (`read_files`).
        keep: told of each score when it is there; see `Report`.
    Raises:
        ValueError: anything a user can repair, in one sentence, before the first forward pass; later, a model whose
            figures are not finite. What lm-eval finds out only then is a figure of its task, {"failed": sentence}.
    """
    stores = {name: subject.open_store(path) for name, path in suite.stores.items()}
    asks = files.choices or files.problems or files.tasks
    respondent = subject.respondent() if asks else None
    if respondent:
        _check(respondent, suite, files)
    scores = []
    for name, store in stores.items():
        scores.append(subject.score_store(store))
        keep("stores", name, scores[-1].to_json())
    if scores:
        keep("stores", TOTAL, total_score(scores).to_json())
    if respondent:
        _ask(respondent, suite, files, keep)


def _check(respondent: Respondent, suite: Suite, files: Files) -> None:
    """What only the model's tokens and positions can tell, before anything is scored."""
    for questions in files.choices.values():
        requests_of(respondent, questions, examples=files.choice_examples, shots=suite.shots)
    if files.problems:
        respondent.prompt([], max_new_tokens=suite.attempts.new_tokens(respondent.scorer.max_tokens))


def _ask(respondent: Respondent, suite: Suite, files: Files, keep: Keep) -> None:
    for file, questions in files.choices.items():
        figures = score_choices(respondent, questions, examples=files.choice_examples, shots=suite.shots)
        keep("choice", file, figures)
    for file, problems in files.problems.items():
        solved = score_exact(respondent, problems, attempts=suite.attempts, examples=files.problem_examples)
        keep("exact", file, solved)
    if files.tasks:
        for task, found in run_tasks(respondent, files.tasks, limit=suite.limit, run_code=suite.run_code):
            keep("tasks", task, found)


def summary_lines(results: Mapping[str, Any]) -> Iterator[str]:
    """What to read on a terminal; everything else is in the JSON."""
    for name, figures in results.get("stores", {}).items():
        yield (
            f"{name}: {figures['bits_per_byte']:.4f} bits per byte, perplexity {figures['perplexity']:.3f} per token, "
            f"{figures['tokens']} tokens, {figures['text_bytes']} bytes"
        )
    for file, ways in results.get("choice", {}).items():
        for way, figures in ways.items():
            for name, value in figures.items():
                if name.startswith("acc"):
                    share = f"{value['value']:.2%} +- {value['standard_error']:.2%}"
                    yield f"{file} {way} {name}: {share} of {value['questions']} questions"
            yield from _cut(f"{file} {way}", figures)
    for file, figures in results.get("exact", {}).items():
        value = figures["pass@1"]
        yield (
            f"{file} pass@1: {value['value']:.2%} +- {value['standard_error']:.2%} of {value['problems']} problems, "
            f"{figures['samples']} samples each; {figures['without_box']:.0%} without \\boxed, "
            f"{figures['unfinished']:.0%} unfinished"
        )
        yield from _cut(file, figures)
    for name, figures in results.get("tasks", {}).items():
        if "failed" in figures:
            yield f"{name}: not scored ({figures['failed']})"
            continue
        yield f"{name}: {figures['results']} (DeepSeek-V3-Base: {figures['deepseek_v3_base']})"
        yield from _cut(name, figures)
    for sentence in results.get("left_out", ()):
        yield f"left out: {sentence}"


def _cut(name: str, figures: Mapping[str, Any]) -> Iterator[str]:
    if figures["cut_tokens"]:
        yield f"{name}: prompts were cut, by up to {figures['cut_tokens']} tokens, to fit --max-length"
