"""What the compiler makes of every kernel and every shipped configuration for sm_90a, without a GPU.

    python -m tests.kernels.hopper_codegen            prints the table of docs/kernels.md
    python -m tests.kernels.hopper_codegen --json     prints the figures
    python -m tests.kernels.hopper_codegen --portable 89 101376     the portable products on another GPU

Each case of `CASES` calls a product launcher at a size of DeepSeek-V3 on untouched CPU memory; the stand-in driver
(`tests/kernels/stand_in_driver.py`) checks the launch and keeps the compiled kernel; here its SASS is counted.
Run it in a process of its own, under the Triton whose compiler is wanted.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton

from kernels.gpu import gemm_portable, router_linear
from tests.kernels import stand_in_driver
from tests.kernels.gemm_cases import GEMM_CASES, PORTABLE_CASES, TRIED_CASES
from tests.kernels.hopper_cases import CASES, ROUTER_PRODUCTS

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Figures:
    """What one compiled kernel is made of.

    Args:
        case: the launcher and the size it was called with.
        shipped: whether the product launches it so.
        kernel: name of the device function.
        grid: programs.
        registers: of a thread, as launched; warp-specialised kernels share them out again (setmaxnreg).
        spills: loads and stores of local memory in the code.
        shared_bytes: dynamic shared memory of a program.
        tensor_core: tensor-core instructions: of FP8 QGMMA (wgmma) and QMMA (mma), of BF16 HGMMA and HMMA.
        loop: instructions of the innermost loop that holds a tensor-core instruction; 0 without one.
        loop_tensor_core: tensor-core instructions in that loop.
        tma: bulk loads and stores.
        multiply_adds: FP32 ones, FFMA.
        contracts: whether the compiler may make one of a product and a sum.
        widths: accesses to global memory by kind and width, "LDG 16": loads of 16 bytes a thread.
    """

    case: str
    shipped: bool
    kernel: str
    grid: tuple[int, int, int]
    registers: int
    spills: int
    shared_bytes: int
    tensor_core: int
    loop: int
    loop_tensor_core: int
    tma: int
    multiply_adds: int
    contracts: bool
    widths: dict[str, int]


def disassemble(cubin: bytes) -> tuple[list[str], str]:
    """Lines of SASS, and cuobjdump's resource line."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass = subprocess.run([TOOLS / "nvdisasm", "-c", "-ndf", file.name], capture_output=True, text=True, check=True)
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    return sass.stdout.splitlines(), usage.stdout


def instructions(lines: list[str]) -> list[str]:
    """Opcode and operands, or a label, one a line."""
    found = []
    for line in lines:
        label = re.match(r"\s*(\.L_x_\d+):", line)
        code = re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][^;]*);", line)
        if label:
            found.append(label[1])
        elif code:
            found.append(code[1].strip())
    return found


def loops(code: list[str]) -> Iterator[list[str]]:
    """Every stretch from a label to a later branch back to it, without labels."""
    places = {item: place for place, item in enumerate(code) if item.startswith(".L_x_")}
    for place, item in enumerate(code):
        target = re.match(r"BRA\S*\s.*`\((\.L_x_\d+)\)", item)
        if target and places[target[1]] < place:
            yield [each for each in code[places[target[1]] : place + 1] if not each.startswith(".L_x_")]


def _tensor_core(code: list[str]) -> int:
    return sum(item.startswith(("QGMMA", "QMMA", "HGMMA", "HMMA")) for item in code)


def figures(case: str, launch: stand_in_driver.Launch) -> Figures:
    """Count one launch's kernel."""
    kernel: Any = launch.kernel
    lines, usage = disassemble(kernel.asm["cubin"])
    code = instructions(lines)
    counts = Counter(item.split()[0] for item in code)
    inner = min((loop for loop in loops(code) if _tensor_core(loop)), key=len, default=[])
    widths: Counter[str] = Counter()
    for opcode, count in counts.items():
        if opcode.startswith(("LDG", "STG")):
            bits = re.search(r"\.(8|16|32|64|128)\b|\.[US](8|16)\b", opcode)
            width = int(next(filter(None, bits.groups()), 32)) if bits else 32
            widths[f"{opcode[:3]} {width // 8}"] += count
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    return Figures(
        case=case,
        shipped=case not in TRIED_CASES,
        kernel=kernel.metadata.name,
        grid=launch.grid,
        registers=int(registers[1]),
        spills=sum(count for opcode, count in counts.items() if opcode.startswith(("LDL", "STL"))),
        shared_bytes=kernel.metadata.shared,
        tensor_core=_tensor_core(code),
        loop=len(inner),
        loop_tensor_core=_tensor_core(inner),
        tma=sum(count for opcode, count in counts.items() if opcode.startswith(("UTMALDG", "UTMASTG"))),
        multiply_adds=sum(count for opcode, count in counts.items() if opcode.startswith("FFMA")),
        contracts=kernel.metadata.enable_fp_fusion,
        widths=dict(sorted(widths.items())),
    )


def measure(cases: Mapping[str, Callable[[], object]], driver: stand_in_driver.StandInDriver) -> list[Figures]:
    """Call every case; one entry per kernel that it launches."""
    found = []
    for name, call in cases.items():
        driver.launches.clear()
        call()
        assert driver.launches, f"{name} launches nothing"
        found += [figures(name, launch) for launch in driver.launches]
    return found


def measure_portable(capability: int, shared_bytes: int) -> list[Figures]:
    """The portable products, and the router's, on a GPU of another compute capability (times ten) and shared memory."""
    # CPU tensors stand for ones on that GPU.
    gemm_portable.shared_memory_bytes = router_linear.shared_memory_bytes = lambda _: shared_bytes
    cases = PORTABLE_CASES | {name: CASES[name] for name in ROUTER_PRODUCTS}
    return measure(cases, stand_in_driver.install(capability, shared_bytes))


def render(rows: list[Figures]) -> str:
    """The table of docs/kernels.md."""
    lines = [
        "| case | kernel | programs | registers | spills | shared | MMA | loop: all / MMA | TMA | global |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: not row.shipped):
        widths = ", ".join(f"{count} {width}" for width, count in row.widths.items())
        loop = f"{row.loop} / {row.loop_tensor_core}" if row.loop else ""
        programs = " x ".join(str(n) for n in row.grid if n > 1) or "1"
        lines.append(
            f"| {row.case}{'' if row.shipped else ' (tried)'} | `{row.kernel}` | {programs} | {row.registers} "
            f"| {row.spills} | {row.shared_bytes} "
            f"| {row.tensor_core or ''} | {loop} | {row.tma or ''} | {widths} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the table, or everything as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--portable", nargs=2, type=int, metavar=("CAPABILITY", "SHARED_BYTES"))
    arguments = parser.parse_args()
    if arguments.portable:
        rows = measure_portable(*arguments.portable)
    else:
        rows = measure(GEMM_CASES | CASES | TRIED_CASES, stand_in_driver.install())
    table = render(rows)
    report = {"triton": triton.__version__, "rows": [asdict(row) for row in rows], "table": table}
    print(json.dumps(report) if arguments.json else table)


if __name__ == "__main__":
    main()
