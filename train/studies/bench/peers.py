"""DeepSeek-V3's products and memory-bound kernels beside what else the machine has: the candidates of each case.

Peers of the FP8 GEMMs compute the same product: cuBLASLt's block scaling through `torch.nn.functional.scaled_mm`,
DeepGEMM where it can be imported, BF16 through `torch.mm` and `torch.nn.functional.grouped_mm` on the dequantised
operands. The yardstick of memory-bound kernels is a copy of as many bytes. Products that scale by row or by tensor
compute something else and are no peers.

Layouts are prepared before anything is timed, for every candidate.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import deepgemm
from kernels.gemm_fp8 import gemm_tile_block, gemm_tile_tile
from kernels.gemm_grouped import grouped_gemm_tile_block, grouped_gemm_tile_tile
from train.studies.bench.cases import GemmOperands, Shape, decode, decode_blocks, operands, shapes
from train.studies.bench.fused import fused
from train.studies.bench.table import OURS, Case, Contender
from train.studies.bench.timing import Call, Clock
from train.studies.bench.traffic import MemoryBound, MemoryInputs, memory_bound, memory_inputs

# One rounding to BF16, 2^-9 / sqrt(3) * sqrt(2) in the mean square, is 1.6e-3.
BF16_TOLERANCE = 2.5e-3
# Hopper's tensor cores keep about 14 bits inside a block of 128: measured 1.3e-4 on an H100, by three libraries.
FP32_TOLERANCE = 5e-4
# For `small` cases on a CPU, where times mean nothing.
SMALL_CLOCK = Clock(rounds=3, replay_s=0.0, cold_bytes=0.0, least_sets=1)


def ours(op: GemmOperands) -> Call:
    """The public function of the product."""
    a, b, ends, out, accumulate = op.a, op.b, op.group_ends, op.out, op.shape.accumulate
    if out is None:
        if ends is None:
            return lambda: (gemm_tile_block(a, b, out_dtype=torch.bfloat16),)
        return lambda: (grouped_gemm_tile_block(a, b, ends, out_dtype=torch.bfloat16),)
    if ends is None:
        return lambda: (gemm_tile_tile(a, b, out=out, accumulate=accumulate),)
    return lambda: (grouped_gemm_tile_tile(a, b, ends, out=out, accumulate=accumulate),)


def _added(op: GemmOperands, product: Callable[[], Tensor]) -> Call:
    """The product itself, or added to the output by a second launch, where the library cannot do it in one."""
    out = op.out
    if out is None or not op.shape.accumulate:
        return lambda: (product(),)
    return lambda: (out.add_(product()),)


def scaled_mm(op: GemmOperands) -> Call:
    """cuBLASLt's block scaling."""
    tile, block, plain = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128, F.SwizzleType.NO_SWIZZLE
    a, a_scale, b = op.a.payload, op.a.scale.t(), op.b.payload.t()
    if op.shape.is_wgrad:
        b_scale, recipe, dtype = op.b.scale.t(), tile, torch.float32
    else:
        # Scales of blocks are [tiles, row blocks], tiles contiguous and padded to a multiple of 4: ours are copied.
        b_scale = F.pad(op.b.scale, (0, -op.b.scale.shape[1] % 4)).contiguous().t()
        recipe, dtype = block, torch.bfloat16
    how: dict[str, Any] = {"swizzle_a": plain, "swizzle_b": plain, "output_dtype": dtype}
    return _added(op, partial(F.scaled_mm, a, b, a_scale, tile, b_scale, recipe, **how))


def bf16(op: GemmOperands) -> Call:
    """BF16 operands, exact copies of the FP8 ones; those of wgrad are stored [tokens, features]."""
    a = decode(op.a.payload, op.a.scale.t()).bfloat16()
    if op.shape.is_wgrad:
        a, b = a.t().contiguous().t(), decode(op.b.payload, op.b.scale.t()).t().bfloat16().contiguous()
    elif op.group_ends is None:
        b = decode_blocks(op.b.payload, op.b.scale).bfloat16().t()
    else:
        pairs = zip(op.b.payload, op.b.scale, strict=True)
        b = torch.stack([decode_blocks(payload, scale).bfloat16() for payload, scale in pairs]).mT
    if op.group_ends is None:
        return _added(op, partial(torch.mm, a, b))
    return _added(op, partial(F.grouped_mm, a, b, offs=op.group_ends))


def _writes(out: Tensor, launch: Callable[..., object], *args: Any, **kwargs: Any) -> Call:
    """A launch of a library that writes to `out`."""

    def call() -> tuple[Tensor]:
        launch(*args, **kwargs)
        return (out,)

    return call


def deep_gemm(op: GemmOperands) -> Call:
    """DeepGEMM, by the adapter that runs use; rows of groups and packed operands are prepared."""
    deepgemm.library()
    shape, out = op.shape, op.out
    if out is None:
        d = torch.zeros(shape.m, shape.n, dtype=torch.bfloat16, device=op.a.payload.device)
        groups = None if op.group_ends is None else deepgemm.rows_to_groups(op.group_ends, shape.m)
        return _writes(d, deepgemm.tile_block, op.a, op.b, d, groups)
    if not shape.accumulate:
        raise ValueError("DeepGEMM's product of tiles always adds to its output; compare the case that accumulates")
    if op.group_ends is None:
        return _writes(out, deepgemm.add_tile_tile, op.a, op.b, out)
    rows = [part.stop - part.start for part in op.slices]
    a, b = (deepgemm.packed(q, op.slices) for q in (op.a, op.b))
    on_device = torch.tensor(rows, dtype=torch.int32, device=out.device)
    return _writes(out, deepgemm.add_groups_of_contraction, a, b, out, rows, on_device)


def _gemm_case(shape: Shape) -> Case:
    fp8 = FP32_TOLERANCE if shape.is_wgrad else BF16_TOLERANCE
    found = [Contender(OURS, ours, fp8, repeats=True), Contender("DeepGEMM", deep_gemm, fp8)]
    added = ", add_" if shape.accumulate else ""
    if not shape.ends:
        scales = "1x128 x 1x128" if shape.is_wgrad else "1x128 x 128x128"
        found.append(Contender(f"F.scaled_mm {scales}{added}", scaled_mm, fp8))
    mm = "F.grouped_mm" if shape.ends else "torch.mm"
    found.append(Contender(f"{mm} BF16{added}", bf16, BF16_TOLERANCE))
    return Case(shape.name, shape.kind, shape.flops, 0.0, partial(operands, shape), tuple(found))


def copy(inputs: MemoryInputs) -> Call:
    """A BF16 copy that reads and writes as many bytes as the case."""
    source = torch.zeros(int(inputs.kernel.bytes / 4), dtype=torch.bfloat16, device=inputs.tensors[0].device)
    target = torch.empty_like(source)
    return lambda: (target.copy_(source),)


def _memory_case(kernel: MemoryBound) -> Case:
    mine = Contender(OURS, lambda inputs: lambda: kernel.run(*inputs.tensors), kernel.tolerance, repeats=True)
    name = f"{kernel.name}_{kernel.rows}x{kernel.cols}"
    candidates = (mine, Contender("copy_, equal bytes", copy))
    return Case(name, "memory", 0.0, kernel.bytes, partial(memory_inputs, kernel), candidates)


def cases(*, small: bool = False) -> list[Case]:
    """Every case, in the order of the tables; small: every dim a 32nd, for a CPU."""
    return [
        *(_gemm_case(shape) for shape in shapes(small=small)),
        *(_memory_case(kernel) for kernel in [*memory_bound(small=small), *fused(small=small)]),
    ]
