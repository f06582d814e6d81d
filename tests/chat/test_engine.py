"""Starting, watching and ending the program that serves; the programs here are stand-ins of one line of Python."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

from launch import serve as serve_command
from tests.huggingface.hf_folders import BF16, RAGGED, lively, save_checkpoint
from train.chat import engine as engine_module
from train.chat.engine import ModelServer, name_for_clients, serve

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
def engine(tmp_path: Path, port: int) -> ModelServer:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    return ModelServer("transformers", tmp_path / "model", "model", port=port)


def stand_in(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """What is started in place of an engine."""
    words = lambda self, scratch: ([sys.executable, "-c", program, str(self.port)], {})  # noqa: E731
    monkeypatch.setattr(ModelServer, "command", words)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (
            "print('one'); print('no memory left'); raise SystemExit(3)",
            "ended with exit code 3; its last words: no memory left",
        ),
        ("import os; os.kill(os.getpid(), 9)", "was killed by signal 9; all that it said is in"),
    ],
)
def test_an_engine_that_dies_is_reported_in_one_sentence(
    engine: ModelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, message: str
) -> None:
    stand_in(monkeypatch, program)
    with pytest.raises(ChildProcessError, match=f"^the engine transformers {message}"):
        serve(engine, tmp_path / "log", os.environ, lambda: pytest.fail("it never answered"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_engine_and_is_no_failure(
    engine: ModelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    stand_in(monkeypatch, HEALTHY)
    before = signal.getsignal(number)
    serve(engine, tmp_path / "log", os.environ, lambda: os.kill(os.getpid(), number))
    assert signal.getsignal(number) == before
    assert not engine.is_healthy()


def test_a_hangup_that_nohup_ignores_stays_ignored(
    engine: ModelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, HEALTHY)
    found = list[object]()

    def ready() -> None:
        found.append(signal.getsignal(signal.SIGHUP))
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        serve(engine, tmp_path / "log", os.environ, ready)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert found == [signal.SIG_IGN]


def test_an_engine_that_does_not_end_is_killed(
    engine: ModelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "END_WITHIN_S", 0.3)
    deaf = "import os, signal; signal.signal(signal.SIGINT, signal.SIG_IGN); print(os.getpid(), flush=True)\n"
    stand_in(monkeypatch, deaf + "while True: signal.pause()")

    def stop_when_it_lives() -> None:
        while not (tmp_path / "log").exists() or not (tmp_path / "log").read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop_when_it_lives).start()
    serve(engine, tmp_path / "log", os.environ, lambda: None)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "log").read_text()), 0)


def test_the_workers_of_an_engine_that_died_are_killed(
    engine: ModelServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleep = "[sys.executable, '-c', 'import time; time.sleep(600)']"
    stand_in(monkeypatch, f"import subprocess, sys; print(subprocess.Popen({sleep}).pid)")
    with pytest.raises(ChildProcessError, match="ended with exit code 0"):
        serve(engine, tmp_path / "log", os.environ, lambda: None)
    state = Path("/proc") / (tmp_path / "log").read_text().strip() / "stat"
    deadline = time.monotonic() + 20
    # Gone, or a zombie that nobody has asked for.
    while state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("wrong", [-1, 65536])
def test_what_cannot_be_served_is_not_exported(
    tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wrong: int
) -> None:
    monkeypatch.setattr(serve_command, "served_folder", lambda _: pytest.fail("exported"))
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
        f"serve {engine.folder} --served-model-name model --reasoning-parser deepseek_v3 --host 0.0.0.0 --port 1 "
    )
    assert " ".join(words[3:]) == expected + "--tensor-parallel-size 8"


@pytest.mark.parametrize(
    ("folder", "name"), [("tiny_fp8", "tiny_fp8"), ("a b--c..d", "a-b-c.d"), ("-", "model"), ("läuft", "l-uft")]
)
def test_a_name_is_one_that_engines_take(folder: str, name: str) -> None:
    assert name_for_clients(Path(folder)) == name


def test_an_export_is_reused_mended_and_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By what `launch/serve.py` does before it starts an engine."""
    options = serve_command.parse([str(tmp_path / "run")])
    model = lively(RAGGED, BF16)

    def served() -> str:
        assert serve_command.served_folder(options) == (tmp_path / "run/served/bf16", tmp_path / "run")
        return capsys.readouterr().out

    save_checkpoint(tmp_path / "run/checkpoints/step_00000001", model)
    assert "step_00000001 as bf16, written" in served()
    (weights,) = (tmp_path / "run/served/bf16").glob("*.safetensors")
    before = weights.stat().st_mtime_ns
    assert "step_00000001 as bf16, as it was" in served()
    assert weights.stat().st_mtime_ns == before
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "written" in served()
    model.get_parameter("norm.weight")[0] += 1.0
    save_checkpoint(tmp_path / "run/checkpoints/step_00000002", model)
    assert "step_00000002 as bf16, written" in served()
    assert "without a tokeniser" in served()


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
