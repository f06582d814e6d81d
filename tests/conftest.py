"""What every test has: one seed, deterministic algorithms, NaN in uninitialised memory, no network, no GPU."""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

# Set before anything imports the libraries that read it.
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    # cuBLAS is deterministic only with a fixed workspace; read when CUDA starts.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}
os.environ.update(OFFLINE)
# Triton functions run in its interpreter, on CPU tensors; read when Triton is imported. `make gpu` says 0.
if os.environ.setdefault("TRITON_INTERPRET", "1") != "0":
    # And nothing else takes a GPU that happens to be there: these are the CPU's tests, with the CPU's bits.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np  # noqa: E402
import pytest  # noqa: E402

from tests.ranks import SEED, make_deterministic  # noqa: E402

# Handed out first by `--dist loadfile --no-loadscope-reorder`: no worker is left alone with minutes of work at the end.
LONG_FIRST = ("tests/parity/", "tests/system/", "tests/studies/plan/test_dry_run.py")
REPOSITORY = Path(__file__).resolve().parent.parent

# What is imported and collected is no garbage: looking for some all the while took half of the 20 s.
gc.disable()
# Ctrl-C reaches the processes that tests start, also where a shell runs the tests in the background and ignores it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Fixtures of a module come before `fixed_seed`.
make_deterministic()
# The tests that `make gpu` runs need pytest and torch only.
if importlib.util.find_spec("hypothesis"):
    from hypothesis import settings

    # No deadline: machines are noisy.
    settings.register_profile("deterministic", derandomize=True, deadline=None)
    settings.load_profile("deterministic")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the long files first; within each part the order stays."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONG_FIRST))


def pytest_collection_finish() -> None:
    """Let no later garbage collection look at what imports and collected tests hold until the end."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Give every test the same random state, and switch back on what another test left off."""
    random.seed(SEED)
    np.random.seed(SEED)  # noqa: NPY002  (libraries read the global state)
    make_deterministic()
    # A rank other than the first keeps quiet, in whichever process it is played.
    logging.getLogger("train").setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def run_command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `python ARGUMENTS` offline, in one thread, from the repository's root unless `cwd` says otherwise.

    Returns:
        A function (*arguments, timeout_s=300, check=True, cwd=root, **environment) -> CompletedProcess with
        text output; with `check`, a non-zero exit fails the test and shows both streams.
    """

    def run(
        *arguments: str | Path, timeout_s: float = 300, check: bool = True, cwd: Path = REPOSITORY, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=cwd,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if check and done.returncode:
            pytest.fail(f"{arguments} exited with {done.returncode}\n{done.stdout}\n{done.stderr}", pytrace=False)
        return done

    return run
