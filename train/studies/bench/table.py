"""The bench: a case's candidates on the same inputs, parity first, then times taken in turns, in one process.

    rows.py    each kernel file's operations, each against one peer         `python -m launch.bench`, `make gpu`
    peers.py   V3's products and memory-bound kernels against libraries     `make gpu`

Parity is the relative Frobenius error of a candidate's results against `Inputs.expected`. One whose parity is red gets
no time, a peer that cannot run is listed as absent with its reason, and what the budget did not reach is listed too.
`timing.py` says how times are taken. Figures belong to the device and thread count that the heading names.
"""

from __future__ import annotations

import copy
import csv
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from train.studies.bench.timing import Call, Clock, Loop, PowerMonitor, build_loop, sampler_command, time_in_turns

OURS = "ours"
# What a missing or unwilling library raises. Anything else is a defect of ours and ends the bench.
UNABLE = (ImportError, OSError, AttributeError, TypeError, ValueError, AssertionError, RuntimeError)
LONGEST_REASON = 160
# Columns of the CSV: ours and its one peer, times in microseconds, rates of ours.
SUMMARY = (
    *("name", "peer_name", "parity_error", "tolerance", "time_us", "peer_time_us"),
    *("tflop_per_s", "gbyte_per_s", "speedup"),
)

# Under every table.
LEGEND = (
    "parity: relative error (Frobenius) of our result; at most the bound, else RED and not timed; lower is better",
    "us: one call, median of rounds in which the candidates take turns; lower is better",
    "TFLOP/s, GB/s: work of an ideal call over that time; higher is better; 0 or - where the case counts none",
    "ours/peer: our speed over the peer's, its time over ours; above 1 ours is faster",
)

# "red": wrong, or ours failed. "absent": a peer that cannot run.
Status = Literal["measured", "red", "absent", "not measured"]


class Inputs(Protocol):
    """One set of inputs, and what a candidate must make of it."""

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that are read, and of an output that is given."""

    def reset(self) -> None:
        """Put an output that is given back to what it was."""

    def expected(self) -> list[Tensor]:
        """The results that count, sampled."""

    def sampled(self, outputs: tuple[Tensor, ...]) -> list[Tensor]:
        """The same samples of a candidate's results."""


@dataclass(frozen=True)
class Contender:
    """One way to compute a case."""

    name: str  # column title
    prepare: Callable[[Any], Call]  # brings inputs into its layout, returns the call that is timed; may refuse
    tolerance: float | None = None  # relative error that is still parity; None: a yardstick, which is not compared
    repeats: bool = False  # a second run must agree in every bit


@dataclass(frozen=True)
class Case:
    """One problem and its candidates."""

    name: str  # unique
    kind: str  # cases of a kind are in one table
    flops: float  # of one call; 0 where the bound is memory
    bytes: float  # read and written by one ideal call; 0 for GEMMs
    make: Callable[[torch.device], Inputs]  # seeded
    candidates: tuple[Contender, ...]  # ours first


@dataclass(frozen=True)
class Row:
    """One candidate on one case; None where nothing was computed, compared or timed."""

    case: str
    kind: str
    candidate: str
    status: Status
    reason: str = ""  # why there is no time
    parity_error: float | None = None  # relative Frobenius error
    tolerance: float | None = None
    # As in Timing.
    time_us: float | None = None
    spread_ratio: float | None = None
    host_us: float | None = None
    rounds: int | None = None
    # Ideal work over time; our speed over this candidate's.
    tflop_per_s: float | None = None
    gbyte_per_s: float | None = None
    ours_per_peer_ratio: float | None = None
    # Medians while the candidates of the case took turns.
    power_w: float | None = None
    sm_clock_mhz: float | None = None


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of `expected`, in fp64; NaN where shapes differ."""
    if actual.shape != expected.shape:
        return math.nan
    difference = torch.linalg.vector_norm(actual.double() - expected.double())
    scale = torch.linalg.vector_norm(expected.double())
    # Two zero results agree; a non-zero one against zero does not.
    return float(difference / scale) if float(scale) > 0 else float(difference)


def reason_of(error: BaseException) -> str:
    """The first line of an error, short, after its type."""
    text = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    return text if len(text) <= LONGEST_REASON else text[: LONGEST_REASON - 3] + "..."


def check(row: Row, candidate: Contender, inputs: Inputs, expected: Sequence[Tensor]) -> Row:
    """Run a candidate on `inputs` and compare: the row with error and status; "measured" is green, without a time."""
    if candidate.tolerance is None:
        return row
    call = candidate.prepare(inputs)
    inputs.reset()
    found = tuple(output.clone() for output in call())
    errors = [relative_error(a, e) for a, e in zip(inputs.sampled(found), expected, strict=True)]
    # max() would pass over a NaN.
    error = math.nan if any(math.isnan(e) for e in errors) else max(errors)
    row = replace(row, parity_error=error, tolerance=candidate.tolerance)
    if not error <= candidate.tolerance:
        return replace(row, status="red", reason=f"parity error {error:.1e}, allowed {candidate.tolerance:.1e}")
    if candidate.repeats:
        inputs.reset()
        first, second = ([x.contiguous().view(torch.uint8) for x in results] for results in (found, call()))
        if not all(map(torch.equal, first, second)):
            return replace(row, status="red", reason="two runs differ in bits")
    return row


def _attempt(
    row: Row, candidate: Contender, sets: Sequence[Inputs], expected: Sequence[Tensor], clock: Clock
) -> tuple[Row, Loop | None]:
    """Check a candidate and make its loop; whatever a library refuses becomes the row's reason."""
    try:
        row = check(row, candidate, sets[0], expected)
        if row.status != "measured":
            return row, None
        return row, build_loop([candidate.prepare(inputs) for inputs in sets], expected[0].device, clock=clock)
    except UNABLE as error:
        status: Status = "red" if candidate.name == OURS else "absent"
        return replace(row, status=status, reason=reason_of(error)), None


