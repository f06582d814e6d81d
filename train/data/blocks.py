"""Reads of data files by blocks whose SHA-256 is checked when they are first read.

    read(file, start, stop) -> the blocks that hold those bytes are read whole and hashed the first time, and what was
                               hashed is what is returned; afterwards only the bytes asked for are read

The order of a training run is shuffled, so no file is read as a whole before it is used. A file that was touched since
(size, or time of last change, which only the kernel sets) is checked again, block by block. Files are read, never
mapped: one that is cut short meanwhile is an error here, and no SIGBUS.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

BLOCK_BYTES = 2 * 2**20
SHA256_BYTES = 32
FILES_OPEN = 64


class DamagedData(ValueError):
    """Data of a store that is not what was written; the message is one sentence.

    Args:
        file: its name.
        block: the one that differs; None where the file as a whole cannot be read.
    """

    def __init__(self, sentence: str, *, file: str, block: int | None = None) -> None:
        super().__init__(sentence)
        self.file, self.block = file, block


def num_blocks(num_bytes: int, block_bytes: int) -> int:
    """Blocks of a file; the last one may be short."""
    return -(-num_bytes // block_bytes)


def read_regular(path: Path) -> bytes:
    """A small file whole; an OSError says why not, a link or a device among the reasons."""
    descriptor = _open(path)
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


def refuse_irregular(path: Path, mode: int) -> None:
    """Raise an OSError for what is no plain file: a link may lead to another's file, a pipe never ends."""
    if not stat.S_ISREG(mode):
        what = "a link, and may be another's file" if stat.S_ISLNK(mode) else "no regular file"
        raise OSError(errno.EINVAL, f"it is {what}", str(path))


def _open(path: Path) -> int:
    refuse_irregular(path, path.lstat().st_mode)
    # Put in its place since: neither followed nor waited for.
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def hash_blocks(path: Path, block_bytes: int) -> bytes:
    """SHA-256 of each block of a file, end to end."""
    with path.open("rb") as file:
        return b"".join(hashlib.sha256(block).digest() for block in iter(lambda: file.read(block_bytes), b""))


class BlockReader:
    """The data files of one store.

    Args:
        folder: of the store.
        files: name -> bytes.
        hashes: [blocks, 32] SHA-256 of each block, files in order.
        block_bytes: of each block but a file's last.
    """

    def __init__(self, folder: Path, files: dict[str, int], hashes: NDArray[np.uint8], block_bytes: int) -> None:
        self.folder, self.names, self.sizes = folder, list(files), list(files.values())
        self.block_bytes, self._hashes = block_bytes, hashes
        self._first_blocks = [0, *accumulate(num_blocks(size, block_bytes) for size in self.sizes)]
        # 1 where a block has had its hash.
        self._is_checked = bytearray(len(hashes))
        # File -> descriptor, the one used last at the end; and what it looked like before its blocks were checked.
        self._open: dict[int, int] = {}
        self._looks: dict[int, tuple[int, int]] = {}

    def read(self, file: int, start: int, stop: int) -> bytes:
        """Bytes of the file-th file, every one of them checked.

        Raises:
            DamagedData: a block differs, or the file cannot be read.
        """
        try:
            return self._read(file, start, stop)
        except OSError as error:
            raise self._damaged(file, f"cannot be read ({error.strerror})") from error

    def _read(self, file: int, start: int, stop: int) -> bytes:
        descriptor, base = self._descriptor(file), self._first_blocks[file]
        first, after = start // self.block_bytes, num_blocks(stop, self.block_bytes)
        if 0 not in self._is_checked[base + first : base + after]:
            content = _pread(descriptor, start, stop)
            # Looked at after the read: a change before it shows.
            if _look(descriptor) == self._looks.get(file):
                return content
        look = _look(descriptor)
        if look != self._looks.get(file):
            self._looks[file] = look
            self._is_checked[base : self._first_blocks[file + 1]] = bytes(
                num_blocks(self.sizes[file], self.block_bytes)
            )
        blocks = b"".join(self._block(file, descriptor, number) for number in range(first, after))
        self._is_checked[base + first : base + after] = b"\1" * (after - first)
        return blocks[start - first * self.block_bytes : stop - first * self.block_bytes]

    def _block(self, file: int, descriptor: int, number: int) -> bytes:
        """One block, hashed."""
        start = number * self.block_bytes
        stop = min(start + self.block_bytes, self.sizes[file])
        content = _pread(descriptor, start, stop)
        if len(content) < stop - start:
            raise self._damaged(file, f"ends at byte {_look(descriptor)[0]} of {self.sizes[file]}", number)
        if hashlib.sha256(content).digest() != self._hashes[self._first_blocks[file] + number].tobytes():
            raise self._damaged(
                file, f"does not have the sha256 of its block {number} (bytes {start} to {stop})", number
            )
        return content

    def _descriptor(self, file: int) -> int:
        descriptor = self._open.pop(file, None)
        if descriptor is None:
            while len(self._open) >= FILES_OPEN:
                oldest = next(iter(self._open))
                os.close(self._open.pop(oldest))
            descriptor = _open(self.folder / self.names[file])
        self._open[file] = descriptor
        return descriptor

    def _damaged(self, file: int, what: str, block: int | None = None) -> DamagedData:
        return DamagedData(
            f"store: {self.folder / self.names[file]} {what}; it was altered after the store was made: restore "
            "the file, or remove the store's folder and run launch/prepare.py again",
            file=self.names[file],
            block=block,
        )

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)


def _look(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_size, status.st_ctime_ns


def _pread(descriptor: int, start: int, stop: int) -> bytes:
    """The bytes of a range; fewer where the file ends."""
    content = os.pread(descriptor, stop - start, start)
    while len(content) < stop - start and (
        more := os.pread(descriptor, stop - start - len(content), start + len(content))
    ):
        content += more
    return content
