"""The Gluon interpreter passes right kernels, and names what is wrong with broken ones.

The kernels are those of `tests/kernels/gluon_samples.py`, the defects those of `tests/kernels/gluon_defects.py`. Every
run is a pure function of its options, so a verdict never depends on luck or on the machine.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tests.kernels import gluon_samples
from tests.kernels.gluon_defects import (
    ARRIVE,
    DEFECTS,
    LOAD_LEFT,
    LOAD_SCALE,
    PROMOTE,
    RELEASED_BEFORE_WGMMA_ENDS,
    RING_TOO_SHORT,
    STORE_BUFFER_REUSED,
    TOO_FEW_BYTES,
    WAIT_MMA,
    Defect,
    Edit,
    edited,
)
from tests.kernels.gluon_interpreter import ADVERSARIAL, interpret
from tests.kernels.gluon_samples import tile_origin
from tests.kernels.gluon_values import BarrierMisuse, KernelError, Misuse, OutOfRange, Race

# Half a unit in the last place of bfloat16's 8 bits, relative.
BF16_ROUNDING = 2.0**-9
# fp32 sums of at most 320 products, each rounding to 24 bits.
FP32_SUM = 320 * 2.0**-24
MODES: dict[str, dict[str, Any]] = {
    "plain": {"races": False},
    "checked": {},
    "checked, loads strictly late": {"lazy_loads": "use", "mma": "late"},
    "adversarial": ADVERSARIAL,
    "adversarial, random landing": {**ADVERSARIAL, "tma": "random", "switch": 0.6, "seed": 5},
}
each_defect = pytest.mark.parametrize("defect", DEFECTS, ids=[defect.name for defect in DEFECTS])


def run_ring_gemm(samples: ModuleType = gluon_samples, **launch: Any) -> tuple[Tensor, Tensor]:
    """(D of the kernel, D in float64): 9 tiles of 4 blocks each, with an edge in both dims."""
    rows, columns, blocks, padded_rows = 129, 136, 4, 132
    a = torch.randn(rows, blocks * 128).to(torch.float8_e4m3fn)
    b = torch.randn(columns, blocks * 128).to(torch.float8_e4m3fn)
    row_scales = torch.rand(blocks, padded_rows) + 0.5
    weights = torch.rand(blocks) + 0.5
    d = samples.launch_ring_gemm(a, b, row_scales=row_scales, weights=weights, **launch)
    scales = (row_scales[:, :rows] * weights[:, None]).double().T.repeat_interleave(128, dim=1)
    return d.double(), (a.double() * scales) @ b.double().T


def run_ahead_gemm(samples: ModuleType = gluon_samples, **launch: Any) -> tuple[Tensor, Tensor]:
    """(D of the kernel, D in float64) for groups of 5, 0 and 2 steps; no dim of D fills its tile."""
    group_starts = torch.tensor([0, 320, 320, 448], dtype=torch.int32)
    a, b = torch.randn(100, 448).bfloat16(), torch.randn(48, 448).bfloat16()
    d = samples.launch_ahead_gemm(a, b, group_starts=group_starts, **launch)
    bounds = zip(group_starts[:-1].tolist(), group_starts[1:].tolist(), strict=True)
    expected = [a[:, start:end].double() @ b[:, start:end].double().T for start, end in bounds]
    return d.double(), torch.stack(expected)


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def edited_samples(edits: Sequence[Edit], folder: Path) -> ModuleType:
    return edited(Path(gluon_samples.__file__), edits, folder)


def run_defect(defect: Defect, folder: Path) -> tuple[Tensor, Tensor]:
    run = {"ring_gemm": run_ring_gemm, "ahead_gemm": run_ahead_gemm}[defect.kernel]
    launch = {} if defect.stages is None else {"stages": defect.stages}
    return run(edited_samples(defect.edits, folder), **launch)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("programs", [1, 2, 9])
def test_a_right_ring_kernel_passes_and_is_exact_up_to_rounding(mode: str, programs: int) -> None:
    with interpret(**MODES[mode]):
        got, expected = run_ring_gemm(programs=programs)
    assert relative_error(got, expected) < BF16_ROUNDING


@pytest.mark.parametrize("mode", MODES)
def test_a_right_kernel_with_wgmma_in_flight_passes_and_is_exact_up_to_rounding(mode: str) -> None:
    with interpret(**MODES[mode]):
        got, expected = run_ahead_gemm()
    assert relative_error(got, expected) < FP32_SUM
    assert not got[1].any(), "the empty group"


@pytest.mark.parametrize("seed", range(10))
def test_a_right_kernel_passes_under_every_adversarial_order(seed: int) -> None:
    with interpret(**ADVERSARIAL, seed=seed):
        assert relative_error(*run_ring_gemm()) < BF16_ROUNDING
        assert relative_error(*run_ahead_gemm()) < FP32_SUM


@each_defect
def test_each_defect_is_named_even_when_every_copy_lands_at_once(defect: Defect, tmp_path: Path) -> None:
    with interpret(), pytest.raises(defect.error, match=defect.message):
        run_defect(defect, tmp_path)


@each_defect
@pytest.mark.parametrize("tma", ["late", "random"])
def test_each_defect_is_caught_under_adversarial_timing(defect: Defect, tma: str, tmp_path: Path) -> None:
    """Another order may meet another symptom first, so the class is free."""
    with interpret(**{**ADVERSARIAL, "tma": tma}), pytest.raises(KernelError):
        run_defect(defect, tmp_path)


@pytest.mark.parametrize(
    "defect", [RELEASED_BEFORE_WGMMA_ENDS, STORE_BUFFER_REUSED, RING_TOO_SHORT], ids=lambda defect: defect.name
)
def test_a_broken_hand_over_is_wrong_in_numbers_only_when_late(defect: Defect, tmp_path: Path) -> None:
    """Without the checker: right by luck when nothing is late, wrong when everything is."""
    bound = FP32_SUM if defect.kernel == "ahead_gemm" else BF16_ROUNDING
    with interpret(races=False):
        assert relative_error(*run_defect(defect, tmp_path)) < bound
    with interpret(races=False, **ADVERSARIAL):
        assert not relative_error(*run_defect(defect, tmp_path)) < bound


def test_what_only_late_copies_show(tmp_path: Path) -> None:
    """Too few bytes complete a phase before its last copy is there; a load may outlive the kernel."""
    with interpret(races=False, tma="late"), pytest.raises(BarrierMisuse, match="with 1 of its copies in flight"):
        run_defect(TOO_FEW_BYTES, tmp_path)
    with interpret(races=False, tma="late"), pytest.raises(Misuse, match="the kernel ends with 2 TMA loads in flight"):
        run_defect(LOAD_LEFT, tmp_path)


# When the value of a shared load is taken: the source changes, the options that pass, the options that report a race.
LAZY_CASES = [
    pytest.param(((PROMOTE + ARRIVE, ARRIVE + PROMOTE),), ("", "wgmma"), ("use",), id="used after the release"),
    pytest.param(
        ((LOAD_SCALE, ""), (WAIT_MMA, LOAD_SCALE + WAIT_MMA), (PROMOTE + ARRIVE, ARRIVE + PROMOTE)),
        ("",),
        ("wgmma", "use"),
        id="loaded behind the wgmma and used after the release",
    ),
]


@pytest.mark.parametrize(("edits", "passing", "racing"), LAZY_CASES)
def test_lazy_loads_decide_when_a_loaded_value_must_be_safe(
    edits: tuple[Edit, ...], passing: tuple[str, ...], racing: tuple[str, ...], tmp_path: Path
) -> None:
    samples = edited_samples(edits, tmp_path)
    for lazy_loads in passing:
        with interpret(lazy_loads=lazy_loads):
            assert relative_error(*run_ring_gemm(samples)) < BF16_ROUNDING
    for lazy_loads in racing:
        with interpret(lazy_loads=lazy_loads), pytest.raises(Race, match=r"scale_ring.*not ordered after load"):
            run_ring_gemm(samples)


@gluon.jit
def swap_kernel(x):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    i = gl.arange(0, 128, layout)
    buffer = gl.allocate_shared_memory(gl.int32, [128], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    buffer.store(i)
    before = buffer.load(layout)
    buffer.store(gl.load(x + i))
    gl.store(x + i, before)


@pytest.mark.parametrize("lazy_loads", ["", "wgmma", "use"])
def test_a_load_does_not_see_a_later_store_of_its_partition(lazy_loads: str) -> None:
    x = torch.full((128,), -1, dtype=torch.int32)
    with interpret(lazy_loads=lazy_loads):
        swap_kernel[(1,)](x)
    assert x.tolist() == list(range(128))


def test_one_seed_gives_one_run(tmp_path: Path) -> None:
    def verdict(seed: int) -> str:
        with interpret(**ADVERSARIAL, seed=seed), pytest.raises(KernelError) as caught:
            run_defect(RELEASED_BEFORE_WGMMA_ENDS, tmp_path)
        return str(caught.value)

    verdicts = [verdict(seed) for seed in range(8)]
    assert verdicts == [verdict(seed) for seed in range(8)]
    assert len(set(verdicts)) > 1


def test_programs_chooses_which_programs_run() -> None:
    """Nine programs for nine tiles of 64 x 64: the last one has one row and eight columns."""
    with interpret(programs=[8]):
        got, expected = run_ring_gemm(programs=9)
    assert relative_error(got[128:, 128:], expected[128:, 128:]) < BF16_ROUNDING
    got[128:, 128:] = torch.nan
    assert got.isnan().all()


def test_the_launch_is_restored_and_options_are_checked() -> None:
    before = GluonJITFunction.run
    with pytest.raises(RuntimeError, match="inside"), interpret():
        raise RuntimeError("inside")
    assert GluonJITFunction.run is before
    with pytest.raises(ValueError, match="tma='sometimes'"), interpret(tma="sometimes"):
        pass


@gluon.jit
def largest_power(base, limit):
    power = base
    while power * base <= limit:
        power *= base
    return power


@gluon.jit
def scalar_kernel(numbers, out, width, OFFSET: gl.constexpr = 3):
    row, column = tile_origin(5, width)
    same_row, same_column = gluon_samples.tile_origin(5, width)
    first = gl.load(numbers)
    gl.store(out, row)
    gl.store(out + 1, column)
    gl.store(out + 2, gl.where((same_row == row) and (same_column == column), 1, 0))
    gl.store(out + 3, first // 4)
    gl.store(out + 4, first % 4)
    gl.store(out + 5, gl.cdiv(width, 64) + gl.minimum(first, width) - gl.maximum(first, OFFSET))
    gl.store(out + 6, largest_power(gl.load(numbers + 1), width))
    total = 0
    for i in range(gl.load(numbers + 2)):
        total += i * OFFSET
    gl.store(out + 7, total)
    # 2^31 is no int32, but a third of it is.
    gl.store(out + 8, (gl.load(numbers + 2).to(gl.int64) << 29) // 3)
    gl.store(out + 9, gl.cast(OFFSET, gl.int64) << 31)


def test_scalars_loops_and_functions_of_another_module_behave_as_on_a_gpu() -> None:
    """Integers loaded from memory steer loops; division truncates; BLOCK_M is that of the module that uses it."""
    numbers, out = torch.tensor([-7, 3, 4], dtype=torch.int32), torch.zeros(10, dtype=torch.int64)
    with interpret():
        scalar_kernel[(1,)](numbers, out, 136)
    assert out.tolist() == [1 * 64, 2 * 64, 1, -1, -3, 3 - 7 - 3, 81, (0 + 1 + 2 + 3) * 3, 2**31 // 3, 3 * 2**31]


@gluon.jit
def tensor_kernel(x, y, out_fp8, out_int, out_product, N: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    i = gl.arange(0, N, layout)
    values = gl.load(x + i)
    gl.store(out_fp8 + i, (values * 1.0e6).to(gl.float8e4nv))
    gl.store(out_int + i, (i + 2147483647) // -2)
    gl.store(out_product + i, gl.load(x + i, mask=i < 2, other=0.25) * gl.load(y))


def test_register_tensors_round_saturate_and_wrap_as_on_a_gpu() -> None:
    x, y = torch.tensor([1.0, -2.0, 0.0, 4.0], dtype=torch.bfloat16), torch.tensor([1.0 + 2.0**-20])
    out_fp8 = torch.empty(4).to(torch.float8_e4m3fn)
    out_int, out_product = torch.zeros(4, dtype=torch.int32), torch.zeros(4)
    with interpret():
        tensor_kernel[(1,)](x, y, out_fp8, out_int, out_product, N=4)
    assert out_fp8.float().tolist() == [448.0, -448.0, 0.0, 448.0]
    # The first stays in range, the others wrap to the negative end.
    assert out_int.tolist() == [-(2**30 - 1), 2**30, 2**30 - 1, 2**30 - 1]
    # bfloat16 times a float32 scalar is float32.
    assert out_product.tolist() == [factor * (1.0 + 2.0**-20) for factor in (1.0, -2.0, 0.25, 0.25)]


@gluon.jit
def box_kernel(x_desc, out, row, column):
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    buffer = gl.allocate_shared_memory(gl.float32, [4, 8], x_desc.layout)
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=1)
    fence_async_shared()
    mbarrier.expect(bar, 4 * 8 * 4)
    tma.async_copy_global_to_shared(x_desc, [row, column], bar, buffer)
    mbarrier.wait(bar, 0)
    rows = gl.arange(0, 4, gl.SliceLayout(1, layout))
    columns = gl.arange(0, 8, gl.SliceLayout(0, layout))
    gl.store(out + rows[:, None] * 8 + columns[None, :], buffer.load(layout))


def run_box(x: Tensor, row: int, column: int, **options: Any) -> Tensor:
    """The box of [4, 8] that begins at [row, column] of x."""
    out = torch.full((4, 8), torch.nan)
    layout = gl.NVMMASharedLayout(0, 32, 2)
    box_kernel[(1,)](TensorDescriptor(x, [5, 8], [8, 1], [4, 8], layout, **options), out, row, column)
    return out


@pytest.mark.parametrize("mode", ["checked", "adversarial"])
@pytest.mark.parametrize(("row", "column"), [(0, 0), (-1, -4), (3, 4), (8, 8)])
def test_a_tma_load_delivers_zeros_outside_the_tensor(mode: str, row: int, column: int) -> None:
    x = torch.randn(5, 8)
    with interpret(**MODES[mode]):
        out = run_box(x, row, column)
    surrounded = torch.zeros(32, 32)
    surrounded[8:13, 8:16] = x
    assert torch.equal(out, surrounded[8 + row : 12 + row, 8 + column : 16 + column])


@gluon.jit
def unsupported_kernel(x):
    gl.atomic_add(x, 1)


def test_what_is_not_emulated_says_so() -> None:
    with interpret(), pytest.raises(NotImplementedError, match="atomic_add is not emulated"):
        unsupported_kernel[(1,)](torch.zeros(1, dtype=torch.int32))


def test_kinds_of_tma_that_are_not_emulated_say_so(tmp_path: Path) -> None:
    samples = edited_samples([("b_ring.index(stage))", "b_ring.index(stage), multicast=True)")], tmp_path)
    with interpret(), pytest.raises(NotImplementedError, match="TMA multicast is not emulated"):
        run_ahead_gemm(samples)
    with interpret(), pytest.raises(NotImplementedError, match="TMA padding 'nan' is not emulated"):
        run_box(torch.zeros(5, 8), 0, 0, padding="nan")


def test_a_missing_argument_is_named() -> None:
    with interpret(), pytest.raises(TypeError, match="missing a required argument: 'x'"):
        unsupported_kernel[(1,)](num_warps=4)


@gluon.jit
def twice_waiting_kernel():
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=1)
    mbarrier.arrive(bar, count=1)
    mbarrier.wait(bar, 0)
    mbarrier.wait(bar, 0)


def test_waiting_twice_for_one_phase_is_named() -> None:
    with interpret(), pytest.raises(BarrierMisuse, match="phase 2 of bar"):
        twice_waiting_kernel[(1,)]()


def test_the_bounds_of_a_pointer_are_those_of_its_storage() -> None:
    """A view is reached from its own first element; its storage is what must not be left."""
    numbers, out = torch.tensor([9, 9, -7, 3, 4], dtype=torch.int32), torch.zeros(10, dtype=torch.int64)
    with interpret():
        scalar_kernel[(1,)](numbers[2:], out, 136)
    assert out[3] == -1
    with interpret(), pytest.raises(OutOfRange, match=r"global offset 2\.\.2 outside 0\.\.1, at scalar_kernel:"):
        scalar_kernel[(1,)](numbers[2:4].clone(), out, 136)


def test_it_works_whether_or_not_triton_interprets_its_own_kernels(
    run_command: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    """Here it does (tests/conftest.py); there it does not."""
    script = """
import torch
from tests.kernels.gluon_interpreter import ADVERSARIAL, interpret
from tests.kernels.gluon_samples import launch_ring_gemm
ones = torch.ones(64, 256).to(torch.float8_e4m3fn)
with interpret(**ADVERSARIAL):
    d = launch_ring_gemm(ones, ones, row_scales=torch.ones(2, 64), weights=torch.ones(2))
print(d.unique().tolist())
"""
    done = run_command("-c", script, TRITON_INTERPRET="0")
    assert done.stdout.strip() == "[256.0]"
