"""One rank's whole life: meet the others, build, resume, train, leave.

    stores and first weights opened    before ranks meet: a missing store is one sentence, not 2,048 dead ranks
    heartbeat, process groups, mesh    `parallel/watchdog.py`, `parallel/mesh.py`
    parts -> Trainer -> resume -> fit  `train/assemble.py`, `train/trainer.py`
    leave together                     groups destroyed in order: no thread outlives the interpreter

What all ranks find out alike (a checkpoint of another model, too many bad steps) ends the run in order and is raised
afterwards. What only one of them meets ends it for all: its watchdog reports to the others which rank it was.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch.distributed.distributed_c10d import PrefixStore, Store

from parallel.consensus import Ranks, StoreTransport
from parallel.mesh import Mesh, init_processes, make_mesh, shutdown
from parallel.watchdog import Watchdog
from train.assemble import Stores, build, choose_device, first_weights, open_stores
from train.config import PretrainConfig
from train.observe.guards import TrainingStopped
from train.trainer import Trainer

if TYPE_CHECKING:
    from train.huggingface.weights import WeightSource


@dataclass(frozen=True)
class WorkerInfo:
    """This process among all: global rank, number of processes, index on its node, and the store at which they meet.

    store is None with one process. store_rank: the rank whose process hosts the store, None where the launcher does.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    store: Store | None = None
    store_rank: int | None = None


def pretrain(config: PretrainConfig, info: WorkerInfo) -> None:
    """Train from the first or the last saved step to the end of the budget, or until asked to stop.

    Raises:
        ValueError: a store, the device or a checkpoint does not fit the configuration; nothing was trained.
        TrainingStopped: too many non-finite steps in a row; a checkpoint was saved.
    """
    if config.rank:
        raise ValueError(f"rank={config.rank} says which rank dry_run=true plans: add dry_run=true, or leave rank out")
    if info.rank > 0:
        # What is worth a warning, a damaged checkpoint, is the same for all: rank 0 logs it.
        logging.getLogger("train").setLevel(logging.ERROR)
    if info.store is None:
        mine = open_resources(config, info)
        trainer = Trainer(config, build(config, stores=mine.stores, source=mine.source))
        trainer.resume()
        trainer.fit()
        return
    mine = open_together(config, info)
    agreed: Exception | None = None
    with Watchdog(
        PrefixStore("watchdog", info.store),
        info.rank,
        info.world,
        peer_timeout_s=config.network.peer_timeout_s,
        describe="pipeline rank {}, data rank {}".format(*divmod(info.rank, config.layout.dp)),
        store_rank=info.store_rank,
    ):
        timeout_s = config.network.timeout_s
        init_processes(rank=info.rank, world=info.world, backend=mine.backend, store=info.store, timeout_s=timeout_s)
        mesh = join(config, mine.device)
        trainer = Trainer(config, build(config, mesh, stores=mine.stores, source=mine.source))
        # Decided by all ranks alike, from what they share. Whatever else one of them raises ends the run by its name.
        try:
            trainer.resume()
        except ValueError as refused:
            agreed = refused
        if agreed is None:
            try:
                trainer.fit()
            except TrainingStopped as stopped:
                agreed = stopped
        shutdown()
    if agreed is not None:
        raise agreed


def join(config: PretrainConfig, device: torch.device) -> Mesh:
    """The mesh of the configured layout; the default process group exists."""
    tied = config.model.num_nextn_predict_layers > 0
    return make_mesh(config.layout, device=device, tied_embedding=tied, timeout_s=config.network.timeout_s)


class Resources(NamedTuple):
    """What a rank opens before it meets the others; source: of the first weights, if not drawn or resumed."""

    stores: Stores
    source: WeightSource | None
    device: torch.device
    backend: Literal["gloo", "nccl"]


def open_resources(config: PretrainConfig, info: WorkerInfo) -> Resources:
    """Stores, first weights and device of this rank, and the transport; a ValueError if one of them is missing here."""
    stores, source = open_stores(config), first_weights(config)
    device = choose_device(config.run.device)
    if device.type == "cuda":
        if info.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"local rank {info.local_rank} has no GPU: this machine shows {torch.cuda.device_count()}; start as "
                "many processes here as it has GPUs"
            )
        device = torch.device("cuda", info.local_rank)
        torch.cuda.set_device(device)
    return Resources(stores, source, device, config.network.backend_for(device.type))


def open_together(config: PretrainConfig, info: WorkerInfo) -> Resources:
    """`open_resources` on every rank; what one of them raises is raised by all.

    Raises:
        ValueError: what a rank raised, with its number where it is not the first; or some processes did not come.
    """
    assert info.store is not None
    opened: list[Resources] = []

    def open_mine() -> None:
        try:
            opened.append(open_resources(config, info))
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
    Ranks(meeting).agree(open_mine, lambda reports: reports)
    return opened[0]
