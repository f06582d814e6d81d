"""Checkpoints through torch DCP, with safetensors payloads and JSON for the rest, on one rank or thousands.

A checkpoint does not depend on the layout that saved it: each file's header says where in the global tensor its shards
are. So a run saved on one layout resumes on any other: each rank reads the shards it holds now from those saved.

    save, Saver   plan: which rank writes what (once a run) -> stage -> each rank: write, fsync and hash its files
                  -> rank 0: state.json, manifest.json, fsync, rename, prune
    load          verify, each rank a share of the files -> compare names, shapes, dtypes -> fill in place

Every arrow is a consensus of all ranks (`parallel.consensus`): an error of one is raised by all, none hangs.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Container
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from parallel.consensus import GroupTransport, RankFailed, Ranks
from parallel.shards import (
    GlobalTensors,
    HeldTensors,
    TypedShard,
    assign_writers,
    global_tensors,
    local_tensor,
    read_report,
    typed_shard,
)
from train.checkpoint import publish
from train.checkpoint.config import CheckpointConfig
from train.checkpoint.planner import ShardLoadPlanner, ShardSavePlanner

logger = logging.getLogger(__name__)

# DCP stages, writes, reads and intersects shards on each rank by itself (`no_dist=True`): its own collectives, its
# default file format and every value that is not a tensor are pickles, and unpickling executes what it reads. Here
# DCP's Hugging Face storage carries tensors, JSON the rest. Nothing that is read can run.

# A file is serialised in memory before it is written, so this bounds the extra memory of a save.
SHARD_BYTES = 2 * 1024**3

# DCP announces on every save and load that it works without a process group; that is the intent here.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def save(path: Path, *, tensors: HeldTensors, state: dict[str, Any], group: dist.ProcessGroup | None = None) -> None:
    """Write one checkpoint and return when it is published; a collective call.

    Args:
        path: the checkpoint's own directory, such as `checkpoints/step_00000010`; an older one is replaced.
        tensors: name -> what this rank holds of it. Names may differ between ranks; the ranks' shards of a tensor must
            tile it. A `Tensor` is whole; of equal shards on several ranks one is written.
        state: everything else, as JSON; rank 0's is written.
        group: of all ranks that save together, for CPU tensors; None: this process alone.
    Raises:
        ValueError: something in `tensors` is no tensor, shards overlap or leave a hole, or `state` is no JSON.
        SaveFailed: writing failed on some rank; whatever was published before is untouched.
    """
    _start(_Save(path, tensors, state=state, prune=lambda _: None), Ranks(GroupTransport(group)), _Plan()).result()


class SaveFailed(RuntimeError):
    """Some rank could not write; all ranks know, and what was published before is untouched."""


class Saver:
    """Saves the checkpoints of one run, one at a time, in the background. Its methods are collective calls.

    An error of a background save is raised by the next call of any method, `close` included, on every rank.

    Args:
        directory: receives `step_*` directories; this run must be its only writer.
        config: how many to keep, and whether to write in the background.
        group: of all ranks, used by nothing else: messages of a save must not meet those of training.
    """

    def __init__(self, directory: Path, config: CheckpointConfig, group: dist.ProcessGroup | None = None) -> None:
        self._directory, self._config = directory, config
        self._ranks = Ranks(GroupTransport(group))
        self._plan = _Plan()
        self._in_flight: Future[None] | None = None

    def save_async(self, step: int, tensors: HeldTensors, state: dict[str, Any], *, stay: Container[int] = ()) -> None:
        """Copy the tensors, then write them in the background; a save still under way is waited for.

        After the return the caller may change the tensors: the file holds their values of now. With
        `asynchronous=False` in the config it returns when the checkpoint is published. Arguments as for `save`; the
        checkpoints of the steps `stay` are kept however old they are.
        """
        self.wait()

        def stays(older: int) -> bool:
            every = self._config.keep_every_steps
            return older in stay or (every > 0 and older % every == 0)

        prune = partial(publish.prune, keep=self._config.keep, stays=stays)
        job = _Save(self._directory / publish.step_name(step), tensors, state=state, prune=prune)
        self._in_flight = _start(job, self._ranks, self._plan)
        if not self._config.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Return when no save is under way; a SaveFailed names the checkpoint and the cause."""
        if self._in_flight is not None:
            future, self._in_flight = self._in_flight, None
            future.result()

    @property
    def is_published(self) -> bool:
        """Whether no save is under way, or the one under way has just been published; returns at once."""
        job = self._in_flight
        return job is None or (job.done() and job.exception() is None)

    def drop_newer(self, step: int) -> None:
        """Delete the checkpoints after `step`."""
        self.wait()
        drop = partial(publish.drop_newer, self._directory, step)
        self._ranks.agree(drop if self._ranks.rank == 0 else lambda: None, _no_replies)

    def close(self) -> None:
        """Wait for the last save. No thread or file stays open."""
        self.wait()


