"""The table of kernels against their peers: parity first, then time.

Every kernel file ends with `BENCH`; this module gathers those entries, checks each operation against its peer
on the same inputs, and only where they agree times both, in turns, so that a slow moment of the machine hits
both. A red parity prints no speed. Figures belong to the device and thread count named in the heading.

It does not tune anything, and it keeps no history: write a CSV and compare.
"""

from __future__ import annotations

import csv
import importlib
import pkgutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kernels
from kernels.bench_entry import Bench

# Operations of the ablations that are measured too.
ABLATED = ("train.studies.ablation.hopper_accumulation", "train.studies.ablation.linear")


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        name, peer_name: what was compared.
        parity_error: relative Frobenius error of our result against the peer's.
        tolerance: the largest error that counts as parity.
        time_us, peer_time_us: median of one call, microseconds; None where parity is red.
        tflop_per_s, gbyte_per_s: ideal work of our call over its time; None where parity is red.
        speedup: peer time over our time; None where parity is red.
    """

    name: str
    peer_name: str
    parity_error: float
    tolerance: float
    time_us: float | None = None
    peer_time_us: float | None = None
    tflop_per_s: float | None = None
    gbyte_per_s: float | None = None
    speedup: float | None = None

    @property
    def green(self) -> bool:
        """Whether both sides agree; a NaN error never does."""
        return self.parity_error <= self.tolerance


def entries() -> tuple[Bench, ...]:
    """Every BENCH entry of the modules in `kernels`, in order of module name.

    Raises:
        ValueError: two entries share a name.
    """
    found: list[Bench] = []
    names = sorted(f"kernels.{module.name}" for module in pkgutil.iter_modules(kernels.__path__))
    for name in (*names, *ABLATED):
        found.extend(getattr(importlib.import_module(name), "BENCH", ()))
    names = [bench.name for bench in found]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"BENCH names {repeated} appear twice; give each entry its own name")
    return tuple(found)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of `expected`, in fp64; NaN where shapes differ."""
    if actual.shape != expected.shape:
        return float("nan")
    difference = torch.linalg.vector_norm(actual.double() - expected.double())
    scale = torch.linalg.vector_norm(expected.double())
    # Two zero results agree; a non-zero one against zero does not.
    return float(difference / scale) if float(scale) > 0 else float(difference)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seconds(function: Callable[..., Tensor], inputs: tuple[Any, ...], device: torch.device, calls: int) -> float:
    """Wall time of one call, averaged over `calls`."""
    _wait(device)
    start = time.perf_counter()
    for _ in range(calls):
        function(*inputs)
    _wait(device)
    return (time.perf_counter() - start) / calls


def measure(bench: Bench, device: torch.device, *, rounds: int) -> Row:
    """Check parity, then time both sides in turns.

    Args:
        bench: the entry.
        device: where inputs are made.
        rounds: timings of each side; their median counts.
    Returns:
        The Row; without times where parity is red.
    """
    # Each side gets fresh inputs: an operation may work in place.
    error = relative_error(bench.run(*bench.make_inputs(device)), bench.peer(*bench.make_inputs(device)))
    row = Row(bench.name, bench.peer_name, error, bench.tolerance)
    if not row.green:
        return row
    inputs = bench.make_inputs(device)
    # About 5 ms a timing, so that the clock's resolution and a launch's latency do not count.
    calls = max(1, int(5e-3 / max(_seconds(bench.run, inputs, device, 2), 1e-7)))
    ours, peers = [], []
    for _ in range(rounds):
        ours.append(_seconds(bench.run, inputs, device, calls))
        peers.append(_seconds(bench.peer, inputs, device, calls))
    seconds, peer_seconds = statistics.median(ours), statistics.median(peers)
    return Row(
        name=bench.name,
        peer_name=bench.peer_name,
        parity_error=error,
        tolerance=bench.tolerance,
        time_us=seconds * 1e6,
        peer_time_us=peer_seconds * 1e6,
        tflop_per_s=bench.flops / seconds / 1e12,
        gbyte_per_s=bench.bytes / seconds / 1e9,
        speedup=peer_seconds / seconds,
    )


def table(benches: Sequence[Bench], device: torch.device, *, rounds: int = 9) -> list[Row]:
    """Measure every entry, in order."""
    return [measure(bench, device, rounds=rounds) for bench in benches]


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def render(rows: Sequence[Row], device: torch.device) -> str:
    """The table as text, under a heading that names device and threads."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    lines = [
        f"torch {torch.__version__}, {where}",
        f"{'kernel':<34} {'parity':>9} {'us':>10} {'TFLOP/s':>8} {'GB/s':>7} {'x peer':>7}  peer",
    ]
    for row in rows:
        parity = f"{row.parity_error:9.1e}" if row.green else f"RED {row.parity_error:.0e}"
        lines.append(
            f"{row.name:<34} {parity:>9} {_number(row.time_us, '.1f'):>10} "
            f"{_number(row.tflop_per_s, '.3f'):>8} {_number(row.gbyte_per_s, '.1f'):>7} "
            f"{_number(row.speedup, '.2f'):>7}  {row.peer_name}"
        )
    return "\n".join(lines)


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """One line a row under the field names of Row; a missing time is an empty cell."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
