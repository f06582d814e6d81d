"""Deferred weight gradients run once, in order, and cannot be forgotten."""

from __future__ import annotations

import pytest
import torch

from kernels import deferred


def test_a_pushed_closure_runs_at_once_outside_a_deferred_block() -> None:
    ran: list[str] = []
    deferred.push(lambda: ran.append("now"))
    assert ran == ["now"]


def test_queued_closures_run_once_in_the_order_of_pushing() -> None:
    ran: list[int] = []
    with deferred.deferred():
        for i in range(5):
            deferred.push(lambda i=i: ran.append(i))  # type: ignore[misc]
        assert ran == []
        run = deferred.take()
    run()
    run()
    assert ran == [0, 1, 2, 3, 4]


def test_take_leaves_later_closures_for_the_next_micro_batch() -> None:
    ran: list[str] = []
    with deferred.deferred():
        deferred.push(lambda: ran.append("first"))
        first = deferred.take()
        deferred.push(lambda: ran.append("second"))
        second = deferred.take()
    second()
    first()
    assert ran == ["second", "first"]


def test_pending_counts_what_is_queued_and_what_was_taken_but_not_run() -> None:
    with deferred.deferred():
        deferred.push(lambda: None)
        deferred.push(lambda: None)
        assert deferred.pending() == 2
        run = deferred.take()
        deferred.push(lambda: None)
        assert deferred.pending() == 3
        run()
        assert deferred.pending() == 1
        deferred.take()()
    assert deferred.pending() == 0


def test_an_undrained_queue_is_an_error_even_if_its_closures_were_taken() -> None:
    with deferred.deferred():
        deferred.push(lambda: None)
    with pytest.raises(RuntimeError, match="1 weight gradients were pushed but never run"):
        deferred.check_drained()
    run = deferred.take()
    with pytest.raises(RuntimeError, match="never run"):
        deferred.check_drained()
    run()
    deferred.check_drained()


def test_inner_blocks_and_exceptions_leave_the_outer_block_open() -> None:
    ran: list[str] = []
    with deferred.deferred():
        with pytest.raises(KeyError), deferred.deferred():
            raise KeyError
        deferred.push(lambda: ran.append("queued"))
        assert ran == []
    deferred.take()()
    deferred.push(lambda: ran.append("at once"))
    assert ran == ["queued", "at once"]


def test_an_inner_block_at_once_leaves_what_waits_and_ends() -> None:
    ran: list[str] = []

    def fails() -> None:
        ran.append("inside")
        raise KeyError

    with deferred.deferred():
        deferred.push(lambda: ran.append("before"))
        with pytest.raises(KeyError), deferred.at_once():
            deferred.push(fails)
        deferred.push(lambda: ran.append("after"))
        assert ran == ["inside"]
        deferred.take()()
    assert ran == ["inside", "before", "after"]


def test_main_grad_sums_in_fp32_and_leaves_grad_alone() -> None:
    weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    weight.main_grad = torch.ones(2)  # type: ignore[attr-defined]
    for _ in range(256):
        deferred.accumulate_grad(weight, torch.full((2,), 2.0**-12))
    # 256 * 2^-12 = 2^-4; each term is below half of bfloat16's spacing at 1, 2^-7, and would vanish there.
    assert weight.main_grad.tolist() == [1 + 2.0**-4] * 2  # type: ignore[attr-defined]
    assert weight.grad is None


def test_the_first_gradient_of_a_step_replaces_and_a_step_without_one_leaves_zeros() -> None:
    weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    weight.main_grad = torch.full((2,), float("nan"))  # type: ignore[attr-defined]
    accumulated: list[bool] = []

    def product(out: torch.Tensor, accumulate: bool) -> None:
        accumulated.append(accumulate)
        out.add_(2.0) if accumulate else out.fill_(2.0)

    deferred.forget(weight)
    deferred.accumulate_product(weight, product)
    deferred.accumulate_product(weight, product)
    deferred.settle(weight)
    assert (weight.main_grad.tolist(), accumulated) == ([4.0, 4.0], [False, True])  # type: ignore[attr-defined]
    deferred.forget(weight)
    deferred.accumulate_grad(weight, torch.tensor([1.0, -2.0]))
    assert weight.main_grad.tolist() == [1.0, -2.0]  # type: ignore[attr-defined]
    deferred.forget(weight)
    deferred.settle(weight)
    assert weight.main_grad.tolist() == [0.0, 0.0]  # type: ignore[attr-defined]


def test_without_main_grad_the_gradient_adds_up_in_the_weights_dtype() -> None:
    weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    deferred.accumulate_grad(weight, torch.tensor([1.0, -2.0]))
    deferred.accumulate_grad(weight, torch.tensor([0.5, 4.0]))
    assert weight.grad.dtype == torch.bfloat16
    assert weight.grad.tolist() == [1.5, 2.0]
