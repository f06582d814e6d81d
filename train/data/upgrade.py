"""Stores of format 1 get their index and the hashes of their blocks; the data and the identity of runs on it stay."""

from __future__ import annotations

from pathlib import Path

from train.data.blocks import BLOCK_BYTES
from train.data.index import scan_arrow
from train.data.store import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    REMEDY,
    TokenStore,
    read_manifest_of_any_format,
    verify_files,
)


def upgrade(folder: Path) -> dict[Path, bool]:
    """Upgrade a store, or every store of a folder that launch/prepare.py made; every file is read and compared first.

    Returns:
        Store -> whether it was of format 1.
    Raises:
        ValueError: no store, or one that is not what its manifest records; that one is left as it was.
    """
    stores = (
        [folder] if (folder / MANIFEST_NAME).exists() else sorted(p.parent for p in folder.glob(f"*/{MANIFEST_NAME}"))
    )
    if not stores:
        raise ValueError(
            f"upgrade: {folder} holds no {MANIFEST_NAME}, neither itself nor one folder below; check the path"
        )
    return {store: _upgrade_one(store) for store in stores}


def _upgrade_one(folder: Path) -> bool:
    manifest = read_manifest_of_any_format(folder)
    verify_files(folder, manifest)
    is_old = manifest.format_version < FORMAT_VERSION
    if is_old:
        files = [folder / name for name in manifest.data_files]
        index, largest, _ = scan_arrow(files, dtype=manifest.token_dtype, block_bytes=BLOCK_BYTES)
        found = (len(index.starts) - 1, int(index.starts[-1]))
        if found != (manifest.documents, manifest.tokens) or largest > manifest.max_token_id:
            raise ValueError(
                f"store: {folder} holds {found[0]} documents, {found[1]} tokens and ids up to {largest} where the "
                f"manifest records {manifest.documents}, {manifest.tokens} and {manifest.max_token_id}; {REMEDY}"
            )
        manifest.seal(folder, index)
    TokenStore.open(folder)
    return is_old
