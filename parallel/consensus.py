"""Ranks that act together and fail together: every rank reports, one decides, every rank gets its answer.

Saving and loading on several ranks is a handful of phases (plan, stage, write, publish; verify, fit, read). In each of
them every rank does its part and one of them, the coordinator (rank 0 of the group), draws the conclusion. `agree` is
one such phase. Whatever goes wrong on whichever rank, all of them raise the same sentence at the same place, so none
waits for one that has given up.

    act() on each rank -> [reports] at the coordinator -> decide([reports]) -> [replies] -> one reply to each rank

Messages are JSON in uint8 tensors: no pickle, not even between our own ranks. The group must carry CPU tensors (gloo).
One process without a group is a group of one. Nothing here knows what a checkpoint is.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """The ranks of a process group, or one process alone.

    Args:
        group: carries CPU tensors; nobody else may use it while an `agree` is under way. None: this process alone.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    def agree(self, act: Callable[[], Any], decide: Callable[[list[Any]], list[Any]]) -> Any:
        """Act on every rank, decide on the coordinator, and return this rank's reply; a collective call.

        Args:
            act: this rank's part; returns its report, as JSON.
            decide: called on the coordinator only, with the reports in order of rank and only if no rank failed;
                returns one reply for each rank, as JSON.
        Returns:
            the reply to this rank.
        Raises:
            ValueError: the first rank's that raised one, or the coordinator's; the same on every rank.
            RuntimeError: any other error of a rank, with its rank, the same on every rank; or a rank is gone.
        """
        report, error = self._attempt(act)
        reports = self._gather(report)
        replies: list[bytes] = []
        if self.rank == 0:
            answers = [json.loads(each) for each in reports]
            failures = [answer for answer in answers if "failure" in answer]
            if failures:
                replies = [json.dumps(failures[0]).encode()] * self.size
            else:
                replies, error = self._decide(decide, [answer["value"] for answer in answers])
        reply = json.loads(self._scatter(replies))
        if "failure" in reply:
            kind = ValueError if reply["is_value_error"] else RuntimeError
            raise kind(reply["failure"]) from error
        return reply["value"]

    def _decide(
        self, decide: Callable[[list[Any]], list[Any]], reports: list[Any]
    ) -> tuple[list[bytes], Exception | None]:
        values: list[Any] = []

        def keep() -> None:
            values.extend(decide(reports))
            assert len(values) == self.size, f"{len(values)} replies to {self.size} ranks"

        outcome, error = self._attempt(keep)
        if error is not None:
            return [outcome] * self.size, error
        return [json.dumps({"value": value}).encode() for value in values], None

    def _attempt(self, act: Callable[[], Any]) -> tuple[bytes, Exception | None]:
        try:
            return json.dumps({"value": act()}).encode(), None
        # The other ranks wait for this one's word, whatever went wrong; they and this one raise it afterwards.
        except Exception as error:  # noqa: BLE001
            is_value_error = isinstance(error, ValueError)
            where = f"rank {self.rank}: " if self.size > 1 and not is_value_error else ""
            sentence = f"{where}{str(error) or type(error).__name__}"
            return json.dumps({"failure": sentence, "is_value_error": is_value_error}).encode(), error

    def _gather(self, message: bytes) -> list[bytes]:
        """Every rank's message at the coordinator, nothing elsewhere."""
        if self._group is None:
            return [message]
        length = torch.tensor([len(message)])
        dist.all_reduce(length, dist.ReduceOp.MAX, group=self._group)
        num_bytes = int(length)
        parts = [torch.zeros(num_bytes, dtype=torch.uint8) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(_to_tensor(message, num_bytes), parts, group=self._group, group_dst=0)
        return [part.numpy().tobytes() for part in parts or ()]

    def _scatter(self, messages: list[bytes]) -> bytes:
        """This rank's message, from the coordinator."""
        if self._group is None:
            return messages[0]
        length = torch.tensor([max(map(len, messages), default=0)])
        dist.broadcast(length, group=self._group, group_src=0)
        num_bytes = int(length)
        received = torch.zeros(num_bytes, dtype=torch.uint8)
        parts = [_to_tensor(message, num_bytes) for message in messages] if self.rank == 0 else None
        dist.scatter(received, parts, group=self._group, group_src=0)
        return received.numpy().tobytes()


def _to_tensor(message: bytes, num_bytes: int) -> Tensor:
    """[num_bytes] uint8; padded with spaces, which JSON skips."""
    return torch.frombuffer(bytearray(message.ljust(num_bytes)), dtype=torch.uint8)
