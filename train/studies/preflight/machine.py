"""What one rank finds on its own node: versions, health of its GPU, a product, the disk.

Nothing here needs another rank. Times are of the quickest of a few tries: a slow device is slow in all of them.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[3]
TRIES = 5
WRITTEN_BYTES = 64 * 2**20
# nvidia-smi's field -> what is wrong where its value is none of HEALTHY (manual of nvidia-smi, driver 535 and later).
HEALTH = {
    "ecc.errors.uncorrected.volatile.total": "uncorrected ECC errors",
    "remapped_rows.failure": "a row of memory could not be remapped",
    "remapped_rows.pending": "a remapped row of memory waits for a reset",
    "clocks_event_reasons.hw_thermal_slowdown": "slowed down by heat (hardware)",
    "clocks_event_reasons.sw_thermal_slowdown": "slowed down by heat (driver)",
    "clocks_event_reasons.hw_power_brake_slowdown": "slowed down by the power supply",
}
HEALTHY = ("0", "No", "Not Active", "N/A", "[N/A]", "[Not Supported]")


def versions(device: torch.device, driver: str) -> dict[str, str]:
    """What must be the same on all ranks."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "code": code_digest()}
    if device.type == "cuda":
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        found |= {"GPU": torch.cuda.get_device_name(device), "driver": driver, "NCCL": nccl}
        found["CUDA"] = str(torch.version.cuda)
    return found


def code_digest() -> str:
    """Of every Python and YAML file of the checkout that a run could load."""
    total = hashlib.sha256()
    for room in ("configs", "kernels", "launch", "parallel", "train"):
        for path in sorted([*(ROOT / room).rglob("*.py"), *(ROOT / room).rglob("*.yaml")]):
            total.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return total.hexdigest()[:12]


def gpu_health(device: torch.device) -> tuple[list[str], str]:
    """What nvidia-smi finds wrong with a GPU, and its driver; no fault and no driver for a CPU."""
    if device.type == "cpu":
        return [], ""
    fields = ["driver_version", *HEALTH]
    # CUDA's numbers and nvidia-smi's may differ; the id is one.
    gpu = f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = ["nvidia-smi", gpu, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [f"nvidia-smi cannot be asked: {error}"], ""
    if done.returncode:
        return [f"nvidia-smi ended with {done.returncode}: {' '.join((done.stdout + done.stderr).split())}"], ""
    return faults_of(done.stdout)


def faults_of(line: str) -> tuple[list[str], str]:
    """The faults in nvidia-smi's line of values, in order of HEALTH, behind the driver's version; and that version."""
    driver, *values = [value.strip() for value in line.strip().split(",")]
    found = [f"{what} ({value})" for what, value in zip(HEALTH.values(), values, strict=True) if value not in HEALTHY]
    return found, driver


def product(left: Tensor, right: Tensor) -> Tensor:
    """BF16 [n, n] x [n, n], as the device multiplies."""
    return left @ right


def examine_product(device: torch.device) -> dict[str, float]:
    """Wrong values of one BF16 product, and its speed.

    The factors are small whole numbers, so every partial sum is exact in FP32 whatever the order, and the rounded
    result is known to the bit from FP64.
    """
    size = 8192 if device.type == "cuda" else 256
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randint(-4, 5, (size, size), generator=generator).to(device) for _ in range(2))
    exact = (left.double() @ right.double()).bfloat16()
    left, right = left.bfloat16(), right.bfloat16()
    wrong = int((product(left, right) != exact).sum())
    seconds = min(_seconds(left, right) for _ in range(TRIES))
    return {"wrong": wrong, "values": size * size, "tflops": 2 * size**3 / seconds / 1e12}


def _seconds(left: Tensor, right: Tensor) -> float:
    if left.is_cuda:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        product(left, right)
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3
    began = time.perf_counter()
    product(left, right)
    return time.perf_counter() - began


def examine_disk(folder: Path, name: str) -> dict[str, Any]:
    """Free room below a folder, and the rate at which a file in it reaches the disk.

    Raises:
        OSError: the folder cannot be made or written, or does not give back what was written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, block = folder / f".preflight-{name}", os.urandom(2**20)
    try:
        with path.open("wb") as file:
            began = time.perf_counter()
            for _ in range(WRITTEN_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            seconds = time.perf_counter() - began
        if path.read_bytes() != block * (WRITTEN_BYTES // len(block)):
            raise OSError(f"{path} does not hold what was written")
    finally:
        path.unlink(missing_ok=True)
    return {"free_gb": shutil.disk_usage(folder).free / 1e9, "gb_per_s": WRITTEN_BYTES / seconds / 1e9}
