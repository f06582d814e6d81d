"""`make demo`: V3's whole recipe on the text that ships with the repository, in BF16 and in FP8, compared.

Tokenises, trains `experiment=tiny` twice on the same tokens, seed and budget, and prints held-out bits per byte beside
n-gram models of the same tokeniser and xz. Arguments are Hydra overrides of both runs. An interrupted demo goes on
where it stopped; delete runs/demo to begin anew.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

from rich.console import Console
from rich.table import Table

from train.build import build
from train.config import compose
from train.data.ingest import Prepared, Recipe, prepare
from train.evaluate.baselines import measure_baselines
from train.observe.compare import PAPER_GAP, mean_smoothed_gap
from train.observe.dashboard import render
from train.observe.run_card import SUMMARY_FILE
from train.observe.sinks import read_run
from train.trainer import Trainer

TEXT, STORES = "data/king_james_bible/text.jsonl", Path("stores/demo")
COMMON = ["experiment=tiny", "run.directory=runs/demo"]


def train(precision: str, overrides: list[str], console: Console) -> Path:
    """One run from scratch or from where it stopped; returns its directory."""
    config = compose([*COMMON, f"precision={precision}", f"run.name={precision}", *overrides])
    trainer = Trainer(config, build(config))
    trainer.resume()
    console.print(f"{precision}: {config.schedule.total_tokens:,} tokens on {trainer.parts.device.type}")
    trainer.fit()
    return trainer.directory


def summarise(runs: dict[str, Path], stores: Prepared, console: Console) -> None:
    """Print and keep the held-out scores beside the baselines, and the gap."""
    assert stores.heldout is not None, "the recipe keeps a tenth of the documents out"
    baselines = measure_baselines(stores.train, stores.heldout)
    others = {"bigram (interpolated Kneser-Ney)": baselines.bigram, "unigram": baselines.unigram, "xz": baselines.xz}
    records = {name: read_run(run) for name, run in runs.items()}
    scores = {name: run[-1]["eval/bits_per_byte"] for name, run in records.items()}
    for name, run in runs.items():
        summary = {"heldout_bits_per_byte": scores[name], "baselines_bits_per_byte": others}
        (run / SUMMARY_FILE).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    table = Table("held-out text", "bits per byte")
    for name, bits in sorted((scores | others).items(), key=lambda item: item[1]):
        table.add_row(f"[bold]{name}[/bold]" if name in scores else name, f"{bits:.3f}")
    console.print(table)
    gap = mean_smoothed_gap(records["fp8"], records["bf16"])
    console.print(f"FP8 against BF16: smoothed loss gap {gap:+.2%} (the report's bound: {PAPER_GAP:.2%})")


def main(overrides: list[str]) -> int:
    """Prepare, train twice, compare; returns the exit code."""
    console = Console(highlight=False)
    try:
        stores = prepare(Recipe(source=TEXT, vocab_size=1024), STORES)
        runs = {precision: train(precision, overrides, console) for precision in ("bf16", "fp8")}
    except ValueError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    summarise(runs, stores, console)
    render(list(runs.values()), page := runs["bf16"].parent / "loss_curves.html", "BF16 and FP8 on the same tokens")
    console.print(f"loss curves: {page.resolve()}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
