"""Causal softmax attention, the core of MLA after its up-projections.

arXiv:2412.19437 §2.1.1 eq. 10: o_t = sum over j <= t of softmax_j(q_t . k_j * scale) v_j, per head.

On a GPU this is torch's fused attention. On a CPU that one is slow in bf16, so here it is two batched GEMMs
around a softmax, and the probabilities are kept for backward: memory grows with tokens squared. Measured
forward and backward, bf16, 2 threads of an AMD EPYC with AVX512-BF16, 8 sequences x 4 heads x 256 tokens:
qk 96 and v 64 take 4.3 ms against 18.7 fused; qk 96 and v 96 take 4.9 against 15.8. Scores are rounded to the
input's dtype once before the fp32 softmax, as in Hugging Face's eager attention (relative error of a bf16
output 3.3e-3 on normal inputs; fused 1.9e-3).

Shapes: q, k [sequences, heads, tokens, qk_dim]; v [sequences, heads, tokens, v_dim]. Sequences and heads may
be sharded. It does not rotate queries, does not hold a key-value cache and has no dropout.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.bench_entry import Bench


def _mask(tokens: int, document_ids: Tensor | None, like: Tensor) -> Tensor:
    """0 where a query may read a key, else -inf: [1 or sequences, 1, tokens, tokens] in like.dtype."""
    mask = like.new_full((1, 1, tokens, tokens), float("-inf")).triu(1)
    if document_ids is None:
        return mask
    same_document = document_ids[:, None, :, None] == document_ids[:, None, None, :]
    return mask.masked_fill(~same_document, float("-inf"))


def causal_attention_reference(q: Tensor, k: Tensor, v: Tensor, *, scale: float, document_ids: Tensor | None) -> Tensor:
    """Attention with every score written out, fp32 inside. Same arguments as `causal_attention`."""
    q32, k32, v32 = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
    scores: Tensor = q32 @ k32.transpose(-1, -2) * scale  # [sequences, heads, tokens, tokens]
    probabilities: Tensor = (scores + _mask(q.shape[-2], document_ids, q32)).softmax(-1)
    o: Tensor = probabilities @ v32  # [sequences, heads, tokens, v_dim]
    return o.to(q.dtype)


class _BatchedGemmAttention(torch.autograd.Function):
    """One GEMM batch entry per (sequence, head); `rows` below counts them."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
        mask = mask.expand(-1, q.shape[1], -1, -1).flatten(0, 1) if mask.shape[0] > 1 else mask[0]
        q3, k3, v3 = (x.flatten(0, 1) for x in (q, k, v))  # [rows, tokens, dim]
        probabilities = torch.baddbmm(mask, q3, k3.mT, alpha=scale).softmax(-1)  # [rows, tokens, tokens]
        ctx.save_for_backward(q3, k3, v3, probabilities)
        ctx.scale = scale
        o: Tensor = torch.bmm(probabilities, v3).unflatten(0, q.shape[:2])
        return o

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q3, k3, v3, probabilities = ctx.saved_tensors
        batch = grads[0].shape[:2]
        grad_o = grads[0].flatten(0, 1)  # [rows, tokens, v_dim]
        grad_v = torch.bmm(probabilities.mT, grad_o)
        grad_p = torch.bmm(grad_o, v3.mT)  # [rows, tokens, tokens]
        grad_s = torch.ops.aten._softmax_backward_data(grad_p, probabilities, -1, grad_p.dtype)
        # beta=0: the first operand only gives the shape, its values (and NaN) are ignored.
        grad_q = torch.baddbmm(q3, grad_s, k3, beta=0, alpha=ctx.scale)
        grad_k = torch.baddbmm(k3, grad_s.mT, q3, beta=0, alpha=ctx.scale)
        grad_q, grad_k, grad_v = (g.unflatten(0, batch) for g in (grad_q, grad_k, grad_v))
        return grad_q, grad_k, grad_v, None, None


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, document_ids: Tensor | None) -> Tensor:
    """Softmax attention over the tokens up to and including one's own.

    Args:
        q: [sequences, heads, tokens, qk_dim].
        k: [sequences, heads, tokens, qk_dim].
        v: [sequences, heads, tokens, v_dim].
        scale: factor on q . k, usually qk_dim ** -0.5 times YaRN's softmax factor.
        document_ids: [sequences, tokens] int64, or None; with it no token reads another document.
    Returns:
        [sequences, heads, tokens, v_dim] in q.dtype.
    Source: arXiv:2412.19437 eq. 10.
    """
    if q.is_cuda and document_ids is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    mask = _mask(q.shape[-2], document_ids, q)
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    o: Tensor = _BatchedGemmAttention.apply(q, k, v, mask, scale)  # type: ignore[no-untyped-call]
    return o


def _bench_inputs(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 8, 4, 256, 96, generator=generator).to(device, torch.bfloat16)
    q, k, v, grad = x.unbind()
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad


def _run(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> Tensor:
    o = causal_attention(q, k, v, scale=96**-0.5, document_ids=None)
    return torch.cat(torch.autograd.grad(o, (q, k, v), grad))


def _peer(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> Tensor:
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=96**-0.5)
    return torch.cat(torch.autograd.grad(o, (q, k, v), grad))


BENCH = (
    Bench(
        name="attention forward+backward",
        make_inputs=_bench_inputs,
        run=_run,
        peer=_peer,
        peer_name="F.scaled_dot_product_attention",
        # Four bf16 roundings more than the peer (scores, probabilities, both gradients), each at most 2^-8
        # and 2^-8 / sqrt(3) in the mean square: below 2^-7 in the Frobenius norm.
        tolerance=2**-7,
        # Causal: half of two forward and five backward GEMMs (the scores are made again).
        flops=0.5 * 7 * 2 * 32 * 256 * 256 * 96,
        bytes=2.0 * 10 * 32 * 256 * 96,
    ),
)
