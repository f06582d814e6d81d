"""The bench's rows: each kernel file's operations, and two of the ablations, each against one peer on the same inputs.

`ROWS` maps the name of a file to its cases. Ours gets fresh inputs and so does the peer, whose result is what ours is
compared with: an operation may work in place. Sizes are those of a small model, so that a CPU runs all of them in
seconds; V3's sizes are in `peers.py`. FLOPs and bytes are of one ideal call. Beside each tolerance is its origin.

Past 600 lines, but one idea: the table, and what makes its inputs. It grows by a row with each kernel.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from kernels.adamw import adamw_update
from kernels.attention import causal_attention
from kernels.block_ranges import block_scales, quantize_range, range_amax, transpose_blocks
from kernels.cross_entropy import IGNORE, cross_entropy, linear_cross_entropy_sum
from kernels.e5m6 import pack_e5m6, quantize_pack, unpack_e5m6, unpack_quantize_transposed
from kernels.embedding import embedding_reference
from kernels.experts_in_chunks import fp8_experts_in_chunks
from kernels.formats import E4M3_MAX, TILE, Quantized
from kernels.fp8_linear import fp8_experts, fp8_linear
from kernels.gather import gather_quantize_both, gather_requantize_transposed, gather_tiles
from kernels.gemm_fp8 import gemm_tile_block, gemm_tile_tile
from kernels.gemm_grouped import grouped_gemm_tile_block
from kernels.grad_norm import sums_of_squares
from kernels.heads import heads_forward, heads_quantize_both, turn_back_quantize_both
from kernels.permute import Dispatched, Grouping, combine_tokens, group_tokens, grouping
from kernels.quantize import (
    dequantize_blocks,
    dequantize_tiles,
    quantize_blocks,
    quantize_tiles,
    quantize_tiles_both,
    quantize_tiles_transposed,
    requantize_transposed,
)
from kernels.rmsnorm import add_norm_quantize, norm_again, norm_backward, norm_gain_gradient, rmsnorm, rmsnorm_reference
from kernels.rope import apply_rope, apply_rope_reference, rope_tables
from kernels.router import route, sequence_balance
from kernels.router_linear import router_linear
from kernels.swiglu import (
    gated_swiglu,
    gated_swiglu_backward_kept,
    swiglu,
    swiglu_backward_quantize_both,
    swiglu_quantize,
    swiglu_quantize_transposed,
)
from train.studies.ablation.hopper_accumulation import Factors, factors, hopper_matmul_reference
from train.studies.ablation.linear import AblatedLinears, Ablation
from train.studies.bench.table import OURS, Case, Contender
from train.studies.bench.timing import Call, Clock

KIND = "kernels"
BF16 = torch.bfloat16
Make = Callable[[torch.device], tuple[Any, ...]]


def clock_of(device: torch.device, *, rounds: int = 9) -> Clock:
    """How rows are timed: out of a GPU's cache, from one set on a CPU.

    The host launches them: autograd's and torch's own launches were never captured in a graph.
    """
    on_gpu = device.type == "cuda"
    return Clock(rounds, 5e-3, cold_bytes=200e6 if on_gpu else 0.0, least_sets=2 if on_gpu else 1, graph=False)


@dataclass(frozen=True)
class PairInputs:
    """Inputs of ours and of its peer, which are made again where a result is compared."""

    make: Make
    peer: Callable[..., Tensor]
    device: torch.device
    values: tuple[Any, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors, those within dataclasses included."""
        fields = [[value] if isinstance(value, Tensor) else vars(value).values() for value in self.values]
        return sum(tensor.nbytes for each in fields for tensor in each if isinstance(tensor, Tensor))

    def reset(self) -> None:
        """Every operation allocates its outputs, or is run on fresh inputs once."""
        return

    def expected(self) -> list[Tensor]:
        """The peer's result."""
        return [self.peer(*self.make(self.device))]

    def sampled(self, outputs: tuple[Tensor, ...]) -> list[Tensor]:
        """All of ours."""
        return list(outputs)


def _launch(function: Callable[..., Tensor], inputs: PairInputs) -> Call:
    return lambda: (function(*inputs.values),)


def pair(
    name: str,
    make: Make,
    run: Callable[..., Tensor],
    peer: Callable[..., Tensor],
    peer_name: str,
    *,
    tolerance: float,
    bytes: float,
    flops: float = 0.0,
) -> Case:
    """One operation and its peer.

    Args:
        name: unique; letters, digits and underscores, so that it can be typed after `--only`.
        make: device -> the positional inputs of `run` and `peer`, seeded.
        run: ours; returns one tensor.
        peer: returns a tensor of the same shape.
        peer_name: what the peer is, e.g. "torch.nn.functional.rms_norm".
        tolerance: relative Frobenius error of run against peer that still counts as parity.
        bytes: read and written by one ideal call of `run`.
        flops: of one call of `run`; 0 where the bound is memory.
    """
    candidates = (Contender(OURS, partial(_launch, run), tolerance), Contender(peer_name, partial(_launch, peer)))
    return Case(name, KIND, flops, bytes, lambda device: PairInputs(make, peer, device, make(device)), candidates)


