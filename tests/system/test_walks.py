"""Three new users: one with text on a laptop, one with a cluster, one with a kernel; each types what the documents say.

A walk is a script of lines of documents (`TYPED` in `tests/system/test_commands.py`), with files of the user's own and
the small budget. Beside each line stands the sentence that the document promises, as it is written there, and what
shows it.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.system.lives import wait_for_step
from tests.system.test_commands import ROOT, STORES, TYPED, process, run
from train.checkpoint.dcp import latest
from train.observe.sinks import read_events, read_run

pytestmark = pytest.mark.long
# Of the texts of a user, in the order in which a folder is read; the empty one is no document.
NAMES = ("-1.txt", "Chapter 10.txt", "Chapter 9.TXT", "a'b & c.txt", "empty.txt", "sub dir/x.txt", "Übung “2”.txt")
# Enough to be stopped in between.
STEPS = 16
BUDGET = f"schedule.total_tokens={STEPS * 2 * 64}"


def line(name: str, own: dict[str, str] | None = None, more: str = "") -> str:
    """A line of a document, with names of the user's own in place of those of the document, and more behind it."""
    _, typed = TYPED[name]
    for written, theirs in (own or {}).items():
        assert written in typed
        typed = typed.replace(written, theirs)
    return f"{typed} {more}"


def says(document: str, sentence: str) -> None:
    """The document says so, wherever its lines break."""
    assert sentence in " ".join((ROOT / document).read_text(encoding="utf-8").split()), f"{document} has changed"


def shown(command: str, place: Path, code: int = 0) -> str:
    """What a command writes to stdout; to stderr where it is refused."""
    done = run(command, place)
    assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stderr if code == 2 else done.stdout


@contextmanager
def started(command: str, place: Path, name: str) -> Iterator[subprocess.Popen[str]]:
    """A run that has taken two steps, with a group of processes of its own, as in a terminal."""
    with subprocess.Popen(**process(command, place), start_new_session=True) as torchrun:
        try:
            wait_for_step(torchrun, place / "runs" / name, lambda step: step >= 2)
            yield torchrun
        finally:
            with suppress(ProcessLookupError):
                os.killpg(torchrun.pid, signal.SIGKILL)


def stopped_and_ended(command: str, place: Path, name: str, stop: Callable[[int], None], code: int) -> tuple[str, str]:
    """Start, stop in mid-run, start the same again: what torchrun says of the stop, and the run of its end."""
    run_directory = place / "runs" / name
    with started(command, place, name) as torchrun:
        stop(torchrun.pid)
        said, errors = torchrun.communicate(timeout=120)
        assert torchrun.returncode == code, f"{said}\n{errors}"
    step = read_run(run_directory)[-1]["step"]
    assert 2 <= step < STEPS
    assert f"{name}  ended after step {step}: asked to stop; the same command resumes\n" in said
    assert read_events(run_directory)[-1]["event"] == "stop"
    assert latest(run_directory / "checkpoints") == run_directory / f"checkpoints/step_{step:08d}"
    says("README.md", "The same command resumes a run that was killed.")
    ended = shown(command, place)
    assert f"{name}  resumed at step {step}\n" in ended
    assert f"{name}  ended after step {STEPS}: token budget spent\n" in ended
    says("docs/first_hour.md", "every step stands there once")
    assert [record["step"] for record in read_run(run_directory)] == list(range(1, STEPS + 1))
    assert "replay_differs" not in [event["event"] for event in read_events(run_directory)]
    return errors, ended


@pytest.fixture(scope="module")
def place(checkout: Path) -> Path:
    """A checkout in which a user has prepared a folder of texts."""
    texts = [json.loads(text)["text"][:3000] for text in (ROOT / "data/king_james_bible/text.jsonl").open()]
    for name, text in zip(NAMES, texts, strict=False):
        file = checkout / "my texts" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("" if "empty" in name else text, encoding="utf-8")
    says(
        "docs/first_hour.md",
        "`--source` takes text, JSON lines, Parquet, a folder of them (each `.txt` file is a document)",
    )
    made = shown(line("prepare", {"data/king_james_bible/text.jsonl": "'my texts'"}), checkout)
    assert re.search(r"train: 5 documents, .*\n  heldout: 1 documents, ", made), made
    says("docs/data.md", "The held-out share never splits a file")
    assert "held out: the last 1 of 7 files, whole" in made
    return checkout


