"""One evaluation of one model: stores, multiple choice, exact match, and tasks of lm-eval.

    read_files    files, names and numbers, checked before a model is loaded
    evaluate      stores and tokeniser compared with the model's, then the scores
    SuiteScores   each score as soon as it is measured, in a JSON file (`--out`) and as lines to print

User errors are found before the first forward pass. The file is rewritten after each score and the scores are printed
however the command ends, so nothing that was measured is lost.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.data.store import strict_json
from train.data.whole_file import write_whole
from train.evaluate.benchmarks import Task, choose_tasks
from train.evaluate.exact_match import Attempts, Problem, first_examples, read_problems, score_exact_match
from train.evaluate.language_model import LanguageModel
from train.evaluate.lm_eval_adapter import check_tasks, run_tasks
from train.evaluate.multiple_choice import (
    MultipleChoiceQuestion,
    examples_for,
    read_questions,
    requests_of,
    score_multiple_choice,
)
from train.evaluate.score import total_score

# Name of all stores together.
TOTAL = "total"


@dataclass(frozen=True)
class Suite:
    """What to measure: the flags of launch/score.py."""

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
    # Of an endpoint (`train/chat/score.py`): files or reasoning-gym:FAMILY, more fields of each request as JSON, and
    # where answers are kept.
    chat: Sequence[str] = ()
    extra: str = "{}"
    answers: Path | None = None

    def __post_init__(self) -> None:
        if not (self.stores or self.choice or self.exact or self.tasks or self.chat):
            raise ValueError("nothing to score: give --store, --choice, --exact or --tasks, of an endpoint --chat")
        for flag, value, least in (("--shots", self.shots, 0), ("--limit", self.limit, 1)):
            if value is not None and value < least:
                raise ValueError(f"{flag} {value} must be {least} or more")
        if self.shots and self.dev is None:
            raise ValueError(f"--shots {self.shots} asks for examples: name their file with --dev, or leave it 0")
        for flag, given, serves, used in (
            ("--dev", self.dev is not None, "--choice and --exact", bool(self.choice or self.exact)),
            ("--limit", self.limit is not None, "--tasks and --chat", bool(self.tasks or self.chat)),
            ("--extra", self.extra != "{}", "--chat", bool(self.chat)),
            ("--answers", self.answers is not None, "--chat", bool(self.chat)),
        ):
            if given and not used:
                raise ValueError(f"{flag} is used by {serves} only; leave it out, or ask for one of these")


def named_stores(arguments: Sequence[str]) -> dict[str, Path]:
    """`NAME=PATH` or `PATH`, which is its own name -> stores by name; ValueError for a name that is taken."""
    stores: dict[str, Path] = {}
    for argument in arguments:
        name, _, path = argument.rpartition("=")
        name = name or path
        if name in stores or name == TOTAL:
            raise ValueError(f"--store {argument}: the name {name!r} is taken; choose another one with NAME=PATH")
        stores[name] = Path(path)
    return stores


@dataclass(frozen=True)
class SuiteFiles:
    """The content of a suite's files, by file, and its tasks of lm-eval."""

    choices: Mapping[str, Sequence[MultipleChoiceQuestion]]
    problems: Mapping[str, Sequence[Problem]]
    # Of all categories; each question takes those of its own.
    choice_examples: Sequence[MultipleChoiceQuestion]
    # Shown before each problem.
    problem_examples: Sequence[Problem]
    tasks: Sequence[Task]
    # Benchmarks of `deepseek-base` that are not run, one sentence each.
    left_out: Sequence[str]


def read_files(suite: Suite) -> SuiteFiles:
    """Read the files; ValueError for whatever can be wrong with them before a model is loaded."""
    if suite.chat:
        raise ValueError("--chat asks an endpoint: serve the model (python -m launch.serve) and give its address")
    choices = {str(path): read_questions(path, seed=suite.seed) for path in suite.choice}
    problems = {str(path): read_problems(path) for path in suite.exact}
    choice_examples = read_questions(suite.dev, seed=suite.seed) if suite.dev and choices else []
    for question in (question for questions in choices.values() for question in questions):
        examples_for(question, choice_examples, suite.shots)
    problem_examples = read_problems(suite.dev) if suite.dev and problems else []
    tasks, left_out = choose_tasks(suite.tasks, run_code=suite.run_code) if suite.tasks else ([], [])
    if tasks:
        check_tasks(tasks)
    shown = first_examples(problem_examples, suite.shots) if problems else []
    return SuiteFiles(choices, problems, choice_examples, shown, tasks, left_out)


class SuiteScores:
    """Everything measured so far, in a JSON file where one is wanted.

    `results`: {"stores": {domain: figures, "total": figures}, "baselines": {domain: figures}, "choice": {file:
    figures}, "exact": {file: figures}, "chat": {file: figures}, "tasks": {task: figures}, "left_out": sentences}, each
    only where asked for, and "finished": whether it is complete.
    """

    def __init__(self, out: Path | None) -> None:
        if out is not None and (out.exists() or not os.access(out.parent, os.W_OK | os.X_OK)):
            state = "exists already" if out.exists() else "is in a folder that is not there or cannot be written to"
            raise ValueError(f"--out {out} {state}; name another file")
        self._out = out
        self.results: dict[str, Any] = {"finished": False}

    def add(self, section: str, name: str, figures: Mapping[str, Any]) -> None:
        """Keep a score: of "stores", "baselines", "choice", "exact", "chat" or "tasks"."""
        self.results.setdefault(section, {})[name] = figures
        self._write()

    def finish(self, left_out: Sequence[str]) -> bool:
        """Mark the scores as complete; returns whether every task and every chat could be scored."""
        if left_out:
            self.results["left_out"] = list(left_out)
        self.results["finished"] = True
        self._write()
        sections = (self.results.get(name, {}) for name in ("chat", "tasks"))
        return not any("failed" in figures for section in sections for figures in section.values())

    def show(self) -> None:
        """Print the scores; a reader that closes the pipe (`| head`) is no error."""
        try:
            for line in summary_lines(self.results):
                print(line, flush=True)
        except BrokenPipeError:
            # Nothing may be left for Python to write when it ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def _write(self) -> None:
        if self._out is not None:
            write_whole(self._out, strict_json(self.results))


