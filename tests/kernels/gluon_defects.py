"""What can be wrong with a Gluon kernel, planted one at a time in those of `tests/kernels/gluon_samples.py`.

A `Defect` is an edit of the source (or a launch argument) and the report it must give when every copy lands at once, so
that the numbers may well be right by luck. `tests/kernels/test_gluon_interpreter.py` runs them all. What an interpreter
cannot see (layouts, registers, speed) has no defect here.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from tests.kernels.gluon_values import BarrierMisuse, Deadlock, KernelError, Misuse, OutOfRange, Race

Edit = tuple[str, str]


class Defect:
    """One thing wrong, and what must be said about it.

    Args:
        name: what is wrong.
        error: the class of the report.
        message: a regular expression that is found in the report.
        edits: (old, new) in the source of the samples.
        kernel: which of the two kernels shows it.
        stages: of its ring; None takes the launcher's own.
    """

    def __init__(
        self, name: str, error: type[KernelError], message: str, *edits: Edit, kernel: str = "ring_gemm",
        stages: int | None = None,
    ) -> None:  # fmt: skip
        self.name, self.error, self.message, self.edits = name, error, message, edits
        self.kernel, self.stages = kernel, stages


def edited(source: Path, edits: Sequence[Edit], folder: Path) -> ModuleType:
    """The module with each (old, new) made at every place of its source."""
    text = source.read_text()
    for old, new in edits:
        assert old in text, f"{old!r} is not in {source.name}"
        text = text.replace(old, new)
    path = folder / f"defective_{source.name}"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # A dataclass looks its own module up.
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


# Lines and parts of lines of the samples.
WAIT_EMPTY = "            mbarrier.wait(empty.index(stage), parity)\n"
WAIT_FULL = "            mbarrier.wait(full.index(stage), parity)\n"
LOAD_SCALE = "            scale = scale_ring.index(stage).load(gl.SliceLayout(1, layout))\n"
WAIT_MMA = "            product = warpgroup_mma_wait(0, deps=(product,))\n"
PROMOTE = "            total += product * (scale * weight)[:, None]\n"
ARRIVE = "            mbarrier.arrive(empty.index(stage), count=1)\n"
WAIT_STORE = "        tma.store_wait(0)\n"
STORE = "        out.store(total.to(gl.bfloat16))\n"
FENCE = "        fence_async_shared()\n"
COPY_OUT = "        tma.async_copy_shared_to_global(d_desc, [row, column], out)\n"
LAST_STORE_ROWS = "    store_rows(first, lower, BLOCK_M, rows, columns, layout)\n"
ONE_MORE_MMA = (
    "    warpgroup_mma(a_ring.index(0).slice(0, 64), b_ring.index(0).permute((1, 0)), lower, is_async=True)\n"
)
PRODUCER_PARITY = "    parity = 1\n"
CONSUMER_PARITY = "    parity = 0\n"

RELEASED_BEFORE_WGMMA_ENDS = Defect(
    "stage released before its wgmma is finished", Race,
    "a_ring.*TMA load at produce:.* is not ordered after wgmma at consume:", (ARRIVE, ""),
    (WAIT_MMA, ARRIVE + WAIT_MMA)
)  # fmt: skip
STORE_BUFFER_REUSED = Defect(
    "store buffer reused at once", Race,
    r"out.*: store at consume:.* is not ordered after TMA store at consume:.*still outstanding",
    (WAIT_STORE + STORE, STORE)
)  # fmt: skip
TOO_FEW_BYTES = Defect(
    "too few bytes expected", BarrierMisuse, r"full\[0\] phase 0: 256 more bytes copied than expected",
    (" * BLOCK_K + BLOCK_M * 4)", " * BLOCK_K)")
)  # fmt: skip
LOAD_LEFT = Defect(
    "TMA load left at the end", Misuse,
    r"program \(0, 0, 0\) ends without having waited for a TMA load announced by landed\[\d\]",
    ("        if step + 1 < steps:\n", "        if step < steps:\n"), kernel="ahead_gemm"
)  # fmt: skip
RING_TOO_SHORT = Defect(
    "ring too short for the wgmma in flight", Race,
    "TMA load at issue:.* is not ordered after wgmma at ahead_gemm:.*still outstanding", kernel="ahead_gemm",
    stages=2
)  # fmt: skip

BARRIER_DEFECTS = (
    Defect(
        "stage never released", Deadlock,
        r"(?s)no partition can run.*produce\[1\] waits for phase 0 of empty\[0\].*missing 1 arrivals and 0 bytes",
        (ARRIVE, "")
    ),
    Defect(
        "producer starts with the other parity", Deadlock, r"(?s)produce\[1\] waits for phase 0 of empty\[0\]",
        (PRODUCER_PARITY, CONSUMER_PARITY)
    ),
    Defect(
        "consumer starts with the other parity", Race,
        "scale_ring: load at consume:.* of unwritten shared memory", (CONSUMER_PARITY, PRODUCER_PARITY)
    ),
    Defect(
        "parity never flips", BarrierMisuse, "it waited for this parity last time as well",
        ("                parity ^= 1\n", "                parity ^= 0\n")
    ),
    Defect(
        "no wait for a full stage", Race, "scale_ring: load at consume:.* of unwritten shared memory",
        (WAIT_FULL, "")
    ),
    Defect(
        "no wait for an empty stage", Race,
        "a_ring.*TMA load at produce:.* is not ordered after TMA load at produce:", (WAIT_EMPTY, "")
    ),
    RELEASED_BEFORE_WGMMA_ENDS,
    RING_TOO_SHORT,
    Defect(
        "stage released twice", BarrierMisuse, r"waits for phase 0 of empty\[0\].*1 further phases completed unseen",
        (ARRIVE, ARRIVE + ARRIVE)
    ),
    Defect(
        "two arrivals where one is counted", BarrierMisuse, r"empty\[0\] phase 0: more than 1 arrivals, at consume:",
        ("mbarrier.arrive(empty.index(stage), count=1)", "mbarrier.arrive(empty.index(stage), count=2)")
    ),
    Defect(
        "barrier never initialised", BarrierMisuse, r"empty\[0\] used before mbarrier.init, at produce:",
        ("        mbarrier.init(empty.index(i), count=1)\n", "")
    ),
    TOO_FEW_BYTES,
    Defect(
        "too many bytes expected", Deadlock,
        r"(?s)consume\[0\] waits for phase 0 of full\[0\].*missing 0 arrivals and 16 bytes",
        (" * BLOCK_K + BLOCK_M * 4)", " * BLOCK_K + BLOCK_M * 4 + 16)")
    ),
    Defect(
        "no fence after mbarrier.init", Race,
        r"full\[0\]: no fence_async_shared between mbarrier.init and the TMA load at produce:",
        ("    fence_async_shared()\n    ring = ", "    ring = ")
    ),
    LOAD_LEFT,
    Defect(
        "parity of two", BarrierMisuse, r"produce\[1\] waits for phase .* of empty\[0\] at produce:\d+: parity 2",
        ("mbarrier.wait(empty.index(stage), parity)", "mbarrier.wait(empty.index(stage), parity + 1)")
    ),
    Defect(
        "barriers of two words", Misuse, r"full: a barrier is one int64, this is \[2\], at ring_gemm:",
        ("full = gl.allocate_shared_memory(gl.int64, [STAGES, 1]",
         "full = gl.allocate_shared_memory(gl.int64, [STAGES, 2]")
    ),
    Defect(
        "one worker, two warp counts", Misuse, "warp_specialize: 2 warp counts for 1 workers, at ring_gemm:",
        ("        [1],\n", "        [1, 1],\n")
    ),
)  # fmt: skip
STORE_DEFECTS = (
    STORE_BUFFER_REUSED,
    Defect(
        "no fence before the TMA store", Race,
        "out.*TMA store at consume:.* is not separated by fence_async_shared where it comes after store at consume:",
        (FENCE + COPY_OUT, COPY_OUT)
    ),
    Defect(
        "no fence before the second TMA store", Race,
        "out.*TMA store at consume:.* is not separated by fence_async_shared where it comes after store at consume:",
        (FENCE + COPY_OUT, "        if tile == gl.program_id(0):\n    " + FENCE + COPY_OUT)
    ),
    Defect(
        "no store_wait at the end", Misuse, r"consume\[0\] ends with 1 TMA store not waited for",
        ("out)\n    tma.store_wait(0)\n", "out)\n")
    ),
    Defect(
        "store of another shape", Misuse,
        r"shared store of torch.bfloat16\[64, 64\] into torch.bfloat16\[64, 128\], at consume:",
        ("[BLOCK_M, BLOCK_N], d_desc", "[BLOCK_M, 2 * BLOCK_N], d_desc")
    ),
)  # fmt: skip
WGMMA_DEFECTS = (
    Defect("no wgmma wait", Misuse, "accumulator of an unfinished wgmma used, at consume:", (WAIT_MMA, "")),
    Defect(
        "last wgmma left in flight", Misuse, "accumulator of an unfinished wgmma used, at store_rows:",
        ("warpgroup_mma_wait(0, deps=(upper", "warpgroup_mma_wait(1, deps=(upper"), kernel="ahead_gemm"
    ),
    Defect(
        "wgmma left at the end", Misuse, r"program \(0, 0, 0\) ends with 1 wgmma not waited for",
        (LAST_STORE_ROWS, LAST_STORE_ROWS + ONE_MORE_MMA), kernel="ahead_gemm"
    ),
    Defect(
        "wgmma wait without its deps", Misuse, "warpgroup_mma_wait needs deps, at consume:",
        (WAIT_MMA, "            warpgroup_mma_wait(0)\n")
    ),
    Defect(
        "operand not transposed", Misuse, r"wgmma of \[64, 128\] and \[64, 128\], at consume:",
        ("b_ring.index(stage).permute((1, 0))", "b_ring.index(stage)")
    ),
    Defect(
        "half the rows of a wgmma", Misuse, r"wgmma of \[32, 64\] and \[64, 64\], at ahead_gemm:",
        (".slice(0, BLOCK_M), b, upper", ".slice(0, 32), b, upper"), kernel="ahead_gemm"
    ),
)  # fmt: skip
MEMORY_DEFECTS = (
    Defect(
        "pointer past the end", OutOfRange, r"global offset 4\.\.4 outside 0\.\.3, at consume:",
        ("gl.load(weights + k)", "gl.load(weights + k + 1)")
    ),
    Defect(
        "pointer before the start", OutOfRange, r"global offset -1\.\.-1 outside 0\.\.3, at consume:",
        ("gl.load(weights + k)", "gl.load(weights + (k - 1))")
    ),
    Defect(
        "store without its mask", OutOfRange, "global offset .* outside .* at store_rows:",
        (", values, mask=mask)", ", values)"), kernel="ahead_gemm"
    ),
    Defect(
        "index outside the ring", OutOfRange, r"empty: \[2, 3\) of 2, at produce:",
        ("mbarrier.wait(empty.index(stage)", "mbarrier.wait(empty.index(stage + STAGES)")
    ),
    Defect(
        "slice past the end", OutOfRange, r"a_ring: \[96, 160\) of 128, at ahead_gemm:",
        (".slice(BLOCK_M, BLOCK_M)", ".slice(96, BLOCK_M)"), kernel="ahead_gemm"
    ),
    Defect(
        "box of another shape", Misuse,
        r"TMA of a torch.float8_e4m3fn\[64, 128\] box, shared memory is torch.float8_e4m3fn\[64, 256\]",
        ("BLOCK_M, BLOCK_K], a_desc.layout", "BLOCK_M, 2 * BLOCK_K], a_desc.layout")
    ),
    Defect(
        "box of another type", Misuse, r"TMA of a torch.float32\[64\] box, shared memory is torch.int32\[64\]",
        ("gl.allocate_shared_memory(gl.float32", "gl.allocate_shared_memory(gl.int32")
    ),
    Defect(
        "another swizzle", Misuse, "or the layouts differ, at consume:",
        ("BLOCK_N], d_desc.layout)", "BLOCK_N], gl.NVMMASharedLayout(32, 16, 2))")
    ),
    Defect(
        "one coordinate too many", Misuse, "2 TMA coordinates for 1 dims, at produce:",
        ("[k * padded_rows + row]", "[k, row]")
    ),
    Defect(
        "coordinate off 16 bytes", Misuse, "TMA innermost coordinate 8 is not a multiple of 16 bytes, at produce:",
        ("a_desc, [row, k * BLOCK_K]", "a_desc, [row, k * 8]")
    ),
    Defect("too much shared memory", Misuse, "bytes of shared memory, 232448 exist, at ring_gemm:", stages=14),
    Defect(
        "integer overflow", OutOfRange, "scalar 2147483648 does not fit in int32, at consume:",
        ("gl.load(weights + k)", "gl.load(weights + (k << 30 >> 30))")
    ),
    Defect(
        "branch on a tensor", Misuse, r"a tensor of shape \[64\] is no branch condition, at consume:",
        (PROMOTE, "            if scale > 0:\n    " + PROMOTE)
    ),
    Defect(
        "element of a register tensor", Misuse, "only None and : can index a register tensor, at consume:",
        ("(scale * weight)[:, None]", "(scale * weight)[0]")
    ),
    Defect(
        "assertion of the kernel", Misuse, "assertion 'one stage' at ring_gemm:",
        ("    ring = (a_ring", "    gl.static_assert(STAGES == 1, 'one stage')\n    ring = (a_ring")
    ),
    Defect(
        "run-time bound of an unrolled loop", Misuse, "static_range of a run-time value, at consume:",
        ("        for k in range(blocks):\n", "        for k in gl.static_range(blocks):\n")
    ),
)  # fmt: skip
DEFECTS = (*BARRIER_DEFECTS, *STORE_DEFECTS, *WGMMA_DEFECTS, *MEMORY_DEFECTS)
