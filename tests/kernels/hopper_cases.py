"""Every launcher of `kernels/gpu/` at a size of DeepSeek-V3: 4,096 tokens of one rank, hidden 7168.

Tensors are allocated and never touched, so that a case costs address space only. The same cases serve the table of
`docs/kernels.md` (`tests/kernels/hopper_codegen.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from kernels.cross_entropy import CHUNK_ROWS
from kernels.gpu import (
    adamw,
    block_ranges,
    cross_entropy,
    e5m6,
    gather,
    grad_norm,
    heads,
    permute,
    quantize,
    rmsnorm,
    router,
    router_linear,
    swiglu,
)  # fmt: skip
from parallel.buckets import BUCKET_BYTES
from tests.gpu.launcher_cases import ADAMW
from tests.kernels.gemm_cases import TOKENS, bf16, tiles

HIDDEN = 7168
# Widths of SwiGLU's output: of an expert, and of the dense FFN.
EXPERT, DENSE = 2048, 18432
# Width of the input of the linear after attention.
ATTENTION = 16384
# The latents of queries and keys, slices of one matrix.
LATENTS, QUERY, KEY = 2112, 1536, 512
# Attention's heads, their plain and rotary dims, and the tables of a sequence of 4,096 tokens.
HEADS, NOPE, ROPE = 128, 128, 64
TABLE = torch.empty(TOKENS, ROPE // 2)
# Routed experts, experts of a token, and rows of this rank's experts.
EXPERTS, TOPK = 256, 8
ROWS = TOPK * TOKENS
VOCAB = 129280


def packets() -> tuple[torch.Tensor, torch.Tensor]:
    """Payload and scales of tokens as they arrive over the wire, in rows of 7,392 bytes."""
    whole = torch.empty(TOKENS, HIDDEN + HIDDEN // 32, dtype=torch.uint8)
    return whole[:, :HIDDEN].view(torch.float8_e4m3fn), whole[:, HIDDEN:].view(torch.float32).t()


ROUTER_PRODUCTS = ("router_logits", "router_dgrad", "router_wgrad +=")
fp32, int64 = torch.empty, partial(torch.empty, dtype=torch.int64)
CASES: dict[str, Callable[[], object]] = {
    "quantize_tiles": partial(quantize.quantize_tiles, bf16(TOKENS, HIDDEN), True),
    "quantize_tiles, FP32 scales": partial(quantize.quantize_tiles, bf16(TOKENS, HIDDEN), False),
    "quantize_tiles, 576 columns": partial(quantize.quantize_tiles, bf16(TOKENS, 576), True),
    "quantize_tiles_transposed": partial(quantize.quantize_tiles_transposed, bf16(TOKENS, HIDDEN), True),
    "quantize_tiles_both": partial(quantize.quantize_tiles_both, bf16(TOKENS, HIDDEN), True),
    "requantize_transposed": partial(quantize.requantize_transposed, *tiles(TOKENS, HIDDEN), True),
    "quantize_blocks": partial(quantize.quantize_blocks, bf16(4, 4096, HIDDEN), True),
    "dequantize_tiles": partial(quantize.dequantize_tiles, *tiles(TOKENS, HIDDEN), torch.bfloat16),
    "swiglu": partial(swiglu.swiglu, bf16(TOKENS, 2 * DENSE)),
    "gated_swiglu": partial(swiglu.gated_swiglu, bf16(TOKENS, 2 * EXPERT), fp32(TOKENS)),
    "swiglu_backward": partial(swiglu.swiglu_backward, bf16(TOKENS, 2 * DENSE), bf16(TOKENS, DENSE)),
    "gated_swiglu_backward": partial(
        swiglu.gated_swiglu_backward, bf16(TOKENS, 2 * EXPERT), fp32(TOKENS), bf16(TOKENS, EXPERT)
    ),
    "swiglu_quantize, dense": partial(swiglu.swiglu_quantize, bf16(TOKENS, 2 * DENSE), None, True),
    "swiglu_quantize, expert": partial(swiglu.swiglu_quantize, bf16(TOKENS, 2 * EXPERT), fp32(TOKENS), True),
    "swiglu_quantize, expert, FP32 scales": partial(
        swiglu.swiglu_quantize, bf16(TOKENS, 2 * EXPERT), fp32(TOKENS), False
    ),
    "swiglu_quantize_transposed, dense": partial(
        swiglu.swiglu_quantize_transposed, *tiles(TOKENS, 2 * DENSE), None, torch.bfloat16, True
    ),
    "swiglu_quantize_transposed, expert": partial(
        swiglu.swiglu_quantize_transposed, *tiles(TOKENS, 2 * EXPERT), fp32(TOKENS), torch.bfloat16, True
    ),
    "swiglu_backward_kept": partial(swiglu.swiglu_backward_kept, *tiles(TOKENS, 2 * DENSE), bf16(TOKENS, DENSE)),
    "gated_swiglu_backward_kept": partial(
        swiglu.gated_swiglu_backward_kept, *tiles(TOKENS, 2 * EXPERT), fp32(TOKENS), bf16(TOKENS, EXPERT)
    ),
    "swiglu_backward_quantize_both, dense": partial(
        swiglu.swiglu_backward_quantize_both, *tiles(TOKENS, 2 * DENSE), None, bf16(TOKENS, DENSE), True
    ),
    "swiglu_backward_quantize_both, expert": partial(
        swiglu.swiglu_backward_quantize_both, *tiles(TOKENS, 2 * EXPERT), fp32(TOKENS), bf16(TOKENS, EXPERT), True
    ),
    "swiglu_backward_quantize_both, expert, FP32 scales": partial(
        swiglu.swiglu_backward_quantize_both, *tiles(TOKENS, 2 * EXPERT), fp32(TOKENS), bf16(TOKENS, EXPERT), False
    ),
    "gather_tiles": partial(gather.gather_tiles, *tiles(TOKENS, HIDDEN), int64(ROWS), TOPK),
    "gather_tiles, of packets": partial(gather.gather_tiles, *packets(), int64(ROWS), TOPK),
    "gather_requantize_transposed": partial(
        gather.gather_requantize_transposed, *tiles(TOKENS, HIDDEN), int64(ROWS), TOPK, True
    ),
    "gather_requantize_transposed, of packets": partial(
        gather.gather_requantize_transposed, *packets(), int64(ROWS), TOPK, True
    ),
    "gather_quantize_both": partial(gather.gather_quantize_both, bf16(TOKENS, HIDDEN), int64(ROWS), TOPK, True),
    "add_norm_quantize": partial(
        rmsnorm.add_norm_quantize, bf16(TOKENS, HIDDEN), bf16(TOKENS, HIDDEN), bf16(HIDDEN), 1e-6, True, True, False
    ),
    "add_norm_quantize, FP32 scales": partial(
        rmsnorm.add_norm_quantize, bf16(TOKENS, HIDDEN), bf16(TOKENS, HIDDEN), bf16(HIDDEN), 1e-6, False, True, False
    ),
    "add_norm_quantize, and BF16": partial(
        rmsnorm.add_norm_quantize, bf16(TOKENS, HIDDEN), bf16(TOKENS, HIDDEN), bf16(HIDDEN), 1e-6, True, True, True
    ),
    "add_norm_quantize, BF16 only": partial(
        rmsnorm.add_norm_quantize, bf16(TOKENS, HIDDEN), bf16(TOKENS, HIDDEN), bf16(HIDDEN), 1e-6, True, False, True
    ),
    "add_norm_quantize, 1536 of 2112 columns": partial(
        rmsnorm.add_norm_quantize, bf16(TOKENS, LATENTS)[:, :QUERY], None, bf16(QUERY), 1e-6, True, True, False
    ),
    "add_norm_quantize, 512 of 2112 columns": partial(
        rmsnorm.add_norm_quantize, bf16(TOKENS, LATENTS)[:, QUERY : QUERY + KEY], None, bf16(KEY), 1e-6, True, True,
        False,
    ),
    "norm_again": partial(
        rmsnorm.norm_again, bf16(TOKENS, HIDDEN), bf16(HIDDEN), fp32(TOKENS), True, True, False
    ),
    "norm_again, and BF16": partial(
        rmsnorm.norm_again, bf16(TOKENS, HIDDEN), bf16(HIDDEN), fp32(TOKENS), True, True, True
    ),
    "norm_again, 512 of 2112 columns, FP32 scales": partial(
        rmsnorm.norm_again, bf16(TOKENS, LATENTS)[:, QUERY : QUERY + KEY], bf16(KEY), fp32(TOKENS), False, True, False
    ),
    "norm_backward, 1 reader": partial(
        rmsnorm.norm_backward, bf16(TOKENS, HIDDEN), None, None, *(bf16(TOKENS, HIDDEN),) * 2, bf16(HIDDEN),
        fp32(TOKENS), bf16(TOKENS, HIDDEN),
    ),
    "norm_backward, 3 readers": partial(
        rmsnorm.norm_backward, *(bf16(TOKENS, HIDDEN),) * 5, bf16(HIDDEN), fp32(TOKENS), bf16(TOKENS, HIDDEN)
    ),
    "norm_backward, 1536 of 2112 columns": partial(
        rmsnorm.norm_backward, bf16(TOKENS, QUERY), None, None, None, bf16(TOKENS, LATENTS)[:, :QUERY], bf16(QUERY),
        fp32(TOKENS), bf16(TOKENS, LATENTS)[:, :QUERY],
    ),
    "norm_backward, 512 of 2112 columns": partial(
        rmsnorm.norm_backward, bf16(TOKENS, KEY), None, None, None, bf16(TOKENS, LATENTS)[:, QUERY : QUERY + KEY],
        bf16(KEY), fp32(TOKENS), bf16(TOKENS, LATENTS)[:, QUERY : QUERY + KEY],
    ),
    "norm_gain_gradient, +=": partial(
        rmsnorm.norm_gain_gradient, fp32(256, HIDDEN), fp32(HIDDEN), torch.bfloat16, True
    ),
    "adamw, BF16 moments": partial(
        adamw.adamw, fp32(HIDDEN * EXPERT), fp32(HIDDEN * EXPERT), *(bf16(HIDDEN * EXPERT),) * 3, ADAMW, 3
    ),
    "adamw, FP32": partial(adamw.adamw, *(fp32(HIDDEN * EXPERT),) * 5, ADAMW, 3),
    "range_amax": partial(block_ranges.range_amax, bf16(2 * EXPERT * HIDDEN), (4, EXPERT, HIDDEN), EXPERT * HIDDEN),
    "quantize_range": partial(
        block_ranges.quantize_range, bf16(2 * EXPERT * HIDDEN), fp32(4, EXPERT // 128, HIDDEN // 128),
        (4, EXPERT, HIDDEN), EXPERT * HIDDEN,
    ),
    "transpose_blocks": partial(block_ranges.transpose_blocks, tiles(EXPERT, HIDDEN)[0]),
    "cross_entropy, loss and gradient": partial(
        cross_entropy.cross_entropy, bf16(CHUNK_ROWS, VOCAB), int64(CHUNK_ROWS), 0.3
    ),
    "cross_entropy, loss": partial(cross_entropy.cross_entropy, bf16(CHUNK_ROWS, VOCAB), int64(CHUNK_ROWS), None),
    "sums_of_squares": partial(grad_norm.sums_of_squares, fp32(BUCKET_BYTES // 4)),
    "heads_forward": partial(
        heads.heads_forward, bf16(TOKENS, HEADS, NOPE + ROPE), bf16(TOKENS, HEADS, 2 * NOPE),
        bf16(TOKENS, LATENTS)[:, QUERY + KEY :], TABLE, TABLE,
    ),
    "turn_back": partial(
        heads.turn_back, bf16(TOKENS, HEADS, NOPE + ROPE), TABLE, TABLE, bf16(TOKENS, HEADS * (NOPE + ROPE))
    ),
    "rope_key_backward": partial(
        heads.rope_key_backward, bf16(TOKENS, HEADS, NOPE + ROPE), TABLE, TABLE,
        bf16(TOKENS, LATENTS)[:, QUERY + KEY :],
    ),
    "turn_back_quantize_both": partial(
        heads.turn_back_quantize_both, bf16(TOKENS, HEADS, NOPE + ROPE), TABLE, TABLE, True
    ),
    "heads_quantize_both": partial(
        heads.heads_quantize_both, bf16(TOKENS, HEADS, NOPE + ROPE), bf16(TOKENS, HEADS, NOPE), NOPE, True
    ),
    "pack_e5m6": partial(e5m6.pack_e5m6, bf16(TOKENS, ATTENTION), True),
    "pack_e5m6, FP32 scales": partial(e5m6.pack_e5m6, bf16(TOKENS, ATTENTION), False),
    "unpack_e5m6": partial(
        e5m6.unpack_e5m6, torch.empty(TOKENS, ATTENTION * 3 // 2, dtype=torch.uint8), fp32(ATTENTION // 128, TOKENS),
        torch.bfloat16,
    ),
    "router_logits": partial(router_linear.router_logits, bf16(TOKENS, HIDDEN), fp32(EXPERTS, HIDDEN)),
    "router_dgrad": partial(
        router_linear.router_dgrad, fp32(TOKENS, EXPERTS), fp32(EXPERTS, HIDDEN), torch.bfloat16
    ),
    "router_wgrad +=": partial(
        router_linear.router_wgrad, fp32(TOKENS, EXPERTS), bf16(TOKENS, HIDDEN), fp32(EXPERTS, HIDDEN), True
    ),
    "quantize_pack": partial(e5m6.quantize_pack, bf16(TOKENS, ATTENTION), True),
    "quantize_pack, FP32 scales": partial(e5m6.quantize_pack, bf16(TOKENS, ATTENTION), False),
    "unpack_quantize_transposed": partial(
        e5m6.unpack_quantize_transposed, torch.empty(TOKENS, ATTENTION * 3 // 2, dtype=torch.uint8),
        fp32(ATTENTION // 128, TOKENS), torch.bfloat16, True,
    ),
    "route": partial(router.route, fp32(TOKENS, EXPERTS), fp32(EXPERTS), 8, 4, TOPK, 2.5, True),
    "route_backward": partial(
        router.route_backward, fp32(TOKENS, EXPERTS), int64(TOKENS, TOPK), fp32(TOKENS, EXPERTS), fp32(TOKENS, TOPK),
        2.5, True,
    ),
    "sequence_balance": partial(router.sequence_balance, fp32(1, TOKENS, EXPERTS), TOPK),
    "sequence_balance_backward": partial(
        router.sequence_balance_backward, torch.empty(()), fp32(1, TOKENS, EXPERTS), fp32(1, EXPERTS)
    ),
    "lay_out, all experts": partial(permute.lay_out, int64(TOKENS, TOPK), EXPERTS, ROWS),
    "lay_out, 4 experts": partial(permute.lay_out, torch.empty(ROWS, TOPK, dtype=torch.int32), 4, ROWS),
    "copy_tokens": partial(permute.copy_tokens, bf16(TOKENS, HIDDEN), int64(ROWS), TOPK),
    "copy_tokens, gates": partial(permute.copy_tokens, fp32(ROWS), int64(ROWS), 1),
    "sum_rows": partial(permute.sum_rows, bf16(ROWS, HIDDEN), int64(TOKENS, TOPK), False, torch.bfloat16),
    "sum_rows, gates of copies": partial(permute.sum_rows, fp32(ROWS, TOPK), int64(TOKENS, TOPK), True, torch.float32),
    "scatter_gates": partial(permute.scatter_gates, fp32(ROWS), int64(ROWS), TOKENS, TOPK),
}  # fmt: skip
# Of kernels that another case compiles with other constants.
AGAIN = (
    "quantize_tiles, FP32 scales",
    "swiglu_quantize, dense",
    "swiglu_quantize, expert, FP32 scales",
    "swiglu_quantize_transposed, dense",
    "swiglu_backward_quantize_both, dense",
    "swiglu_backward_quantize_both, expert, FP32 scales",
    "gather_requantize_transposed, of packets",
    "add_norm_quantize",
    "add_norm_quantize, FP32 scales",
    "add_norm_quantize, BF16 only",
    "add_norm_quantize, 512 of 2112 columns",
    "norm_again",
    "norm_again, 512 of 2112 columns, FP32 scales",
    "norm_backward, 1 reader",
    "norm_backward, 512 of 2112 columns",
    "pack_e5m6, FP32 scales",
    "quantize_pack, FP32 scales",
    "lay_out, 4 experts",
    "sum_rows, gates of copies",
    "cross_entropy, loss",
)
