"""A server of a Hugging Face folder: another program, started, watched and ended.

    transformers   `transformers serve`, any sizes, one request after another
    vllm           `vllm serve`, batched; its MLA kernels take few sizes (docs/serving.md)

Neither asks a hub. `transformers serve` lists and takes models of a hub's cache only: it is given one of its own, in a
temporary folder, with links to the files. Its name for clients is the folder's.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from importlib.util import find_spec
from pathlib import Path
from socket import AF_INET, SO_REUSEADDR, SOCK_STREAM, SOL_SOCKET, socket
from typing import Literal

from train.chat.template import TEMPLATE_NAME

EngineName = Literal["transformers", "vllm"]
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
# What each needs, and how it is installed.
_NEEDS = {
    "transformers": (("transformers", "fastapi", "uvicorn", "openai"), "pip install 'transformers[serving]>=5.23'"),
    "vllm": (("vllm",), "pip install vllm"),
}
LOOK_EVERY_S, END_WITHIN_S = 0.1, 15.0


@dataclass(frozen=True)
class ModelServer:
    """Which program serves which folder, where, under which name; `more` are arguments of the program's own."""

    kind: EngineName
    folder: Path
    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    more: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise a ValueError where it cannot start: not installed, another program's port, a folder it misreads."""
        self.check_machine()
        config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        if self.kind == "transformers" and "quantization_config" in config and not _has_gpu():
            raise ValueError(
                f"{self.folder} is in FP8, of which transformers takes other blocks on a CPU wherever a weight has no "
                "multiple of 128 rows; serve it with --format bf16, or on a GPU"
            )

    def check_machine(self) -> None:
        """`check` without the folder, which may not be there yet."""
        modules, install = _NEEDS[self.kind]
        if missing := [name for name in modules if find_spec(name) is None]:
            raise ValueError(f"--engine {self.kind} needs {', '.join(missing)}, not installed here: `{install}`")
        if not 0 <= self.port < 1 << 16:
            raise ValueError(f"--port {self.port} must be in 0 .. 65535")
        with socket(AF_INET, SOCK_STREAM) as probe:
            # As the engines do: a port in TIME_WAIT is free.
            probe.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
            try:
                probe.bind((self.host, self.port))
            except OSError as error:
                reason = error.strerror or error
                raise ValueError(f"port {self.port} of {self.host}: {reason}; choose another with --port") from None

    def command(self, scratch: Path) -> tuple[list[str], dict[str, str]]:
        """Words and variables that start it; `scratch` is an empty folder for as long as it runs."""
        address = ["--host", self.host, "--port", str(self.port)]
        if self.kind == "vllm":
            words = ["vllm.entrypoints.cli.main", "serve", str(self.folder), "--served-model-name", self.name]
            if self.chats:
                words += ["--reasoning-parser", "deepseek_v3"]
            return [sys.executable, "-m", *words, *address, *self.more], OFFLINE
        snapshot = scratch / f"models--{self.name}" / "snapshots" / "export"
        snapshot.mkdir(parents=True)
        (snapshot.parent.parent / "refs").mkdir()
        (snapshot.parent.parent / "refs/main").write_text(snapshot.name)
        for file in self.folder.iterdir():
            if file.is_file():
                (snapshot / file.name).symlink_to(file.resolve())
        words = [sys.executable, "-m", "transformers.cli.transformers", "serve", self.name, *address, *self.more]
        return words, {**OFFLINE, "HF_HUB_CACHE": str(scratch)}

    @property
    def chats(self) -> bool:
        """Whether the folder has a chat template."""
        return (self.folder / TEMPLATE_NAME).is_file()

    @property
    def url(self) -> str:
        """Of its API."""
        return f"http://{self.host}:{self.port}/v1"

    @property
    def curl(self) -> str:
        """A command that asks it something."""
        path, asked = "completions", '"prompt": "In the beginning"'
        if self.chats:
            path, asked = "chat/completions", '"messages": [{"role": "user", "content": "Hello"}]'
        body = f'{{"model": "{self.name}", "max_tokens": 64, {asked}}}'
        return f"curl {self.url}/{path} -H 'Content-Type: application/json' -d '{body}'"

    def is_healthy(self) -> bool:
        """Whether it answers."""
        connection = HTTPConnection(self.host, self.port, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, HTTPException):
            return False
        finally:
            connection.close()


def name_for_clients(folder: Path) -> str:
    """A folder's name as engines take it: letters, digits and single `_`, `-` or `.`, at most 96."""
    name = re.sub(r"([-.])[-.]+", r"\1", re.sub(r"[^\w.-]", "-", folder.resolve().name, flags=re.ASCII))
    return name[:96].strip("-.") or "model"


def serve(engine: ModelServer, log: Path, environment: Mapping[str, str], ready: Callable[[], None]) -> None:
    """Run an engine until SIGTERM, SIGINT or SIGHUP; `ready` is called when it answers, the file `log` has its words.

    Raises:
        ValueError: it cannot start (`ModelServer.check`).
        ChildProcessError: it ended by itself.
    """
    engine.check()
    with (
        tempfile.TemporaryDirectory(prefix="v3fp8-serve-") as scratch,
        log.open("wb") as output,
        _asked_to_stop() as stop,
    ):
        words, variables = engine.command(Path(scratch))
        # A session of its own: Ctrl-C in the terminal reaches it through us only.
        process = subprocess.Popen(
            words, env={**environment, **variables}, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
        try:
            is_ready = False
            while process.poll() is None and not stop.wait(LOOK_EVERY_S):
                if not is_ready and engine.is_healthy():
                    is_ready = True
                    ready()
        finally:
            _end(process)
    if not stop.is_set():
        raise ChildProcessError(_last_words(engine, process.returncode, log))


@contextmanager
def _asked_to_stop() -> Iterator[threading.Event]:
    """Set by SIGTERM, SIGINT and SIGHUP."""
    stop = threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    # Under `nohup` it outlives the terminal.
    if before[signal.SIGHUP] == signal.SIG_IGN:
        del before[signal.SIGHUP]
    for number in before:
        signal.signal(number, lambda *_: stop.set())
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask it to end, then kill what is left of its process group."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with_patience = time.monotonic() + END_WITHIN_S
        while process.poll() is None and time.monotonic() < with_patience:
            time.sleep(LOOK_EVERY_S)
    # Its number is that of the group, which lives as long as one of its workers does.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_words(engine: ModelServer, code: int, log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    ended = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    said = f"; its last words: {lines[-1].strip()}" if lines else ""
    return f"the engine {engine.kind} {ended}{said}; all that it said is in {log}"


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
