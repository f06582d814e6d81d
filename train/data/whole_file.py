"""A file that is seen whole or as it was before, whatever happens while it is written.

hidden draft beside it -> fsync -> rename -> fsync of the folder
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def draft_of(path: Path) -> Path:
    """Where a file is prepared: what a kill leaves behind."""
    return path.with_name(f".writing-{path.name}")


def write_whole(path: Path, content: str | bytes | Iterable[str]) -> None:
    """Write a file, in place of an older one with its mode; what goes wrong leaves that, and an OSError names it."""
    parts = [content] if isinstance(content, str | bytes) else content
    draft = draft_of(path)
    try:
        # Not through a link planted in the draft's place.
        draft.unlink(missing_ok=True)
        with draft.open("xb") as file:
            if path.exists():
                os.fchmod(file.fileno(), path.stat().st_mode & 0o7777)
            for part in parts:
                file.write(part if isinstance(part, bytes) else part.encode())
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        fsync_directory(path.parent)
    except OSError as error:
        # A write that fails does not say of which file.
        raise error if error.filename else OSError(error.errno, error.strerror, str(path)) from None
    finally:
        draft.unlink(missing_ok=True)


def fsync_directory(directory: Path) -> None:
    """Wait until a directory's names are on the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
