"""`make gpu` without a GPU: it says so; with small sizes on a CPU it writes the whole report; what dies is named.

The command itself, a process a part, is a long test: importing torch eleven times is half of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.config import Backend
from kernels.formats import Quantized
from kernels.gpu import gemm_hopper
from tests.kernels.gluon_interpreter import interpret
from train.studies import gpu_canary, gpu_report, gpu_sections
from train.studies.gpu_report import Command, Finished
from train.studies.gpu_sections import PARTS, Section

ROOT = Path(__file__).resolve().parents[2]
# What `make gpu` does without. Where no GPU is, it needs no Triton either.
ABSENT = ("hydra", "omegaconf", "datasets", "wandb", "deepspeed", "plotly", "rich", "tokenizers", "deep_gemm")
ABSENT += ("transformer_engine",)
ABSENT += () if torch.cuda.is_available() else ("triton",)
ONLY_WITHOUT = "says what happens without a GPU, and this machine has one: CI runs it"


@pytest.mark.skipif(torch.cuda.is_available(), reason=ONLY_WITHOUT)
def test_without_a_gpu_make_says_one_sentence_and_sets_nothing_up() -> None:
    make = ["make", "gpu", f"GPU_PYTHON={sys.executable}"]
    # Under `make test ARGS=...` this would be a make within a make: it talks about folders and takes over ARGS.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "ARGS"))}
    done = subprocess.run(make, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    sentence, status = done.stderr.strip().splitlines()
    assert sentence == "gpu: this machine shows no CUDA GPU; `make test` runs what a CPU can check"
    assert "Error 2" in status
    assert not done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On the path of a process, it cannot import the packages of ABSENT."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(f"import sys; sys.modules.update(dict.fromkeys({ABSENT!r}))")
    return folder


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, site: Path, run_command: Callable[..., subprocess.CompletedProcess[str]]
) -> Path:
    """What `make gpu` writes with small sizes on a CPU, where the packages of ABSENT cannot be imported."""
    out = tmp_path_factory.mktemp("gpu")
    command = ("-m", "launch.gpu", "--tiny", "--device", "cpu", "--budget", "600", "--out", out)
    # pytest looks at the modules of its plugins, and hydra has one.
    run_command(*command, timeout_s=900, PYTHONPATH=str(site), PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    return out


@pytest.fixture(scope="module")
def report(folder: Path) -> Any:
    return json.loads((folder / "report.json").read_text())


@pytest.mark.long
def test_the_whole_report_comes_out_of_small_sizes(folder: Path, report: Any) -> None:
    page = (folder / "report.md").read_text()
    check_order(page, report)
    assert len(report["parity"]["training"]["data"]["losses"]["fp8"]) == 6
    assert report["speed"]["layer"]["data"]["times"][-1]["precision"] == "fp8_v3"
    assert all((folder / f"{name}.log").exists() for name in PARTS)
    assert "| fp8 |" in page[page.index("# Speed") :]


def check_order(page: str, report: Any) -> None:
    """Parity first, parts in order, and what it was measured with."""
    places = [page.index(f"## {plan.title}: ") for plan in PARTS.values()]
    assert places == sorted(places), "parts are in order"
    assert page.index("# Parity") < places[0]
    speed = page.index("# Speed")
    assert {name for name, place in zip(PARTS, places, strict=True) if place > speed} == {"kernels", "peers", "layer"}
    assert list(report["parity"]) == ["canary", "tests", "one_step", "training", "resume", "small", "te"]
    assert {"date", "commit", "device", "versions", "left_out"} <= set(report)
    assert report["versions"]["torch"] == torch.__version__


def test_a_report_begins_with_parity_and_has_every_part_in_order(tmp_path: Path) -> None:
    done = [Finished(name, Section("green"), 1.0) for name in PARTS]
    page = gpu_report.write(done, torch.device("cpu"), tmp_path).read_text()
    check_order(page, json.loads((tmp_path / "report.json").read_text()))


@pytest.mark.long
def test_every_part_runs_where_only_torch_is_installed(report: Any) -> None:
    statuses = {name: part["status"] for kind in ("parity", "speed") for name, part in report[kind].items()}
    wanted = dict.fromkeys(PARTS, "green") | {"te": "left out"}
    wanted |= {} if torch.cuda.is_available() else {"tests": "left out", "canary": "left out"}
    assert statuses == wanted
    assert report["green"] is True
    assert {"hydra", "datasets", "wandb", "plotly", "transformer_engine"} <= set(report["left_out"])
    assert report["parity"]["te"]["reason"] == "transformer-engine not installed, skipped"


@pytest.mark.long
@pytest.mark.skipif(torch.cuda.is_available(), reason=ONLY_WITHOUT)
def test_the_gpu_tests_are_collected_and_skipped_without_triton(folder: Path, report: Any) -> None:
    section = report["parity"]["tests"]
    assert "needs an NVIDIA GPU, which `make test` hides: run `make gpu` on a machine with one" in section["reason"]
    assert section["data"]["passed"] == 0
    assert section["data"]["failed"] == []
    assert " passed" not in (folder / "tests.log").read_text()


def python(code: str) -> Command:
    return lambda part, seconds, out, backend: [sys.executable, "-c", code, part, str(out)]


@pytest.fixture
def two_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_report, "PARTS", {name: PARTS[name] for name in ("training", "layer")})


@pytest.mark.usefixtures("two_parts")
def test_a_part_that_dies_is_failed_with_its_last_words(tmp_path: Path) -> None:
    done = gpu_report.run_all(python("raise SystemExit('no memory')"), tmp_path, environment=os.environ)
    assert [each.section.status for each in done] == ["failed", "failed"]
    assert done[0].section.reason == "its process ended with 1: no memory"
    assert not gpu_report.is_green(done)
    page = gpu_report.write(done, torch.device("cpu"), tmp_path).read_text()
    assert "RED" in page.splitlines()[2]
    assert "these times belong to a build that has not passed it" in page


@pytest.mark.usefixtures("two_parts")
def test_a_part_beyond_its_time_is_killed_and_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_report, "GRACE_S", 0.0)
    sleep = python("import time; print('asleep', flush=True); time.sleep(600)")
    done = gpu_report.run_all(sleep, tmp_path, environment=os.environ, total_s=2.0)
    assert [each.section.status for each in done] == ["not measured", "not measured"]
    assert "did not finish" in done[0].section.reason
    assert not gpu_report.is_green(done), "parity that was not measured is not green"
    page = gpu_report.write(done, torch.device("cpu"), tmp_path).read_text()
    assert f"- {PARTS['layer'].title}, not measured: " in page[page.index("# Left out") :]


@pytest.mark.usefixtures("two_parts")
@pytest.mark.parametrize("ends", ["its time", "Ctrl-C"])
def test_what_a_part_has_started_dies_with_it(ends: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that hangs in a process of the part would spin under the parts that follow."""
    monkeypatch.setattr(gpu_report, "GRACE_S", 0.0)
    note = tmp_path / "pid"
    child = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    starts = python(f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {child!r}])")
    if ends == "its time":
        gpu_report.run_all(starts, tmp_path, environment=os.environ, total_s=4.0)
    else:
        wait = subprocess.Popen.wait

        def interrupted(process: subprocess.Popen[bytes], timeout: float | None = None) -> int:
            if timeout is None:
                return wait(process)
            while not (note.exists() and note.read_text()):
                time.sleep(0.02)
            raise KeyboardInterrupt

        monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            gpu_report.run_all(starts, tmp_path, environment=os.environ)
    pid, deadline_s = int(note.read_text()), time.monotonic() + 60
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.usefixtures("two_parts")
def test_time_that_a_part_leaves_is_the_next_ones(tmp_path: Path) -> None:
    given = []

    def command(part: str, seconds: float, out: Path, backend: Backend) -> Sequence[str]:
        given.append(seconds)
        code = "import json, sys; open(sys.argv[1], 'w').write(json.dumps({'status': 'green'}))"
        return [sys.executable, "-c", code, str(out)]

    done = gpu_report.run_all(command, tmp_path, environment=os.environ)
    assert [each.section.status for each in done] == ["green", "green"]
    assert gpu_report.is_green(done)
    assert given[1] == pytest.approx(PARTS["training"].share_s + PARTS["layer"].share_s - done[0].seconds, abs=1.0)


