"""One stage of a pipeline as torch's schedules drive it, holding each buffer and weight gradient no longer than needed.

Imported by the first pipeline of several ranks: `torch.distributed.pipelining` brings torch's compiler with it, which
takes as long to import as everything else of a trainer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage

from parallel.waiting import working


class WaitingWgrads:
    """Weight gradients of one rank's stages between the I slot that made them and their W slot, at most `limit`."""

    # A zero-bubble schedule lets them pile up in its cool-down: on V3's last rank 31 stages' worth, each holding the
    # operands of its GEMMs. Beyond the limit the oldest runs at once, and its slot is then empty. The order stays the
    # same, so no bit changes.
    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self._runners: deque[Callable[[], None]] = deque()

    def add(self, runner: Callable[..., None]) -> Callable[[], None]:
        """Let a runner wait; returns what the W slot calls, which runs it unless it has run."""

        def run() -> None:
            if run in self._runners:
                self._runners.remove(run)
                runner()

        self._runners.append(run)
        while self.limit is not None and len(self._runners) > self.limit:
            self._runners[0]()
        return run


class MessagesUnderWay:
    """Sends of one rank's stages that the backend has not reported as done, at most `limit`, one or more."""

    # torch would hold every send of a step until its end: 28 GB at V3's size with a backend that reports none before
    # it is asked. Waiting for one cannot deadlock: torch orders the actions of all ranks in one sequence, with each
    # receive directly behind its send, so what the receiver does before it receives never needs a later action of ours.
    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._works: deque[Any] = deque()

    def send(self, operation: dist.P2POp) -> None:
        """Start a send; first release those that are done, and wait for the oldest while there are too many."""
        while self._works and (len(self._works) >= self._limit or self._works[0].is_completed()):
            self._works.popleft().wait()
        self._works.append(
            operation.op(operation.tensor, group=operation.group, tag=operation.tag, group_dst=operation.group_peer)
        )

    def finish(self) -> None:
        """Wait for those under way."""
        while self._works:
            self._works.popleft().wait()


class ScheduledStage(PipelineStage):
    """A stage whose receive buffers live from the receive to the end of that micro-batch's backward."""

    # torch keeps one pair per micro-batch for the whole run: at V3's size, 120 micro-batches of 59 MB, twice.
    # messages: of a schedule that sends in batches of one direction and waits for them at the step's end only; None
    # under 1F1B, which mixes directions, and waits by itself.
    def __init__(self, *args: Any, waiting: WaitingWgrads, messages: MessagesUnderWay | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._receives: dict[tuple[str, int], list[dist.P2POp]] = {}
        self._waiting, self._messages = waiting, messages

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
        return self._without_memory(super()._prepare_forward_infra, *args, **kwargs)

    def _prepare_backward_infra(self, *args: Any, **kwargs: Any) -> Any:
        return self._without_memory(super()._prepare_backward_infra, *args, **kwargs)

    def _warmup_forward_vote(self, has_backward: bool, received_acc: Tensor | None = None) -> Tensor:
        """Every stage states its shapes, so there is nothing to vote on, and no message to send."""
        return torch.tensor([1], dtype=torch.int32)

    def _warmup_backward_result(self, received_result: Tensor | None = None) -> Tensor:
        return torch.tensor([1], dtype=torch.int32)

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        """No first messages either: before torch 2.13 a V's turning point would send one to itself."""
        return []

    def _without_memory(self, prepare: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Let torch allocate its buffers on the meta device: shapes without memory."""
        device, self.device = self.device, torch.device("meta")
        try:
            return prepare(*args, **kwargs)
        finally:
            self.device = device

    def _move_buffers(self, infos: Sequence[Any], device: torch.device | str) -> None:
        """Give each receive buffer memory, or take it away again; other entries of `infos` have none."""
        for info in infos:
            buffer: Tensor | None = getattr(info, "buffer", None)
            if buffer is not None:
                info.buffer = torch.empty_like(buffer, device=device, requires_grad=buffer.requires_grad)

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        self._move_buffers(self.args_recv_info[fwd_chunk_id], self.device)
        operations = self._receives["forward", fwd_chunk_id] = super().get_fwd_recv_ops(fwd_chunk_id)
        return operations

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        return self._send(super().get_fwd_send_ops(fwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        return self._send(super().get_bwd_send_ops(bwd_chunk_id))

    def _send(self, operations: list[dist.P2POp]) -> list[dist.P2POp]:
        """Send now, where the runtime would hold every send until the step's end; returns what it has to send."""
        if self._messages is None:
            return operations
        for operation in operations:
            self._messages.send(operation)
        return []

    def finish_sends(self) -> None:
        """Wait for the sends of this rank that are under way."""
        if self._messages is not None:
            self._messages.finish()

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        if self.has_backward and not self.is_last:
            self._move_buffers(self.grad_recv_info[bwd_chunk_id], self.device)
        operations = self._receives["backward", bwd_chunk_id] = super().get_bwd_recv_ops(bwd_chunk_id)
        return operations

    def _release(self, direction: str, chunk_id: int, infos: Sequence[Any]) -> None:
        """Drop a received buffer; torch's 1F1B holds the list of receives, and with it the buffer, until the next."""
        self._receives.pop((direction, chunk_id), []).clear()
        self._move_buffers(infos, "meta")

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        with working():
            output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        # What backward needs of it is held in fwd_cache until backward takes it out.
        self._release("forward", fwd_chunk_id, self.args_recv_info[fwd_chunk_id])
        return output

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        with working():
            super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
            if bwd_chunk_id in self.dw_runner:
                self.dw_runner[bwd_chunk_id] = self._waiting.add(self.dw_runner[bwd_chunk_id])
        self._release("backward", bwd_chunk_id, self.grad_recv_info[bwd_chunk_id])

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        with working():
            super().backward_weight_one_chunk(bwd_chunk_id, *args, **kwargs)
