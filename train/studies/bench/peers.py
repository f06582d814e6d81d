"""Our kernels beside their peers on DeepSeek-V3's shapes: parity first, then times taken in turns, in one process.

Peers of the FP8 GEMMs compute the same product: cuBLASLt's block scaling through `torch.nn.functional.scaled_mm`,
DeepGEMM where it can be imported, BF16 through `torch.mm` and `torch.nn.functional.grouped_mm` on the dequantised
operands. The yardstick of memory-bound kernels is a copy of as many bytes. A peer that cannot run is listed as absent
with its reason, a candidate whose parity is red gets no time, and what the budget did not reach is listed too.

Parity is the relative Frobenius error of sampled rows against FP64 (`cases.py`); besides, two runs of ours
must agree in every bit. `timing.py` says how times are taken.

DeepGEMM's adapter follows its version 2.6.1 (scales [rows, tiles] with rows contiguous, `c is d` to accumulate, groups
of a contraction packed one after another) and was checked against a stand-in of that interface, not against DeepGEMM.
Layouts are prepared before anything is timed, for every candidate.

Not here: tuning, history, and products that scale by row or by tensor, which compute something else.
"""

from __future__ import annotations

import importlib
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.formats import Quantized
from kernels.gemm_fp8 import gemm_tile_block, gemm_tile_tile
from kernels.gemm_grouped import grouped_gemm_tile_block, grouped_gemm_tile_tile
from train.studies.bench.cases import Inputs, Operands, Shape, decode, decode_blocks, operands, shapes
from train.studies.bench.table import relative_error
from train.studies.bench.timing import Call, Loop, PowerMonitor, Protocol, build_loop, sampler_command, time_in_turns
from train.studies.bench.traffic import Traffic, TrafficInputs, traffic_inputs, traffics

OURS = "ours"
# One rounding to BF16, 2^-9 / sqrt(3) * sqrt(2) in the mean square, is 1.6e-3.
BF16_TOLERANCE = 2.5e-3
# Hopper's tensor cores keep about 14 bits inside a block of 128: measured 1.3e-4 on an H100, by three libraries.
FP32_TOLERANCE = 5e-4
# What a missing or unwilling library raises. Anything else is a defect of ours and ends the bench.
UNABLE = (ImportError, OSError, AttributeError, TypeError, ValueError, AssertionError, RuntimeError)
LONGEST_REASON = 160

Status = Literal["measured", "red", "absent", "not measured"]


@dataclass(frozen=True)
class Candidate:
    """One way to compute a case.

    Args:
        name: column title; "ours" is ours.
        prepare: brings inputs into its layout and returns the call that is timed; raises where it cannot.
        tolerance: relative error that still counts as parity; None: a yardstick, whose result is no one's.
    """

    name: str
    prepare: Callable[[Any], Call]
    tolerance: float | None


@dataclass(frozen=True)
class Case:
    """One problem and its candidates.

    Args:
        name: unique.
        kind: cases of a kind stand in one table.
        flops: of one call; 0 where the bound is memory.
        bytes: read and written by one ideal call; 0 for GEMMs.
        make: (device, seed) -> inputs.
        candidates: ours first.
    """

    name: str
    kind: str
    flops: float
    bytes: float
    make: Callable[[torch.device, int], Inputs]
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class Row:
    """One candidate on one case.

    Args:
        case, kind, candidate: what.
        status: "measured", "red" (wrong, or ours failed), "absent" (a peer that cannot run) or "not measured".
        reason: why there is no time.
        parity_error, tolerance: relative Frobenius error; None where nothing was computed or compared.
        time_us: median of one launch, microseconds.
        spread_ratio: (highest - lowest) / median over the rounds.
        host_us: one call on the host, until it returns, microseconds.
        rounds: how many times it was timed.
        tflop_per_s, gbyte_per_s: ideal work over time; one of them.
        ours_per_peer_ratio: our speed over this candidate's.
        power_w, sm_clock_mhz: medians while the candidates of the case took turns.
    """

    case: str
    kind: str
    candidate: str
    status: Status
    reason: str = ""
    parity_error: float | None = None
    tolerance: float | None = None
    time_us: float | None = None
    spread_ratio: float | None = None
    host_us: float | None = None
    rounds: int | None = None
    tflop_per_s: float | None = None
    gbyte_per_s: float | None = None
    ours_per_peer_ratio: float | None = None
    power_w: float | None = None
    sm_clock_mhz: float | None = None


