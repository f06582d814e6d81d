"""`make demo`: V3's whole recipe on the text that ships with the repository, in BF16 and in FP8, compared.

Tokenises, trains `experiment=tiny` twice on the same tokens, seed and budget, and prints held-out bits per byte beside
n-gram models of the same tokeniser and xz. Arguments are Hydra overrides of both runs. An interrupted demo goes on
where it stopped; delete runs/demo to begin again.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from launch.threads import spin_default

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.update(spin_default(os.environ))
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

from rich.console import Console
from rich.table import Table

from train.assemble import build_alone
from train.config import compose
from train.data.ingest import Recipe, prepare
from train.observe.guards import TrainingStopped
from train.run_directory import locked, run_directory
from train.studies.compare import PAPER_GAP
from train.studies.dashboard.page import render
from train.studies.demo_summary import DemoSummary, summarise
from train.trainer import Trainer

TEXT, STORES = "data/king_james_bible/text.jsonl", Path("stores/demo")
COMMON = ["experiment=tiny", "run.directory=runs/demo"]


def train(precision: str, overrides: list[str], console: Console) -> Path:
    """One run from scratch or from where it stopped; returns its directory."""
    config = compose([*COMMON, f"precision={precision}", f"run.name={precision}", *overrides])
    with locked(run_directory(config.run)):
        trainer = Trainer(config, build_alone(config))
        trainer.resume()
        console.print(f"{precision}: {config.schedule.total_tokens:,} tokens on {trainer.mesh.device.type}")
        trainer.fit()
    if trainer.stop_agreed or not trainer.budget_is_spent():
        raise ValueError(f"stopped in the {precision} run at step {trainer.state.step}; the same command goes on")
    return trainer.directory


def show(result: DemoSummary, console: Console) -> None:
    """Print the scores of runs and baselines, best first, and the loss gap."""
    table = Table("held-out text", "bits per byte")
    for name, bits in sorted((result.scores | result.baselines).items(), key=lambda item: item[1]):
        table.add_row(f"[bold]{name}[/bold]" if name in result.scores else name, f"{bits:.3f}")
    console.print(table)
    console.print(f"FP8 against BF16: smoothed loss gap {result.gap:+.2%} (the report's bound: {PAPER_GAP:.2%})")


def main(overrides: list[str]) -> int:
    """Prepare, train twice, compare; returns the exit code."""
    console = Console(highlight=False)
    page = Path("runs/demo/loss_curves.html")
    try:
        stores = prepare(Recipe(source=TEXT, vocab_size=1024), STORES)
        runs = {precision: train(precision, overrides, console) for precision in ("bf16", "fp8")}
        result = summarise(runs, stores)
    except (ValueError, TrainingStopped) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    render(list(runs.values()), page, "BF16 and FP8 on the same tokens")
    show(result, console)
    console.print(f"loss curves: {page.resolve()}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