def latest(
    directory: Path, group: dist.ProcessGroup | None = None, *, order: Callable[[list[int]], list[int]] | None = None
) -> Path | None:
    """The newest checkpoint whose manifest and files verify, the same on every rank; a collective call.

    Damaged ones are passed over with a logged warning; nothing on the disk is changed. Each rank hashes a share of the
    files. None: there is no checkpoint.

    Args:
        directory: of the checkpoints.
        group: as for `load`.
        order: steps of all checkpoints, from the highest down -> those to look at, in order; None: all.
    Raises:
        ValueError: there are checkpoints, and every one is damaged; says what is wrong with each.
    """
    ranks = Ranks(GroupTransport(group))

    def listed(_: list[None]) -> list[list[str]]:
        paths = {publish.step_of(path): path.name for path in publish.published(directory)}
        steps = list(paths) if order is None else order(list(paths))
        return [[paths[step] for step in steps]] * ranks.size

    # One rank looks: another node may see an older listing of a shared directory.
    names: list[str] = ranks.agree(lambda: None, listed)
    damaged = []
    for path in (directory / name for name in names):
        try:
            _verify(ranks, path)
        except ValueError as damage:
            logger.warning("passed over: %s", damage)
            damaged.append(str(damage))
        else:
            return path
    if damaged:
        raise ValueError(
            f"no checkpoint in {directory} is whole, so the run cannot go on. {'. '.join(damaged)}. To begin the run "
            "again, move them away"
        )
    return None


