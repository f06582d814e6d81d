"""The files of CI and of the container, as far as no runner, image registry or GPU is needed.

`.ci/gpu` runs for real, with a `make` that leaves a given report; the job file and the Dockerfile are read. actionlint
and hadolint were run by hand (docs/ci.md).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from packaging.requirements import Requirement

from train.studies import gpu_report
from train.studies.gpu_report import Finished
from train.studies.gpu_sections import PARTS, Section, Status
from train.studies.te_parity import ABSENT

ROOT = Path(__file__).resolve().parents[2]
GREEN: dict[str, Section] = dict.fromkeys(PARTS, Section("green")) | {"te": Section("left out", ABSENT)}


def report(folder: Path, sections: dict[str, Section], *, gpu: bool = True) -> str:
    """What `make gpu` writes for these sections."""
    finished = [Finished(name, section, 1.0) for name, section in sections.items()]
    gpu_report.write(finished, torch.device("cpu"), folder)
    found = json.loads((folder / "report.json").read_text())
    if gpu:
        found["device"] = {"name": "NVIDIA H100", "compute_capability": "9.0"}
    return json.dumps(found)


def ci_gpu(tmp_path: Path, text: str | None, *, status: int = 0) -> subprocess.CompletedProcess[str]:
    """`.ci/gpu`, whose `make` writes this report and ends with this status."""
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    (tmp_path / "given.json").write_text(text or "")
    give = f'cp "{tmp_path}/given.json" "{out}/report.json"' if text else "true"
    make = tmp_path / "make"
    make.write_text(f'#!/bin/sh\ntest "$1" = gpu && test "$3" = "ARGS=--out {out}" || exit 9\n{give}\nexit {status}\n')
    make.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "GPU_PYTHON": sys.executable, "GPU_OUT": str(out)}
    command = [str(ROOT / ".ci/gpu")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_green_report_passes_and_says_what_was_left_out(tmp_path: Path) -> None:
    done = ci_gpu(tmp_path, report(tmp_path, GREEN))
    assert done.returncode == 0, done.stderr
    assert f"gpu: parity te: left out, {ABSENT}" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("gpu: green, ")


@pytest.mark.parametrize(
    ("part", "status", "words"),
    [
        ("one_step", "red", "parity one_step: red, planted"),
        ("training", "not measured", "parity training: not measured, planted"),
        ("layer", "failed", "speed layer: failed, planted"),
        # For a person at a machine without pytest a note; for CI a suite that did not run.
        ("tests", "left out", "parity tests: left out, planted"),
        ("te", "red", "parity te: red, planted"),
        ("te", "left out", "parity te: left out, planted"),
    ],
)
def test_a_part_that_is_red_or_did_not_run_fails(tmp_path: Path, part: str, status: Status, words: str) -> None:
    text = report(tmp_path, GREEN | {part: Section(status, "planted")})
    # Even where make itself is content.
    done = ci_gpu(tmp_path, text)
    assert done.returncode == 1
    assert f"AGAINST IT: {words}" in done.stderr


def test_no_report_an_old_one_no_gpu_or_a_failing_make_fails(tmp_path: Path) -> None:
    text = report(tmp_path, GREEN)
    assert "make gpu ended with 2" in ci_gpu(tmp_path, text, status=2).stderr
    # The report of the call before is still there: it is not this one's.
    missing = ci_gpu(tmp_path, None, status=2)
    assert (missing.returncode, "make gpu ended with 2 before it could write one" in missing.stderr) == (1, True)
    assert "no GPU ran it, but CPU" in ci_gpu(tmp_path, report(tmp_path, GREEN, gpu=False)).stderr


def test_a_slow_bench_that_found_no_time_is_no_failure(tmp_path: Path) -> None:
    done = ci_gpu(tmp_path, report(tmp_path, GREEN | {"layer": Section("not measured", "the budget was spent")}))
    assert done.returncode == 0, done.stderr


def test_the_jobs_call_our_two_commands_and_keep_forks_off_our_machine() -> None:
    workflow: dict[Any, Any] = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    # YAML 1.1 reads the key `on` as true.
    assert set(workflow) == {"name", True, "permissions", "concurrency", "jobs"}
    assert workflow["permissions"] == {"contents": "read"}
    cpu, gpu = workflow["jobs"]["cpu"], workflow["jobs"]["gpu"]
    for job, command in ((cpu, ".ci/run"), (gpu, ".ci/gpu")):
        runs = [step["run"] for step in job["steps"] if "run" in step]
        assert runs[-1] == command
        assert os.access(ROOT / command, os.X_OK)
        assert job["timeout-minutes"] <= 90
        assert all(re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"]) for step in job["steps"] if "uses" in step)
    assert set(gpu["runs-on"]) == {"self-hosted", "linux", "x64", "gpu"}
    assert "head.repo.full_name == github.repository" in gpu["if"]
    assert gpu["steps"][-1]["if"] == "always()"


def dockerfile_pins() -> dict[str, list[str]]:
    """Package -> the versions that the Dockerfile pins; its comments are left out."""
    lines = [
        each for each in (ROOT / "launch/container/Dockerfile").read_text().splitlines() if not each.startswith("#")
    ]
    found: dict[str, list[str]] = {}
    for name, version in re.findall(r"([\w-]+)(?:\[[\w,-]+\])?==([\w.]+)", "\n".join(lines)):
        found.setdefault(name, []).append(version)
    return found


def test_the_container_s_pins_agree_with_ours() -> None:
    text, pins = (ROOT / "launch/container/Dockerfile").read_text(), dockerfile_pins()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    (engine,) = map(Requirement, extras["te"])
    assert [engine.specifier.contains(version) for version in pins[engine.name]] == [True]
    assert pins["transformer-engine"] == ["2.20.2"]
    table = json.loads((ROOT / "tests/parity/te_signatures.json").read_text())
    assert table["package"] == f"transformer-engine {pins['transformer-engine'][0]} (PyPI)"
    # These come from requirements/, and what the comments say of them is what stands there.
    ours = "".join((ROOT / f"requirements/{name}.txt").read_text() for name in ("torch", "dev"))
    for name, version in (("torch", "2.13.0"), ("triton", "3.7.1"), ("deepspeed", "0.19.8")):
        assert name not in pins
        assert re.search(rf"(?m)^{name}=={re.escape(version)}\b", ours), name
        assert re.search(rf"(?i){name} {re.escape(version)}", text), name
    # NCCL: torch's own, and a later one for DeepEP alone, after `pip check`.
    assert pins["nvidia-nccl-cu13"] == ["2.29.7", "2.30.7"]
    assert text.index("pip check") < text.index("nvidia-nccl-cu13==2.30.7")
    for name in re.findall(r"-[rc] (requirements/\w+\.txt)", text):
        assert (ROOT / name).exists()
    assert "NEVER BUILT" in text
    assert re.search(r"^FROM nvidia/cuda:13\.0\.\d-cudnn-devel-ubuntu24\.04$", text, re.MULTILINE)
