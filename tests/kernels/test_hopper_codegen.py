"""Every kernel in every shipped configuration compiles for sm_90a, under both Tritons, into the code that we want.

Compiling needs no GPU (`tests/kernels/hopper_codegen.py`). A process of its own for each Triton: they cannot share one,
and this one interprets. The table of docs/kernels.md is that of the first; a change of a kernel changes it in the same
commit. `make test` compiles one case at least of each kernel, `make test-long` all.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.stand_in_driver import SHARED_BYTES_MAX

ROOT = Path(__file__).resolve().parents[2]
TRITONS = {"3.7": None, "3.6": ROOT / ".venv" / "triton-3.6"}
KNOWN_TO_SPILL = "wgrad += 7168 x 2048 x 4096: two_blocks 128x128"
Command = Callable[..., subprocess.CompletedProcess[str]]
# Kernels that move matrices.
BY_MATRIX = {
    "_quantize_tiles_kernel", "_quantize_tiles_transposed_kernel", "_quantize_tiles_both_kernel",
    "_requantize_transposed_kernel", "_quantize_blocks_kernel", "_dequantize_tiles_kernel", "_swiglu_kernel",
    "_swiglu_backward_kernel", "_swiglu_quantize_kernel", "_swiglu_quantize_transposed_kernel",
    "_pack_e5m6_kernel", "_unpack_e5m6_kernel", "_quantize_pack_kernel", "_unpack_quantize_transposed_kernel",
    "_rows_kernel", "_contraction_kernel", "_copy_tokens_kernel",
    "_sum_rows_kernel", "_route_kernel", "_route_backward_kernel", "_split_product_kernel", "_router_dgrad_kernel",
    "_add_norm_quantize_kernel", "_norm_backward_kernel", "_heads_forward_kernel", "_turn_back_kernel",
    "_turn_back_quantize_both_kernel", "_heads_quantize_both_kernel",
    "_swiglu_backward_quantize_both_kernel", "_gather_tiles_kernel", "_gather_requantize_transposed_kernel",
    "_gather_quantize_both_kernel", "_quantize_range_kernel", "_transpose_blocks_kernel",
    "_cross_entropy_kernel",
}  # fmt: skip
TABLE_BEGIN, TABLE_END = "<!-- table: begin -->\n", "\n<!-- table: end -->"


def compile_all(run_command: Command, beside: Path | None, cache: Path, *arguments: str) -> dict[str, Any]:
    """The report of hopper_codegen.py under one Triton."""
    paths = [str(path) for path in (beside, ROOT) if path is not None]
    done = run_command(
        "-m", "tests.kernels.hopper_codegen", "--json", *arguments, timeout_s=3600,
        PYTHONPATH=os.pathsep.join(paths), TRITON_CACHE_DIR=str(cache), TRITON_INTERPRET="0",
    )  # fmt: skip
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def compare_with_document(report: dict[str, Any]) -> None:
    """Each row of a report is in the table of docs/kernels.md, which has a row of every case and no other."""
    document = (ROOT / "docs" / "kernels.md").read_text()
    _, _, *shown = document.partition(TABLE_BEGIN)[2].partition(TABLE_END)[0].splitlines()
    _, _, *rows = report["table"].splitlines()
    cure = "put the output of `python -m tests.kernels.hopper_codegen` into docs/kernels.md"
    assert [row for row in rows if row not in shown] == [], f"the compiler makes other code than is shown: {cure}"
    assert {row.split(" | ")[0].removeprefix("| ").removesuffix(" (tried)") for row in shown} == {*report["cases"]}, (
        cure
    )


# The older Triton in `make test-long`: a minute and a half, for the same kernels and all that ships.
@pytest.fixture(scope="module", params=["3.7", pytest.param("3.6", marks=pytest.mark.long)])
def compiled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, run_command: Command
) -> list[dict[str, Any]]:
    """Figures of one case at least of each kernel."""
    beside = TRITONS[request.param]
    if beside is not None and not beside.is_dir():
        pytest.skip(
            f"no Triton {request.param} in {beside.relative_to(ROOT)}: run `make test-long`, which puts it there"
        )
    part = "first" if beside is None else "all"
    report = compile_all(run_command, beside, tmp_path_factory.mktemp("triton"), "--part", part)
    assert report["triton"].startswith(request.param)
    rows: list[dict[str, Any]] = report["rows"]
    if beside is None:
        compare_with_document(report)
    return rows


def shipped(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["shipped"]]


def test_nothing_spills_and_everything_fits(compiled: list[dict[str, Any]]) -> None:
    """But for one that was tried; were it not found to spill, the count would be broken."""
    assert all(row["shared_bytes"] <= SHARED_BYTES_MAX for row in compiled)
    (spilling,) = (row for row in compiled if row["spills"])
    assert not spilling["shipped"]
    assert spilling["case"].startswith(KNOWN_TO_SPILL)


@pytest.mark.long
def test_other_constants_and_what_was_tried_compile_alike(tmp_path: Path, run_command: Command) -> None:
    """The cases that `compiled` leaves out, so that the document's whole table is compared."""
    report = compile_all(run_command, None, tmp_path, "--part", "rest")
    compare_with_document(report)
    rows = report["rows"]
    assert all(row["shared_bytes"] <= SHARED_BYTES_MAX and not row["spills"] for row in rows)
    check_products(rows)
    check_widths(shipped(rows))


