"""The dashboard over HTTP on this machine: follows running jobs and sends what is new.

    GET /                          the page
    GET /page.css, /page*.js, /plotly.js
    GET /api/runs?since=EPOCH      the runs that changed after EPOCH, the state of all, and the new EPOCH
    GET /api/tables?run=KEY        expert and FP8 tables of one run

One thread looks for new runs and reads what was appended to each file since the last look (`run_reader.py`); a page
asks every two seconds. Nothing is written. An EPOCH of another server process (`server` in the answer) counts as 0.

Security: it listens on 127.0.0.1 only; knows the paths above and opens no file that a request names; answers GET
only; refuses a Host that is not this address, so that a foreign site cannot reach it by DNS rebinding; its content
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
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, urlsplit

from plotly.offline import get_plotlyjs

from train.studies.dashboard.charts import charts_for
from train.studies.dashboard.page import (
    SCRIPTS,
    constants,
    curve_limit,
    filled_page,
    names,
    run_json,
    script_json,
    source,
    tables_json,
)
from train.studies.dashboard.run_card import status
from train.studies.dashboard.run_reader import RunReader, find_runs
from train.studies.dashboard.series import MAX_CELLS, Json

ADDRESS = "127.0.0.1"
DEFAULT_PORT = 8663
# One look reads at most this much of each run, so that a page sees all runs grow while long files are read.
_PIECE_BYTES = 8 << 20
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
    """A run, the name under which it was last sent, and the epoch of its last change."""

    reader: RunReader
    changed: int = 0
    name: str = ""
    problem: str = ""
    untold: str = ""

    def notes(self) -> list[str]:
        """What could not be read, or not be drawn."""
        return [*self.reader.problems.values(), *filter(None, (self.problem, self.untold))]


class Follower:
    """Run directories read again and again.

    Args:
        places: run directories, or folders in which runs appear.
    """

    def __init__(self, places: Sequence[Path]) -> None:
        self._places = list(places)
        self._runs: dict[Path, _Followed] = {}
        self._lock = threading.Lock()
        self._epoch = 0
        # Tells a page that a restarted server counts from 0 again.
        self._server = secrets.token_hex(8)

    def look(self) -> bool:
        """Find new runs and read what was appended; returns whether anything changed."""
        changed = False
        for directory in find_runs(self._places):
            # A run that two places reach is one run, whichever of them saw its file first.
            resolved = directory.resolve()
            with self._lock:
                if resolved not in self._runs:
                    # Sent even while its files are empty: a page numbers runs by their places among all.
                    self._runs[resolved] = _Followed(RunReader(directory))
                    self._mark_changed(self._runs[resolved])
                    changed = True
        for run in list(self._runs.values()):
            with self._lock:
                changed |= self._read(run)
        return changed

    def _read(self, run: _Followed) -> bool:
        try:
            changed, problem = run.reader.poll(_PIECE_BYTES), ""
        except OSError as error:
            # A folder that is being deleted, or a disk that is away: said on the page, tried again.
            changed, problem = False, str(error)
        if changed or problem != run.problem:
            run.problem = problem
            self._mark_changed(run)
        return changed

    def _mark_changed(self, run: _Followed) -> None:
        self._epoch += 1
        run.changed = self._epoch

    def runs(self, since: int, server: str) -> Json:
        """What changed after epoch `since` of process `server`."""
        with self._lock:
            readers = [run.reader for run in self._runs.values()]
            for run in self._runs.values():
                # A card that was written after the last look: no answer shows a run without the card that it has.
                if run.reader.read_cards():
                    self._mark_changed(run)
            for run, name in zip(self._runs.values(), names(readers), strict=True):
                # The card of another run changes a name too, where both have the same.
                if name != run.name:
                    run.name = name
                    self._mark_changed(run)
            since = since if server == self._server else 0
            now, limit = time.time(), curve_limit(readers, _CURVE_BYTES)
            changed = [
                _told(run, key=key, name=run.name, limit=limit, now_unix_s=now)
                for key, run in enumerate(self._runs.values())
                if run.changed > since
            ]
            return {
                "server": self._server,
                "epoch": self._epoch,
                "runs": changed,
                "states": [status(reader, now) for reader in readers],
                "charts": charts_for({name for reader in readers for name in reader.series}),
                "bytes_read": sum(reader.offset for reader in readers),
                "bytes": sum(reader.size for reader in readers),
                "problems": [text for run in self._runs.values() for text in run.notes()],
                "now_unix_s": now,
            }

    def tables(self, key: int) -> Json | None:
        """Tables of run `key`; None if there is no such run."""
        with self._lock:
            readers = [run.reader for run in self._runs.values()]
            return tables_json(readers[key], MAX_CELLS) if 0 <= key < len(readers) else None


def _told(run: _Followed, **options: Any) -> Json:
    """A run as the page draws it; of one that cannot be told, its place with nothing in it, and a note."""
    try:
        told = run_json(run.reader, **options)
        json.dumps(told, allow_nan=False)
    except Exception as error:  # noqa: BLE001
        run.untold = f"{run.reader.directory} cannot be drawn ({error})"
        return run_json(RunReader(run.reader.directory), **options)
    run.untold = ""
    return told


class Server:
    """Follows and serves in threads of its own until `close`; use it as a context manager.

    Args:
        places: run directories, or folders of them.
        port: 0 takes a free one.
        title: heading of the page.
        period_s: between two looks at the files.
    Attributes:
        url: of the page.
    Raises:
        ValueError: the port is taken, or a place is no directory.
    """

    def __init__(
        self, places: Sequence[Path], *, port: int = DEFAULT_PORT, title: str = "Training runs", period_s: float = 1.0
    ) -> None:
        for place in places:
            if not place.is_dir():
                raise ValueError(f"{place} is no directory: give a run directory, or a folder in which runs appear")
        self.follower = Follower(places)
        self._period_s = period_s
        self._ended = threading.Event()
        pages = {name: (kind, text.encode("utf-8")) for name, (kind, text) in _pages(title).items()}
        try:
            self._http = _Http(port, pages, self.follower)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            reason = f"port {port} of {ADDRESS} cannot be had ({error.strerror})"
            raise ValueError(f"{reason}: give another with --port, or 0 for a free one") from None
        self.url = f"http://{ADDRESS}:{self._http.port}/"
        self._threads = [
            threading.Thread(target=target, daemon=True) for target in (self._http.serve_forever, self._follow)
        ]
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _pages(title: str) -> dict[str, tuple[str, str]]:
    """Path -> (media type, text) of everything that does not change."""
    data = {"live": True, "title": title, **constants([]), "runs": [], "charts": []}
    tags = [f'<script type="application/json" id="data">{script_json(data)}</script>']
    tags += [f'<script src="/{name}"></script>' for name in ("plotly.js", *SCRIPTS)]
    page = filled_page(
        title=title,
        # `frame-ancestors` counts in the header only.
        policy=_POLICY.replace("frame-ancestors 'none'; ", ""),
        style='<link rel="stylesheet" href="/page.css">',
        scripts="\n".join(tags),
    )
    script = "text/javascript"
    pages = {"/": ("text/html", page), "/page.css": ("text/css", source("page.css"))}
    return pages | {f"/{name}": (script, source(name)) for name in SCRIPTS} | {"/plotly.js": (script, get_plotlyjs())}


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
        if url.path in self.server.pages:
            self._answer(HTTPStatus.OK, *self.server.pages[url.path])
            return
        answer = self._data(url.path, {name: values[-1] for name, values in parse_qs(url.query).items()})
        if answer is None:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"no such page\n")
        else:
            text = json.dumps(answer, separators=(",", ":"), allow_nan=False)
            self._answer(HTTPStatus.OK, "application/json", text.encode("utf-8"))

    def _data(self, path: str, query: dict[str, str]) -> Json | None:
        if path == "/api/runs":
            return self.server.follower.runs(_number(query.get("since")), query.get("server", ""))
        if path == "/api/tables":
            return self.server.follower.tables(_number(query.get("run"), missing=-1))
        return None

    def _answer(self, code: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(code)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: a page asks every two seconds."""
        return

    def handle_one_request(self) -> None:
        """A page that was closed in the middle of an answer is no error."""
        try:
            super().handle_one_request()
        except ConnectionError:
            self.close_connection = True


def _number(text: str | None, missing: int = 0) -> int:
    return int(text) if text and text.isascii() and text.isdigit() and len(text) < 16 else missing