def test_own_text_on_a_laptop(place: Path) -> None:
    def ctrl_c(pid: int) -> None:
        os.killpg(pid, signal.SIGINT)

    says(
        "README.md",
        "SIGTERM or Ctrl-C finishes the step, saves, and exits 0; torchrun makes 1 and a traceback of its own",
    )
    errors, ended = stopped_and_ended(line("train", more=BUDGET), place, "mine", ctrl_c, code=1)
    assert "SignalException" in errors
    says("docs/first_hour.md", "A run says at its end why it ended, its figures and the commands that come next.")
    score = line("score", {"runs/tiny_fp8": "runs/mine", "stores/demo": "stores/mine"}).strip()
    following = re.findall("^mine  next: (.*)$", ended, flags=re.MULTILINE)
    assert {score, line("dashboard").strip()} < set(following)

    assert shown(line("dashboard"), place).endswith("open it in a browser\n")
    says("docs/dashboard.md", "one file that opens offline")
    assert not re.search(
        r"<(script|link|img|iframe)[^>]*(src|href)=[\"']https?:", (place / "runs/mine.html").read_text(encoding="utf-8")
    )

    said = shown(line("generate", {"runs/tiny_fp8": "runs/mine"}), place)
    assert said.startswith("In the beginning")
    assert len(said) > len("In the beginning\n\n")

    said = shown(score, place)
    says("README.md", "Scores are bits per byte beside xz and a bigram model")
    found = re.search(r"(\S+) bits per byte.*\n  to beat: bigram \S+, xz \S+, unigram \S+ bits per byte", said)
    assert found, said
    logged = [
        event["eval/bits_per_byte"] for event in read_events(place / "runs/mine") if event["event"] == "evaluation"
    ]
    # The score is computed in the run's precision, in other batches: the roundings of BF16.
    assert [float(found[1])] == pytest.approx(logged, rel=1e-3)

    said = shown(line("export", {"runs/tiny_fp8": "runs/mine"}), place)
    says("README.md", "The export has the layout in which DeepSeek-V3 was released")
    assert re.search(r"verified: 7 files by hash, .* FP8 within 0\.500 steps of E4M3", said), said
    assert (place / "runs/hugging_face/config.json").is_file()


def test_a_cluster_is_planned_and_two_ranks_are_operated(place: Path) -> None:
    planned = shown(line("plan", {"h800_2048": "h100_8"}), place)
    says("README.md", "The third runs the fullest rank on fake tensors.")
    assert planned.startswith("the fullest of 8 ranks is rank 0 ")
    for row in ("FP32 gradients", "FLOPs, forward and backward", "sent over dp, gradients"):
        assert re.search(rf"^{row} +[1-9][\d.]* [GT]", planned, flags=re.MULTILINE), row
    assert re.search(r"^fits 80 GB, \d+\.\d GB left$", planned, flags=re.MULTILINE)
    several = shown(line("plan", {"h800_2048": "h100_8"}, more="rank=all layout.pp=2"), place)
    says("docs/parallelism.md", "`rank=all` prints one line for each pipeline rank")
    says("docs/parallelism.md", "A field of the layout that changes the number of ranks says so")
    assert several.startswith("layout.pp=2 makes it 16 ranks ")
    assert re.findall(r"^(\d+-\d+) +\d .* left$", several, flags=re.MULTILINE) == ["0-7", "8-15"]

    def stop_the_workers(pid: int) -> None:
        assert run(line("stop the workers", {"PID_OF_TORCHRUN": str(pid)}), place).returncode == 0

    alert = place / "alert.json"
    settings = f"observe.alert_command={shlex.quote(f'tee {alert}')} observe.stale_checkpoint_s=0.01"
    command = line("train on two ranks", more=f"{STORES} {BUDGET} {settings}")
    says("docs/operating.md", "torchrun then exits with 0 and says nothing.")
    errors, _ = stopped_and_ended(command, place, "tiny_ep2", stop_the_workers, code=0)
    assert errors == ""
    says("docs/operating.md", "It gets one line of JSON on stdin")
    (got,) = map(json.loads, alert.read_text().splitlines())
    example = re.search(
        r"^ +(\{\"kind\": .*?\})$", (ROOT / "docs/operating.md").read_text(), flags=re.MULTILINE | re.DOTALL
    )
    assert example is not None
    assert list(got) == list(json.loads(example[1]))
    assert (got["kind"], got["run"]) == ("stale_checkpoint", "tiny_ep2")
    shown(line("dashboard", {"runs/mine": "runs/tiny_ep2"}), place)


def test_a_kernel_is_proved_and_timed(place: Path) -> None:
    assert re.search(r"\b[1-9]\d* passed", shown(line("prove the kernel"), ROOT))
    # `python -m tests.kernels.hopper_codegen` compiles every kernel, once: in tests/kernels/test_hopper_codegen.py.
    says("docs/add_a_kernel.md", "prints the table of `docs/kernels.md`, which a test compares: put its new row there")
    assert "unpack_e5m6" in (ROOT / "docs/kernels.md").read_text()
    table = shown(line("time the kernel"), place)
    says("docs/add_a_kernel.md", "takes all cases of the file; the name that the table prints takes one.")
    row = re.compile(r"^ *(\w+) +([\d.e-]+) ([\d.e-]+) .* (through FP16, .*)$", flags=re.MULTILINE)
    documented = row.findall((ROOT / "docs/add_a_kernel.md").read_text())
    assert len(documented) == 1
    assert row.findall(table) == documented
    says("docs/kernels.md", "a mistyped name is told the nearest")
    refused = shown(line("time the kernel", {"e5m6": "e5m7"}), place, code=2)
    assert refused == "bench: --only e5m7 is no case and no kernel file: did you mean e5m6? --help lists them\n"
