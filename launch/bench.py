"""Print the table of kernels against their peers: `python launch/bench.py [--only NAME] [--csv PATH]`.

Parity is checked before anything is timed; the exit status is 1 when one check is red. A CUDA GPU is used
when present.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from kernels import bench_table


def main() -> int:
    """Measure, print, and say by the exit status whether every parity check is green."""
    benches = bench_table.entries()
    names = [bench.name for bench in benches]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME", choices=names, help="measure one entry; one of: " + ", ".join(names))
    parser.add_argument("--csv", metavar="PATH", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = [bench for bench in benches if arguments.only in (None, bench.name)]
    rows = bench_table.table(chosen, device)
    print(bench_table.render(rows, device))
    if arguments.csv is not None:
        bench_table.write_csv(rows, arguments.csv)
    red = [row.name for row in rows if not row.green]
    if red:
        print(f"parity is red, no speed reported: {', '.join(red)}", file=sys.stderr)
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
