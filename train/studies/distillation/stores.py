"""A teacher's solutions, verified or not, as stores of conversations: the way of `launch/distill.py` and `prepare.py`.

reasoning             working and answer of solutions whose answer is right
answer only           the same solutions without their working
reasoning unverified  working and answer of each problem's first solution that was not cut off, right or wrong
base                  problems without answers, as text; its tokeniser is that of all
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from train.chat.answer_log import AnswerLog
from train.chat.distill import MESSAGES, SAMPLES, Distillation, claim, select
from train.chat.ingest import ChatForm
from train.chat.problems import ProblemSet, math_problems
from train.data.ingest import Recipe, prepare
from train.data.store import TOKENIZER_NAME, TokenStore
from train.data.tokenizer import CHAT_MARKS, SMALLEST_VOCAB_SIZE
from train.studies.distillation import sums
from train.studies.distillation.sums import Sum

REASONING, ANSWER_ONLY, UNVERIFIED = ARMS = ("reasoning", "answer only", "reasoning unverified")
BASE = "base"
# Bytes, special tokens and marks: each digit is a token.
VOCAB_SIZE = SMALLEST_VOCAB_SIZE + len(CHAT_MARKS)
# Of a document of the base.
PROBLEMS_A_TEXT = 20


@dataclass(frozen=True)
class Distilled:
    """What an arm is trained on, the report of its selection, and the share of its answers that are wrong."""

    store: TokenStore
    report: Mapping[str, Any]
    wrong: float

    @property
    def targets(self) -> int:
        """Tokens with a loss, of an epoch."""
        assert self.store.manifest.chat is not None
        return self.store.manifest.chat.targets


def folder_of(arm: str) -> str:
    """Its name in a path."""
    return arm.replace(" ", "_")


def make_stores(folder: Path, training: Sequence[Sum], *, samples: int) -> dict[str, Distilled]:
    """Ask the teacher for so many solutions a problem, verify or not, and tokenise; or find it done. By arm."""
    sums.write_problems(training, folder / "problems.jsonl")
    problems = math_problems(folder / "problems.jsonl")
    trusting = [replace(problem, accepts=lambda _: True) for problem in problems.problems]
    verified = _distil(folder / "verified", problems, samples)
    unverified = _distil(folder / "unverified", ProblemSet(trusting, problems.instruction, "none"), samples)
    _without_thoughts(folder / "verified" / MESSAGES, folder / "answers.jsonl")
    tokenizer = str(_base(folder, training))
    found = {}
    for arm, source, report in (
        (REASONING, folder / "verified" / MESSAGES, verified),
        (ANSWER_ONLY, folder / "answers.jsonl", verified),
        (UNVERIFIED, folder / "unverified" / MESSAGES, unverified),
    ):
        recipe = Recipe(str(source), tokenizer=tokenizer, heldout=0.0)
        store = prepare(recipe, folder / "stores" / folder_of(arm), form=ChatForm()).train
        found[arm] = Distilled(store, report, _share_wrong(source))
    return found


def _distil(folder: Path, problems: ProblemSet, samples: int) -> dict[str, Any]:
    """`launch/distill.py` with a teacher in this process; the report."""
    settings = Distillation(
        "sums", sums.TEACHER, size=len(problems.problems), samples=samples, instruction="", temperature=1.0, top_p=1.0
    )
    claim(folder, settings, problems)
    with AnswerLog(folder / SAMPLES) as log:
        for request in settings.requests(problems):
            if request.id not in log.ids:
                body = sums.answer_as_teacher(request.body)
                line = {"custom_id": request.id, "response": {"status_code": 200, "body": body}, "error": None}
                log.append(line | {"endpoint": sums.TEACHER, "time_unix_s": round(time.time(), 3), "seconds": 0.0})
    return select(folder, settings, problems)


def _without_thoughts(source: Path, out: Path) -> None:
    """The conversations of a file without their reasoning."""
    with source.open(encoding="utf-8") as lines, out.open("w", encoding="utf-8") as written:
        for line in lines:
            user, said = json.loads(line)["messages"]
            row = {"messages": [user, {"role": "assistant", "content": said["content"]}]}
            written.write(json.dumps(row) + "\n")


def _share_wrong(source: Path) -> float:
    """Of the conversations of a file, by Python's integers."""
    with source.open(encoding="utf-8") as lines:
        pairs = [json.loads(line)["messages"] for line in lines]
    return sum(Sum.of(user["content"]).total != int(said["content"]) for user, said in pairs) / len(pairs)


def _base(folder: Path, training: Sequence[Sum]) -> Path:
    """The store of problems without answers; its tokeniser."""
    texts = [problem.text for problem in training]
    with (folder / "questions.jsonl").open("w", encoding="utf-8") as written:
        for first in range(0, len(texts), PROBLEMS_A_TEXT):
            written.write(json.dumps({"text": " ".join(texts[first : first + PROBLEMS_A_TEXT])}) + "\n")
    recipe = Recipe(str(folder / "questions.jsonl"), vocab_size=VOCAB_SIZE, chat_marks=True, heldout=0.0)
    return prepare(recipe, folder / "stores" / BASE).train.path.parent / TOKENIZER_NAME