@pytest.mark.parametrize(
    ("part", "status", "green"),
    [
        ("training", "green", True),
        ("training", "left out", True),
        ("training", "red", False),
        ("training", "not measured", False),
        ("layer", "not measured", True),
        ("layer", "red", False),
        ("layer", "failed", False),
    ],
)
def test_what_makes_the_report_green(part: str, status: gpu_sections.Status, green: bool) -> None:
    assert gpu_report.is_green([Finished(part, Section(status), 1.0)]) is green


JUNIT = """<testsuites><testsuite>
<testcase classname="tests.gpu.a" name="good"/>
<testcase classname="tests.gpu.a" name="bad"><failure message="assert 1 == 2">...</failure></testcase>
<testcase classname="tests.gpu.a" name="late"><skipped message="not measured: the 9 s were spent"/></testcase>
</testsuite></testsuites>"""


def test_failures_and_skips_of_pytest_are_listed(tmp_path: Path) -> None:
    (tmp_path / "junit.xml").write_text(JUNIT)
    section = gpu_sections.read_junit([tmp_path / "junit.xml"])
    assert (section.status, section.data["passed"]) == ("red", 1)
    assert "FAILED `tests.gpu.a::bad`: assert 1 == 2" in section.markdown
    assert "skipped 1: not measured: the 9 s were spent" in section.markdown


OPTIONS = """
def pytest_addoption(parser):
    parser.addoption("--kernels")
    parser.addoption("--gpu-seconds")
"""
GROUPS = {
    "good": "def test_one():\n    pass\ndef test_two():\n    pass\n",
    "bad": "def test_sum():\n    assert 1 + 1 == 3\n",
    # As an illegal access does.
    "dead": "import os\ndef test_access():\n    os._exit(6)\n",
    "late": "import pytest\ndef test_skipped():\n    pytest.skip('not run: the 9 s were spent')\n",
    "hangs": "import time\ndef test_sleep():\n    time.sleep(600)\n",
}


