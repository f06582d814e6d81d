"""The directory of a run: made, locked against a second trainer and tidied before anything is built.

    runs/<name>/lock     locked by rank 0 as long as its process lives; says which process on which host

The lock is the kernel's (`flock`): it goes with its process, however that ends, so no run waits for a stale one. Over
NFS the server keeps it for all hosts; a file system without locks is used with a warning.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from train.checkpoint import publish
from train.config import RunConfig
from train.observe.sinks import METRICS_FILE, RUN_CARD_FILE

LOCK = "lock"
ROOM_BYTES = 2**16
CHECKPOINTS = "checkpoints"
_log = logging.getLogger(__name__)


def run_directory(run: RunConfig) -> Path:
    """Where everything that a run writes is."""
    return Path(run.directory) / run.name


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Make a run's directory and hold it for this process; what a killed save left there is cleared away.

    Raises:
        ValueError: it cannot be made or written, a link in it leads out of it, or another process trains in it.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        refuse_links(directory)
        file = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise _unusable(directory, error) from error
    try:
        _lock(file, directory)
        # A disk that a half-written checkpoint has filled has room again from here on.
        try:
            publish.sweep(directory / CHECKPOINTS)
            owner = json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode()
            # Longer at first: a disk without room for that has none for a run.
            written = os.pwrite(file, owner.ljust(ROOM_BYTES), 0)
            os.ftruncate(file, len(owner))
            if written < ROOM_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise _unusable(directory, error) from error
        yield
    finally:
        os.close(file)


def _lock(file: int, directory: Path) -> None:
    try:
        got = publish.lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise _unusable(directory, error) from error
    if got is None:
        _log.warning("%s: this file system has no locks, so a second trainer there would not be noticed", directory)
    elif not got:
        try:
            owner = json.loads(os.pread(file, 4096, 0))
            who = publish.one_line(f"process {owner['pid']} on {owner['host']}")
        except (ValueError, KeyError, TypeError, RecursionError):
            who = "another process"
        raise ValueError(f"{directory} is in use: {who} trains there; wait for it, stop it, or choose another run.name")


def refuse_links(directory: Path) -> None:
    """Refuse links of a run's directory that lead out of it, to others' files, and folders in a file's place.

    Raises:
        ValueError: names the first link and where it leads, or the folder.
    """
    for name in (METRICS_FILE, RUN_CARD_FILE, "config.yaml"):
        if (directory / name).is_dir():
            raise ValueError(f"{directory / name} is a folder, but a run writes a file of that name; move it away")
    inside = Path(os.path.realpath(directory))
    for path in sorted(directory.iterdir()):
        target = Path(os.path.realpath(path))
        if path.is_symlink() and not target.is_relative_to(inside):
            raise ValueError(
                f"{path} is a link to {target}: a run reads and writes in its own directory only; remove the "
                "link, or put run.directory where the files shall be"
            )


def _unusable(directory: Path, error: OSError) -> ValueError:
    return ValueError(
        f"run.directory and run.name give {directory}, which cannot be used: {error.strerror or error}; "
        "choose a directory that can be written and has room"
    )
