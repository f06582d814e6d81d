"""Ranks that report to rank 0 and wait for its word; whoever is silent is known when the time is over.

    say(phase, report)     every rank               hear(phase)        rank 0: reports, None for the silent
    decide(phase, word)    rank 0                   decision(phase)    the others

Over a c10d store and without a process group: a group forms only when all have come, and here some may not.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from torch.distributed.distributed_c10d import Store

POLL_S = 0.2


class Meeting:
    """All ranks, as one of them sees them."""

    def __init__(self, store: Store, *, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self._store = store

    def begin(self, what: str) -> None:
        """Leave word of what this rank is about to do, in case it never returns."""
        self._store.set(f"at/{self.rank}", what)

    def last_word(self, rank: int) -> str | None:
        """What a rank began last; None: it has not come."""
        return self._store.get(f"at/{rank}").decode() if self._store.check([f"at/{rank}"]) else None

    def say(self, phase: str, report: dict[str, Any]) -> None:
        """This rank's report."""
        self._store.set(f"{phase}/{self.rank}", json.dumps(report))

    def hear(self, phase: str, *, timeout_s: float) -> list[dict[str, Any] | None]:
        """Every rank's report in order of rank, as far as they come in time."""
        keys = [f"{phase}/{rank}" for rank in range(self.world)]
        self._wait(lambda: self._store.check(keys), timeout_s)
        return [json.loads(self._store.get(key)) if self._store.check([key]) else None for key in keys]

    def decide(self, phase: str, word: str) -> None:
        """What the others wait for."""
        self._store.set(f"{phase}/word", word)

    def decision(self, phase: str, *, timeout_s: float) -> str:
        """Rank 0's word.

        Raises:
            TimeoutError: none came in time.
        """
        key = f"{phase}/word"
        if not self._wait(lambda: self._store.check([key]), timeout_s):
            raise TimeoutError(f"rank 0 said nothing within {timeout_s:.0f} s")
        word = self._store.get(key).decode()
        self._store.add(f"{phase}/read", 1)
        return word

    def wait_for_readers(self, phase: str, count: int, *, timeout_s: float) -> None:
        """Until so many have read rank 0's word: its process may host the store."""
        self._wait(lambda: self._store.add(f"{phase}/read", 0) >= count, timeout_s)

    def _wait(self, done: Callable[[], bool], timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while not done():
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_S)
        return True
