"""The comparison with `transformers` runs as docs/numerics.md says it does."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

NUMERICS = Path(__file__).resolve().parents[2] / "docs/numerics.md"


@pytest.mark.long
def test_the_documented_command_runs_as_written(run_command: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    (arguments,) = re.findall(r"^`python (.*bench_transformers.*?)`", NUMERICS.read_text(), flags=re.MULTILINE)
    # No round: parity, and no clock.
    shown = run_command(*arguments.split(), "0").stdout
    assert shown.startswith("parity: relative difference of the FP32 losses")
