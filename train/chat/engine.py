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
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from importlib.util import find_spec
from pathlib import Path
from socket import AF_INET, SO_REUSEADDR, SOCK_STREAM, SOL_SOCKET, socket
from typing import IO, Any, Literal

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
# At most, of a model, as hubs have it.
NAME_CHARACTERS = 96
# vLLM's worker says why it died, in a line of its log; the last lines only say that it did.
_CAUSE = re.compile(r" ERROR .*?\] (\w+(?:Error|Exception): .+)")
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


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
                # What vLLM documents for DeepSeek-V3.1 (read on 2026-11-30).
                words += ["--reasoning-parser", "deepseek_v3"]
                words += ["--enable-auto-tool-choice", "--tool-call-parser", "deepseek_v31"]
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
        """Whether the folder has a chat template, in a file of its own or, as older releases, in the tokeniser's."""
        older = self.folder / "tokenizer_config.json"
        return (self.folder / TEMPLATE_NAME).is_file() or (
            older.is_file() and '"chat_template"' in older.read_text(encoding="utf-8", errors="replace")
        )

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
    """A folder's name as engines take it: letters, digits and single `_`, `-` or `.`."""
    name = re.sub(r"([-.])[-.]+", r"\1", re.sub(r"[^\w.-]", "-", folder.resolve().name, flags=re.ASCII))
    return name[:NAME_CHARACTERS].strip("-.") or "model"


def free_port(host: str) -> int:
    """A port where nobody listens now."""
    with socket(AF_INET, SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(
    engine: ModelServer, environment: Mapping[str, str], say: Callable[[str], None]
) -> Iterator[subprocess.Popen[bytes]]:
    """The engine's process, from its first answer until the block ends.

    It ends with the block, and with this process however that ends; SIGTERM and SIGHUP leave the block as `SystemExit`.
    Its words go to a temporary file, which is kept where it ended by itself.

    Raises:
        ValueError: it cannot start (`ModelServer.check`).
        ChildProcessError: it ended by itself, before its first answer or in the block.
    """
    engine.check()
    number, log = tempfile.mkstemp(prefix=f"{engine.name}-", suffix=".log")
    say(f"the engine {engine.kind} starts; its words: {log}")
    with (
        os.fdopen(number, "wb") as output,
        tempfile.TemporaryDirectory(prefix="v3fp8-serve-") as scratch,
        _handled(_leave, signal.SIGTERM, signal.SIGHUP),
        _killer_of_orphans() as killer,
    ):
        process, has_answered = None, False
        try:
            words, variables = engine.command(Path(scratch))
            # A signal while it starts would leave it behind.
            with _held(*ENDING):
                # A session of its own: Ctrl-C in the terminal reaches it through us only.
                process = subprocess.Popen(
                    words, env={**environment, **variables}, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                    start_new_session=True,
                )  # fmt: skip
                killer.write(b"%d\n" % process.pid)
            while process.poll() is None and not engine.is_healthy():
                time.sleep(LOOK_EVERY_S)
            if process.poll() is None:
                has_answered = True
                yield process
        finally:
            ended_by_itself = process is not None and process.poll() is not None
            with _handled(signal.SIG_IGN, *ENDING):
                if process is not None:
                    _end(process)
            if not ended_by_itself:
                Path(log).unlink()
    if ended_by_itself:
        raise ChildProcessError(_last_words(engine, process.returncode, Path(log), started=has_answered))


@contextmanager
def _killer_of_orphans() -> Iterator[IO[bytes]]:
    """A shell: it reads the number of a process group, and kills it when this process, and so its input, has ended."""
    words = ["sh", "-c", 'read group; read rest; kill -s KILL -- "-$group"']
    with subprocess.Popen(
        words, bufsize=0, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    ) as shell:
        assert shell.stdin is not None
        try:
            yield shell.stdin
        finally:
            shell.kill()


@contextmanager
def _handled(handler: Any, *numbers: int) -> Iterator[None]:
    """Signals go to a handler, but what is ignored stays so: under `nohup`, SIGHUP."""
    before = {number: signal.getsignal(number) for number in numbers}
    before = {number: earlier for number, earlier in before.items() if earlier != signal.SIG_IGN}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextmanager
def _held(*numbers: int) -> Iterator[None]:
    """Signals wait until the block has ended."""
    came = list[int]()
    with _handled(lambda number, _: came.append(number), *numbers):
        yield
    for number in came:
        signal.raise_signal(number)


def _leave(number: int, _: object) -> None:
    sys.exit(128 + number)


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


def _last_words(engine: ModelServer, code: int, log: Path, *, started: bool) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    # Later errors are those of requests too.
    causes = [] if started or code < 0 else [found[1] for line in lines if (found := _CAUSE.search(line))]
    ended = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    said = f"; its last words: {lines[-1].strip()}" if lines else ""
    said = f"; it says: {causes[0]}" if causes else said
    return f"the engine {engine.kind} {ended}{said}; all that it said is in {log}"


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
