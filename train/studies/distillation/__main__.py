"""Distillation on a small model: `python -m train.studies.distillation [--smoke] [--out FOLDER]`.

Trains three seeds of a small V3 on a scripted teacher's working, on its answers alone, and on solutions that nobody
verified; writes result.json and tables.md. The same command goes on where it was stopped. One core, CPU only.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import datasets
import torch

from train.studies.distillation.pages import tables, write
from train.studies.distillation.runs import SMOKE, DistillationSize, study


def main(arguments: list[str]) -> int:
    """Parse, train, measure, write; returns the exit code."""
    parser = argparse.ArgumentParser(prog="distillation", description="Distillation on a small model.")
    parser.add_argument("--smoke", action="store_true", help="two steps of one seed: does it run?")
    parser.add_argument("--out", type=Path, default=Path("runs/distillation"), help="folder (%(default)s)")
    options = parser.parse_args(arguments)
    # One thread: the same figures on any machine of a kind.
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    try:
        result = study(options.out, SMOKE if options.smoke else DistillationSize())
        paths = write(result, options.out)
    except (ValueError, OSError) as error:
        print(f"distillation: {error}", file=sys.stderr)
        return 2
    print(f"\n{tables(result)}\n{', '.join(map(str, paths))}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
