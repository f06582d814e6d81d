"""The peer bench: every case and candidate has a row, parity comes before time, nothing is dropped in silence."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import get_args
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.formats import TILE, Quantized, ceil_div
from kernels.gemm_fp8 import gemm_tile_block, gemm_tile_tile
from kernels.gemm_grouped import grouped_gemm_tile_block, grouped_gemm_tile_tile
from kernels.operators import LAUNCHERS
from tests.kernels.deepgemm_stand_in import DeepGemm
from tests.kernels.gemm_inputs import decode_blocks, decode_tiles
from train.studies.bench import cases as bench_cases
from train.studies.bench import fused as bench_fused
from train.studies.bench import peers as bench_peers
from train.studies.bench import table as bench_table
from train.studies.bench import timing as bench_timing
from train.studies.bench import traffic as bench_traffic
from train.studies.bench.cases import GemmOperands, Shape
from train.studies.bench.peers import SMALL_CLOCK
from train.studies.bench.table import OURS, Case, Contender, Row

CPU = torch.device("cpu")
KINDS = ("fprop", "dgrad", "wgrad", "grouped fprop", "grouped dgrad", "grouped wgrad", "memory")


def few(*kinds: str) -> list[Case]:
    """The last case of each kind, of wgrads the last with += and the last with =; grouped ones are uneven."""
    found = {(case.kind, case.name.endswith("accumulate")): case for case in bench_peers.cases(small=True)}
    return [case for (kind, _), case in found.items() if kind in kinds]


def run(cases: Sequence[Case], **budget: float) -> list[Row]:
    return bench_table.run(cases, CPU, clock=SMALL_CLOCK, **budget)


def measured(*kinds: str) -> dict[tuple[str, str], Row]:
    return {(row.case, row.candidate): row for row in run(few(*kinds))}


@pytest.fixture(scope="module")
def rows() -> Iterator[list[Row]]:
    """One run of all cases without DeepGEMM."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "deep_gemm", None)
        yield run(bench_peers.cases(small=True))


def test_every_candidate_of_every_case_has_one_row(rows: list[Row]) -> None:
    wanted = [(case.name, c.name) for case in bench_peers.cases(small=True) for c in case.candidates]
    assert [(row.case, row.candidate) for row in rows] == wanted
    assert len(set(wanted)) == len(wanted)
    assert {row.kind for row in rows} == set(KINDS)


def test_ours_is_green_and_timed_everywhere(rows: list[Row]) -> None:
    for row in rows:
        if row.candidate == OURS:
            assert row.status == "measured", row
            assert row.parity_error <= row.tolerance
            assert None not in (row.time_us, row.spread_ratio, row.host_us)
            assert row.ours_per_peer_ratio == 1.0
            assert (row.tflop_per_s is None) == (row.kind == "memory") != (row.gbyte_per_s is None)
    assert not bench_table.red(rows)


def test_a_peer_that_cannot_run_is_absent_with_its_reason(rows: list[Row]) -> None:
    absent = [row for row in rows if row.status == "absent"]
    # Block scaling exists on a GPU only; DeepGEMM was hidden.
    assert {row.candidate.split()[0] for row in absent} == {"DeepGEMM", "F.scaled_mm"}
    assert all(row.reason and row.time_us is None and row.ours_per_peer_ratio is None for row in absent)
    assert all("deep_gemm" in row.reason for row in absent if row.candidate == "DeepGEMM")


def test_ratio_and_rate_follow_from_times(rows: list[Row]) -> None:
    cases = {case.name: case for case in bench_peers.cases(small=True)}
    ours = {row.case: row.time_us for row in rows if row.candidate == OURS}
    timed = [row for row in rows if row.time_us is not None]
    assert len(timed) > len(cases)
    for row in timed:
        mine = ours[row.case]
        assert row.ours_per_peer_ratio == pytest.approx(row.time_us / mine, rel=1e-12)
        if row.kind == "memory":
            assert row.gbyte_per_s == pytest.approx(cases[row.case].bytes / row.time_us / 1e3, rel=1e-12)
        else:
            assert row.tflop_per_s == pytest.approx(cases[row.case].flops / row.time_us / 1e6, rel=1e-12)


