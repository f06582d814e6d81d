r"""Multiple choice by likelihood: which option does the model find most likely?

Questions come from JSONL files, recognised by their fields:

    MMLU-Pro  {"question", "options": [...], "answer": "C", "answer_index": 2, "category"}
    MMLU      {"question", "choices": [...], "answer": 2 or "C", "subject"}
    GPQA      {"Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", ..., "Subdomain"}

Each is asked in two ways, with the definitions of lm-eval (0.4.13, `multiple_choice`):

    letters   {question}\nA. {option}\nB. {option}\n...\nAnswer:   then " A", " B", ...      (its mmlu tasks)
    texts     Question: {question}\nAnswer:                         then " " + option         (its ARC tasks)

    acc        the option of the highest log-likelihood, a sum over tokens, is the right one
    acc_norm   the same after division by the option's length in characters
    acc_bytes  the same after division by its length in UTF-8 bytes

Letters have one length, so they have acc alone. Of equal values the first option wins. Examples (shots) precede the
question with their answers, a blank line after each. The standard error is the binomial sqrt(p (1 - p) / n); lm-eval
divides by n - 1. arXiv:2412.19437 §4.4.1 scores such sets by perplexity ("texts" is that); its prompts are not public.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short

from train.evaluate.jsonl import Line, read_lines
from train.evaluate.language_model import LanguageModel
from train.evaluate.likelihood import LikelihoodRequest, encode_pair

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
CATEGORY_FIELDS = ("category", "subject", "subdomain", "high-level domain", "type")


@dataclass(frozen=True)
class MultipleChoiceQuestion:
    """Options in the order they are shown; `answer` is the index of the right one, `category` may be ""."""

    question: str
    options: tuple[str, ...]
    answer: int
    category: str = ""


def read_questions(path: Path, *, seed: int) -> list[MultipleChoiceQuestion]:
    """The questions of a JSONL file; ValueError names file, line and field."""
    return [_parse_question(line, seed) for line in read_lines(path)]


def _parse_question(line: Line, seed: int) -> MultipleChoiceQuestion:
    question = line.text("question", "problem")
    category = line.optional(*CATEGORY_FIELDS)
    if "correct answer" in line.fields:
        wrong = [name for name in line.fields if name.startswith("incorrect answer")]
        if not wrong:
            raise line.error("has 'Correct Answer' but no 'Incorrect Answer 1'")
        if len(wrong) >= len(LETTERS):
            raise line.error(f"has {len(wrong)} incorrect answers; there are letters for {len(LETTERS) - 1}")
        options = [line.text(name).strip() for name in ("correct answer", *sorted(wrong))]
        # GPQA lists the right option first. The order depends on seed and question alone, not on the rest of the file.
        order = list(range(len(options)))
        random.Random(f"{seed} {question}").shuffle(order)
        return MultipleChoiceQuestion(question, tuple(options[i] for i in order), order.index(0), category)
    if "choices" in line.fields and "options" in line.fields:
        raise line.error("has both 'choices' and 'options'; keep one")
    name = "choices" if "choices" in line.fields else "options"
    listed: object = line.fields.get(name)
    if listed is None:
        raise line.error("has no 'options', 'choices' or 'Correct Answer'")
    if not isinstance(listed, list) or not 2 <= len(listed) <= len(LETTERS):
        raise line.error(f"has {name!r} = {short(listed)}; list 2 to {len(LETTERS)} texts")
    if not all(isinstance(option, str) and option.strip() for option in listed):
        raise line.error(f"has {name!r} = {short(listed)}, and not each of them is a text")
    return MultipleChoiceQuestion(question, tuple(listed), _answer_index(line, len(listed)), category)


def _answer_index(line: Line, options: int) -> int:
    """From a letter, an index, or both, which must then agree."""
    found: dict[str, int] = {}
    for name in ("answer", "answer_index"):
        value = line.fields.get(name)
        if value is None:
            continue
        index = LETTERS.find(value) if isinstance(value, str) and len(value) == 1 else value
        if type(index) is not int or not 0 <= index < options:
            last = LETTERS[options - 1]
            raise line.error(f"has {name!r} = {short(value)}; write a letter from A to {last} or 0 to {options - 1}")
        found[name] = index
    if not found:
        raise line.error("has no 'answer' or 'answer_index'")
    if len(set(found.values())) > 1:
        raise line.error(f"has 'answer' and 'answer_index' that disagree: {found}")
    return next(iter(found.values()))


def _letters_prompt(question: MultipleChoiceQuestion) -> str:
    options = [f"{LETTERS[i]}. {option}" for i, option in enumerate(question.options)]
    return "\n".join([question.question.strip(), *options, "Answer:"])


# Way -> the prompt and the continuations of a question.
WAYS: dict[str, tuple[Callable[[MultipleChoiceQuestion], str], Callable[[MultipleChoiceQuestion], list[str]]]] = {
    "letters": (_letters_prompt, lambda question: [f" {LETTERS[i]}" for i in range(len(question.options))]),
    "texts": (
        lambda question: f"Question: {question.question.strip()}\nAnswer:",
        lambda question: [f" {option}" for option in question.options],
    ),
}


def examples_for(
    question: MultipleChoiceQuestion, examples: Sequence[MultipleChoiceQuestion], shots: int
) -> list[MultipleChoiceQuestion]:
    """The first `shots` examples of the question's category; ValueError where there are fewer."""
    same = [example for example in examples if example.category == question.category]
    if len(same) < shots:
        raise ValueError(
            f"--dev holds {len(same)} questions of category {question.category!r}, but --shots asks for {shots}; "
            "lower --shots or add questions"
        )
    return same[:shots]


