"""The exponential moving average of the weights, in CPU memory, updated during training (arXiv:2412.19437 §3.2.3).

    ema <- ema + (1 - decay) * (weights - ema)

after each optimizer step, of the FP32 masters that this rank updates; it starts as the weights at construction. The
report gives neither decay nor start. One update is a copy, on a stream of its own, into pinned memory, and a fold, in
one worker thread, so it costs no GPU memory or time. The order in a step:

    ema.before_write()    the device (not the host) waits until the last copy has read the weights
    optimizer.step()
    ema.update()          starts the next copy, returns at once

The result does not depend on when the worker runs: bit for bit it is that of the same updates one after the other.
After any number of updates of weights within [-M, M] the average is within (1 / (1 - decay) + 6) * 2**-24 * M of the
exact one, in first order.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from parallel.shards import LocalShard


class Ema:
    """A moving average in CPU memory of this rank's masters, which the optimizer changes in place; all on one device.

    An error of the worker is raised by the next call of any method, and by every later one.
    """

    def __init__(self, masters: Mapping[str, LocalShard], decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"the EMA's decay = {decay} must be in [0, 1); use a value such as 0.999")
        assert all(master.tensor.dtype == torch.float32 for master in masters.values()), "the EMA follows FP32 masters"
        devices = {master.tensor.device for master in masters.values()}
        assert len(devices) <= 1, f"the weights are on {sorted(map(str, devices))}; one device serves one stream"
        self.decay = decay
        self._weights = {name: master.tensor.detach() for name, master in masters.items()}
        device = next(iter(devices), torch.device("cpu"))
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied: torch.cuda.Event | None = None
        self._staging = {
            name: torch.empty(weight.shape, dtype=torch.float32, pin_memory=self._stream is not None)
            for name, weight in self._weights.items()
        }
        self._state = {
            name: LocalShard(weight.to("cpu", copy=True), masters[name].shard) for name, weight in self._weights.items()
        }
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ema")
        self._pending: Future[None] | None = None
        self._writer_has_waited = True

    def before_write(self) -> None:
        """Let the current stream wait until the last copy has read the weights; call before the optimizer's step."""
        if self._stream is not None and self._copied is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(self._copied)
        self._writer_has_waited = True

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now (in stream order); returns before the average has moved."""
        # On a CPU nothing depends on it; but a trainer tested there must not race on a GPU.
        assert self._writer_has_waited, "call before_write() before the optimizer changes the weights"
        # The update before this one has had a whole step's time.
        self.wait()
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
            with torch.cuda.stream(self._stream):
                self._copy()
                self._copied = self._stream.record_event()
        else:
            self._copy()
        self._writer_has_waited = False
        self._pending = self._worker.submit(self._fold, self._copied)

    def wait(self) -> None:
        """Wait until every update so far is in the average."""
        if self._pending is not None:
            self._pending.result()

    def state_shards(self) -> dict[str, LocalShard]:
        """The average, live, for a checkpoint to write or to fill, as 'ema.<parameter>'; waits for the last update."""
        self.wait()
        return {f"ema.{name}": average for name, average in self._state.items()}

    def close(self) -> None:
        """Finish the last update and end the worker; idempotent."""
        self._worker.shutdown(wait=True)
        self.wait()

    def _copy(self) -> None:
        for name, weight in self._weights.items():
            self._staging[name].copy_(weight, non_blocking=True)

    @torch.no_grad()
    def _fold(self, copied: torch.cuda.Event | None) -> None:
        """In the worker's thread: only it waits for the copy."""
        if copied is not None:
            copied.synchronize()
        for name, average in self._state.items():
            average.tensor.lerp_(self._staging[name], 1.0 - self.decay)