def test_shapes_are_those_of_deepseek_v3() -> None:
    shapes = bench_cases.shapes(small=False)
    names = [shape.name for shape in shapes]
    assert len(set(names)) == len(names) == 8 + 8 + 16 + 8 + 8 + 16
    for name in (
        "fprop_M4096_N2112_K7168",
        "fprop_M4096_N32768_K512",
        "dgrad_M4096_N512_K32768",
        "dgrad_M4096_N7168_K36864",
        "wgrad_M36864_N7168_K4096_overwrite",
        "wgrad_M7168_N18432_K4096_accumulate",
        "grouped_fprop_G4_M32768_N4096_K7168",
        "grouped_dgrad_G32_M32768_N2048_K7168",
        "grouped_wgrad_G32_M7168_N2048_K32768_accumulate",
        "grouped_fprop_G8_uneven_M32768_N7168_K2048",
    ):
        assert name in names
    # One layer has six weights and its experts two: all three products of each, before time runs out.
    counted = Counter(shape.kind for shape in shapes[:24])
    assert counted == {kind: 2 if "grouped" in kind else 6 for kind in get_args(bench_cases.Kind)}
    assert all(shape.accumulate == shape.is_wgrad and shape.label in ("", "G8") for shape in shapes[:24])
    assert not any(dim in (36864, 18432) for shape in shapes[:24] for dim in (shape.m, shape.n, shape.k))
    for shape in [*shapes, *bench_cases.shapes(small=True)]:
        if shape.ends:
            rows = shape.k if shape.is_wgrad else shape.m
            sizes = [end - start for start, end in itertools.pairwise([0, *shape.ends])]
            assert all(size >= 0 and size % TILE == 0 for size in sizes)
            assert sum(sizes) == rows
            assert ("uneven" in shape.name) == (len(set(sizes)) > 1) == (0 in sizes)


def test_operands_are_exact_in_bf16_and_their_scales_differ() -> None:
    op = bench_cases.operands(Shape("fprop", 256, 300, 400), CPU)
    assert op.a.scale.unique().numel() == op.b.scale.unique().numel() == 4
    for values, by_hand in (
        (bench_cases.decode(op.a.payload, op.a.scale.t()), decode_tiles(op.a.payload, op.a.scale)),
        (bench_cases.decode_blocks(op.b.payload, op.b.scale), decode_blocks(op.b.payload, op.b.scale)),
    ):
        assert torch.equal(values, by_hand)
        assert torch.equal(values.bfloat16().double(), values)


def test_bytes_of_memory_bound_cases_are_those_of_their_tensors() -> None:
    for kernel in bench_traffic.memory_bound(small=True):
        inputs = bench_traffic.memory_inputs(kernel, CPU)
        moved = inputs.nbytes + sum(output.nbytes for output in kernel.run(*inputs.tensors))
        # Gates and their gradients, 8 bytes a row, and the scales of a short last tile are not counted.
        assert moved == pytest.approx(kernel.bytes, rel=0.02), kernel.name


@pytest.mark.parametrize("spoil", [lambda x: x * 1.01, lambda x: x * math.nan, lambda x: x[:-1]])
def test_a_wrong_peer_is_red_and_has_no_time(
    monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Tensor], Tensor]
) -> None:
    right = bench_peers.bf16

    def wrong(op: GemmOperands) -> bench_timing.Call:
        call = right(op)
        return lambda: (spoil(call()[0]),)

    monkeypatch.setattr(bench_peers, "bf16", wrong)
    found = measured("fprop", "wgrad", "grouped fprop")
    for (_, candidate), row in found.items():
        if "BF16" in candidate:
            assert row.status == "red"
            assert "parity error" in row.reason
            assert (row.time_us, row.tflop_per_s, row.ours_per_peer_ratio) == (None, None, None)
        if candidate == OURS:
            assert row.status == "measured"
    assert not bench_table.red(list(found.values()))


def test_a_wrong_operator_of_ours_is_red_and_fails_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_peers, "gemm_tile_block", lambda *a, **k: gemm_tile_block(*a, **k) * 1.01)
    monkeypatch.setattr(bench_peers, "gemm_tile_tile", lambda a, b, *, out, accumulate: gemm_tile_tile(a, b, out=out))
    found = list(measured("fprop", "wgrad").values())
    red = bench_table.red(found)
    # Of wgrad only the case that is to add: forgetting it leaves `=` right.
    assert [row.case.split("_")[-1] if row.kind == "wgrad" else row.kind for row in red] == ["fprop", "accumulate"]
    assert all(row.time_us is None for row in red)
    timed = [row for row in found if "BF16" in row.candidate]
    assert all(row.time_us is not None for row in timed)
    assert {row.ours_per_peer_ratio is None for row in timed if row.case in [r.case for r in red]} == {True}