def question_prompt(way: str, question: MultipleChoiceQuestion, examples: Sequence[MultipleChoiceQuestion]) -> str:
    """The text before the continuations: examples with their answers, then the question."""
    prompt, continuations = WAYS[way]
    shown = [prompt(example) + continuations(example)[example.answer] + "\n\n" for example in examples]
    return "".join(shown) + prompt(question)


def requests_of(
    model: LanguageModel,
    questions: Sequence[MultipleChoiceQuestion],
    *,
    examples: Sequence[MultipleChoiceQuestion] = (),
    shots: int = 0,
) -> dict[str, list[LikelihoodRequest]]:
    """Way -> a request for every option of every question; ValueError if an option is too long for the model."""
    asked: dict[str, list[LikelihoodRequest]] = {way: [] for way in WAYS}
    for way, requests in asked.items():
        for question in questions:
            prompt = question_prompt(way, question, examples_for(question, examples, shots))
            requests += [
                encode_pair(model.tokenizer, prompt, text, first_id=model.first_id) for text in WAYS[way][1](question)
            ]
        model.scorer.check(requests)
    return asked


def score_multiple_choice(
    model: LanguageModel,
    questions: Sequence[MultipleChoiceQuestion],
    *,
    examples: Sequence[MultipleChoiceQuestion] = (),
    shots: int = 0,
) -> dict[str, object]:
    """Ask every question both ways: way -> {"acc", "acc_norm", "acc_bytes", "by_category", "cut_tokens"}."""
    asked = requests_of(model, questions, examples=examples, shots=shots)
    return {way: _score_one_way(way, model, questions, requests) for way, requests in asked.items()}


def _score_one_way(
    way: str, model: LanguageModel, questions: Sequence[MultipleChoiceQuestion], requests: Sequence[LikelihoodRequest]
) -> dict[str, object]:
    answers = iter(model.scorer.score(requests))
    # (category, metric -> whether it picks the right option) of each question.
    results: list[tuple[str, dict[str, bool]]] = []
    cut_tokens = 0
    for question in questions:
        found = [next(answers) for _ in question.options]
        cut_tokens = max(cut_tokens, *(answer.cut_tokens for answer in found))
        picks = pick_options([answer.log_probability for answer in found], question.options)
        names = ("acc",) if way == "letters" else tuple(picks)
        results.append((question.category, {name: picks[name] == question.answer for name in names}))

    def table(rights: list[dict[str, bool]]) -> dict[str, object]:
        return {name: accuracy(sum(right[name] for right in rights), len(rights)) for name in rights[0]}

    by_category = {
        category: table([right for other, right in results if other == category])
        for category in sorted({question.category for question in questions} - {""})
    }
    return {**table([right for _, right in results]), "by_category": by_category, "cut_tokens": cut_tokens}


def pick_options(log_probabilities: Sequence[float], options: Sequence[str]) -> dict[str, int]:
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


def accuracy(right: int, questions: int) -> dict[str, float]:
    """Share of right answers with its binomial standard error, sqrt(p (1 - p) / n)."""
    share = right / questions
    error = math.sqrt(share * (1 - share) / questions)
    return {"value": share, "standard_error": error, "right": right, "questions": questions}
