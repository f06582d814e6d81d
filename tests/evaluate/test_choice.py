"""Multiple choice: who knows scores 100 %, who knows nothing one in n; prompts and figures by their definitions."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.evaluate.planted import PlantedModel, respondent, small_tokenizer
from train.evaluate.choice import Accuracy, choose, prompt_of, score_choices
from train.evaluate.likelihood import encode_pair
from train.evaluate.questions import Choice

TOKENIZER = small_tokenizer()
QUESTIONS = [
    Choice(f"Question {i}?", tuple(f"option {i} {n}" for n in range(4)), i % 4, "even" if i % 2 == 0 else "odd")
    for i in range(8)
]


def ask(planted: PlantedModel, questions: list[Choice], **options: Any) -> dict[str, Any]:
    return score_choices(respondent(planted, start=1), questions, **options)


def tell(planted: PlantedModel, way: str, question: Choice, text: str) -> None:
    request = encode_pair(TOKENIZER, prompt_of(way, question, []), text, start=1)
    planted.tell(request.context, request.continuation)


def test_a_model_that_knows_the_answers_scores_all_of_them() -> None:
    planted = PlantedModel()
    for question in QUESTIONS:
        tell(planted, "letters", question, f" {'ABCD'[question.answer]}")
        tell(planted, "texts", question, f" {question.options[question.answer]}")
    found = ask(planted, QUESTIONS)
    for way, metrics in {"letters": ["acc"], "texts": ["acc", "acc_norm", "acc_bytes"]}.items():
        assert [name for name in found[way] if name.startswith("acc")] == metrics
        for name in metrics:
            assert found[way][name] == {"value": 1.0, "standard_error": 0.0, "right": 8, "questions": 8}
        assert found[way]["by_category"]["odd"]["acc"]["questions"] == 4


def test_a_model_that_knows_half_of_them_is_told_apart_by_category() -> None:
    planted = PlantedModel()
    for question in QUESTIONS:
        # Nothing known means the first option; question 0 and 4 have that one right.
        right = question.answer if question.category == "odd" else (question.answer + 1) % 4
        tell(planted, "letters", question, f" {'ABCD'[right]}")
    table = ask(planted, QUESTIONS)["letters"]
    assert table["acc"]["value"] == 0.5
    assert table["by_category"]["odd"]["acc"]["value"] == 1
    assert table["by_category"]["even"]["acc"]["value"] == 0


def test_a_model_that_knows_nothing_is_right_once_in_n() -> None:
    # Equal values: the first option wins, which is right for every fourth question.
    found = ask(PlantedModel(), QUESTIONS)
    assert found["letters"]["acc"]["value"] == 1 / 4
    assert found["texts"]["acc"]["value"] == 1 / 4
    # Per byte every option costs log 262 and the leading blank, whatever its length.
    uneven = [Choice("q", ("a", "bbb", "cc"), 0)]
    assert ask(PlantedModel(), uneven)["texts"]["acc"]["value"] == 1
    assert ask(PlantedModel(), uneven)["texts"]["acc_norm"]["value"] == 0


def test_normalisation_divides_by_characters_or_bytes() -> None:
    # Sums -6, -9, -10 over 2, 6 and 4 characters, 2, 6 and 8 bytes.
    assert choose([-6, -9, -10], ["ab", "abcdef", "ääää"]) == {"acc": 0, "acc_norm": 1, "acc_bytes": 2}


def test_prompts_are_those_of_the_definition() -> None:
    question, example = Choice(" Up? ", ("yes", "no"), 0), Choice("Down?", ("no", "yes"), 1)
    assert prompt_of("letters", question, [example]) == (
        "Down?\nA. no\nB. yes\nAnswer: B\n\nUp?\nA. yes\nB. no\nAnswer:"
    )
    assert prompt_of("texts", question, [example]) == "Question: Down?\nAnswer: yes\n\nQuestion: Up?\nAnswer:"


def test_examples_are_the_first_of_the_category() -> None:
    planted = PlantedModel()
    shown = [
        Choice("A?", ("x", "y"), 0, "odd"),
        Choice("B?", ("x", "y"), 1, "even"),
        Choice("C?", ("x", "y"), 0, "odd"),
    ]
    for question in QUESTIONS:
        examples = [example for example in shown if example.category == question.category][:1]
        prompt = prompt_of("letters", question, examples)
        request = encode_pair(TOKENIZER, prompt, f" {'ABCD'[question.answer]}", start=1)
        planted.tell(request.context, request.continuation)
    assert ask(planted, QUESTIONS, examples=shown, shots=1)["letters"]["acc"]["value"] == 1
    with pytest.raises(ValueError, match=r"--dev holds 1 questions of category 'even', but --shots asks for 2"):
        ask(planted, QUESTIONS, examples=shown, shots=2)


def test_a_prompt_that_does_not_fit_is_counted() -> None:
    found = score_choices(respondent(PlantedModel(), start=1, max_tokens=20), QUESTIONS[:1])
    prompt = encode_pair(TOKENIZER, prompt_of("letters", QUESTIONS[0], []), " A", start=1)
    # " A" is two tokens, the second is not read.
    assert found["letters"]["cut_tokens"] == len(prompt.context) + 1 - 20


def test_the_standard_error_is_binomial() -> None:
    assert Accuracy(3, 12).standard_error == pytest.approx(math.sqrt(0.25 * 0.75 / 12), rel=1e-15)
    # The standard deviation of 12 zeros and ones around their mean, over the root of 12.
    spread = math.sqrt((3 * 0.75**2 + 9 * 0.25**2) / 12) / math.sqrt(12)
    assert Accuracy(3, 12).standard_error == pytest.approx(spread, rel=1e-15)
