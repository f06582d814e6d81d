"""Weight gradients that run later: the W slot of zero-bubble pipeline schedules (arXiv:2412.19437 §3.2.1).

The linears compute dgrad in backward and `push` their wgrad as a closure. While a schedule holds `deferred()` open the
closures queue up, and `PipelineStage(dw_builder=deferred.take)` runs them in the W slot; otherwise, and in an inner
block `at_once()`, a pushed closure runs at once. `check_drained()` belongs before gradients are read. Weight gradients
reach the weight through `accumulate_grad` or `accumulate_product`: autograd's accumulation hooks do not fire for them.
So do the gains of norms, at once, where they have a `main_grad`.

The first gradient of a step replaces what is in `main_grad`, the others are added: no bytes are spent on zeros
(`forget`). What a step left without a gradient is zeroed where gradients are read (`settle`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

Closure = Callable[[], None]


# Asking autograd twice would run every custom linear twice: `ctx.needs_input_grad` does not change between the passes.
class WgradQueue:
    """First-in first-out queue of weight-gradient closures; each runs exactly once."""

    def __init__(self) -> None:
        self._queued: deque[Closure] = deque()
        self._taken = 0

    def push(self, closure: Closure) -> None:
        """Append one closure."""
        self._queued.append(closure)

    def take(self) -> Closure:
        """Remove all closures queued now and return one callable that runs them in order, once."""
        batch, self._queued = self._queued, deque()
        self._taken += len(batch)

        # A schedule's W slot may run with gradients enabled; a weight gradient is never differentiated.
        @torch.no_grad()
        def run() -> None:
            while batch:
                batch.popleft()()
                self._taken -= 1

        return run

    def pending(self) -> int:
        """Number of closures not yet run, whether still queued or already taken."""
        return len(self._queued) + self._taken


# Plain globals, not thread-local ones: on CUDA, autograd runs backward on threads of its own.
_queue = WgradQueue()
# The `dw_builder` of a pipeline stage, and the number of weight gradients not yet run.
take, pending = _queue.take, _queue.pending
# One entry per open block: whether it queues.
_open_blocks: list[bool] = []


@contextmanager
def _block(queues: bool) -> Iterator[None]:
    _open_blocks.append(queues)
    try:
        yield
    finally:
        _open_blocks.pop()


def deferred() -> AbstractContextManager[None]:
    """Queue weight gradients instead of running them inside backward, until the block ends."""
    return _block(True)


def at_once() -> AbstractContextManager[None]:
    """Run weight gradients inside backward until the block ends, although an outer block queues them."""
    return _block(False)


def push(closure: Closure) -> None:
    """Run `closure` at once, or queue it where the innermost open block is `deferred()`."""
    if _open_blocks and _open_blocks[-1]:
        _queue.push(closure)
    else:
        closure()


def check_drained() -> None:
    """Raise RuntimeError while weight gradients are queued or taken but not run."""
    if pending():
        raise RuntimeError(
            f"{pending()} weight gradients were pushed but never run: gradients are incomplete. "
            "Run kernels.deferred.take()() after the last backward, or check the schedule's W slots."
        )


def keep_weight(holder: Any, weight: Tensor) -> None:
    """Hold the weight itself: under activation checkpoints `save_for_backward` returns a detached copy."""
    holder.weight, holder.weight_version = weight, weight._version


def kept_weight(holder: Any) -> Tensor:
    """The weight that `keep_weight` has left on a context, unchanged since."""
    weight: Tensor = holder.weight
    assert weight._version == holder.weight_version, "a weight was changed between forward and backward"
    return weight


def forget(weight: Tensor) -> None:
    """Let the next gradient replace `weight.main_grad`."""
    weight.main_grad_is_stale, weight.backwards_due = True, 0  # type: ignore[attr-defined]


def expect_backwards(weight: Tensor, change: int) -> None:
    """A forward that has added to the weight's gradient already says 1; its backward says -1."""
    weight.backwards_due = backwards_due(weight) + change  # type: ignore[attr-defined]


def backwards_due(weight: Tensor) -> int:
    """Since `forget`: losses whose gradient is in `weight.main_grad` although they were never differentiated."""
    due: int = getattr(weight, "backwards_due", 0)
    return due


def _take_stale(weight: Tensor) -> bool:
    """Whether `weight.main_grad` still holds an earlier step's sum, said once: the caller writes it now."""
    stale: bool = getattr(weight, "main_grad_is_stale", False)
    weight.main_grad_is_stale = False  # type: ignore[attr-defined]
    return stale


def is_fresh(weight: Tensor) -> bool:
    """Whether a gradient has come to `weight.main_grad` since `forget`."""
    return not getattr(weight, "main_grad_is_stale", False)


def settle(weight: Tensor) -> None:
    """Zero `weight.main_grad` if no gradient of this step has come, for whoever adds to it or reads it."""
    if _take_stale(weight):
        weight.main_grad.zero_()  # type: ignore[attr-defined]


def listen(weight: Tensor, listener: Callable[[], None]) -> None:
    """Have `listener` called after each addition to `weight.main_grad`."""
    weight.main_grad_listener = listener  # type: ignore[attr-defined]


def added(weight: Tensor) -> None:
    """Something was added to `weight.main_grad`, or has replaced it; who does so without the functions here says it."""
    listener: Closure | None = getattr(weight, "main_grad_listener", None)
    if listener is not None:
        listener()


@torch.no_grad()
def accumulate_grad(weight: Tensor, dw: Tensor) -> None:
    """Put `dw` into `weight.main_grad` (fp32, Megatron-LM's name) if it exists, else into `weight.grad`."""
    main_grad: Tensor | None = getattr(weight, "main_grad", None)
    if main_grad is not None:
        (main_grad.copy_ if _take_stale(weight) else main_grad.add_)(dw)
        added(weight)
    elif weight.grad is None:
        weight.grad = dw.to(weight.dtype)
    else:
        weight.grad.add_(dw)


@torch.no_grad()
def accumulate_product(weight: Tensor, product: Callable[[Tensor, bool], object]) -> None:
    """Have a kernel add a weight gradient into `weight.main_grad` itself, without a copy of the gradient in between.

    `product(out, accumulate)` writes or adds to fp32 of the weight's shape; without `main_grad` to a tensor of its own.
    """
    main_grad: Tensor | None = getattr(weight, "main_grad", None)
    if main_grad is not None:
        product(main_grad, not _take_stale(weight))
        added(weight)
        return
    dw = torch.empty_like(weight, dtype=torch.float32, memory_format=torch.contiguous_format)
    product(dw, False)
    accumulate_grad(weight, dw)
