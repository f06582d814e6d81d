"""A product by each configuration of the Gluon GEMM, in processes of their own, before `make gpu` trusts it.

A kernel that hangs, or poisons its context by an illegal access, then costs LIMIT_S seconds and
not the parts that come after. If one of them fails, all parts multiply in portable Triton and the report is red.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import torch

from kernels.backend import HOPPER
from kernels.formats import Quantized
from kernels.gemm_fp8 import gemm_tile_block, gemm_tile_tile
from kernels.quantize import quantize_blocks, quantize_tiles
from train.studies.step_parity import relative_error

# Seconds for starting Python, importing torch and Triton (about 6), compiling one kernel (1) and running it.
LIMIT_S = 20.0
# To read what one said that has ended in time.
READING_S = 0.5
# Sums in another order than the reference's, and one rounding to BF16 where the output has it.
BOUNDS = {"two_waves": 2.5e-3, "two_blocks": 2.5e-3, "wide": 2.5e-3, "halves": 2.5e-3, "wgrad": 2**-10}
ROWS, COLS, INNER = 384, 512, 1024
# Fewer than tiles, so that programs go on to another one: 8 of 256x128, or 7 and two halves.
PROGRAMS = 7


def fault_of(name: str, device: torch.device) -> str | None:
    """Multiply once by the configuration of this name; what is wrong with the product, None if nothing is."""
    from kernels.gpu import gemm_fp8, gemm_hopper

    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(size, INNER, generator=generator).bfloat16() for size in (ROWS, COLS))
    a = quantize_tiles(x, power_of_two=True)
    if name == "wgrad":
        b, config, dtype = quantize_tiles(w, power_of_two=True), gemm_fp8.tile_tile_config(), torch.float32
        expected = gemm_tile_tile(a, b)
    else:
        b, config, dtype = quantize_blocks(w, power_of_two=True), getattr(gemm_fp8, name.upper()), torch.bfloat16
        expected = gemm_tile_block(a, b, out_dtype=dtype)
    out = torch.full((ROWS, COLS), float("nan"), dtype=dtype, device=device)
    mine, yours = (Quantized(q.payload.to(device), q.scale.to(device)) for q in (a, b))
    gemm_hopper.gemm(mine, yours, out, config=config, programs=PROGRAMS)
    error = relative_error(out.cpu(), expected)
    # A NaN is above every bound.
    return None if error <= BOUNDS[name] else f"relative error {error:.1e}, bound {BOUNDS[name]:.1e}"


def faults(command: Callable[[str], Sequence[str]], *, limit_s: float = LIMIT_S) -> dict[str, str]:
    """Configurations that failed, and why; they run side by side, each by the command line that `command` gives it."""
    started = {
        name: subprocess.Popen(
            [*command(name)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for name in BOUNDS
    }
    deadline_s, reasons = time.monotonic() + limit_s, {}
    for name, process in started.items():
        try:
            said, _ = process.communicate(timeout=max(READING_S, deadline_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            reasons[name] = f"nothing after {limit_s:.0f} s"
            continue
        if process.returncode:
            last = (said.strip().splitlines() or ["without a word"])[-1][:200]
            reasons[name] = f"ended with {process.returncode}: {last}"
    return reasons


def takes(device: torch.device) -> bool:
    """Whether the Gluon GEMM is for this device at all."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == HOPPER


if __name__ == "__main__":
    sys.exit(fault_of(sys.argv[1], torch.device("cuda")))
