"""A process and its place among others: settings reach NCCL and the process groups before the first message."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import launch.meeting
import parallel.consensus
import train.worker
from parallel.consensus import Ranks, StoreTransport
from parallel.layout import Layout
from train.config import PretrainConfig, compose
from train.worker import WorkerInfo


@pytest.fixture
def config(store: Path, tmp_path: Path) -> PretrainConfig:
    """Two ranks whose network has settings of its own."""
    return compose(
        [
            "experiment=tiny",
            f"data.store={store / 'train'}",
            "data.heldout=null",
            "layout.dp=2",
            "run.micro_batch_sequences=1",
            "run.device=cpu",
            "network.timeout_s=77",
            "network.peer_timeout_s=7",
            '+network.environment.NCCL_IB_TIMEOUT="22"',
            '+network.environment.NCCL_CROSS_NIC="0"',
            f"run.directory={tmp_path}",
        ]
    )


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("NCCL_IB_TIMEOUT", "NCCL_CROSS_NIC", "TORCHELASTIC_USE_AGENT_STORE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "to be removed")
        monkeypatch.delenv(name)
    return monkeypatch


def store_with_rank_0(refusal: str = "") -> dist.Store:
    """A store at which rank 0 of two is waiting already, and has everything or refuses."""
    store = dist.HashStore()

    def act() -> None:
        if refusal:
            raise ValueError(refusal)

    def rank_0() -> None:
        meeting = StoreTransport(dist.PrefixStore("start", store), 0, 2, timeout_s=60, hosts_store=False)
        with suppress(ValueError):
            Ranks(meeting).agree(act, lambda reports: reports)

    threading.Thread(target=rank_0, daemon=True).start()
    return store


def test_what_one_rank_lacks_is_the_refusal_of_all(config: PretrainConfig) -> None:
    refused = store_with_rank_0("rank 7: no store on this node")
    with pytest.raises(ValueError, match=r"^rank 7: no store on this node$"):
        train.worker.pretrain(config, WorkerInfo(rank=1, world=2, store=refused))
    missing = replace(config, data=replace(config.data, store="nowhere"))
    with pytest.raises(ValueError, match=r"^rank 1: .*nowhere"):
        train.worker.pretrain(missing, WorkerInfo(rank=1, world=2, store=store_with_rank_0()))


def test_a_rank_without_dry_run_is_refused(config: PretrainConfig) -> None:
    with pytest.raises(ValueError, match=r"^rank=1 says which rank dry_run=true plans"):
        train.worker.pretrain(replace(config, rank=1), WorkerInfo())


def test_the_rank_that_hosts_the_store_stays_until_the_others_have_read_the_refusal(
    config: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = dist.HashStore()
    meeting = dist.PrefixStore("start", store)
    meeting.set("report/1", json.dumps({"failure": "rank 1: no store on this node", "is_value_error": True}))
    meeting.add("ready", 1)
    naps: list[float] = []

    def the_other_reads(seconds: float) -> None:
        naps.append(seconds)
        meeting.add("read", 1)

    monkeypatch.setattr(parallel.consensus.time, "sleep", the_other_reads)
    with pytest.raises(ValueError, match=r"^rank 1: no store"):
        train.worker.pretrain(config, WorkerInfo(rank=0, world=2, store=store, store_rank=0))
    assert len(naps) == 1


def test_ranks_that_do_not_come_are_missed_in_one_sentence(config: PretrainConfig) -> None:
    hurried = replace(config, network=replace(config.network, timeout_s=2, peer_timeout_s=1))
    with pytest.raises(ValueError, match=r"only 1 of 2 processes came within network.timeout_s=2"):
        train.worker.pretrain(hurried, WorkerInfo(rank=1, world=2, store=dist.HashStore()))


def test_nccl_settings_are_in_the_environment_before_ranks_meet_and_a_users_own_wins(
    config: PretrainConfig, clean_environment: pytest.MonkeyPatch
) -> None:
    clean_environment.setenv("NCCL_CROSS_NIC", "1")
    clean_environment.setenv("LOCAL_RANK", "1")
    seen: dict[str, str | None] = {}

    def meeting(url: str, rank: int, world: int) -> Iterator[tuple[dist.Store, int, int]]:
        seen.update({name: os.environ.get(name) for name in ("NCCL_IB_TIMEOUT", "NCCL_CROSS_NIC")})
        yield dist.HashStore(), rank, world

    clean_environment.setattr(launch.meeting, "rendezvous", meeting)
    place = launch.meeting.meet(config, rank=1, world=2)
    assert seen == {"NCCL_IB_TIMEOUT": "22", "NCCL_CROSS_NIC": "1"}
    assert (place.rank, place.world, place.local_rank, place.store_rank) == (1, 2, 1, 0)
    clean_environment.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert launch.meeting.meet(config, rank=0, world=2).store_rank is None, "torchrun hosts the store"


def test_the_configured_times_reach_heartbeat_and_process_groups(
    config: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    class Reached(Exception):
        pass

    def heartbeat(*_: object, **named: object) -> AbstractContextManager[None]:
        given["heartbeat"] = named["peer_timeout_s"]
        return nullcontext()

    def first_group(**named: object) -> None:
        given["world"] = (named["rank"], named["world"], named["backend"], named["timeout_s"])

    def groups(layout: Layout, **named: object) -> None:
        given["groups"] = (layout.dp, named["device"], named["tied_embedding"], named["timeout_s"])
        raise Reached

    monkeypatch.setattr(train.worker, "Watchdog", heartbeat)
    monkeypatch.setattr(train.worker, "init_processes", first_group)
    monkeypatch.setattr(train.worker, "make_mesh", groups)
    with pytest.raises(Reached):
        train.worker.pretrain(config, WorkerInfo(rank=1, world=2, store=store_with_rank_0()))
    assert given == {"heartbeat": 7, "world": (1, 2, "gloo", 77), "groups": (2, torch.device("cpu"), True, 77)}
