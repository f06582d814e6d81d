"""One rank's whole life: meet the others, build, resume, train, leave.

    stores opened and checked          before anybody is met: a missing store is one sentence, not 2,048 dead ranks
    heartbeat, process groups, mesh    `parallel/watchdog.py`, `parallel/mesh.py`
    parts -> Trainer -> resume -> fit  `train/assemble.py`, `train/trainer.py`
    leave together                     groups destroyed in order, so that no thread outlives the interpreter

What all ranks find out alike (a checkpoint of another model, too many bad steps) ends the run in order and is raised
afterwards. What only one of them meets ends it for all: its watchdog tells the others who it was.

Not here: the environment (`launch/pretrain.py` reads it), exit codes.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch.distributed.distributed_c10d import PrefixStore, Store

from parallel.mesh import Mesh, init_processes, make_mesh, shutdown
from parallel.watchdog import Watchdog
from train.assemble import Stores, build, choose_device, first_weights, open_stores
from train.config import PretrainConfig
from train.observe.guards import TrainingStopped
from train.trainer import Trainer


@dataclass(frozen=True)
class Place:
    """This process among all: global rank, number of processes, index on its node, and where they meet.

    store is None with one process. store_rank: the rank whose process hosts the store, None where the launcher does.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    store: Store | None = None
    store_rank: int | None = None


def pretrain(config: PretrainConfig, place: Place) -> None:
    """Train from the first or the last saved step to the end of the budget, or until asked to stop.

    Raises:
        ValueError: a store, the device or a checkpoint does not fit the configuration; nothing was trained.
        TrainingStopped: too many non-finite steps in a row; a checkpoint was saved.
    """
    if config.rank:
        raise ValueError(f"rank={config.rank} says which rank dry_run=true plans: add dry_run=true, or leave rank out")
    if place.rank > 0:
        # What is worth a warning, a damaged checkpoint, is the same for all: the first rank says it.
        logging.getLogger("train").setLevel(logging.ERROR)
    if place.store is None:
        stores, _, _ = prepare(config, place)
        trainer = Trainer(config, build(config, stores=stores))
        trainer.resume()
        trainer.fit()
        return
    stores, device, backend = agree_to_start(config, place)
    agreed: Exception | None = None
    with Watchdog(
        PrefixStore("watchdog", place.store),
        place.rank,
        place.world,
        peer_timeout_s=config.network.peer_timeout_s,
        describe="pipeline rank {}, data rank {}".format(*divmod(place.rank, config.layout.dp)),
        store_rank=place.store_rank,
    ):
        timeout_s = config.network.timeout_s
        init_processes(rank=place.rank, world=place.world, backend=backend, store=place.store, timeout_s=timeout_s)
        mesh = join(config, device)
        trainer = Trainer(config, build(config, mesh, stores=stores))
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


Prepared = tuple[Stores, torch.device, Literal["gloo", "nccl"]]


def prepare(config: PretrainConfig, place: Place) -> Prepared:
    """What this rank needs before it meets the others: stores, its device, the transport.

    Raises:
        ValueError: one of them is missing here.
    """
    stores = open_stores(config)
    # Only to be refused here, if at all.
    first_weights(config)
    device = choose_device(config.run.device)
    if device.type == "cuda":
        if place.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"local rank {place.local_rank} has no GPU: this machine shows {torch.cuda.device_count()}; start as "
                "many processes here as it has GPUs"
            )
        device = torch.device("cuda", place.local_rank)
        torch.cuda.set_device(device)
    return stores, device, config.network.backend_for(device.type)


def agree_to_start(config: PretrainConfig, place: Place) -> Prepared:
    """`prepare` on every rank; the first refusal is every rank's, so that nobody waits for one that will not come.

    Raises:
        ValueError: what one of the ranks raised, with its number where it is not the first.
    """
    assert place.store is not None
    store = PrefixStore("start", place.store)
    prepared: Prepared | None = None
    try:
        prepared = prepare(config, place)
    except ValueError as error:
        store.compare_set("refusal", "", f"rank {place.rank}: {error}" if place.rank else str(error))
    store.add("ready", 1)
    deadline = time.monotonic() + config.network.timeout_s
    while store.add("ready", 0) < place.world:
        if time.monotonic() > deadline:
            raise ValueError(
                f"only {store.add('ready', 0)} of {place.world} processes came within network.timeout_s="
                f"{config.network.timeout_s}: look at the others' output, or raise it"
            )
        time.sleep(0.05)
    refusal = store.get("refusal").decode() if store.check(["refusal"]) else ""
    store.add("read", 1)
    while refusal and place.rank == place.store_rank and store.add("read", 0) < place.world:
        # This process hosts the store: it may end only after the others have read why.
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    if refusal:
        raise ValueError(refusal)
    assert prepared is not None
    return prepared
