"""The dashboard over HTTP on this machine: follows running jobs and sends what is new.

    GET /                          the page
    GET /page.css, /page*.js, /figures.js, /plotly.js
    GET /api/runs?since=EPOCH      the runs that changed after EPOCH, the state of all, and the new EPOCH
    GET /api/tables?run=KEY        expert and FP8 tables of one run

One thread looks for new runs and reads what was appended to each file since the last look (`run_reader.py`); a page
asks every two seconds. Nothing is written. An EPOCH of another server process (`server` in the answer) counts as 0.

Security: it listens on 127.0.0.1 only; knows the paths above and opens no file that a request names; answers GET
only; refuses a Host that is not this address, since a foreign site could reach it by DNS rebinding; its content
security policy allows scripts and requests from itself only. Any user of this machine can read it.
"""

from __future__ import annotations

import errno
import json
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from plotly.offline import get_plotlyjs

from train.studies.charts.offline import filled, shared_source
from train.studies.dashboard import page
from train.studies.dashboard.run_card import status
from train.studies.dashboard.run_reader import RunReader, find_runs
from train.studies.dashboard.series import MAX_CELLS, Json

ADDRESS = "127.0.0.1"
DEFAULT_PORT = 8663
# One look reads at most this much of each run, so a page sees all runs grow while long files are read.
_LOOK_BYTES = 8 << 20
_CURVE_BYTES = 4_000_000
_POLICY = (
    "default-src 'none'; script-src 'self'; connect-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src data: blob:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


@dataclass
class _Followed:
    """A run, the name under which it was last sent, the epoch of its last change, and why it is not shown whole."""

    reader: RunReader
    changed: int = 0
    name: str = ""
    unreadable: str = ""
    undrawable: str = ""


class Follower:
    """Run directories, or folders in which runs appear, polled."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = list(folders)
        self._runs: dict[Path, _Followed] = {}
        self._lock = threading.Lock()
        self._epoch = 0
        # A page sees by it that a restarted server counts from 0 again.
        self._server = secrets.token_hex(8)

    def look(self) -> bool:
        """Find new runs and read what was appended; returns whether anything changed."""
        changed = False
        for directory in find_runs(self._folders):
            # A run that two folders reach is one run, whichever of them saw its file first.
            resolved = directory.resolve()
            with self._lock:
                if resolved not in self._runs:
                    # Sent even while its files are empty: a page numbers runs by their order among all.
                    self._runs[resolved] = _Followed(RunReader(directory))
                    self._mark_changed(self._runs[resolved])
                    changed = True
        for run in list(self._runs.values()):
            with self._lock:
                changed |= self._read(run)
        return changed

    def _read(self, run: _Followed) -> bool:
        try:
            changed, problem = run.reader.poll(_LOOK_BYTES), ""
        except OSError as error:
            # A folder that is being deleted, or a disk that is away: shown on the page, tried again.
            changed, problem = False, str(error)
        if changed or problem != run.unreadable:
            run.unreadable = problem
            self._mark_changed(run)
        return changed

    def _mark_changed(self, run: _Followed) -> None:
        self._epoch += 1
        run.changed = self._epoch

    def runs(self, since: int, server: str) -> Json:
        """What changed after epoch `since` of process `server`."""
        with self._lock:
            runs = list(self._runs.values())
            readers = [run.reader for run in runs]
            for run in runs:
                # A card that was written after the last look: no answer shows a run without the card that it has.
                if run.reader.read_cards():
                    self._mark_changed(run)
            for run, name in zip(runs, page.names(readers), strict=True):
                # The card of another run changes a name too, where both have the same.
                if name != run.name:
                    run.name = name
                    self._mark_changed(run)
            since = since if server == self._server else 0
            now, limit = time.time(), page.curve_limit(readers, _CURVE_BYTES)
            changed = [
                _drawn(run, key=key, name=run.name, limit=limit, now_unix_s=now)
                for key, run in enumerate(runs)
                if run.changed > since
            ]
            problems = [[*run.reader.problems.values(), run.unreadable, run.undrawable] for run in runs]
            return {
                "server": self._server,
                "epoch": self._epoch,
                "runs": changed,
                "states": [status(reader, now) for reader in readers],
                "charts": page.charts_for({name for reader in readers for name in reader.series}),
                "bytes_read": sum(reader.offset for reader in readers),
                "bytes": sum(reader.size for reader in readers),
                "problems": [text for texts in problems for text in texts if text],
                "now_unix_s": now,
            }

    def tables(self, key: int) -> Json | None:
        """Tables of run `key`; None if there is no such run."""
        with self._lock:
            readers = [run.reader for run in self._runs.values()]
            return page.tables_json(readers[key], MAX_CELLS) if 0 <= key < len(readers) else None


def _drawn(run: _Followed, **options: Any) -> Json:
    """A run as the page draws it; one that cannot be drawn keeps its number, empty and with a note."""
    try:
        drawn = page.run_json(run.reader, **options)
        json.dumps(drawn, allow_nan=False)
    except Exception as error:  # noqa: BLE001
        run.undrawable = f"{run.reader.directory} cannot be drawn ({error})"
        return page.run_json(RunReader(run.reader.directory), **options)
    run.undrawable = ""
    return drawn


class Server:
    """Follows and serves in threads of its own until `close`; use it as a context manager.

    Args:
        folders: run directories, or folders of them.
        port: 0 takes a free one.
        title: heading of the page.
        period_s: between two looks at the files.
    Raises:
        ValueError: the port is taken, or a folder does not exist.
    """

    def __init__(
        self, folders: Sequence[Path], *, port: int = DEFAULT_PORT, title: str = "Training runs", period_s: float = 1.0
    ) -> None:
        for folder in folders:
            if not folder.is_dir():
                raise ValueError(f"{folder} is no directory: give a run directory, or a folder in which runs appear")
        self.follower = Follower(folders)
        self._period_s = period_s
        self._ended = threading.Event()
        try:
            self._http = _Http(port, _pages(title), self.follower)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            reason = f"port {port} of {ADDRESS} cannot be had ({error.strerror})"
            raise ValueError(f"{reason}: give another with --port, or 0 for a free one") from None
        self.url = f"http://{ADDRESS}:{self._http.port}/"
        # `close` waits for the socket's thread to look up, every 0.05 s.
        serve = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)
        self._threads = [serve, threading.Thread(target=self._follow, daemon=True)]
        for thread in self._threads:
            thread.start()

    def _follow(self) -> None:
        while not self._ended.is_set():
            if not self.follower.look():
                self._ended.wait(self._period_s)

    def wait(self) -> None:
        """Return when closed, or raise KeyboardInterrupt."""
        while not self._ended.wait(1.0):
            pass

    def close(self) -> None:
        """Stop serving and following."""
        self._ended.set()
        self._http.shutdown()
        self._http.server_close()
        for thread in self._threads:
            thread.join(timeout=10)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _pages(title: str) -> dict[str, tuple[str, bytes]]:
    """Path -> (media type, content) of everything that does not change."""
    html = filled(
        page.source("page.html"),
        {"live": True, "title": title, **page.constants(), "runs": [], "charts": []},
        # `frame-ancestors` counts in the header only.
        policy=_POLICY.replace("frame-ancestors 'none'; ", ""),
        style='<link rel="stylesheet" href="/page.css">',
        scripts=[f'<script src="/{name}"></script>' for name in ("plotly.js", "figures.js", *page.SCRIPTS)],
    )
    texts = {"/": ("text/html", html), "/page.css": ("text/css", shared_source("look.css") + page.source("page.css"))}
    texts["/figures.js"] = ("text/javascript", shared_source("figures.js"))
    texts |= {f"/{name}": ("text/javascript", page.source(name)) for name in page.SCRIPTS}
    texts["/plotly.js"] = ("text/javascript", get_plotlyjs())
    return {path: (kind, text.encode("utf-8")) for path, (kind, text) in texts.items()}


class _Http(ThreadingHTTPServer):
    """The listening socket, with what its handlers answer from."""

    daemon_threads = True

    def __init__(self, port: int, pages: dict[str, tuple[str, bytes]], follower: Follower) -> None:
        self.pages = pages
        self.follower = follower
        super().__init__((ADDRESS, port), _Handler)
        self.port = int(self.server_address[1])


class _Handler(BaseHTTPRequestHandler):
    """Answers the paths of this file's docstring; every other method than GET is refused by the base class."""

    # One connection a request: a page notices at once when the server ends.
    protocol_version = "HTTP/1.0"
    server_version, sys_version = "dashboard", ""
    timeout = 60
    server: _Http

    def do_GET(self) -> None:
        """Answer, or refuse."""
        if self.headers.get("Host", "") not in (f"{ADDRESS}:{self.server.port}", f"localhost:{self.server.port}"):
            self._answer(HTTPStatus.MISDIRECTED_REQUEST, "text/plain", b"this server answers to its own address only\n")
            return
        url = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        data: Json | None = None
        if url.path == "/api/runs":
            data = self.server.follower.runs(_number(query.get("since"), missing=0), query.get("server", ""))
        elif url.path == "/api/tables":
            data = self.server.follower.tables(_number(query.get("run"), missing=-1))
        if url.path in self.server.pages:
            self._answer(HTTPStatus.OK, *self.server.pages[url.path])
        elif data is None:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"no such page\n")
        else:
            text = json.dumps(data, separators=(",", ":"), allow_nan=False)
            self._answer(HTTPStatus.OK, "application/json", text.encode("utf-8"))

    def _answer(self, code: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(code)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: a page asks every two seconds."""
        return

    def handle_one_request(self) -> None:
        """A page that was closed in the middle of an answer is no error."""
        try:
            super().handle_one_request()
        except ConnectionError:
            self.close_connection = True


def _number(text: str | None, *, missing: int) -> int:
    return int(text) if text and text.isascii() and text.isdigit() and len(text) < 16 else missing
