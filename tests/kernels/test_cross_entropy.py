"""The cross-entropy sum equals torch's in fp64, works in chunks of rows, and allows rows without a target."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.cross_entropy import (
    IGNORE,
    chunked_backward,
    chunked_forward,
    cross_entropy_sum,
    cross_entropy_sum_reference,
)


def labels_for(rows: int, vocab: int) -> torch.Tensor:
    """Random targets; every third row has none."""
    labels = torch.randint(vocab, (rows,))
    labels[::3] = IGNORE
    return labels


@pytest.mark.parametrize(("rows", "vocab"), [(1, 5), (2, 5), (63, 700), (129, 5000)])
def test_fp32_sum_and_gradient_equal_torch_in_fp64(rows: int, vocab: int) -> None:
    logits = (3 * torch.randn(rows, vocab)).requires_grad_()
    labels = labels_for(rows, vocab)
    exact = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(exact, labels, ignore_index=IGNORE, reduction="none").sum()
    loss = cross_entropy_sum(logits, labels)
    loss.backward()
    expected.backward()
    assert loss.dtype == torch.float32
    # A sum of at most 129 fp32 terms of the same sign, and a log-sum-exp over 5000: below 1e-5 relative.
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    # exp of an fp32 difference up to about 30 has relative error 30 * 2^-24 = 2e-6.
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-5, atol=1e-7)
    assert torch.equal(logits.grad[::3], torch.zeros_like(logits.grad[::3]))


def test_bf16_gradient_is_the_fp32_gradient_rounded_once() -> None:
    logits = torch.randn(129, 2048).bfloat16().requires_grad_()
    labels = labels_for(129, 2048)
    loss = 0.25 * cross_entropy_sum(logits, labels)
    loss.backward()
    exact = logits.detach().double().requires_grad_()
    expected = 0.25 * cross_entropy_sum_reference(exact, labels)
    expected.backward()
    assert logits.grad.dtype == torch.bfloat16
    # The logits are read exactly, so the loss is an fp32 sum of 86 terms.
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    # One rounding to bf16, 2^-8 relative at most; 1e-5 for the fp32 exp.
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=2**-8 + 1e-5, atol=1e-9)


def test_uniform_logits_cost_log_vocab_per_target() -> None:
    labels = torch.tensor([3, IGNORE, 0])
    # One fp32 logarithm: 2^-23 relative.
    assert float(cross_entropy_sum(torch.zeros(3, 10), labels)) == pytest.approx(2 * math.log(10), rel=1e-6)


def test_gradient_in_fp64() -> None:
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 5, IGNORE, 2])
    assert torch.autograd.gradcheck(lambda x: cross_entropy_sum(x, labels), logits)


@pytest.mark.parametrize("rows", [0, 3])
def test_no_target_gives_zero_loss_and_zero_gradient(rows: int) -> None:
    logits = torch.randn(rows, 7, requires_grad=True)
    loss = cross_entropy_sum(logits, torch.full((rows,), IGNORE))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert torch.equal(logits.grad, torch.zeros(rows, 7))


def test_large_logits_do_not_overflow() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    loss = cross_entropy_sum(logits, torch.tensor([1]))
    loss.backward()
    assert float(loss.detach()) == 2e4
    assert torch.equal(logits.grad, torch.tensor([[1.0, -1.0, 0.0]]))


@pytest.mark.parametrize("bad", [-1, 7, -101])
def test_a_label_outside_the_vocabulary_is_refused(bad: int) -> None:
    with pytest.raises(RuntimeError, match="a label lies outside the vocabulary"):
        cross_entropy_sum(torch.zeros(2, 7), torch.tensor([0, bad]))


def test_no_fp32_tensor_is_as_large_as_the_logits() -> None:
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
                largest = max(largest, out.numel())
            return out

    logits = torch.randn(300, 2048).bfloat16()
    labels = torch.randint(2048, (300,))
    # What the operators run: an operator hides its insides from a dispatch mode.
    with Watch():
        loss, log_sum = chunked_forward(logits, labels)
        chunked_backward(torch.ones(()), logits, labels, log_sum)
    # Chunks of 128, 128 and 44 rows.
    assert largest == 128 * 2048
    expected = cross_entropy_sum_reference(logits.float(), labels)
    # fp32 sums of 300 terms of one sign.
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
