"""Starting, watching and ending the program that serves; the programs here are stand-ins of one line of Python."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from launch import serve as serve_command
from tests.huggingface.hf_folders import BF16, RAGGED, lively, save_checkpoint, saved
from train.chat import engine as engine_module
from train.chat.engine import ModelServer, name_for_clients, running
from train.data.store import file_sha256
from train.huggingface import served
from train.huggingface.answering import answering
from train.huggingface.export import Exported, ExportOptions, export, refresh, remove
from train.huggingface.safetensors_files import JOURNAL
from train.huggingface.served import served_folder

ROOT = Path(__file__).resolve().parents[2]

HEALTHY = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def engine(tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> ModelServer:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return ModelServer("transformers", tmp_path / "model", "model", port=port)


def stand_in(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """What is started in place of an engine."""
    words = lambda self, scratch: ([sys.executable, "-c", program, str(self.port)], {})  # noqa: E731
    monkeypatch.setattr(ModelServer, "command", words)


def serve(engine: ModelServer, ready: Callable[[], object]) -> None:
    with running(engine, os.environ, lambda _: None) as process:
        ready()
        process.wait()


def logs(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "temporary").glob("model-*.log"))


def words_of_engine(tmp_path: Path) -> str:
    """What it says first."""
    while not (found := [text for log in logs(tmp_path) if (text := log.read_text())]):
        time.sleep(0.01)
    return found[0]


def wait_for_the_end_of(process_id: int) -> None:
    """Until it is gone, or a zombie that nobody has asked for."""
    state, deadline = Path(f"/proc/{process_id}/stat"), time.monotonic() + 60
    with suppress(FileNotFoundError, ProcessLookupError):
        while state.read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (
            "print('one'); print('no memory left'); raise SystemExit(3)",
            "ended with exit code 3; its last words: no memory left",
        ),
        (
            "print('OSError: no'); print('(W) ERROR 1 [a.py:9] ValueError: too much'); raise SystemExit('see above')",
            "ended with exit code 1; it says: ValueError: too much; all that it said is in",
        ),
        ("import os; os.kill(os.getpid(), 9)", "was killed by signal 9; all that it said is in"),
    ],
)
def test_an_engine_that_dies_is_reported_in_one_sentence(
    engine: ModelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, message: str
) -> None:
    stand_in(monkeypatch, program)
    with pytest.raises(ChildProcessError, match=f"^the engine transformers {message}") as died:
        serve(engine, lambda: pytest.fail("it never answered"))
    (log,) = logs(tmp_path)
    assert str(died.value).endswith(f"is in {log}")


def test_an_engine_that_dies_while_it_is_asked_is_reported_at_the_end(
    engine: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, HEALTHY)

    def ask() -> None:
        with running(engine, os.environ, print) as process:
            process.terminate()
            process.wait()

    with pytest.raises(ChildProcessError, match="was killed by signal 15"):
        ask()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_engine_and_is_no_failure_of_it(
    engine: ModelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    stand_in(monkeypatch, HEALTHY)
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit) as left:
        serve(engine, lambda: os.kill(os.getpid(), number))
    assert getattr(left.value, "code", 128 + number) == 128 + number
    assert signal.getsignal(number) == before
    assert not engine.is_healthy()
    # Neither a log nor the links to the model.
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_signal_while_the_engine_starts_leaves_none_behind(
    engine: ModelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, "import time; time.sleep(600)")
    begun = list[int]()

    class Signalled(subprocess.Popen[bytes]):
        def __init__(self, words: list[str], **settings: Any) -> None:
            super().__init__(words, **settings)
            if words[0] == sys.executable:
                begun.append(self.pid)
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(subprocess, "Popen", Signalled)
    with pytest.raises(SystemExit):
        serve(engine, lambda: pytest.fail("it never answered"))
    try:
        with pytest.raises(ProcessLookupError):
            os.kill(begun[0], 0)
    finally:
        with suppress(ProcessLookupError):
            os.kill(begun[0], signal.SIGKILL)
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_hangup_that_nohup_ignores_stays_ignored(engine: ModelServer, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, HEALTHY)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with running(engine, os.environ, lambda _: None):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_engine_that_does_not_end_is_killed_whatever_signals_come(
    engine: ModelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "END_WITHIN_S", 0.5)
    deaf = "import os, signal; signal.signal(signal.SIGINT, signal.SIG_IGN); print(os.getpid(), flush=True)\n"
    stand_in(monkeypatch, deaf + "while True: signal.pause()")
    seen = list[int]()

    def stop_when_it_lives() -> None:
        seen.append(int(words_of_engine(tmp_path)))
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)

    impatient = threading.Thread(target=stop_when_it_lives)
    impatient.start()
    with pytest.raises(SystemExit):
        serve(engine, lambda: None)
    impatient.join()
    with pytest.raises(ProcessLookupError):
        os.kill(seen[0], 0)


def test_the_workers_of_an_engine_that_died_are_killed(
    engine: ModelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleep = "[sys.executable, '-c', 'import time; time.sleep(600)']"
    stand_in(monkeypatch, f"import subprocess, sys; print(subprocess.Popen({sleep}).pid)")
    with pytest.raises(ChildProcessError, match="ended with exit code 0"):
        serve(engine, lambda: None)
    wait_for_the_end_of(int(words_of_engine(tmp_path)))


def test_a_killed_command_takes_its_engine_with_it(engine: ModelServer) -> None:
    """By a process of its own that serves with a stand-in which is deaf, and is killed with -9."""
    program = (
        "import os, sys\nfrom pathlib import Path\nfrom train.chat.engine import ModelServer, running\n"
        f"deaf = 'import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\\n' + {HEALTHY!r}\n"
        "ModelServer.command = lambda self, _: ([sys.executable, '-c', deaf, str(self.port)], {})\n"
        "server = ModelServer('transformers', Path(sys.argv[1]), 'model', port=int(sys.argv[2]))\n"
        "with running(server, os.environ, lambda _: None) as process:\n"
        "    print(process.pid, flush=True)\n    process.wait()"
    )
    words = [sys.executable, "-c", program, str(engine.folder), str(engine.port)]
    with subprocess.Popen(
        words, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE
    ) as command:
        assert command.stdout is not None
        process_id = int(command.stdout.readline())
        assert engine.is_healthy()
        command.kill()
    try:
        wait_for_the_end_of(process_id)
    except AssertionError:
        os.kill(process_id, signal.SIGKILL)
        raise
    assert not engine.is_healthy()


def test_nothing_is_written_into_the_folder_that_is_served(
    engine: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, HEALTHY)
    engine.folder.chmod(0o555)
    with running(engine, os.environ, lambda _: None):
        assert [path.name for path in engine.folder.iterdir()] == ["config.json"]
    assert [path.name for path in engine.folder.iterdir()] == ["config.json"]


@pytest.mark.parametrize("wrong", [-1, 65536])
def test_what_cannot_be_served_is_not_exported(
    tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wrong: int
) -> None:
    monkeypatch.setattr(served, "open_weights", lambda _: pytest.fail("exported"))
    assert serve_command.main([str(tmp_path), f"--port={wrong}"]) == 2
    assert capsys.readouterr().err == f"serve: --port {wrong} must be in 0 .. 65535\n"
    with socket.create_server(("127.0.0.1", port)):
        assert serve_command.main([str(tmp_path), f"--port={port}"]) == 2
    assert f"port {port} of 127.0.0.1: Address already in use" in capsys.readouterr().err
    monkeypatch.setattr(engine_module, "find_spec", lambda _: None)
    assert serve_command.main([str(tmp_path), "--port=0"]) == 2
    assert "not installed here" in capsys.readouterr().err


def test_what_cannot_start_is_said_before_anything_is_started(
    engine: ModelServer, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = f"^port {port} of 127.0.0.1: Address already in use; choose another with --port$"
    with socket.create_server(("127.0.0.1", port)), pytest.raises(ValueError, match=said):
        engine.check()
    engine.check()
    (engine.folder / "config.json").write_text(json.dumps({"quantization_config": {}}))
    with pytest.raises(ValueError, match="is in FP8, of which transformers takes other blocks on a CPU"):
        engine.check()
    monkeypatch.setattr(engine_module, "find_spec", lambda name: None if name in ("uvicorn", "vllm") else name)
    with pytest.raises(
        ValueError, match=r"needs uvicorn, not installed here: `pip install 'transformers\[serving\]>=5"
    ):
        engine.check()
    with pytest.raises(ValueError, match=r"^--engine vllm needs vllm, not installed here: `pip install vllm`$"):
        ModelServer("vllm", engine.folder, "model", port=port).check()


def test_the_commands_name_folder_address_and_what_is_added(engine: ModelServer, tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    words, variables = engine.command(tmp_path / "hub")
    assert words[1:] == [
        "-m",
        "transformers.cli.transformers",
        "serve",
        "model",
        "--host",
        "127.0.0.1",
        "--port",
        str(engine.port),
    ]
    assert (variables["HF_HUB_OFFLINE"], variables["HF_HUB_CACHE"]) == ("1", str(tmp_path / "hub"))
    assert (tmp_path / "hub/models--model/snapshots/export/config.json").read_text() == "{}"
    (engine.folder / "chat_template.jinja").touch()
    vllm = ModelServer("vllm", engine.folder, "model", "0.0.0.0", 1, ("--tensor-parallel-size", "8"))
    words, _ = vllm.command(tmp_path / "other")
    expected = (
        f"serve {engine.folder} --served-model-name model --reasoning-parser deepseek_v3 "
        "--enable-auto-tool-choice --tool-call-parser deepseek_v31 --host 0.0.0.0 --port 1 "
    )
    assert " ".join(words[3:]) == expected + "--tensor-parallel-size 8"


def test_a_chat_template_is_found_in_either_place(engine: ModelServer) -> None:
    (engine.folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    assert not engine.chats
    (engine.folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    assert engine.chats
    (engine.folder / "tokenizer_config.json").unlink()
    (engine.folder / "chat_template.jinja").touch()
    assert engine.chats


@pytest.mark.parametrize(
    ("folder", "name"), [("tiny_fp8", "tiny_fp8"), ("a b--c..d", "a-b-c.d"), ("-", "model"), ("läuft", "l-uft")]
)
def test_a_name_is_one_that_engines_take(folder: str, name: str) -> None:
    assert name_for_clients(Path(folder)) == name


def test_an_export_is_reused_mended_and_made_again(tmp_path: Path) -> None:
    model, first, said = lively(RAGGED, BF16), tmp_path / "run/served/bf16/step_00000001", list[str]()

    def written(run: Path = tmp_path / "run") -> Path:
        said.clear()
        with served_folder(run, ExportOptions(), said.append) as folder:
            assert (folder.name, folder.exact_name) == ("run", f"run-{folder.path.name}-bf16")
            return folder.path

    save_checkpoint(tmp_path / "run/checkpoints/step_00000001", model)
    assert written() == first
    assert said[0] == f"{first}: {tmp_path / 'run/checkpoints/step_00000001'} as bf16, written"
    (weights,) = first.glob("*.safetensors")
    before = weights.stat().st_mtime_ns
    assert written() == first
    assert said[0].endswith("as bf16, as it was")
    assert weights.stat().st_mtime_ns == before
    weights.write_bytes(weights.read_bytes()[:-1])
    assert written() == first
    assert said[0].endswith("written")
    model.get_parameter("norm.weight")[0] += 1.0
    save_checkpoint(tmp_path / "run/checkpoints/step_00000002", model)
    assert written().name == "step_00000002"
    assert said[0].endswith("step_00000002 as bf16, written")
    assert "without a tokeniser" in said[1]
    # Nobody serves it any more.
    assert not first.exists()
    assert written(tmp_path / "run/checkpoints/step_00000001") == first


def test_an_export_that_is_served_stays_whole(tmp_path: Path) -> None:
    run, model = tmp_path / "run", lively(RAGGED, BF16)
    checkpoint = save_checkpoint(run / "checkpoints/step_00000001", model)

    def files(folder: Path) -> dict[str, str]:
        return {path.name: file_sha256(path) for path in folder.iterdir()}

    with served_folder(run, ExportOptions(), print) as first:
        before = files(first.path)
        save_checkpoint(run / "checkpoints/step_00000002", model)
        with served_folder(run, ExportOptions(), print) as second, served_folder(checkpoint, ExportOptions(), print):
            assert second.path != first.path
            assert files(first.path) == before
        # Now as another export: the checkpoint of that step is another one.
        model.get_parameter("norm.weight")[0] += 1.0
        save_checkpoint(checkpoint, model)
        with (
            pytest.raises(ValueError, match="step_00000001 is being served and is not what is asked for now"),
            served_folder(checkpoint, ExportOptions(), print),
        ):
            pass
        assert files(first.path) == before
    with served_folder(checkpoint, ExportOptions(), print) as again:
        assert files(again.path).keys() == before.keys()
        assert files(again.path) != before


@pytest.mark.parametrize("deleted", [1, 3])
def test_a_removal_that_is_killed_is_finished_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deleted: int
) -> None:
    """Killed after so many files, in whatever order the folder lists them."""
    source, out, files = saved(lively(RAGGED, BF16), tmp_path / "run"), tmp_path / "out", list[Path]()
    export(source, out, ExportOptions())
    whole = {path.name: file_sha256(path) for path in out.iterdir()}
    unlink = Path.unlink

    def until_killed(path: Path) -> None:
        if len(files) == deleted:
            raise KeyboardInterrupt
        files.append(path)
        unlink(path)

    journal_first = [out / JOURNAL, *(path for path in out.iterdir() if path.name != JOURNAL)]
    with monkeypatch.context() as killed:
        killed.setattr(Path, "iterdir", lambda _: iter(journal_first))
        killed.setattr(Path, "unlink", until_killed)
        with pytest.raises(KeyboardInterrupt):
            remove(out)
    assert (len(files), JOURNAL in {path.name for path in out.iterdir()}) == (deleted, True)
    assert refresh(source, out, ExportOptions()).written in (0, 1)
    assert {path.name: file_sha256(path) for path in out.iterdir()} == whole


def test_without_locks_nobodys_export_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    save_checkpoint(tmp_path / "run/checkpoints/step_00000001", lively(RAGGED, BF16))
    with served_folder(tmp_path / "run", ExportOptions(), print) as first:
        save_checkpoint(tmp_path / "run/checkpoints/step_00000002", lively(RAGGED, BF16))
        with served_folder(tmp_path / "run", ExportOptions(), print) as second:
            assert (first.path.name, second.path.name) == ("step_00000001", "step_00000002")
            assert (first.path / "config.json").exists()


def test_a_long_name_still_tells_checkpoints_apart(tmp_path: Path) -> None:
    run = tmp_path / ("r" * 100)
    save_checkpoint(run / "checkpoints/step_00000001", lively(RAGGED, BF16))
    with served_folder(run, ExportOptions(), print) as folder:
        assert (folder.name, folder.exact_name) == ("r" * 96, "r" * 77 + "-step_00000001-bf16")
        assert name_for_clients(Path(folder.exact_name)) == folder.exact_name


def test_of_two_that_serve_a_run_at_once_one_exports_and_the_other_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path / "run/checkpoints/step_00000001", lively(RAGGED, BF16))
    both, begun, waits, said = threading.Barrier(2, timeout=60), threading.Event(), threading.Event(), list[str]()

    def slow(*arguments: Any) -> Exported:
        begun.set()
        assert waits.wait(60)
        return refresh(*arguments)

    def serve_run() -> None:
        def say(text: str) -> None:
            said.append(text)
            if "waiting for another process" in text:
                waits.set()

        with served_folder(tmp_path / "run", ExportOptions(), say):
            both.wait()

    monkeypatch.setattr(served, "refresh", slow)
    first = threading.Thread(target=serve_run)
    first.start()
    assert begun.wait(60)
    serve_run()
    first.join()
    assert len([text for text in said if text.endswith("as bf16, written")]) == 1
    assert len([text for text in said if text.endswith("as bf16, as it was")]) == 1


def test_a_run_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "run/checkpoints/step_00000001", lively(RAGGED, BF16))
    (tmp_path / "run/served").touch()
    with (
        pytest.raises(ValueError, match=r"served/bf16 cannot be written \(Not a directory\); export elsewhere with"),
        served_folder(tmp_path / "run", ExportOptions(), print),
    ):
        pass


def test_what_cannot_chat_is_not_started(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "run/checkpoints/step_00000001", lively(RAGGED, BF16))
    with (
        pytest.raises(ValueError, match=r"step_00000001 has no chat template: its tokeniser is not known, or has no"),
        answering(str(tmp_path / "run"), "transformers", "bf16", os.environ),
    ):
        pass


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1 is not JSON"),
        ('{"url": "/v1/completions", "body": {}}', "has no 'custom_id'"),
        (
            '{"custom_id": "a", "url": "/embeddings", "body": {}}',
            "asks for POST /embeddings; write POST and a path such as",
        ),
        ('{"custom_id": "a", "method": "GET", "url": "/v1/models", "body": {}}', "asks for GET"),
        ('{"custom_id": "a", "url": "/v1/completions"}', "has no object 'body'"),
        ('{"custom_id": "a", "url": "/v1/completions", "body": {"stream": true}}', "asks for a stream"),
        (
            '{"custom_id": "a", "url": "/v1/completions", "body": {}}\n' * 2,
            "line 2 has the custom_id 'a' of a line before",
        ),
    ],
)
def test_a_batch_that_cannot_be_sent_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    (tmp_path / "in.jsonl").write_text(text)
    command = ["batch", str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), "--url", "http://127.0.0.1:1"]
    assert serve_command.main(command) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"serve: {tmp_path / 'in.jsonl'} line ")
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out.jsonl").exists()


def test_a_batch_does_not_write_into_its_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"custom_id": "a", "url": "/v1/completions", "body": {}}')
    before = path.read_bytes()
    assert serve_command.main(["batch", str(path), str(path), "--url", "http://127.0.0.1:1"]) == 2
    assert capsys.readouterr().err == f"serve: {path} holds the requests; name another file for the answers\n"
    assert path.read_bytes() == before


def test_bad_input_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert serve_command.main([str(tmp_path / "nowhere"), "--port=0"]) == 2
    said = (
        f"serve: there is no folder {tmp_path}/nowhere: give a run, such as runs/tiny_bf16, or one of its checkpoints"
    )
    assert capsys.readouterr().err == f"{said}\n"