def test_an_operator_of_ours_that_fails_is_red_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_peers, "gemm_tile_block", Mock(side_effect=RuntimeError("out of registers\nline 2")))
    (red,) = bench_table.red(list(measured("fprop").values()))
    assert red.reason == "RuntimeError: out of registers"


def test_two_runs_of_ours_must_agree_in_every_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = itertools.count()

    def unsteady(*args: Quantized, **options: torch.dtype) -> Tensor:
        out = gemm_tile_block(*args, **options)  # type: ignore[arg-type]
        out.view(torch.int16)[0, 0] += next(calls) % 2
        return out

    monkeypatch.setattr(bench_peers, "gemm_tile_block", unsteady)
    (red,) = bench_table.red(list(measured("fprop").values()))
    assert red.reason == "two runs differ in bits"
    assert red.parity_error <= bench_peers.BF16_TOLERANCE


def test_a_group_that_gets_the_weight_of_another_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(a: Quantized, b: Quantized, ends: Tensor, **options: torch.dtype) -> Tensor:
        return grouped_gemm_tile_block(a, Quantized(b.payload.roll(1, 0), b.scale), ends, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(bench_peers, "grouped_gemm_tile_block", shifted)
    found = measured("grouped fprop", "grouped dgrad")
    assert len(bench_table.red(list(found.values()))) == 2


def test_an_empty_group_that_is_not_written_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its output holds NaN before, and must hold zeros."""

    def skipping(a: Quantized, b: Quantized, ends: Tensor, *, out: Tensor, accumulate: bool) -> Tensor:
        old = out.clone()
        grouped_gemm_tile_tile(a, b, ends, out=out, accumulate=accumulate)
        empty = ends.diff(prepend=torch.zeros(1, dtype=ends.dtype)) == 0
        assert int(empty.sum()) > 0
        out[empty] = old[empty]
        return out

    monkeypatch.setattr(bench_peers, "grouped_gemm_tile_tile", skipping)
    (red,) = bench_table.red(list(measured("grouped wgrad").values()))
    assert red.case.endswith("overwrite")
    assert math.isnan(red.parity_error or 0.0)
    json.dumps(bench_table.records([red]), allow_nan=False)


def test_a_memory_bound_kernel_with_one_wrong_bit_is_red() -> None:
    (case,) = few("memory")
    right = case.candidates[0]

    def wrong(inputs: bench_traffic.MemoryInputs) -> bench_timing.Call:
        call = right.prepare(inputs)

        def run() -> tuple[Tensor, ...]:
            first, *rest = call()
            first[-1, -1] *= 8
            return first, *rest

        return run

    strict = Contender(OURS, wrong, 0.0, repeats=True)
    found = run([dataclasses.replace(case, candidates=(strict,))])
    assert [row.status for row in found] == ["red"]


def test_without_a_budget_everything_is_listed_as_not_measured() -> None:
    found = run(bench_peers.cases(), budget_s=0.0)
    assert [row.case for row in found] == [case.name for case in bench_peers.cases() for _ in case.candidates]
    assert {(row.status, row.reason) for row in found} == {("not measured", "the budget was spent")}
    text = bench_table.markdown(found)
    assert text.count("not measured: the budget was spent") == len(found)


def test_a_budget_that_ends_early_has_measured_some_of_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = Mock(return_value=[])
    monkeypatch.setattr(bench_table, "measure", measure)
    run(bench_peers.cases(small=True))
    assert {call.args[0].kind for call in measure.call_args_list[: len(KINDS)]} == set(KINDS)


def test_a_case_that_does_not_fit_in_memory_is_not_measured() -> None:
    make = Mock(side_effect=torch.OutOfMemoryError("tried to allocate 3 TiB"))
    case = dataclasses.replace(few("fprop")[0], make=make)
    found = run([case])
    assert {row.status for row in found} == {"not measured"}
    assert all("3 TiB" in row.reason for row in found)


def test_markdown_holds_every_row_and_the_medians(rows: list[Row]) -> None:
    text = bench_table.markdown(rows)
    lines = text.splitlines()
    for row in rows:
        assert len([line for line in lines if line.startswith(f"| {row.case} | {row.candidate} |")]) == 1
    assert all(line.count(" | ") == 9 for line in lines if line.startswith("| "))
    assert [line[4:] for line in lines if line.startswith("###")] == list(dict.fromkeys(row.kind for row in rows))
    assert "- ours / torch.mm BF16: median" in text
    planted = Row("c", "fprop", "peer", "red", "a | b", parity_error=0.5, tolerance=0.1)
    assert "| c | peer | 5.0e-01 | 1.0e-01 | - | - | - | - | - | RED: a / b |" in bench_table.markdown([planted])


def test_records_survive_json(rows: list[Row]) -> None:
    assert json.loads(json.dumps(bench_table.records(rows), allow_nan=False)) == bench_table.records(rows)


def scaled_mm_stand_in(
    a: Tensor, b: Tensor, a_scale: Tensor, recipe_a: object, b_scale: Tensor, recipe_b: object, **options: object
) -> Tensor:
    """The product of torch's block scaling, for the layouts that its CUDA version accepts (torch 2.13, ScaledBlas)."""
    (m, k), n = a.shape, b.shape[1]
    tiles = ceil_div(k, TILE)
    assert (a.stride(1), b.stride(0)) == (1, 1)
    assert k % 16 == n % 16 == 0
    assert recipe_a == F.ScalingType.BlockWise1x128
    assert (a_scale.shape, a_scale.stride(0)) == ((m, tiles), 1)
    assert tiles == 1 or a_scale.stride(1) == m
    dtype = options["output_dtype"]
    assert isinstance(dtype, torch.dtype)
    x = decode_tiles(a, a_scale.t())
    if recipe_b == F.ScalingType.BlockWise1x128:
        assert (b_scale.shape, b_scale.stride(0)) == ((n, tiles), 1)
        assert tiles == 1 or b_scale.stride(1) == n
        return (x @ decode_tiles(b.t(), b_scale.t()).t()).to(dtype)
    assert recipe_b == F.ScalingType.BlockWise128x128
    padded = ceil_div(tiles, 4) * 4
    assert (b_scale.shape, b_scale.stride()) == ((padded, ceil_div(n, TILE)), (1, padded))
    return (x @ decode_blocks(b.t(), b_scale.t()[:, :tiles]).t()).to(dtype)


def test_scaled_mm_gets_the_layouts_it_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "scaled_mm", scaled_mm_stand_in)
    mine = []
    for case in bench_peers.cases(small=True):
        candidates = tuple(each for each in case.candidates if each.name.startswith("F.scaled_mm"))
        mine += run([dataclasses.replace(case, candidates=candidates)]) if candidates else []
    assert len(mine) == 32
    assert {(row.status, row.reason) for row in mine} == {("measured", "")}


