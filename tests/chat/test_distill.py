"""Distillation end to end: a teacher on loopback that is wrong, slow, cut off, busy, ill or gone, and a SIGKILL.

The truth is the teacher's own script: what it does with each sample is a function of problem and seed, so the tests
know which solutions are right, and why each other one must be rejected.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.distill import main
from tests.chat.scripted_server import Reply, ScriptedServer, served
from tests.huggingface.hf_folders import BF16, RAGGED, lively, saved
from train.chat.answer_log import AnswerLog, read_answers
from train.chat.distill import MESSAGES, REPORT, SAMPLES, SETTINGS
from train.chat.engine import ModelServer
from train.chat.problems import open_problems
from train.huggingface.export import ExportOptions, export

SOON = {"Retry-After": "0.02"}
KINDS = ("right", "wrong", "cut off", "malformed", "empty", "too long", "busy", "ill", "gone", "refused", "slow")
# What becomes of each kind; a teacher that is busy, ill or gone answers rightly at the second attempt.
VERDICTS = {"right": "accepted", "busy": "accepted", "ill": "accepted", "gone": "accepted", "slow": "accepted"}
LONG = 2000


def total_of(question: str) -> int:
    """The sum that a problem of `chain_sum` asks for."""
    expression = re.search(r"problem: (.*) =", question)
    assert expression is not None
    return sum(int(number.replace(" ", "")) for number in re.findall(r"[+-]? ?\d+", expression[1]))


def kind_of(body: dict[str, Any]) -> str:
    return random.Random(f"{body['messages'][0]['content']}{body['seed']}").choice(KINDS)


def teacher(body: dict[str, Any]) -> Reply | list[Reply]:
    question, kind = body["messages"][0]["content"], kind_of(body)
    total = total_of(question)
    # With the seed in its thoughts no two solutions are the same.
    right = Reply(f"It is \\boxed{{{total}}}.", reasoning=f"I add ({body['seed']}).", delay_s=0.005)
    replies: dict[str, Reply | list[Reply]] = {
        "right": right,
        "wrong": Reply(f"It is {total}, no: \\boxed{{{total + 1}}}.", reasoning="I guess."),
        "cut off": Reply(f"\\boxed{{{total}}}", reasoning="I add.", finish="length"),
        "malformed": Reply(f"<think>I add. \\boxed{{{total}}}"),
        "empty": Reply("", reasoning=f"\\boxed{{{total}}}"),
        "too long": Reply(f"\\boxed{{{total}}}", reasoning="I add. " * LONG),
        "busy": [Reply(status=429, headers=SOON), right],
        "ill": [Reply(status=500, headers=SOON), right],
        "gone": [Reply(trouble="drop"), right],
        "refused": Reply(status=400),
        "slow": Reply(right.content, reasoning=right.reasoning, delay_s=0.1),
    }
    return replies[kind]


def arguments(server: ScriptedServer, out: Path, **changes: object) -> list[str]:
    given = {"size": 20, "samples": 4, "keep": 4, "in-flight": 4, "max-characters": LONG, "seed": 5} | changes
    flags = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    return ["reasoning-gym:chain_sum", "--teacher", server.url, "--out", str(out), *flags]


def expected_verdicts(bodies: list[dict[str, Any]]) -> Counter[str]:
    once = {json.dumps(body, sort_keys=True): kind_of(body) for body in bodies}
    return Counter(VERDICTS.get(kind, kind) for kind in once.values())


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / MESSAGES).read_text().splitlines()]


def check(out: Path, bodies: list[dict[str, Any]]) -> None:
    """What was kept and why the rest was not, against the teacher's script and a sum of ours."""
    report, kept, verdicts = json.loads((out / REPORT).read_text()), rows(out), expected_verdicts(bodies)
    assert report["samples"] == verdicts.total()
    assert report["accepted"] == verdicts.pop("accepted") == len(kept)
    assert (report["rejected"], report["missing"]) == (verdicts, 0)
    for row in kept:
        user, assistant = row["messages"]
        assert assistant["content"] == f"It is \\boxed{{{total_of(user['content'])}}}."
        body = {"messages": [user], "seed": row["provenance"]["seed"]}
        assert VERDICTS[kind_of(body)] == "accepted"
        assert assistant["reasoning_content"] == f"I add ({body['seed']})."
    assert report["solved"] == len({row["messages"][0]["content"] for row in kept})
    assert report["problems"] == len({body["messages"][0]["content"] for body in bodies})