def check_products(rows: list[dict[str, Any]]) -> None:
    """Eight instructions per 128 of the contraction and 256 rows, two barriers; what is portable has some too."""
    for row in rows:
        if row["kernel"] in ("_gemm_kernel", "_split_gemm_kernel"):
            assert row["tensor_core"] > 0, row["case"]
            assert row["loop_tensor_core"] in ((4, 8) if row["shipped"] else (4, 8, 16)), row["case"]
            assert row["tma"] >= 3, row["case"]
            # Before the hand-back and before the next wait; with fewer, look at the leads of docs/kernels.md.
            assert row["loop_barriers"] == 2, row["case"]
        elif row["case"].startswith("portable"):
            assert row["tensor_core"] > 0


def test_fp8_products_run_on_fp8_tensor_cores(compiled: list[dict[str, Any]]) -> None:
    """Eight per 128 of the contraction and 256 rows: 64 x 128 x 32 each; and a loop without calls or local memory."""
    kernels = Counter(row["kernel"] for row in compiled)
    assert kernels["_gemm_kernel"] >= 6
    assert kernels["_rows_kernel"] >= 2
    check_products(compiled)


def test_the_router_runs_on_bf16_tensor_cores(compiled: list[dict[str, Any]]) -> None:
    """Three products of 64 terms each: four instructions a warp group; the FP32 operand is never stored again."""
    router = [row for row in shipped(compiled) if row["kernel"] in ("_split_product_kernel", "_router_dgrad_kernel")]
    assert [row["loop_tensor_core"] for row in router] == [12, 12, 12]


def test_memory_is_read_and_written_16_bytes_at_a_time(compiled: list[dict[str, Any]]) -> None:
    """Scales, gates and indices are narrower; no access is a single byte or two, but for a row's target logit."""
    assert {row["kernel"] for row in shipped(compiled)} >= BY_MATRIX
    check_widths(shipped(compiled))


def check_widths(rows: list[dict[str, Any]]) -> None:
    """16 bytes where matrices are moved, nowhere a single byte or two but for a row's target logit."""
    # One gate or loss a row: no other access to it.
    single = ("copy_tokens, gates", "sum_rows, gates of copies", "cross_entropy, loss")
    for row in rows:
        if row["kernel"] in BY_MATRIX and row["case"] not in single:
            assert row["widths"].get("LDG 16", 0) > 0, row["case"]
            assert row["widths"].get("STG 16", 0) > 0, row["case"]
        target = {"LDG 2"} if row["kernel"] == "_cross_entropy_kernel" else set()
        assert not ({"LDG 1", "LDG 2", "STG 1", "STG 2"} - target) & set(row["widths"]), row["case"]


def test_turns_and_updates_round_each_product(compiled: list[dict[str, Any]]) -> None:
    """As on a CPU. Of turns, where nothing is divided, there is no multiply-add at all."""
    found = {row["case"]: row for row in shipped(compiled)}
    for case in ("heads_forward", "turn_back", "rope_key_backward"):
        assert found[case]["multiply_adds"] == 0, case
    assert {row["case"] for row in shipped(compiled) if not row["contracts"]} == {
        "heads_forward", "turn_back", "rope_key_backward", "turn_back_quantize_both",
        "adamw, BF16 moments", "adamw, FP32",
    }  # fmt: skip


# Compute capability and shared memory of a program: Ada (L40S, RTX 4090), consumer Blackwell.
@pytest.mark.long
@pytest.mark.parametrize(("capability", "shared_bytes"), [(89, 101376), (120, 101376)])
def test_portable_products_compile_for_other_gpus(
    capability: int, shared_bytes: int, tmp_path: Path, run_command: Command
) -> None:
    report = compile_all(run_command, None, tmp_path, "--portable", str(capability), str(shared_bytes))
    assert len(report["rows"]) == 12
    for row in report["rows"]:
        assert row["spills"] == 0, row["case"]
        assert row["shared_bytes"] <= shared_bytes, row["case"]
        assert row["tensor_core"] > 0 or row["case"].startswith("FP32"), row["case"]
