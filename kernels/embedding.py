"""Token embedding whose weight gradient is summed over tokens in FP32.

`y[i] = W[ids[i]]`; `dW[v] = sum of dy[i] over ids[i] == v`. A frequent token meets hundreds of gradients in one step:
summed in BF16 the small ones vanish. Shapes: ids [...] int64, W [vocab, hidden], y [..., hidden].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.deferred import accumulate_grad, added, push, settle


def embedding_reference(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows of `weight` picked by `ids`: [...] int64, [vocab, hidden] -> [..., hidden]."""
    return weight.index_select(0, ids.reshape(-1)).view(*ids.shape, weight.shape[-1])


def embedding_wgrad_reference(ids: Tensor, dy: Tensor, vocab: int) -> Tensor:
    """[tokens] int64, [tokens, hidden] -> [vocab, hidden] FP32, summed in FP32 in token order."""
    dw = torch.zeros(vocab, dy.shape[-1], dtype=torch.float32, device=dy.device)
    return dw.index_add_(0, ids, dy.float())


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        ctx.save_for_backward(ids)
        return embedding_reference(ids, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, None]:
        (ids,) = ctx.saved_tensors
        weight = ctx.weight

        def wgrad() -> None:
            tokens, rows = ids.reshape(-1), dy.reshape(-1, dy.shape[-1])
            main_grad: Tensor | None = getattr(weight, "main_grad", None)
            if main_grad is None:
                accumulate_grad(weight, embedding_wgrad_reference(tokens, rows, weight.shape[0]))
            else:
                # Straight into it: a dW of its own would be 3.7 GB at V3's size.
                settle(weight)
                main_grad.index_add_(0, tokens, rows.float())
                added(weight)

        push(wgrad)
        return None, None


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Look up `ids` in `weight`: [..., hidden] in its dtype; its gradient goes through the weight-gradient queue."""
    return _Embedding.apply(ids, weight)  # type: ignore[no-any-return, no-untyped-call]
