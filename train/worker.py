"""One rank from start to end: meet the others, build, resume, train, leave.

    stores and first weights opened, the run's directory locked     before ranks meet: a missing store or a second
                                       trainer is one sentence, not 2,048 dead ranks
    heartbeat, process groups, mesh    `parallel/watchdog.py`, `parallel/mesh.py`
    components -> Trainer -> resume -> fit  `train/assemble.py`, `train/trainer.py`
    leave together                     groups destroyed in order: no thread outlives the interpreter

What all ranks find out alike (a checkpoint of another model, too many bad steps) ends the run in order and is raised
afterwards. What only one of them meets ends it for all: its watchdog reports to the others which rank it was.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch.distributed.distributed_c10d import PrefixStore, Store

from parallel.consensus import Ranks, StoreTransport
from parallel.mesh import Mesh, init_processes, make_mesh, shutdown, single
from parallel.watchdog import Watchdog, end_process
from train.assemble import Resources, build, device_of, open_resources
from train.config import PretrainConfig
from train.observe.alerts import AlertCommand, check_command
from train.observe.guards import AskedToStop, TerminationGuard, TrainingStopped
from train.observe.sinks import Sinks
from train.run_directory import locked, run_directory
from train.trainer import Trainer


@dataclass(frozen=True)
class WorkerInfo:
    """This process among all."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0  # on its node
    store: Store | None = None  # at which the processes meet; None with one process
    store_rank: int | None = None  # the rank whose process hosts the store, None where the launcher does
    is_asked_to_stop: Callable[[], bool] = lambda: False  # this process, by a signal
    tell_launcher: Callable[[str], None] = lambda _: None  # leaves the last sentence of this process for its report
    after_step: Callable[[Trainer, Sinks], None] = lambda *_: None  # as `Trainer`


def pretrain(config: PretrainConfig, info: WorkerInfo) -> None:
    """Train from the first or the last saved step to the end of the budget, or until asked to stop.

    Raises:
        ValueError: a store, the device or a checkpoint does not fit the configuration, or another process trains in
            the run's directory; nothing was trained.
        TrainingStopped: too many non-finite steps in a row; a checkpoint was saved.
    """
    if config.rank is not None:
        raise ValueError(f"rank={config.rank} says which rank dry_run=true plans: add dry_run=true, or leave rank out")
    if info.rank > 0:
        # What is worth a warning, a damaged checkpoint, is the same for all: rank 0 logs it.
        logging.getLogger("train").setLevel(logging.ERROR)
    with ExitStack() as held:
        opened = open_on_every_rank(config, info, held)
        with joined(config, info, opened) as mesh:
            agreed = resume_and_fit(config, mesh, opened.resources, info.after_step)
    if agreed is not None:
        raise agreed


def resume_and_fit(
    config: PretrainConfig, mesh: Mesh, resources: Resources, after_step: Callable[[Trainer, Sinks], None]
) -> Exception | None:
    """Resume and fit. Returns what all ranks raise alike, to be raised after they have left in order.

    An error of one rank only is raised at once: its watchdog reports it to the others.
    """
    components = build(config, mesh, resources)
    trainer = Trainer(config, components, after_step)
    try:
        trainer.resume()
    except ValueError as refused:
        return refused
    try:
        trainer.fit()
    except TrainingStopped as stopped:
        return stopped
    return None


class Opened(NamedTuple):
    """What a rank has before it meets the others."""

    device: torch.device
    backend: Literal["gloo", "nccl"]
    resources: Resources


def open_here(config: PretrainConfig, info: WorkerInfo, held: ExitStack) -> Opened:
    """Device, transport, stores and first weights of this rank; rank 0 locks the run's directory, for `held` to free.

    Raises:
        ValueError: one of them is missing here, or the directory is in use or cannot be written.
    """
    check_command(config.observe.alert_command)
    device = device_of(config)
    resources = open_resources(config)
    if info.rank == 0:
        held.enter_context(locked(run_directory(config.run)))
    # The first touch of a GPU comes after what may be refused without one.
    if device.type == "cuda" and info.store is not None:
        if info.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"local rank {info.local_rank} has no GPU: this machine shows {torch.cuda.device_count()}; start as "
                "many processes here as it has GPUs"
            )
        device = torch.device("cuda", info.local_rank)
        torch.cuda.set_device(device)
    return Opened(device, config.network.backend_for(device.type), resources)


def open_on_every_rank(config: PretrainConfig, info: WorkerInfo, held: ExitStack) -> Opened:
    """`open_here` on every rank; what one of them raises is raised by all.

    Raises:
        AskedToStop: one of several ranks was; all leave.
        ValueError: what a rank raised, with its number where it is not the first; or some processes did not come.
    """
    if info.store is None:
        return open_here(config, info, held)
    opened: list[Opened] = []

    def open_mine() -> bool:
        try:
            opened.append(open_here(config, info, held))
            return info.is_asked_to_stop()
        except ValueError as error:
            # A node may lack what others have, so the sentence names the rank.
            raise ValueError(f"rank {info.rank}: {error}" if info.rank else str(error)) from error

    meeting = StoreTransport(
        PrefixStore("start", info.store),
        info.rank,
        info.world,
        timeout_s=config.network.timeout_s,
        hosts_store=info.rank == info.store_rank,
    )
    if Ranks(meeting).agree(open_mine, lambda reports: [any(reports)] * len(reports)):
        raise AskedToStop
    return opened[0]


@contextmanager
def joined(config: PretrainConfig, info: WorkerInfo, opened: Opened) -> Iterator[Mesh]:
    """The mesh of the configured layout, under a watchdog; its groups are destroyed in order at the end."""
    if info.store is None:
        yield single(opened.device)
        return

    def end(sentence: str) -> None:
        try:
            info.tell_launcher(sentence)
            if watchdog.reports_death:
                alert = AlertCommand(config.observe.alert_command, run_directory(config.run))
                alert.send("dead_rank", sentence)
                alert.close()
        finally:
            end_process(sentence)

    # When a rank dies, torchrun sends SIGTERM to the others, who have yet to find out and say which one it was.
    with (
        TerminationGuard(),
        Watchdog(
            PrefixStore("watchdog", info.store),
            info.rank,
            info.world,
            peer_timeout_s=config.network.peer_timeout_s,
            describe="pipeline rank {}, data rank {}".format(*divmod(info.rank, config.layout.dp)),
            store_rank=info.store_rank,
            on_death=end,
        ) as watchdog,
    ):
        init_processes(
            rank=info.rank,
            world=info.world,
            backend=opened.backend,
            store=info.store,
            timeout_s=config.network.timeout_s,
        )
        tied, timeout_s = config.model.num_nextn_predict_layers > 0, config.network.timeout_s
        yield make_mesh(config.layout, device=opened.device, tied_embedding=tied, timeout_s=timeout_s)
        shutdown()
