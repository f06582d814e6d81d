"""The Gluon GEMM, executed by the Gluon interpreter: every shipped configuration against FP64, and planted defects.

Each case runs twice: with the happens-before check under the strictest rule for shared loads (their value is taken at
first use), and with partitions shuffled and everything asynchronous as late as it may be.
That the compiler accepts the same code without spills is `test_hopper_codegen.py`'s.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.formats import Quantized
from kernels.gpu import gemm_hopper
from kernels.gpu.gemm_fp8 import HALVES, TWO_BLOCKS, TWO_WAVES, WIDE, tile_block_config
from kernels.gpu.gemm_hopper import Config, rounds_of_halves, split_last_round
from tests.kernels import gemm_inputs
from tests.kernels.gemm_inputs import BF16_TOLERANCE, FP32_TOLERANCE, Problem, relative_error
from tests.kernels.gluon_defects import Edit, edited
from tests.kernels.gluon_interpreter import ADVERSARIAL, interpret
from tests.kernels.gluon_values import KernelError

ORDERS: dict[str, dict[str, Any]] = {
    "checked": {"lazy_loads": "use", "mma": "late"},
    "adversarial": {**ADVERSARIAL, "lazy_loads": "use", "seed": 1},
}
# Groups with no row, a ragged last tile of 256 rows, and padding rows behind the last one.
ENDS, ROWS = [384, 384, 512, 1024], 1152
ONE_BLOCK = Config("two_blocks", stages=4)
# Not shipped, in the table of docs/kernels.md: its figures are those of a kernel that computes the right thing.
TWO_WAVES_OF_TWO_BLOCKS = Config("two_waves", stages=2, blocks=2)


def run(
    problem: Problem, config: Config, module: ModuleType = gemm_hopper, *, dtype: torch.dtype = torch.bfloat16,
    before: Tensor | None = None, programs: int = 3,
) -> Tensor:  # fmt: skip
    """D in bf16 (fprop, dgrad) or fp32 (wgrad), NaN where it is not written; added to `before` if there is one."""
    out = torch.full(problem.expected.shape, float("nan"), dtype=dtype) if before is None else before.clone()
    module.gemm(
        *problem.quantized, out, config=config, programs=programs, group_ends=problem.group_ends,
        accumulate=before is not None,
    )  # fmt: skip
    return out


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("config", "m", "n", "k"),
    [
        (TWO_WAVES, 300, 320, 512),
        # DeepSeek-V3's ragged widths: K = 576 = 4.5 tiles, N = 2112 = 16.5 blocks.
        (TWO_WAVES, 300, 2112, 576),
        (TWO_WAVES, 1, 8, 16),
        (WIDE, 300, 2112, 512),
        (WIDE, 129, 200, 576),
        # On 3 programs: 3 whole tiles, halves of the fourth and of the last 64 columns; 2 whole and 2 halves, one of
        # which waits for the program that has no whole one; one half.
        (HALVES, 200, 576, 576),
        (HALVES, 300, 192, 384),
        (HALVES, 1, 8, 16),
        # An even and an odd number of blocks, and fewer than one stage holds.
        (TWO_BLOCKS, 260, 320, 512),
        (TWO_BLOCKS, 260, 320, 1152),
        (TWO_BLOCKS, 63, 128, 128),
        (TWO_WAVES_OF_TWO_BLOCKS, 300, 320, 1152),
        (TWO_WAVES_OF_TWO_BLOCKS, 63, 128, 128),
    ],
)
def test_fprop_and_dgrad(config: Config, m: int, n: int, k: int, order: str) -> None:
    problem = gemm_inputs.tile_block(m, n, k)
    with interpret(**ORDERS[order]):
        out = run(problem, config)
    assert relative_error(out, problem.expected) < BF16_TOLERANCE


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("config", "ends"),
    [*product([TWO_WAVES, WIDE, TWO_BLOCKS], [ENDS, [0, 640, 640, 1152], [0, 0]]), (TWO_WAVES_OF_TWO_BLOCKS, ENDS)],
)
def test_groups_of_rows(config: Config, ends: list[int], order: str) -> None:
    problem = gemm_inputs.tile_block(ROWS, 320, 384, ends)
    with interpret(**ORDERS[order]):
        out = run(problem, config)
    if ends[-1]:
        assert relative_error(out, problem.expected) < BF16_TOLERANCE
    assert out[ends[-1] :].count_nonzero() == 0


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("config", "m", "n", "k", "ends", "accumulate"),
    [
        *(
            (TWO_WAVES, *shape, accumulate)
            for shape in [
                (320, 200, 576, None),
                (256, 128, 4224, None),
                (320, 192, ROWS, ENDS),
                (64, 64, 256, [0, 256]),
            ]
            for accumulate in (False, True)
        ),
        (TWO_WAVES_OF_TWO_BLOCKS, 320, 200, 576, None, True),
    ],
)
def test_wgrad(config: Config, m: int, n: int, k: int, ends: list[int] | None, accumulate: bool, order: str) -> None:
    problem = gemm_inputs.tile_tile(m, n, k, ends)
    before = torch.randn(problem.expected.shape) if accumulate else None
    with interpret(**ORDERS[order]):
        out = run(problem, config, dtype=torch.float32, before=before)
    expected = problem.expected + (0 if before is None else before.double())
    assert relative_error(out, expected) < FP32_TOLERANCE


@pytest.mark.parametrize("config", [TWO_WAVES, WIDE, TWO_BLOCKS])
def test_programs_may_run_in_any_order(config: Config) -> None:
    """A ragged tile that wrote into the next group would be overwritten in one order and seen in the other."""
    problem = gemm_inputs.tile_block(ROWS, 192, 128, ENDS)
    tiles = 100  # more than there are: some programs have nothing to do
    results = []
    for programs in (range(tiles), reversed(range(tiles))):
        count = min(tiles, _tiles_of(problem, config))
        with interpret(programs=[p for p in programs if p < count], races=False):
            results.append(run(problem, config, programs=tiles))
    assert torch.equal(*results)
    assert relative_error(results[0], problem.expected) < BF16_TOLERANCE


def _tiles_of(problem: Problem, config: Config) -> int:
    rows, cols = config.tile
    assert problem.group_ends is not None
    m, n = problem.expected.shape
    return (m // rows + len(problem.group_ends) + 1) * -(-n // cols)


def test_an_output_of_more_than_2_to_the_31_elements() -> None:
    """Only its last tile is computed; the rest is not touched, so it costs address space only."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    m, n = 70144, 32768
    a, b = gemm_inputs.payload(m, 128), gemm_inputs.payload(n, 128)
    a_scale, b_scale = gemm_inputs.scales(1, m), gemm_inputs.scales(1, n)
    out = torch.empty(m, n)
    last = (m // 256) * (n // 128) - 1
    with interpret(programs=[last], races=False):
        gemm_hopper.gemm(Quantized(a, a_scale), Quantized(b, b_scale), out, config=TWO_WAVES, programs=last + 1)
    expected = (
        gemm_inputs.decode_tiles(a[-256:], a_scale[:, -256:]) @ gemm_inputs.decode_tiles(b[-128:], b_scale[:, -128:]).T
    )
    assert relative_error(out[-256:, -128:], expected) < FP32_TOLERANCE


@pytest.mark.parametrize(("m", "n", "programs"), [(512, 192, 3), (256, 576, 3), (1024, 448, 5), (256, 64, 4)])
def test_halves_go_to_the_programs_that_would_be_idle(m: int, n: int, programs: int) -> None:
    """What each program writes, alone: together every element once, and none more than the closed form says."""
    problem, written = gemm_inputs.tile_block(m, n, 128), []
    whole, half, busy = split_last_round(m, n, programs=programs)
    for program in range(busy):
        with interpret(programs=[program], races=False):
            written.append(int(run(problem, HALVES, programs=programs).isfinite().sum()))
    assert sum(written) == m * n
    assert max(written) == 256 * 128 * rounds_of_halves(whole, half, programs=busy, half_cost=0.5)


def test_the_closed_form_of_rounds_is_a_greedy_schedule() -> None:
    """Whole tiles in turn, then each half to the program that is done first."""
    for whole, half, programs in product(range(25), range(9), range(1, 9)):
        done = [float(whole // programs + (p < whole % programs)) for p in range(programs)]
        heapq.heapify(done)
        for _ in range(half):
            heapq.heappush(done, heapq.heappop(done) + 0.625)
        if half <= programs:
            assert rounds_of_halves(whole, half, programs=programs, half_cost=0.625) == max(done), (whole, half)


def test_the_configuration_of_a_shape_follows_from_its_rounds() -> None:
    """The shapes of DeepSeek-V3 on 4,096 tokens and 132 multiprocessors, and the times of their rounds by hand."""
    chosen = {n: tile_block_config(4096, n, programs=132) for n in (7168, 4096, 36864, 16384, 2048)}
    assert set(chosen.values()) == {TWO_WAVES}
    # 16 x 16 whole tiles leave 8 of 264 places for 16 halves; 192, 3072, 4096 and 2304 leave 60, 36, 4 and 60 over.
    halves = {2112: (256, 16), 1536: (132, 120), 24576: (3036, 72), 32768: (4092, 8), 18432: (2244, 120)}
    for n, parts in halves.items():
        assert tile_block_config(4096, n, programs=132) == HALVES
        assert split_last_round(4096, n, programs=132) == (*parts, 132)
    assert rounds_of_halves(256, 16, programs=132, half_cost=0.625) == 1 + 2 * 0.625
    assert rounds_of_halves(132, 120, programs=132, half_cost=0.625) == 1 + 0.625
    # 96 whole tiles leave more than half a round over; 128 tiles of 128x192 fill one of three quarters.
    assert tile_block_config(2048, 1536, programs=132) == WIDE
    assert tile_block_config(4096, 512, programs=132) == TWO_BLOCKS
    assert tile_block_config(32768, 4096, programs=132, groups=32) == TWO_WAVES
    assert tile_block_config(2048, 4096, programs=132, groups=8) == TWO_BLOCKS


WAIT_FULL = "            mbarrier.wait(full.index(stage), phase)\n"
WAIT_EMPTY = "            mbarrier.wait(empty.index(stage), phase)\n"
ARRIVE = "            mbarrier.arrive(empty.index(stage), count=1)\n"
SECOND_BLOCK = "                    a2 = a_bufs.index(buffer + 1).slice(FIRST, 64)\n"
SECOND_WAVES = "                    total, total2, partial = _two_waves(\n"
LOAD_COLUMNS = "                if TILE_TILE:\n                    col_scale = b_scales.index(buffer).load(BY_COL)\n"
FIRST_PRODUCT = "                partial = warpgroup_mma(a, b, partial, use_acc=False, is_async=True)\n"
SECOND_PRODUCT = "a.slice(FIRST + 64, 64), b, partial, use_acc="
ONE_BLOCK_END = (
    "                    partial = warpgroup_mma_wait(0, deps=(partial,))\n"
    "                    total = _pin(_promote(total, partial, row_scale, col_scale, TILE_TILE))\n"
)
TO_BUFFER = "    buffer.store(total.to(gl.bfloat16))\n"
FENCE = "    fence_async_shared()\n"
START, LAST_WAIT = "    gl.warp_specialize", "        tma.store_wait(0)\n\n\n@gluon.jit\ndef _gemm"
NEXT_END = "gl.load(ends_ptr + gl.minimum(group, groups - 1))"
GROUPS_PLACE = "out_ptr + gl.cast(group, gl.int64) * M * N"

Case = Callable[[ModuleType], tuple[Tensor, Tensor, float]]


def fprop(config: Config = TWO_WAVES, *, ends: list[int] | None = None) -> Case:
    def case(module: ModuleType) -> tuple[Tensor, Tensor, float]:
        shape = (256, 576, 640) if config.halves else (640, 384, 1024)
        problem = gemm_inputs.tile_block(*((ROWS, 192, 256, ends) if ends else shape))
        return run(problem, config, module), problem.expected, BF16_TOLERANCE

    return case


def wgrad(config: Config = TWO_WAVES, *, ends: list[int] | None = None) -> Case:
    def case(module: ModuleType) -> tuple[Tensor, Tensor, float]:
        problem = gemm_inputs.tile_tile(320, 192, ROWS, ends)
        before = torch.randn(problem.expected.shape)
        out = run(problem, config, module, before=before)
        return out, problem.expected + before.double(), FP32_TOLERANCE

    return case


FPROP, OF_WIDE, OF_HALVES, OF_GROUPS = fprop(), fprop(WIDE), fprop(HALVES), fprop(ends=ENDS)
OF_TWO_BLOCKS, OF_TWO_BY_TWO = fprop(TWO_BLOCKS), fprop(TWO_WAVES_OF_TWO_BLOCKS)
WGRAD, WGRAD_OF_GROUPS = wgrad(), wgrad(ends=ENDS)
DEFECTS: dict[str, tuple[Case, list[Edit]]] = {
    "a consumer does not wait for its stage": (FPROP, [(WAIT_FULL, "")]),
    "the producer does not wait for an empty stage": (FPROP, [(WAIT_EMPTY, "")]),
    "the producer starts in the other phase": (FPROP, [("    phase = 1\n", "    phase = 0\n")]),
    "the consumers start in the other phase": (FPROP, [("    phase = 0\n", "    phase = 1\n")]),
    "a stage is handed back as soon as it is full": (FPROP, [(ARRIVE, ""), (WAIT_FULL, WAIT_FULL + ARRIVE)]),
    "a stage of two blocks is handed back after the first": (OF_TWO_BLOCKS, [
        (ARRIVE, ""), (SECOND_BLOCK, "        " + ARRIVE + SECOND_BLOCK),
    ]),
    "a stage of two waves of two blocks is handed back after the first": (OF_TWO_BY_TWO, [
        (ARRIVE, ""), (SECOND_WAVES, "                    if j == 1:\n            " + ARRIVE + SECOND_WAVES),
    ]),
    "one consumer never hands back": (FPROP, [(ARRIVE, "            if HALF == 0:\n    " + ARRIVE)]),
    "a stage is handed back twice": (FPROP, [(ARRIVE, ARRIVE.replace("count=1", "count=2"))]),
    "the scales' bytes are not expected": (FPROP, [(" + BM * 4 + ", " + ")]),
    # Column scales loaded after the product is issued, the stage handed back before they are used.
    "the order of the measured wgrad error": (wgrad(ONE_BLOCK), [
        (LOAD_COLUMNS + FIRST_PRODUCT, FIRST_PRODUCT + LOAD_COLUMNS),
        (ONE_BLOCK_END, ONE_BLOCK_END.replace(")\n", ")\n        " + ARRIVE, 1)),
        (ARRIVE + "            stage += 1", "            stage += 1"),
    ]),
    "an output buffer is reused while it is copied": (FPROP, [("    tma.store_wait(1)\n", "")]),
    "no fence before the output is copied": (OF_WIDE, [(TO_BUFFER + FENCE, TO_BUFFER)]),
    "no fence after the barriers are made": (FPROP, [(FENCE + START, START)]),
    "copies are not awaited at the end": (FPROP, [(LAST_WAIT, LAST_WAIT.replace("tma.store_wait(0)", "pass"))]),
    "the second half takes the first one's scales": (FPROP, [
        ("slice(FIRST + 64, 64).load(BY_ROW)", "slice(FIRST, 64).load(BY_ROW)"),
    ]),
    "a partial sum goes on from the last": (FPROP, [(SECOND_PRODUCT + "False", SECOND_PRODUCT + "True")]),
    "the scale of the next block": (FPROP, [
        ("ahead = gl.minimum((step + 1) * BLOCKS,", "ahead = gl.minimum((step + 2) * BLOCKS,"),
    ]),
    "64 columns take the scale of the 128": (OF_WIDE, [("gl.minimum(n2 // 128", "gl.minimum(n0 // 128")]),
    "wide tiles always begin with 128": (OF_WIDE, [("odd = pn % 2", "odd = 0")]),
    "the second block takes the first one's scale": (OF_TWO_BLOCKS, [
        ("(step + 1) * BLOCKS + 1", "(step + 1) * BLOCKS"),
    ]),
    "the second block of two waves takes the first one's": (OF_TWO_BY_TWO, [
        ("elif j == 1:\n                        col_scale = col_scale2", "elif j == 1:\n                        pass"),
    ]),
    "half a width is stored over the other half": (OF_TWO_BY_TWO, [
        ("    tma.store_wait(0)\n    buffer.store(right)", "    buffer.store(right)"),
    ]),
    "half a tile takes its neighbour's scales": (OF_HALVES, [(
        "row_scale2 = a_scales.index(stage).slice(FIRST + 64, 64).load(BY_ROW2)", "row_scale2 = row_scale",
    )]),
    "half a tile keeps a stale scale": (OF_HALVES, [("gl.minimum(step + 1, last_block)", "step")]),
    "half a tile takes the scale of a later block": (OF_HALVES, [
        ("gl.minimum(step + 1, last_block)", "gl.minimum(step + 2, last_block)"),
    ]),
    "a right half takes the scale of the next column": (OF_HALVES, [("n0 // 128 * b", "(n0 + 64) // 128 * b")]),
    "a right half is computed as a left one": (OF_HALVES, [("of_tile % 2 * 64", "0")]),
    "half a tile waits for a whole one's bytes": (OF_HALVES, [("BYTES - 64 * 128", "BYTES")]),
    "half a tile hands its stage back as soon as it is full": (OF_HALVES, [
        ("\n" + ARRIVE[4:], "\n"), ("\n" + WAIT_FULL[4:], "\n" + WAIT_FULL[4:] + ARRIVE[4:]),
    ]),
    "all groups multiply the first one's weight": (OF_GROUPS, [("b_row = group * N", "b_row = 0")]),
    "all groups take the first one's scales": (OF_GROUPS, [("* b_scale_stride_group", "* 0")]),
    "padding rows are not written": (OF_GROUPS, [("while (group < groups) &", "while (group < groups - 1) &")]),
    "a tile begins where its group does not": (OF_GROUPS, [("start + pm * BM)", "pm * BM)")]),
    "ends are read behind the last": (OF_GROUPS, [(NEXT_END, "gl.load(ends_ptr + group + 1)")]),
    "all groups are contracted from the first row": (WGRAD_OF_GROUPS, [("pn, start // 128, ", "pn, 0, ")]),
    "all groups are written to the first one's place": (WGRAD_OF_GROUPS, [(GROUPS_PLACE, "out_ptr")]),
    "adding forgets what was there": (WGRAD, [("total += gl.load(places, mask=inside, other=0.0)", "total += 0.0")]),
    "rows behind the last are stored": (WGRAD, [("(row[:, None] < M) & ", "")]),
}  # fmt: skip


def is_caught(case: Case, module: ModuleType) -> bool:
    torch.manual_seed(5)
    try:
        with interpret(**ORDERS["checked"]):
            out, expected, tolerance = case(module)
    except KernelError:
        return True
    return not relative_error(out, expected) < tolerance


@functools.cache
def is_green(case: Case) -> bool:
    """Of the kernel as it is: once for all defects of a case."""
    return not is_caught(case, gemm_hopper)


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_turns_red(defect: str, tmp_path: Path) -> None:
    case, edits = DEFECTS[defect]
    assert is_green(case), "the kernel itself is red"
    assert is_caught(case, edited(Path(gemm_hopper.__file__), edits, tmp_path))