def evaluate(model: LanguageModel, suite: Suite, files: SuiteFiles, scores: SuiteScores) -> None:
    """Measure what the suite asks for; ValueError for user errors, before the first forward pass.

    A task that lm-eval cannot run is not an error but a score, {"failed": sentence}.
    """
    stores = {name: model.open_store(path) for name, path in suite.stores.items()}
    if files.choices or files.problems or files.tasks:
        _check_lengths(model, suite, files)
    found = []
    for name, store in stores.items():
        found.append(model.score_store(store))
        scores.add("stores", name, found[-1].to_json())
    if found:
        scores.add("stores", TOTAL, total_score(found).to_json())
    for file, questions in files.choices.items():
        figures = score_multiple_choice(model, questions, examples=files.choice_examples, shots=suite.shots)
        scores.add("choice", file, figures)
    for file, problems in files.problems.items():
        figures = score_exact_match(model, problems, attempts=suite.attempts, examples=files.problem_examples)
        scores.add("exact", file, figures)
    if files.tasks:
        for task, figures in run_tasks(model, files.tasks, limit=suite.limit, run_code=suite.run_code):
            scores.add("tasks", task, figures)


def _check_lengths(model: LanguageModel, suite: Suite, files: SuiteFiles) -> None:
    """What only the model's tokens and positions can tell, before anything is scored."""
    # Loads it: there may be none, or not the one of training.
    _ = model.tokenizer
    for questions in files.choices.values():
        requests_of(model, questions, examples=files.choice_examples, shots=suite.shots)
    if files.problems:
        model.fit_prompt([], max_new_tokens=suite.attempts.new_tokens(model.max_tokens))


def summary_lines(results: Mapping[str, Any]) -> Iterator[str]:
    """The scores as lines for a terminal; the JSON has more."""
    for name, figures in results.get("stores", {}).items():
        yield (
            f"{name}: {figures['bits_per_byte']:.4f} bits per byte, perplexity {figures['perplexity']:.3f} per token, "
            f"{figures['tokens']} tokens, {figures['text_bytes']} bytes"
        )
        yield from _baseline_line(results.get("baselines", {}).get(name))
    for file, ways in results.get("choice", {}).items():
        for way, figures in ways.items():
            for name, value in figures.items():
                if name.startswith("acc"):
                    share = f"{value['value']:.2%} +- {value['standard_error']:.2%}"
                    yield f"{file} {way} {name}: {share} of {value['questions']} questions"
            yield from _cut_line(f"{file} {way}", figures)
    for file, figures in results.get("exact", {}).items():
        value = figures["pass@1"]
        yield (
            f"{file} pass@1: {value['value']:.2%} +- {value['standard_error']:.2%} of {value['problems']} problems, "
            f"{figures['samples']} samples each; {figures['without_box']:.0%} without \\boxed, "
            f"{figures['unfinished']:.0%} unfinished"
        )
        yield from _cut_line(file, figures)
    for file, figures in results.get("chat", {}).items():
        yield _chat_line(file, figures)
    for name, figures in results.get("tasks", {}).items():
        yield from _task_lines(name, figures)
    for sentence in results.get("left_out", ()):
        yield f"left out: {sentence}"


def _baseline_line(figures: Mapping[str, Any] | None) -> Iterator[str]:
    if figures and "left_out" in figures:
        yield f"  baselines left out: {figures['left_out']}"
    elif figures:
        parts = ", ".join(f"{name} {figures[name]:.4f}" for name in ("bigram", "xz", "unigram"))
        yield f"  to beat: {parts} bits per byte, learnt from {figures['learn_from']}"


def _task_lines(name: str, figures: Mapping[str, Any]) -> Iterator[str]:
    if "failed" in figures:
        yield f"{name}: not scored ({figures['failed']})"
        return
    yield f"{name}: {figures['results']} (DeepSeek-V3-Base: {figures['deepseek_v3_base']})"
    yield from _cut_line(name, figures)


def _chat_line(file: str, figures: Mapping[str, Any]) -> str:
    if "failed" in figures:
        return f"{file}: not scored ({figures['failed']})"
    samples, value = figures["samples"], figures["pass@1"]
    shares = {
        "pass@1": value,
        **({f"cons@{samples}": figures["cons@n"]} if samples > 1 and "cons@n" in figures else {}),
    }
    shown = ", ".join(f"{name} {each['value']:.2%} +- {each['standard_error']:.2%}" for name, each in shares.items())
    return (
        f"{file} {shown} of {value['problems']} problems, {samples} samples each; "
        f"{figures['unfinished']:.0%} unfinished, {figures['malformed']:.0%} malformed"
    )


def _cut_line(name: str, figures: Mapping[str, Any]) -> Iterator[str]:
    if figures["cut_tokens"]:
        yield f"{name}: prompts were cut, by up to {figures['cut_tokens']} tokens, to fit --max-length"
