"""Entry points choose how long OpenMP's threads spin before torch is loaded, and leave a user's own choice alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.threads import SETTINGS_OF_A_USER, SPIN_TURNS, spin_default

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("entry", ["ablate", "demo", "generate", "pretrain", "score"])
def test_the_turns_are_set_before_torch_is_loaded(entry: str) -> None:
    # Whatever imports torch fails here, so what is printed was set before.
    code = f"import sys, os; sys.modules['torch'] = None\ntry: import launch.{entry}\nexcept ImportError: pass\n"
    code += "print(os.environ.get('GOMP_SPINCOUNT'))"
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS_OF_A_USER}
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(SPIN_TURNS), done.stderr


@pytest.mark.parametrize("name", sorted(SETTINGS_OF_A_USER))
def test_a_users_own_choice_is_left_alone(name: str) -> None:
    assert spin_default({name: "passive", "PATH": "/bin"}) == {}
