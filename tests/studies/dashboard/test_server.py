"""The served dashboard sends what is new, and answers only a page of its own on this machine."""

from __future__ import annotations

import base64
import http.client
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock
from urllib.parse import urlsplit

import numpy as np
import pytest

from launch.dashboard import main
from tests.studies.dashboard.synthetic_runs import append, record, with_tables, write_run
from train.studies.dashboard.page import render
from train.studies.dashboard.run_reader import RunReader
from train.studies.dashboard.server import DEFAULT_PORT, Follower, Server

REPOSITORY = Path(__file__).resolve().parents[3]
# Longer than any pause of a noisy machine; only a hang reaches it.
PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Follows one run that does not grow; a file beside the folder of runs is none of its business."""
    folder = tmp_path_factory.mktemp("served")
    write_run(folder / "runs" / "a", [with_tables(record(step)) for step in range(1, 31)], name="first")
    (folder / "secret.txt").write_text("secret")
    with Server([folder / "runs"], port=0, period_s=0.05) as running:
        until(lambda: [run["records"] for run in runs(running)["runs"]] == [30])
        yield running


def ask(server: Any, path: str, *, method: str = "GET", host: str = "") -> tuple[int, dict[str, str], bytes]:
    with closing(http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=PATIENCE_S)) as connection:
        connection.putrequest(method, path, skip_host=bool(host))
        if host:
            connection.putheader("Host", host)
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()


def runs(server: Server, since: int = 0, token: str = "") -> Any:
    return json.loads(ask(server, f"/api/runs?since={since}&server={token}")[2])


def looked(*folders: Path) -> Follower:
    """A follower that has read everything."""
    follower = Follower(folders)
    while follower.look():
        pass
    return follower


def steps_of(run: dict[str, Any]) -> list[int]:
    return np.frombuffer(base64.b64decode(run["series"]["loss/main"]["key"]), "<u4").tolist()


def until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        assert time.monotonic() < deadline, "nothing came"
        time.sleep(0.02)
    return value


def test_only_runs_that_changed_are_sent_again(tmp_path: Path):
    first = write_run(tmp_path / "a", [record(step) for step in range(1, 31)], name="first")
    with Server([tmp_path], port=0, period_s=0.05) as server:
        write_run(tmp_path / "b", [record(1)], name="second")
        # A run is sent when it is found, and again when it has been read.
        news = until(lambda: (found := runs(server)) and [run["records"] for run in found["runs"]] == [30, 1] and found)
        assert [run["name"] for run in news["runs"]] == ["first", "second"]
        since, token = news["epoch"], news["server"]
        assert runs(server, since, token)["runs"] == []
        append(first, [record(31)])
        (grown,) = until(lambda: runs(server, since, token)["runs"])
        assert (grown["key"], steps_of(grown)) == (0, list(range(1, 32)))
        assert len(runs(server, since, "another")["runs"]) == 2


def test_a_run_that_was_found_before_its_card_takes_its_name_with_the_next_answer(tmp_path: Path):
    run_dir = write_run(tmp_path / "run", [record(1)])
    follower = looked(tmp_path)
    early = follower.runs(0, "")
    assert [run["name"] for run in early["runs"]] == ["run"]
    # The page asks after the card was written and before the next look at the files.
    (run_dir / "run_card.json").write_text('{"name": "late"}')
    news = follower.runs(early["epoch"], early["server"])
    assert [(run["key"], run["name"], run["records"]) for run in news["runs"]] == [(0, "late", 1)]
    assert follower.runs(news["epoch"], news["server"])["runs"] == []
    assert not follower.look()


def test_a_card_that_gives_a_run_the_name_of_another_sends_both_again(tmp_path: Path):
    first = write_run(tmp_path / "a", [record(1)])
    write_run(tmp_path / "b", [record(1)], name="same")
    follower = looked(tmp_path)
    early = follower.runs(0, "")
    (first / "run_card.json").write_text('{"name": "same"}')
    news = follower.runs(early["epoch"], early["server"])
    assert [run["name"] for run in news["runs"]] == ["same", f"same ({tmp_path / 'b'})"]


def test_a_run_reached_by_two_paths_is_one_run_whenever_it_appears(tmp_path: Path):
    run_dir = write_run(tmp_path / "runs" / "a", [record(1)])
    (tmp_path / "link").symlink_to(run_dir)
    follower = Follower([tmp_path / "link", tmp_path / "runs"])
    with pytest.MonkeyPatch.context() as patch:
        # The first look passes `link` before the file is there, and the folder after it.
        patch.setattr("train.studies.dashboard.server.find_runs", lambda folders: [run_dir])
        follower.look()
    follower.look()
    assert len(follower.runs(0, "")["runs"]) == 1


def test_a_long_run_is_sent_thinned_and_the_answer_stays_small(tmp_path: Path):
    write_run(tmp_path / "long", [record(step) for step in range(1, 10_001)])
    (run,) = looked(tmp_path).runs(0, "")["runs"]
    assert run["records"] == 10_000
    assert 500 < len(steps_of(run)) <= 2048
    # Fourteen curves of at most 2048 buckets of 32 bytes.
    assert len(json.dumps(run)) < 14 * 2048 * 32 + 20_000


def test_tables_are_sent_on_demand(server: Server):
    code, _, body = ask(server, "/api/tables?run=0")
    tables = json.loads(body)
    assert (code, tables["moe/expert_bias"]["shape"], tables["fp8/snr_db"]["shape"]) == (200, [4] * 3, [6] * 3)
    assert [ask(server, f"/api/tables?run={key}")[0] for key in (7, -1)] == [404, 404]


PATHS = ["/../secret.txt", "/runs/a/metrics.jsonl", "/%2e%2e/secret.txt", "//etc/passwd", "/page.py", "/api/"]


@pytest.mark.parametrize("path", [*PATHS, "/api/tables?run=../secret", "/api/tables?run=0/../../secret.txt"])
def test_no_path_leads_to_a_file(server: Server, path: str):
    code, _, body = ask(server, path)
    assert (code, b"secret" in body) == (404, False)


def test_a_foreign_host_is_refused(server: Server):
    ours = urlsplit(server.url)
    for host in ("evil.example", f"evil.example:{ours.port}", "127.0.0.1", f"127.0.0.1.evil.example:{ours.port}"):
        assert ask(server, "/api/runs", host=host)[0] == 421
    for host in (ours.netloc, f"localhost:{ours.port}"):
        assert ask(server, "/api/runs", host=host)[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "HEAD"])
def test_every_method_but_get_is_refused(server: Server, method: str):
    assert ask(server, "/", method=method)[0] == 501


@pytest.mark.parametrize("path", ["/", "/page.js", "/plotly.js", "/api/runs", "/nothing"])
def test_every_answer_carries_the_policy(server: Server, path: str):
    _, headers, _ = ask(server, path)
    for directive in ("default-src 'none'", "script-src 'self';", "connect-src 'self'"):
        assert directive in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert "Access-Control-Allow-Origin" not in headers


def test_it_listens_on_this_machine_only(server: Server):
    # Another address of this machine: a socket bound to all of them would answer there.
    with socket.socket() as probe:
        probe.settimeout(5)
        assert probe.connect_ex(("127.0.0.2", urlsplit(server.url).port)) != 0


def test_a_card_that_is_being_written_is_a_note_and_is_read_later(tmp_path: Path):
    run_dir = write_run(tmp_path / "run", [record(1)])
    (run_dir / "run_card.json").write_text('{"name": "ha')
    follower = looked(run_dir)
    answer = follower.runs(0, "")
    assert "is not JSON" in answer["problems"][0]
    assert answer["runs"][0]["records"] == 1
    (run_dir / "run_card.json").write_text('{"name": "half no more"}')
    answer = follower.runs(0, "")
    assert (answer["problems"], answer["runs"][0]["name"]) == ([], "half no more")


def test_a_run_without_a_line_or_a_card_takes_its_place_among_the_others(tmp_path: Path):
    write_run(tmp_path / "a", [])
    write_run(tmp_path / "b", [record(1)])
    follower = Follower([tmp_path])
    assert follower.look()
    news = follower.runs(0, "")
    assert [run["key"] for run in news["runs"]] == [0, 1]
    assert [one["state"] for one in news["states"]] == ["empty", "silent"]
    write_run(tmp_path / "c", [])
    assert follower.look()
    assert [run["key"] for run in follower.runs(news["epoch"], news["server"])["runs"]] == [2]


def test_a_folder_that_cannot_be_read_is_a_note_until_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("bad", "good"):
        write_run(tmp_path / name, [record(1)])
    poll = RunReader.poll

    def away(reader: RunReader, max_bytes: int | None = None) -> bool:
        if reader.directory.name == "bad":
            raise OSError("the disk is away")
        return poll(reader, max_bytes)

    monkeypatch.setattr(RunReader, "poll", away)
    follower = looked(tmp_path)
    news = follower.runs(0, "")
    assert news["problems"] == ["the disk is away"]
    assert [one["state"] for one in news["states"]] == ["empty", "silent"]
    monkeypatch.undo()
    follower.look()
    assert follower.runs(0, "")["problems"] == []


DEEP = "[" * 3000
HOSTILE = {
    "a deep card": ("run_card.json", DEEP, "run_card.json is not JSON"),
    "a deep summary": ("summary.json", DEEP, "summary.json is not JSON"),
    "a configuration that holds itself": ("config.yaml", "a: &a {b: *a}", None),
    # As deep as breaks PyYAML, whose time grows with the square of the depth.
    "a deep configuration": ("config.yaml", "[" * 600 + "]" * 600, None),
    "an endless budget": ("run_card.json", '{"tokens_total": 1e308, "parameters": {"total": 1e308}}', None),
    "a summary of infinity": ("summary.json", '{"heldout_bits_per_byte": 1e999}', None),
}


@pytest.mark.parametrize(("name", "text", "note"), HOSTILE.values(), ids=HOSTILE.keys())
def test_files_of_somebody_elses_making_cost_their_run_a_note_at_most(
    tmp_path: Path, name: str, text: str, note: str | None
):
    slow = [record(step) | {"time_unix_s": 1e6 * step, "tokens_seen": step} for step in (1, 2)]
    bad = write_run(tmp_path / "bad", slow)
    write_run(tmp_path / "good", [record(1), record(2)])
    (bad / name).write_text(text)
    follower = looked(tmp_path)
    for _ in range(2):
        news = json.loads(json.dumps(follower.runs(0, ""), allow_nan=False))
        assert [run["records"] for run in news["runs"]] == [2, 2]
        assert len(news["problems"]) == (note is not None)
        assert note is None or note in news["problems"][0]
        # A later look does not forget it.
        follower.look()
    render([tmp_path / "good"], tmp_path / "page.html")
    if note:
        with pytest.raises(ValueError, match=note):
            render([tmp_path], tmp_path / "page.html")
    else:
        render([tmp_path], tmp_path / "page.html")


def test_lines_and_runs_that_break_the_reader_are_a_note_that_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bad = write_run(tmp_path / "bad", [record(1)])
    write_run(tmp_path / "good", [record(1)])
    take = RunReader._take_records

    def odd(reader: RunReader, records: list[dict[str, Any]]) -> None:
        if reader.directory.name == "bad" and any(one["step"] == 2 for one in records):
            raise ArithmeticError("no such number")
        take(reader, records)

    def records(follower: Follower) -> list[int]:
        return [run["records"] for run in follower.runs(0, "")["runs"]]

    monkeypatch.setattr(RunReader, "_take_records", odd)
    follower = looked(tmp_path)
    for step in (2, 3):
        append(bad, [record(step)])
        follower.look()
        note = f"{bad / 'metrics.jsonl'} has lines that cannot be read (no such number)"
        assert follower.runs(0, "")["problems"] == [note]
    assert records(follower) == [2, 1]
    monkeypatch.setattr("train.studies.dashboard.run_card.facts", lambda reader: 1 / (reader.records - 1))
    assert records(follower) == [2, 0]
    monkeypatch.undo()
    assert records(follower) == [2, 1]


def test_a_port_that_is_taken_is_one_sentence_and_exit_code_2(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    port = str(urlsplit(server.url).port)
    assert main(["--serve", str(tmp_path), "--port", port]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"dashboard: port {port} of 127.0.0.1 cannot be had")
    assert "--port" in error
    assert main(["--serve", str(tmp_path / "nowhere")]) == 2
    assert "is no directory" in capsys.readouterr().err
    assert DEFAULT_PORT == 8663


def test_an_interrupt_while_the_first_line_is_written_is_an_orderly_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "run", [record(1)])
    printed = Mock(side_effect=[KeyboardInterrupt, None, None])
    monkeypatch.setattr("builtins.print", printed)
    assert main(["--serve", str(tmp_path), "--port", "0"]) == 0
    # Or even before that.
    monkeypatch.setattr("launch.dashboard.Server.__init__", Mock(side_effect=KeyboardInterrupt))
    assert main(["--serve", str(tmp_path), "--port", "0"]) == 0
    assert [line.args for line in printed.call_args_list[1:]] == [("dashboard: ended",)] * 2


def test_the_entrypoint_serves_until_it_is_interrupted(tmp_path: Path):
    write_run(tmp_path / "run", [record(1)])
    command = [sys.executable, str(REPOSITORY / "launch/dashboard.py"), "--serve", str(tmp_path), "--port", "0"]
    environment = {"PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY, env=environment) as process:
        try:
            line = process.stdout.readline()
            found = re.search(r"http://127\.0\.0\.1:\d+/", line)
            assert found, line
            assert b"Training runs" in ask(SimpleNamespace(url=found[0]), "/")[2]
            process.send_signal(2)
            assert process.wait(timeout=PATIENCE_S) == 0
        finally:
            process.kill()
