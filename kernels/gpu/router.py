"""Device code of `kernels.router`: scores, choice, gates and counts of a block of tokens in one kernel.

    score   = 1 / (1 + e^-logit)
    key     = the bits of score + bias as an int32 that sorts like the number, NaN above infinity
    choice  = topk times: the largest key, of equal keys the lowest id; its key is then the lowest of all

Comparing integers settles every case alike: a NaN is chosen first, as torch's sort does, an expert of an excluded group
has the key of -inf, what was chosen before or pads a block has one below that, and an id is always one of the block.
Scores and keys stay in registers. Counts of `route` are integers: any order of the atomic additions gives the same.
The balance loss is added up by blocks in a fixed order, its gradient is one more kernel.

Shapes: a block is [TOKENS, GROUPS * SIZE], where GROUPS and SIZE are n_group and the group size rounded up to powers of
two, so a *place* of the block is no id where they differ. Offsets are int64. Source: arXiv:2412.19437 §2.1.2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Scores of a program, and its warps: one token of V3 (256 experts) a warp. Not measured on a GPU.
ELEMENTS, WARPS = 1024, 4
# Blocks of tokens that a program of the balance loss adds up: 64 programs for a sequence of V3.
STEPS = 16

# Below every key of a number.
LOWEST = tl.constexpr(-(2**31))
KEY_OF_MINUS_INFINITY = tl.constexpr(-(2**31) + 0x007FFFFF)


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x), fp32; below -88 it stays at 6e-39."""
    # e^y = 2^n e^r with y = n ln 2 + r: n times the first part of ln 2 is exact, so the error does not grow with |x|.
    y = tl.clamp(-x, -87.0, 88.0, propagate_nan=tl.PropagateNan.ALL)
    n = tl.floor(y * 1.4426950408889634 + 0.5)
    r = (y - n * 0.693359375) + n * 2.1219444005469057e-4
    exponential = tl.exp2(r * 1.4426950408889634) * tl.exp2(n)
    return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), 1.0 + exponential)


@triton.jit
def key_of(x):
    """int32 in the order of x, fp32 without -0; NaN is the largest."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def number_of(key):
    """The inverse of `key_of`."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def first_of_largest(key, place, AXIS: tl.constexpr):
    """Along an axis the place of the largest key, of equal keys the lowest; `place` has key's shape."""
    largest = tl.expand_dims(tl.max(key, axis=AXIS), AXIS)
    return tl.min(tl.where(key == largest, place, 0x7FFFFFFF), axis=AXIS)


@triton.jit
def keep_best_groups(key, N_GROUP: tl.constexpr, TOPK_GROUP: tl.constexpr, GROUP_SIZE: tl.constexpr):
    """key [TOKENS, GROUPS, SIZE], outside the groups with the largest sums of two that of -inf."""
    member = tl.broadcast_to(tl.arange(0, key.shape[2])[None, None, :], key.shape)
    first = tl.max(key, axis=2)  # [TOKENS, GROUPS]
    total = number_of(first)
    if GROUP_SIZE > 1:
        rest = tl.where(member == first_of_largest(key, member, 2)[:, :, None], LOWEST, key)
        total += number_of(tl.max(rest, axis=2))
    group = tl.broadcast_to(tl.arange(0, key.shape[1])[None, :], first.shape)
    group_key = tl.where(group < N_GROUP, key_of(total), LOWEST)
    for _ in tl.static_range(TOPK_GROUP):
        group_key = tl.where(group == first_of_largest(group_key, group, 1)[:, None], LOWEST, group_key)
    # A group that was taken has the lowest key.
    return tl.where(group_key[:, :, None] == LOWEST, key, KEY_OF_MINUS_INFINITY)


