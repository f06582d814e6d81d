"""One micro-batch on one stage in phases, so that its backward, too, runs phase by phase (arXiv:2412.19437 §3.2.1).

    forward     attend | route | dispatch | ...      each phase has an autograd graph of its own
    backward    ... | dispatch | route | attend      graph after graph; gradients wait where phases meet

A tensor that one phase hands to another is detached there, and a `Slot` collects its gradient: the sum over the phases
that read it. Every phase begins with one autograd node (`_Entry`, whose backward fills slots) and ends with one
(`_Exit`, whose backward empties them). Nodes hold slots, and slots hold nothing until backward, so what lives between
forward and backward is what the operations save, as without phases.

Weight gradients are not touched: linears push theirs to `kernels.deferred` in the order of an uncut backward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from parallel.flight import Lane, by_turns, landed, parts, tensors_in

T = TypeVar("T")
# The phase that is a whole layer (`run.recompute=layers`).
WHOLE_LAYER = "layer"


@runtime_checkable
class Phases(Protocol):
    """A stage whose forward is a sequence of phases; `train/stage.py` has one."""

    def steps(self, run: Any, inbound: Tensor, **inputs: Tensor) -> Generator[str, None, Tensor]:
        """The stage's output; each phase is issued by `run(name, phase, *args)`, a generator that yields the name."""
        ...


class Slot:
    """The gradient of one tensor between two phases."""

    def __init__(self) -> None:
        self._grad: Tensor | None = None

    @property
    def is_empty(self) -> bool:
        """Whether no gradient has come."""
        return self._grad is None

    def add(self, grad: Tensor) -> None:
        """Add what one reader of the tensor gives."""
        # Not in place: the same tensor may be in another slot, or wait as the operand of a weight gradient.
        self._grad = grad if self._grad is None else landed(self._grad) + landed(grad)

    def take(self) -> Tensor | None:
        """Let go of the sum, for whoever made the tensor; one in flight is waited for."""
        grad, self._grad = self._grad, None
        return None if grad is None else landed(grad)


class _Entry(torch.autograd.Function):
    """What a phase reads; backward puts the gradients into slots and ends there."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, slots: list[Slot], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.slots = slots
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
        for slot, grad in zip(ctx.slots, grads, strict=True):
            if grad is not None:
                slot.add(grad)
        return None, None, *(None for _ in grads)


class _Exit(torch.autograd.Function):
    """What a phase hands on, as one root; backward takes the gradients out of slots, so that nobody else holds them."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, slots: list[Slot], *tensors: Tensor) -> Tensor:
        ctx.slots = slots
        return anchor.view_as(anchor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(slot.take() for slot in ctx.slots)


@dataclass(frozen=True)
class _Cut:
    """The graph of one phase, and the gradients that it waits for."""

    name: str
    root: GradientEdge
    slots: list[Slot]


class Tape:
    """The phases of one micro-batch on one stage, from its forward to its backward.

    Args:
        anchor: FP32 scalar with gradient, never read: what makes a node of a phase that only has such inputs.
    """

    def __init__(self, anchor: Tensor) -> None:
        self._anchor = anchor
        self._cuts: list[_Cut] = []

    @property
    def is_empty(self) -> bool:
        """Whether no phase waits for its backward."""
        return not self._cuts

    def run(self, name: str, phase: Callable[..., Any], *args: Any) -> Generator[str, None, Any]:
        """Issue one phase; what has a gradient among `args` must have come from `border` or from this tape.

        One with an exchange is a generator (`parallel/flight.py`); in a pair its name comes while that is in flight.
        """
        inside, outside = self._enter(name, args)
        with _lane_for(name):
            result = phase(*inside)
        del args, inside
        if isinstance(result, Generator):
            result = yield from by_turns(name, result)
            return self._leave(name, result, outside)
        result = self._leave(name, result, outside)
        del outside
        yield name
        return result

    def _enter(self, name: str, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[int, tuple[Tensor, Tensor]]]:
        """The arguments inside the phase; and id inside -> tensor inside, tensor outside."""
        given = list(_unique(_differentiable(args)))
        inside: tuple[Tensor, ...] = ()
        if given:
            bare = (tensor.detach() for tensor in given)
            inside = _Entry.apply(self._anchor, [slot_of(tensor, name) for tensor in given], *bare)  # type: ignore[no-untyped-call]
        replaced = _replaced(args, dict(zip(map(id, given), inside, strict=True)))
        return replaced, {id(new): (new, old) for new, old in zip(inside, given, strict=True)}

    def _leave(self, name: str, result: Any, crossed: dict[int, tuple[Tensor, Tensor]]) -> Any:
        """End the phase's graph; its result as later phases read it."""
        # What a phase hands through as it came keeps its slot.
        outside = {inside: given for inside, (_, given) in crossed.items()}
        leaving = [tensor for tensor in _unique(_differentiable(result)) if id(tensor) not in outside]
        if leaving:
            borders = [border(tensor) for tensor in leaving]
            outside |= zip(map(id, leaving), borders, strict=True)
            slots = [slot_of(tensor, name) for tensor in borders]
            root = _Exit.apply(self._anchor, slots, *leaving)  # type: ignore[no-untyped-call]
            self._cuts.append(_Cut(name, get_gradient_edge(root), slots))
        return _replaced(result, outside)

    def backward(self) -> Generator[str, None, None]:
        """Each phase's backward, in reverse order; yields its name."""
        while self._cuts:
            cut = self._cuts.pop()
            # Without any gradient autograd would run the phase on zeros.
            if not all(slot.is_empty for slot in cut.slots):
                with _lane_for(cut.name):
                    torch.autograd.backward([cut.root], [self._anchor.detach()])
            name = cut.name
            # The graph goes before somebody else computes.
            del cut
            yield name


def _lane_for(name: str) -> AbstractContextManager[None]:
    # A layer that runs again in backward is one phase, and no slot waits for gradients in it: its exchanges end there.
    return Lane.closed() if name == WHOLE_LAYER else nullcontext()


def border(tensor: Tensor) -> Tensor:
    """A tensor as later phases read it: without history, with a slot for its gradient."""
    crossing = tensor.detach().requires_grad_()
    crossing.slot = Slot()  # type: ignore[attr-defined]
    return crossing


def slot_of(tensor: Tensor, reader: str) -> Slot:
    """Where the gradient of a tensor between two phases is collected."""
    slot: Slot | None = getattr(tensor, "slot", None)
    assert slot is not None, f"{reader} reads what was computed between two phases: its gradient would be lost"
    return slot


def _unique(tensors: Iterable[Tensor]) -> Iterable[Tensor]:
    return {id(tensor): tensor for tensor in tensors}.values()


def _differentiable(value: object) -> Iterator[Tensor]:
    """Every tensor with a gradient in a structure."""
    return (tensor for tensor in tensors_in(value) if tensor.requires_grad)


def _replaced(value: Any, by_id: dict[int, Tensor]) -> Any:
    """A structure with some of its tensors replaced; what holds none of them stays the same object."""
    if isinstance(value, Tensor):
        return by_id.get(id(value), value)
    changed = {key: new for key, old in parts(value).items() if (new := _replaced(old, by_id)) is not old}
    if not changed:
        return value
    if isinstance(value, dict):
        return value | changed
    if isinstance(value, tuple | list):
        return type(value)(changed.get(index, item) for index, item in enumerate(value))
    return dataclasses.replace(value, **changed)
