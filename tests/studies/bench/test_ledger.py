"""The ledger of a layer: what counts, that nothing hides behind an operator's name, and that the totals only fall."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton", reason="Triton exists on Linux only; CI runs this file")

from triton.runtime import interpreter

from kernels.cross_entropy import linear_cross_entropy_sum
from kernels.operators import LAUNCHERS
from launch import bench
from parallel import grads
from parallel.mesh import single
from parallel.zero import GradientBuckets
from tests.gpu import launcher_cases
from tests.gpu.launcher_cases import operator
from train.config import PretrainConfig, compose
from train.model.attention import RopeTables
from train.model.block import DenseBlock
from train.model.precision import Precision
from train.model.sizes import Held, weights
from train.studies.bench import counted, launches
from train.studies.bench import ledger as bench_ledger
from train.studies.bench.ledger import LAYERS, PRECISIONS, Entry, Ledger
from train.studies.bench.minimum import minimum_bytes
from train.studies.plan.dry_run import as_rank
from train.studies.plan.kept import Work, attention_kept, moe_kept
from train.studies.plan.live_bytes import LiveBytes
from train.studies.plan.tables import read_tables

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "kernels.md"
BEGIN, END = "<!-- ledger: begin -->\n", "\n<!-- ledger: end -->"
BF16 = torch.bfloat16
# Launches, bytes read and written, bytes kept for backward by all tokens. A fusion lowers its row in its own commit.
CEILINGS = {
    ("moe", "fp8"): (79, 20_113_325_372, 1_133_046_352),
    ("moe", "bf16"): (95, 27_407_219_176, 2_024_090_192),
    ("dense", "fp8"): (48, 15_304_595_956, 1_097_924_624),
    ("dense", "bf16"): (60, 18_946_785_312, 1_529_413_648),
}
# Bytes that a rank of h800_2048 keeps a token in a MoE layer.
KEPT_BY_A_RANK = 157_512.3


@pytest.fixture(scope="module")
def ledgers() -> list[Ledger]:
    return [bench_ledger.ledger(layer, precision) for layer in LAYERS for precision in PRECISIONS]


@pytest.fixture(scope="module")
def ledger_of_a_rank() -> Ledger:
    return bench_ledger.cluster_ledger("h800_2048")


def test_the_document_shows_todays_ledger(ledgers: list[Ledger]) -> None:
    shown = DOCUMENT.read_text().partition(BEGIN)[2].partition(END)[0]
    assert "\n\n".join(map(bench_ledger.by_operation, ledgers)) == shown, (
        "put the output of `python -m launch.bench ledger --summary` into docs/kernels.md"
    )


def test_the_totals_only_fall(ledgers: list[Ledger]) -> None:
    for found in ledgers:
        totals = found.launches, found.bytes, sum(each.num_bytes for each in found.kept)
        assert all(np.less_equal(totals, CEILINGS[found.layer, found.precision])), (
            found.layer,
            found.precision,
            totals,
        )


def test_written_gradients_spare_one_read_of_each_weights_sum(ledgers: list[Ledger]) -> None:
    """4 bytes a weight: FP8 products, and the sums of the others, write where they would read and write."""
    for found in ledgers:
        config, _ = bench_ledger.sizes()
        config = config if found.layer == "moe" else replace(config, first_k_dense_replace=1)
        held = weights(config, Held((0,), embedding=False, head=False), ep=1)
        assert found.first_bytes is not None
        elements = sum(each.elements for each in held if each.trained)
        assert found.bytes - found.first_bytes == 4 * elements, found.layer


def test_every_entry_has_a_line_and_a_known_operation(ledgers: list[Ledger]) -> None:
    known = {name for _, name in bench_ledger.OPERATIONS}
    for entry in (entry for found in ledgers for entry in found.entries):
        assert entry.operation in known, entry
        assert entry.line.startswith(("train/model/", "parallel/")), entry


def test_what_is_at_its_minimum_is_counted_so(ledgers: list[Ledger]) -> None:
    """Two ways to the same bytes: shapes in closed form, and every launch of the dense layer, which has no padding."""
    config, tokens = bench_ledger.sizes()
    with torch.device("meta"):
        block = DenseBlock(config, Precision("bf16"), RopeTables(config))
    matrices = sum(weight.numel() for weight in block.parameters() if weight.dim() == 2)
    for found in ledgers[2:]:
        least = minimum_bytes(config, tokens, moe=False, fp8=found.precision == "fp8")

        def counted(operation: str, entries: Sequence[Entry] = found.entries) -> int:
            return sum(e.read_bytes + e.written_bytes for e in entries if e.operation == operation)

        # `+=` reads the FP32 sums once more. The short last tile of 2,112 columns has a scale of its own.
        assert counted("GEMM") - 4 * matrices == pytest.approx(least["GEMM"], rel=2e-4)
        # Seeds.
        assert counted("attention core") == pytest.approx(least["attention core"], rel=1e-7)
        assert found.bytes > sum(least.values())


# As docs/numerics.md names what the closed form lists.
KEPT = (
    "the layer's input, BF16", "sum of it and attention, BF16", "1 / RMS of both norms, FP32",
    "latents and RoPE key, BF16", "output of attention, E5M6", "log-sums of attention, FP32, and its seeds",
    "router: scores, FP32, ids, shares of the experts", "exchange: which token each copy is, and back",
    "grouping: slots, rows of a token, gates, ends", "packets of tokens that arrived, FP8",
    "gate and up of experts, FP8", "gate and up of the shared expert, FP8",
)  # fmt: skip


def kept_of_a_rank(config: PretrainConfig) -> dict[str, tuple[float, ...]]:
    """The planner's closed form: bytes of each storage that a MoE layer keeps; with attention's seeds."""
    work = Work(
        config.model, config.run.micro_batch_sequences, config.data.sequence_length, config.layout.ep,
        config.precision.name, config.run.recompute, config.precision.attention_output == "e5m6",
        ranks_per_node=config.layout.ranks_per_node if config.layout.two_hops else None,
    )  # fmt: skip
    kept = dict(zip(KEPT, [*attention_kept(work).values(), *moe_kept(work).values()], strict=True))
    seeded = "log-sums of attention, FP32, and its seeds"
    return {**kept, seeded: (sum(kept[seeded]), 8, 8)}


def test_the_planner_has_todays_bytes_of_a_rank_of_h800_2048(ledger_of_a_rank: Ledger) -> None:
    """Phase by phase; `python -m train.studies.bench.counted` writes them. Nothing is lost: what is left is timed."""
    tokens, entries = ledger_of_a_rank.tokens, ledger_of_a_rank.entries
    moved, launches = counted.by_phase(entries)
    rows = read_tables().rows
    for phase, count in launches.items():
        value = rows[f"moe fp8 recompute e5m6, {counted.by_node(phase)}"].value
        assert isinstance(value, tuple), phase
        by_hidden, others, fixed, known = value
        # Rounded to 0.1 bytes a token.
        assert tokens * (by_hidden + others) + fixed == pytest.approx(moved[phase], abs=0.1 * tokens + 1), phase
        assert known == count, phase
    assert sum(launches.values()) == ledger_of_a_rank.launches
    timed = [entry for entry in entries if counted.TIMED.fullmatch(entry.name)]
    assert sum(moved.values()) + sum(e.read_bytes + e.written_bytes for e in timed) == ledger_of_a_rank.bytes
    # Eight linears three times, both up-projections again; the router's three; attention; counts, six over two hops.
    assert len(timed) == 3 * 8 + 2 + 3 + 2 + 1 + 2 * 6
    # A weight gradient is deferred, and nothing else but what makes its operands.
    deferred = [entry for entry in entries if entry.deferred]
    assert len([entry for entry in deferred if counted.TIMED.fullmatch(entry.name)]) == 8 + 1
    assert {entry.phase for entry in deferred} == {"backward"}


def test_a_rank_of_h800_2048_keeps_what_the_closed_form_says(ledger_of_a_rank: Ledger) -> None:
    """To the byte, storage by storage; the document shows it by tensor. The plan counts all but cuDNN's seeds."""
    config = compose(["+cluster=h800_2048"])
    predicted, tokens = kept_of_a_rank(config), config.data.sequence_length
    found = ledger_of_a_rank
    counted = sorted(each.num_bytes for each in found.kept)
    assert counted == sorted(each for storages in predicted.values() for each in storages)
    assert found.kept_bytes_per_token < KEPT_BY_A_RANK + 0.05
    rows = [f"| {name} | {sum(storages) / tokens:,.1f} |" for name, storages in predicted.items()]
    table = "\n".join([*rows, f"| **all** | {found.kept_bytes_per_token:,.1f} |"])
    assert table in (DOCUMENT.parent / "numerics.md").read_text(), f"docs/numerics.md should show\n{table}"

    shape = (1, tokens, config.model.hidden_size)
    with as_rank(config, 0) as mesh, FakeTensorMode(), LiveBytes() as live:
        block = bench_ledger.block_of_rank(config, mesh)
        for _ in range(2):
            before = live.now
            ends = bench_ledger.forward(block, shape, BF16)
            planned = live.now - before
            del ends
    # The seeds of cuDNN's attention, 8 bytes each.
    assert sum(counted) - planned == 16


