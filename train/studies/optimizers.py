"""Muon against AdamW on `tiny`, equal tokens: `python -m train.studies.optimizers [--smoke] [OVERRIDE ...]`.

    tuned    each optimizer on one seed with the peak learning rates of GRID; while the best one is an end of what was
             tried, its neighbour at twice or half of it is tried too
    scored   other seeds with the best one: bits per byte of the held-out text

Runs of one seed see the same tokens and begin with the same weights, so the difference is taken in pairs. All else is
`experiment=tiny` in BF16, its schedule in shares of the peak; the batch is the same from the first step. Writes
result.json and tables.md into --out. Finished runs in that folder are read, not repeated; a killed one begins again.
Other arguments are Hydra overrides of every run. One core, CPU only.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from train.config import PretrainConfig
from train.data.ingest import Prepared, Recipe, prepare
from train.data.store import strict_json
from train.studies.ablation.runs import Size, base_config, interval, train_or_read
from train.studies.recorded import head, write_files

OPTIMIZERS = ("adamw", "muon")
# The demo's peak in the middle.
GRID = (1e-3, 2e-3, 4e-3)
GRID_SEED = 0
# A third of the demo's tokens in steps of its full batch.
WHOLE = Size(steps=100, sequences=4, tokens=256, seeds=(1, 2, 3), whole_model=True)
SMOKE = replace(WHOLE, steps=2, sequences=2, tokens=64, seeds=(1, 2))
# Of the peak, after the decay and at the end: 2.2e-5 and 7.3e-6 over 2.2e-4 in arXiv:2412.19437 §4.2.
LATE_SHARES = {"lr_after_decay": 2.2e-5 / 2.2e-4, "lr_final": 7.3e-6 / 2.2e-4}

# Optimizer, peak learning rate, seed -> bits per byte of the held-out text.
Score = Callable[[str, float, int], float]


def configuration(
    stores: Prepared, out: Path, size: Size, overrides: Sequence[str], *, optimizer: str, lr: float, seed: int
) -> PretrainConfig:
    """Of one run."""
    assert stores.heldout is not None, "the recipe keeps a tenth of the documents out"
    late = [f"schedule.{name}={share * lr}" for name, share in LATE_SHARES.items()]
    own = [f"optim={optimizer}", f"data.heldout={stores.heldout.path}", f"schedule.lr_peak={lr}", *late]
    base = base_config(stores.train.path, out, size, [*own, *overrides])
    return replace(base, run=replace(base.run, name=f"{optimizer}-{lr:g}-{seed}", seed=seed))


def heldout_bits(config: PretrainConfig) -> float:
    """Bits per byte of a run, trained or read; infinite where it diverged."""
    found = train_or_read(config)
    scores = [record["eval/bits_per_byte"] for record in found["records"] if "eval/bits_per_byte" in record]
    return float(scores[-1]) if found["stopped"] is None else math.inf


def tune(score: Callable[[float], float]) -> dict[float, float]:
    """Peak learning rate -> score on the grid, and beyond it until the best one has neighbours; ascending."""
    scores = {lr: score(lr) for lr in GRID}
    while (best := min(scores, key=scores.__getitem__)) in (min(scores), max(scores)):
        neighbour = best / 2 if best == min(scores) else best * 2
        scores[neighbour] = score(neighbour)
    return dict(sorted(scores.items()))


def study(score: Score, seeds: Sequence[int]) -> dict[str, Any]:
    """Tune and score both.

    Returns:
        optimizer -> grid: peak learning rate -> bits per byte; best: its peak; bits_per_byte: by seed. differences:
        Muon's less AdamW's, by seed.
    """
    result: dict[str, Any] = {}
    for name in OPTIMIZERS:
        grid = tune(lambda lr, name=name: score(name, lr, GRID_SEED))  # type: ignore[misc]
        best = min(grid, key=grid.__getitem__)
        result[name] = {"grid": grid, "best": best, "bits_per_byte": [score(name, best, seed) for seed in seeds]}
    adamw, muon = (result[name]["bits_per_byte"] for name in OPTIMIZERS)
    return result | {"differences": [b - a for a, b in zip(adamw, muon, strict=True)]}


def tables(result: Mapping[str, Any]) -> str:
    """What was tuned and what was scored, as Markdown."""
    peaks = sorted({lr for name in OPTIMIZERS for lr in result[name]["grid"]})
    lines = head(f"seed {GRID_SEED}, peak of", *(f"{lr:g}" for lr in peaks))
    for name in OPTIMIZERS:
        grid = result[name]["grid"]
        lines.append(f"| {name} | " + " | ".join(f"{grid[lr]:.4f}" if lr in grid else "" for lr in peaks) + " |")
    lines += ["", *head("", "peak", *(f"seed {seed}" for seed in result["size"]["seeds"]), "mean (range)")]
    for name in OPTIMIZERS:
        lines.append(_row(name, f"{result[name]['best']:g}", result[name]["bits_per_byte"]))
    differences = result["differences"]
    lines.append(_row("muon - adamw", "", differences))
    low, high = interval(differences)
    lines += ["", f"95 % interval of the mean difference: {low:+.4f} to {high:+.4f} (Student's t)"]
    return "\n".join(lines) + "\n"


def _row(name: str, peak: str, values: Sequence[float]) -> str:
    cells = [f"{value:.4f}" for value in values]
    mean = f"**{statistics.fmean(values):.4f}** ({min(values):.4f} to {max(values):.4f})"
    return f"| {name} | {peak} | {' | '.join(cells)} | {mean} |"


def main(arguments: list[str]) -> int:
    """Parse, tokenise, train, write; returns the exit code."""
    parser = argparse.ArgumentParser(prog="optimizers", description="Muon against AdamW at equal tokens.")
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="Hydra override of every run")
    parser.add_argument("--smoke", action="store_true", help="a few steps of each run: does it run?")
    parser.add_argument("--text", default="data/king_james_bible/text.jsonl", help="what to train on (%(default)s)")
    parser.add_argument("--stores", type=Path, default=Path("stores/demo"), help="its tokens (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/optimizers"), help="folder to write (%(default)s)")
    options = parser.parse_args(arguments)
    size = SMOKE if options.smoke else WHOLE

    def score(optimizer: str, lr: float, seed: int) -> float:
        config = configuration(stores, options.out, size, options.overrides, optimizer=optimizer, lr=lr, seed=seed)
        bits = heldout_bits(config)
        print(f"{config.run.name}: {bits:.4f} bits per byte", flush=True)
        return bits

    try:
        stores = prepare(Recipe(source=options.text, vocab_size=1024), options.stores)
        found = study(score, size.seeds)
        result = found | {"size": asdict(size), "overrides": options.overrides, "torch": torch.__version__}
        texts = {"result.json": strict_json(result), "tables.md": tables(result)}
        write_files(options.out, texts)
    except (ValueError, OSError) as error:
        print(f"optimizers: {error}", file=sys.stderr)
        return 2
    print(f"\n{texts['tables.md']}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
