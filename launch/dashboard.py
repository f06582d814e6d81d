"""Draw runs into one offline HTML page: `python launch/dashboard.py runs/a runs/b --out compare.html`.

Two runs are also compared by the relative gap of their smoothed losses. A directory that holds no run, or a
bad argument, is one sentence and exit code 2.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from train.observe.dashboard import render


def main(arguments: list[str]) -> int:
    """Parse and render; returns the exit code."""
    parser = argparse.ArgumentParser(prog="dashboard", description="Draw runs into one offline HTML page.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory, such as runs/tiny_bf16")
    parser.add_argument("--out", type=Path, default=Path("runs/dashboard.html"), help="page to write (%(default)s)")
    parser.add_argument("--title", default="Training runs", help="heading of the page (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        render(options.runs, options.out, options.title)
    except (ValueError, OSError) as error:
        print(f"dashboard: {error}", file=sys.stderr)
        return 2
    count = len(options.runs)
    size_mb = options.out.stat().st_size / 1e6
    print(f"{options.out} ({count} run{'s' if count > 1 else ''}, {size_mb:.1f} MB): open it in a browser")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