@triton.jit(do_not_specialize=["tokens"])
def _route_kernel(
    logits_ptr, bias_ptr, scores_ptr, ids_ptr, gates_ptr, counts_ptr, tokens, scale, N_GROUP: tl.constexpr,
    GROUP_SIZE: tl.constexpr, TOPK_GROUP: tl.constexpr, TOPK: tl.constexpr, NORMALIZE: tl.constexpr,
    TOKENS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, CHOICES: tl.constexpr,
):  # fmt: skip
    experts: tl.constexpr = N_GROUP * GROUP_SIZE
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    place = tl.arange(0, GROUPS * SIZE)
    expert = place
    if SIZE != GROUP_SIZE:
        expert = place // SIZE * GROUP_SIZE + place % SIZE
    real = (place % SIZE < GROUP_SIZE) & (place // SIZE < N_GROUP)
    inside = (token < tokens)[:, None] & real[None, :]
    where = token[:, None] * experts + expert[None, :]
    score = sigmoid(tl.load(logits_ptr + where, mask=inside, other=0.0))
    tl.store(scores_ptr + where, score, mask=inside)

    biased = score + tl.load(bias_ptr + expert, mask=real, other=0.0)[None, :]
    key = tl.where(real[None, :], key_of(biased), LOWEST)  # [TOKENS, GROUPS * SIZE]
    if TOPK_GROUP < N_GROUP:
        grouped = tl.reshape(key, (TOKENS, GROUPS, SIZE))
        key = tl.reshape(keep_best_groups(grouped, N_GROUP, TOPK_GROUP, GROUP_SIZE), (TOKENS, GROUPS * SIZE))
        key = tl.where(real[None, :], key, LOWEST)

    places = tl.broadcast_to(place[None, :], (TOKENS, GROUPS * SIZE))
    choice = tl.arange(0, CHOICES)
    chosen = tl.zeros((TOKENS, CHOICES), tl.int32)
    gate = tl.zeros((TOKENS, CHOICES), tl.float32)
    total = tl.zeros((TOKENS,), tl.float32)
    for k in tl.static_range(TOPK):
        best = first_of_largest(key, places, 1)  # [TOKENS]
        is_best = places == best[:, None]
        key = tl.where(is_best, LOWEST, key)
        # One term that is not zero.
        its_score = tl.sum(tl.where(is_best, score, 0.0), axis=1)
        total += its_score
        chosen = tl.where(choice[None, :] == k, best[:, None], chosen)
        gate = tl.where(choice[None, :] == k, its_score[:, None], gate)
    if NORMALIZE:
        gate = tl.div_rn(gate, tl.broadcast_to((total + 1e-20)[:, None], (TOKENS, CHOICES)))
    if SIZE != GROUP_SIZE:
        chosen = chosen // SIZE * GROUP_SIZE + chosen % SIZE
    inside = (token < tokens)[:, None] & (choice < TOPK)[None, :]
    where = token[:, None] * TOPK + choice[None, :]
    tl.store(ids_ptr + where, chosen.to(tl.int64), mask=inside)
    tl.store(gates_ptr + where, gate * scale, mask=inside)
    one = tl.full((TOKENS, CHOICES), 1, tl.int64)
    tl.atomic_add(counts_ptr + chosen, one, mask=inside, sem="relaxed")


@triton.jit(do_not_specialize=["tokens"])
def _route_backward_kernel(
    scores_ptr, ids_ptr, grad_scores_ptr, grad_gates_ptr, grad_logits_ptr, tokens, scale, EXPERTS: tl.constexpr,
    TOPK: tl.constexpr, NORMALIZE: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """With c the chosen scores and G their gradients times scale: dc_k = G_k / sum c - sum_j G_j c_j / (sum c)^2."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, WIDTH)
    inside = (token < tokens)[:, None] & (expert < EXPERTS)[None, :]
    where = token[:, None] * EXPERTS + expert[None, :]
    score = tl.load(scores_ptr + where, mask=inside, other=0.0)
    grad = tl.zeros((TOKENS, WIDTH), tl.float32)
    if grad_scores_ptr is not None:
        grad = tl.load(grad_scores_ptr + where, mask=inside, other=0.0)
    if grad_gates_ptr is not None:
        exists = token < tokens
        total = tl.zeros((TOKENS,), tl.float32)
        grad_total = tl.zeros((TOKENS,), tl.float32)
        if NORMALIZE:
            for k in tl.static_range(TOPK):
                chosen = tl.load(ids_ptr + token * TOPK + k, mask=exists, other=0)
                total += tl.load(scores_ptr + token * EXPERTS + chosen, mask=exists, other=0.0)
            total += 1e-20
            for k in tl.static_range(TOPK):
                chosen = tl.load(ids_ptr + token * TOPK + k, mask=exists, other=0)
                its_score = tl.load(scores_ptr + token * EXPERTS + chosen, mask=exists, other=0.0)
                grad_gate = tl.load(grad_gates_ptr + token * TOPK + k, mask=exists, other=0.0) * scale
                grad_total -= grad_gate * tl.div_rn(tl.div_rn(its_score, total), total)
        for k in tl.static_range(TOPK):
            chosen = tl.load(ids_ptr + token * TOPK + k, mask=exists, other=0)
            grad_score = tl.load(grad_gates_ptr + token * TOPK + k, mask=exists, other=0.0) * scale
            if NORMALIZE:
                grad_score = tl.div_rn(grad_score, total) + grad_total
            grad = tl.where(expert[None, :] == chosen[:, None], grad + grad_score[:, None], grad)
    tl.store(grad_logits_ptr + where, grad * (1.0 - score) * score, mask=inside)


@triton.jit(do_not_specialize=["tokens", "parts"])
def _sequence_balance_kernel(
    scores_ptr, counts_ptr, shares_ptr, tokens, parts, EXPERTS: tl.constexpr, TOPK: tl.constexpr, TOKENS: tl.constexpr,
    STEPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Of STEPS * TOKENS tokens of a sequence: how often each expert is among the top-k, and its share of the scores."""
    part, sequence = tl.program_id(0), tl.program_id(1)
    expert = tl.arange(0, WIDTH)
    real = expert < EXPERTS
    experts = tl.broadcast_to(expert[None, :], (TOKENS, WIDTH))
    count = tl.zeros((WIDTH,), tl.float32)
    share = tl.zeros((WIDTH,), tl.float32)
    for step in range(STEPS):
        token = (part * STEPS + step).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
        exists = token < tokens
        place = (sequence.to(tl.int64) * tokens + token)[:, None] * EXPERTS + expert[None, :]
        score = tl.load(scores_ptr + place, mask=exists[:, None] & real[None, :], other=0.0)
        total = tl.where(exists, tl.sum(score, axis=1), 1.0)
        share += tl.sum(tl.div_rn(score, tl.broadcast_to(total[:, None], (TOKENS, WIDTH))), axis=0)
        key = tl.where(real[None, :], key_of(score), LOWEST)
        for _ in tl.static_range(TOPK):
            is_best = experts == first_of_largest(key, experts, 1)[:, None]
            key = tl.where(is_best, LOWEST, key)
            count += tl.sum(tl.where(is_best & exists[:, None], 1.0, 0.0), axis=0)
    place = (sequence.to(tl.int64) * parts + part) * EXPERTS + expert
    tl.store(counts_ptr + place, count, mask=real)
    tl.store(shares_ptr + place, share, mask=real)


@triton.jit(do_not_specialize=["sequences", "tokens", "parts"])
def _sum_balance_kernel(
    counts_ptr, shares_ptr, loss_ptr, f_ptr, sequences, tokens, parts, EXPERTS: tl.constexpr, TOPK: tl.constexpr,
    PARTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One program adds up the parts in a fixed order."""
    expert = tl.arange(0, WIDTH)
    real = expert < EXPERTS
    per_token = tl.full((WIDTH,), tokens, tl.float32)
    loss = tl.zeros((WIDTH,), tl.float32)
    for sequence in range(sequences):
        count = tl.zeros((WIDTH,), tl.float32)
        share = tl.zeros((WIDTH,), tl.float32)
        for first in range(0, parts, PARTS):
            part = first + tl.arange(0, PARTS)
            place = (sequence * parts + part)[:, None] * EXPERTS + expert[None, :]
            inside = (part < parts)[:, None] & real[None, :]
            count += tl.sum(tl.load(counts_ptr + place, mask=inside, other=0.0), axis=0)
            share += tl.sum(tl.load(shares_ptr + place, mask=inside, other=0.0), axis=0)
        f = count * tl.div_rn(tl.full((WIDTH,), EXPERTS, tl.float32), TOPK * per_token)
        tl.store(f_ptr + sequence * EXPERTS + expert, f, mask=real)
        loss += f * tl.div_rn(share, per_token)
    tl.store(loss_ptr, tl.sum(loss, axis=0))


@triton.jit(do_not_specialize=["tokens", "tokens_per_sequence"])
def _sequence_balance_backward_kernel(
    grad_ptr, scores_ptr, f_ptr, out_ptr, tokens, tokens_per_sequence, EXPERTS: tl.constexpr, TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """With S the sum of a token's scores s and g = grad f / tokens: ds = g / S - sum_j g_j s_j / S^2."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, WIDTH)
    exists = (token < tokens)[:, None]
    inside = exists & (expert < EXPERTS)[None, :]
    score = tl.load(scores_ptr + token[:, None] * EXPERTS + expert[None, :], mask=inside, other=0.0)
    f = tl.load(f_ptr + (token // tokens_per_sequence)[:, None] * EXPERTS + expert[None, :], mask=inside, other=0.0)
    grad = tl.div_rn(tl.load(grad_ptr) * f, tl.full((TOKENS, WIDTH), tokens_per_sequence, tl.float32))
    total = tl.broadcast_to(tl.where(exists, tl.sum(score, axis=1)[:, None], 1.0), (TOKENS, WIDTH))
    grad_total = tl.sum(-grad * tl.div_rn(tl.div_rn(score, total), total), axis=1)
    out = tl.div_rn(grad, total) + grad_total[:, None]
    tl.store(out_ptr + token[:, None] * EXPERTS + expert[None, :], out, mask=inside)


def route(
    logits: Tensor, bias: Tensor, n_group: int, topk_group: int, topk: int, scale: float, normalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits [tokens, experts], bias [experts] -> scores, ids and gates [tokens, topk], counts [experts]."""
    assert logits.dtype == bias.dtype == torch.float32, (logits.dtype, bias.dtype)
    logits, bias = logits.contiguous(), bias.contiguous()
    tokens, experts = logits.shape
    group_size = experts // n_group
    assert group_size * n_group == experts, (experts, n_group)
    assert topk <= topk_group * group_size, (topk, topk_group, group_size)
    scores = torch.empty_like(logits)
    ids = logits.new_empty(tokens, topk, dtype=torch.int64)
    gates = logits.new_empty(tokens, topk)
    counts = logits.new_zeros(experts, dtype=torch.int64)
    if tokens:
        groups, size = triton.next_power_of_2(n_group), triton.next_power_of_2(group_size)
        tokens_per_program = max(1, ELEMENTS // (groups * size))
        _route_kernel[(triton.cdiv(tokens, tokens_per_program),)](
            logits, bias, scores, ids, gates, counts, tokens, scale, N_GROUP=n_group, GROUP_SIZE=group_size,
            TOPK_GROUP=topk_group, TOPK=topk, NORMALIZE=normalize, TOKENS=tokens_per_program, GROUPS=groups, SIZE=size,
            CHOICES=triton.next_power_of_2(topk), num_warps=WARPS,
        )  # fmt: skip
    return scores, ids, gates, counts


def route_backward(
    scores: Tensor, ids: Tensor, grad_scores: Tensor | None, grad_gates: Tensor | None, scale: float, normalize: bool
) -> Tensor:
    """Gradients of scores [tokens, experts] and gates [tokens, topk], or None -> of logits [tokens, experts]."""
    assert scores.dtype == torch.float32, scores.dtype
    scores, ids = scores.contiguous(), ids.contiguous()
    tokens, experts = scores.shape
    grad_logits = torch.empty_like(scores)
    if scores.numel():
        width = triton.next_power_of_2(experts)
        tokens_per_program = max(1, ELEMENTS // width)
        _route_backward_kernel[(triton.cdiv(tokens, tokens_per_program),)](
            scores, ids, None if grad_scores is None else grad_scores.contiguous(),
            None if grad_gates is None else grad_gates.contiguous(), grad_logits, tokens, scale, EXPERTS=experts,
            TOPK=ids.shape[1], NORMALIZE=normalize, TOKENS=tokens_per_program, WIDTH=width, num_warps=WARPS,
        )  # fmt: skip
    return grad_logits


def sequence_balance(scores: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """[sequences, tokens, experts] -> the loss, fp32 scalar, and f [sequences, experts]."""
    assert scores.dtype == torch.float32, scores.dtype
    scores = scores.contiguous()
    sequences, tokens, experts = scores.shape
    assert topk <= experts, (topk, experts)
    width = triton.next_power_of_2(experts)
    tokens_per_step = max(1, ELEMENTS // width)
    parts = triton.cdiv(tokens, tokens_per_step * STEPS)
    counts, shares = (scores.new_empty(sequences, parts, experts) for _ in range(2))
    loss, f = scores.new_empty(()), scores.new_empty(sequences, experts)
    if parts * sequences:
        _sequence_balance_kernel[parts, sequences](
            scores, counts, shares, tokens, parts, EXPERTS=experts, TOPK=topk, TOKENS=tokens_per_step, STEPS=STEPS,
            WIDTH=width, num_warps=WARPS,
        )  # fmt: skip
    _sum_balance_kernel[(1,)](
        counts, shares, loss, f, sequences, tokens, parts, EXPERTS=experts, TOPK=topk, PARTS=tokens_per_step,
        WIDTH=width, num_warps=WARPS,
    )  # fmt: skip
    return loss, f


def sequence_balance_backward(grad: Tensor, scores: Tensor, f: Tensor) -> Tensor:
    """Gradient of the loss, a scalar, and f [sequences, experts] -> of the scores [sequences, tokens, experts]."""
    assert scores.dtype == grad.dtype == torch.float32, (scores.dtype, grad.dtype)
    scores, f = scores.contiguous(), f.contiguous()
    sequences, tokens, experts = scores.shape
    out = torch.empty_like(scores)
    if scores.numel():
        width = triton.next_power_of_2(experts)
        tokens_per_program = max(1, ELEMENTS // width)
        _sequence_balance_backward_kernel[(triton.cdiv(sequences * tokens, tokens_per_program),)](
            grad, scores, f, out, sequences * tokens, tokens, EXPERTS=experts, TOKENS=tokens_per_program, WIDTH=width,
            num_warps=WARPS,
        )  # fmt: skip
    return out
