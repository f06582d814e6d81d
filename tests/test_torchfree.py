"""Configurations and the planner's models load neither torch nor numpy: a plan or a refusal takes no seconds."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
# A new module of the planner is added there.
(CONTRACT,) = (each for each in CONTRACTS if each["name"].endswith("are free of torch"))
TORCH_FREE, HEAVY = CONTRACT["source_modules"], ("torch", "numpy")


def loaded(program: str) -> object:
    """What a fresh process prints as JSON in its last line; this one has loaded torch."""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_configurations_and_the_planners_models_load_neither_torch_nor_numpy() -> None:
    program = (
        "import importlib, json, sys\nloaded = {}\n"
        f"for name in {TORCH_FREE}:\n"
        "    importlib.import_module(name)\n"
        f"    loaded |= {{each: name for each in {HEAVY} if each in sys.modules and each not in loaded}}\n"
        "print(json.dumps(loaded))"
    )
    assert loaded(program) == {}, "what was loaded, and by which module"


def test_a_mistake_on_the_command_line_is_refused_before_torch_is_loaded() -> None:
    program = (
        "import contextlib, io, json, sys\nfrom launch.pretrain import main\n"
        "codes = [main(['modle=tiny']), main(['model.vocab_size=0']), main(['layout.dp=3', 'layout.ep=2'])]\n"
        "said = io.StringIO()\n"
        "with contextlib.redirect_stderr(said):\n"
        "    codes.append(main(['experiment=tiny', 'layout.dp=2', 'run.micro_batch_sequences=1']))\n"
        "assert '1 process was started' in said.getvalue(), said.getvalue()\n"
        "codes.append(main(['experiment=tiny', '--config']))\n"
        f"print(json.dumps([codes, [each for each in {HEAVY} if each in sys.modules]]))"
    )
    assert loaded(program) == [[2, 2, 2, 2, 0], []]
