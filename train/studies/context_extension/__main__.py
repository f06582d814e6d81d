"""Context extension on small models: `python -m train.studies.context_extension [--smoke] [--out FOLDER]`.

Trains three seeds of a small V3 at 128 tokens and extends each to 512 and 2,048 with YaRN and without; writes
result.json, tables.md and a picture. The same command goes on where it was stopped. One core, CPU only.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from train.studies.context_extension.needles import Source
from train.studies.context_extension.pages import tables, write
from train.studies.context_extension.runs import SMOKE, StudySize, study


def main(arguments: list[str]) -> int:
    """Parse, train, measure, write; returns the exit code."""
    parser = argparse.ArgumentParser(prog="context_extension", description="Context extension on small models.")
    parser.add_argument("--smoke", action="store_true", help="a few steps of one seed: does it run?")
    parser.add_argument("--text", type=Path, default=Path("data/king_james_bible/text.jsonl"), help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/context_extension"), help="folder (%(default)s)")
    options = parser.parse_args(arguments)
    # One thread: the same figures on any machine of a kind.
    torch.set_num_threads(1)
    try:
        result = study(Source.of(options.text), options.out, SMOKE if options.smoke else StudySize())
        paths = write(result, options.out)
    except (ValueError, OSError) as error:
        print(f"context_extension: {error}", file=sys.stderr)
        return 2
    print(f"\n{tables(result)}\n{', '.join(map(str, paths))}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