def test_deep_gemm_gets_the_layouts_it_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deep_gemm", DeepGemm())  # type: ignore[arg-type]
    for (case, candidate), row in measured(*KINDS).items():
        if candidate == "DeepGEMM" and case.endswith("overwrite"):
            assert row.status == "absent"
            assert "always adds" in row.reason
        elif candidate == "DeepGEMM":
            assert (row.status, row.reason) == ("measured", ""), row


# Launched where a run is not in FP8, or its heads do not split into tiles; and a sum of a few partial sums.
NOT_IN_FP8 = {"swiglu", "swiglu_backward", "gated_swiglu", "gated_swiglu_backward", "turn_back", "norm_gain_gradient"}
# Bytes that a call needs for a token and head, or an element, over those of its inputs and outputs: the rest is not
# touched (plain dims of queries, rotary dims of keys, the old weight).
PARTLY = {
    "heads_forward": 896 + 32 + 64, "heads_quantize_both": 1040, "rope_key_backward": 128 + 32 + 64, "adamw": 22,
}  # fmt: skip
WHOLE = {"heads_forward": 1760, "heads_quantize_both": 1168, "rope_key_backward": 480, "adamw": 24}


def test_every_memory_bound_launcher_has_a_row_whose_bytes_are_its_tensors() -> None:
    kernels = [*bench_traffic.memory_bound(small=True), *bench_fused.fused(small=True)]
    rooms = ("adamw", "gather", "heads", "quantize", "rmsnorm", "swiglu")
    launchers = {name for name, module in LAUNCHERS.items() if module.rpartition(".")[2] in rooms}
    assert {kernel.name.removesuffix(" gated") for kernel in kernels} == launchers - NOT_IN_FP8
    for kernel in kernels:
        inputs = bench_traffic.memory_inputs(kernel, CPU)
        counted = inputs.nbytes + sum(output.nbytes for output in kernel.run(*inputs.tensors))
        share = PARTLY.get(kernel.name, 1) / WHOLE.get(kernel.name, 1)
        # Gates, roots and gains are left out, and slots of a gather are half read.
        assert kernel.bytes / counted == pytest.approx(share, rel=0.011), kernel.name