def _not_measured(case: Case, reason: str) -> list[Row]:
    return [Row(case.name, case.kind, candidate.name, "not measured", reason) for candidate in case.candidates]


def measure(
    case: Case, device: torch.device, *, clock: Clock, deadline_s: float = math.inf, sampler: Sequence[str] = ()
) -> list[Row]:
    """Check and time the candidates of a case: one row for each, in their order.

    Args:
        deadline_s: `time.monotonic()` after which nothing new begins.
        sampler: a command that prints power and clock; empty: they stay unknown.
    """
    rows = {row.candidate: row for row in _not_measured(case, "the budget was spent")}
    if time.monotonic() >= deadline_s:
        return list(rows.values())
    first = case.make(device)
    expected = first.expected()
    # Other sets have the same numbers: only where they are stored counts.
    sets = [first, *(copy.deepcopy(first) for _ in range(1, clock.input_sets(first.nbytes)))]
    loops: dict[str, Loop] = {}
    for candidate in case.candidates:
        if time.monotonic() >= deadline_s:
            break
        row = replace(rows[candidate.name], status="measured", reason="")
        rows[candidate.name], loop = _attempt(row, candidate, sets, expected, clock)
        if loop is not None:
            loops[candidate.name] = loop
    with PowerMonitor(sampler if loops else ()) as monitor:
        timings = time_in_turns(loops, device, clock=clock, deadline_s=deadline_s)
    power = monitor.power
    for name, timing in timings.items():
        rows[name] = replace(
            rows[name],
            **asdict(timing),
            tflop_per_s=case.flops / timing.time_us / 1e6 if case.flops else None,
            gbyte_per_s=case.bytes / timing.time_us / 1e3 if case.bytes else None,
            ours_per_peer_ratio=timing.time_us / timings[OURS].time_us if OURS in timings else None,
            power_w=None if power is None else power.watts,
            sm_clock_mhz=None if power is None else power.sm_clock_mhz,
        )
    return list(rows.values())


def _by_turns(cases: Sequence[Case]) -> list[Case]:
    """The first case of every kind, then the second: a budget that ends early has measured some of each."""
    kinds = [case.kind for case in cases]
    ranks = [kinds[:index].count(kind) for index, kind in enumerate(kinds)]
    return [case for _, case in sorted(zip(ranks, cases, strict=True), key=lambda pair: pair[0])]


def run(cases: Sequence[Case], device: torch.device, *, clock: Clock, budget_s: float = math.inf) -> list[Row]:
    """Measure cases: one row for every candidate of every case, in the order of the cases.

    Args:
        budget_s: no case and no candidate begins after that many seconds; the one at work is finished.
    """
    deadline_s = time.monotonic() + budget_s
    found: dict[str, list[Row]] = {}
    sampler = sampler_command(device)
    for case in _by_turns(cases):
        try:
            found[case.name] = measure(case, device, clock=clock, deadline_s=deadline_s, sampler=sampler)
        except torch.OutOfMemoryError as error:
            found[case.name] = _not_measured(case, reason_of(error))
        if device.type == "cuda":
            # Graphs keep memory pools of their own; the next case may need all of it.
            torch.cuda.empty_cache()
    return [row for case in cases for row in found[case.name]]