@pytest.mark.parametrize("tokens", [4096, 4095])
def test_head_and_loss_are_four_launches_a_chunk(tokens: int) -> None:
    """At V3's size: logits are written twice and read three times, 2,048 tokens at once; dW is added to in FP32."""
    h, vocab, chunks = 7168, 129280, 2
    with FakeTensorMode(allow_non_fake_inputs=True):
        weight = torch.nn.Parameter(torch.empty(vocab, h, dtype=BF16))
        weight.main_grad = torch.empty(vocab, h)  # type: ignore[attr-defined]
        labels = torch.empty(tokens, dtype=torch.int64)
        head = lambda x, _: (linear_cross_entropy_sum(x, weight, labels), None)  # noqa: E731
        entries, kept = bench_ledger.trace(head, (tokens, h), BF16)
    large = [e for e in entries if e.read_bytes + e.written_bytes > 1e6]
    assert [e.name for e in large] == ["mm.out", "_cross_entropy_kernel", "mm.out", "addmm.dtype_out"] * chunks
    x, logits, sums = 2 * h * tokens, 2 * vocab * tokens, 4 * vocab * h
    assert sum(e.read_bytes for e in large) == 2 * x + 3 * logits + chunks * (2 * 2 * vocab * h + sums) + 8 * tokens
    assert sum(e.written_bytes for e in large) == 2 * logits + x + chunks * sums + 4 * tokens
    # Of the labels' check, and the sum of the losses.
    assert sum(e.launches for e in entries) == len(large) + 7 + 2 + 1
    assert [each.num_bytes for each in kept] == [x]


