"""A JSONL file of answers that only grows: one line a request, written as soon as it is answered.

Each line goes to the operating system in one write, so a process that is killed loses nothing that it received. The
disk is told to keep it (fsync) every `FSYNC_EVERY_S` and when the file is closed: a machine that loses power loses at
most the answers of that time, which are asked for again. A last line without its end, from a write that was cut, is
removed when the file is opened; what a full disk does not take whole is removed at once. A file that holds anything
else is refused as it is.

A line has the form of OpenAI's batch output, and three fields of ours:

    {"custom_id", "response": {"status_code", "body"}, "error": null or {"message"}, "endpoint", "time_unix_s",
     "seconds"}

`body` is null where the request was refused. A line whose `response` is null, as OpenAI's own files have it, answers
nothing and is passed by; of two lines of one request the later one holds.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from train.checkpoint.publish import lock

FSYNC_EVERY_S = 5.0
# Of every line: `json.dumps` keeps the order of `endpoint._line`.
BEGINNING = b'{"custom_id"'


class AnswerLog:
    """The file, open for appending by this process alone; `ids` are those that need not be asked for again."""

    def __init__(self, path: Path) -> None:
        """Open the file, or make it; ValueError where another process writes it or a line is not of this form."""
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            if lock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB) is False:
                raise ValueError(f"{path} is written by another process; wait for it, or name another file")
            torn, self.ids = self._torn_line(), {line["custom_id"] for _, line in read_answers(path, whole_only=True)}
            if torn and not _is_torn(torn):
                raise ValueError(f"{path} is no answer file; name another file to write to")
            os.ftruncate(self._file, os.fstat(self._file).st_size - len(torn))
        except (ValueError, OSError):
            os.close(self._file)
            raise
        self._synced_s = time.monotonic()

    def __enter__(self) -> AnswerLog:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            with self._full_disk_is_one_sentence():
                os.fsync(self._file)
        finally:
            os.close(self._file)

    def append(self, line: Mapping[str, Any]) -> None:
        """Add the answer to one request, whole or not at all; ValueError where the disk does not take it."""
        data, size = json.dumps(line).encode() + b"\n", os.fstat(self._file).st_size
        written = 0
        with self._full_disk_is_one_sentence():
            try:
                while written < len(data):
                    written += os.write(self._file, data[written:])
            except OSError:
                os.ftruncate(self._file, size)
                raise
            if time.monotonic() - self._synced_s > FSYNC_EVERY_S:
                os.fsync(self._file)
                self._synced_s = time.monotonic()
        self.ids.add(line["custom_id"])

    @contextmanager
    def _full_disk_is_one_sentence(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ValueError(
                f"{self.path} cannot be written ({error.strerror}); make room, and the same command goes on"
            ) from None

    def _torn_line(self) -> bytes:
        """What follows the last end of a line."""
        size = end = os.fstat(self._file).st_size
        while end and (block := os.pread(self._file, min(end, 1 << 16), end - min(end, 1 << 16))):
            if (found := block.rfind(b"\n")) >= 0:
                end += found + 1 - len(block)
                break
            end -= len(block)
        return os.pread(self._file, size - end, end)


def _is_torn(text: bytes) -> bool:
    """Whether it may be a line of ours without its end; whole JSON of another form, such as a request, is not."""
    try:
        return "response" in json.loads(text)
    except (ValueError, TypeError):
        return text.startswith(BEGINNING) or BEGINNING.startswith(text)


def read_answers(path: Path, *, whole_only: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """(offset in bytes, line) of each answer, or of those with an end; ValueError names the first of another form."""
    offset = 0
    with path.open("rb") as lines:
        for number, text in enumerate(lines, start=1):
            if whole_only and not text.endswith(b"\n"):
                return
            try:
                line = json.loads(text)
                response = line["response"]
                well_formed = isinstance(line["custom_id"], str)
                well_formed &= response is None or isinstance(response["body"], dict | None)
            except (ValueError, TypeError, KeyError):
                well_formed = False
            if not well_formed:
                raise ValueError(f"{path} line {number} is no answer to a request; name another file to write to")
            if response is not None:
                yield offset, line
            offset += len(text)
