"""`optim.offload=cpu`: the optimizer's state in host memory, updated on the device segment by segment.

V3 moves only its moving average to the CPU (arXiv:2412.19437 §3.2.3); this is for small machines. Every segment passes
through one of two device buffers, in the order in which parameters are updated:

    copy stream      | in 0 | in 1     | out 0 | in 2 | out 1 | in 3 | ...
    current stream          | update 0 | update 1     | update 2     | ...

The update is the device's own, so no bit differs from a state that stays there. Without CUDA the same copies run one
after the other. Shapes: all tensors of a shard are [elements]; a segment is the same range of each of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# A multiple of the FP8 tile, so that moments in FP8 keep their tiles. With masters and BF16 moments two buffers of it
# are 268 MB. How long a copy takes was not measured.
SEGMENT_ELEMENTS = 2**24


@dataclass(frozen=True, eq=False)
class Segment:
    """A range of the tensors of a parameter's shard."""

    name: str
    start: int
    stop: int
    tensors: tuple[Tensor, ...]


def segments(name: str, tensors: Sequence[Tensor]) -> Iterator[Segment]:
    """Cut a parameter's tensors, of one length, into segments."""
    for start in range(0, len(tensors[0]), SEGMENT_ELEMENTS):
        stop = min(start + SEGMENT_ELEMENTS, len(tensors[0]))
        yield Segment(name, start, stop, tuple(tensor[start:stop] for tensor in tensors))


def on_host(tensor: Tensor) -> Tensor:
    """A copy in host memory, pinned where the tensor is on a CUDA device."""
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor)


def pinned_bytes(tensor: Tensor) -> int:
    """Of the block that torch takes for a pinned tensor: a power of two."""
    return int(1 << (tensor.nbytes - 1).bit_length())


class Staging:
    """Two buffers on the device that the gradients are on, each as long as the longest segment."""

    def __init__(self, device: torch.device, shards: Iterable[Sequence[Segment]]) -> None:
        longest = max((each for shard in shards for each in shard), key=lambda each: each.stop - each.start)
        self._buffers = [[torch.empty_like(tensor, device=device) for tensor in longest.tensors] for _ in range(2)]
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def num_bytes(self) -> int:
        """Of both buffers, on the device."""
        return sum(tensor.nbytes for buffer in self._buffers for tensor in buffer)

    def passing(self, shards: Iterable[Sequence[Segment]]) -> Iterator[Segment]:
        """Their segments on the device, in order; what is written into one before the next is taken goes back."""
        all_segments = [segment for shard in shards for segment in shard]
        coming = [self._fetch(0, host) for host in all_segments[:1]]
        for index, host in enumerate(all_segments):
            here, arrived = coming.pop()
            # Into the other buffer, behind the copy that empties it.
            coming += [self._fetch(index + 1, after) for after in all_segments[index + 1 : index + 2]]
            if arrived is not None:
                torch.cuda.current_stream().wait_event(arrived)
            yield here
            self._copy(here.tensors, host.tensors)
        if self._stream is not None:
            # An FP32 parameter is its own master, on the device: the next forward must find it written.
            torch.cuda.current_stream().wait_stream(self._stream)

    def wait(self) -> None:
        """Let the host wait until all that was sent for is in its memory."""
        if self._stream is not None:
            self._stream.synchronize()

    def _fetch(self, index: int, host: Segment) -> tuple[Segment, torch.cuda.Event | None]:
        staged = tuple(tensor[: host.stop - host.start] for tensor in self._buffers[index % 2])
        return replace(host, tensors=staged), self._copy(host.tensors, staged)

    def _copy(self, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> torch.cuda.Event | None:
        """Behind all that the current stream was given until now."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for source, target in zip(sources, targets, strict=True):
                target.copy_(source, non_blocking=True)
        return None if self._stream is None else self._stream.record_event()