def test_the_norm_is_one_launch_a_bucket() -> None:
    """4 bytes an element, and 8 for 16,384 of them; beside that the partial sums' sum, its root and its rounding."""
    axis = single(torch.device("cpu")).dp
    with FakeTensorMode():
        parameters = [(name, torch.nn.Parameter(torch.empty(1 << 20))) for name in "abcdef"]
        buckets = GradientBuckets(parameters, axis=axis, sharded=False, bucket_bytes=1 << 23)

        def norm(_: Tensor) -> object:
            return grads._global_norm([buckets], axis)

        entries, _ = bench_ledger.trace(lambda x, _: (Ran.apply(x, norm), None), (1, 1), BF16)
    found = [(e.name, e.read_bytes, e.written_bytes) for e in entries if e.phase == "forward"]
    assert found[1:4] == [("_sums_of_squares_kernel", 1 << 23, 8 * 128)] * 3
    assert [name for name, *_ in found[4:]] == ["cat", "sum", "sqrt", "_to_copy"]
    assert found[0][0] == "zeros"


# ---- what counts


class Ran(torch.autograd.Function):
    """Runs something in forward, and the same on the gradient in backward; its own results are empty memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], object]) -> Tensor:
        ctx.function = function
        function(x)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.function(grads[0])
        return torch.empty_like(grads[0]), None


def traced(function: Callable[[Tensor], object], shape: Sequence[int] = (256, 512)) -> Sequence[Entry]:
    """The entries of something that runs in forward and in backward."""
    with FakeTensorMode():
        return bench_ledger.trace(lambda x, _: (Ran.apply(x, function), None), shape, BF16)[0]


def totals(entries: Sequence[Entry]) -> tuple[int, int, int]:
    columns = ((e.launches, e.read_bytes, e.written_bytes) for e in entries if e.phase == "forward")
    launched, read, written = np.sum([(0, 0, 0), *columns], axis=0).tolist()
    return launched, read, written


ROW, ALL = 2 * 512, 2 * 512 * 256


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x.view(-1)[:7].unsqueeze(0).t().expand(7, 3).detach(), (0, 0, 0)),
        (lambda x: x.t().contiguous(), (1, ALL, ALL)),
        (lambda x: x + x[:1].expand_as(x), (1, ALL + ROW, ALL)),
        (lambda x: torch.add(x, x, out=torch.empty_like(x)), (1, ALL, ALL)),
        (lambda x: torch.add(y := torch.empty_like(x), x, out=y), (1, 2 * ALL, ALL)),
        (lambda x: torch.empty_like(x).copy_(x).mul_(2), (2, 2 * ALL, 2 * ALL)),
        (lambda x: (torch.zeros_like(x), x.new_ones(512)), (2, 0, ALL + ROW)),
        (lambda x: x.index_select(0, torch.empty(3, dtype=torch.int64)), (1, 3 * ROW + 24, 3 * ROW)),
        (lambda x: F.pad(x, (0, 512)), (2, ALL, 2 * ALL)),
        # A launcher that copies before it launches.
        (lambda x: operator("quantize_tiles")(x.t(), True), (2, 2 * ALL, ALL + ALL // 2 + 512 * 2 * 4)),
        # One that launches four times: a fill, then over 256 x 2 ids, 8 experts and 1,024 rows.
        (
            lambda x: operator("lay_out")(torch.empty(256, 2, dtype=torch.int64), 8, 1024),
            (4, 2 * 4096 + 96, 2 * 8192 + 4096 + 128),
        ),
    ],
)
def test_a_launch_counts_with_the_tensors_that_it_touches(
    function: Callable[[Tensor], object], expected: tuple[int, int, int]
) -> None:
    assert totals(traced(function)) == expected


def chain(x: Tensor) -> Tensor:
    """An RMSNorm in seven operators of torch."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


