"""The console of a run that trains: a progress bar on a terminal, elsewhere a line every few steps.

    tiny_fp8  ━━━━━━━━━━━━╸━━━━━━━━━━  42 %  loss 3.214  mtp 3.876  MaxVio 0.31  12.3k tok/s  ETA 1:42

ETA = tokens still to come over the tokens per second of this process so far. Quiet by intent: a resume, a skipped
step, dead experts, a slow rank, a replay that differs and the end of the run are announced, checkpoints are not. A run
that has become far slower than it was says once what may help.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from train.observe.metrics import Record

# Redraws per second at most: steps of a tiny model are faster than an eye or a slow ssh link.
_MAX_REDRAWS_PER_S = 8.0
# Dead experts that are named; metrics.jsonl names all.
_NAMED = 4

# A run has become slow when its speed was below this share of its best for so long, and for so many steps: one step may
# take long by itself (a paused process, a sampled step).
_SLOW_SHARE, _SLOW_S, _SLOW_STEPS = 0.25, 20.0, 5

_STATUS = {"loss/main": "loss {:.3f}", "loss/mtp": "mtp {:.3f}", "moe/max_violation_ratio": "MaxVio {:.2f}"}

_ANNOUNCED = {
    "resume": "resumed at step {step}",
    "skip": "step {step} skipped: loss or gradient not finite{where}",
    "spike": "step {step} skipped: loss {loss:.3f} is out of the band ({loss_z:.1f} deviations)",
    "rollback": "back from step {left_at_step} to step {step}; the data around the spikes is left out",
    "quarantine": "after step {step}: samples left out: {windows[0][error]}",
    "dead_experts": "step {step}: no token for {steps} steps: {names}",
    "straggler": "step {step}: rank {rank} (pipeline rank {pipeline_rank}, data rank {data_rank}) is slow: it works "
    "{busy_ms:.0f} ms a step for what takes {usual_ms:.0f} ms, {steps} steps in a row (longest phase: {phase})",
    "stop": "stopped after step {step}",
    "save_failed": "step {step}: {error}",
    "evaluation": "step {step}: held-out {eval/bits_per_byte:.4f} bits per byte",
    "replay_differs": "step {step} repeated after the resume does not give the logged numbers",
}


class ConsoleSink:
    """A bar if `progress` and the console is a terminal, else a line every `every_steps`; no ETA without a total."""

    def __init__(
        self,
        *,
        progress: bool,
        every_steps: int,
        total_tokens: int | None,
        name: str,
        console: Console | None = None,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or Console(highlight=False)
        self._every_steps, self._total_tokens, self._name = every_steps, total_tokens, name
        self._first: Record | None = None
        self._pending: Record | None = None
        self._last_drawn_unix_s = 0.0
        self._clock_s, self._best_tokens_per_s = clock_s, 0.0
        # When the slow steps in a row began and how many they are; None once that was said.
        self._slow: tuple[float, int] | None = (0.0, 0)
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
        if "speed/tokens_per_s" in record and self._slow is not None:
            self._watch_speed(record["step"], record["speed/tokens_per_s"], *self._slow)

    def event(self, event: Record) -> None:
        """Announce what asks for attention."""
        if event["event"] in _ANNOUNCED:
            names = ", ".join(f"layer {layer} expert {expert}" for layer, expert in event.get("experts", ())[:_NAMED])
            if len(event.get("experts", ())) > _NAMED:
                names += f" and {len(event['experts']) - _NAMED} more"
            first = next(iter(event.get("nonfinite", ())), None)
            who = "" if first is None or first["rank"] is None else f"rank {first['rank']}, "
            where = f": {who}{first['tensor']}" if first else ""
            self._print(_ANNOUNCED[event["event"]].format(**event | {"names": names, "where": where}))

    def close(self) -> None:
        """Draw the last record and give the terminal back."""
        self._draw()
        if self._bar:
            self._bar.stop()
            self._bar = None

    def _watch_speed(self, step: int, tokens_per_s: float, since_s: float, steps: int) -> None:
        self._best_tokens_per_s = max(self._best_tokens_per_s, tokens_per_s)
        now_s = self._clock_s()
        if tokens_per_s >= _SLOW_SHARE * self._best_tokens_per_s:
            self._slow = (now_s, 0)
            return
        self._slow = (since_s, steps + 1)
        if now_s - since_s >= _SLOW_S and steps + 1 >= _SLOW_STEPS:
            self._slow = None
            self._print(
                f"step {step}: {_short(tokens_per_s)} tok/s, where it was {_short(self._best_tokens_per_s)}. Is this "
                "machine busy with other work? On a CPU it helps to stop that, or to start again with "
                "OMP_WAIT_POLICY=passive in the environment or with fewer threads (run.threads)"
            )

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
        self._bar.start()

    def _draw(self) -> None:
        record, self._pending = self._pending, None
        if record is None:
            return
        if self._bar:
            self._last_drawn_unix_s = record["time_unix_s"]
            self._bar.update(self._task, completed=record["tokens_seen"], status=self._status(record))
            self._bar.refresh()
        else:
            line = f"{self._name}  step {record['step']:>5}  {self._status(record)}"
            self._console.print(line, markup=False, soft_wrap=True)

    def _print(self, sentence: str) -> None:
        if not self._bar:
            self._draw()
        self._console.print(f"{self._name}  {sentence}", markup=False, soft_wrap=True)

    def _status(self, record: Record) -> str:
        parts = [text.format(record[name]) for name, text in _STATUS.items() if name in record]
        if "speed/tokens_per_s" in record:
            parts.append(f"{_short(record['speed/tokens_per_s'])} tok/s")
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


def _short(value: float) -> str:
    """12345.6 -> '12.3k'."""
    for scale, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.1f}{letter}"
    return f"{value:.0f}"


def _clock(seconds: float) -> str:
    """3725 -> '1:02:05'."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
