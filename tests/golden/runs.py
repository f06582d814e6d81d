"""The golden runs: 20 steps of `tiny` on hand-made tokens, in each precision and on two layouts, and what they logged.

    python -m tests.golden.runs     trains them all and rewrites losses.json and checkpoint/ beside this file

A golden file changes in a commit of its own, which says why the numbers moved.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.data.handmade import write_store
from tests.ranks import run_ranks
from tests.system.lives import trainer_on
from train.config import compose
from train.observe.sinks import read_run

FOLDER = Path(__file__).resolve().parent
LOSSES, CHECKPOINT = FOLDER / "losses.json", FOLDER / "checkpoint"
STEPS, SAVED_AT = 20, 10
METRICS = ("loss/total", "loss/main", "loss/mtp", "loss/balance", "grad/norm")
# 4 sequences of 32 tokens a step; the paths are relative, since a checkpoint keeps its configuration.
COMMON = [
    "experiment=tiny",
    "run.name=golden",
    "run.directory=runs",
    "run.device=cpu",
    "run.threads=1",
    "run.micro_batch_sequences=1",
    "data.store=store",
    "data.heldout=null",
    "data.sequence_length=32",
    f"schedule.total_tokens={STEPS * 4 * 32}",
    "schedule.warmup_steps=4",
    "schedule.batch_start_sequences=4",
    "schedule.batch_full_sequences=4",
    "observe.wandb=off",
    "observe.progress=false",
]
# Name -> (processes, overrides).
RUNS: dict[str, tuple[int, list[str]]] = {
    "fp32": (1, ["precision=fp32"]),
    "bf16": (1, ["precision=bf16"]),
    "fp8": (1, ["precision=fp8"]),
    "dp2_ep2": (2, ["precision=bf16", "layout.dp=2", "layout.ep=2"]),
    "pp2_zbv": (2, ["precision=bf16", "layout.pp=2", "layout.schedule=ZBVZeroBubble", "model.num_hidden_layers=4"]),
}
# The run whose checkpoint is stored: a small model with every kind of tensor, averages included.
SMALL = [
    *("precision=bf16", f"checkpoint.every_steps={SAVED_AT}", "optim.ema_decay=0.9"),
    *("model.num_hidden_layers=2", "model.hidden_size=32", "model.intermediate_size=48", "model.vocab_size=256"),
    *(
        "model.n_routed_experts=4",
        "model.n_group=2",
        "model.topk_group=1",
        "model.moe_intermediate_size=16",
        "model.num_attention_heads=2",
        "model.q_lora_rank=16",
    ),
    *("model.kv_lora_rank=16", "model.qk_nope_head_dim=8", "model.qk_rope_head_dim=4", "model.v_head_dim=8"),
]


def write_golden_store(folder: Path) -> None:
    """40 documents of ids from 6 to 255; each id leans on the one before it."""
    draw = np.random.default_rng(0)
    documents = []
    for length in draw.integers(40, 400, size=40):
        steps = draw.integers(1, 4, size=length)
        documents.append([int(6 + step % 250) for step in np.cumsum(steps) * 7])
    write_store(folder, documents, vocab_size=256)


@contextmanager
def standing_in(folder: Path) -> Iterator[None]:
    """Make a folder the working directory for a while."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def train(rank: int, world: int, folder: str, overrides: list[str], *, resume: bool = False) -> None:
    """One rank of one golden run in a folder that holds `store`."""
    with standing_in(Path(folder)):
        trainer = trainer_on(compose([*COMMON, *overrides]), world)
        if resume:
            trainer.resume()
        trainer.fit()


def logged(folder: Path) -> list[dict[str, str]]:
    """What the run in a folder logged, one dict a step; floats as hexadecimal text, so that every bit is kept."""
    return [{name: float(record[name]).hex() for name in METRICS} for record in read_run(folder / "runs/golden")]


def run_in(folder: Path, name: str) -> list[dict[str, str]]:
    """Train one of RUNS in an empty folder and read its log."""
    world, overrides = RUNS[name]
    write_golden_store(folder / "store")
    if world == 1:
        train(0, 1, str(folder), overrides)
    else:
        run_ranks(world, train, str(folder), overrides)
    return logged(folder)


def machine() -> dict[str, str]:
    """What the bits may depend on besides the code."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "torch": torch.__version__,
        "processor": models[0] if models else platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def record() -> None:
    """Rewrite the golden files."""
    torch.set_num_threads(1)
    golden: dict[str, Any] = {"recorded_on": machine(), "commit": _commit(), "steps": STEPS, "runs": {}}
    for name in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            golden["runs"][name] = run_in(Path(folder), name)
    with tempfile.TemporaryDirectory() as folder:
        write_golden_store(Path(folder) / "store")
        train(0, 1, folder, SMALL)
        golden["runs"]["small"] = logged(Path(folder))
        shutil.rmtree(CHECKPOINT, ignore_errors=True)
        shutil.copytree(Path(folder) / f"runs/golden/checkpoints/step_{SAVED_AT:08d}", CHECKPOINT)
    LOSSES.write_text(json.dumps(golden, indent=1) + "\n")


def _commit() -> str:
    return subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    record()