PLANTED = torch.library.Library("planted_in_the_ledger", "FRAGMENT")


@pytest.mark.parametrize("key", ["CUDA", "CompositeExplicitAutograd", "CompositeImplicitAutograd"])
def test_a_chain_that_is_registered_as_one_operator_counts_as_the_chain(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    PLANTED.define(f"{key}(Tensor x) -> Tensor")
    PLANTED.impl(key, chain, key)
    if key != "CompositeImplicitAutograd":
        torch.library.register_fake(f"planted_in_the_ledger::{key}", torch.empty_like, lib=PLANTED)
    planted = getattr(torch.ops.planted_in_the_ledger, key)
    expected = traced(chain)
    assert len(expected) == 14
    assert [vars(e) for e in traced(planted)] == [vars(e) for e in expected]
    # Counted as one dispatch it would be far too cheap, and the comparison above red.
    monkeypatch.setattr(bench_ledger, "_inside", lambda _: None)
    assert key == "CompositeImplicitAutograd" or totals(traced(planted)) == (1, ALL, ALL)


def test_an_operator_whose_inside_cannot_be_seen_is_an_error() -> None:
    PLANTED.define("opaque(Tensor x) -> Tensor")
    torch.library.register_fake("planted_in_the_ledger::opaque", torch.empty_like, lib=PLANTED)
    with pytest.raises(ValueError, match="cannot see inside the operator planted_in_the_ledger::opaque"):
        traced(torch.ops.planted_in_the_ledger.opaque)


class Keeping(torch.autograd.Function):
    """Keeps one tensor twice as views, one as an attribute, its input or output if wanted, and lets one go."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, besides: str) -> Tensor:
        twice, ctx.attribute, _ = x * 2, (x + 1).float(), x * 3
        y = torch.neg(x)
        ctx.save_for_backward(twice[:3], twice.t(), *{"input": [x], "output": [y], "": []}[besides])
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * 2, None


@pytest.mark.parametrize("besides", ["", "input", "output"])
def test_kept_is_each_storage_once_that_is_alive_after_forward(besides: str) -> None:
    with FakeTensorMode():
        _, kept = bench_ledger.trace(lambda x, _: (Keeping.apply(x, besides), None), (256, 512), BF16)
    expected = {("mul.Tensor", ALL), ("_to_copy", 2 * ALL)}
    expected |= {"input": {("the layer's input", ALL)}, "output": {("neg", ALL)}, "": set()}[besides]
    assert {(each.name or each.operation, each.num_bytes) for each in kept} == expected
    assert len(kept) == len(expected)


# ---- what a kernel touches

# These touch a part, which part is in their values: padding rows, empty groups, experts that nobody chose.
PARTLY = {
    "_rows_kernel", "_contraction_kernel", "_sum_rows_kernel", "_place_kernel", "_route_kernel",
}  # fmt: skip


@pytest.mark.parametrize("name", launcher_cases.CASES)
def test_a_kernel_touches_what_its_source_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The addresses that Triton's interpreter loads and stores, all programs together, are the derived tensors'."""
    addresses: dict[str, list[tuple[int, np.ndarray]]] = {"read": [], "written": []}
    found: list[launches.Launch] = []

    def noting(method: str, *kinds: str, mask_at: int) -> None:
        original = getattr(interpreter.InterpreterBuilder, method)

        def access(self: Any, *args: Any) -> Any:
            pointers, mask = args[mask_at - 2 if method == "create_atomic_rmw" else 0], args[mask_at]
            size = pointers.get_element_ty().primitive_bitwidth // 8
            for kind in kinds:
                addresses[kind].append(
                    (size, np.unique(pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]))
                )
            return original(self, *args)

        monkeypatch.setattr(interpreter.InterpreterBuilder, method, access)

    noting("create_masked_load", "read", mask_at=1)
    noting("create_masked_store", "written", mask_at=2)
    noting("create_atomic_rmw", "read", "written", mask_at=3)
    launch = interpreter.InterpretedFunction.run

    def run(kernel: Any, *args: Any, **options: Any) -> None:
        named = {each: options[each] for each in kernel.arg_names if each in options}
        derived = launches.launch_of(kernel, args, named)
        for each in addresses.values():
            each.clear()
        launch(kernel, *args, **options)
        found.append(derived)
        for kind, tensors in (("read", derived.read), ("written", derived.written)):
            sizes = {size for size, _ in addresses[kind]}
            touched = sum(
                size * len(np.unique(np.concatenate([a for s, a in addresses[kind] if s == size]))) for size in sizes
            )
            bound = launches.touched_bytes(tensors)
            assert touched == bound or (0 < touched < bound and derived.kernel in PARTLY), (derived.kernel, kind)

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", run)
    # A GEMM's other width; small, for the interpreter is slow.
    monkeypatch.setattr(launcher_cases, "other", lambda _: 192)
    monkeypatch.setattr(launcher_cases, "EXPERTS", 8)
    arguments = launcher_cases.CASES[name].make(63, 192)
    getattr(importlib.import_module(LAUNCHERS[name]), name)(*arguments)
    assert found


