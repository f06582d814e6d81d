"""How Hopper's FP8 tensor cores add, bit by bit in plain torch (arXiv:2412.19437 §3.3.2, arXiv:2505.09343 §3.1).

    group    32 products of one row and one column, in order of the contraction, and the register so far
    align    to the largest exponent e among the 33 terms
    cut      each term to a multiple of 2^(e - 13), towards zero
    add      exactly
    keep     the sum cut towards zero to 13 fraction bits: an "FP22" register (1 sign, 8 exponent, 13 fraction bits)
    promote  every `promotion_interval` terms: add the register to an FP32 sum, rounded to nearest, and clear it

The reports give 32 products, the largest exponent, 13 fraction bits and FP22; they leave three things open. Chosen:
the register is aligned together with the products; a product's exponent is the sum of its factors' stored exponents
(significands in [1, 2), subnormal ones in (0, 1), their product is not normalised first); bits are cut, not rounded.
It was never compared with a GPU. About 0.7 billion products a second and core.

Shapes: a [m, k], b [n, k], result [m, n].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.formats import TILE, Quantized
from kernels.tiles import decode_e4m3

# Products that one step of the tensor core adds, and the fraction bits it keeps of them.
GROUP = 32
FRACTION_BITS = 13
# Exponent of the smallest normal number; subnormals share it.
SMALLEST_EXPONENT = {torch.float8_e4m3fn: -6, torch.float8_e5m2: -14}
# FP32 exponent field, and the bits of an FP32 fraction that FP22 keeps.
_EXPONENT = 0x7F800000
_FP22 = ~((1 << (23 - FRACTION_BITS)) - 1)
# Rows and columns of the result computed at once: 32 x 64 x 128 products in FP32 are 1 MiB and stay in cache.
_ROWS, _COLS = 64, 128


@dataclass(frozen=True)
class Factors:
    """One operand, fp32 [rows, k]: the values, and 2 to the stored exponent of each; 0 where the value is 0."""

    values: Tensor
    powers: Tensor


def decode(payload: Tensor) -> Tensor:
    """E4M3 or E5M2 as fp32, exactly."""
    return decode_e4m3(payload) if payload.dtype == torch.float8_e4m3fn else payload.float()


def check_interval(interval: int | None) -> None:
    """Raise ValueError unless a promotion interval is None or a positive multiple of 32."""
    if interval is not None and (interval < GROUP or interval % GROUP):
        raise ValueError(f"promotion_interval={interval} must be a positive multiple of {GROUP}, or null for none")


def factors(q: Quantized) -> Factors:
    """Values and stored exponents of payload [rows, k], E4M3 or E5M2, scale [ceil(k/128), rows].

    Raises:
        ValueError: a finite scale is no power of two.
    """
    # payload * scale is exact for powers of two. Inside one tile that changes no bit (aligning and cutting do not see a
    # common factor). Beyond one tile it is what a tensor core would do that took the scales itself, and so an interval
    # above 128 changes the sum alone and not the quantisation.
    fractions = q.scale.view(torch.int32).bitwise_and(~_EXPONENT)
    if bool(((fractions != 0) & q.scale.isfinite()).any()):
        raise ValueError(
            "accumulation=hopper multiplies the scales in before it adds, which is exact for powers of two only: "
            "quantise with power_of_two"
        )
    payload = decode(q.payload)
    powers = payload.view(torch.int32).bitwise_and(_EXPONENT).view(torch.float32)
    powers = powers.clamp_min(2.0 ** SMALLEST_EXPONENT[q.payload.dtype]).masked_fill(payload == 0, 0.0)
    scale = q.scale.t().repeat_interleave(TILE, dim=1)[:, : payload.shape[1]]  # [rows, k]
    return Factors(payload * scale, powers * scale)


def hopper_matmul_reference(a: Factors, b: Factors, *, promotion_interval: int | None) -> Tensor:
    """a @ b.T as Hopper's FP8 tensor cores add it, promoted to FP32 every so many terms; None: at the end only.

    Returns:
        [m, n] fp32. NaN and infinity in a row or column stay in it as NaN.
    """
    check_interval(promotion_interval)
    left, right = _by_group(a), _by_group(b)
    out = a.values.new_empty(a.values.shape[0], b.values.shape[0])
    interval = None if promotion_interval is None else promotion_interval // GROUP
    for top in range(0, out.shape[0], _ROWS):
        rows = slice(top, top + _ROWS)
        for first in range(0, out.shape[1], _COLS):
            cols = slice(first, first + _COLS)
            out[rows, cols] = _sum_groups(_columns(left, rows), _columns(right, cols), interval)
    return out


def _by_group(operand: Factors) -> Factors:
    """[groups, 32, rows]: sums over a group run over a slow dim."""
    padding = -operand.values.shape[1] % GROUP

    def arranged(x: Tensor) -> Tensor:
        groups = (x.shape[1] + padding) // GROUP
        return F.pad(x, (0, padding)).t().reshape(groups, GROUP, x.shape[0]).contiguous()

    return Factors(arranged(operand.values), arranged(operand.powers))


def _columns(operand: Factors, cols: slice) -> Factors:
    return Factors(operand.values[:, :, cols], operand.powers[:, :, cols])


def _sum_groups(a: Factors, b: Factors, interval: int | None) -> Tensor:
    """a [groups, 32, m], b [groups, 32, n] -> [m, n]."""
    groups, _, m = a.values.shape
    register = a.values.new_zeros(m, b.values.shape[2])
    total = torch.zeros_like(register)
    terms = a.values.new_empty(GROUP, *register.shape)
    for group in range(groups):
        if interval is not None and group and group % interval == 0:
            total += register
            register.zero_()
        register = _add_group(register, a, b, group, terms)
    return total + register


def _add_group(register: Tensor, a: Factors, b: Factors, group: int, terms: Tensor) -> Tensor:
    """The register after one group: [m, n] fp32, 13 fraction bits. `terms` [32, m, n] is scratch."""
    torch.mul(a.powers[group, :, :, None], b.powers[group, :, None, :], out=terms)
    largest = torch.maximum(terms.amax(dim=0), register.abs()).view(torch.int32).bitwise_and_(_EXPONENT)
    # 2^(e - 13); any power of two will do where all terms are zero.
    largest = torch.where(largest > FRACTION_BITS << 23, largest - (FRACTION_BITS << 23), 1 << 23)
    quantum = largest.view(torch.float32)  # [m, n]
    steps = 1.0 / quantum
    torch.mul(a.values[group, :, :, None], b.values[group, :, None, :], out=terms)
    # At most 32 terms below 2^15 and a register below 2^14: an integer below 2^21, exact in FP32.
    count = terms.mul_(steps).trunc_().sum(dim=0) + (register * steps).trunc_()
    total = count.mul_(quantum)
    # Clearing low bits cuts towards zero; a quiet NaN keeps the bit that makes it one.
    return total.view(torch.int32).bitwise_and_(_FP22).view(torch.float32)
