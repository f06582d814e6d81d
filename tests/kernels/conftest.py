"""Device code runs in Triton's interpreter here (`tests/kernels/triton_interpreter.py`).

Triton exists on Linux only. Elsewhere the files that need it are skipped, each with the reason. No test leaves weight
gradients behind: their queue is global.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kernels import deferred

WITH_TRITON = sys.platform == "linux"
NEEDS_TRITON = re.compile(r"^(import triton|from (triton|kernels\.gpu|tests\.kernels\.(gluon|stand_in)))", re.MULTILINE)

if WITH_TRITON:
    from tests.kernels.triton_interpreter import mend

    mend()


class WithoutTriton(pytest.Module):
    """A test file that cannot be imported on this platform."""

    def collect(self) -> list[pytest.Item]:
        pytest.skip("Triton exists on Linux only; CI runs this file", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Stand in for a file that needs Triton where there is none."""
    if WITH_TRITON or not NEEDS_TRITON.search(module_path.read_text()):
        return None
    module: pytest.Module = WithoutTriton.from_parent(parent, path=module_path)
    return module


@pytest.fixture(autouse=True)
def drained() -> Iterator[None]:
    """Fail the test after which weight gradients are still queued."""
    yield
    deferred.check_drained()