def ours(op: Operands) -> Call:
    """The public function of the product."""
    accumulate = op.shape.accumulate
    if op.out is not None:
        if op.group_ends is None:
            return lambda: (gemm_tile_tile(op.a, op.b, out=op.out, accumulate=accumulate),)
        ends = op.group_ends
        return lambda: (grouped_gemm_tile_tile(op.a, op.b, ends, out=op.out, accumulate=accumulate),)
    if op.group_ends is None:
        return lambda: (gemm_tile_block(op.a, op.b, out_dtype=torch.bfloat16),)
    ends = op.group_ends
    return lambda: (grouped_gemm_tile_block(op.a, op.b, ends, out_dtype=torch.bfloat16),)


def _added(op: Operands, product: Callable[[], Tensor]) -> Call:
    """The product itself, or added to the output by a second launch, where the library cannot do it in one."""
    out = op.out
    if out is None or not op.shape.accumulate:
        return lambda: (product(),)
    return lambda: (out.add_(product()),)


def scaled_mm(op: Operands) -> Call:
    """cuBLASLt's block scaling.

    Scales of tiles are [rows, tiles] with rows contiguous, as ours; those of blocks [tiles, row blocks] with tiles
    contiguous and padded to a multiple of 4, so ours are copied.
    """
    tile, block = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128
    a, a_scale, b = op.a.payload, op.a.scale.t(), op.b.payload.t()
    if op.shape.is_wgrad:
        b_scale, recipe, dtype = op.b.scale.t(), tile, torch.float32
    else:
        b_scale = F.pad(op.b.scale, (0, -op.b.scale.shape[1] % 4)).contiguous().t()
        recipe, dtype = block, torch.bfloat16
    plain = F.SwizzleType.NO_SWIZZLE

    def product() -> Tensor:
        return F.scaled_mm(
            a, b, a_scale, tile, b_scale, recipe, swizzle_a=plain, swizzle_b=plain, output_dtype=dtype
        )  # fmt: skip

    return _added(op, product)


def bf16(op: Operands) -> Call:
    """BF16 operands, exact copies of the FP8 ones; wgrad's lie as activations and gradients do, [tokens, features]."""
    a = decode(op.a.payload, op.a.scale.t()).bfloat16()
    if op.shape.is_wgrad:
        a, b = a.t().contiguous().t(), decode(op.b.payload, op.b.scale.t()).t().bfloat16().contiguous()
    elif op.group_ends is None:
        b = decode_blocks(op.b.payload, op.b.scale).bfloat16().t()
    else:
        pairs = zip(op.b.payload, op.b.scale, strict=True)
        b = torch.stack([decode_blocks(payload, scale).bfloat16() for payload, scale in pairs]).mT
    if op.group_ends is None:
        return _added(op, partial(torch.mm, a, b))
    return _added(op, partial(F.grouped_mm, a, b, offs=op.group_ends))


def deep_gemm(op: Operands) -> Call:
    """DeepGEMM: fp8_gemm_nt, m_grouped_fp8_gemm_nt_contiguous, k_grouped_fp8_gemm_nt_contiguous."""
    library = importlib.import_module("deep_gemm")
    if op.shape.is_wgrad:
        if not op.shape.accumulate:
            raise ValueError("DeepGEMM's product of tiles always adds to its output; compare the case with +=")
        return _deep_gemm_wgrad(op, library)
    a, b = (op.a.payload, op.a.scale.t()), (op.b.payload, op.b.scale)
    d = torch.zeros(op.shape.m, op.shape.n, dtype=torch.bfloat16, device=op.a.payload.device)
    recipe = (1, 128, 128)
    if op.group_ends is None:

        def dense() -> tuple[Tensor, ...]:
            library.fp8_gemm_nt(a, b, d, recipe=recipe)
            return (d,)

        return dense
    groups = torch.full((op.shape.m,), -1, dtype=torch.int32, device=d.device)
    for group, part in enumerate(op.parts):
        groups[part] = group

    def grouped() -> tuple[Tensor, ...]:
        library.m_grouped_fp8_gemm_nt_contiguous(a, b, d, groups, recipe=recipe)
        return (d,)

    return grouped


def _deep_gemm_wgrad(op: Operands, library: Any) -> Call:
    assert op.out is not None
    out, recipe = op.out, (1, 1, 128)
    if op.group_ends is None:
        a, b = (op.a.payload, op.a.scale.t()), (op.b.payload, op.b.scale.t())

        def dense() -> tuple[Tensor, ...]:
            library.fp8_gemm_nt(a, b, out, c=out, recipe=recipe)
            return (out,)

        return dense
    rows = [part.stop - part.start for part in op.parts]
    rows_on_device = torch.tensor(rows, dtype=torch.int32, device=out.device)
    a, b = _packed(op.a, op.parts), _packed(op.b, op.parts)

    def grouped() -> tuple[Tensor, ...]:
        library.k_grouped_fp8_gemm_nt_contiguous(a, b, out, rows, rows_on_device, out, recipe=recipe)
        return (out,)

    return grouped


