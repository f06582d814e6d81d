"""Causal softmax attention, the core of MLA after its up-projections.

arXiv:2412.19437 §2.1.1 eq. 10: o_t = sum over j <= t of softmax_j(q_t . k_j * scale) v_j, per head. On a GPU this is
torch's fused attention, on a CPU two batched GEMMs around a softmax whose probabilities are kept for backward: memory
grows with tokens squared. Where documents are kept apart, flash takes their cumulative lengths, and any other kernel
one document after the other: nobody writes a mask of tokens x tokens. Shapes: q, k [sequences, heads, tokens, qk_dim];
v [sequences, heads, tokens, v_dim]. Sequences and heads may be sharded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends import cuda
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.formats import ceil_div
from kernels.operators import operator

# Widths of q and v that cuDNN's kernel was measured with; where it has no plan for others, that shows as it runs.
CUDNN_WIDTHS = ((192, 128),)
_Backward = Callable[..., tuple[Tensor, Tensor, Tensor]]


# Flash's backward sums dq in FP32 over 128 rows a document more than there are tokens: 12.6 MB each with V3's heads.
DOCUMENTS_PER_CALL = 32


@dataclass(frozen=True)
class Packed:
    """The documents of packed sequences, end to end, in groups that one call of flash takes.

    lengths: of each group the tokens of its documents. cumulative: of each group 0 and the sums of its lengths so far,
    [documents + 1] int32 on the device.
    """

    lengths: tuple[tuple[int, ...], ...]
    cumulative: tuple[Tensor, ...]


def documents_of(document_ids: Tensor | None, device: torch.device) -> Packed | None:
    """Where attention on a device is cut: between unlike neighbours of [sequences, tokens] ids and between sequences.

    The ids are on the host, which then knows all numbers and sizes: nothing waits for the device. None where no
    sequence is cut.
    """
    if document_ids is None:
        return None
    assert document_ids.device.type == "cpu", f"document ids on {document_ids.device}: reading them would wait for it"
    is_last = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (0, 1), value=True)  # [sequences, tokens]
    ends = is_last.flatten().nonzero()[:, 0] + 1  # [documents]
    if len(ends) == len(document_ids):
        return None
    lengths = ends.diff(prepend=ends.new_zeros(1)).tolist()
    groups = [tuple(lengths[i : i + DOCUMENTS_PER_CALL]) for i in range(0, len(lengths), DOCUMENTS_PER_CALL)]
    sums = [tuple(accumulate(group, initial=0)) for group in groups]
    # Only from pinned memory is a copy sure not to wait.
    joined = torch.tensor([*chain(*sums)], dtype=torch.int32, pin_memory=device.type == "cuda")
    cumulative = joined.to(device, non_blocking=True).split([len(each) for each in sums])
    return Packed(tuple(groups), cumulative)


def _causal_mask(tokens: int, like: Tensor) -> Tensor:
    """0 where a query may read a key, else -inf: [tokens, tokens] in like.dtype."""
    return like.new_full((tokens, tokens), float("-inf")).triu(1)


def causal_attention_reference(q: Tensor, k: Tensor, v: Tensor, *, scale: float, documents: Packed | None) -> Tensor:
    """Attention with every score written out, fp32 inside. Same arguments as `causal_attention`."""
    q32, k32, v32 = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v))
    scores: Tensor = q32 @ k32.mT * scale + _causal_mask(q.shape[-2], q32)  # [sequences, heads, tokens, tokens]
    if documents is not None:
        lengths = torch.tensor([*chain(*documents.lengths)], device=q.device)
        numbers = torch.arange(len(lengths), device=q.device).repeat_interleave(lengths)
        numbers = numbers.view(q.shape[0], 1, -1, 1)  # [sequences, 1, tokens, 1]
        scores = scores.masked_fill(numbers != numbers.mT, float("-inf"))
    o: Tensor = scores.softmax(-1) @ v32  # [sequences, heads, tokens, v_dim]
    return o.to(q.dtype)


# Scores are rounded to the input's dtype once before the fp32 softmax, as in Hugging Face's eager attention: relative
# error of a bf16 output 3.3e-3 on normal inputs, fused 1.9e-3. Fused attention is slow on a CPU in bf16. Measured
# forward and backward, 2 threads of an AMD EPYC with AVX512-BF16, 8 sequences x 4 heads x 256 tokens: qk 96 and v 64
# take 4.3 ms against 18.7 fused; qk 96 and v 96 take 4.9 against 15.8.
def _batched_gemm_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """o and the probabilities; one GEMM batch entry per (sequence, head), `rows` below counts them."""
    mask = _causal_mask(q.shape[-2], q)
    q3, k3, v3 = (x.flatten(0, 1) for x in (q, k, v))  # [rows, tokens, dim]
    probabilities = torch.baddbmm(mask, q3, k3.mT, alpha=scale).softmax(-1)  # [rows, tokens, tokens]
    return torch.bmm(probabilities, v3).unflatten(0, q.shape[:2]), probabilities


def _batched_gemm_backward(
    grad_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, probabilities: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; a fused kernel would read o, this one has the probabilities."""

    def of_scores(grad_p: Tensor) -> Tensor:
        return torch.ops.aten._softmax_backward_data(grad_p, probabilities, -1, grad_p.dtype)  # type: ignore[no-any-return]

    return _gradients(grad_o, q, k, v, probabilities, scale, of_scores)


