"""The parts of `make gpu`, each a section of its report: tests, training, one step, resume, a large step, benches.

    parity   canary      each configuration of the Gluon GEMM once             `train/studies/gpu_canary.py`
             tests       tests/gpu: every launcher against its reference, graphs, host waits
             one_step    one step against the CPU, in FP32, BF16 and FP8       `train/studies/step_parity.py`
             training    50 steps of tiny in BF16 and FP8                     `train/studies/smoke_runs.py`
             resume      save, load, go on                                    `train/studies/smoke_runs.py`
             small       one step of small in BF16 and FP8                    `train/studies/smoke_runs.py`
             te          payloads and one step against Transformer Engine     `train/studies/te_parity.py`
    speed    kernels     each kernel file's rows                              `train/studies/bench/rows.py`
             peers       V3's GEMMs and memory-bound kernels against peers    `train/studies/bench/peers.py`
             layer       MoE blocks at V3's width                             `train/studies/bench/layer.py`

`gpu_report.py` runs each part in its own process: an illegal access or a spent budget costs that part only. A part
returns a Section, figures as data for JSON and as Markdown. On a CPU the same parts run with small sizes
(`Options.tiny`), to test the report. The bound on FP8's loss is from arXiv:2412.19437 §3.3.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch

from kernels.config import Backend
from train.studies import gpu_canary, smoke_runs, step_parity, te_parity
from train.studies.bench import layer as bench_layer
from train.studies.bench import table as bench_table
from train.studies.bench.timing import Clock
from train.studies.smoke_runs import PrecisionName, SmokeRun

# "left out": cannot run here, and says why. "not measured": the budget was spent. "failed": ended with an error.
Status = Literal["green", "red", "left out", "not measured", "failed"]
Kind = Literal["parity", "speed"]
ROOT = Path(__file__).resolve().parents[2]
# Failures beyond these are in the JUnit file and the log only.
SHOWN_FAILURES = 20


@dataclass(frozen=True)
class Options:
    """What the command line asks for; `tiny`: small sizes and few repeats, for tests of the report itself."""

    device: torch.device
    tiny: bool = False
    backend: Backend = "gluon"  # of this process, by `kernels.backend.use_backend`


@dataclass(frozen=True)
class Section:
    """One part's outcome and, in one sentence, why it is not green; a speed part has parity checks of its own."""

    status: Status
    reason: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    markdown: str = ""


@dataclass(frozen=True)
class PartPlan:
    """A part of the report; `run` takes the options and a limit in seconds.

    share_s: its time; what the parts before it left is added.
    """

    title: str
    kind: Kind
    share_s: float
    run: Callable[[Options, float], Section]


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "/") for cell in line) + " |" for line in lines)


def verdict(green: bool) -> Status:
    """The status of a check."""
    return "green" if green else "red"


def canary(options: Options, budget_s: float) -> Section:
    """Whether the Gluon GEMM can be trusted with the parts that follow."""
    if not gpu_canary.takes(options.device):
        return Section("left out", "the Gluon products are for compute capability 9.0")
    command = [sys.executable, "-m", "train.studies.gpu_canary"]
    faults = gpu_canary.faults(lambda name: [*command, name], limit_s=min(gpu_canary.LIMIT_S, budget_s))
    lines = [f"- {name}: {faults.get(name, 'right')}" for name in gpu_canary.BOUNDS]
    reason = "; ".join(f"{name}: {why}" for name, why in faults.items())
    return Section(verdict(not faults), reason, {}, "\n".join(lines))


def tests(options: Options, budget_s: float) -> Section:
    """`tests/gpu`, each operator's in a process of its own; what was not run within the budget is not measured."""
    try:
        import pytest  # noqa: F401
    except ModuleNotFoundError:
        return Section("left out", "pytest is not installed here")
    folder, deadline_s = ROOT / "tests/gpu", time.monotonic() + budget_s - PATIENCE_S
    groups = _by_operator(folder) if options.device.type == "cuda" else [[str(folder)]]
    return run_tests(groups, options.backend, deadline_s)