def _packed(q: Quantized, parts: Sequence[slice]) -> tuple[Tensor, Tensor]:
    """Each group's [features, rows of g], contiguous, one after another; scales [features, tiles]."""
    payload = q.payload.view(torch.uint8)
    packed = torch.cat([payload[:, part].reshape(-1) for part in parts])
    return packed.view(torch.float8_e4m3fn), q.scale.t()


def _gemm_case(shape: Shape) -> Case:
    fp8 = FP32_TOLERANCE if shape.is_wgrad else BF16_TOLERANCE
    found = [Candidate(OURS, ours, fp8), Candidate("DeepGEMM", deep_gemm, fp8)]
    added = ", add_" if shape.accumulate else ""
    if not shape.ends:
        scales = "1x128 x 1x128" if shape.is_wgrad else "1x128 x 128x128"
        found.append(Candidate(f"F.scaled_mm {scales}{added}", scaled_mm, fp8))
    mm = "F.grouped_mm" if shape.ends else "torch.mm"
    found.append(Candidate(f"{mm} BF16{added}", bf16, BF16_TOLERANCE))
    return Case(shape.name, shape.kind, shape.flops, 0.0, partial(operands, shape), tuple(found))


def run_traffic(inputs: TrafficInputs) -> Call:
    """The public function of a memory-bound case."""
    return lambda: inputs.traffic.run(*inputs.tensors)


def copy(inputs: TrafficInputs) -> Call:
    """A BF16 copy that reads and writes as many bytes as the case."""
    source = torch.zeros(int(inputs.traffic.bytes / 4), dtype=torch.bfloat16, device=inputs.tensors[0].device)
    target = torch.empty_like(source)
    return lambda: (target.copy_(source),)


def _traffic_case(traffic: Traffic) -> Case:
    candidates = (Candidate(OURS, run_traffic, traffic.tolerance), Candidate("copy_, equal bytes", copy, None))
    name = f"{traffic.name} {traffic.rows}x{traffic.cols}"
    return Case(name, "memory", 0.0, traffic.bytes, partial(traffic_inputs, traffic), candidates)


def cases(*, small: bool = False) -> list[Case]:
    """Every case, in the order of the tables.

    Args:
        small: every dim a 32nd, for a CPU.
    """
    return [
        *(_gemm_case(shape) for shape in shapes(small=small)),
        *(_traffic_case(traffic) for traffic in traffics(small=small)),
    ]


def reason_of(error: BaseException) -> str:
    """The first line of an error, short, after its type."""
    line = (str(error).strip().splitlines() or [""])[0]
    text = f"{type(error).__name__}: {line}"
    return text if len(text) <= LONGEST_REASON else text[: LONGEST_REASON - 3] + "..."


def _same_bits(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    pairs = zip(first, second, strict=True)
    return all(torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)) for a, b in pairs)


def check(row: Row, candidate: Candidate, inputs: Inputs, expected: Sequence[Tensor]) -> Row:
    """Run a candidate and compare.

    Args:
        row: what it is about.
        candidate: to be run on `inputs`.
        inputs: one set; an output in it is reset first.
        expected: what `inputs.expected()` said.
    Returns:
        The row with error and status; "measured" stands for green, without a time yet.
    """
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
    if candidate.name == OURS:
        inputs.reset()
        if not _same_bits(found, call()):
            return replace(row, status="red", reason="two runs differ in bits")
    return row


def _attempt(
    row: Row, candidate: Candidate, sets: Sequence[Inputs], expected: Sequence[Tensor], protocol: Protocol
) -> tuple[Row, Loop | None]:
    """Check a candidate and make its loop; whatever a library refuses becomes the row's reason."""
    device = expected[0].device
    try:
        row = check(row, candidate, sets[0], expected)
        if row.status != "measured":
            return row, None
        calls = [candidate.prepare(inputs) for inputs in sets]
        return row, build_loop(calls, device, protocol=protocol)
    except UNABLE as error:
        status: Status = "red" if candidate.name == OURS else "absent"
        return replace(row, status=status, reason=reason_of(error)), None


def _not_measured(case: Case, reason: str) -> list[Row]:
    return [Row(case.name, case.kind, candidate.name, "not measured", reason) for candidate in case.candidates]