@pytest.mark.long
def test_nothing_wrong_is_kept_and_nothing_is_lost_by_a_kill(tmp_path: Path) -> None:
    out, root = tmp_path / "out", Path(__file__).resolve().parents[2]
    with served(teacher) as server:
        command = [sys.executable, str(root / "launch/distill.py"), *arguments(server, out)]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        environment = os.environ | {"PYTHONPATH": str(root)}
        killed = subprocess.Popen(command, env=environment, **quiet)  # type: ignore[call-overload]
        try:
            deadline = time.monotonic() + 120
            while not (out / SAMPLES).exists() or (out / SAMPLES).read_bytes().count(b"\n") < 25:
                assert killed.poll() is None, "it ended before it was killed"
                assert time.monotonic() < deadline
                time.sleep(0.005)
        finally:
            killed.send_signal(signal.SIGKILL)
            killed.wait()
        # What had been answered before; of the others at most the four in flight were under way.
        before = {line["custom_id"]: line for _, line in read_answers(out / SAMPLES)}
        assert 25 <= len(before) < 80
        assert not (out / MESSAGES).exists()
        asked_before = len({json.dumps(body, sort_keys=True) for body in server.bodies})
        assert len(before) <= asked_before <= len(before) + 4
        server.bodies, second = [], len(server.bodies)
        assert main(arguments(server, out)) == 0
        assert second
        again = {json.dumps(body, sort_keys=True) for body in server.bodies}
        assert len(again) == 80 - len(before)
        assert server.most_in_flight <= 4
        # The lines of before are there as they were, and each sample once.
        after = [line for _, line in read_answers(out / SAMPLES)]
        assert [line for line in after if line["custom_id"] in before] == list(before.values())
        assert len({line["custom_id"] for line in after}) == len(after) == 80
        every = list(map(json.loads, server.attempts))
    assert {kind_of(body) for body in every} == set(KINDS)
    check(out, every)


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Callable[..., int]]:
    """A folder of ten problems, and a function that runs the same command with changes."""
    out = tmp_path_factory.mktemp("distilled") / "out"

    def run(script: Any = teacher, **changes: object) -> int:
        with served(script) as server:
            return main(arguments(server, out, **{"size": 10, "samples": 2} | changes))

    assert run() == 0
    return out, run


def test_each_row_says_where_it_is_from(distilled: tuple[Path, Callable[..., int]]) -> None:
    out, _ = distilled
    problems = open_problems("reasoning-gym:chain_sum", size=10, seed=5, run_code=False)
    lines = {line["custom_id"]: line for _, line in read_answers(out / SAMPLES)}
    for row in rows(out):
        assert set(row) == {"messages", "provenance"}
        said = row["provenance"]
        line = lines[f"{said['problem_key']}/{said['sample']}"]
        assert problems.distinct[said["problem_key"]].text in row["messages"][0]["content"]
        assert row["messages"][0]["content"].endswith("\n\nPut your final answer within \\boxed{}.")
        assert said.pop("time_unix_s") == line["time_unix_s"] > 1e9
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/v1", said.pop("endpoint"))
        assert said.pop("completion_tokens") == len(row["messages"][1]["content"])
        for name in ("problem", "problem_key", "sample", "seed"):
            said.pop(name)
        assert said == {
            "teacher": "teacher",
            "source": "reasoning-gym:chain_sum",
            "sampling": {"temperature": 0.6, "top_p": 0.95, "max_tokens": 32768},
            "verifier": "reasoning-gym 0.1.25 chain_sum",
        }