def _by_operator(folder: Path) -> list[list[str]]:
    """The ids of the tests of a folder, in groups that one process runs: an operator's, or a test function's."""
    command = [*_PYTEST, "--collect-only", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    groups: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        if "::" in line:
            function, _, parameters = line.partition("[")
            # tests/gpu/test_launchers.py names operator, rows and width.
            operator = parameters.partition("-")[0] if "launcher" in function else ""
            groups.setdefault(f"{function}[{operator}", []).append(line)
    # The bench of peers takes longest to compile, and decides least.
    return sorted(groups.values(), key=lambda names: "bench_peers" in names[0])


# Warnings of libraries are errors on the pinned versions only.
_PYTEST = [sys.executable, "-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider", f"--rootdir={ROOT}"]


def run_tests(groups: Sequence[Sequence[str]], backend: Backend, deadline_s: float) -> Section:
    """Each group by a pytest of its own, side by side: so kernels compile. None begins after deadline_s (monotonic)."""
    processes = min(MOST_PROCESSES, max(1, len(os.sched_getaffinity(0)) - 2))

    def run(number: int, group: Sequence[str], folder: Path) -> str | None:
        """None, or why the group has no result."""
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            return LATE
        options = [f"--kernels={backend}", f"--gpu-seconds={left_s:.0f}", f"--junitxml={folder / str(number)}.xml"]
        try:
            done = subprocess.run(
                [*_PYTEST, *options, *group], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                timeout=left_s + PATIENCE_S, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return LATE
        print(done.stdout, done.stderr, flush=True)
        if (folder / f"{number}.xml").exists():
            return None
        last = ((done.stderr or done.stdout).strip().splitlines() or ["without a word"])[-1]
        return f"its process ended with {done.returncode}: {last[:200]}"

    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(processes) as pool:
        folder = Path(place)
        reasons = list(pool.map(partial(run, folder=folder), range(len(groups)), groups))
        without = {group[0]: reason for group, reason in zip(groups, reasons, strict=True) if reason}
        return read_junit(sorted(folder.glob("*.xml")), without)


# Beyond the deadline, for a test under way.
PATIENCE_S = 5.0
# Each has a context on the GPU.
MOST_PROCESSES = 16
# How a skip begins that only time explains; as in tests/gpu/conftest.py.
LATE = "not run"


def read_junit(paths: Sequence[Path], without: Mapping[str, str] = MappingProxyType({})) -> Section:
    """A Section from pytest's own reports, and of the groups without one: first test -> why."""
    failures, skips, num_cases = [pair for pair in without.items() if pair[1] != LATE], Counter[str](), 0
    for case in (case for path in paths for case in ElementTree.parse(path).getroot().iter("testcase")):
        num_cases += 1
        name = f"{case.get('classname', '')}::{case.get('name', '')}"
        for kind in ("failure", "error"):
            failures += [(name, found.get("message", "")[:200]) for found in case.findall(kind)]
        skips.update(found.get("message", "") for found in case.findall("skipped"))
    skipped = sum(skips.values())
    passed = num_cases - skipped - len({name for name, _ in failures if name not in without})
    late = [name for name, reason in without.items() if reason == LATE]
    late += [f"{count} tests" for message, count in skips.items() if message.startswith(LATE)]
    data = {"passed": passed, "failed": [list(pair) for pair in failures], "skipped": dict(skips), "not_run": late}
    lines = [f"{passed} passed, {len(failures)} failed, {skipped} skipped.", ""]
    lines += [f"- FAILED `{name}`: {message}" for name, message in failures[:SHOWN_FAILURES]]
    lines += [f"- skipped {count}: {reason}" for reason, count in skips.items()]
    lines += [
        f"- not run, the budget was spent: {name} and the others of its process" for name in without if name in late
    ]
    markdown = "\n".join(lines)
    if failures:
        return Section("red", f"{len(failures)} tests failed", data, markdown)
    if late:
        return Section("not measured", f"the budget was spent before {', '.join(late[:5])}", data, markdown)
    if not passed:
        return Section("left out", "; ".join(skips) or "no test was found", data, markdown)
    return Section("green", "", data, markdown)


def tiny_run(options: Options) -> SmokeRun:
    """The training parts' model: configs/model/tiny.yaml with its own batch of 1,024 tokens."""
    sequences, tokens = (2, 32) if options.tiny else (4, 256)
    return smoke_runs.smoke_run("tiny", sequences=sequences, tokens=tokens)


def training(options: Options, budget_s: float) -> Section:
    """Losses are finite, fall, and FP8's are BF16's."""
    smoke_runs.prepare(deterministic=True)
    steps = 6 if options.tiny else 50
    runs = {name: smoke_runs.train(tiny_run(options), name, options.device, steps=steps) for name in ("bf16", "fp8")}
    gap = smoke_runs.training_gap(runs["fp8"], runs["bf16"])
    least = smoke_runs.LEAST_FALL * steps / 50
    green = abs(gap) <= smoke_runs.TRAINING_GAP and all(run.fall >= least for run in runs.values())
    rows = [(name, f"{run.losses[0]:.3f}", f"{run.losses[-1]:.3f}") for name, run in runs.items()]
    markdown = table(("precision", "first loss", f"loss after {steps} steps"), rows)
    markdown += (
        f"\n\nSmoothed losses of FP8 against BF16: {gap:+.3%} (bound {smoke_runs.TRAINING_GAP:.2%}); "
        f"each must fall by {least:.2f} nats at least."
    )
    data = {"steps": steps, "gap_ratio": gap, "losses": {name: run.losses for name, run in runs.items()}}
    return Section(verdict(green), "" if green else "losses differ or do not fall", data, markdown)


def step_against_cpu(options: Options, budget_s: float) -> Section:
    """One step in every precision against the CPU's, with the attention that is fastest."""
    smoke_runs.prepare(deterministic=False)
    names: tuple[PrecisionName, ...] = ("bf16", "fp8") if options.tiny else ("fp32", "bf16", "fp8")
    found = [step_parity.compare_step(tiny_run(options), name, options.device) for name in names]
    header = ("precision", "loss", "worst gradient", "of", "most turned", "of", "choices forced", "verdict")
    rows = []
    for each in found:
        bounds = step_parity.STEP_BOUNDS[each.precision]
        (error, where), (turned, whose) = each.worst_error, each.worst_turn
        measured = ((each.loss_error, bounds.loss), (error, bounds.error), (turned, bounds.turn))
        loss, worst, most = (f"{value:.1e} (bound {bound:.0e})" for value, bound in measured)
        forced = f"{each.flipped_tokens} of {each.routed_tokens}"
        rows.append((each.precision, loss, worst, f"`{where}`", most, f"`{whose}`", forced, verdict(each.green)))
    green = all(each.green for each in found)
    reason = "" if green else "a loss or gradient is further from the CPU's than roundings explain"
    return Section(verdict(green), reason, {"steps": [asdict(each) for each in found]}, table(header, rows))


def resumed(options: Options, budget_s: float) -> Section:
    """A resumed run against the unbroken one, in BF16 and FP8."""
    smoke_runs.prepare(deterministic=True)
    names: tuple[PrecisionName, ...] = ("fp8",) if options.tiny else ("bf16", "fp8")
    steps = 1 if options.tiny else 5
    with tempfile.TemporaryDirectory() as folder:
        found = [
            smoke_runs.resume(tiny_run(options), name, options.device, steps=steps, directory=Path(folder) / name)
            for name in names
        ]
    header = ("precision", "bit-equal", "tensors that differ", "masters, of what they moved", "verdict")
    rows = []
    for each in found:
        moved = f"{each.difference:.1e} (bound {0 if each.on_cpu else smoke_runs.RESUME_BOUND})"
        equal = "yes" if each.bit_equal else "no"
        rows.append((each.precision, equal, len(each.differing), moved, verdict(each.green)))
    green = all(each.green for each in found)
    reason = "" if green else "a resumed run is another run"
    return Section(verdict(green), reason, {"resumes": [asdict(each) for each in found]}, table(header, rows))


def small_step(options: Options, budget_s: float) -> Section:
    """One step of `small`, or of tiny in its place."""
    smoke_runs.prepare(deterministic=False)
    run = tiny_run(options) if options.tiny else smoke_runs.smoke_run("small", sequences=1, tokens=4096)
    found = smoke_runs.big_steps(run, options.device)
    gap = found[1].loss / found[0].loss - 1
    green = abs(gap) <= smoke_runs.BIG_STEP_GAP
    rows = [
        (each.precision, f"{each.loss:.4f}", f"{each.grad_norm:.3f}", _shown(each.peak_bytes and each.peak_bytes / 1e9))
        for each in found
    ]
    markdown = table(("precision", "loss", "gradient norm", "peak memory GB"), rows)
    markdown += f"\n\nLoss of FP8 against BF16: {gap:+.3%} (bound {smoke_runs.BIG_STEP_GAP:.0%})."
    data = {"gap_ratio": gap, "steps": [asdict(each) for each in found]}
    return Section(verdict(green), "" if green else "FP8's first loss is not BF16's", data, markdown)


def transformer_engine(options: Options, budget_s: float) -> Section:
    """Payloads to the bit, and one step's losses and gradients, against Transformer Engine where it is installed."""
    smoke_runs.prepare(deterministic=False)
    found = te_parity.second_opinion(tiny_run(options), options.device)
    if found.refused:
        return Section("left out", found.refused)
    assert found.step is not None
    step, bounds = found.step, step_parity.STEP_BOUNDS["fp8"]
    (error, where), (turned, whose) = step.worst_error, step.worst_turn
    rows = [(each.tensor, each.use, each.payload_bytes, each.scales, verdict(each.green)) for each in found.payloads]
    markdown = table(("tensor", "tiles", "payload bytes that differ", "scales that differ", "verdict"), rows)
    markdown += (
        f"\n\nOne step, precision=fp8_te against fp8, {verdict(step.green)}: loss {step.loss_error:.1e} (bound "
        f"{bounds.loss:.0e}), worst gradient {error:.1e} of `{where}` (bound {bounds.error:.0e}), most turned "
        f"{turned:.1e} of `{whose}` (bound {bounds.turn:.0e}); choices of experts forced for {step.flipped_tokens} of "
        f"{step.routed_tokens} tokens."
    )
    reason = "" if found.green else "Transformer Engine computes something else"
    return Section(verdict(found.green), reason, asdict(found), markdown)


def kernel_benches(options: Options, budget_s: float) -> Section:
    """Each kernel file's own entries, until the budget is spent."""
    from train.studies.bench import rows as bench_rows

    chosen = [case for case in bench_rows.cases() if not options.tiny or case.name in ("adamw", "quantize_tiles")]
    clock = bench_rows.clock_of(options.device, rounds=1 if options.tiny else 5)
    rows = bench_table.run(chosen, options.device, clock=clock, budget_s=budget_s)
    late = [row.case for row in rows if row.candidate == bench_table.OURS and row.status == "not measured"]
    red = [row.case for row in bench_table.red(rows)]
    found = bench_table.summaries(rows)
    cells = []
    for row in found:
        parity = ("RED " if row["name"] in red else "") + _shown(row["parity_error"], ".1e")
        rates = (_shown(row["speedup"], ".2f"), _shown(row["tflop_per_s"]), _shown(row["gbyte_per_s"]))
        bound = _shown(row["tolerance"], ".1e")
        cells.append((row["name"], row["peer_name"], parity, bound, _shown(row["time_us"]), *rates))
    markdown = table(("case", "peer", "parity", "bound", "us", "ours/peer", "TFLOP/s", "GB/s"), cells)
    markdown += "\n\n" + "\n".join(f"- {line}" for line in bench_table.LEGEND)
    markdown += f"\n\nNot measured, the budget was spent: {', '.join(late)}." if late else ""
    data = {"rows": found, "not_measured": late}
    return Section(verdict(not red), f"parity is red: {', '.join(red)}" if red else "", data, markdown)


def peer_benches(options: Options, budget_s: float) -> Section:
    """V3's products and memory-bound kernels against what else this machine has."""
    from train.studies.bench import peers as bench_peers

    clock = bench_peers.SMALL_CLOCK if options.tiny else Clock()
    rows = bench_table.run(bench_peers.cases(small=options.tiny), options.device, clock=clock, budget_s=budget_s)
    red = [f"{row.case}: {row.reason}" for row in bench_table.red(rows)]
    return Section(verdict(not red), "; ".join(red), {"rows": bench_table.records(rows)}, bench_table.markdown(rows))


def layer_bench(options: Options, budget_s: float) -> Section:
    """MoE blocks at V3's width."""
    smoke_runs.prepare(deterministic=False)
    sizes = bench_layer.tiny_sizes() if options.tiny else bench_layer.v3_sizes()
    found = bench_layer.run(sizes, options.device, budget_s=budget_s)
    reason = "" if found.green else "FP8 differs from BF16 by more than its roundings: no time is given"
    return Section(verdict(found.green), reason, asdict(found), bench_layer.markdown(found))


def _shown(value: float | None, spec: str = ".1f") -> str:
    return "-" if value is None else format(value, spec)


# In the order of the report. The shares are what a first run on an H100 is expected to need, kernels compiled on the
# way; together 460 s, which leaves 20 of 8 minutes for starting and writing.
PARTS: dict[str, PartPlan] = {
    "canary": PartPlan("Canary of the Gluon products", "parity", 40, canary),
    "tests": PartPlan("GPU tests", "parity", 95, tests),
    "one_step": PartPlan("One step of tiny against the CPU", "parity", 35, step_against_cpu),
    "training": PartPlan("Training tiny in BF16 and FP8", "parity", 55, training),
    "resume": PartPlan("Resume", "parity", 30, resumed),
    "small": PartPlan("One step of small", "parity", 60, small_step),
    "te": PartPlan("Second opinion of Transformer Engine", "parity", 20, transformer_engine),
    "kernels": PartPlan("Kernels against torch", "speed", 30, kernel_benches),
    "peers": PartPlan("Products and memory-bound kernels against peers", "speed", 55, peer_benches),
    "layer": PartPlan("MoE blocks at V3's width", "speed", 40, layer_bench),
}
