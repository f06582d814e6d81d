"""The console of a run that trains: a progress bar on a terminal, elsewhere a line every few steps.

    tiny_fp8  ━━━━━━━━━━━━╸━━━━━━━━━━  42 %  loss 3.214  mtp 3.876  MaxVio 0.31  12.3k tok/s  ETA 1:42

ETA = tokens still to come over the tokens per second of this process so far. Quiet by intent: what asks for attention
is announced (`train/observe/sentences.py`), checkpoints are not. A reader that goes away, as of `| head`, ends the
console and not the run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from train.observe.metrics import Record
from train.observe.sentences import announcement, short

# Redraws per second at most: steps of a tiny model are faster than an eye or a slow ssh link.
_MAX_REDRAWS_PER_S = 8.0
_STATUS = {"loss/main": "loss {:.3f}", "loss/mtp": "mtp {:.3f}", "moe/max_violation_ratio": "MaxVio {:.2f}"}


class ConsoleSink:
    """A bar if `progress` and the console is a terminal, else a line every `every_steps`; no ETA without a total."""

    def __init__(
        self, *, progress: bool, every_steps: int, total_tokens: int | None, name: str, console: Console | None = None
    ) -> None:
        self._console = console or Console(highlight=False)
        self._every_steps, self._total_tokens, self._name = every_steps, total_tokens, name
        self._first: Record | None = None
        self._pending: Record | None = None
        self._last_drawn_unix_s = 0.0
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if progress and self._console.is_terminal:
            self._start_bar()

    def write(self, record: Record) -> None:
        """Show one step record, if it is due."""
        self._first = self._first or record
        self._pending = record
        due = record["step"] % self._every_steps == 0
        if self._bar:
            due = record["time_unix_s"] - self._last_drawn_unix_s >= 1.0 / _MAX_REDRAWS_PER_S
        if due:
            self._draw()

    def event(self, event: Record) -> None:
        """Announce what asks for attention."""
        if (sentence := announcement(event)) is not None:
            self.say([sentence])

    def say(self, sentences: list[str]) -> None:
        """Print sentences, each on a line with the run's name."""
        if not self._bar:
            self._draw()
        with self._kept_running():
            for sentence in sentences:
                self._console.print(f"{self._name}  {sentence}", markup=False, soft_wrap=True)

    def close(self) -> None:
        """Draw the last record and give the terminal back."""
        self._draw()
        if self._bar:
            with self._kept_running():
                self._bar.stop()
            self._bar = None

    @contextmanager
    def _kept_running(self) -> Iterator[None]:
        """Go quiet where the output cannot be written."""
        try:
            yield
        # rich exits for a reader that has gone.
        except (OSError, SystemExit):
            self._console.quiet = True
            # What is still buffered would be an error at the end of the interpreter.
            with suppress(OSError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self._console.file.fileno())

    def _start_bar(self) -> None:
        self._bar = Progress(
            TextColumn("[bold]{task.description}", markup=True),
            BarColumn(bar_width=None),
            TextColumn("[dim]{task.percentage:>3.0f} %" if self._total_tokens else "[dim]{task.completed:,} tokens"),
            TextColumn("{task.fields[status]}"),
            console=self._console,
            auto_refresh=False,
            expand=True,
        )
        self._task = self._bar.add_task(self._name, total=self._total_tokens, status="")
        with self._kept_running():
            self._bar.start()
        if self._console.quiet:
            # It has not started, so it cannot be stopped.
            self._bar = None

    def _draw(self) -> None:
        record, self._pending = self._pending, None
        if record is None:
            return
        if self._bar:
            self._last_drawn_unix_s = record["time_unix_s"]
            self._bar.update(self._task, completed=record["tokens_seen"], status=self._status(record))
            with self._kept_running():
                self._bar.refresh()
        else:
            line = f"{self._name}  step {record['step']:>5}  {self._status(record)}"
            with self._kept_running():
                self._console.print(line, markup=False, soft_wrap=True)

    def _status(self, record: Record) -> str:
        parts = [text.format(record[name]) for name, text in _STATUS.items() if name in record]
        if "speed/tokens_per_s" in record:
            parts.append(f"{short(record['speed/tokens_per_s'])} tok/s")
        if (eta_s := self._eta_s(record)) is not None:
            parts.append(f"ETA {_clock(eta_s)}")
        return "  ".join(parts)

    def _eta_s(self, record: Record) -> float | None:
        if self._total_tokens is None or self._first is None:
            return None
        tokens = record["tokens_seen"] - self._first["tokens_seen"]
        seconds = record["time_unix_s"] - self._first["time_unix_s"]
        remaining = max(self._total_tokens - record["tokens_seen"], 0)
        return remaining * seconds / tokens if tokens > 0 and seconds > 0 else None


def _clock(seconds: float) -> str:
    """3725 -> '1:02:05'."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
