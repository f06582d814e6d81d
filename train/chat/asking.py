"""Asking as a user sees it: a bar on a terminal, elsewhere a line every `LINE_EVERY_S`, and a table at the end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from train.chat.answer_log import AnswerLog
from train.chat.endpoint import Asked, Endpoint, Request, ask_all, printable

LINE_EVERY_S = 10.0


def ask_into(
    path: Path, endpoint: Endpoint, requests: Iterable[Request], *, total: int | None, console: Console | None = None
) -> Asked:
    """Ask what the file `path` does not answer yet, and show how it goes; the file keeps each answer at once.

    Raises:
        ValueError: the package openai is missing, the file is another one's, or two requests have one id.
    """
    console = console or Console(stderr=True, highlight=False)
    with AnswerLog(path) as log, ExitStack() as stack:
        show = _Bar(console, path.name, total, stack) if console.is_terminal else _Lines(console, path.name, total)
        asked = asyncio.run(ask_all(endpoint, requests, log, show))
    table = Table("requests", "number")
    table.columns[1].justify = "right"
    for name, number in asked.rows():
        # A server's words are in it: no markup.
        table.add_row(Text(printable(name)), f"{number:,}")
    console.print(str(path), markup=False, soft_wrap=True)
    console.print(table)
    if asked.stopped:
        console.print(f"the rest was not asked: {printable(asked.stopped)}", markup=False, soft_wrap=True)
    return asked


class _Bar:
    def __init__(self, console: Console, name: str, total: int | None, stack: ExitStack) -> None:
        columns = (TextColumn("[bold]{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn())
        status = TextColumn("{task.fields[status]}")
        self._bar = stack.enter_context(Progress(*columns, status, TimeRemainingColumn(), console=console, expand=True))
        self._task = self._bar.add_task(name, total=total, status="")

    def __call__(self, asked: Asked) -> None:
        self._bar.update(self._task, completed=asked.done, status=_status(asked))


class _Lines:
    def __init__(self, console: Console, name: str, total: int | None) -> None:
        self._console, self._name, self._of = console, name, f" of {total}" if total else ""
        self._said_s = time.monotonic()

    def __call__(self, asked: Asked) -> None:
        if time.monotonic() - self._said_s >= LINE_EVERY_S:
            self._said_s = time.monotonic()
            self._console.print(f"{self._name}  {asked.done}{self._of}  {_status(asked)}", markup=False, soft_wrap=True)


def _status(asked: Asked) -> str:
    retries = asked.sent - asked.answered - asked.refused.total() - asked.failed.total()
    words = {"refused": asked.refused.total(), "failed": asked.failed.total(), "in flight or retried": retries}
    return "  ".join(f"{number} {word}" for word, number in words.items() if number)
