"""Plan a run before any GPU is booked: `python launch/plan.py +cluster=h800_2048`.

Arguments are those of launch/pretrain.py. Memory of every pipeline rank, a simulated step, what a whole run costs, and
layouts of the same GPUs that would be faster: in words here, and in the run's folder as plan.json, plan.html (open it
in a browser) and plan_trace.json (for ui.perfetto.dev). Nothing is measured: every figure says where it comes from.
A training in that folder compares itself with plan.json after ten steps; then

    python launch/plan.py calibrate runs/NAME

keeps by how much this machine was slower than planned, `python launch/plan.py residuals` prints how far the planner is
from what others have published, and `python launch/plan.py split +cluster=h800_2048` layers of each stage by simulated
time, as an override. A wrong argument is one sentence and exit code 2.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path

from train.config import compose
from train.data.whole_file import write_whole
from train.observe.sinks import PLAN_FILE
from train.run_directory import run_directory
from train.studies.measured import REPORT
from train.studies.plan import judge
from train.studies.plan.document import Assumptions, Planner, plan, split_lines
from train.studies.plan.judged import calibrate, correction_for
from train.studies.plan.page import render
from train.studies.plan.products import MachineName, machine
from train.studies.plan.read_loads import read_loads
from train.studies.plan.trace import write_trace
from train.studies.plan.words import residuals, tables

# Bytes of a GPU, as its maker counts them.
GPUS: dict[MachineName, float] = {"H800": 80e9, "H100": 80e9}
V3 = "h800_2048"


def main(arguments: list[str]) -> int:
    """Plan or calibrate; returns the exit code."""
    try:
        if arguments[:1] == ["calibrate"]:
            return _calibrate(arguments[1:])
        if arguments == ["residuals"]:
            print("\n".join(residuals(judge.residuals(compose([f"+cluster={V3}"]).model))))
            return 0
        return _split(arguments[1:]) if arguments[:1] == ["split"] else _plan(arguments)
    except (ValueError, OSError) as error:
        print(f"plan: {error}", file=sys.stderr)
        return 2


def _calibrate(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="plan calibrate", description="Keep how far a run was from its plan.")
    parser.add_argument("run", type=Path, metavar="RUN", help="directory of a run that has compared itself")
    print(calibrate(parser.parse_args(arguments).run))
    return 0


def _split(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="plan split", description="Layers of each stage by simulated time.")
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="Hydra override, as of launch/pretrain.py")
    options = parser.parse_args(arguments)
    config, name = compose(options.overrides), _named_gpu(options.overrides)
    gpu = machine(name)
    planner = Planner(config, Assumptions(gpu, GPUS[name], gpu.tables.value("price"), config.model))
    print("\n".join(split_lines(planner)))
    return 0


def _named_gpu(overrides: list[str]) -> MachineName:
    return "H800" if any("cluster=h800" in text for text in overrides) else "H100"


def _plan(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="Hydra override, as of launch/pretrain.py")
    parser.add_argument(
        "--gpu", choices=list(GPUS), help="whose links and kernels (H800 if the cluster is named so, else H100)"
    )
    parser.add_argument("--dollars", type=float, help="of a GPU-hour (2, arXiv:2412.19437 §1)")
    parser.add_argument(
        "--report", type=Path, default=REPORT, help="speeds that `make gpu` measured, if there are any (%(default)s)"
    )
    parser.add_argument("--loads", type=Path, metavar="RUN", help="take experts to be as uneven as in a run (even)")
    parser.add_argument("--out", type=Path, help="folder to write (the run's own)")
    options = parser.parse_intermixed_args(arguments)
    config = compose(options.overrides)
    name: MachineName = options.gpu or _named_gpu(options.overrides)
    report = options.report if options.report.exists() else None
    # Published runs are of DeepSeek-V3, whatever is planned here.
    v3 = compose([f"+cluster={V3}"])
    known, gpu = correction_for(name, config.precision.name), machine(name, report=report)
    dollars = gpu.tables.value("price") if options.dollars is None else options.dollars
    loads = options.loads and read_loads(options.loads, experts=config.model.n_routed_experts)
    assumed = Assumptions(gpu, GPUS[name], dollars, v3.model, known, loads)
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    document = plan(config, assumed, date=today)
    print("\n".join([*document["words"], *tables(document)]))
    out = options.out or run_directory(config.run)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / PLAN_FILE, json.dumps(document))
    render(document, out / "plan.html")
    write_trace(document, out / "plan_trace.json")
    print(f"\n{out / 'plan.html'}: open it in a browser; {out / PLAN_FILE}: a training there is held to it")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
