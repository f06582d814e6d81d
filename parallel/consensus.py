"""Ranks that act together and fail together: every rank reports, rank 0 decides, every rank gets its reply.

    act() on each rank -> [reports] at rank 0 -> decide([reports]) -> [replies] -> one reply to each rank

Starting a run, saving and loading are a handful of such phases. Whatever goes wrong on any rank, all of them raise the
same sentence at the same line, so no rank waits for one that has given up. `Ranks` is the protocol, `StoreTransport`
and `GroupTransport` carry it. Messages are JSON: no pickle, not even between our own ranks.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store

_POLL_S = 0.05


class RankFailed(RuntimeError):
    """What a rank did failed, and every rank has been told; communication itself works."""


class Transport(Protocol):
    """How the messages of a consensus travel, as rank `rank` of `size` sees it."""

    rank: int
    size: int

    def gather(self, message: bytes) -> list[bytes]:
        """Every rank's message in order of rank at rank 0, nothing elsewhere."""

    def scatter(self, messages: list[bytes]) -> bytes:
        """This rank's message, of those that rank 0 gives."""


class Ranks:
    """All ranks that must agree, as one of them sees them."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self.rank, self.size = transport.rank, transport.size

    def agree(self, act: Callable[[], Any], decide: Callable[[list[Any]], list[Any]]) -> Any:
        """Act on every rank, decide on rank 0, and return this rank's reply; a collective call.

        Args:
            act: this rank's part; returns its report, as JSON.
            decide: reports in order of rank -> one reply for each rank, as JSON; called only if no rank failed.
        Raises:
            ValueError: that of the first rank that raised one, or of `decide`; the same on every rank.
            RankFailed: any other error of a rank, with its rank, the same on every rank.
            RuntimeError: a rank is gone.
        """
        (report,), error = self._attempt(lambda: [act()], 1)
        outcomes = [json.loads(each) for each in self._transport.gather(report)]
        failures = [json.dumps(outcome).encode() for outcome in outcomes if "failure" in outcome]
        replies = failures[:1] * self.size
        if self.rank == 0 and not failures:
            replies, error = self._attempt(lambda: decide([outcome["value"] for outcome in outcomes]), self.size)
            replies = replies if error is None else replies * self.size
        reply = json.loads(self._transport.scatter(replies))
        if "failure" in reply:
            kind = ValueError if reply["is_value_error"] else RankFailed
            raise kind(reply["failure"]) from error
        return reply["value"]

    def _attempt(self, work: Callable[[], list[Any]], count: int) -> tuple[list[bytes], Exception | None]:
        """One message for each of `count` values, or a single one with the failure; and the failure itself."""
        try:
            values = work()
            assert len(values) == count, f"{len(values)} replies to {count} ranks"
            return [json.dumps({"value": value}).encode() for value in values], None
        # The other ranks wait for this one, whatever went wrong; all raise it afterwards.
        except Exception as error:  # noqa: BLE001
            is_value_error = isinstance(error, ValueError)
            where = f"rank {self.rank}: " if self.size > 1 and not is_value_error else ""
            sentence = f"{where}{str(error) or type(error).__name__}"
            return [json.dumps({"failure": sentence, "is_value_error": is_value_error}).encode()], error


class GroupTransport:
    """The ranks of a process group (gloo) that nothing else uses during an `agree`; None: this process alone."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    def gather(self, message: bytes) -> list[bytes]:
        """Lengths first, then the messages."""
        if self._group is None:
            return [message]
        length = torch.tensor([len(message)])
        dist.all_reduce(length, dist.ReduceOp.MAX, group=self._group)
        num_bytes = int(length)
        received = [torch.zeros(num_bytes, dtype=torch.uint8) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(_to_tensor(message, num_bytes), received, group=self._group, group_dst=0)
        return [each.numpy().tobytes() for each in received or ()]

    def scatter(self, messages: list[bytes]) -> bytes:
        """Lengths first, then the messages."""
        if self._group is None:
            return messages[0]
        length = torch.tensor([max(map(len, messages), default=0)])
        dist.broadcast(length, group=self._group, group_src=0)
        num_bytes = int(length)
        received = torch.zeros(num_bytes, dtype=torch.uint8)
        sent = [_to_tensor(message, num_bytes) for message in messages] if self.rank == 0 else None
        dist.scatter(received, sent, group=self._group, group_src=0)
        return received.numpy().tobytes()


def _to_tensor(message: bytes, num_bytes: int) -> Tensor:
    """[num_bytes] uint8; padded with spaces, which JSON skips."""
    return torch.frombuffer(bytearray(message.ljust(num_bytes)), dtype=torch.uint8)


class StoreTransport:
    """Processes that share a c10d store and have no process group yet; for a single `agree`.

    Args:
        store: reached by all; its keys are used by nothing else.
        timeout_s: `network.timeout_s`; missing processes are an error after so long.
        hosts_store: this process hosts the store, so it may end only after the others have read their reply.
    """

    def __init__(self, store: Store, rank: int, size: int, *, timeout_s: int, hosts_store: bool) -> None:
        self.rank, self.size = rank, size
        self._store, self._timeout_s, self._hosts_store = store, timeout_s, hosts_store
        self._deadline = 0.0

    def gather(self, message: bytes) -> list[bytes]:
        """A ValueError on every rank that came when some do not come."""
        self._deadline = time.monotonic() + self._timeout_s
        self._store.set(f"report/{self.rank}", message.decode())
        if not self._wait_for_all("ready"):
            raise ValueError(
                f"only {self._store.add('ready', 0)} of {self.size} processes came within network.timeout_s="
                f"{self._timeout_s}: look at the others' output, or raise it"
            )
        return [self._store.get(f"report/{rank}") for rank in range(self.size)] if self.rank == 0 else []

    def scatter(self, messages: list[bytes]) -> bytes:
        """Each reply under a key of its own."""
        for rank, message in enumerate(messages):
            self._store.set(f"reply/{rank}", message.decode())
        key = f"reply/{self.rank}"
        self._store.wait([key], timedelta(seconds=self._timeout_s))
        reply = self._store.get(key)
        if self._hosts_store:
            self._wait_for_all("read")
        else:
            self._store.add("read", 1)
        return reply

    def _wait_for_all(self, counter: str) -> bool:
        """Count this process; whether all were counted by the deadline."""
        self._store.add(counter, 1)
        while self._store.add(counter, 0) < self.size:
            if time.monotonic() > self._deadline:
                return False
            time.sleep(_POLL_S)
        return True


def refuse_together(group: dist.ProcessGroup | None, reason: Callable[[], str | None]) -> None:
    """Raise a ValueError on every rank if rank 0 finds a reason; a collective call."""

    # One rank looks: all have the same answer whatever their disks show.
    def look(reports: list[None]) -> list[None]:
        if found := reason():
            raise ValueError(found)
        return reports

    Ranks(GroupTransport(group)).agree(lambda: None, look)
