"""The commands that the documents show, run as they are written; README first, the others on what it leaves behind.

Commands are read from the documents: lines of code blocks, fenced or indented, and code spans that begin with `python`
or `torchrun`. Training commands get a smaller budget appended; nothing else is touched. A line after `$` shows
output or needs other machines; what else is not run here is in ELSEWHERE with the test that runs it, or in TYPED,
the lines that the walks of new users type (`tests/system/test_walks.py`).
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import parse_args

from launch import pretrain

ROOT = Path(__file__).resolve().parents[2]
FIRST = ("README.md", "docs/first_hour.md")
OTHERS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md") if path.stem != "first_hour")
# Beginning of a command -> the test that runs it.
ELSEWHERE = {
    "python launch/dashboard.py --serve": "tests/studies/dashboard/test_server.py",
    "python launch/ablate.py": "tests/system/test_ablate_command.py",
    "python -m launch.bench ledger": "tests/studies/bench/test_ledger.py",
    "python -m launch.gpu --document": "tests/studies/test_measured.py",
    "python launch/serve.py runs/chat": "tests/system/test_serve.py",
    "python launch/serve.py batch": "tests/system/test_serve.py",
    "python launch/bench.py": "tests/studies/bench/test_table.py",
    "python -m train.studies.bench.bubble": "tests/studies/bench/test_bubble.py",
    "python -m train.studies.context_extension": "tests/studies/test_context_extension.py",
    "python -m train.studies.distillation": "tests/studies/test_distillation.py",
    "python -m train.studies.optimizers": "tests/studies/test_optimizers.py",
    "python -m tests.fuzz_files": "tests/system/test_fuzz_files.py",
    "python -m tests.fuzz_layouts": "tests/parity/test_fuzz_layouts.py",
    "python -m tests.kernels.hopper_codegen": "tests/kernels/test_hopper_codegen.py",
    "python -m tests.parity.bench_transformers": "tests/parity/test_bench_transformers.py",
    "python launch/plan.py +cluster=h800_2048 --loads": "tests/system/test_plan_command.py",
    "python launch/pretrain.py +cluster=h800_2048 dry_run=true": "tests/studies/plan/test_dry_run.py",
    "python -m pytest": "make test and make test-long",
    "python launch/score.py MODEL --tasks": "needs a network: tests/evaluate/test_lm_eval_adapter.py has the adapter",
    "torchrun launch/pretrain.py +cluster=h100_1": "needs a GPU: test_the_h100_cluster_says_what_it_needs_or_composes",
}
STORES = "data.store=stores/mine/train data.heldout=stores/mine/heldout"
TWO_RANKS = "layout.dp=2 layout.ep=2 run.micro_batch_sequences=1"
# What the walks type: name -> document, and the line as it is written there.
TYPED = {
    "prepare": (
        "docs/first_hour.md",
        "python launch/prepare.py --source data/king_james_bible/text.jsonl --out stores/mine --vocab-size 1024",
    ),
    "train": ("docs/first_hour.md", f"torchrun launch/pretrain.py experiment=tiny run.name=mine {STORES}"),
    "dashboard": ("docs/first_hour.md", "python launch/dashboard.py runs/mine --out runs/mine.html"),
    "generate": ("README.md", 'python launch/generate.py runs/tiny_fp8 --prompt "In the beginning" --max-tokens 60'),
    "score": ("README.md", "python launch/score.py runs/tiny_fp8 --store stores/demo/heldout"),
    "export": ("README.md", "python launch/convert.py export runs/tiny_fp8 runs/hugging_face --format fp8 --verify"),
    "plan": ("README.md", "python launch/pretrain.py +cluster=h800_2048 dry_run=true"),
    "train on two ranks": (
        "README.md",
        f"torchrun --nproc-per-node 2 launch/pretrain.py experiment=tiny {TWO_RANKS} run.name=tiny_ep2",
    ),
    "stop the workers": ("docs/operating.md", "pkill -TERM -P PID_OF_TORCHRUN"),
    "prove the kernel": ("docs/add_a_kernel.md", "python -m pytest tests/kernels/test_e5m6.py -k bits"),
    "time the kernel": ("docs/add_a_kernel.md", "python -m launch.bench --only e5m6"),
}
SHORT = ["schedule.total_tokens=1024", "data.sequence_length=64", "schedule.batch_start_sequences=2"]
SHORT += ["schedule.batch_full_sequences=2", "run.micro_batch_sequences=2", "run.threads=1", "run.device=cpu"]


def code_of(document: str) -> list[str]:
    """The lines of a document's code blocks and its code spans, without comments, in order."""
    text = (ROOT / document).read_text(encoding="utf-8")
    fenced = re.findall(r"^```\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in fenced for line in block.splitlines()]
    lines += [line[4:] for line in outside.splitlines() if line.startswith("    ")]
    lines += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", outside)]
    return [re.sub(r"\s+#.*", "", line).removeprefix(".venv/bin/").strip() for line in lines]


def commands(document: str) -> list[str]:
    """What a document asks its reader to type, in order; once each."""
    found = code_of(document)
    return list(dict.fromkeys(line for line in found if re.match(r"(python|torchrun) \S", line) and "..." not in line))


def elsewhere(command: str) -> bool:
    walked = any(command == line for _, line in TYPED.values())
    return walked or any(command.startswith(beginning) for beginning in ELSEWHERE)


def process(command: str, place: Path) -> dict[str, Any]:
    """What `subprocess` is given to start a command as a user would, with the small budget."""
    words = shlex.split(command)
    if "launch/pretrain.py" in words and not {"--config", "dry_run=true"} & set(words):
        words += [word for word in SHORT if word.split("=")[0] not in command]
    binaries = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(place)
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return {"args": words, "cwd": place, "env": environment} | streams


def run(command: str, place: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(**process(command, place), timeout=600, check=False)


def run_all(documents: Iterable[str], place: Path, *, without: Iterable[str] = ()) -> None:
    """Each command once, in order."""
    found = dict.fromkeys(command for document in documents for command in commands(document))
    for command in found:
        if command not in without and not elsewhere(command):
            done = run(command, place)
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


@pytest.mark.long
def test_every_command_of_the_documents_runs(checkout: Path) -> None:
    """README and docs/first_hour.md, then the other documents on short runs in place of those of `make demo`."""
    run_all(FIRST, checkout)
    for demo, name in (("bf16", "tiny"), ("fp8", "tiny_fp8")):
        shutil.copytree(checkout / "runs" / name, checkout / "runs/demo" / demo)
        (checkout / "runs" / demo).symlink_to(checkout / "runs/demo" / demo)
    ran = {command for document in FIRST for command in commands(document)}
    run_all(OTHERS, checkout, without=ran)


def test_the_commands_of_the_documents_are_found() -> None:
    """A document that loses its commands, or a way of writing them that is not read, shows here."""
    assert len(commands("README.md")) >= 8
    assert "python launch/dashboard.py runs/bf16 runs/fp8 --out runs/compare.html" in commands("docs/dashboard.md")
    assert "python launch/ablate.py" in commands("docs/promises.md")
    everything = [command for document in (*FIRST, *OTHERS) for command in commands(document)]
    assert [beginning for beginning in ELSEWHERE if not any(c.startswith(beginning) for c in everything)] == []


def test_every_line_of_the_walks_is_written_as_they_type_it() -> None:
    missing = {
        f"{document}: {line}"
        for document, line in TYPED.values()
        if line not in [code.removeprefix("$ ") for code in code_of(document)]
    }
    assert missing == set(), "the document has changed: walk as it says now"


def test_launch_lines_of_clusters_carry_their_grace() -> None:
    """Read by torchrun's own parser, so that a flag that it does not know ends here."""
    texts = "\n".join((ROOT / document).read_text(encoding="utf-8") for document in (*FIRST, *OTHERS))
    shown = re.findall(r"^\$ torchrun (.*\+cluster=.*)$", texts, flags=re.MULTILINE)
    # What is shown as refused needs none.
    patience = [parse_args(shlex.split(line)).shutdown_timeout for line in shown if "--nproc-per-node 2 " not in line]
    assert patience == [1800] * 4


def test_a_mistyped_key_is_refused_as_the_document_shows(checkout: Path) -> None:
    text = (ROOT / "docs/first_hour.md").read_text(encoding="utf-8")
    shown = re.search(r"^\$ torchrun (launch/pretrain.py .*)\n(pretrain: .*)$", text, flags=re.MULTILINE)
    assert shown is not None
    before = sorted(checkout.glob("runs/*"))
    done = run(f"python {shown[1]}", checkout)
    assert done.returncode == 2
    assert done.stderr.strip() == shown[2]
    assert sorted(checkout.glob("runs/*")) == before, "refused before anything is made"


def test_the_h100_cluster_says_what_it_needs_or_composes(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run("python launch/pretrain.py +cluster=h100_1 --config", checkout)
    assert done.returncode == 0, done.stderr
    assert "device: cuda" in done.stdout
    monkeypatch.chdir(checkout)
    assert pretrain.main(["+cluster=h100_1", "run.device=cuda"]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith("pretrain: ")