def test_what_works_in_place_begins_anew_for_each_comparison() -> None:
    (kernel,) = (each for each in bench_fused.fused(small=True) if each.name == "adamw")
    inputs = bench_traffic.memory_inputs(kernel, CPU)
    first = [output.clone() for output in kernel.run(*inputs.tensors)]
    assert not torch.equal(kernel.run(*inputs.tensors)[0], first[0])
    inputs.reset()
    assert all(map(torch.equal, kernel.run(*inputs.tensors), first))


def test_candidates_take_turns_and_walk_through_all_sets() -> None:
    seen: list[str] = []

    def call(name: str) -> bench_timing.Call:
        def run() -> tuple[Tensor, ...]:
            seen.append(name)
            return (torch.zeros(1),)

        return run

    clock = bench_timing.Clock(rounds=5, replay_s=0.0)
    loops = {name: bench_timing.build_loop([call(f"{name}{i}") for i in range(3)], CPU, clock=clock) for name in "ab"}
    seen.clear()
    timings = bench_timing.time_in_turns(loops, CPU, clock=clock, deadline_s=math.inf)
    assert [(loop.launches, timings[name].rounds) for name, loop in loops.items()] == [(3, 5), (3, 5)]
    # An untimed and a timed pass over the three sets in every round, for both before either comes again.
    visits = ["".join(seen[i : i + 6]) for i in range(0, len(seen), 6)]
    assert set(visits) == {"a0a1a2" * 2, "b0b1b2" * 2}
    assert all(len(set(visits[i : i + 2])) == 2 for i in range(0, 10, 2))
    assert len({tuple(visits[i : i + 2]) for i in range(0, 10, 2)}) == 2
    late = bench_timing.time_in_turns(loops, CPU, clock=clock, deadline_s=-math.inf)
    assert {timing.rounds for timing in late.values()} == {bench_timing.FEWEST_ROUNDS}


def test_on_a_gpu_the_timed_launches_are_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against stand-ins of torch's graph and events: an event reads 2 ms more at each record."""
    done: list[str] = []
    clock = itertools.count(step=2)

    class Event:
        def record(self) -> None:
            self.ms = next(clock)

        def elapsed_time(self, end: Event) -> float:
            return float(end.ms - self.ms)

    graph = SimpleNamespace(replay=lambda: done.append("replay"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event())
    stream = SimpleNamespace(synchronize=lambda: done.append("wait"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    loop = bench_timing.build_loop([lambda: ()] * 2, torch.device("cuda"), clock=bench_timing.Clock())
    # The trial's four passes take 2 ms, so eight fill 4 ms.
    assert loop.launches == 2 * 8
    done.clear()
    assert bench_timing.elapsed_s(loop.run, torch.device("cuda")) == 2e-3
    assert done == ["replay", "wait"]


def test_input_sets_are_two_or_as_many_as_leave_the_cache_cold() -> None:
    clock = bench_timing.Clock(cold_bytes=200e6)
    assert [clock.input_sets(size) for size in (1_000_000_000, 100_000_000, 61_000_000, 1)] == [2, 2, 4, 200_000_000]


def test_power_monitor_takes_medians_and_lives_without_its_program() -> None:
    with bench_timing.PowerMonitor([sys.executable, "-c", "print('612.50, 1590')"]) as monitor:
        pass
    assert monitor.power == bench_timing.Power(612.5, 1590.0)
    for command in ([], ["no-such-program"], [sys.executable, "-c", "print('[N/A], 1590')"]):
        with bench_timing.PowerMonitor(command) as monitor:
            pass
        assert monitor.power is None
    assert bench_timing.sampler_command(CPU) == []


def test_power_and_clock_reach_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_table, "sampler_command", lambda _: [sys.executable, "-c", "print('500, 1700')"])
    found = [row for row in measured("fprop").values() if row.time_us is not None]
    assert {(row.power_w, row.sm_clock_mhz) for row in found} == {(500.0, 1700.0)}
    assert "500 W, 1700 MHz" in bench_table.markdown(found)
