r"""Multiple choice by likelihood: which option does the model find most likely?

Two ways of asking, each with the definitions of lm-eval (0.4.13, `multiple_choice`):

    letters   the options stand in the prompt and the continuations are " A", " B", ...        (its mmlu tasks)
    texts     the prompt holds the question alone and the continuations are " " + option       (its ARC tasks)

        {question}\nA. {option}\nB. {option}\n...\nAnswer:           letters
        Question: {question}\nAnswer:                                 texts

    acc        the option of the highest log-likelihood, a sum over tokens, is the right one
    acc_norm   the same after division by the option's length in characters    (lm-eval's acc_norm)
    acc_bytes  the same after division by its length in UTF-8 bytes            (lm-eval's acc_bytes)

Letters have one length, so they have acc alone. Of equal values the first option wins. Examples (shots) stand before
the question with their answers, a blank line after each: the first k of the question's category in the examples' file.
The standard error is the binomial sqrt(p (1 - p) / n); lm-eval divides by n - 1 instead.

arXiv:2412.19437 §4.4.1 scores such sets by perplexity ("texts" is that); its prompts are not public.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from train.evaluate.likelihood import Request, encode_pair
from train.evaluate.questions import LETTERS, Choice
from train.evaluate.respondent import Respondent


@dataclass(frozen=True)
class Accuracy:
    """Right answers out of so many.

    Args:
        right: answered rightly.
        questions: asked; one or more.
    """

    right: int
    questions: int

    @property
    def value(self) -> float:
        """Share of right answers."""
        return self.right / self.questions

    @property
    def standard_error(self) -> float:
        """Binomial: sqrt(p (1 - p) / n)."""
        return math.sqrt(self.value * (1 - self.value) / self.questions)

    def to_json(self) -> dict[str, float]:
        """Share, its standard error, and what they were made from."""
        return {"value": self.value, "standard_error": self.standard_error, **vars(self)}


def letters_prompt(question: Choice) -> str:
    """Question and options, up to "Answer:"."""
    options = [f"{LETTERS[i]}. {option}" for i, option in enumerate(question.options)]
    return "\n".join([question.question.strip(), *options, "Answer:"])


def texts_prompt(question: Choice) -> str:
    """The question alone, up to "Answer:"."""
    return f"Question: {question.question.strip()}\nAnswer:"


def _letters(question: Choice) -> list[str]:
    return [f" {LETTERS[i]}" for i in range(len(question.options))]


def _texts(question: Choice) -> list[str]:
    return [f" {option}" for option in question.options]


WAYS: dict[str, tuple[Callable[[Choice], str], Callable[[Choice], list[str]]]] = {
    "letters": (letters_prompt, _letters),
    "texts": (texts_prompt, _texts),
}


def examples_for(question: Choice, examples: Sequence[Choice], shots: int) -> list[Choice]:
    """The first examples of the question's category.

    Raises:
        ValueError: there are fewer than `shots`.
    """
    same = [example for example in examples if example.category == question.category]
    if len(same) < shots:
        raise ValueError(
            f"--dev holds {len(same)} questions of category {question.category!r}, but --shots asks for {shots}; "
            "lower --shots or add questions"
        )
    return same[:shots]


def prompt_of(way: str, question: Choice, examples: Sequence[Choice]) -> str:
    """The text before the continuations: examples with their answers, then the question."""
    prompt, continuations = WAYS[way]
    shown = [prompt(example) + continuations(example)[example.answer] + "\n\n" for example in examples]
    return "".join(shown) + prompt(question)


def score_choices(
    respondent: Respondent, questions: Sequence[Choice], *, examples: Sequence[Choice] = (), shots: int = 0
) -> dict[str, object]:
    """Ask every question both ways.

    Args:
        respondent: the model.
        questions: one or more.
        examples: what examples are taken from.
        shots: how many examples stand before each question.
    Returns:
        Way -> {"acc", "acc_norm", "acc_bytes", "by_category", "cut_tokens"}; see `Accuracy.to_json`.
    Raises:
        ValueError: too few examples, or an option too long for the model.
    """
    asked = requests_of(respondent, questions, examples=examples, shots=shots)
    return {way: _score_one_way(way, respondent, questions, requests) for way, requests in asked.items()}


def requests_of(
    respondent: Respondent, questions: Sequence[Choice], *, examples: Sequence[Choice] = (), shots: int = 0
) -> dict[str, list[Request]]:
    """Way -> a request for every option of every question, in order; arguments as for `score_choices`.

    Raises:
        ValueError: too few examples, or an option too long for the model.
    """
    asked: dict[str, list[Request]] = {way: [] for way in WAYS}
    for way, requests in asked.items():
        for question in questions:
            prompt = prompt_of(way, question, examples_for(question, examples, shots))
            requests += [
                encode_pair(respondent.tokenizer, prompt, text, start=respondent.start)
                for text in WAYS[way][1](question)
            ]
        respondent.scorer.check(requests)
    return asked


def _score_one_way(
    way: str, respondent: Respondent, questions: Sequence[Choice], requests: Sequence[Request]
) -> dict[str, object]:
    answers = iter(respondent.scorer.score(requests))
    rights: list[dict[str, bool]] = []
    cut_tokens = 0
    for question in questions:
        found = [next(answers) for _ in question.options]
        cut_tokens = max(cut_tokens, *(answer.cut_tokens for answer in found))
        picks = choose([answer.log_probability for answer in found], question.options)
        names = ("acc",) if way == "letters" else tuple(picks)
        rights.append({name: picks[name] == question.answer for name in names})
    return {**_tables(questions, rights), "cut_tokens": cut_tokens}


def choose(log_probabilities: Sequence[float], options: Sequence[str]) -> dict[str, int]:
    """Metric -> index of the option it picks; of equal values the first."""
    lengths = {
        "acc": [1] * len(options),
        "acc_norm": [len(option) for option in options],
        "acc_bytes": [len(option.encode()) for option in options],
    }
    picks = {}
    for name, divisors in lengths.items():
        values = [value / divisor for value, divisor in zip(log_probabilities, divisors, strict=True)]
        picks[name] = values.index(max(values))
    return picks


def _tables(questions: Sequence[Choice], rights: list[dict[str, bool]]) -> dict[str, object]:
    """Accuracy of each metric over all questions, and over each category where the file names some."""

    def table(chosen: list[dict[str, bool]]) -> dict[str, dict[str, float]]:
        return {name: Accuracy(sum(r[name] for r in chosen), len(chosen)).to_json() for name in chosen[0]}

    categories = sorted({question.category for question in questions} - {""})
    by_category = {
        category: table([r for q, r in zip(questions, rights, strict=True) if q.category == category])
        for category in categories
    }
    return {**table(rights), "by_category": by_category}
