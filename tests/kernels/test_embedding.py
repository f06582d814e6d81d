"""Embedding: rows are copied, and the weight gradient is an FP32 sum whatever the storage type."""

from __future__ import annotations

import torch

from kernels.deferred import deferred, take
from kernels.embedding import embedding, embedding_reference


def test_rows_equal_the_reference_and_torch() -> None:
    weight = torch.randn(11, 7)
    ids = torch.randint(0, 11, (3, 5))
    assert torch.equal(embedding(ids, weight), torch.nn.functional.embedding(ids, weight))
    assert torch.equal(embedding(ids, weight), embedding_reference(ids, weight))


def test_gradient_equals_torch_in_fp64_including_unused_and_repeated_rows() -> None:
    weight = torch.randn(9, 4, requires_grad=True)
    ids = torch.tensor([[0, 3, 3], [3, 8, 0]])
    dy = torch.randn(2, 3, 4)
    embedding(ids, weight).backward(dy)
    exact = torch.zeros(9, 4, dtype=torch.float64).index_add_(0, ids.flatten(), dy.double().flatten(0, 1))
    # Three FP32 additions at most: 3 * 2^-24 relative to the terms.
    torch.testing.assert_close(weight.grad.double(), exact, rtol=1e-6, atol=1e-6)
    assert not weight.grad[1].any()


def test_a_frequent_token_is_summed_in_fp32() -> None:
    # 4096 gradients of 2^-8: a BF16 running sum stops growing at 1 (2^-8 is then half a unit in the last place).
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    weight.main_grad = torch.zeros(2, 1)  # type: ignore[attr-defined]
    ids = torch.zeros(4096, dtype=torch.int64)
    embedding(ids, weight).backward(torch.full((4096, 1), 2.0**-8, dtype=torch.bfloat16))
    assert weight.main_grad.tolist() == [[16.0], [0.0]]  # type: ignore[attr-defined]
    assert weight.grad is None


def test_wgrad_waits_in_the_queue() -> None:
    weight = torch.randn(4, 2, requires_grad=True)
    with deferred():
        embedding(torch.tensor([1]), weight).sum().backward()
        assert weight.grad is None
        take()()
    assert weight.grad[1].tolist() == [1.0, 1.0]
