"""Multiple choice: a model with the answers scores 100 %, one without 1/n; files, prompts and figures by definition."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.evaluate.planted import PlantedLanguageModel, PlantedModel, small_tokenizer, write_lines
from train.evaluate import multiple_choice
from train.evaluate.likelihood import encode_pair
from train.evaluate.multiple_choice import MultipleChoiceQuestion as Question
from train.evaluate.multiple_choice import question_prompt, read_questions, score_multiple_choice

TOKENIZER = small_tokenizer()
QUESTIONS = [
    Question(f"Question {i}?", tuple(f"option {i} {n}" for n in range(4)), i % 4, ("even", "odd")[i % 2])
    for i in range(8)
]
PRO = {"question": "Which is a colour?", "options": ["two", "red", "up"], "answer": "B", "answer_index": 1}
GPQA = {"Question": "2 + 2?", "Correct Answer": "four", "Incorrect Answer 1": "five", "Incorrect Answer 2": "six"}


def ask(planted: PlantedModel, questions: list[Question], *, max_tokens: int = 4096, **options: Any) -> dict[str, Any]:
    model = PlantedLanguageModel(planted, first_id=1, max_tokens=max_tokens)
    return score_multiple_choice(model, questions, **options)


def plant(planted: PlantedModel, way: str, question: Question, answer: int, *examples: Question) -> None:
    text = "ABCD"[answer] if way == "letters" else question.options[answer]
    request = encode_pair(TOKENIZER, question_prompt(way, question, examples), f" {text}", first_id=1)
    planted.plant(request.context, request.continuation)


def test_a_model_that_knows_the_answers_scores_all_of_them() -> None:
    planted = PlantedModel()
    for question in QUESTIONS:
        plant(planted, "letters", question, question.answer)
        plant(planted, "texts", question, question.answer)
    found = ask(planted, QUESTIONS)
    for way, metrics in {"letters": ["acc"], "texts": ["acc", "acc_norm", "acc_bytes"]}.items():
        assert [name for name in found[way] if name.startswith("acc")] == metrics
        for name in metrics:
            assert found[way][name] == {"value": 1.0, "standard_error": 0.0, "right": 8, "questions": 8}
        assert found[way]["by_category"]["odd"]["acc"]["questions"] == 4


def test_accuracy_is_reported_by_category() -> None:
    planted = PlantedModel()
    for question in QUESTIONS:
        # Nothing known means the first option; question 0 and 4 have that one right.
        plant(planted, "letters", question, (question.answer + (question.category == "even")) % 4)
    table = ask(planted, QUESTIONS)["letters"]
    assert table["acc"]["value"] == 0.5
    assert {name: part["acc"]["value"] for name, part in table["by_category"].items()} == {"odd": 1, "even": 0}


def test_a_model_that_knows_nothing_is_right_once_in_n() -> None:
    # Equal values: the first option wins, which is right for every fourth question.
    found = ask(PlantedModel(), QUESTIONS)
    assert (found["letters"]["acc"]["value"], found["texts"]["acc"]["value"]) == (1 / 4, 1 / 4)
    # Per byte every option costs log 262 and the leading blank, whatever its length.
    uneven = ask(PlantedModel(), [Question("q", ("a", "bbb", "cc"), 0)])["texts"]
    assert (uneven["acc"]["value"], uneven["acc_norm"]["value"]) == (1, 0)


def test_normalisation_divides_by_characters_or_bytes() -> None:
    # Sums -6, -9, -10 over 2, 6 and 4 characters, 2, 6 and 8 bytes.
    picks = multiple_choice.pick_options([-6, -9, -10], ["ab", "abcdef", "ääää"])
    assert picks == {"acc": 0, "acc_norm": 1, "acc_bytes": 2}


def test_prompts_are_those_of_the_definition() -> None:
    question, example = Question(" Up? ", ("yes", "no"), 0), Question("Down?", ("no", "yes"), 1)
    letters = "Down?\nA. no\nB. yes\nAnswer: B\n\nUp?\nA. yes\nB. no\nAnswer:"
    assert question_prompt("letters", question, [example]) == letters
    assert question_prompt("texts", question, [example]) == "Question: Down?\nAnswer: yes\n\nQuestion: Up?\nAnswer:"


def test_examples_are_the_first_of_the_category() -> None:
    planted = PlantedModel()
    shown = [Question(f"{name}?", ("x", "y"), name == "B", "even" if name == "B" else "odd") for name in "ABC"]
    for question in QUESTIONS:
        example = next(example for example in shown if example.category == question.category)
        plant(planted, "letters", question, question.answer, example)
    assert ask(planted, QUESTIONS, examples=shown, shots=1)["letters"]["acc"]["value"] == 1
    with pytest.raises(ValueError, match=r"--dev holds 1 questions of category 'even', but --shots asks for 2"):
        ask(planted, QUESTIONS, examples=shown, shots=2)


def test_a_prompt_that_does_not_fit_is_counted() -> None:
    prompt = encode_pair(TOKENIZER, question_prompt("letters", QUESTIONS[0], []), " A", first_id=1)
    # " A" is two tokens, the second is not read.
    found = ask(PlantedModel(), QUESTIONS[:1], max_tokens=20)["letters"]
    assert found["cut_tokens"] == len(prompt.context) + 1 - 20


def test_the_standard_error_is_binomial() -> None:
    error = multiple_choice.accuracy(3, 12)["standard_error"]
    assert error == pytest.approx(math.sqrt(0.25 * 0.75 / 12), rel=1e-15)
    # The standard deviation of 12 zeros and ones around their mean, over the root of 12.
    assert error == pytest.approx(math.sqrt((3 * 0.75**2 + 9 * 0.25**2) / 12) / math.sqrt(12), rel=1e-15)


def test_every_format_of_multiple_choice_is_read(tmp_path: Path) -> None:
    mmlu = {"question": "Which is a colour?", "choices": ["two", "red", "up"], "answer": 1, "subject": "art"}
    found = read_questions(write_lines(tmp_path / "q.jsonl", PRO | {"category": "art"}, "", mmlu, PRO), seed=0)
    text, options = "Which is a colour?", ("two", "red", "up")
    assert found == [Question(text, options, 1, "art"), Question(text, options, 1, "art"), Question(text, options, 1)]


def test_shuffled_options_keep_the_right_answer_and_depend_on_the_seed_alone(tmp_path: Path) -> None:
    other = GPQA | {"Question": "2 * 2?"}
    orders = set()
    for seed in range(20):
        (first, second) = read_questions(write_lines(tmp_path / "q.jsonl", GPQA, other), seed=seed)
        assert first.options[first.answer] == "four"
        assert sorted(first.options) == ["five", "four", "six"]
        # Neither the position in the file nor the other questions matter.
        assert read_questions(write_lines(tmp_path / "q.jsonl", other, GPQA), seed=seed) == [second, first]
        orders.add(first.options)
    assert len(orders) == 6


def without(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (without(PRO, "options"), "line 2 has no 'options', 'choices' or 'Correct Answer'"),
        (without(PRO, "question"), "line 2 has no 'question' or 'problem'; it has 'options'"),
        (without(PRO, "answer", "answer_index"), "line 2 has no 'answer' or 'answer_index'"),
        (PRO | {"options": ["one"]}, "line 2 has 'options' = .*; list 2 to 26 texts"),
        (PRO | {"options": ["one", 2]}, "line 2 has 'options' = .* not each of them is a text"),
        (PRO | {"options": ["a", "\ud800"]}, "line 2 is not JSON in UTF-8 .*surrogates not allowed"),
        ("[" * 10**5, "line 2 is not JSON in UTF-8 .maximum recursion"),
        (PRO | {"Options": ["a", "b"]}, "line 2 has two fields of one name but for its case"),
        (PRO | {"choices": ["a", "b"]}, "line 2 has both 'choices' and 'options'"),
        (PRO | {"category": ["a"]}, "line 2 has 'category' = ..a.., which is no text"),
        (
            {"question": "q", "correct answer": "a", **{f"incorrect answer {i}": "b" for i in range(26)}},
            "line 2 has 26 incorrect answers; there are letters for 25",
        ),
        (PRO | {"answer": "D"}, "line 2 has 'answer' = 'D'; write a letter from A to C or 0 to 2"),
        (PRO | {"answer": True}, "line 2 has 'answer' = True"),
        (PRO | {"answer_index": -1}, "line 2 has 'answer_index' = -1"),
        (PRO | {"answer": "A"}, "line 2 has 'answer' and 'answer_index' that disagree"),
        (PRO | {"question": " "}, "line 2 has 'question' = ' ', which is no text"),
        (without(GPQA, "Incorrect Answer 1", "Incorrect Answer 2"), "line 2 has 'Correct Answer' but no 'Incorrect"),
        ("{", "line 2 is not JSON"),
        ("[]", "line 2 is no JSON object"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: Any, message: str) -> None:
    path = write_lines(tmp_path / "questions.jsonl", PRO, line)
    with pytest.raises(ValueError, match=message) as error:
        read_questions(path, seed=0)
    assert str(error.value).startswith(f"{path} line 2 ")
    assert "\n" not in str(error.value)


def test_a_line_that_is_not_utf_8_is_named_and_a_byte_order_mark_is_none(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "questions.jsonl", PRO)
    good = path.read_bytes()
    path.write_bytes(good + b'{"question": "caf\xe9"}\n')
    with pytest.raises(ValueError, match=r"questions\.jsonl line 2 is not JSON in UTF-8 \(.*0xe9.*\); write"):
        read_questions(path, seed=0)
    path.write_bytes(b"\xef\xbb\xbf" + good)
    assert len(read_questions(path, seed=0)) == 1


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no questions"):
        read_questions(write_lines(tmp_path / "q.jsonl", ""), seed=0)