M, N, K, GROUPS = 512, 384, 1024, 2


@pytest.mark.parametrize(
    ("call", "read", "written"),
    [
        # Operands and scales, then the product; of groups of rows also their ends; of `+=` also the sums.
        ("rows", M * K + N * K + 4 * (K // 128 * M + N // 128 * K // 128), 2 * M * N),
        ("groups", M * K + GROUPS * (N * K + N // 128 * K // 128 * 4 + 4) + 4 * K // 128 * M, 2 * M * N),
        ("=", (M + N) * (K + 4 * K // 128), 4 * M * N),
        ("+=", (M + N) * (K + 4 * K // 128) + 4 * M * N, 4 * M * N),
    ],
)
def test_the_hopper_gemm_touches_operands_scales_and_sums(call: str, read: int, written: int) -> None:
    from kernels.gpu import gemm_fp8

    def tiles(rows: int) -> tuple[Tensor, Tensor]:
        return torch.empty(rows, K, dtype=torch.float8_e4m3fn), torch.empty(K // 128, rows)

    def run(_: Tensor) -> None:
        if call in ("=", "+="):
            gemm_fp8.gemm_tile_tile(*tiles(M), *tiles(N), torch.empty(M, N), call == "+=")
            return
        groups = (GROUPS,) if call == "groups" else ()
        weight = torch.empty(*groups, N, K, dtype=torch.float8_e4m3fn), torch.empty(*groups, N // 128, K // 128)
        ends = torch.empty(GROUPS, dtype=torch.int32) if groups else None
        gemm_fp8.grouped_gemm_tile_block(*tiles(M), *weight, ends, BF16)

    entries = traced(run)
    assert {entry.name for entry in entries} == {"_gemm_kernel"}
    assert totals(entries) == (1, read, written)


def test_the_command_lists_lines_and_tensors(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["bench", "ledger", "--layer", "dense", "--precision", "bf16"])
    assert bench.main() == 0
    shown = capsys.readouterr().out
    assert "dense layer, bf16" in shown
    assert "moe layer" not in shown
    assert "| kernels/attention.py:" in shown
    assert "| _add_norm_quantize_kernel, norm | 58.7 |" in shown


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--cluster", "h800"], "did you mean +cluster=h800_2048?"),
        (["--cluster", "h800_2048", "--layer", "moe"], "leave out --layer and --precision"),
    ],
)
def test_a_mistake_is_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["bench", "ledger", *arguments])
    assert bench.main() == 2
    shown = capsys.readouterr()
    assert sentence in shown.err
    assert not shown.out
    assert shown.err.count("\n") == 1