def load(
    path: Path,
    tensors: HeldTensors,
    group: dist.ProcessGroup | None = None,
    *,
    check: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Fill tensors in place from a checkpoint of any layout, and return its state; a collective call.

    Names, shapes, dtypes and hashes are checked before the first tensor is touched. Each rank reads the headers of all
    files and maps into memory those that hold something it wants; only the wanted ranges of rows are read.

    Args:
        path: a published checkpoint, as `latest` returns it.
        tensors: name -> what to fill; over all ranks exactly the names, shapes and dtypes of the checkpoint.
        group: of all ranks that load together, for CPU tensors; None: this process alone.
        check: raises a ValueError for a state that does not fit, before tensors are compared; one rank calls it.
    Raises:
        ValueError: a file is damaged, the state does not fit, or a tensor is missing, unexpected, or of another shape
            or dtype; named.
    """
    ranks = Ranks(GroupTransport(group))
    manifest = _verify(ranks, path)
    shards: dict[str, TypedShard] = {}

    def ask() -> dict[str, TypedShard]:
        shards.update({name: typed_shard(name, value) for name, value in tensors.items()})
        return shards

    def compare(reports: list[Any]) -> list[dict[str, Any]]:
        state = publish.read_json(path / publish.STATE)
        if not isinstance(state, dict):
            raise ValueError(f"checkpoint {path} is damaged: {publish.STATE} holds no object")
        check(state)
        asked = global_tensors([read_report(report) for report in reports])
        _check_tensors(path, saved=manifest["tensors"], wanted=asked)
        return [state] * ranks.size

    state: dict[str, Any] = ranks.agree(ask, compare)
    wanted = {name: held for name, held in shards.items() if held.shard.numel}
    targets = {name: local_tensor(tensors[name]) for name in wanted}
    ranks.agree(partial(_read, path, targets, wanted), _no_replies)
    return state


class _ShardWriter(HuggingFaceStorageWriter):
    """DCP's safetensors writer, in the hidden directory; lists in `written` the files it wrote."""

    def __init__(self, directory: Path, *, shard: int, files: dict[str, int]) -> None:
        super().__init__(path=str(directory), fqn_to_index_mapping=files, save_distributed=True)
        self._shard = shard
        self.written: list[str] = []

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Name this rank's files by its rank: DCP sees one plan here, so it would call each of them the first."""
        plans = super().prepare_global_plan(plans)
        for plan in plans:
            plan.storage_data["shard_index"] = self._shard
        return plans

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """List the files. DCP calls this once this rank's files are on the disk."""
        self.written = sorted({result.storage_data.relative_path for each in results for result in each})


@dataclass
class _Plan:
    """Which rank writes what. It is kept from save to save: with 2,048 ranks working it out takes seconds."""

    shards: dict[str, TypedShard] | None = None  # what this rank held when it was worked out; None: never
    names: list[str] = field(default_factory=list)  # what this rank writes
    tensors: GlobalTensors = field(default_factory=dict)  # of all ranks; at rank 0 only


class _Save:
    """One save as one rank sees it; the methods are its phases, in this order."""

    def __init__(
        self, path: Path, tensors: HeldTensors, *, state: dict[str, Any], prune: Callable[[Path], None]
    ) -> None:
        self.path = path
        self.shards: dict[str, TypedShard] = {}
        self._tensors, self._state, self._prune = tensors, state, prune
        self._hidden = publish.writing_path(path)
        self._writer: _ShardWriter
        self._staged: dict[str, Any] = {}

    def describe(self) -> dict[str, TypedShard]:
        """Each rank: check what it was given."""
        self.shards = {name: typed_shard(name, value) for name, value in self._tensors.items()}
        try:
            # A copy of now: the caller may change the state while the shards are written.
            self._state = json.loads(json.dumps(self._state, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(f"state is not JSON: {error}; keep to dict, list, str, int, float, bool, None") from None
        return self.shards

    def stage(self, names: list[str], shard: int) -> None:
        """Each rank: copy to host memory what it will write."""
        mine = {name: local_tensor(self._tensors[name]) for name in names}
        self._tensors = {}
        groups = publish.group_into_files(sorted(mine), lambda name: mine[name].nbytes, file_bytes=SHARD_BYTES)
        files = {name: number for number, group in enumerate(groups, start=1) for name in group}
        self._writer = _ShardWriter(self._hidden, shard=shard, files=files)
        self._staged = self._writer.stage(mine)

    def prepare(self, reports: list[None]) -> list[None]:
        """Rank 0: clear away what a killed process left. No rank writes before."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        publish.sweep(self.path.parent)
        return reports

    def write(self) -> dict[str, dict[str, Any]]:
        """Each rank: write, fsync and hash its shards."""
        planner = ShardSavePlanner(self.shards)
        try:
            state_dict_saver.save(self._staged, storage_writer=self._writer, planner=planner, no_dist=True)
        except CheckpointException as failure:
            raise _cause(failure) from None
        self._staged = {}
        return {name: publish.entry_of(self._hidden / name) for name in self._writer.written}

    def publish(self, tensors: GlobalTensors, entries: list[dict[str, dict[str, Any]]]) -> list[None]:
        """Rank 0: add state and manifest, publish, prune."""
        publish.write_json(self._hidden / publish.STATE, self._state)
        publish.write_manifest(self._hidden, tensors, {name: e for each in entries for name, e in each.items()})
        publish.publish(self.path)
        self._prune(self.path)
        return [None] * len(entries)

    def failed(self, cause: Exception) -> RuntimeError:
        """What the caller sees; a rank that is gone is no matter of this save."""
        kind = SaveFailed if isinstance(cause, RankFailed | ValueError) else RuntimeError
        return kind(f"saving checkpoint {self.path} failed: {cause}; those published before it are untouched")


def _start(job: _Save, ranks: Ranks, plan: _Plan) -> Future[None]:
    """Check, agree, stage, and hand over to a thread; on return the tensors of all ranks are copied."""
    several = dist.is_initialized() and dist.get_world_size() > 1
    assert ranks.size > 1 or not several, "each rank would publish a checkpoint of its own: give a group of all"
    try:
        _agree_on_plan(job, ranks, plan)
        ranks.agree(partial(job.stage, plan.names, ranks.rank + 1), job.prepare)
    except RuntimeError as cause:
        raise job.failed(cause) from cause

    def finish() -> None:
        try:
            ranks.agree(job.write, partial(job.publish, plan.tensors))
        except (ValueError, RuntimeError) as cause:
            raise job.failed(cause) from cause

    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
    future = executor.submit(finish)
    # The thread ends after this job, and the interpreter's end waits for it.
    executor.shutdown(wait=False)
    return future


def _agree_on_plan(job: _Save, ranks: Ranks, plan: _Plan) -> None:
    """Take the plan of the save before, if every rank holds the same shards as then; else work it out."""
    if ranks.agree(lambda: job.describe() == plan.shards, lambda same: [all(same)] * len(same)):
        return
    tensors: GlobalTensors = {}

    def work_out(reports: list[Any]) -> list[list[str]]:
        held = [read_report(report) for report in reports]
        tensors.update(global_tensors(held))
        if not tensors:
            raise ValueError(f"nothing to save in {job.path}: give at least one tensor")
        return assign_writers(held)

    plan.names = ranks.agree(lambda: job.shards, work_out)
    plan.shards, plan.tensors = job.shards, tensors


def _no_replies(reports: list[Any]) -> list[None]:
    return [None] * len(reports)


def _verify(ranks: Ranks, path: Path) -> dict[str, Any]:
    """Compare all files with the manifest, each rank a share; returns it to rank 0, {} to the others."""
    manifest: dict[str, Any] = {}

    def deal(_: list[None]) -> list[dict[str, Any]]:
        if not path.is_dir():
            raise ValueError(f"there is no checkpoint {path}; look for step_* in {path.parent}")
        manifest.update(publish.read_manifest(path))
        # Dealt out from the largest down, so that the shares are about equal.
        files = sorted(manifest["files"].items(), key=lambda item: (-int(item[1]["bytes"]), item[0]))
        return [dict(files[rank :: ranks.size]) for rank in range(ranks.size)]

    share = ranks.agree(lambda: None, deal)
    ranks.agree(partial(publish.check_files, path, share), _no_replies)
    return manifest


def _read(path: Path, targets: dict[str, Tensor], wanted: dict[str, TypedShard]) -> None:
    reader = HuggingFaceStorageReader(str(path))
    try:
        state_dict_loader.load(dict(targets), storage_reader=reader, planner=ShardLoadPlanner(wanted), no_dist=True)
    except CheckpointException as failure:
        shards = sorted(file.name for file in path.iterdir() if file.name.endswith(publish.SHARD_SUFFIX))
        cause = _cause(failure)
        raise ValueError(
            f"checkpoint {path} is damaged: cannot read {_some(shards)}: {publish.one_line(cause)}"
        ) from cause


def _cause(failure: CheckpointException) -> BaseException:
    """DCP wraps the error of each rank; run on one rank it has one."""
    return next(iter(failure.failures.values()))[0]


def _check_tensors(path: Path, *, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Compare names, shapes and dtypes; the first few of each kind are named."""
    complaints = []
    if missing := sorted(wanted.keys() - saved.keys()):
        complaints.append(f"lacks {_some(missing)}")
    if unexpected := sorted(saved.keys() - wanted.keys()):
        complaints.append(f"holds {_some(unexpected)}, which no rank asked for")
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