def seeded(device: torch.device | None = None, seed: int = 0) -> torch.Generator:
    """A generator, on the CPU unless a device is given: then the same numbers on every device."""
    return torch.Generator(device or "cpu").manual_seed(seed)


def _matrix(device: torch.device) -> tuple[Tensor]:
    return (torch.randn(2048, 512, generator=seeded(device), device=device),)


def _matrix_range(device: torch.device) -> tuple[Tensor]:
    return (_matrix(device)[0].flatten(),)


def _quantize_range(values: Tensor) -> Tensor:
    shape = (2048, 512)
    scale = block_scales(range_amax(values, shape, 0), power_of_two=False)
    return quantize_range(values, scale, shape, 0)


def _input_gradient(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Forward and backward: the gradient of the first input, given that of the output as the last."""
    return lambda x, *rest: torch.autograd.grad(function(x, *rest[:-1]), x, rest[-1])[0]


def _adamw_inputs(device: torch.device) -> tuple[Tensor, ...]:
    master, grad, exp_avg = torch.randn(3, 1 << 20, generator=seeded()).to(device)
    return master, grad, exp_avg, exp_avg.square()


def _adamw(master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> Tensor:
    adamw_update(master, grad, exp_avg, exp_avg_sq, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, step=2)
    return master


def _torch_adamw(master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> Tensor:
    torch_adamw(
        [master], [grad], [exp_avg], [exp_avg_sq], [], [torch.tensor(1.0)], foreach=False, fused=True,
        amsgrad=False, beta1=0.9, beta2=0.95, lr=1e-3, weight_decay=0.1, eps=1e-8, maximize=False,
    )  # fmt: skip
    return master


def _attention_inputs(device: torch.device) -> tuple[Tensor, ...]:
    q, k, v, grad = torch.randn(4, 8, 4, 256, 96, generator=seeded()).to(device, BF16).unbind()
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad


def _attention(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> Tensor:
    return torch.cat(torch.autograd.grad(attend(q, k, v), (q, k, v), grad))


def _cross_entropy_inputs(device: torch.device) -> tuple[Tensor, Tensor]:
    generator = seeded()
    logits = torch.randn(2048, 2048, generator=generator).to(device, BF16)
    return logits, torch.randint(2048, (2048,), generator=generator).to(device)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    cross_entropy(logits, labels, 1.0)
    return logits


def _torch_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    leaf = logits.detach().requires_grad_()
    loss = F.cross_entropy(leaf.float(), labels, ignore_index=IGNORE, reduction="sum")
    return torch.autograd.grad(loss, leaf)[0]


def _head_inputs(device: torch.device) -> tuple[Tensor, ...]:
    generator = seeded()
    x, weight = (torch.randn(2, 2048, 256, generator=generator) * 0.1).to(device, BF16).unbind()
    labels = torch.randint(2048, (2048,), generator=generator).to(device)
    return x.requires_grad_(), weight.requires_grad_(), labels


def _head(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return torch.autograd.grad(linear_cross_entropy_sum(x, weight, labels), x)[0]


def _torch_head(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    loss = F.cross_entropy(F.linear(x, weight).float(), labels, ignore_index=IGNORE, reduction="sum")
    return torch.autograd.grad(loss, (x, weight))[0]


def _embedding_inputs(device: torch.device) -> tuple[Tensor, Tensor]:
    generator = seeded()
    ids = torch.randint(0, 2048, (2048,), generator=generator).to(device)
    return ids, torch.randn(2048, 256, generator=generator).to(device)


def _linear_inputs(device: torch.device) -> tuple[Tensor, ...]:
    generator = seeded(device)
    return tuple(torch.randn(rows, 512, generator=generator, device=device) for rows in (2048, 512, 2048))


def _linear_gradients(layer: Callable[[Tensor, Tensor], Tensor], x: Tensor, w: Tensor, dy: Tensor) -> Tensor:
    """dx and dW of one forward and backward, stacked along rows."""
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    layer(x, w).backward(dy)
    assert x.grad is not None
    assert w.grad is not None
    return torch.cat([x.grad, w.grad])


def _expert_inputs(device: torch.device) -> tuple[Tensor, Grouping, Tensor, Tensor]:
    """1,024 tokens at two of four experts, 2,048 rows and padding, and the experts' weights in BF16."""
    generator = seeded()
    layout = grouping(torch.rand(1024, 4, generator=generator).argsort(-1)[:, :2].to(device), 4)
    x, gate_up, down = (
        torch.randn(shape, generator=generator) for shape in ((1024, 512), (4, 512, 512), (4, 512, 256))
    )
    return x.to(device, BF16), layout, (gate_up / 16).to(device, BF16), (down / 16).to(device, BF16)


def _expert_gradients(layer: Callable[..., Tensor], x: Tensor, layout: Grouping, up: Tensor, down: Tensor) -> Tensor:
    """Sums and the tokens' gradient of one forward and backward of experts with unit gates, stacked along rows."""
    x, gates = x.clone().requires_grad_(), x.new_ones(layout.num_rows, dtype=torch.float32)
    up, down = (weight.clone().requires_grad_() for weight in (up, down))
    y = layer(Dispatched(x, gates, layout, None, None), up, down, power_of_two=True)
    y.backward(y.detach())
    assert x.grad is not None
    return torch.cat([y.detach(), x.grad])


def _gemm_inputs(device: torch.device) -> tuple[Quantized, Quantized, Quantized, Tensor, Tensor]:
    generator = seeded(device)
    a = quantize_tiles(torch.randn(2048, 512, generator=generator, device=device), power_of_two=False)
    w = torch.randn(512, 512, generator=generator, device=device)
    blocks, tiles = quantize_blocks(w, power_of_two=False), quantize_tiles(w, power_of_two=False)
    return a, blocks, tiles, dequantize_tiles(a), dequantize_blocks(blocks)


def _grouped_gemm_inputs(device: torch.device) -> tuple[Quantized, Quantized, Tensor, Tensor, Tensor]:
    generator = seeded(device)
    a = quantize_tiles(torch.randn(8 * 512, 512, generator=generator, device=device), power_of_two=False)
    b = quantize_blocks(torch.randn(8, 256, 512, generator=generator, device=device), power_of_two=False)
    group_ends = torch.arange(512, 8 * 512 + 1, 512, dtype=torch.int32, device=device)
    return a, b, group_ends, dequantize_tiles(a).view(8, 512, 512), dequantize_blocks(b)


def _torch_layout(ids: Tensor) -> Tensor:
    chosen = torch.zeros(len(ids), 64, dtype=torch.int64, device=ids.device).scatter_(1, ids, 1)
    padded = (chosen.sum(0) + TILE - 1) // TILE * TILE
    rows = (padded.cumsum(0) - padded) + chosen.cumsum(0) - 1  # [tokens, experts]
    return rows.gather(1, ids.sort(dim=1).values)


def _permute_inputs(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = seeded()
    x, grad = torch.randn(2, 2048, 256, generator=generator).to(device, BF16)
    ids = torch.rand(2048, 8, generator=generator).topk(2, dim=-1).indices.to(device)
    return x.requires_grad_(), ids, grad


def _permute(x: Tensor, ids: Tensor) -> Tensor:
    layout = grouping(ids, 8)
    return combine_tokens(group_tokens(x, layout), layout)


def _torch_permute(x: Tensor, ids: Tensor) -> Tensor:
    tokens = ids.flatten().argsort(stable=True) // ids.shape[1]
    rows = x.index_select(0, tokens)
    return torch.zeros(x.shape, device=x.device).index_add(0, tokens, rows.float()).to(x.dtype)


def _gather_inputs(device: torch.device) -> tuple[Tensor, Quantized, Tensor]:
    """Tokens, the same in tiles, and the slots of the rows of 8 experts, two a token."""
    x, ids, _ = _permute_inputs(device)
    return x.detach(), quantize_tiles(x, power_of_two=True), grouping(ids, 8).slot_of_row


def _rows(x: Tensor, slot_of_row: Tensor) -> Tensor:
    return torch.cat((x, x.new_zeros(1, x.shape[1])))[slot_of_row // 2]


def _torch_tiles(x: Tensor) -> Tensor:
    tiles = x.view(len(x), -1, TILE)
    scaled = tiles / (tiles.abs().amax(-1, keepdim=True) / E4M3_MAX)
    return scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view_as(x)


def _torch_blocks(w: Tensor) -> Tensor:
    scale = F.max_pool2d(w.abs()[None], TILE)[0] / E4M3_MAX
    scaled = w / scale.repeat_interleave(TILE, 0).repeat_interleave(TILE, 1)
    return scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def _rmsnorm_inputs(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = seeded()
    x, grad = torch.randn(2, 2048, 256, generator=generator).to(device, BF16)
    weight = torch.randn(256, generator=generator).to(device, BF16)
    return x.requires_grad_(), weight.requires_grad_(), grad


def _norm_inputs(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = seeded()
    x, delta = torch.randn(2, 2048, 512, generator=generator).to(device, BF16)
    return x, delta, torch.randn(512, generator=generator).to(device, BF16)


def _add_norm_quantize(x: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
    return add_norm_quantize(x, delta, weight, 1e-6, True, True, False)[2]


def _torch_norm_tiles(x: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
    return quantize_tiles(rmsnorm_reference(x + delta, weight, 1e-6), power_of_two=True).payload


def _norm_of_sum(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    x, _, weight = _norm_inputs(device)
    return x, weight, add_norm_quantize(x, None, weight, 1e-6, True, False, True)[4]


def _torch_norm_again(x: Tensor, weight: Tensor, _: Tensor) -> Tensor:
    tiles = quantize_tiles(rmsnorm_reference(x, weight, 1e-6), power_of_two=True)
    return requantize_transposed(tiles, power_of_two=True).payload


def _norm_gradients(device: torch.device) -> tuple[Tensor, ...]:
    gradients = torch.randn(4, 2048, 512, generator=seeded(seed=1)).to(device, BF16).unbind()
    return *gradients, *_norm_of_sum(device)


def _norm_backward(
    dy: Tensor, dy1: Tensor, dy2: Tensor, d_sum: Tensor, x: Tensor, weight: Tensor, rstd: Tensor
) -> Tensor:
    out = torch.empty_like(x)
    norm_gain_gradient(norm_backward(dy, dy1, dy2, d_sum, x, weight, rstd, out), torch.empty_like(weight), BF16, False)
    return out


def _torch_norm_backward(
    dy: Tensor, dy1: Tensor, dy2: Tensor, d_sum: Tensor, x: Tensor, weight: Tensor, _: Tensor
) -> Tensor:
    x, weight = x.requires_grad_(), weight.requires_grad_()
    y = F.rms_norm(x, weight.shape, weight, 1e-6)
    return torch.autograd.grad(y, (x, weight), dy + dy1 + dy2)[0] + d_sum


def _rope_inputs(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    cos, sin = rope_tables(256, 32, 10000.0, yarn=None)
    return torch.randn(8, 4, 256, 32, generator=seeded()).to(device, BF16), cos.to(device), sin.to(device)


def _heads_inputs(device: torch.device) -> tuple[Tensor, ...]:
    generator = seeded()
    cos, sin = rope_tables(512, 64, 10000.0, yarn=None)
    q, kv, k_rope = (torch.randn(2048, 4, width, generator=generator).to(device, BF16) for width in (192, 256, 64))
    return q, kv, k_rope[:, 0], cos.to(device), sin.to(device)


def _heads(q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    k = heads_forward(q, kv, k_rope, cos, sin)
    return torch.cat((q, k))


def _torch_heads(q: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    q_rope, key = (_by_position(x, cos, sin) for x in (q[..., 128:], k_rope[:, None]))
    return torch.cat((torch.cat((q[..., :128], q_rope), -1), torch.cat((kv[..., :128], key.expand(-1, 4, -1)), -1)))


def _by_position(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [tokens, heads, dim] turned, sequence after sequence."""
    sequences = x.unflatten(0, (-1, len(cos))).transpose(1, 2)
    return apply_rope_reference(sequences, cos, sin).transpose(1, 2).flatten(0, 1)


def _torch_turn_back(dq: Tensor, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rows = torch.cat((dq[..., :128], _by_position(dq[..., 128:], cos, -sin)), -1).flatten(1)
    return quantize_tiles(rows, power_of_two=True).payload


def _torch_join(dk: Tensor, dv: Tensor, *_: Tensor) -> Tensor:
    return quantize_tiles(torch.cat((dk[..., :128], dv[..., :128]), -1).flatten(1), power_of_two=True).payload


def _router_inputs(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = seeded()
    logits = torch.randn(2048, 64, generator=generator)
    bias = 0.01 * torch.randn(64, generator=generator)
    grad = torch.randn(2048, 6, generator=generator)
    return logits.to(device).requires_grad_(), bias.to(device), grad.to(device)


def _router_linear_inputs(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = seeded()
    x = torch.randn(2048, 512, generator=generator).to(device, BF16).requires_grad_()
    weight, grad = (torch.randn(rows, cols, generator=generator) for rows, cols in ((64, 512), (2048, 64)))
    return x, weight.to(device), grad.to(device)


def _route(logits: Tensor, bias: Tensor) -> Tensor:
    return route(logits, bias, n_group=8, topk_group=4, topk=6, scale=2.5, normalize=True).gates


def _torch_route(logits: Tensor, bias: Tensor) -> Tensor:
    scores = logits.sigmoid()
    biased = (scores + bias).view(-1, 8, 8)
    groups = biased.topk(2, dim=-1).values.sum(-1).topk(4, dim=-1).indices
    mask = torch.zeros_like(biased[..., 0]).scatter_(1, groups, 1.0).bool()
    ids = biased.masked_fill(~mask[..., None], float("-inf")).flatten(1).topk(6, dim=-1).indices
    return F.normalize(scores.gather(1, ids), p=1.0, dim=-1) * 2.5


def _balance_inputs(device: torch.device) -> tuple[Tensor, Tensor]:
    scores = torch.randn(4, 512, 64, generator=seeded()).sigmoid().to(device)
    return scores.requires_grad_(), torch.ones((), device=device)


def _torch_balance(scores: Tensor) -> Tensor:
    counts = torch.zeros_like(scores).scatter_(-1, scores.topk(6, dim=-1).indices, 1.0).sum(1)
    return (counts * (64 / (6 * 512)) * F.normalize(scores, p=1.0, dim=-1).mean(1)).sum()


def _activations(device: torch.device) -> tuple[Tensor]:
    return (torch.randn(2048, 512, generator=seeded()).to(device, BF16),)


def _swiglu_inputs(device: torch.device) -> tuple[Tensor, Tensor]:
    generator = seeded()
    gate_up = torch.randn(4096, 512, generator=generator).to(device, BF16)
    return gate_up.requires_grad_(), torch.randn(4096, 256, generator=generator).to(device, BF16)


def _gated_inputs(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    gate_up, grad = _swiglu_inputs(device)
    return gate_up, torch.rand(4096, generator=seeded(seed=1)).to(device), grad


def _kept_inputs(device: torch.device) -> tuple[Quantized, Tensor, Tensor]:
    gate_up, gates, grad = _gated_inputs(device)
    return quantize_tiles(gate_up, power_of_two=True), gates, grad


def _torch_swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _torch_gated_swiglu(gate_up: Tensor, gates: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.silu(gate) * up * gates[:, None]).to(gate_up.dtype)


def _activation(kept: Quantized, gates: Tensor) -> Tensor:
    return gated_swiglu(dequantize_tiles(kept, out_dtype=BF16), gates)


def _activation_gradient(kept: Quantized, gates: Tensor, grad: Tensor) -> Tensor:
    gate_up = dequantize_tiles(kept, out_dtype=grad.dtype).requires_grad_()
    return _input_gradient(gated_swiglu)(gate_up, gates, grad)


def _factors(device: torch.device) -> tuple[Factors, ...]:
    payloads = torch.randn(2, 128, 1024, generator=seeded()).mul(100).to(torch.float8_e4m3fn)
    found = [factors(Quantized(payload, torch.ones(8, 128))) for payload in payloads.unbind()]
    return tuple(Factors(each.values.to(device), each.powers.to(device)) for each in found)


# FP32 accumulation in another order: sqrt(512) roundings of 2^-24; measured 2.5e-7.
ACCUMULATION = 22.7 * 2**-24
ROWS: dict[str, list[Case]] = {
    "adamw": [pair(
        "adamw", _adamw_inputs, _adamw, _torch_adamw, "torch fused AdamW",
        # About eight fp32 roundings (2^-24 each) of an update that is itself small beside the weight.
        tolerance=2**-21, flops=14.0 * (1 << 20), bytes=7 * 4.0 * (1 << 20),
    )],
    "attention": [pair(
        "attention_forward_backward", _attention_inputs,
        partial(_attention, partial(causal_attention, scale=96**-0.5, documents=None)),
        partial(_attention, partial(F.scaled_dot_product_attention, is_causal=True, scale=96**-0.5)),
        "F.scaled_dot_product_attention",
        # Four bf16 roundings more than the peer (scores, probabilities, both gradients), each at most 2^-8
        # and 2^-8 / sqrt(3) in the mean square: below 2^-7 in the Frobenius norm.
        tolerance=2**-7,
        # Causal: half of two forward and five backward GEMMs (the scores are made again).
        flops=0.5 * 7 * 2 * 32 * 256 * 256 * 96, bytes=2.0 * 10 * 32 * 256 * 96,
    )],
    "block_ranges": [pair(
        "quantize_range", _matrix_range,
        lambda values: _quantize_range(values).view(2048, 512), lambda values: _torch_blocks(values.view(2048, 512)),
        "max_pool2d and repeated scales", tolerance=0.0, bytes=9.0 * 2048 * 512,
    ), pair(
        "transpose_blocks", lambda device: (_matrix(device)[0].to(torch.float8_e4m3fn),),
        transpose_blocks, lambda payload: payload.view(torch.uint8).t().contiguous().view(payload.dtype),
        "torch, transposed copy", tolerance=0.0, bytes=2.0 * 2048 * 512,
    )],
    "cross_entropy": [pair(
        "cross_entropy_rows", _cross_entropy_inputs, _cross_entropy, _torch_cross_entropy,
        "F.cross_entropy on fp32 logits",
        # Both round one fp32 gradient to bf16: at most one rounding (2^-8) apart.
        tolerance=2**-8, flops=8.0 * 2048 * 2048, bytes=2 * 2.0 * 2048 * 2048,
    ), pair(
        "linear_cross_entropy", _head_inputs, _head, _torch_head, "F.linear, F.cross_entropy on fp32 logits",
        # The same roundings of the same sums: where one tips, a bf16 number is one rounding (2^-8) apart.
        tolerance=2**-8, flops=6.0 * 2048 * 2048 * 256, bytes=(2 * 2 + 2 + 8) * 2048.0 * 256,
    )],
    "e5m6": [pair(
        "pack_unpack_e5m6",
        _activations,
        lambda x: unpack_e5m6(*pack_e5m6(x, power_of_two=True), out_dtype=BF16),
        lambda x: x.half().bfloat16(), "through FP16, no scales: the shortest such path in torch",
        # BF16 has one mantissa bit more, so half of the numbers are exact and half are on a tie: sqrt(3/2) times
        # the error of evenly spread numbers, which is an eighth of E4M3's 0.0265.
        tolerance=0.0042, bytes=7.0 * 2048 * 512,
    ), pair(
        # The quantisers are the same.
        "quantize_pack_e5m6", _activations,
        lambda x: quantize_pack(x, power_of_two=True)[0].payload,
        lambda x: (pack_e5m6(x, power_of_two=True), quantize_tiles(x, power_of_two=True).payload)[1],
        "pack_e5m6, then quantize_tiles", tolerance=0.0, bytes=4.5 * 2048 * 512,
    ), pair(
        "unpack_quantize_e5m6",
        lambda device: pack_e5m6(*_activations(device), power_of_two=True),
        lambda *packed: unpack_quantize_transposed(*packed, out_dtype=BF16, power_of_two=True)[1].payload,
        lambda *packed: quantize_tiles_transposed(unpack_e5m6(*packed, out_dtype=BF16), power_of_two=True).payload,
        "unpack_e5m6, then quantize_tiles_transposed", tolerance=0.0, bytes=4.5 * 2048 * 512,
    )],
    "embedding": [pair(
        "embedding", _embedding_inputs, embedding_reference, F.embedding, "torch embedding",
        # A gather copies bits.
        tolerance=0.0, bytes=2 * 2048 * 256 * 4.0,
    )],
    "experts_in_chunks": [pair(
        "fp8_experts_in_chunks", _expert_inputs,
        partial(_expert_gradients, partial(fp8_experts_in_chunks, max_rows=512)),
        partial(_expert_gradients, fp8_experts),
        # The same bits in less memory; the peer multiplies gate and up once.
        "fp8_experts", tolerance=0.0, flops=22.0 * 2048 * 512 * 256, bytes=2.0 * 2 * 2048 * 512,
    )],
    "fp8_linear": [pair(
        "fp8_linear_forward_backward", _linear_inputs,
        partial(_linear_gradients, partial(fp8_linear, power_of_two=False)),
        partial(_linear_gradients, F.linear), "torch.nn.functional.linear, FP32",
        # docs/numerics.md expects 0.037 for dx and 0.0445 for dW.
        tolerance=0.0455, flops=6.0 * 2048 * 512 * 512, bytes=4.0 * (5 * 2048 * 512 + 2 * 512 * 512),
    )],
    # A gather copies bits, and the quantisers are the same.
    "gather": [pair(
        "gather_tiles", _gather_inputs,
        lambda x, tokens, slots: gather_tiles(tokens, slots, 2).payload,
        lambda x, tokens, slots: quantize_tiles(_rows(x, slots), power_of_two=True).payload,
        "index of BF16 tokens, then quantize_tiles", tolerance=0.0, bytes=2.0 * 2 * 2048 * 256,
    ), pair(
        "gather_requantize_transposed", _gather_inputs,
        lambda x, tokens, slots: gather_requantize_transposed(tokens, slots, 2, power_of_two=True).payload,
        lambda x, tokens, slots: requantize_transposed(
            quantize_tiles(_rows(x, slots), power_of_two=True), power_of_two=True
        ).payload,
        "index, quantize_tiles, requantize_transposed", tolerance=0.0, bytes=2.0 * 2 * 2048 * 256,
    ), pair(
        "gather_quantize_both", _gather_inputs,
        lambda x, tokens, slots: gather_quantize_both(x, slots, 2, power_of_two=True)[1].payload,
        lambda x, tokens, slots: quantize_tiles_both(_rows(x, slots), power_of_two=True)[1].payload,
        "index of BF16 tokens, then quantize_tiles_both", tolerance=0.0, bytes=4.0 * 2 * 2048 * 256,
    )],
    "gemm_fp8": [pair(
        "gemm_tile_block", _gemm_inputs,
        lambda a, blocks, *_: gemm_tile_block(a, blocks, out_dtype=torch.float32),
        lambda a, blocks, tiles, x, w: x @ w.t(), "torch.matmul, FP32, dequantised before",
        tolerance=ACCUMULATION, flops=2.0 * 2048 * 512 * 512, bytes=2048 * 512 + 512 * 512 + 4.0 * 2048 * 512,
    ), pair(
        "gemm_tile_tile", _gemm_inputs,
        lambda a, blocks, tiles, *_: gemm_tile_tile(a, tiles),
        lambda a, blocks, tiles, x, w: x @ dequantize_tiles(tiles).t(), "dequantise, torch.matmul, FP32",
        tolerance=ACCUMULATION, flops=2.0 * 2048 * 512 * 512, bytes=2048 * 512 + 512 * 512 + 4.0 * 2048 * 512,
    )],
    "gemm_grouped": [pair(
        "grouped_gemm_tile_block", _grouped_gemm_inputs,
        lambda a, b, ends, *_: grouped_gemm_tile_block(a, b, ends, out_dtype=torch.float32),
        lambda a, b, ends, x, w: torch.bmm(x, w.mT).flatten(0, 1), "torch.bmm, FP32, dequantised before",
        tolerance=ACCUMULATION,
        flops=2.0 * 8 * 512 * 256 * 512, bytes=8 * (512 * 512 + 256 * 512 + 4.0 * 512 * 256),
    )],
    "grad_norm": [pair(
        "sums_of_squares", lambda device: (torch.randn(1 << 20, generator=seeded(device), device=device),),
        lambda x: sums_of_squares(x).sum(), lambda x: torch.linalg.vector_norm(x, dtype=torch.float64).square(),
        "torch.linalg.vector_norm in FP64",
        # On a CPU FP32 norms of 128 numbers, whose errors average out over 8,192 of them.
        tolerance=2**-22, flops=2.0 * (1 << 20), bytes=4.0 * (1 << 20),
    )],
    "permute": [pair(
        "grouping", lambda device: (torch.rand(2048, 64, generator=seeded()).topk(6, dim=-1).indices.to(device),),
        lambda ids: grouping(ids, 64).rows_of_token, _torch_layout, "cumsum of one-hot, one map only",
        tolerance=0.0, bytes=8.0 * 3 * 2048 * 6,
    ), pair(
        "group_combine_forward_backward", _permute_inputs, _input_gradient(_permute),
        _input_gradient(_torch_permute), "index_select + index_add, no padding",
        # The peer's index_select adds two bf16 gradients in bf16, ours in fp32: one bf16 rounding, at most 2^-8.
        tolerance=2**-8, bytes=2.0 * 256 * (4 * 2048 + 6 * 4096),
    )],
    # The peers round the same quotients, so payloads are bit-equal. Each reads FP32 and writes E4M3.
    "quantize": [pair(
        "quantize_tiles", _matrix,
        lambda x: quantize_tiles(x, power_of_two=False).payload,
        _torch_tiles, "one view [rows, tiles, 128]", tolerance=0.0, bytes=5.0 * 2048 * 512,
    ), pair(
        "quantize_tiles_transposed", _matrix,
        lambda x: quantize_tiles_transposed(x, power_of_two=False).payload,
        lambda x: quantize_tiles(x.t().contiguous(), power_of_two=False).payload,
        "transpose in FP32, then quantize_tiles", tolerance=0.0, bytes=5.0 * 2048 * 512,
    ), pair(
        "quantize_blocks", _matrix,
        lambda w: quantize_blocks(w, power_of_two=False).payload,
        _torch_blocks, "max_pool2d and repeated scales", tolerance=0.0, bytes=5.0 * 2048 * 512,
    )],
    "rmsnorm": [pair(
        "rmsnorm_forward_backward", _rmsnorm_inputs,
        lambda x, weight, grad: torch.autograd.grad(rmsnorm(x, weight, 1e-6), (x, weight), grad)[0],
        lambda x, w, grad: torch.autograd.grad(F.rms_norm(x, w.shape, w, 1e-6), (x, w), grad)[0], "F.rms_norm",
        # One bf16 rounding (2^-8 at most): the peer may round an intermediate once more than we do.
        tolerance=2**-8, flops=16.0 * 2048 * 256, bytes=5 * 2.0 * 2048 * 256,
    ), pair(
        "add_norm_quantize", _norm_inputs, _add_norm_quantize, _torch_norm_tiles, "add, norm and quantise apart",
        # The same roundings; where a GPU's rstd differs in its last place, a BF16 number may tip, and one E4M3 number
        # in sixteen of those by 2^-4.
        tolerance=2**-8, bytes=(7 + 4 / TILE) * 2048 * 512,
    ), pair(
        "norm_again", _norm_of_sum, lambda x, weight, rstd: norm_again(x, weight, rstd, True, True, False)[0],
        _torch_norm_again, "norm, quantise and regroup apart",
        # As above.
        tolerance=2**-8, bytes=(3 + 4 / TILE) * 2048 * 512,
    ), pair(
        "norm_backward", _norm_gradients, _norm_backward, _torch_norm_backward,
        "F.rms_norm, autograd, four gradients added apart",
        # One bf16 rounding (2^-8 at most): the peer may round an intermediate once more than we do.
        tolerance=2**-8, bytes=(6 * 2.0 + 0.5) * 2048 * 512,
    )],
    "rope": [pair(
        "rope", _rope_inputs, apply_rope, apply_rope_reference, "torch, elementwise",
        # One bf16 rounding (2^-8 at most): a fused multiply-add may move a result across a rounding edge.
        tolerance=2**-8, flops=3.0 * 8 * 4 * 256 * 32, bytes=2.0 * 2 * 8 * 4 * 256 * 32,
    )],
    "heads": [pair(
        # The three below round the same numbers in the same order, so both sides have the same bits; peers quantise
        # for dgrad only.
        "heads_forward", _heads_inputs, _heads, _torch_heads, "torch: turns, cat",
        tolerance=0.0, bytes=(2 * 192 + 192 + 2 * 64) * 2.0 * 2048 * 4,
    ), pair(
        "turn_back_quantize_both", _heads_inputs,
        lambda dq, _, __, cos, sin: turn_back_quantize_both(dq, cos, sin, True)[0],
        _torch_turn_back, "torch: turn, cat, then quantize_tiles", tolerance=0.0, bytes=4.0 * 192 * 2048 * 4,
    ), pair(
        "heads_quantize_both", _heads_inputs, lambda dk, dv, *_: heads_quantize_both(dk, dv[..., :128], 128, True)[0],
        _torch_join, "torch: cat, then quantize_tiles", tolerance=0.0, bytes=4.0 * 256 * 2048 * 4,
    )],
    "router": [pair(
        "route_forward_backward", _router_inputs, _input_gradient(_route), _input_gradient(_torch_route),
        "torch.topk, autograd",
        # The same fp32 quotients, sums of six and differences in another order: a few fp32 epsilons (2^-23).
        tolerance=4 * 2**-23, bytes=4.0 * 4 * 2048 * 64,
    ), pair(
        "sequence_balance_forward_backward", _balance_inputs,
        _input_gradient(lambda scores: sequence_balance(scores, 6)), _input_gradient(_torch_balance),
        "torch.topk, scatter, autograd",
        # Sums of 64 scores, then of 512 shares, in another order: a few fp32 epsilons (2^-23).
        tolerance=16 * 2**-23, bytes=4.0 * 3 * 2048 * 64,
    )],
    "router_linear": [pair(
        "router_linear_forward_backward", _router_linear_inputs, _input_gradient(router_linear),
        _input_gradient(lambda x, weight: x.float() @ weight.t()), "torch.matmul, FP32, autograd",
        # One bf16 rounding (2^-8 at most) of FP32 sums whose last bits differ.
        tolerance=2**-8, flops=4.0 * 2048 * 512 * 64, bytes=4.0 * 2048 * 512 + 8.0 * 64 * (2048 + 512),
    )],
    "swiglu": [pair(
        "swiglu_forward_backward", _swiglu_inputs, _input_gradient(swiglu),
        _input_gradient(_torch_swiglu), "F.silu(gate) * up, autograd",
        # The same bf16 operations in the same order; one bf16 rounding (2^-8) for another way to silu.
        tolerance=2**-8, flops=12.0 * 4096 * 256, bytes=9 * 2.0 * 4096 * 256,
    ), pair(
        "gated_swiglu_forward_backward", _gated_inputs, _input_gradient(gated_swiglu),
        _input_gradient(_torch_gated_swiglu), "(F.silu(gate) * up * gates) in fp32, autograd",
        # Both compute in fp32 and round the gradient to bf16 once: equal but where fp32 is on a bf16 tie.
        tolerance=2**-12, flops=14.0 * 4096 * 256, bytes=9 * 2.0 * 4096 * 256,
    ), pair(
        # The next three round the same numbers in the same order, so both sides have the same bits.
        "swiglu_quantize", _gated_inputs,
        lambda gate_up, gates, _: swiglu_quantize(gate_up, gates, power_of_two=True)[1].payload,
        lambda gate_up, gates, _: quantize_tiles(gated_swiglu(gate_up, gates), power_of_two=True).payload,
        "gated_swiglu, then quantize_tiles (without the kept input)", tolerance=0.0, bytes=7.0 * 4096 * 256,
    ), pair(
        "swiglu_quantize_transposed", _kept_inputs,
        lambda kept, gates, _: swiglu_quantize_transposed(kept, gates, dtype=BF16, power_of_two=True).payload,
        lambda kept, gates, _: quantize_tiles_transposed(_activation(kept, gates), power_of_two=True).payload,
        "dequantize_tiles, gated_swiglu, quantize_tiles_transposed", tolerance=0.0, bytes=3.0 * 4096 * 256,
    ), pair(
        "gated_swiglu_backward_kept", _kept_inputs,
        lambda kept, gates, grad: gated_swiglu_backward_kept(kept, gates, grad)[0],
        _activation_gradient, "dequantize_tiles, gated_swiglu, autograd",
        tolerance=0.0, flops=14.0 * 4096 * 256, bytes=8.0 * 4096 * 256,
    ), pair(
        "swiglu_backward_quantize_both", _kept_inputs,
        lambda kept, gates, grad: swiglu_backward_quantize_both(kept, gates, grad, power_of_two=True)[1].payload,
        lambda kept, gates, grad: quantize_tiles_both(
            gated_swiglu_backward_kept(kept, gates, grad)[0], power_of_two=True
        )[1].payload,
        "gated_swiglu_backward_kept, then quantize_tiles_both",
        # The same expressions: the same bits, unless a compiler fuses other multiply-adds; a tipped BF16 number moves
        # one E4M3 number in sixteen by up to 2^-4 of itself.
        tolerance=5e-3, flops=14.0 * 4096 * 256, bytes=8.0 * 4096 * 256,
    )],
    "hopper_accumulation": [pair(
        "hopper_accumulation", _factors, partial(hopper_matmul_reference, promotion_interval=128),
        lambda a, b: a.values @ b.values.t(), "torch.matmul, FP32",
        # Four groups of 32 per promotion, each cut by up to 33 x 2^-13 of its largest term; measured 7e-4.
        tolerance=4e-3, flops=2.0 * 128 * 128 * 1024, bytes=4.0 * (2 * 128 * 1024 + 128 * 128),
    )],
    "linear": [pair(
        "ablated_linear_forward",
        lambda device: torch.randn(2, 256, 512, generator=seeded()).to(device).unbind(),
        AblatedLinears(Ablation(), power_of_two=True).linear, partial(fp8_linear, power_of_two=True), "fp8_linear",
        # Nothing changed: on a CPU equal bits; a GPU's kernel sums in another order, with some 14 bits inside a tile.
        tolerance=1e-3, flops=2.0 * 256 * 256 * 512, bytes=4.0 * (2 * 256 * 512 + 256 * 256),
    )],
}  # fmt: skip


def cases() -> list[Case]:
    """Every row, in order of file.

    Raises:
        ValueError: two rows share a name, or one has a name that cannot be typed.
    """
    found = [case for each in ROWS.values() for case in each]
    odd = [case.name for case in found if not re.fullmatch(r"\w+", case.name, re.ASCII)]
    if odd:
        raise ValueError(f"bench rows {odd}: use letters, digits and underscores, for `--only` to take the name")
    names = [case.name for case in found]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"bench rows {repeated} appear twice; give each its own name")
    return found


def chosen(name: str | None) -> list[Case]:
    """The row of that name, else the rows of the kernel file of that name; None: every row.

    Raises:
        ValueError: there is neither; says which name is nearest.
    """
    everything = cases()
    found = [case for case in everything if name in (None, case.name)] or ROWS.get(str(name), [])
    if not found:
        names = [*(case.name for case in everything), *ROWS]
        near = difflib.get_close_matches(str(name).lower()[:100], names, n=1, cutoff=0.0)[0]
        raise ValueError(f"--only {name} is no case and no kernel file: did you mean {near}? --help lists them")
    return found
