"""From MLA's latents to attention's heads and back, in FP8, as one operation (arXiv:2412.19437 §2.1.1, eq. 2-9).

    forward     q = W_UQ norm(c_Q) and [k_C; v] = W_UKV norm(c_KV); q's rotary dims are turned where they are, k is
                written once, its rotary dims the turned shared key, and v stays a strided view of the second product
    backward    dq, turned back, and dk, dv go straight into both FP8 groupings of the two linears' gradients, which
                never exist in BF16; all gradients of the latents are written into slices of one tensor

No rounding is left out: the bits are those of norms, linears, RoPE and concatenations apart. Sizes that do not split
into tiles (`turns_into_tiles`, `joins_into_tiles`) are turned back in BF16 and then quantised, to the same bits.

Shapes: tokens = sequences x positions, position by position; heads; nope + rope = qk width of a head, the last `rope`
dims rotary; v; cos, sin [positions, rope / 2] fp32. Tokens may be sharded by whole sequences, heads on any axis.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.deferred import kept_weight
from kernels.formats import TILE, Quantized
from kernels.fp8_linear import Fp8Call, Fp8Gradient, LinearInput
from kernels.operators import operator
from kernels.quantize import quantize_tiles_both, quantize_tiles_both_reference
from kernels.rmsnorm import differentiate, norm_for_linear
from kernels.rope import rotate
from kernels.tiles import empty_tiles


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [tokens, heads, rope], each token by its position's angles."""
    turns = torch.complex(cos, sin)[:, None]  # [positions, 1, rope / 2]
    return rotate(x.unflatten(0, (-1, len(cos))), turns).flatten(0, 1)


