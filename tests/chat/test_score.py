"""Scores of chat models: closed forms, hand-made votes, and `launch/score.py` against a server on loopback."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.score import main
from tests.chat.scripted_server import Reply, ScriptedServer, served
from train.chat.problems import open_problems
from train.chat.score import majority, pass_at
from train.chat.thinking import Solution

MATH = [{"problem": "one?", "answer": "1", "subject": "A"}, {"problem": "half?", "answer": "1/2", "subject": "B"}]
CHOICE = {
    "question": "Which?",
    "options": ["king", "people", "lord"],
    "answer": "C",
    "answer_index": 2,
    "category": "x",
}
GPQA = {"Question": "Who?", "Correct Answer": "me", "Incorrect Answer 1": "you", "Incorrect Answer 2": "they"}
CODE = {"task_id": 1, "text": "Add one.", "test_list": ["assert add(1) == 2"]}


def write(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize(("samples", "right"), [(n, c) for n in range(1, 8) for c in range(n + 1)])
def test_pass_at_k_is_the_mean_over_all_choices_of_k_samples(samples: int, right: int) -> None:
    solved = [True] * right + [False] * (samples - right)
    for k in range(1, samples + 1):
        chosen = list(itertools.combinations(solved, k))
        # Of FP64 sums.
        assert pass_at(samples, right, k) == pytest.approx(sum(map(any, chosen)) / len(chosen), abs=1e-15)


VOTES = [
    (["1", "1.0", "2"], "1", 1.0),
    (["2", "2", "1"], "1", 0.0),
    (["0.5", "1/2", "3", "3"], r"\frac{1}{2}", 0.5),
    (["1", "2", "3"], "2", 1 / 3),
    ([None, None, "2"], "2", 1.0),
    ([None, None], "2", 0.0),
]


@pytest.mark.parametrize(("answers", "expected", "share"), VOTES)
def test_the_majority_decides(answers: list[str | None], expected: str, share: float, tmp_path: Path) -> None:
    source = str(write(tmp_path / "p.jsonl", {"problem": "p", "answer": expected}))
    (problem,) = open_problems(source, size=1, seed=0, run_code=False).problems
    solutions = [Solution("" if answer is None else f"\\boxed{{{answer}}}") for answer in answers]
    right = [problem.accepts(solution.answer) for solution in solutions]
    assert majority(solutions, right) == pytest.approx(share, abs=1e-15)


def test_what_was_cut_off_or_malformed_has_no_vote() -> None:
    solutions = [
        Solution(r"\boxed{2}", cut_off=True),
        Solution(r"\boxed{2}", cut_off=True),
        None,
        Solution(r"\boxed{1}"),
    ]
    assert majority(solutions, [False, False, False, True]) == 1.0


def script(body: dict[str, Any]) -> Reply:
    """By question and sample: the thoughts always name another answer than the one that is given."""
    text, sample = body["messages"][0]["content"], body["seed"]
    if text.startswith("one?"):
        return Reply(r"\boxed{1}" if sample < 3 else r"\boxed{2}", reasoning=r"\boxed{2}")
    if text.startswith("half?"):
        # Right, right but cut off, marks that do not pair, wrong.
        answers = ["so <think>", r"\boxed{0.5}", r"\boxed{0.5}", r"\boxed{3}"]
        return Reply(answers[sample], finish="length" if sample == 2 else "stop")
    if text.startswith("Which?"):
        return Reply("<think>A, or B?</think>The answer is (C).")
    if text.startswith("Who?"):
        return Reply(f"\\boxed{{{next(line[0] for line in text.splitlines() if line.endswith('. me'))}}}")
    return Reply("<think>```python\ndef add(x): return x\n```</think>```python\ndef add(x):\n    return x + 1\n```")


@pytest.fixture(scope="module")
def server() -> Iterator[ScriptedServer]:
    with served(script) as running:
        yield running


def test_every_kind_of_file_is_scored_with_the_thoughts_taken_away(
    server: ScriptedServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {
        "math": write(tmp_path / "math.jsonl", *MATH),
        "choice": write(tmp_path / "choice.jsonl", CHOICE),
        "gpqa": write(tmp_path / "gpqa.jsonl", GPQA),
        "code": write(tmp_path / "code.jsonl", CODE),
    }
    flags = [text for path in files.values() for text in ("--chat", str(path))]
    flags += ["--samples", "4", "--temperature", "0.7", "--run-code", "--answers", str(tmp_path / "answers.jsonl")]
    assert main([server.url, *flags, "--out", str(tmp_path / "a.json")]) == 0
    found = json.loads((tmp_path / "a.json").read_text())["chat"]
    math_ = found[str(files["math"])]
    # 3 of 4 and 1 of 4.
    assert math_["pass@1"]["value"] == 0.5
    assert math_["pass@1"]["standard_error"] == pytest.approx(math.sqrt(2 * 0.25**2) / 2, rel=1e-15)
    # 1 - C(1, 2) / C(4, 2) = 1 and 1 - C(3, 2) / C(4, 2) = 1/2; any of four: both.
    assert {k: v["value"] for k, v in math_["pass@k"].items()} == {"2": 0.75, "4": 1.0}
    # 1 has three votes of four; 0.5 and 3 have one each.
    assert math_["cons@n"]["value"] == 0.75
    assert (math_["unfinished"], math_["malformed"]) == (1 / 8, 1 / 8)
    assert {name: part["value"] for name, part in math_["by_category"].items()} == {"A": 0.75, "B": 0.25}
    for name in ("choice", "gpqa", "code"):
        assert found[str(files[name])]["pass@1"]["value"] == 1.0
    assert "cons@n" not in found[str(files["code"])]
    shown = capsys.readouterr().out
    assert (
        "math.jsonl pass@1 50.00% +- 17.68%, cons@4 75.00% +- 17.68% of 2 problems, 4 samples each; 12% unfinished"
        in shown
    )
    # Asked again: the answers are there. Other fields make other requests.
    server.bodies = []
    assert main([server.url, *flags]) == 0
    assert server.bodies == []
    assert (
        main([server.url, *flags[:2], "--answers", str(tmp_path / "answers.jsonl"), "--extra", '{"top_p": 0.9}']) == 0
    )
    assert [(body["top_p"], body["temperature"]) for body in server.bodies] == [(0.9, 0.0)] * 2


def scored(server: ScriptedServer, tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """The figures of the one source of problems, and exit code 0."""
    out = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
    assert main([server.url, *arguments, "--out", str(out)]) == 0
    (figures,) = json.loads(out.read_text())["chat"].values()
    return dict(figures)


def test_so_many_problems_are_made_or_taken_as_are_asked_for(server: ScriptedServer, tmp_path: Path) -> None:
    server.bodies = []
    made = scored(server, tmp_path, "--chat", "reasoning-gym:chain_sum", "--limit", "5")
    assert (made["pass@1"]["problems"], len(server.bodies)) == (5, 5)
    assert made["verifier"] == "reasoning-gym 0.1.25 chain_sum"
    path = str(write(tmp_path / "m.jsonl", *MATH))
    assert scored(server, tmp_path, "--chat", path, "--limit", "1")["pass@1"]["problems"] == 1
    assert scored(server, tmp_path, "--chat", path)["pass@1"]["problems"] == 2


def test_equal_questions_are_asked_once_and_each_is_scored(server: ScriptedServer, tmp_path: Path) -> None:
    other = MATH[0] | {"answer": "7"}
    path = write(tmp_path / "m.jsonl", MATH[0], other, MATH[0])
    server.bodies = []
    found = scored(server, tmp_path, "--chat", str(path))
    assert len(server.bodies) == 1
    assert (found["pass@1"]["value"], found["pass@1"]["problems"], found["repeated_problems"]) == (0.5, 2, 1)


def test_a_kept_answer_without_a_response_is_asked_for_again(server: ScriptedServer, tmp_path: Path) -> None:
    path, answers = write(tmp_path / "m.jsonl", MATH[0]), tmp_path / "answers.jsonl"
    arguments = ["--chat", str(path), "--answers", str(answers)]
    scored(server, tmp_path, *arguments)
    line = json.loads(answers.read_text())
    write(answers, line | {"response": None, "error": {"message": "expired"}})
    assert scored(server, tmp_path, *arguments)["pass@1"]["value"] == 1.0
    # After the answer it changes nothing.
    write(answers, line, line | {"response": None})
    server.bodies = []
    assert scored(server, tmp_path, *arguments)["pass@1"]["value"] == 1.0
    assert server.bodies == []


def test_what_a_user_can_do_wrong_is_one_sentence(
    server: ScriptedServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    problems, code = write(tmp_path / "m.jsonl", *MATH), write(tmp_path / "c.jsonl", CODE)
    wrong = {
        "is asked by --chat FILE, and by nothing else": [server.url, "--exact", problems],
        "--chat asks an endpoint: serve the model (python -m launch.serve) and give its address": [
            "runs/x",
            "--chat",
            problems,
        ],
        "allow that with --run-code": [server.url, "--chat", code],
        "--extra '{' is not JSON": [server.url, "--chat", problems, "--extra", "{"],
        "nothing to score: give --store, --choice, --exact or --tasks, of an endpoint --chat": [server.url],
        "there is no file": [server.url, "--chat", tmp_path / "none.jsonl"],
        "reasoning-gym:chain_sum can make any number of problems; say how many with --limit": [
            server.url,
            "--chat",
            "reasoning-gym:chain_sum",
        ],
        "--dev is used by --choice and --exact only": [
            server.url,
            "--chat",
            problems,
            "--dev",
            problems,
            "--shots",
            "1",
        ],
        "--limit is used by --tasks and --chat only": ["runs/x", "--exact", problems, "--limit", "3"],
        "--answers is used by --chat only": ["runs/x", "--exact", problems, "--answers", tmp_path / "a"],
        "--extra is used by --chat only": ["runs/x", "--exact", problems, "--extra", "[]"],
    }
    for message, arguments in wrong.items():
        assert main(list(map(str, arguments))) == 2
        said = capsys.readouterr().err
        assert message in said, said
        assert said.count("\n") == 1


def test_answers_that_do_not_come_are_a_score_that_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with served(lambda body: Reply(status=401)) as refusing:
        arguments = [refusing.url, "--chat", str(write(tmp_path / "m.jsonl", *MATH)), "--out", str(tmp_path / "a.json")]
        assert main(arguments) == 2
    assert "m.jsonl: not scored (2 of 2 requests were not answered)" in capsys.readouterr().out
    assert json.loads((tmp_path / "a.json").read_text())["finished"]