def _batched_gemm_backward_of_output(
    grad_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, probabilities: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The same as a fused kernel has it, which takes each row's sum of p * grad_p to be that of o * grad_o."""
    wide = torch.promote_types(o.dtype, torch.float32)
    delta = (grad_o.to(wide) * o.to(wide)).sum(-1, keepdim=True).flatten(0, 1)  # [rows, tokens, 1]

    def of_scores(grad_p: Tensor) -> Tensor:
        return grad_p.to(wide).sub_(delta).mul_(probabilities).to(grad_p.dtype)

    return _gradients(grad_o, q, k, v, probabilities, scale, of_scores)


def _gradients(
    grad_o: Tensor, q: Tensor, k: Tensor, v: Tensor, probabilities: Tensor, scale: float,
    of_scores: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grad_o, q3, k3, v3 = (x.flatten(0, 1) for x in (grad_o, q, k, v))  # [rows, tokens, dim]
    grad_v = torch.bmm(probabilities.mT, grad_o)
    grad_s = of_scores(torch.bmm(grad_o, v3.mT))  # [rows, tokens, tokens]
    # beta=0: the first operand only gives the shape, its values (and NaN) are ignored.
    grad_q = torch.baddbmm(q3, grad_s, k3, beta=0, alpha=scale)
    grad_k = torch.baddbmm(k3, grad_s.mT, q3, beta=0, alpha=scale)
    return grad_q.unflatten(0, q.shape[:2]), grad_k.unflatten(0, q.shape[:2]), grad_v.unflatten(0, q.shape[:2])


# The fakes describe the GPU on purpose: a plan made on a laptop then counts what a GPU would hold. They keep one fp32
# log-sum-exp per query where the real CPU operator keeps a row of probabilities, and lay o out as q is and gradients as
# q, k and v are, as cuDNN does. FLOPs are those of the causal half, without the scores that a fused backward
# computes again.
def _allocate_fused_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    shape = (*q.shape[:3], v.shape[-1])
    outermost_first = sorted(range(4), key=q.stride, reverse=True)
    o = q.new_empty([shape[dim] for dim in outermost_first])
    o = o.permute([outermost_first.index(dim) for dim in range(4)])
    return o, q.new_empty(q.shape[:3], dtype=torch.float32)


def _forward_flops(q: Sequence[int], k: object, v: Sequence[int], *_: object, out_shape: object) -> int:
    sequences, heads, tokens, qk_dim = q
    return sequences * heads * tokens**2 * (qk_dim + v[-1])


_attention = operator("attention", _batched_gemm_forward, fake=_allocate_fused_forward, flops=_forward_flops)
_attention_backward, _attention_backward_of_output = (
    operator(
        name,
        function,
        fake=lambda dy, q, k, v, *_: (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)),
        flops=lambda dy, *qkv, out_shape: 2 * _forward_flops(*qkv, out_shape=out_shape),
    )
    for name, function in (
        ("attention_backward", _batched_gemm_backward),
        ("attention_backward_of_output", _batched_gemm_backward_of_output),
    )
)

# The core under every name it may run by: what recomputation keeps instead of running it twice.
CORE_OPERATORS = (
    "v3fp8::attention",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "torch_attn::_varlen_attn",
)


# V3's heads on an H100, 128 of them and 4096 tokens, forward and backward, torch's kernels measured alone: cuDNN 1.25
# and 4.56 ms, flash with v padded to 192 2.81 and 9.60, the efficient one, in deterministic mode, 4.91 and 35.3. Under
# deterministic algorithms torch refuses cuDNN; flash it refuses where v is not as wide as q, whence `_widened`.
def fused_backend(q: Tensor, k: Tensor, v: Tensor) -> SDPBackend:
    """The fastest of torch's kernels that takes a call, by torch's own checks of the host."""
    if (q.shape[-1], v.shape[-1]) in CUDNN_WIDTHS and _accepted(cuda.can_use_cudnn_attention, q, k, v):
        return SDPBackend.CUDNN_ATTENTION
    if _flash_accepts(q, k, v):
        return SDPBackend.FLASH_ATTENTION
    efficient = _accepted(cuda.can_use_efficient_attention, q, k, v)
    return SDPBackend.EFFICIENT_ATTENTION if efficient else SDPBackend.MATH


def _accepted(check: Callable[[cuda.SDPAParams], bool], q: Tensor, k: Tensor, v: Tensor) -> bool:
    return check(cuda.SDPAParams(q, k, v, None, 0.0, True, False))


def _flash_accepts(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether flash takes a call in the shapes of `_widened`, without writing them."""
    widest = max((q, v), key=lambda x: x.shape[-1])
    same_width = (x if x.shape[-1] == widest.shape[-1] else widest for x in (q, k, v))
    return _accepted(cuda.can_use_flash_attention, *same_width)


def _widened(*tensors: Tensor) -> list[Tensor]:
    """All as wide as the widest, in eights; zeros change neither a score nor the columns of o that are kept."""
    widest = 8 * ceil_div(max(x.shape[-1] for x in tensors), 8)
    return [x if x.shape[-1] == widest else F.pad(x, (0, widest - x.shape[-1])) for x in tensors]


def backend_name(
    *, heads: int, qk_dim: int, v_dim: int, dtype: torch.dtype, device: torch.device, documents: bool = False
) -> str:
    """Who computes attention for such heads, in the mode of determinism that is set now; `documents` are kept apart."""
    name, apart = "batched GEMMs", "each document alone"
    if device.type == "cuda":
        q, v = (torch.empty(1, heads, 128, d, dtype=dtype, device=device, requires_grad=True) for d in (qk_dim, v_dim))
        name = fused_backend(q, q, v).name.removesuffix("_ATTENTION").lower()
        apart = "varlen flash" if _flash_accepts(q, q, v) else apart
    return f"{name}; {apart} where a sample has several" if documents else name


def _fused(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    backend, width = fused_backend(q, k, v), v.shape[-1]
    if backend is SDPBackend.FLASH_ATTENTION:
        q, k, v = _widened(q, k, v)
    with sdpa_kernel(backend):
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return o[..., :width]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, backward: _Backward) -> Tensor:
        o, statistics = _attention(q, k, v, scale)
        ctx.save_for_backward(q, k, v, o, statistics)
        ctx.scale, ctx.operator = scale, backward
        return o

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, o, statistics = ctx.saved_tensors
        return *ctx.operator(grads[0], q, k, v, o, statistics, ctx.scale), None, None


def _alone(q: Tensor, k: Tensor, v: Tensor, scale: float, backward: _Backward) -> Tensor:
    """Attention within each sequence as a whole."""
    if q.is_cuda:
        return _fused(q, k, v, scale)
    return _Attention.apply(q, k, v, scale, backward)  # type: ignore[no-any-return, no-untyped-call]


# Below, q, k and v are [tokens of all sequences, heads, dim].
def _varlen_flash(q: Tensor, k: Tensor, v: Tensor, documents: Packed, scale: float) -> Tensor:
    """Flash's kernels for packed sequences; deterministic where flash is."""
    # Brings torch's compiler with it, which takes seconds to import.
    from torch.nn.attention.varlen import varlen_attn

    outs, width = list[Tensor](), v.shape[-1]
    q, k, v = _widened(q, k, v)
    parts = _cut(q, k, v, [sum(group) for group in documents.lengths])
    for (q_part, k_part, v_part), group, sums in zip(parts, documents.lengths, documents.cumulative, strict=True):
        ends = (sums, sums, max(group), max(group))
        # The window says: causal.
        o = varlen_attn(q_part, k_part, v_part, *ends, scale=scale, window_size=(-1, 0))
        assert isinstance(o, Tensor)
        outs.append(o)
    return (outs[0] if len(outs) == 1 else torch.cat(outs))[..., :width]


def _one_by_one(
    q: Tensor, k: Tensor, v: Tensor, documents: Packed, scale: float, *, backward: _Backward
) -> Tensor:  # fmt: skip
    """For dtypes and widths that flash does not take, and on a CPU: memory grows with the squares of the lengths."""
    outs = []
    for part in _cut(q, k, v, [*chain(*documents.lengths)]):
        q_part, k_part, v_part = (x.transpose(0, 1)[None] for x in part)  # [1, heads, tokens, dim]
        outs.append(_alone(q_part, k_part, v_part, scale, backward)[0].transpose(0, 1))
    return torch.cat(outs)


def _cut(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Each part of all three; the gradient of the only part is not copied."""
    if len(lengths) == 1:
        return [(q, k, v)]
    return [*zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)]


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, documents: Packed | None) -> Tensor:
    """Attention over the tokens up to and including one's own: [sequences, heads, tokens, v_dim] in q.dtype (eq. 10).

    `scale` is usually qk_dim ** -0.5 times YaRN's softmax factor. With `documents` no token reads another document.
    """
    return _causal_attention(q, k, v, scale, documents, _attention_backward)


def causal_attention_of_output(q: Tensor, k: Tensor, v: Tensor, *, scale: float, documents: Packed | None) -> Tensor:
    """The same, whose backward reads o on every device: where a hook gives back another o than was saved, that one."""
    return _causal_attention(q, k, v, scale, documents, _attention_backward_of_output)


def _causal_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Packed | None, backward: _Backward
) -> Tensor:
    if documents is None:
        return _alone(q, k, v, scale, backward)
    attend = _varlen_flash if _flash_accepts(q, k, v) else partial(_one_by_one, backward=backward)
    by_sequence = (q.shape[0], q.shape[2])
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    o: Tensor = attend(q, k, v, documents, scale).unflatten(0, by_sequence)
    return o.transpose(1, 2)
