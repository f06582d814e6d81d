"""`make gpu`: every GPU test, short training runs, then the benches, in one report within eight minutes.

    python -m launch.gpu               runs/gpu/report.json and runs/gpu/report.md; exit status 1 if any parity is red
    python -m launch.gpu --document    put that report's speeds into docs/kernels.md, if all parity is green

Needs a CUDA GPU, torch, Triton, PyYAML and numpy; what is missing besides is named in the report. Each part runs in a
process of its own (`train/studies/gpu_report.py`), started here with `--part`; Triton compiles there, whatever the
environment says.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import get_args

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch

from kernels.config import Backend
from train.studies import measured
from train.studies.gpu_report import is_green, run_all, run_part, write
from train.studies.gpu_sections import PARTS, ROOT, Options

# All parts together; the rest of the eight minutes is for starting and writing.
BUDGET_S = 460.0


def parse() -> argparse.Namespace:
    """The command line; what is not in the help serves the parts' processes and the tests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/gpu", help="folder of the report (runs/gpu)")
    parser.add_argument("--budget", type=float, default=BUDGET_S, metavar="SECONDS", help="of all parts together")
    parser.add_argument("--document", action="store_true", help="write the report's speeds into docs/kernels.md")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--kernels", choices=get_args(Backend), default="gluon", help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, default=time.monotonic(), help=argparse.SUPPRESS)
    parser.add_argument("--part", choices=tuple(PARTS), help=argparse.SUPPRESS)
    return parser.parse_args()


def document(path: Path) -> int:
    """Put a report's speeds into docs/kernels.md; 2 where there is none, or none that may be shown."""
    try:
        if (report := measured.read_report(path)) is None:
            raise ValueError(f"there is no {path}: run `make gpu` on a machine with a GPU first")
        measured.document(report, ROOT / "docs/kernels.md")
    except ValueError as error:
        print(f"gpu: {error}", file=sys.stderr)
        return 2
    return 0


def main() -> int:
    """Run one part, or all of them and write the report."""
    arguments = parse()
    if arguments.document:
        return document(arguments.out / "report.json")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("gpu: this machine shows no CUDA GPU; `make test` runs what a CPU can check", file=sys.stderr)
        return 2
    options = Options(torch.device(arguments.device), tiny=arguments.tiny, backend=arguments.kernels)
    if arguments.part:
        # Imports are of its time.
        run_part(arguments.part, options, arguments.budget - (time.monotonic() - arguments.began), arguments.out)
        return 0

    def command(part: str, seconds: float, out: Path, backend: Backend) -> list[str]:
        line = [sys.executable, "-m", "launch.gpu", "--part", part, "--budget", str(seconds), "--out", str(out)]
        line += ["--began", str(time.monotonic())]
        return [*line, "--kernels", backend, "--device", arguments.device, *(["--tiny"] if arguments.tiny else [])]

    # The tests' own default is Triton's interpreter.
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    directory = arguments.out.resolve()
    finished = run_all(command, directory, environment=environment, total_s=arguments.budget)
    page = write(finished, options.device, directory)
    print(f"gpu: {'green' if is_green(finished) else 'RED'}, {page}")
    return 0 if is_green(finished) else 1


if __name__ == "__main__":
    sys.exit(main())