def measure(
    case: Case, device: torch.device, *, protocol: Protocol, deadline_s: float, sampler: Sequence[str]
) -> list[Row]:
    """Check and time the candidates of a case.

    Args:
        case: what.
        device: where.
        protocol: how it is timed.
        deadline_s: `time.monotonic()` after which nothing new begins.
        sampler: a command that prints power and clock; empty: they stay unknown.
    Returns:
        One row per candidate, in their order.
    """
    rows = {row.candidate: row for row in _not_measured(case, "the budget was spent")}
    if time.monotonic() >= deadline_s:
        return list(rows.values())
    first = case.make(device, 0)
    sets = [first, *(case.make(device, seed) for seed in range(1, protocol.input_sets(first.nbytes)))]
    expected = first.expected()
    loops: dict[str, Loop] = {}
    for candidate in case.candidates:
        if time.monotonic() >= deadline_s:
            break
        row = replace(rows[candidate.name], status="measured", reason="")
        rows[candidate.name], loop = _attempt(row, candidate, sets, expected, protocol)
        if loop is not None:
            loops[candidate.name] = loop
    with PowerMonitor(sampler if loops else ()) as monitor:
        timings = time_in_turns(loops, device, protocol=protocol, deadline_s=deadline_s)
    power = monitor.power
    for name, timing in timings.items():
        rows[name] = replace(
            rows[name],
            time_us=timing.time_us,
            spread_ratio=timing.spread_ratio,
            host_us=timing.host_us,
            rounds=timing.rounds,
            tflop_per_s=case.flops / timing.time_us / 1e6 if case.flops else None,
            gbyte_per_s=case.bytes / timing.time_us / 1e3 if case.bytes else None,
            ours_per_peer_ratio=timing.time_us / timings[OURS].time_us if OURS in timings else None,
            power_w=None if power is None else power.watts,
            sm_clock_mhz=None if power is None else power.sm_clock_mhz,
        )
    return list(rows.values())


def _by_turns(chosen: Sequence[Case]) -> list[Case]:
    """The first case of every kind, then the second: a budget that ends early has measured some of each."""
    seen: Counter[str] = Counter()
    places = []
    for case in chosen:
        places.append(seen[case.kind])
        seen[case.kind] += 1
    return [case for _, case in sorted(zip(places, chosen, strict=True), key=lambda pair: pair[0])]


def run(
    device: torch.device, *, budget_s: float, small: bool = False, chosen: Sequence[Case] | None = None
) -> list[Row]:
    """Measure all cases within a time.

    Args:
        device: a GPU, or a CPU, on which times mean nothing.
        budget_s: no case and no candidate begins after that many seconds; the one at work is finished.
        small: every dim a 32nd and few rounds, for a CPU.
        chosen: the cases to measure; None: `cases(small=small)`.
    Returns:
        One row for every candidate of every case, in the order of the cases.
    """
    deadline_s = time.monotonic() + budget_s
    protocol = Protocol(rounds=3, replay_s=0.0, cold_bytes=0.0) if small else Protocol()
    chosen = cases(small=small) if chosen is None else chosen
    found: dict[str, list[Row]] = {}
    sampler = sampler_command(device)
    for case in _by_turns(chosen):
        try:
            found[case.name] = measure(case, device, protocol=protocol, deadline_s=deadline_s, sampler=sampler)
        except torch.OutOfMemoryError as error:
            found[case.name] = _not_measured(case, reason_of(error))
        if device.type == "cuda":
            # Graphs keep memory pools of their own; the next case may need all of it.
            torch.cuda.empty_cache()
    return [row for case in chosen for row in found[case.name]]


def red(rows: Sequence[Row]) -> list[Row]:
    """Rows of ours that are wrong: what a build must fail on. A peer's own errors are only listed."""
    return [row for row in rows if row.candidate == OURS and row.status == "red"]


def records(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows as dictionaries for JSON, which knows no NaN: such an error becomes None, its reason names it."""
    found = [asdict(row) for row in rows]
    return [{k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in r.items()} for r in found]


def _cell(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def _line(row: Row) -> str:
    note = {"measured": "", "red": "RED: ", "absent": "absent: ", "not measured": "not measured: "}[row.status]
    power = "" if row.power_w is None else f"{row.power_w:.0f} W, {row.sm_clock_mhz:.0f} MHz"
    cells = [
        row.case,
        row.candidate,
        _cell(row.parity_error, ".1e"),
        _cell(row.time_us, ".1f"),
        _cell(row.spread_ratio, ".0%"),
        _cell(row.gbyte_per_s if row.kind == "memory" else row.tflop_per_s, ".1f"),
        "-" if row.candidate == OURS else _cell(row.ours_per_peer_ratio, ".2f"),
        _cell(row.host_us, ".1f"),
        (note + row.reason) or power,
    ]
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
            f"| case | candidate | parity error | us | spread | {unit} | ours/peer | host us | note |",
            "|---|---|---|---|---|---|---|---|---|",
            *(_line(row) for row in mine),
            "",
        ]
        for peer in dict.fromkeys(row.candidate for row in mine if row.candidate != OURS):
            ratios = [r.ours_per_peer_ratio for r in mine if r.candidate == peer and r.ours_per_peer_ratio is not None]
            if ratios:
                lines.append(f"- ours / {peer}: median {statistics.median(ratios):.2f} over {len(ratios)} cases")
        lines.append("")
    return "\n".join(lines).strip() + "\n"
