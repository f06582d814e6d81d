"""Several ranks on this machine: run one function on each of them, over gloo, and hand back what they return.

The ranks are forked from a clean server process that has imported torch, pytest and our rooms once: one takes 0.05 s.

    def on_each_rank(rank: int, world: int, scale: float) -> float: ...      # at the top level of a test module
    results = run_ranks(4, on_each_rank, 0.5)                                # results[rank]

A rank that raises fails the test with its traceback, and the others are killed.

A `RankPool` keeps its ranks for many functions, one after the other; a failure is an answer, after which they start
again.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.distributed as dist

PRELOAD = [
    "torch",
    "torch.distributed.pipelining",
    "torch.distributed.checkpoint",
    "torch.distributed.checkpoint.hf_storage",
    "numpy",
    "safetensors.torch",
    "train.trainer",
    "tests.forked",
]
SEED = 20241227


def run_ranks(
    world: int, function: Callable[..., Any], *arguments: object, timeout_s: float = 240, **named: object
) -> list[Any]:
    """`function(rank, world, *arguments, **named)` on each of `world` gloo ranks; their results in order of rank."""
    outcomes = _start_and_collect(world, partial(function, **named), arguments, timeout_s)
    failures = [f"rank {rank}: {error}" for rank, (error, _) in enumerate(outcomes) if error]
    if failures:
        pytest.fail("\n".join(failures), pytrace=False)
    return [result for _, result in outcomes]


def _start_and_collect(
    world: int, function: Callable[..., Any], arguments: tuple[object, ...], timeout_s: float
) -> list[tuple[str | None, Any]]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with TemporaryDirectory() as folder:
        processes: list[BaseProcess] = []
        connections: list[Connection] = []
        for rank in range(world):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main, args=(rank, world, folder, sender, function, arguments), daemon=True
            )
            process.start()
            sender.close()
            processes.append(process)
            connections.append(receiver)
        try:
            return _collect(connections, timeout_s)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()


def _collect(connections: list[Connection], timeout_s: float) -> list[tuple[str | None, Any]]:
    """Wait for every rank; the first error or the timeout ends the wait for the others."""
    outcomes: dict[int, tuple[str | None, Any]] = {}
    deadline = time.monotonic() + timeout_s
    failed = False
    while len(outcomes) < len(connections):
        missing = [connection for rank, connection in enumerate(connections) if rank not in outcomes]
        # Once a rank has failed, the others get a moment to report their own error, then are given up.
        ready = wait(missing, timeout=2.0 if failed else max(0.0, deadline - time.monotonic()))
        for connection in ready:
            rank = connections.index(connection)  # type: ignore[arg-type]
            try:
                outcomes[rank] = connections[rank].recv()
            except EOFError:
                outcomes[rank] = ("died without a word", None)
            failed = failed or outcomes[rank][0] is not None
        if not ready:
            word = "gave up: another rank failed" if failed else f"nothing after {timeout_s:.0f} s"
            for rank in range(len(connections)):
                outcomes.setdefault(rank, (word, None))
    return [outcomes[rank] for rank in range(len(connections))]


def make_deterministic() -> None:
    """One seed, deterministic algorithms, NaN in what `torch.empty` returns, one thread."""
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    # An output that a kernel forgot to write shows at once.
    torch.utils.deterministic.fill_uninitialized_memory = True
    # pytest-xdist runs one worker per core, and bit-equality promises name the thread count.
    torch.set_num_threads(1)


class RankPool:
    """Ranks that stay up: `call` runs a function on each of them, in one process group for all calls."""

    def __init__(self, world: int, preload: Sequence[str] = ()) -> None:
        self.world = world
        # Of the first server that starts.
        multiprocessing.get_context("forkserver").set_forkserver_preload([*PRELOAD, *preload])
        self._folder: TemporaryDirectory[str] | None = None
        self._processes: list[BaseProcess] = []
        self._connections: list[Connection] = []

    def call(self, function: Callable[..., Any], *arguments: object, timeout_s: float) -> list[tuple[str | None, Any]]:
        """(error, result) of `function(rank, world, *arguments)` on each rank; after an error the ranks are new."""
        if not all(process.is_alive() for process in self._processes):
            self.close()
        if not self._processes:
            self._start()
        for connection in self._connections:
            connection.send((function, arguments))
        outcomes = _collect(self._connections, timeout_s)
        if any(error for error, _ in outcomes):
            self.close()
        return outcomes

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        self._folder = TemporaryDirectory()
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world, self._folder.name, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    def close(self) -> None:
        """End the ranks, wherever they are."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for connection in self._connections:
            connection.close()
        if self._folder is not None:
            self._folder.cleanup()
        self._folder, self._processes, self._connections = None, [], []


def _serve(rank: int, world: int, folder: str, connection: Connection) -> None:
    """One rank of a pool: functions as they come."""
    # What the server has imported stays until the end.
    gc.freeze()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    make_deterministic()
    dist.init_process_group("gloo", init_method=f"file://{Path(folder) / 'store'}", rank=rank, world_size=world)
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            os._exit(0)
        try:
            answer = None, function(rank, world, *arguments)
        except BaseException:  # noqa: BLE001  (whatever it was, the caller wants to read it)
            answer = traceback.format_exc(), None
        with suppress(BrokenPipeError):
            connection.send(answer)


def _rank_main(
    rank: int, world: int, folder: str, sender: Connection, function: Callable[..., Any], arguments: tuple[object, ...]
) -> None:
    """One rank: settings of every test, a gloo group through a file, the function, its result."""
    gc.freeze()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    make_deterministic()
    try:
        dist.init_process_group("gloo", init_method=f"file://{Path(folder) / 'store'}", rank=rank, world_size=world)
        result = function(rank, world, *arguments)
        dist.barrier()
        sender.send((None, result))
    except BaseException:  # noqa: BLE001  (whatever it was, the test wants to read it)
        sender.send((traceback.format_exc(), None))
    sender.close()
    # Threads of gloo may outlive the interpreter and abort it; a test needs no orderly end.
    os._exit(0)
