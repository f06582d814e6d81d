"""The index of a store, `index.bin`: where each document is, and the SHA-256 of each block of the data files.

    starts    [documents + 1] int64   first token of each document, all documents end to end; then their total
    runs      [3, runs] int64         first token, data file, byte offset: from there tokens follow each other;
              [4, runs] of a store with a loss mask: and the byte offset of the mask
    hashes    [blocks, 32] uint8      SHA-256 of the blocks, files in the order of their names

Numbers are little-endian. The file is read whole on opening and has its own SHA-256 in the manifest; everything else
about the data files is read through it, so no reader parses Arrow. In memory: 8 bytes a document, 24 or 32 a run (an
Arrow record batch, 1,000 documents), 32 a block.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from train.data.blocks import SHA256_BYTES, hash_blocks, num_blocks

INDEX_NAME = "index.bin"
# Of `loss_mask`: 1 where a token is a target.
MASK_DTYPE = "uint8"


class Index(NamedTuple):
    """The three tables; shapes in the module's docstring."""

    starts: NDArray[np.int64]
    runs: NDArray[np.int64]
    hashes: NDArray[np.uint8]

    def to_bytes(self) -> bytes:
        """Inverse of `parse_index`."""
        return b"".join(table.astype(table.dtype.newbyteorder("<")).tobytes() for table in self)


def parse_index(
    content: bytes, *, documents: int, tokens: int, sizes: list[int], block_bytes: int, item_bytes: tuple[int, ...]
) -> Index:
    """The index of a store with so many documents and tokens, and data files of these sizes; every range is checked.

    `item_bytes`: of a token in each column.

    Raises:
        ValueError: says what it lacks; no sentence yet.
    """
    blocks = sum(num_blocks(size, block_bytes) for size in sizes)
    runs_bytes, run_bytes = len(content) - 8 * (documents + 1) - SHA256_BYTES * blocks, 8 * (2 + len(item_bytes))
    if runs_bytes < run_bytes or runs_bytes % run_bytes:
        raise ValueError(f"has {len(content)} bytes, which fit no {documents} documents and {blocks} blocks")
    numbers = np.frombuffer(content, dtype="<i8", count=documents + 1 + runs_bytes // 8).astype(np.int64, copy=False)
    starts, runs = numbers[: documents + 1], numbers[documents + 1 :].reshape(2 + len(item_bytes), -1)
    hashes = np.frombuffer(content, dtype=np.uint8, offset=8 * len(numbers)).reshape(blocks, SHA256_BYTES)
    firsts, files, *columns = runs
    if starts[0] != 0 or starts[-1] != tokens or not (np.diff(starts) > 0).all():
        raise ValueError(f"does not divide {tokens} tokens into {documents} documents")
    ends = np.append(firsts[1:], tokens)
    if firsts[0] != 0 or not (firsts < ends).all() or not (starts[np.searchsorted(starts, firsts)] == firsts).all():
        raise ValueError("has runs that do not begin where a document begins")
    is_file = (files >= 0) & (files < len(sizes))
    for offsets, width in zip(columns, item_bytes, strict=True):
        # Compared without a product that could overflow.
        room = (np.array(sizes)[np.where(is_file, files, 0)] - offsets) // width
        if not (is_file & (offsets >= 0) & (ends - firsts <= room)).all():
            raise ValueError("has runs beyond the end of a data file")
    return Index(starts, runs, hashes)


class ScannedFiles(NamedTuple):
    """What Arrow files hold, the largest id, and how many tokens have a loss (0 without a mask)."""

    found: Index
    max_token_id: int
    targets: int


def scan_arrow(files: Iterable[Path], *, dtype: str, block_bytes: int, masked: bool = False) -> ScannedFiles:
    """Read and check Arrow files of documents whose ids are of `dtype`, with or without a loss mask; one pass.

    Raises:
        ValueError: a file is no Arrow file of such documents.
    """
    import pyarrow as pa

    starts, runs, hashes, tokens, largest, targets = [np.zeros(1, dtype=np.int64)], [], [], 0, 0, 0
    names = {"input_ids": dtype} | ({"loss_mask": MASK_DTYPE} if masked else {})
    for number, file in enumerate(files):
        with pa.memory_map(str(file)) as mapped:
            base = mapped.read_buffer().address
            mapped.seek(0)
            for batch in pa.ipc.open_stream(mapped):
                batch.validate(full=True)
                offsets, (ids, *masks) = _columns_of(batch, names, file)
                if len(ids) == 0:
                    continue
                runs.append((tokens, number, *(each.ctypes.data - base for each in (ids, *masks))))
                starts.append(tokens + offsets[1:])
                tokens, largest = tokens + len(ids), max(largest, int(ids.max()))
                targets += sum(int(mask.sum()) for mask in masks)
        hashes.append(hash_blocks(file, block_bytes))
    index = Index(
        np.concatenate(starts),
        np.array(runs, dtype=np.int64).reshape(-1, 2 + len(names)).T,
        np.frombuffer(b"".join(hashes), dtype=np.uint8).reshape(-1, SHA256_BYTES),
    )
    return ScannedFiles(index, largest, targets)


def _columns_of(
    batch: Any, dtypes: dict[str, str], file: Path
) -> tuple[NDArray[np.int64], list[NDArray[np.integer[Any]]]]:
    """Where documents begin in the lists of a batch, and the values of each column, end to end."""
    fields = [(field.name, str(field.type).replace("<element:", "<item:")) for field in batch.schema]
    if fields != [(name, f"list<item: {dtype}>") for name, dtype in dtypes.items()]:
        raise ValueError(f"store: {file} has {batch.schema.to_string()} where lists of {dtypes} belong")
    starts, values = [], []
    for column in batch.columns:
        if column.null_count or column.values.null_count:
            raise ValueError(f"store: {file} has documents or ids that are null; prepare the store again")
        offsets = column.offsets.to_numpy().astype(np.int64)
        starts.append(offsets - offsets[0])
        values.append(column.values.to_numpy(zero_copy_only=True)[offsets[0] : offsets[-1]])
    if any((each != starts[0]).any() for each in starts):
        raise ValueError(f"store: {file} has columns of unlike lengths; prepare the store again")
    return starts[0], values