def red(rows: Sequence[Row]) -> list[Row]:
    """Rows of ours that are wrong: what a build must fail on. A peer's own errors are only listed."""
    return [row for row in rows if row.candidate == OURS and row.status == "red"]


def records(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows as dictionaries for JSON, which knows no NaN: such an error becomes None, its reason names it."""
    found = [asdict(row) for row in rows]
    return [{k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in r.items()} for r in found]


def summaries(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One dictionary for each case of ours and one peer, with the keys of SUMMARY; no times where ours is red."""
    found = []
    for ours, peer in zip(rows[::2], rows[1::2], strict=True):
        if ours.status == "not measured":
            continue
        green = ours.status == "measured"
        rates = (ours.tflop_per_s or 0.0, ours.gbyte_per_s or 0.0) if green else (None, None)
        peer_time = (peer.time_us, *rates, peer.ours_per_peer_ratio) if green else (None,) * 4
        values = (ours.case, peer.candidate, ours.parity_error, ours.tolerance, ours.time_us, *peer_time)
        found.append(dict(zip(SUMMARY, values, strict=True)))
    return found


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """One line for each summary; a missing time is an empty cell."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=SUMMARY)
        writer.writeheader()
        writer.writerows(summaries(rows))


def cell(value: float | None, spec: str = ".1f") -> str:
    """A number, or a dash for none."""
    return "-" if value is None else format(value, spec)


def render(rows: Sequence[Row], device: torch.device) -> str:
    """Summaries as text, under a heading that names device and threads."""
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    lines = [
        f"torch {torch.__version__}, {where}",
        f"{'case':<30} {'parity':>9} {'bound':>7} {'us':>10} {'TFLOP/s':>8} {'GB/s':>7} {'ours/peer':>9}  peer",
    ]
    wrong = {row.case for row in red(rows)}
    for row in summaries(rows):
        parity = f"RED {cell(row['parity_error'], '.0e')}" if row["name"] in wrong else f"{row['parity_error']:9.1e}"
        lines.append(
            f"{row['name']:<30} {parity:>9} {cell(row['tolerance'], '.1e'):>7} {cell(row['time_us']):>10} "
            f"{cell(row['tflop_per_s'], '.3f'):>8} {cell(row['gbyte_per_s']):>7} {cell(row['speedup'], '.2f'):>9}  "
            f"{row['peer_name']}"
        )
    return "\n".join([*lines, "", *LEGEND])


def _line(row: Row) -> str:
    note = {"measured": "", "red": "RED: ", "absent": "absent: ", "not measured": "not measured: "}[row.status]
    power = "" if row.power_w is None else f"{row.power_w:.0f} W, {row.sm_clock_mhz:.0f} MHz"
    rate = cell(row.gbyte_per_s if row.kind == "memory" else row.tflop_per_s)
    ratio = "-" if row.candidate == OURS else cell(row.ours_per_peer_ratio, ".2f")
    times = (cell(row.time_us), cell(row.spread_ratio, ".0%"), rate, ratio, cell(row.host_us))
    parity = (cell(row.parity_error, ".1e"), cell(row.tolerance, ".1e"))
    cells = (row.case, row.candidate, *parity, *times, (note + row.reason) or power)
    return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"


def markdown(rows: Sequence[Row]) -> str:
    """One table for each kind of case, and what our speed is of each peer's, in the median of the kind's cases."""
    lines = []
    for kind in dict.fromkeys(row.kind for row in rows):
        mine = [row for row in rows if row.kind == kind]
        unit = "GB/s" if kind == "memory" else "TFLOP/s"
        lines += [
            f"### {kind}",
            "",
            f"| case | candidate | parity | bound | us | spread | {unit} | ours/peer | host us | note |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *(_line(row) for row in mine),
            "",
        ]
        for peer in dict.fromkeys(row.candidate for row in mine if row.candidate != OURS):
            ratios = [r.ours_per_peer_ratio for r in mine if r.candidate == peer and r.ours_per_peer_ratio is not None]
            if ratios:
                lines.append(f"- ours / {peer}: median {statistics.median(ratios):.2f} over {len(ratios)} cases")
        lines.append("")
    return "\n".join([*lines, *(f"- {line}" for line in LEGEND)]).strip() + "\n"