def test_another_bound_or_more_samples_ask_for_no_more_than_is_missing(
    distilled: tuple[Path, Callable[..., int]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, run = distilled
    asked: list[dict[str, Any]] = []

    def counting(body: dict[str, Any]) -> Reply | list[Reply]:
        asked.append(body)
        return teacher(body)

    assert run(counting, keep=1) == 0
    assert asked == []
    assert max(Counter(row["provenance"]["problem_key"] for row in rows(out)).values()) == 1
    assert json.loads((out / REPORT).read_text())["rejected"]["beyond --keep"] > 0
    assert run(counting, **{"min-characters": 100}) == 0
    assert rows(out) == []
    assert "rejected: too short" in capsys.readouterr().out
    before = (out / SAMPLES).read_bytes()
    assert run(counting, samples=3, size=11) == 0
    assert len({json.dumps(body, sort_keys=True) for body in asked}) == 10 + 3
    assert (out / SAMPLES).read_bytes().startswith(before)


def test_nothing_wrong_is_kept_and_every_rejection_has_its_reason(tmp_path: Path) -> None:
    with served(teacher) as server:
        assert main(arguments(server, tmp_path / "out", size=10)) == 0
        assert server.most_in_flight <= 4
        check(tmp_path / "out", list(map(json.loads, server.attempts)))


def test_the_same_solution_is_kept_once(tmp_path: Path) -> None:
    with served(lambda body: Reply(f"\\boxed{{{total_of(body['messages'][0]['content'])}}}")) as server:
        assert main(arguments(server, tmp_path / "out", size=2, samples=3)) == 0
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    assert (report["accepted"], report["rejected"]) == (2, {"repeated": 4})


@pytest.mark.long
def test_a_teacher_that_stays_ill_leaves_the_rest_for_the_next_call(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    with served(lambda body: teacher(body) if body["seed"] % 2 else Reply(status=500)) as server:
        assert main(arguments(server, out, size=10, samples=2, retries=0, **{"in-flight": 30})) == 1
    report = json.loads((out / REPORT).read_text())
    assert report["missing"] > 0
    assert "not answered yet" in capsys.readouterr().out
    with served(teacher) as server:
        assert main(arguments(server, out, size=10, samples=2)) == 0
    assert json.loads((out / REPORT).read_text())["missing"] == 0


ENGINE = (
    "import sys\nfrom tests.chat.scripted_server import Reply, ScriptedServer\n"
    "ScriptedServer(lambda body: Reply('\\\\boxed{2}'), port=int(sys.argv[1])).serve_forever()"
)


def test_a_folder_is_served_for_as_long_as_it_is_the_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The engine is a scripted one; `tests/system/test_serve.py` has the real one, for a chat."""
    folder, problems, ports = tmp_path / "teacher", tmp_path / "problems.jsonl", list[int]()
    export(saved(lively(RAGGED, BF16), tmp_path / "run"), folder, ExportOptions())
    problems.write_text('{"problem": "1+1", "answer": "2"}\n{"problem": "1+2", "answer": "3"}\n')

    def command(self: ModelServer, _: Path) -> tuple[list[str], dict[str, str]]:
        ports.append(self.port)
        return [sys.executable, "-c", ENGINE, str(self.port)], {"PYTHONPATH": str(Path(__file__).parents[2])}

    monkeypatch.setattr(ModelServer, "command", command)
    asked = [str(problems), "--teacher", str(folder), "--out", str(tmp_path / "out"), "--samples", "1"]
    assert main(asked) == 2
    assert "teacher has no chat template" in capsys.readouterr().err
    assert main([*asked[:1], "--teacher", "http://127.0.0.1:1", "--out", asked[4], "--format", "fp8"]) == 2
    assert (
        "--engine and --format are of what is served here, and http://127.0.0.1:1 is served" in capsys.readouterr().err
    )
    assert main([*asked, "--model", "x"]) == 2
    assert f"--model x names a model at an address, and {folder} is none" in capsys.readouterr().err
    (folder / "chat_template.jinja").touch()
    assert main(asked) == 0
    (row,) = rows(tmp_path / "out")
    assert row["messages"][0]["content"].startswith("1+1")
    assert row["provenance"]["teacher"] == "teacher"
    (port,) = ports
    assert row["provenance"]["endpoint"] == f"http://127.0.0.1:{port}/v1"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    monkeypatch.setattr(ModelServer, "command", lambda *_: ([sys.executable, "-c", "raise SystemExit('ill')"], {}))
    assert main([*asked, "--samples", "2"]) == 1
    assert re.search(r"distill: the engine .* its last words: ill; .* goes on\n$", capsys.readouterr().err)


def test_what_a_user_can_do_wrong_is_one_sentence(
    distilled: tuple[Path, Callable[..., int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, run = distilled
    wrong = {
        "begun with temperature = 0.6, not 0.7": {"temperature": 0.7},
        "begun with seed = 5, not 6": {"seed": 6},
        "begun with instruction = None, not 'Go.'": {"instruction": "Go."},
        "--samples 0 must be 1 or more": {"samples": 0},
        "--samples 2 at --temperature 0 are all the same": {"temperature": 0},
        "--temperature -1.0 must be in 0 .. 2": {"temperature": -1},
        "--max-characters 3 is below --min-characters 4": {"max-characters": 3, "min-characters": 4},
        "--extra '[1]' is no JSON object": {"extra": "[1]"},
        "--in-flight 0 must be 1 or more": {"in-flight": 0},
    }
    for message, changes in wrong.items():
        assert run(**changes) == 2
        said = capsys.readouterr().err
        assert message in said, said
        assert said.startswith("distill: ")
        assert said.count("\n") == 1
    # Samples of unknown settings, and a folder that another process writes.
    settings = (out / SETTINGS).read_text()
    (out / SETTINGS).unlink()
    assert run() == 2
    assert "has samples.jsonl but no settings.json" in capsys.readouterr().err
    (out / SETTINGS).write_text(settings)
    with AnswerLog(out / SAMPLES):
        assert run(size=11) == 2
    assert "is written by another process" in capsys.readouterr().err
    assert (out / SETTINGS).read_text() == settings, "nothing is written beside the other process"


def test_solutions_of_problems_that_are_gone_are_not_thrown_away(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with served(teacher) as server:
        assert main(arguments(server, tmp_path / "out", size=2, samples=1)) == 0
        before = {name: (tmp_path / "out" / name).read_bytes() for name in (SAMPLES, MESSAGES, SETTINGS)}
        assert main(arguments(server, tmp_path / "out", size=1, samples=1)) == 2
    assert "of a problem that is not among today's; give the source and --size as they were" in capsys.readouterr().err
    assert {name: (tmp_path / "out" / name).read_bytes() for name in before} == before
