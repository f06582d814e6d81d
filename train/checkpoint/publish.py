"""The directory side of checkpoints: manifest, atomic publication, pruning, verification.

A published checkpoint is a directory `step_00000010` that holds

    shard-*.safetensors   tensors
    state.json            everything else
    manifest.json         bytes and sha256 of every other file, name, shape and dtype of every tensor, and a
                          sha256 of the manifest itself

Everything is written and fsynced under a hidden name first; one rename makes it visible. So a name of the
form `step_*` is a whole checkpoint, whatever moment the process was killed at. Hidden names on the way:

    .writing-step_*    not finished: worthless, swept away by the next save
    .replaced-step_*   the older checkpoint of a step saved again: valid until the newer one is visible
    .pruned-step_*     being deleted: worthless

The hashes guard against accidents (a torn write, a flipped bit, a lost file), not against an author of checkpoints:
against that one guards that nothing here or in `train.checkpoint.dcp` can execute what it reads.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

from train.data.store import file_sha256
from train.data.whole_file import fsync_directory

FORMAT = 1
MANIFEST = "manifest.json"
# Of lists and objects inside each other; ours have six.
DEEPEST = 64
STATE = "state.json"
SHARD_SUFFIX = ".safetensors"
# What `flock` raises on a file system without locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)

_STEP_NAME = re.compile(r"step_(\d{8,})")
_WRITING, _REPLACED, _PRUNED = ".writing-", ".replaced-", ".pruned-"

Grouped = TypeVar("Grouped")


def step_name(step: int) -> str:
    """Directory name of a checkpoint: 'step_00000010' after 10 steps."""
    return f"step_{step:08d}"


def step_of(path: Path) -> int:
    """The step of a published checkpoint's directory."""
    match = _STEP_NAME.fullmatch(path.name.removeprefix(_REPLACED))
    assert match is not None, path
    return int(match[1])


def lock(file: int | IO[bytes], how: int) -> bool | None:
    """Whether `flock` got the lock of an open file; None on a file system without locks."""
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return True


def writing_path(target: Path) -> Path:
    """The hidden directory '.writing-<name>' in which `target` is prepared."""
    return target.with_name(_WRITING + target.name)


def write_json(path: Path, value: Any) -> None:
    """Write a small file and wait until it is on the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=1, allow_nan=False))
        file.flush()
        os.fsync(file.fileno())


def group_into_files(
    items: Iterable[Grouped], num_bytes: Callable[[Grouped], int], *, file_bytes: int
) -> list[tuple[Grouped, ...]]:
    """Fill one file after the other, each up to `file_bytes`; a larger item gets a file of its own."""
    if file_bytes < 1:
        raise ValueError(f"shard size {file_bytes} must be at least 1 byte; 5GB is usual")
    groups: list[list[Grouped]] = [[]]
    filled_bytes = 0
    for item in items:
        size = num_bytes(item)
        if groups[-1] and filled_bytes + size > file_bytes:
            groups.append([])
            filled_bytes = 0
        groups[-1].append(item)
        filled_bytes += size
    return [tuple(group) for group in groups]


def entry_of(file: Path) -> dict[str, Any]:
    """The manifest's entry of a finished file: {"bytes", "sha256"}."""
    return {"bytes": file.stat().st_size, "sha256": file_sha256(file)}


def write_manifest(
    directory: Path, tensors: dict[str, dict[str, Any]], hashed: Mapping[str, dict[str, Any]] | None = None
) -> None:
    """List every file of a finished directory, with its hash, in its manifest.

    Args:
        directory: holds the shards and the state.
        tensors: name -> {'shape': list of int, 'dtype': str}.
        hashed: name -> `entry_of` the files that their writers have hashed; the others are hashed here.
    """
    files = dict(hashed or {})
    for name, entry in files.items():
        file = directory / name
        if not file.is_file() or file.stat().st_size != entry["bytes"]:
            raise FileNotFoundError(
                f"{file} was written by another rank but is not seen whole by the first; "
                "put run.directory on a file system that all nodes share"
            )
    for file in directory.iterdir():
        if file.name != MANIFEST and file.name not in files:
            files[file.name] = entry_of(file)
    body = {"format": FORMAT, "files": dict(sorted(files.items())), "tensors": tensors}
    write_json(directory / MANIFEST, body | {"sha256": _sha256_of_body(body)})


def publish(target: Path) -> None:
    """Make `writing_path(target)`, complete and fsynced, visible as `target`, in place of an older one."""
    fsync_directory(writing_path(target))
    replaced = target.with_name(_REPLACED + target.name)
    # A link counts, wherever it leads, and if it leads nowhere.
    if os.path.lexists(target):
        os.rename(target, replaced)
    os.rename(writing_path(target), target)
    fsync_directory(target.parent)
    if os.path.lexists(replaced):
        _remove(replaced)


def sweep(directory: Path) -> None:
    """Clear away the worthless directories that a killed process left behind; the caller is the only writer."""
    for path in _entries(directory):
        was_replaced = path.name.startswith(_REPLACED) and path.with_name(path.name.removeprefix(_REPLACED)).exists()
        if was_replaced or path.name.startswith((_WRITING, _PRUNED)):
            _remove(path)


