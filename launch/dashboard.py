"""Draw runs into one offline HTML page, or follow running jobs in a browser on this machine.

    python launch/dashboard.py runs/a runs/b --out compare.html
    python launch/dashboard.py --serve runs             every run below it; new ones appear

Two runs are also compared by the relative gap of their smoothed losses. A directory that holds no run, a port that is
taken, or a bad argument, is one sentence and exit code 2.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from train.studies.dashboard.page import render
from train.studies.dashboard.server import DEFAULT_PORT, Server


def serve(options: argparse.Namespace) -> None:
    """Serve until Ctrl-C."""
    try:
        with Server(options.runs, port=options.port, title=options.title) as server:
            print(f"dashboard: {server.url} follows {', '.join(map(str, options.runs))}; Ctrl-C ends it", flush=True)
            server.wait()
    except KeyboardInterrupt:
        # However early it came: the line above invites it.
        print("dashboard: ended")


def main(arguments: list[str]) -> int:
    """Parse, then render or serve; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="dashboard", description="Draw runs into one offline HTML page, or serve them."
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory, or a folder of runs")
    parser.add_argument("--out", type=Path, default=Path("runs/dashboard.html"), help="page to write (%(default)s)")
    parser.add_argument("--title", default="Training runs", help="heading of the page (%(default)s)")
    parser.add_argument("--serve", action="store_true", help="follow the runs on 127.0.0.1 instead of writing a page")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="of --serve; 0 takes a free one (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        if options.serve:
            serve(options)
            return 0
        render(options.runs, options.out, options.title)
    except (ValueError, OSError, OverflowError) as error:
        print(f"dashboard: {error}", file=sys.stderr)
        return 2
    print(f"{options.out} ({options.out.stat().st_size / 1e6:.1f} MB): open it in a browser")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
