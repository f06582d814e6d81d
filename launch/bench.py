"""The benches: `python -m launch.bench [--only NAME] [--csv PATH]`, `... bench layer [--tiny]`, or `... bench ledger`.

Without a subcommand: the table of kernels against their peers, on a CUDA GPU when there is one. `layer`: MoE blocks of
DeepSeek-V3 at full width, forward and backward, which needs a CUDA GPU (`--tiny`: a tiny one on whatever there is).
`ledger`: what such a block, or a dense one, launches, reads, writes and keeps, counted without a GPU.
Parity is checked before anything is timed; the exit status is 1 when a check is red, 2 when there is no such case.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from functools import partial
from pathlib import Path

import torch

from kernels.backend import use_backend
from train.backend import check_kernels, use_for_command
from train.studies.bench import rows as bench_rows
from train.studies.bench import table as bench_table


def kernels(arguments: argparse.Namespace, device: torch.device) -> int:
    """Measure and print; 1 where a parity check is red."""
    try:
        chosen = bench_rows.chosen(arguments.only)
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    rows = bench_table.run(chosen, device, clock=bench_rows.clock_of(device))
    print(bench_table.render(rows, device))
    if arguments.csv is not None:
        bench_table.write_csv(rows, arguments.csv)
    red = [row.case for row in bench_table.red(rows)]
    if red:
        print(f"parity is red, no speed reported: {', '.join(red)}", file=sys.stderr)
    return 1 if red else 0


def layer(arguments: argparse.Namespace, device: torch.device) -> int:
    """Bench MoE blocks; 2 without a GPU."""
    from train.studies import smoke_runs
    from train.studies.bench import layer as bench_layer

    if device.type == "cpu" and not arguments.tiny:
        print("bench layer: needs a CUDA GPU, and this machine shows none; --tiny runs a tiny one", file=sys.stderr)
        return 2
    # Outputs are not filled before they are written, as in training.
    smoke_runs.prepare(deterministic=False)
    sizes = bench_layer.tiny_sizes() if arguments.tiny else bench_layer.v3_sizes()
    fp8 = smoke_runs.precision_config("fp8")
    use_for_command(arguments.kernels, sizes.model, fp8, tokens=sizes.tokens, device=device, trains=True)
    result = bench_layer.run(sizes, device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"torch {torch.__version__}, {where}\n\n{bench_layer.markdown(result)}")
    return 0 if result.green else 1


def ledger(arguments: argparse.Namespace) -> int:
    """Print the ledgers that are asked for; 2 without Triton."""
    if importlib.util.find_spec("triton") is None:
        print("bench ledger: needs Triton, whose kernels it counts; there is one for Linux only", file=sys.stderr)
        return 2
    from train.studies.bench import ledger as bench_ledger

    if arguments.cluster is None:
        layers = bench_ledger.LAYERS if arguments.layer is None else (arguments.layer,)
        precisions = bench_ledger.PRECISIONS if arguments.precision is None else (arguments.precision,)
        calls = [partial(bench_ledger.ledger, layer, precision) for layer in layers for precision in precisions]
    elif arguments.layer or arguments.precision:
        print("bench ledger: --cluster has a layer and a precision; leave out --layer and --precision", file=sys.stderr)
        return 2
    else:
        calls = [partial(bench_ledger.cluster_ledger, arguments.cluster)]
    for call in calls:
        try:
            found = call()
        except ValueError as error:
            print(f"bench ledger: {error}", file=sys.stderr)
            return 2
        print(bench_ledger.by_operation(found), end="\n\n")
        if not arguments.summary:
            print(bench_ledger.by_line(found), end="\n\n")
    return 0


def main() -> int:
    """Choose the bench."""
    names = ", ".join(case.name for case in bench_rows.cases())
    files = ", ".join(bench_rows.ROWS)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME", help=f"one case ({names}) or all cases of one kernel file ({files})")
    parser.add_argument("--csv", metavar="PATH", type=Path, help="also write the rows to this file")
    parser.add_argument("--kernels", default="gluon", help="on a GPU: gluon, portable, reference or deepgemm (gluon)")
    benches = parser.add_subparsers(dest="bench", metavar="layer | ledger", help="MoE blocks instead of single kernels")
    benches.add_parser("layer").add_argument("--tiny", action="store_true", help="small sizes, on a CPU too")
    counted = benches.add_parser("ledger")
    counted.add_argument("--precision", choices=("fp8", "bf16"), help="one of them; both without")
    counted.add_argument("--layer", choices=("moe", "dense"), help="one of them; both without")
    counted.add_argument("--cluster", metavar="NAME", help="a MoE layer as a rank of +cluster=NAME runs it instead")
    counted.add_argument(
        "--summary", action="store_true", help="only the tables by operation, those of docs/kernels.md"
    )
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        use_backend(check_kernels(arguments.kernels, device, has_model=arguments.bench == "layer"))
        if arguments.bench == "layer":
            return layer(arguments, device)
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    return ledger(arguments) if arguments.bench == "ledger" else kernels(arguments, device)


if __name__ == "__main__":
    sys.exit(main())
