"""Ablations of the FP8 recipe: `python launch/ablate.py [--variants NAME ...] [--quick | --gate] [OVERRIDE ...]`.

Measures one-step errors, trains short runs over three seeds on the text that ships with the repository, and writes
result.json, tables.md and three pictures (HTML) into --out. Finished runs in that folder are read, not repeated, and
refused if they were begun with other settings. Other arguments are Hydra overrides of every run. CPU only.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from launch.threads import spin_default

os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.update(spin_default(os.environ))

from train.data.ingest import Recipe, prepare
from train.studies.ablation.runs import GATE, GATE_ROWS, QUICK, Size, ablate, choose, variants
from train.studies.ablation.tables import tables, write

TEXT = "data/king_james_bible/text.jsonl"


def main(arguments: list[str]) -> int:
    """Parse, tokenise, measure, write; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="ablate", description="Ablations of the FP8 recipe: one-step errors and short runs."
    )
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="Hydra override of every run")
    parser.add_argument("--variants", default="", metavar="A,B", help=f"some of {','.join(variants())} (default: all)")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--quick", action="store_true", help="four steps, two seeds, short products: does it run?")
    sizes.add_argument(
        "--gate", action="store_true", help="FP8 and planted defects on all of `tiny`, five seeds, with intervals"
    )
    parser.add_argument("--text", default=TEXT, help="what to train on (%(default)s)")
    parser.add_argument("--stores", type=Path, default=Path("stores/demo"), help="its tokens (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), help="folder to write (%(default)s)")
    options = parser.parse_args(arguments)
    names = [name for name in options.variants.split(",") if name] or (GATE_ROWS if options.gate else [])
    try:
        choose(names)
        stores = prepare(Recipe(source=options.text, vocab_size=1024), options.stores)
        size = QUICK if options.quick else GATE if options.gate else Size()
        result = ablate(stores.train.path, options.out, size, names=names, overrides=options.overrides)
        paths = write(result, options.out)
    except (ValueError, OSError) as error:
        print(f"ablate: {error}", file=sys.stderr)
        return 2
    print(f"\n{tables(result)}\n{', '.join(map(str, paths))}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
