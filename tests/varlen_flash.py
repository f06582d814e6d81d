"""torch's `varlen_attn` on a CPU: flash's two kernels written out from their own arguments, document by document.

`varlen_attn` itself is torch's, called through the signature that torch 2.11 published. The kernels ask for what
`mha_varlen_fwd` and `mha_varlen_bwd` do (ATen/native/transformers/cuda/flash_attn/flash_api.cpp), half precision apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from kernels import attention


def _written_out(q: Tensor, k: Tensor, rows: slice, scale: float) -> Tensor:
    """Scores of one document: [heads, tokens, tokens] fp64, -inf above the diagonal."""
    scores = torch.einsum("qhd,khd->hqk", q[rows].double(), k[rows].double()) * scale
    return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))


def _documents(qkv: tuple[Tensor, ...], sums: Tensor, longest: int, is_causal: bool) -> list[slice]:
    """The rows of each document, after a look at what the kernels ask for."""
    shapes = {x.shape for x in qkv}
    assert len(shapes) == 1
    assert len(qkv[0].shape) == 3
    assert qkv[0].shape[2] % 8 == 0
    assert qkv[0].shape[2] <= 256
    assert {x.stride(-1) for x in qkv} == {1}
    assert (sums.dtype, sums.dim(), sums.is_contiguous()) == (torch.int32, 1, True)
    ends = sums.tolist()
    assert (ends[0], ends[-1]) == (0, len(qkv[0]))
    assert all(0 <= after - before <= longest for before, after in pairwise(ends))
    assert is_causal
    return [slice(*each) for each in pairwise(ends)]


class VarlenFlash:
    """Counts the calls of both kernels, and the documents of each forward call."""

    def __init__(self) -> None:
        self.documents: list[int] = []
        self.backwards = 0

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, sums: Tensor, sums_k: Tensor, longest: int, longest_k: int,
        dropout: float, is_causal: bool, *rest: object, scale: float, **window: object,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        assert (torch.equal(sums_k, sums), longest_k, dropout) == (True, longest, 0.0)
        rows = _documents((q, k, v), sums, longest, is_causal)
        self.documents.append(len(rows))
        o, log_sums = torch.empty_like(q), q.new_empty(q.shape[1], len(q), dtype=torch.float64)
        for each in rows:
            scores = _written_out(q, k, each, scale)
            log_sums[:, each] = scores.logsumexp(-1)
            o[each] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[each].double()).to(o.dtype)
        return o, log_sums, torch.empty(2, dtype=torch.uint64), torch.empty(0), torch.empty(0)

    def backward(
        self, grad_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, log_sums: Tensor, sums: Tensor,
        sums_k: Tensor, longest: int, longest_k: int, dropout: float, is_causal: bool, *rest: object, scale: float,
        **window: object,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        self.backwards += 1
        grads = tuple(torch.empty_like(x) for x in (q, k, v))
        for each in _documents((q, k, v), sums, longest, is_causal):
            p = (_written_out(q, k, each, scale) - log_sums[:, each, None]).exp()
            dy, y, v64 = grad_o[each].double(), o[each].double(), v[each].double()
            ds = p * (torch.einsum("qhd,khd->hqk", dy, v64) - (dy * y).sum(-1).mT[..., None]) * scale
            products = (("hqk,khd->qhd", ds, k[each]), ("hqk,qhd->khd", ds, q[each]), ("hqk,qhd->khd", p, dy))
            for grad, (sum_over, left, right) in zip(grads, products, strict=True):
                grad[each] = torch.einsum(sum_over, left, right.double()).to(grad.dtype)
        return grads


@contextmanager
def varlen_flash_on_cpu() -> Iterator[VarlenFlash]:
    """Attention of documents takes flash, and torch's operators of flash have these kernels for a CPU."""
    from torch.nn.attention import varlen

    published = varlen.varlen_attn

    def of_2_11(
        query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
        return_aux: None = None, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
    ) -> object:  # fmt: skip
        ends = (cu_seq_q, cu_seq_k, max_q, max_k)
        return published(query, key, value, *ends, return_aux=return_aux, scale=scale, window_size=window_size)

    kernels, library = VarlenFlash(), torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", kernels.forward, "CPU")
    library.impl("_flash_attention_backward", kernels.backward, "CPU")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_flash_accepts", lambda *_: True)
        patch.setattr(varlen, "varlen_attn", of_2_11)
        yield kernels
    library._destroy()