@pytest.mark.parametrize(
    ("names", "status", "reason"),
    [
        (["good"], "green", ""),
        (["good", "bad", "dead", "late"], "red", "2 tests failed"),
        (["good", "late"], "not measured", "the budget was spent before 1 tests"),
        (["good", "hangs"], "not measured", "the budget was spent before {hangs}"),
    ],
)
def test_each_group_of_tests_has_its_own_process(
    names: list[str], status: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What dies, hangs or comes too late costs itself only, and is never green."""
    monkeypatch.setattr(gpu_sections, "PATIENCE_S", 0.0)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    (tmp_path / "conftest.py").write_text(OPTIONS)
    files = {name: tmp_path / f"test_{name}.py" for name in names}
    for name, path in files.items():
        path.write_text(GROUPS[name])
    section = gpu_sections.run_tests([[str(path)] for path in files.values()], "portable", time.monotonic() + 10.0)
    assert (section.status, section.reason) == (status, reason.format(**files))
    assert section.data["passed"] == 2, "of the good one"
    if "dead" in names:
        assert section.data["failed"][0] == [str(files["dead"]), "its process ended with 6: without a word"]


def test_a_configuration_that_fails_is_named_within_its_time() -> None:
    codes = {
        "two_waves": "pass",
        "two_blocks": "import time; time.sleep(600)",
        "wide": "import sys; sys.exit('relative error 1.0e+00')",
        "halves": "pass",
        "wgrad": "import os; os.abort()",
    }
    assert gpu_canary.faults(lambda name: [sys.executable, "-S", "-c", codes[name]], limit_s=3.0) == {
        "two_blocks": "nothing after 3 s",
        "wide": "ended with 1: relative error 1.0e+00",
        "wgrad": "ended with -6: without a word",
    }


@pytest.mark.parametrize(
    ("section", "says"),
    [
        (Section("red", "wide: nothing after 20 s"), "**THE GLUON PRODUCTS FAILED: every part after it"),
        (Section("failed"), "**The canary did not finish: every part after it"),
        (Section("green"), ""),
    ],
)
def test_where_the_canary_fails_all_parts_take_portable_products_and_the_page_says_so(
    section: Section, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_report, "PARTS", {name: PARTS[name] for name in ("canary", "training", "layer")})
    given, times = [], {}

    def command(part: str, seconds: float, out: Path, backend: Backend) -> Sequence[str]:
        given.append(backend)
        times[part] = seconds
        status = section.status if part == "canary" else "green"
        code = "import json, sys; open(sys.argv[1], 'w').write(json.dumps({'status': sys.argv[2]}))"
        return [sys.executable, "-S", "-c", code, str(out), status]

    done = gpu_report.run_all(command, tmp_path, environment=os.environ, total_s=95.0)
    assert times["canary"] == pytest.approx(PARTS["canary"].share_s, abs=1.0), "whatever the budget is"
    # Each may use what is left, and all together no more than there is.
    rest_s, shares = 95.0 - PARTS["canary"].share_s, (PARTS["training"].share_s, PARTS["layer"].share_s)
    assert times["training"] <= PARTS["canary"].share_s + rest_s * shares[0] / sum(shares)
    assert times["layer"] <= 95.0
    fell_back = section.status != "green"
    assert given == ["gluon", *["portable" if fell_back else "gluon"] * 2]
    assert gpu_report.is_green(done) is not fell_back
    page = gpu_report.write(done, torch.device("cpu"), tmp_path).read_text()
    assert says in page
    assert ("multiplied in portable Triton" in page) is fell_back


@pytest.mark.parametrize("name", gpu_canary.BOUNDS)
def test_a_canary_is_right_in_the_interpreter_and_not_with_another_scale(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for size, value in {"ROWS": 256, "COLS": 192, "INNER": 256}.items():
        monkeypatch.setattr(gpu_canary, size, value)
    with interpret(races=False):
        assert gpu_canary.fault_of(name, torch.device("cpu")) is None
    multiply = gemm_hopper.gemm

    def with_the_neighbours_scale(a: Quantized, *args: Any, **named: Any) -> None:
        multiply(Quantized(a.payload, a.scale.roll(1, 1)), *args, **named)

    monkeypatch.setattr(gemm_hopper, "gemm", with_the_neighbours_scale)
    with interpret(races=False):
        assert str(gpu_canary.fault_of(name, torch.device("cpu"))).startswith("relative error ")


def test_absent_packages_are_listed_with_what_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert gpu_report.left_out()["datasets"].startswith("tokenised stores")


def test_json_holds_no_nan() -> None:
    assert gpu_report.plain({"a": (1.0, float("nan")), 2: [float("inf")]}) == {"a": [1.0, "nan"], "2": ["inf"]}
