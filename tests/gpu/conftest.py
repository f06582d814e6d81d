"""These tests run device code on a GPU: `make gpu`. Elsewhere each of them is skipped and says why.

Nothing here may import Triton when it is collected: a machine without a GPU pays a fraction of a second. Tests that
would begin after `--gpu-seconds` are skipped and say so, for `make gpu` has eight minutes for everything.
"""

from __future__ import annotations

import time
from typing import get_args

import pytest
import torch

from kernels.backend import use_backend
from kernels.config import Backend

STARTED_S = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-seconds", type=float, help="skip GPU tests that would begin later than this")
    parser.addoption("--kernels", choices=get_args(Backend), default="gluon", help="kernels.backend of this process")


def pytest_configure(config: pytest.Config) -> None:
    # Known only where this folder is what pytest was asked for.
    use_backend(config.getoption("--kernels", default="gluon"))


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest) -> torch.device:
    """The GPU, or a skip."""
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU, which `make test` hides: run `make gpu` on a machine with one")
    limit = request.config.getoption("--gpu-seconds", default=None)
    if limit is not None and time.monotonic() - STARTED_S > limit:
        pytest.skip(f"not run: the {limit:.0f} s that --gpu-seconds allows were spent; `pytest tests/gpu` has no limit")
    return torch.device("cuda")


@pytest.fixture
def hopper(request: pytest.FixtureRequest, device: torch.device) -> torch.device:
    """A GPU of compute capability 9.0 whose Gluon products may run, or a skip."""
    if request.config.getoption("--kernels", default="gluon") != "gluon":
        pytest.skip("the Gluon GEMM was left out by --kernels: `make gpu` runs this where its canary is right")
    if torch.cuda.get_device_capability(device) != (9, 0):
        name = torch.cuda.get_device_name(device)
        pytest.skip(
            f"the Gluon GEMM is for compute capability 9.0, not {name}: run `make gpu` on an H100, H200 or H800"
        )
    return device
