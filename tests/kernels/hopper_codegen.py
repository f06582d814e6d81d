"""What the compiler makes of every kernel and every shipped configuration for sm_90a, without a GPU.

    python -m tests.kernels.hopper_codegen            prints the table of docs/kernels.md
    python -m tests.kernels.hopper_codegen --json     prints the figures
    python -m tests.kernels.hopper_codegen --part first   one case at least of each kernel; `rest`: the others
    python -m tests.kernels.hopper_codegen --portable 89 101376     the portable products on another GPU

Each case of `CASES` calls a product launcher at a size of DeepSeek-V3 on untouched CPU memory; the stand-in driver
(`tests/kernels/stand_in_driver.py`) checks the launch and keeps the compiled kernel; here its SASS is counted.
Run it in a process of its own, under the Triton whose compiler is wanted.
"""

from __future__ import annotations

import argparse
import json
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import triton

from kernels.gpu import gemm_portable, router_linear
from tests.kernels import stand_in_driver
from tests.kernels.gemm_cases import GEMM_AGAIN, GEMM_CASES, PORTABLE_CASES, SPILLING_CASES, TRIED_CASES
from tests.kernels.hopper_cases import AGAIN, CASES, ROUTER_PRODUCTS

ALL_CASES = GEMM_CASES | CASES | TRIED_CASES
REST = {*GEMM_AGAIN, *AGAIN, *(TRIED_CASES.keys() - SPILLING_CASES.keys())}
PARTS = {"all": ALL_CASES.keys(), "first": ALL_CASES.keys() - REST, "rest": REST}
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
        loop_barriers: barriers of a warpgroup in that loop, BAR.SYNC.
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
    loop_barriers: int
    tma: int
    multiply_adds: int
    contracts: bool
    widths: dict[str, int]


# A line of SASS: an address, maybe a predicate, opcode and operands.
INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][^;]*);")
Code = list[tuple[int, str]]


def machine_code(cubin: bytes) -> bytes:
    """The only .text section (ELF-64)."""
    first, size, count, names = struct.unpack_from("<Q", cubin, 0x28) + struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, first + size * place) for place in range(count)]
    (found,) = (each for each in sections if cubin[sections[names][4] + each[0] :].startswith(b".text."))
    return cubin[found[4] : found[4] + found[5]]


def disassemble(cubins: list[bytes], architecture: str) -> list[Code]:
    """Address, opcode and operands of every instruction of each; nvdisasm takes half a second to start, so once."""
    parts = [machine_code(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(parts))
        file.flush()
        command = [TOOLS / "nvdisasm", "-b", architecture, "-ndf", file.name]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = [(int(line[1], 16), line[2].strip()) for line in map(INSTRUCTION.match, sass.splitlines()) if line]
    ends = list(accumulate(map(len, parts), initial=0))
    # 16 bytes an instruction.
    return [found[begin // 16 : end // 16] for begin, end in pairwise(ends)]


def registers_of(cubin: bytes) -> int:
    """Of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [TOOLS / "cuobjdump", "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    return int(registers[1])


def loops(code: Code) -> Iterator[list[str]]:
    """Every stretch up to a branch back to where it begins."""
    places = {address: place for place, (address, _) in enumerate(code)}
    for place, (address, item) in enumerate(code):
        target = re.match(r"BRA\b.*\b0x([0-9a-f]+)$", item)
        if target and int(target[1], 16) < address:
            yield [each for _, each in code[places[int(target[1], 16)] : place + 1]]


def _tensor_core(code: list[str]) -> int:
    return sum(item.startswith(("QGMMA", "QMMA", "HGMMA", "HMMA")) for item in code)


def figures(case: str, launch: stand_in_driver.Launch, code: Code) -> Figures:
    """Count one launch's kernel."""
    kernel: Any = launch.kernel
    counts = Counter(item.split()[0] for _, item in code)
    inner = min((loop for loop in loops(code) if _tensor_core(loop)), key=len, default=[])
    widths: Counter[str] = Counter()
    for opcode, count in counts.items():
        if opcode.startswith(("LDG", "STG")):
            bits = re.search(r"\.(8|16|32|64|128)\b|\.[US](8|16)\b", opcode)
            width = int(next(filter(None, bits.groups()), 32)) if bits else 32
            widths[f"{opcode[:3]} {width // 8}"] += count
    return Figures(
        case=case,
        shipped=case not in TRIED_CASES,
        kernel=kernel.metadata.name,
        grid=launch.grid,
        registers=registers_of(kernel.asm["cubin"]),
        spills=sum(count for opcode, count in counts.items() if opcode.startswith(("LDL", "STL"))),
        shared_bytes=kernel.metadata.shared,
        tensor_core=_tensor_core([item for _, item in code]),
        loop=len(inner),
        loop_tensor_core=_tensor_core(inner),
        loop_barriers=sum(item.startswith("BAR.SYNC") for item in inner),
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
        found += [(name, launch) for launch in driver.launches]
    architecture = f"SM{driver.capability}{'a' if driver.capability >= 90 else ''}"
    codes = disassemble([launch.kernel.asm["cubin"] for _, launch in found], architecture)
    return [figures(name, launch, code) for (name, launch), code in zip(found, codes, strict=True)]


def measure_portable(capability: int, shared_bytes: int) -> list[Figures]:
    """The portable products, and the router's, on a GPU of another compute capability (times ten) and shared memory."""
    # CPU tensors stand for ones on that GPU.
    gemm_portable.shared_memory_bytes = router_linear.shared_memory_bytes = lambda _: shared_bytes
    cases = {name: call for name, call in PORTABLE_CASES.items() if "on Hopper" not in name}
    cases |= {name: CASES[name] for name in ROUTER_PRODUCTS}
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
    parser.add_argument("--part", choices=PARTS, default="all")
    parser.add_argument("--portable", nargs=2, type=int, metavar=("CAPABILITY", "SHARED_BYTES"))
    arguments = parser.parse_args()
    if arguments.portable:
        rows = measure_portable(*arguments.portable)
    else:
        part = PARTS[arguments.part]
        rows = measure({name: call for name, call in ALL_CASES.items() if name in part}, stand_in_driver.install())
    table = render(rows)
    report = {
        "triton": triton.__version__,
        "cases": list(ALL_CASES),
        "rows": [asdict(row) for row in rows],
        "table": table,
    }
    print(json.dumps(report) if arguments.json else table)


if __name__ == "__main__":
    main()
