"""Kernels are operators: fake versions allocate what real ones return, FLOPs are the textbook's, calls are counted."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from kernels import deferred
from kernels.attention import causal_attention
from kernels.fp8_linear import fp8_linear, grouped_fp8_linear, grouped_linear, linear, weight_fp8
from kernels.operators import FLOP_FORMULAS, NAMESPACE, operator
from kernels.quantize import quantize_blocks, quantize_tiles, quantize_tiles_transposed
from tests.operator_calls import FP8_GEMMS, OperatorCalls
from tests.tiny_model import TINY
from train.model.precision import Precision
from train.model.transformer import Transformer

BF16, FP32 = torch.bfloat16, torch.float32


def tiles(rows: int, cols: int) -> tuple[Tensor, Tensor]:
    q = quantize_tiles(torch.randn(rows, cols), power_of_two=True)
    return q.payload, q.scale


def columns(rows: int, cols: int) -> tuple[Tensor, Tensor]:
    q = quantize_tiles_transposed(torch.randn(rows, cols), power_of_two=True)
    return q.payload, q.scale


def blocks(*shape: int, transposed: bool = False) -> tuple[Tensor, Tensor]:
    q = quantize_blocks(torch.randn(shape), power_of_two=True)
    q = q.transposed_blocks() if transposed else q
    return q.payload, q.scale


def ends(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


# Operator -> its arguments at odd sizes: 1, 63, 129, 300, an empty group, rows of nobody.
CALLS: list[tuple[str, Callable[[], tuple[Any, ...]]]] = [
    ("quantize_tiles", lambda: (torch.randn(63, 300), True)),
    ("quantize_tiles", lambda: (torch.randn(129, 1, dtype=BF16).t(), False)),
    ("quantize_tiles_transposed", lambda: (torch.randn(129, 63, dtype=BF16), True)),
    ("quantize_tiles_transposed", lambda: (torch.randn(1, 300), True)),
    ("requantize_transposed", lambda: (*tiles(129, 300), True)),
    ("quantize_blocks", lambda: (torch.randn(3, 129, 63, dtype=BF16), True)),
    ("quantize_blocks", lambda: (torch.randn(1, 300), False)),
    ("dequantize_tiles", lambda: (*tiles(63, 300), BF16)),
    ("gemm_tile_block", lambda: (*tiles(63, 300), *blocks(129, 300), BF16)),
    ("gemm_tile_block", lambda: (*tiles(63, 129), *blocks(129, 300, transposed=True), FP32)),
    ("gemm_tile_tile", lambda: (*columns(129, 63), *columns(129, 300))),
    (
        "grouped_gemm_tile_block",
        lambda: (*tiles(512, 300), *blocks(3, 129, 300), ends(128, 128, 384), BF16),
    ),
    ("grouped_gemm_tile_tile", lambda: (*columns(512, 63), *columns(512, 300), ends(128, 128, 384))),
    ("wgrad", lambda: (torch.randn(63, 129, dtype=BF16), torch.randn(63, 1, dtype=BF16))),
    (
        "grouped_matmul",
        lambda: (torch.randn(512, 63, dtype=BF16), torch.randn(3, 129, 63, dtype=BF16).mT, ends(0, 256, 384)),
    ),
    ("cross_entropy", lambda: (torch.randn(63, 129, dtype=BF16), torch.randint(129, (63,)))),
    (
        "cross_entropy_backward",
        lambda: (torch.ones(()), torch.randn(63, 129, dtype=BF16), torch.randint(129, (63,)), torch.randn(63)),
    ),
    ("grouped_wgrad", lambda: (torch.randn(512, 63), torch.randn(512, 129), ends(0, 256, 384))),
]
# These differ on purpose (kernels/attention.py), see the test of attention below.
FUSED_ON_GPU = {"attention", "attention_backward"}


def call(name: str, arguments: tuple[Any, ...]) -> list[Tensor]:
    return tree_leaves(getattr(getattr(torch.ops, NAMESPACE), name).default(*arguments))


@pytest.mark.parametrize(("name", "make"), CALLS, ids=[f"{i}-{name}" for i, (name, _) in enumerate(CALLS)])
def test_the_fake_version_allocates_what_the_real_one_returns(name: str, make: Callable[[], tuple[Any, ...]]) -> None:
    arguments = make()
    real = call(name, arguments)
    mode = FakeTensorMode()
    fake = call(name, tree_map_only(Tensor, mode.from_tensor, arguments))
    assert [(t.shape, t.dtype, t.device) for t in fake] == [(t.shape, t.dtype, t.device) for t in real]
    assert all(t.is_contiguous() for t in (*fake, *real))


def test_every_operator_is_compared() -> None:
    names = {name.rpartition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith(NAMESPACE)}
    assert names == {name for name, _ in CALLS} | FUSED_ON_GPU


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages born inside and still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given | self._known:
                storage = tensor.untyped_storage()
                self._known.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def parameter(*shape: int) -> torch.nn.Parameter:
    weight = torch.nn.Parameter(torch.empty(shape, dtype=BF16))
    weight.main_grad = torch.empty(shape, dtype=FP32)  # type: ignore[attr-defined]
    return weight


def test_an_fp8_linear_of_v3_keeps_its_input_in_fp8_and_nothing_else() -> None:
    """7168 -> 2112 on 4096 tokens: the FP32 copies of the reference (235 MB for x alone) are nowhere."""
    rows, k, n = 4096, 7168, 2112
    with FakeTensorMode():
        weight, x = parameter(n, k), torch.empty(rows, k, dtype=BF16, requires_grad=True)
        dy = torch.empty(rows, n, dtype=BF16)
        with LiveBytes() as memory:
            y = fp8_linear(x, weight, power_of_two=True)
            payload_x, payload_w = rows * k + 4 * rows * 56, n * k + 4 * 17 * 56
            assert memory.live == payload_x + payload_w + 2 * rows * n
            memory.peak = 0
            y.backward(dy)
        # The largest moment is wgrad's: both transposed operands and the FP32 result.
        operands = rows * n + 4 * 32 * n + rows * k + 4 * 32 * k
        assert memory.peak == payload_x + payload_w + 2 * rows * n + operands + 4 * n * k
        assert x.grad is not None


def test_attention_of_v3_keeps_log_sums_and_no_probabilities() -> None:
    """A fake run on a CPU counts the GPU's fused kernel: o and one FP32 number per query and head."""
    sequences, heads, tokens, qk_dim, v_dim = 1, 128, 4096, 192, 128
    with FakeTensorMode():
        q, k = (torch.empty(sequences, heads, tokens, qk_dim, dtype=BF16, requires_grad=True) for _ in "qk")
        v = torch.empty(sequences, heads, tokens, v_dim, dtype=BF16, requires_grad=True)
        grad = torch.empty(tokens, heads * v_dim, dtype=BF16)
        with LiveBytes() as memory, FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as flops:
            o = causal_attention(q, k, v, scale=qk_dim**-0.5, document_ids=None)
            rows = heads * tokens
            assert memory.live == 2 * rows * v_dim + 4 * rows
            # o_proj reads [tokens, heads * v_dim] without a copy.
            o.transpose(1, 2).reshape(tokens, heads * v_dim).backward(grad)
        # Gradients of q, k, v beside o and the log-sums; BF16 probabilities would be 4.3 GB.
        assert memory.peak == 2 * rows * v_dim + 4 * rows + 2 * rows * (2 * qk_dim + v_dim)
    # Forward: two causal GEMMs; backward twice that (deepseek-v3.md section 4 counts so).
    assert flops.get_total_flops() == 3 * 2 * rows * (tokens // 2) * (qk_dim + v_dim)


def test_flops_are_two_per_multiplication_in_each_of_three_gemms() -> None:
    rows, k, n, groups = 300, 129, 63, 3
    with FakeTensorMode():
        x = torch.empty(rows, k, dtype=BF16, requires_grad=True)
        grouped = torch.empty(512, k, dtype=BF16, requires_grad=True)
        group_ends = torch.empty(groups, dtype=torch.int32)
        runs: list[tuple[Callable[[], Tensor], int]] = [
            (lambda: fp8_linear(x, parameter(n, k), power_of_two=True), rows),
            (lambda: linear(x, parameter(n, k)), rows),
            (lambda: grouped_fp8_linear(grouped, parameter(groups, n, k), group_ends, power_of_two=True), 512),
            (lambda: grouped_linear(grouped, parameter(groups, n, k), group_ends), 512),
        ]
        for run, multiplied_rows in runs:
            with FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as flops:
                y = run()
                y.backward(torch.empty_like(y))
            assert flops.get_total_flops() == 3 * 2 * multiplied_rows * k * n


@pytest.mark.parametrize("queued", [False, True])
def test_each_fp8_gemm_runs_once_in_a_forward_and_a_backward(queued: bool) -> None:
    """One fprop, one dgrad and one wgrad per linear, whether wgrad runs in backward or from the queue."""
    model = Transformer(TINY, Precision("fp8"))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    # A linear of the MLA, FFN and shared expert; a stack of experts. The dense block has 4 + 2 + 0, each MoE block
    # (one in the model, one per MTP depth) 4 + 2 linears and 2 stacks.
    linears, stacks = 4 * 6, 3 * 2
    expected = {
        "gemm_tile_block": 2 * linears,
        "gemm_tile_tile": linears,
        "grouped_gemm_tile_block": 2 * stacks,
        "grouped_gemm_tile_tile": stacks,
    }
    with OperatorCalls() as calls:
        output = model(torch.randint(TINY.vocab_size, (2, 7)))
        loss = output.hidden.float().square().sum() + sum(h.float().square().sum() for h in output.mtp_hidden)
        if queued:
            with deferred.deferred():
                loss.backward()
                assert calls.of("gemm_tile_tile") == {"gemm_tile_tile": 0}
                deferred.take()()
        else:
            loss.backward()
    assert calls.of(*FP8_GEMMS) == expected
    # Each weight was quantised once and its copy used twice.
    assert calls.of("quantize_blocks") == {"quantize_blocks": linears + stacks}


def test_a_fake_weight_is_quantised_again_after_an_update_only() -> None:
    with FakeTensorMode():
        weight, other = parameter(256, 256), parameter(256, 256)
        with OperatorCalls() as calls, torch.no_grad():
            weight_fp8(weight, power_of_two=True)
            weight_fp8(weight, power_of_two=True)
            weight_fp8(other, power_of_two=True)
            assert calls.of("quantize_blocks") == {"quantize_blocks": 2}
            weight.copy_(other)
            weight_fp8(weight, power_of_two=True)
            assert calls.of("quantize_blocks") == {"quantize_blocks": 3}


def test_a_name_is_given_once() -> None:
    def identity(x: Tensor) -> Tensor:
        return x.clone()

    with pytest.raises(RuntimeError, match="quantize_tiles"):
        operator("quantize_tiles", identity, fake=identity)
