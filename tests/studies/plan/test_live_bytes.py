"""Bytes alive against sequences counted by hand, on real and on fake tensors alike; and one user of it.

float32 tensors of n elements take 4 n bytes, bfloat16 2 n, int64 8 n. The last test asks what a weight gradient that
waits for its slot keeps alive: of an FP8 linear only FP8 operands, never the whole gradient that they were made from.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import deferred
from kernels import fp8_linear as fp8
from kernels.permute import Dispatched, grouping
from train.studies.plan.live_bytes import LiveBytes


@pytest.fixture(params=[contextlib.nullcontext, FakeTensorMode], ids=["real", "fake"])
def live(request: pytest.FixtureRequest) -> Iterator[LiveBytes]:
    with request.param(), LiveBytes() as live:
        yield live


def test_a_storage_counts_once_from_its_birth_to_its_last_reference(live: LiveBytes) -> None:
    x = torch.zeros(10, 7)
    assert live.now == 280
    view = x[3:].t()
    flat = x.view(70)
    flat.add_(1)
    assert (live.now, live.peak) == (280, 280), "views and work in place take nothing"
    del x, flat
    assert live.now == 280, "one view is left"
    del view
    assert (live.now, live.peak) == (0, 280)


def test_every_tensor_of_a_result_counts_and_the_peak_is_the_highest_moment(live: LiveBytes) -> None:
    x = torch.zeros(6, dtype=torch.bfloat16)  # 12 bytes
    values, order = x.sort()  # 12 and 48
    assert live.now == 72
    del order
    y = x + values  # 12
    assert (live.now, live.peak) == (36, 72)
    del x, values, y
    assert (live.now, live.peak) == (0, 72)


def test_reused_addresses_count_again(live: LiveBytes) -> None:
    for _ in range(50):
        x = torch.zeros(1000)
        assert live.now == 4000
        del x
        assert live.now == 0
    assert live.peak == 4000


def test_what_only_autograd_holds_is_alive(live: LiveBytes) -> None:
    """exp keeps its result, which no name in Python refers to."""
    x = torch.zeros(25, requires_grad=True)
    y = x.exp().exp()
    assert live.now == 3 * 100
    y.sum().backward()
    # The graph is gone: x, y and x.grad are left.
    assert live.now == 3 * 100
    # At the highest: x, both results, their sum, its gradient of one element, and two gradients at a time.
    assert 5 * 100 <= live.peak <= 5 * 100 + 8
    del x, y
    assert live.now == 0


def test_shapes_on_the_meta_device_have_no_memory(live: LiveBytes) -> None:
    """As a schedule's receive buffers are kept until they are needed."""
    shape = torch.empty(1000, device="meta")
    assert (live.now, live.peak) == (0, 0)
    real = torch.empty_like(shape, device="cpu")
    assert live.now == real.nbytes == 4000


ENDS, GATES = torch.tensor([128, 256], dtype=torch.int32), torch.ones(256)
TOKENS = grouping(torch.arange(256)[:, None] // 128, 2)
DOWN = torch.nn.Parameter(torch.zeros(2, 384, 128, dtype=torch.bfloat16))
# Name -> (shape of the weight, the linear); the input is [256, 256].
LINEARS: dict[str, tuple[tuple[int, ...], Callable[..., Tensor]]] = {
    "linear": ((384, 256), fp8.fp8_linear),
    "of_kept": ((384, 256), fp8.fp8_linear_of_kept),
    "swiglu": ((384, 128), fp8.fp8_swiglu_linear),
    "grouped": ((2, 384, 256), lambda x, w, **o: fp8.grouped_fp8_linear(x, w, ENDS, **o)),
    "experts": (
        (2, 256, 256),
        lambda x, w, **o: fp8.fp8_experts(
            Dispatched(x, GATES[:1].expand(TOKENS.num_rows), TOKENS, None, None), w, DOWN, **o
        ),
    ),
    "grouped_swiglu": ((2, 384, 128), lambda x, w, **o: fp8.grouped_fp8_swiglu_linear(x, GATES, w, ENDS, **o)),
}


@pytest.mark.parametrize("name", LINEARS)
def test_a_waiting_weight_gradient_of_an_fp8_linear_does_not_keep_the_whole_gradient(name: str) -> None:
    """At V3's size it would be 470 MB for each of two layers, and 31 of them wait on the last rank of a V."""
    shape, linear = LINEARS[name]
    x = torch.randn(256, 256, dtype=torch.bfloat16).requires_grad_()
    weight = torch.nn.Parameter(torch.randn(shape, dtype=torch.bfloat16))
    with deferred.deferred():
        y = linear(x, weight, power_of_two=True)
        dy = torch.randn_like(y)
        kept = weakref.ref(dy)
        y.backward(dy)
        waiting = deferred.take()
        del y, dy
        alive = kept()
        waiting()
    assert alive is None
    assert weight.grad is not None, "it was waiting, and has run"
