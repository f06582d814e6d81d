"""The study of distillation: its problems, its teacher, what each arm is trained on, and how answers are scored."""

from __future__ import annotations

import json
from collections import Counter
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import pytest

from train.chat.messages import read_row
from train.chat.render import ChatEncoder
from train.data.tokenizer import load_tokenizer
from train.evaluate.language_model import LanguageModel
from train.observe.sinks import read_run
from train.studies.distillation import __main__ as command
from train.studies.distillation import runs, stores, sums
from train.studies.distillation.stores import ANSWER_ONLY, ARMS, REASONING, UNVERIFIED, Distilled
from train.studies.distillation.sums import DIGITS, Sum

PROBLEMS = sums.draw(600, 60, seed=3)
SIZE = runs.DistillationSize(training=600, test=6, samples=2, base_steps=1, steps=2, sequences=2, seeds=(0,))
TRAINED = (REASONING, ANSWER_ONLY)
END = "<｜end▁of▁sentence｜>"


def test_the_family_is_counted_and_far_larger_than_what_is_drawn() -> None:
    pairs = [Sum(*pair) for pair in combinations_with_replacement(range(100), 2)]
    assert sums.family_size(2) == sum(problem.num_digits == 2 for problem in pairs) == 4995
    size = runs.DistillationSize()
    assert sum(map(sums.family_size, DIGITS)) == 50_004_945 > 1e5
    assert size.training + size.test < 1e-4 * 50_004_945