def heads_forward_reference(q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the rotary dims of q in place; return k.

    Args:
        q: [tokens, heads, nope + rope], changed.
        kv: [tokens, heads, nope + v].
        k_rope: [tokens, rope], one key for all heads; its rows may lie apart.
    """
    rope = k_rope.shape[1]
    nope = q.shape[2] - rope
    q[..., nope:] = _turned(q[..., nope:], cos, sin)
    key = _turned(k_rope[:, None], cos, sin).expand(-1, q.shape[1], -1)
    return torch.cat((kv[..., :nope], key), dim=-1)


def turn_back_reference(dq: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """dq [tokens, heads, nope + rope], its rotary dims turned back, into `out` [tokens, heads * (nope + rope)]."""
    nope = dq.shape[2] - 2 * cos.shape[1]
    out.copy_(torch.cat((dq[..., :nope], _turned(dq[..., nope:], cos, -sin)), dim=-1).flatten(1))


def rope_key_backward_reference(dk: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """The rotary dims of dk [tokens, heads, nope + rope], summed over heads and turned back, into [tokens, rope]."""
    total = dk[..., dk.shape[2] - 2 * cos.shape[1] :].sum(dim=1, keepdim=True)
    out.copy_(_turned(total, cos, -sin)[:, 0])


def turn_back_quantize_both_reference(
    dq: Tensor, cos: Tensor, sin: Tensor, power_of_two: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`quantize_tiles_both` of what `turn_back` writes: payload and scale in 1x128 tiles, then in 128x1."""
    out = dq.new_empty(len(dq), dq[0].numel())
    turn_back_reference(dq, cos, sin, out)
    return quantize_tiles_both_reference(out, power_of_two)


def heads_quantize_both_reference(
    dk: Tensor, dv: Tensor, nope: int, power_of_two: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`quantize_tiles_both` of the gradient [tokens, heads * (nope + v)] of kv: dk's first `nope` dims, then dv."""
    return quantize_tiles_both_reference(_joined(dk, dv, nope), power_of_two)


def _joined(dk: Tensor, dv: Tensor, nope: int) -> Tensor:
    return torch.cat((dk[..., :nope], dv), dim=-1).flatten(1)


def turns_into_tiles(heads: int, nope: int, rope: int) -> bool:
    """Whether `turn_back_quantize_both` takes these sizes: each half of a 1x128 tile is rotary or is not."""
    return nope % 64 == rope % 64 == 0 and heads * (nope + rope) % TILE == 0


def joins_into_tiles(nope: int, v: int) -> bool:
    """Whether `heads_quantize_both` takes these sizes: each tile is of one head's key or value."""
    return nope == v == TILE


def _allocate_both(like: Tensor, rows: int, cols: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *empty_tiles(like, rows, cols), *empty_tiles(like, cols, rows)


heads_forward = operator(
    "heads_forward", heads_forward_reference, fake=lambda q, *_: q.new_empty(q.shape), gpu="heads", mutates=("q",)
)
turn_back = operator("turn_back", turn_back_reference, fake=lambda *_: None, gpu="heads", mutates=("out",))
rope_key_backward = operator(
    "rope_key_backward", rope_key_backward_reference, fake=lambda *_: None, gpu="heads", mutates=("out",)
)
turn_back_quantize_both = operator(
    "turn_back_quantize_both",
    turn_back_quantize_both_reference,
    fake=lambda dq, *_: _allocate_both(dq, len(dq), dq.shape[1] * dq.shape[2]),
    gpu="heads",
)
heads_quantize_both = operator(
    "heads_quantize_both",
    heads_quantize_both_reference,
    fake=lambda dk, dv, nope, power_of_two: _allocate_both(dk, len(dk), dk.shape[1] * (nope + dv.shape[2])),
    gpu="heads",
)


@dataclass(frozen=True)
class UpProjection:
    """A latent's norm and the FP8 linear that follows."""

    gain: Tensor  # [rank]
    eps: float
    weight: Tensor  # [heads * width, rank]
    # `fp8_linear` with this weight: a module, which is called so that its hooks see input and output.
    linear: Callable[[LinearInput], Tensor]


@dataclass(frozen=True)
class HeadSizes:
    """How the products are split into heads."""

    num_heads: int
    nope: int
    rope: int
    power_of_two: bool  # of FP8 scales


class _LatentsToHeads(torch.autograd.Function):
    """Gains and weights follow the other arguments, so that autograd knows of them; dW goes to `kernels.deferred`."""

    @staticmethod
    def forward(
        ctx: Any, latents: Tensor, cos: Tensor, sin: Tensor, sizes: HeadSizes,
        ups: tuple[UpProjection | None, UpProjection], *_: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        kv_rank = len(ups[1].gain)
        ctx.widths = (latents.shape[1] - kv_rank - sizes.rope, kv_rank, sizes.rope)
        q_latent, kv_latent, k_rope = latents.split(ctx.widths, dim=1)
        kept, ctx.calls, ctx.again, products = [latents, cos, sin], [], [], []
        for latent, up in zip((q_latent, kv_latent), ups, strict=True):
            if up is None:
                # The queries themselves; a copy, for the latents may be read again.
                products.append(latent.clone(memory_format=torch.contiguous_format))
                continue
            x = norm_for_linear(latent, up.gain, up.eps, power_of_two=sizes.power_of_two)
            call = Fp8Call()
            products.append(up.linear(call.reads(x)))
            x.norm.again.reads_tiles()
            ctx.calls.append(call)
            ctx.again.append(x.norm.again)
            kept.append(x.norm.rstd)
        q, kv = (each.view(len(latents), sizes.num_heads, -1) for each in products)
        # In place inside a Function: autograd sees q turned only.
        k = heads_forward(q, kv, k_rope, cos, sin)
        ctx.save_for_backward(*kept)
        ctx.sizes = sizes
        return q, k, kv[..., sizes.nope :]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dq, dk, dv = grads
        latents, cos, sin, *rstds = ctx.saved_tensors
        sizes: HeadSizes = ctx.sizes
        d_latents = torch.empty_like(latents, memory_format=torch.contiguous_format)
        xs, outs = latents.split(ctx.widths, dim=1), d_latents.split(ctx.widths, dim=1)
        makes = [partial(_gradient_of_q, dq, cos, sin, sizes), partial(_gradient_of_kv, dk, dv, sizes)]
        of_parameters: list[Tensor | None] = []
        if len(ctx.calls) == 1:
            turn_back(dq, cos, sin, outs[0])
            of_parameters += [None, None]
        norms = zip(ctx.calls, ctx.again, rstds, strict=True)
        for nth, (call, again, rstd) in enumerate(norms, start=2 - len(ctx.calls)):
            by_channel = partial(again.tiles, xs[nth], rstd)
            d_normed = call.backward(makes[nth](call.weight.requires_grad), by_channel, latents.dtype)
            of_parameters += [differentiate([d_normed], None, xs[nth], kept_weight(again), rstd, outs[nth]), None]
        rope_key_backward(dk, cos, sin, outs[2])
        return d_latents, None, None, None, None, *of_parameters


def _gradient_of_q(dq: Tensor, cos: Tensor, sin: Tensor, sizes: HeadSizes, for_wgrad: bool) -> Fp8Gradient:
    def rows(taken: Tensor) -> Tensor:
        places = taken % len(cos)
        out = dq.new_empty(len(taken), dq.shape[1] * dq.shape[2])
        turn_back(dq.index_select(0, taken), cos.index_select(0, places), sin.index_select(0, places), out)
        return out

    if turns_into_tiles(sizes.num_heads, sizes.nope, sizes.rope):
        both = turn_back_quantize_both(dq, cos, sin, sizes.power_of_two)
        by_row, by_channel = Quantized(*both[:2]), Quantized(*both[2:])
    else:
        out = dq.new_empty(len(dq), dq.shape[1] * dq.shape[2])
        turn_back(dq, cos, sin, out)
        by_row, by_channel = quantize_tiles_both(out, power_of_two=sizes.power_of_two)
    return Fp8Gradient(by_row, by_channel if for_wgrad else None, rows)


def _gradient_of_kv(dk: Tensor, dv: Tensor, sizes: HeadSizes, for_wgrad: bool) -> Fp8Gradient:
    def rows(taken: Tensor) -> Tensor:
        return _joined(dk.index_select(0, taken), dv.index_select(0, taken), sizes.nope)

    if joins_into_tiles(sizes.nope, dv.shape[2]):
        both = heads_quantize_both(dk, dv, sizes.nope, sizes.power_of_two)
        by_row, by_channel = Quantized(*both[:2]), Quantized(*both[2:])
    else:
        by_row, by_channel = quantize_tiles_both(_joined(dk, dv, sizes.nope), power_of_two=sizes.power_of_two)
    return Fp8Gradient(by_row, by_channel if for_wgrad else None, rows)


def latents_to_heads(
    latents: Tensor, cos: Tensor, sin: Tensor, sizes: HeadSizes, *, q: UpProjection | None, kv: UpProjection
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents [tokens, q | kv rank | rope] -> q, k [tokens, heads, nope + rope] and v [tokens, heads, v], a view.

    Without `q` the first columns are the heads' queries. A hook that keeps `q.linear`'s output sees its rotary dims
    turned later; while it runs they are not.
    """
    parameters = [each for up in (q, kv) for each in ((None, None) if up is None else (up.gain, up.weight))]
    return _LatentsToHeads.apply(latents, cos, sin, sizes, (q, kv), *parameters)  # type: ignore[no-any-return, no-untyped-call]