def _remove(path: Path) -> None:
    """Delete a directory with all that is in it; of a link, the link alone."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path)


def prune(newest: Path, *, keep: int, stays: Callable[[int], bool]) -> None:
    """Delete all but the `keep` newest checkpoints and those whose step `stays`; so does `newest`, just published."""
    others = [path for path in published(newest.parent) if path != newest]
    for path in others[keep - 1 :]:
        if not stays(step_of(path)):
            _retire(path)


def drop_newer(directory: Path, step: int) -> None:
    """Delete the checkpoints after `step`, the newest first."""
    for path in published(directory):
        if step_of(path) > step:
            _retire(path)


def _retire(path: Path) -> None:
    # A directory loses its published name before its first file is deleted.
    doomed = path.with_name(_PRUNED + path.name)
    os.rename(path, doomed)
    _remove(doomed)


def verify(path: Path) -> dict[str, Any]:
    """Read a checkpoint's manifest and compare every file with it; a ValueError names the first that differs."""
    manifest = read_manifest(path)
    check_files(path, manifest["files"])
    return manifest


def check_files(path: Path, entries: Mapping[str, dict[str, Any]]) -> None:
    """Compare files with their entries of the manifest; a ValueError names the first that is missing or damaged."""
    for name, expected in entries.items():
        file = path / name
        if file.is_symlink():
            raise damage(file, "is a link, and may be another's file")
        if not file.is_file():
            raise damage(file, "is missing")
        try:
            num_bytes, sha256 = file.stat().st_size, ""
            if num_bytes == expected["bytes"]:
                sha256 = file_sha256(file)
        except OSError as error:
            raise damage(file, f"cannot be read ({error.strerror})") from None
        if num_bytes != expected["bytes"]:
            raise damage(file, f"has {num_bytes} bytes where the manifest says {expected['bytes']}")
        if sha256 != expected["sha256"]:
            raise damage(file, "does not have the sha256 of the manifest")


def read_json(path: Path) -> Any:
    """The value of a JSON file; a ValueError if it is missing or no JSON."""
    if path.is_symlink():
        raise damage(path, "is a link, and may be another's file")
    try:
        value = json.loads(path.read_bytes())
        # Half of a surrogate pair is legal in JSON but no text.
        json.dumps(value, ensure_ascii=False).encode()
        if not _is_flat(value):
            raise ValueError(f"nested more than {DEEPEST} levels")
        return value
    except FileNotFoundError:
        raise damage(path, "is missing") from None
    except OSError as error:
        raise damage(path, f"cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise damage(path, f"is not JSON of ours ({error})") from None


def _is_flat(value: Any, levels: int = DEEPEST) -> bool:
    """Whether no list or object is deeper than `levels`."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(_is_flat(each, levels - 1) for each in inner)


def read_manifest(path: Path) -> dict[str, Any]:
    """A checkpoint's manifest; the files that it lists are not opened.

    Returns:
        {"format", "files": name -> {"bytes", "sha256"}, "tensors": name -> {"shape", "dtype"}, "sha256"}.
    Raises:
        ValueError: the manifest is damaged, or a shard is present that it does not list.
    """
    file = path / MANIFEST
    manifest = read_json(file)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise damage(file, f"is not a manifest of format {FORMAT}")
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    if manifest.get("sha256") != _sha256_of_body(body):
        raise damage(file, "does not have its own sha256")
    files: Any = manifest.get("files")
    tensors: Any = manifest.get("tensors")
    _check_entries(file, "files", files, {"bytes": _is_count, "sha256": _is_text})
    _check_entries(file, "tensors", tensors, {"shape": _is_shape, "dtype": _is_text})
    if STATE not in files or not all(Path(name).name == name for name in files):
        raise damage(file, f"must name {STATE} and only files of its own directory")
    for stray in path.iterdir():
        # DCP's reader takes every safetensors file of the directory, so a stray one would be loaded.
        if stray.name.endswith(SHARD_SUFFIX) and stray.name not in files:
            raise damage(stray, "is not in the manifest")
    return manifest


def _check_entries(file: Path, section: str, entries: Any, fields: Mapping[str, Callable[[Any], bool]]) -> None:
    if not isinstance(entries, dict):
        raise damage(file, f"lacks {section!r}")
    for name, entry in entries.items():
        if not (_is_text(name) and isinstance(entry, dict) and entry.keys() == fields.keys()):
            raise damage(file, f"lacks {' or '.join(fields)} of {section}, {one_line(name)}")
        for field, is_right in fields.items():
            if not is_right(entry[field]):
                raise damage(file, f"says {field} {one_line(entry[field])} of {section}, {one_line(name)}")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) < 256 and value.isprintable()


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(_is_count(size) for size in value)


def one_line(value: object) -> str:
    """A value of a file, or a library's error, as one short line."""
    return " ".join(str(value).split())[:300]


def damage(file: Path, what: str) -> ValueError:
    """What to raise for a checkpoint's file; `what` follows its name."""
    return ValueError(f"checkpoint {file.parent} is damaged: {file.name} {what}; take another one, or restore it")


def published(directory: Path) -> list[Path]:
    """Checkpoints from the highest step down, with those whose replacement never became visible.

    A link is none of them, wherever it leads: a run neither reads, replaces nor deletes files outside its directory.
    """
    by_step: dict[int, Path] = {}
    for path in _entries(directory):
        match = _STEP_NAME.fullmatch(path.name.removeprefix(_REPLACED))
        if match is None or path.is_symlink() or not path.is_dir():
            continue
        if path.name == match[0] or int(match[1]) not in by_step:
            by_step[int(match[1])] = path
    return [by_step[step] for step in sorted(by_step, reverse=True)]


def _entries(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []


def _sha256_of_body(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