def test_no_problem_of_the_test_is_trained_on_in_either_order() -> None:
    training, test = PROBLEMS
    every = [problem.either_order for problem in (*training, *test)]
    assert len(set(every)) == len(every) == 660
    for part in PROBLEMS:
        assert Counter(problem.num_digits for problem in part) == dict.fromkeys(DIGITS, len(part) // 3)
    assert sums.draw(600, 60, seed=3) == PROBLEMS
    assert Sum(7, 12).either_order == Sum(12, 7).either_order
    with pytest.raises(ValueError, match="more than half of those of 2 digits"):
        sums.draw(9000, 60, seed=3)


def test_the_solver_is_right_by_every_column_and_one_wrong_carry_makes_it_wrong() -> None:
    edges = [Sum(0, 10), Sum(9999, 9999), Sum(9999, 1), Sum(5000, 5000), Sum(909, 191)]
    for problem in (*edges, *PROBLEMS[0]):
        assert Sum.of(problem.text) == problem
        thoughts, answer = sums.solve(problem)
        assert int(answer) == problem.first + problem.second
        assert len(answer) == 5
        columns = [[*map(int, column.replace("=", "+").split("+"))] for column in thoughts.split()]
        assert all(a + b + carry == total for a, b, carry, total in columns)
        assert sum(a * 10**place for place, (a, *_) in enumerate(columns)) == problem.first
        assert sum(b * 10**place for place, (_, b, *_) in enumerate(columns)) == problem.second
        assert [carry for _, _, carry, _ in columns] == [0, *(total // 10 for *_, total in columns[:-1])]
        for place in range(sums.PLACES):
            assert abs(int(sums.solve(problem, slip_at=place)[1]) - problem.total) == 10**place


def test_guesses_without_a_model() -> None:
    training, test = [Sum(10, 20), Sum(90, 30), Sum(25, 15), Sum(12, 18)], [Sum(31, 89), Sum(14, 24)]
    assert sums.nearest_answers(training, test) == [120, 40]
    assert sums.most_frequent_answer(training) == 30
    assert sums.share_right([True, False, True], [Sum(1, 10), Sum(200, 3), Sum(4000, 1)]) == {
        "all": pytest.approx(2 / 3),
        "2": 1.0,
        "3": 0.0,
        "4": 1.0,
    }


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study of two arms and one seed, by the command, of two steps on 600 problems."""
    folder = tmp_path_factory.mktemp("distillation")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "SMOKE", SIZE)
        patch.setattr(runs, "ARMS", TRAINED)
        assert command.main(["--smoke", "--out", str(folder)]) == 0
    return folder


def conversations(arm: Distilled) -> dict[str, str]:
    """Problem -> what the assistant says, decoded from the store; the loss is on all of that and on nothing else."""
    store, tokenizer = arm.store, load_tokenizer(arm.store.path / arm.store.manifest.tokenizer_file)
    said = {}
    for index in range(store.manifest.documents):
        ids, has_loss = store.document(index), store.loss_mask(index).astype(bool)
        assert has_loss.tolist() == sorted(has_loss)
        asked = tokenizer.decode(ids[~has_loss].tolist())
        text = asked.removeprefix(f"{END}<｜User｜>").removesuffix("<｜Assistant｜>")
        said[text] = tokenizer.decode(ids[has_loss].tolist()).removesuffix(END)
    assert len(said) == store.manifest.documents
    return said


def test_each_store_holds_what_its_arm_says(studied: Path) -> None:
    training, _ = sums.draw(SIZE.training, SIZE.test, seed=0)
    arms = stores.make_stores(studied, training, samples=SIZE.samples)
    found = {arm: conversations(arms[arm]) for arm in ARMS}
    for text, said in found[REASONING].items():
        thoughts, answer = sums.solve(Sum.of(text))
        assert said == f"<think>{thoughts}</think>{answer}"
        assert found[ANSWER_ONLY][text] == f"</think>{answer}"
    assert found[REASONING].keys() == found[ANSWER_ONLY].keys() < {problem.text for problem in training}
    # Without a verifier the first solution that was not cut off is taken.
    wrong = [text for text, said in found[UNVERIFIED].items() if int(said[-5:]) != Sum.of(text).total]
    assert arms[UNVERIFIED].wrong == pytest.approx(len(wrong) / len(found[UNVERIFIED]))
    # 0.25 slips of 0.95 that are not cut off: within five standard deviations of 600 draws.
    assert abs(arms[UNVERIFIED].wrong - 0.25 / 0.95) < 0.09
    assert arms[REASONING].wrong == arms[ANSWER_ONLY].wrong == 0
    assert arms[REASONING].report["rejected"].keys() == {"cut off", "wrong", "repeated"}
    assert arms[UNVERIFIED].report["rejected"].keys() == {"cut off", "repeated", "beyond --keep"}
    # Working 35, answer 5, two marks of thinking or one, the end.
    assert arms[REASONING].targets == 43 * len(found[REASONING])
    assert arms[ANSWER_ONLY].targets == 7 * len(found[ANSWER_ONLY])


def test_each_arm_begins_with_the_base_and_trains_on_its_own_store(studied: Path) -> None:
    for arm in TRAINED:
        run = studied / "runs" / f"{stores.folder_of(arm)}-0"
        card = json.loads((run / "run_card.json").read_text())
        assert (card["began_from"]["run"], card["began_from"]["step"]) == ("base-0", 1)
        assert f"store: {studied}/stores/{stores.folder_of(arm)}/train" in (run / "config.yaml").read_text()
        assert [record["step"] for record in read_run(run)] == [1, 2]


def test_what_was_measured_is_read_again(
    studied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (studied / "tables.md").read_text()
    assert all(f"| {name} | " in before for name in (*TRAINED, "nearest neighbour", "most frequent answer"))
    monkeypatch.setattr(command, "SMOKE", SIZE)
    monkeypatch.setattr(runs, "ARMS", TRAINED)
    monkeypatch.setattr(runs, "fit", lambda _: pytest.fail("trained again"))
    assert command.main(["--smoke", "--out", str(studied)]) == 0
    assert (studied / "tables.md").read_text() == before
    monkeypatch.setattr(command, "SMOKE", runs.DistillationSize(steps=3))
    capsys.readouterr()
    assert command.main(["--smoke", "--out", str(studied)]) == 2
    assert "holds a study with other settings: give --out another folder" in capsys.readouterr().err


def test_problems_are_asked_as_trained_and_answers_scored_by_pythons_integers(
    studied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In place of the run's own answers stand right ones, two ways, wrong, malformed and unfinished ones."""
    test, asked = PROBLEMS[1], list[list[int]]()

    def written(model: LanguageModel, prompts: list[list[int]], **_: Any) -> list[list[int]]:
        asked.extend(prompts)
        thinking = ["<think>{}</think>{}".format(*sums.solve(problem)) for problem in test]
        said = [str(each.total + i % 5 - 1) if i % 5 in (1, 2) else thinking[i] for i, each in enumerate(test)]
        rows = [
            read_row({"prompt": problem.text, "completion": text}) for problem, text in zip(test, said, strict=True)
        ]
        whole = [each.ids.tolist() for each in ChatEncoder(model.tokenizer, first_token="eos").encode(rows)]
        # A conversation begins with its prompt, so what is asked is what training saw.
        assert all(ids[: len(prompt)] == prompt for ids, prompt in zip(whole, prompts, strict=True))
        assert {model.tokenizer.decode(prompt[-1:]) for prompt in prompts} == {"<｜Assistant｜>"}
        answers = [ids[len(prompt) :] for ids, prompt in zip(whole, prompts, strict=True)]
        end_of_think = model.tokenizer.core.token_to_id("</think>")
        answers[3::5] = [[id_ for id_ in ids if id_ != end_of_think] for ids in answers[3::5]]
        answers[4::5] = [ids[:-1] for ids in answers[4::5]]
        return answers

    monkeypatch.setattr(LanguageModel, "generate", written)
    found = runs.measure(studied / "runs/reasoning-0", test)
    assert len(asked) == len(test)
    assert found["right"] == {"all": 0.4, "2": 0.4, "3": 0.4, "4": 0.4}
    assert (found["working"], found["malformed"]) == (0.4, 0.4)
    assert found["examples"][test[0].text] == "<think>{}</think>{}".format(*sums.solve(test[0]))
