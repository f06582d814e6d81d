"""Checkpoints through torch DCP, with safetensors payloads and JSON for the rest.

DCP plans which rank writes which piece of which tensor, reshards on load, and stages copies so that training
goes on while the files are written. Its default file format, however, unpickles `.metadata` and every value
that is not a tensor, and unpickling executes what the file says. Here DCP reads and writes through its
Hugging Face storage, which knows tensors only, and everything else is JSON. Nothing that is read can run.

    save, Saver   stage -> write shards -> state.json -> manifest.json -> fsync -> rename -> prune
    load          verify the manifest -> compare names, shapes, dtypes -> fill the tensors in place

The last steps of a save happen in `StorageWriter.finish`, which DCP calls once all data is written. So they
run in DCP's own background thread and, on several ranks, on the coordinator only.

One process for now: `no_dist=True`, no process group is needed or used. Directory layout, publication and
verification are in `train.checkpoint.publish`; what to save is the trainer's decision.
"""

from __future__ import annotations

import json
import warnings
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.storage import WriteResult

from train.checkpoint import publish
from train.checkpoint.publish import latest

__all__ = ["CheckpointConfig", "Saver", "latest", "load", "save"]

# A shard is serialised in memory before it is written, so this bounds the extra memory of a save.
SHARD_BYTES = 2 * 1024**3

# DCP announces on every save and load that it works without a process group; that is the intent here.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save and how much to keep.

    Args:
        every_steps: optimizer steps between two checkpoints.
        keep: published checkpoints that stay; two, so that one survives damage to the other.
        asynchronous: write in the background while training goes on.
    Raises:
        ValueError: a field is out of range.
    """

    every_steps: int
    keep: int = 2
    asynchronous: bool = True

    def __post_init__(self) -> None:
        for field in ("every_steps", "keep"):
            value = getattr(self, field)
            if not value >= 1:
                raise ValueError(f"checkpoint.{field} = {value} must be at least 1")


def save(path: Path, *, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write one checkpoint and return when it is published.

    Args:
        path: the checkpoint's own directory, such as `checkpoints/step_00000010`; an older one is replaced.
        tensors: name -> tensor, any dtype and shape.
        state: everything else, as JSON.
    Raises:
        ValueError: something in `tensors` is no tensor, or `state` is no JSON.
        RuntimeError: writing failed; whatever was published before is untouched.
    """
    _finish(path, _start(path, tensors=tensors, state=state, keep=None))


