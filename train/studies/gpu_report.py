"""`make gpu`: run every part in a process of its own, within one budget, and write one report.

    for each part of train/studies/gpu_sections.py, parity before speed:
        start its process -> wait until its deadline, then kill it -> its section, or why there is none
    runs/gpu/report.json, runs/gpu/report.md    what, where, when; parity; speed; what was left out and why
    runs/gpu/<part>.log                          output of the part's process

Part i may run until the sum of the first i shares after the start: time that one part leaves is the next one's, and no
part can take another's. A part whose process dies is "failed", with the last line it wrote. The report is green only if
every parity part that can run here is green and no speed part's own parity is red: no speed without parity.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kernels.backend import use_backend
from kernels.config import Backend
from train.studies.gpu_sections import PARTS, ROOT, Options, Section
from train.studies.measured import commit, said

# Package -> what is left out without it.
OPTIONAL = {
    "hydra": "launch/pretrain.py and its overrides; the smoke tests read configs/*.yaml themselves",
    "datasets": "tokenised stores; the smoke tests train on tokens of their own",
    "wandb": "the mirror to wandb",
    "plotly": "the dashboard",
    "deepspeed": "nothing of ours needs it",
    "deep_gemm": "DeepGEMM as a peer of the products, and kernels.backend=deepgemm",
    "transformer_engine": "the second opinion on payloads and one step (precision=fp8_te)",
}
VERSIONS = ("torch", "triton", "numpy", "pytest", "transformers")
# A part is asked to finish this long before it is killed, which leaves it time to write its section.
GRACE_S = 8.0
# (part, seconds, JSON file, kernels.backend) -> a command line that calls `run_part`.
Command = Callable[[str, float, Path, Backend], Sequence[str]]


@dataclass(frozen=True)
class Finished:
    """A part with its section and how long its process took, seconds."""

    name: str
    section: Section
    seconds: float


def run_part(name: str, options: Options, budget_s: float, out: Path) -> None:
    """Run a part in this process, which is killed after budget_s seconds, and write its section as JSON."""
    use_backend(options.backend)
    section = PARTS[name].run(options, max(1.0, budget_s - GRACE_S))
    out.write_text(json.dumps(plain(vars(section)), allow_nan=False), encoding="utf-8")


def plain(value: Any) -> Any:
    """The value for JSON: tuples become lists, NaN and infinity become text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def run_all(
    command: Command, directory: Path, *, environment: Mapping[str, str], total_s: float | None = None
) -> list[Finished]:
    """Every part, one after the other, shares stretched to the sum `total_s`; logs are written into the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    # A canary needs its seconds whatever the budget is; the others share the rest.
    fixed_s = sum(plan.share_s for name, plan in PARTS.items() if name == "canary")
    shared_s = sum(plan.share_s for plan in PARTS.values()) - fixed_s
    stretch = 1.0 if total_s is None else max(0.0, total_s - fixed_s) / shared_s
    deadline_s, finished = time.monotonic(), list[Finished]()
    for name, plan in PARTS.items():
        deadline_s += plan.share_s * (1.0 if name == "canary" else stretch)
        began_s = time.monotonic()
        print(f"gpu: {plan.title} ...", end=" ", flush=True)
        out, budget_s = directory / f"{name}.json", deadline_s - began_s
        backend: Backend = "portable" if without_gluon(finished) else "gluon"
        section = _run_process(command(name, budget_s, out, backend), out, budget_s, environment)
        finished.append(Finished(name, section, time.monotonic() - began_s))
        print(f"{section.status}, {finished[-1].seconds:.0f} s {section.reason}".rstrip(), flush=True)
    return finished


def without_gluon(finished: Sequence[Finished]) -> bool:
    """Whether the canary found a fault, or died of one, so that the parts after it multiply in portable Triton."""
    return any(each.name == "canary" and each.section.status not in ("green", "left out") for each in finished)


def _run_process(command: Sequence[str], out: Path, budget_s: float, environment: Mapping[str, str]) -> Section:
    log = out.with_suffix(".log")
    out.unlink(missing_ok=True)
    if budget_s <= GRACE_S:
        return Section("not measured", "the budget was spent by the parts before it")
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            [*command],
            cwd=ROOT,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            returncode = process.wait(budget_s)
        except subprocess.TimeoutExpired:
            return Section("not measured", f"it did not finish in its {budget_s:.0f} s; {log.name} has its words")
        finally:
            # And all that it has started, also at Ctrl-C: a kernel that hangs would spin under what follows.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if returncode or not out.exists():
        words = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it said nothing"]
        return Section("failed", f"its process ended with {returncode}: {words[-1][:300]}")
    section = Section(**json.loads(out.read_text(encoding="utf-8")))
    out.unlink()
    return section


def machine(device: torch.device) -> dict[str, Any]:
    """Device, driver, versions, commit and date of the numbers."""
    gpu: dict[str, Any] = {"name": "CPU"}
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        gpu = {
            "name": found.name,
            "memory_gb": round(found.total_memory / 1e9, 1),
            "multiprocessors": found.multi_processor_count,
            "compute_capability": f"{found.major}.{found.minor}",
            "driver": said(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]),
        }
    versions = {name: _version(name) for name in VERSIONS}
    versions |= {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    if device.type == "cuda":
        versions["cudnn"] = str(torch.backends.cudnn.version())
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": commit(),
        "device": gpu,
        "versions": versions,
        "python": sys.executable,
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def left_out() -> dict[str, str]:
    """Absent package -> what is left out without it."""
    return {name: what for name, what in OPTIONAL.items() if importlib.util.find_spec(name) is None}


def is_green(finished: Sequence[Finished]) -> bool:
    """Every parity part that can run here is green, and no speed part is red or failed."""
    speed = [each.section.status for each in finished if PARTS[each.name].kind == "speed"]
    return _parity_is_green(finished) and not {"red", "failed"} & set(speed)


def _parity_is_green(finished: Sequence[Finished]) -> bool:
    return {each.section.status for each in finished if PARTS[each.name].kind == "parity"} <= {"green", "left out"}


def write(finished: Sequence[Finished], device: torch.device, directory: Path) -> Path:
    """report.json and report.md; returns the path of the second."""
    where, absent = machine(device), left_out()
    report = {**where, "green": is_green(finished), "left_out": absent, "parity": {}, "speed": {}}
    for each in finished:
        report[PARTS[each.name].kind][each.name] = {"seconds": each.seconds, **vars(each.section)}
    text = json.dumps(plain(report), indent=1, allow_nan=False, ensure_ascii=False)
    (directory / "report.json").write_text(text + "\n", encoding="utf-8")
    page = directory / "report.md"
    page.write_text(markdown(finished, where, absent), encoding="utf-8")
    return page


def markdown(finished: Sequence[Finished], where: Mapping[str, Any], absent: Mapping[str, str]) -> str:
    """The page: what and where, a line per part, parity, speed, what was left out."""
    device, versions = where["device"], where["versions"]
    lines = ["# GPU report", "", f"**{'green' if is_green(finished) else 'RED'}**, {where['date']}.", ""]
    lines += [f"- {key.replace('_', ' ')}: {value}" for key, value in device.items()]
    lines += [f"- commit: {where['commit']}", "- " + ", ".join(f"{key} {value}" for key, value in versions.items()), ""]
    if without_gluon(finished):
        (canary,) = (each.section for each in finished if each.name == "canary")
        why = "THE GLUON PRODUCTS FAILED" if canary.status == "red" else "The canary did not finish"
        lines += [f"**{why}: every part after it multiplied in portable Triton.**", ""]
    lines += ["| part | status | s | why |", "|---|---|---|---|"]
    parts = [(PARTS[each.name], each.section, each.seconds) for each in finished]
    lines += [
        f"| {plan.title} | {section.status} | {seconds:.0f} | {section.reason.replace('|', '/')} |"
        for plan, section, seconds in parts
    ]
    for kind in ("parity", "speed"):
        lines += ["", f"# {kind.capitalize()}"]
        if kind == "speed" and not _parity_is_green(finished):
            lines += ["", "**Parity above is not green: these times belong to a build that has not passed it.**"]
        for plan, section, _ in parts:
            if plan.kind == kind:
                body = section.markdown or f"{section.status}: {section.reason}"
                lines += ["", f"## {plan.title}: {section.status}", "", body]
    lines += ["", "# Left out", ""]
    missing = [each for each in finished if each.section.status in ("left out", "not measured", "failed")]
    lines += [f"- {PARTS[each.name].title}, {each.section.status}: {each.section.reason}" for each in missing]
    lines += [f"- `{name}` is not installed: {what}" for name, what in absent.items()]
    return "\n".join(lines if lines[-1] else [*lines, "Nothing."]) + "\n"