class Saver:
    """Saves the checkpoints of one run, one at a time, in the background.

    An error of a background save is raised by the next call of any method, `close` included.

    Args:
        directory: receives `step_*` directories; this object must be its only writer.
        config: how many to keep, and whether to write in the background.
    """

    def __init__(self, directory: Path, config: CheckpointConfig) -> None:
        self._directory = directory
        self._config = config
        self._in_flight: tuple[Path, Future[Metadata]] | None = None

    def save_async(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Copy the tensors, then write them in the background; a save still under way is waited for.

        After the return the caller may change the tensors: the file holds their values of now. With
        `asynchronous=False` in the config it returns when the checkpoint is published.

        Args:
            step: optimizer steps finished; names the directory.
            tensors: name -> tensor.
            state: everything else, as JSON.
        Raises:
            ValueError: something in `tensors` is no tensor, or `state` is no JSON.
            RuntimeError: the previous save failed; this one was not started.
        """
        self.wait()
        path = self._directory / publish.step_name(step)
        future = _start(path, tensors=tensors, state=state, keep=self._config.keep)
        self._in_flight = (path, future)
        if not self._config.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Return when no save is under way.

        Raises:
            RuntimeError: the save failed; names the checkpoint and the cause.
        """
        if self._in_flight is not None:
            path, future = self._in_flight
            self._in_flight = None
            _finish(path, future)

    def close(self) -> None:
        """Wait for the last save. No thread or file stays open."""
        self.wait()


def load(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Fill tensors in place from a checkpoint.

    Names, shapes, dtypes and hashes are checked before the first tensor is touched.

    Args:
        path: a published checkpoint, as `latest` returns it.
        tensors: name -> tensor to fill; exactly the names, shapes and dtypes of the checkpoint.
    Returns:
        the state that was saved with them.
    Raises:
        ValueError: a file is damaged, or a tensor is missing, unexpected, or of another shape or dtype;
            named.
    """
    if not path.is_dir():
        raise ValueError(f"there is no checkpoint {path}; look for step_* in {path.parent}")
    manifest = publish.verify(path)
    state = publish.read_json(path / publish.STATE)
    if not isinstance(state, dict):
        raise ValueError(f"checkpoint {path} is damaged: {publish.STATE} holds no object")
    _check_tensors(path, saved=manifest["tensors"], wanted=_describe(tensors))
    targets = {name: tensor.detach() for name, tensor in tensors.items()}
    try:
        state_dict_loader.load(targets, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)
    except CheckpointException as failure:
        shards = sorted(name for name in manifest["files"] if name.endswith(publish.SHARD_SUFFIX))
        cause = _cause(failure)
        raise ValueError(f"checkpoint {path} is damaged: cannot read {', '.join(shards)}: {cause}") from cause
    return state


class _PublishingWriter(HuggingFaceStorageWriter):
    """DCP's safetensors writer, working in a hidden directory that it publishes when all data is written."""

    def __init__(self, target: Path, *, files: dict[str, int], state_json: str, keep: int | None) -> None:
        hidden = publish.writing_path(target)
        super().__init__(path=str(hidden), fqn_to_index_mapping=files, save_distributed=True)
        self._target = target
        self._hidden = hidden
        self._state_json = state_json
        self._keep = keep

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Add state and manifest, publish, prune. DCP calls this once, after the last shard."""
        publish.write_json(self._hidden / publish.STATE, json.loads(self._state_json))
        tensors = {}
        for name, saved in sorted(metadata.state_dict_metadata.items()):
            assert isinstance(saved, TensorStorageMetadata), name
            tensors[name] = {"shape": list(saved.size), "dtype": str(saved.properties.dtype)}
        publish.write_manifest(self._hidden, tensors)
        publish.publish(self._target)
        if self._keep is not None:
            publish.prune(self._target.parent, keep=self._keep, newest=self._target)


def _start(path: Path, *, tensors: dict[str, Tensor], state: dict[str, Any], keep: int | None) -> Future[Metadata]:
    """Check, stage, and hand over to DCP's thread; on return the tensors are copied."""
    if not tensors:
        raise ValueError(f"nothing to save in {path}: give at least one tensor")
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"tensors[{name!r}] is a {type(tensor).__name__}, not a tensor; put it into the JSON state"
            )
    try:
        state_json = json.dumps(state, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"state is not JSON: {error}; keep to dict, list, str, int, float, bool, None") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    publish.sweep(path.parent)
    writer = _PublishingWriter(path, files=_assign_files(tensors), state_json=state_json, keep=keep)
    future = state_dict_saver.async_save(tensors, storage_writer=writer, no_dist=True)
    assert isinstance(future, Future)
    return future


def _assign_files(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Number of the shard file, from 1, for each tensor: in order of name, up to SHARD_BYTES each."""
    files: dict[str, int] = {}
    index, filled_bytes = 1, 0
    for name in sorted(tensors):
        num_bytes = tensors[name].nbytes
        if filled_bytes and filled_bytes + num_bytes > SHARD_BYTES:
            index, filled_bytes = index + 1, 0
        files[name] = index
        filled_bytes += num_bytes
    return files


def _finish(path: Path, future: Future[Metadata]) -> None:
    try:
        future.result()
    except CheckpointException as failure:
        cause = _cause(failure)
        raise RuntimeError(
            f"saving checkpoint {path} failed: {cause}; those published before it are untouched"
        ) from cause


def _cause(failure: CheckpointException) -> BaseException:
    """DCP wraps the error of each rank; one process has one."""
    error, _ = next(iter(failure.failures.values()))
    return error


def _describe(tensors: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    return {name: {"shape": list(t.shape), "dtype": str(t.dtype)} for name, t in tensors.items()}


def _check_tensors(path: Path, *, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Compare names, shapes and dtypes; the first few of each kind are named."""
    complaints = []
    if missing := sorted(wanted.keys() - saved.keys()):
        complaints.append(f"lacks {_some(missing)}")
    if unexpected := sorted(saved.keys() - wanted.keys()):
        complaints.append(f"holds {_some(unexpected)}, which nobody asked for")
    differing = [
        f"{name} (saved {saved[name]['dtype']} {saved[name]['shape']}, "
        f"wanted {wanted[name]['dtype']} {wanted[name]['shape']})"
        for name in sorted(saved.keys() & wanted.keys())
        if saved[name] != wanted[name]
    ]
    if differing:
        complaints.append(f"differs in {_some(differing)}")
    if complaints:
        raise ValueError(
            f"checkpoint {path} does not fit: it {'; it '.join(complaints)}. "
            "Use the configuration of the run that saved it"
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
