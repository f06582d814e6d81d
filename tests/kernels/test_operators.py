"""Kernels are operators: fake versions allocate what real ones return, FLOPs are the textbook's, calls are counted."""

from __future__ import annotations

import importlib
import inspect
import weakref
from collections import defaultdict
from collections.abc import Callable
from functools import partial
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
from kernels.e5m6 import pack_e5m6
from kernels.fp8_linear import fp8_linear, grouped_fp8_linear, grouped_linear, linear, weight_fp8
from kernels.operators import FLOP_FORMULAS, LAUNCHERS, NAMESPACE, operator
from kernels.quantize import quantize_blocks
from tests.gpu import launcher_cases  # registers every operator
from tests.gpu.launcher_cases import normal, tiles
from tests.operator_calls import FP8_GEMMS, OperatorCalls
from tests.tiny_model import TINY
from train.model.precision import Precision
from train.model.transformer import Transformer

BF16, FP32 = torch.bfloat16, torch.float32


def blocks(*shape: int, transposed: bool = False) -> tuple[Tensor, Tensor]:
    q = quantize_blocks(torch.randn(shape), power_of_two=True)
    q = q.transposed_blocks() if transposed else q
    return q.payload, q.scale


def distinct(tokens: int, experts: int, topk: int) -> Tensor:
    return torch.rand(tokens, experts).argsort(-1)[:, :topk].contiguous()


def ends(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


# Operator -> its arguments at odd sizes: 1, 63, 129, 300, an empty group, padding rows.
CALLS: list[tuple[str, Callable[[], tuple[Any, ...]]]] = [
    ("quantize_tiles", lambda: (torch.randn(63, 300), True)),
    ("quantize_tiles", lambda: (normal(129, 1).t(), False)),
    ("quantize_tiles_transposed", lambda: (normal(129, 63), True)),
    ("quantize_tiles_transposed", lambda: (torch.randn(1, 300), True)),
    ("quantize_tiles_both", lambda: (normal(129, 300), True)),
    ("requantize_transposed", lambda: (*tiles(129, 300), True)),
    ("quantize_blocks", lambda: (normal(3, 129, 63), True)),
    ("quantize_blocks", lambda: (torch.randn(1, 300), False)),
    ("dequantize_tiles", lambda: (*tiles(63, 300), BF16)),
    ("gemm_tile_block", lambda: (*tiles(63, 300), *blocks(129, 300), BF16)),
    ("gemm_tile_block", lambda: (*tiles(63, 129), *blocks(129, 300, transposed=True), FP32)),
    ("gemm_tile_tile", lambda: (*tiles(63, 129), *tiles(300, 129), torch.zeros(63, 300), True)),
    ("grouped_gemm_tile_block", lambda: (*tiles(512, 300), *blocks(3, 129, 300), ends(128, 128, 384), BF16)),
    (
        "grouped_gemm_tile_tile",
        lambda: (*tiles(63, 512), *tiles(300, 512), ends(128, 128, 384), torch.zeros(3, 63, 300), False),
    ),
    ("wgrad", lambda: (normal(63, 129), normal(63, 1), torch.zeros(129, 1), True)),
    ("grouped_matmul", lambda: (normal(512, 63), normal(3, 129, 63).mT, ends(0, 256, 384))),
    ("router_logits", lambda: (normal(63, 129), torch.randn(15, 129))),
    ("router_dgrad", lambda: (torch.randn(63, 15), torch.randn(15, 129), BF16)),
    ("router_wgrad", lambda: (torch.randn(63, 15), normal(63, 129), torch.zeros(15, 129), True)),
    ("cross_entropy", lambda: (normal(63, 129), torch.randint(129, (63,)), 0.3)),
    ("cross_entropy", lambda: (torch.randn(1, 129).double(), torch.randint(129, (1,)), None)),
    ("sums_of_squares", lambda: (torch.randn(129 * 128),)),
    ("route", lambda: (torch.randn(63, 15), torch.randn(15), 3, 2, 4, 2.5, True)),
    ("route", lambda: (torch.randn(1, 8), torch.randn(8), 1, 1, 1, 1.0, False)),
    ("route_backward", lambda: (torch.rand(63, 15), distinct(63, 15, 4), None, torch.randn(63, 4), 2.5, True)),
    ("route_backward", lambda: (torch.rand(1, 15), distinct(1, 15, 4), torch.randn(1, 15), None, 2.5, False)),
    ("sequence_balance", lambda: (torch.rand(3, 63, 15), 4)),
    ("sequence_balance_backward", lambda: (torch.ones(()), torch.rand(3, 63, 15), torch.rand(3, 15))),
    ("lay_out", lambda: (distinct(129, 5, 3), 5, 896)),
    ("lay_out", lambda: (torch.tensor([[1, -1, 0], [-1, -1, -1]], dtype=torch.int32), 2, 256)),
    ("copy_tokens", lambda: (normal(63, 129), torch.randint(-1, 126, (256,)), 2)),
    ("copy_tokens", lambda: (torch.randn(63), torch.randint(-1, 63, (129,)), 1)),
    ("sum_rows", lambda: (normal(256, 63), torch.randint(257, (129, 3)), True, FP32)),
    ("sum_rows", lambda: (normal(256, 63), torch.randint(256, (1, 3)), False, BF16)),
    ("scatter_gates", lambda: (torch.randn(256), torch.arange(-130, 126).clamp_min(-1), 63, 2)),
    ("grouped_wgrad", lambda: (torch.randn(512, 63), torch.randn(512, 129), ends(0, 256, 384))),
    ("swiglu", lambda: (normal(3, 21, 126),)),
    ("swiglu_backward", lambda: (torch.randn(63, 126), torch.randn(63, 63).t())),
    ("gated_swiglu", lambda: (normal(126, 129).t(), torch.rand(129))),
    ("gated_swiglu_backward", lambda: (normal(129, 126), torch.rand(129), normal(129, 63))),
    ("swiglu_quantize", lambda: (normal(129, 126), None, True)),
    ("swiglu_quantize", lambda: (torch.randn(1, 600), torch.rand(1), False)),
    ("swiglu_quantize_transposed", lambda: (*tiles(129, 126), None, BF16, True)),
    ("swiglu_quantize_transposed", lambda: (*tiles(63, 600), torch.rand(63), FP32, False)),
    ("swiglu_backward_kept", lambda: (*tiles(129, 126), normal(129, 63))),
    ("gated_swiglu_backward_kept", lambda: (*tiles(63, 600), torch.rand(63), normal(63, 300))),
    ("adamw", lambda: (*torch.randn(2, 129), *normal(3, 129).abs(), launcher_cases.ADAMW, 3)),
    ("swiglu_backward_quantize_both", lambda: (*tiles(129, 126), None, normal(129, 63), True)),
    ("swiglu_backward_quantize_both", lambda: (*tiles(63, 600), torch.rand(63), torch.randn(63, 300), False)),
    ("gather_tiles", lambda: (*tiles(63, 300), torch.randint(-1, 126, (256,)), 2)),
    ("gather_requantize_transposed", lambda: (*tiles(63, 300), torch.randint(-1, 63, (129,)), 1, True)),
    ("gather_quantize_both", lambda: (normal(63, 129), torch.randint(-1, 126, (256,)), 2, False)),
    ("add_norm_quantize", lambda: (normal(63, 300), normal(63, 300), normal(300), 1e-6, True, True, True)),
    ("add_norm_quantize", lambda: (normal(129, 600)[:, :300], None, normal(300), 1e-6, False, True, False)),
    ("add_norm_quantize", lambda: (torch.randn(1, 63), None, torch.randn(63), 1e-6, False, False, True)),
    ("norm_again", lambda: (normal(129, 600)[:, :300], normal(300), torch.rand(129), True, True, True)),
    ("norm_again", lambda: (torch.randn(1, 63), torch.randn(63), torch.rand(1), False, True, False)),
    ("norm_again", lambda: (normal(63, 129), normal(129), torch.rand(63), True, False, True)),
    (
        "norm_backward",
        lambda: (*normal(4, 129, 63), normal(129, 63), normal(63), torch.rand(129), normal(129, 100)[:, :63]),
    ),
    (
        "norm_backward",
        lambda: (
            torch.randn(1, 300),
            None,
            None,
            None,
            torch.randn(1, 300),
            torch.randn(300),
            torch.rand(1),
            torch.empty(1, 300),
        ),
    ),
    ("norm_gain_gradient", lambda: (torch.randn(3, 63), torch.randn(63), BF16, True)),
    ("heads_forward", lambda: (normal(63, 3, 28), normal(63, 3, 27), normal(63, 40)[:, 26:], *torch.rand(2, 21, 7))),
    ("turn_back", lambda: (normal(63, 3, 28), *torch.rand(2, 21, 7), normal(63, 99)[:, 15:])),
    ("rope_key_backward", lambda: (torch.randn(129, 3, 28), *torch.rand(2, 129, 7), torch.randn(129, 50)[:, 36:])),
    ("turn_back_quantize_both", lambda: (normal(63, 3, 28).mT.contiguous().mT, *torch.rand(2, 21, 7), True)),
    ("heads_quantize_both", lambda: (normal(129, 3, 28), normal(3, 129, 13).transpose(0, 1), 14, False)),
    ("range_amax", lambda: (normal(200), (2, 63, 129), 8000)),
    ("quantize_range", lambda: (normal(300), torch.rand(2, 1, 2) + 0.5, (2, 63, 129), 8000)),
    ("transpose_blocks", lambda: blocks(3, 129, 63)[:1]),
    ("pack_e5m6", lambda: (normal(63, 300), True)),
    ("unpack_e5m6", lambda: (*pack_e5m6(torch.randn(129, 126), power_of_two=False), BF16)),
    ("quantize_pack", lambda: (normal(63, 300), False)),
    ("unpack_quantize_transposed", lambda: (*pack_e5m6(torch.randn(129, 126), power_of_two=True), BF16, True)),
]
# These differ on purpose (kernels/attention.py), see the test of attention below.
FUSED_ON_GPU = {"attention", "attention_backward", "attention_backward_of_output"}


def call(name: str, arguments: tuple[Any, ...]) -> list[Tensor]:
    results = tree_leaves(launcher_cases.operator(name)(*arguments))
    return [result for result in results if result is not None]


@pytest.mark.parametrize(("name", "make"), CALLS, ids=[f"{i}-{name}" for i, (name, _) in enumerate(CALLS)])
def test_the_fake_version_allocates_what_the_real_one_returns(name: str, make: Callable[[], tuple[Any, ...]]) -> None:
    arguments = make()
    real = call(name, arguments)
    mode = FakeTensorMode()
    fake = call(name, tree_map_only(Tensor, mode.from_tensor, arguments))
    assert [(t.shape, t.dtype, t.device) for t in fake] == [(t.shape, t.dtype, t.device) for t in real]
    assert all(t.is_contiguous() for t in (*fake, *real))


@pytest.mark.parametrize("name", sorted(LAUNCHERS))
def test_a_launcher_takes_what_its_operator_takes(name: str) -> None:
    """Under the same names in the same order: `kernels.operators` passes arguments on as they come."""
    pytest.importorskip("triton", reason="Triton exists on Linux only; CI runs this test")
    schema = launcher_cases.operator(name)._schema
    launcher = getattr(importlib.import_module(LAUNCHERS[name]), name)
    assert list(inspect.signature(launcher).parameters) == [argument.name for argument in schema.arguments]


FP64_CALLS: list[tuple[str, Callable[[torch.dtype], tuple[Any, ...]]]] = [
    ("route", lambda dtype: (torch.randn(63, 15).to(dtype), torch.randn(15).to(dtype), 3, 2, 4, 2.5, True)),
    (
        "route_backward",
        lambda dtype: (torch.rand(63, 15).to(dtype), distinct(63, 15, 4), None, torch.rand(63, 4).to(dtype), 2.5, True),
    ),
    ("sequence_balance", lambda dtype: (torch.rand(3, 63, 15).to(dtype), 4)),
    ("sum_rows", lambda dtype: (torch.randn(256, 63).to(dtype), torch.randint(257, (129, 3)), True, FP32)),
    ("sum_rows", lambda dtype: (torch.randn(256, 63), torch.randint(257, (129, 3)), True, dtype)),
]


@pytest.mark.parametrize(("name", "make"), FP64_CALLS, ids=[f"{i}-{name}" for i, (name, _) in enumerate(FP64_CALLS)])
def test_on_a_gpu_fp64_is_computed_by_the_reference(
    name: str, make: Callable[[torch.dtype], tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch calls for a CUDA tensor, called with CPU tensors; a kernel is launched for FP32 alone."""
    pytest.importorskip("triton", reason="Triton exists on Linux only; CI runs this test")
    launched: list[str] = []
    kernel = defaultdict(lambda: lambda *_, **__: launched.append(name))  # type: ignore[var-annotated]
    monkeypatch.setattr(f"{LAUNCHERS[name]}._{name}_kernel", kernel)
    monkeypatch.setattr("kernels.operators.use_triton", lambda _: True)
    found = launcher_cases.operator(name)
    on_gpu = partial(found._op_dk, torch._C.DispatchKey.CUDA)
    arguments = make(torch.float64)
    actual, expected = (tree_leaves(function(*arguments)) for function in (on_gpu, found))
    assert not launched
    assert [each.dtype for each in actual] == [each.dtype for each in expected]
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))
    on_gpu(*make(FP32))
    assert launched == [name]


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
            # The weight's FP8 copy is there twice, once transposed for dgrad.
            payload_x, payload_w = rows * k + 4 * rows * 56, 2 * n * k + 4 * 17 * 56
            assert memory.live == payload_x + payload_w + 2 * rows * n
            memory.peak = 0
            y.backward(dy)
        # The largest moment is dgrad's or wgrad's: dy by row, then either dx, or dy and x by column. The FP32 gradient
        # is added in place.
        by_row, by_column = rows * n + 4 * 17 * rows, rows * n + 4 * 32 * n
        dx, x_by_column = 2 * rows * k, rows * k + 4 * 32 * k
        largest = max(by_row + by_column + x_by_column, by_row + by_column + dx, by_row + dx)
        assert memory.peak == payload_x + payload_w + 2 * rows * n + largest
        assert x.grad is not None


def test_attention_of_v3_keeps_log_sums_and_no_probabilities() -> None:
    """A fake run on a CPU counts the GPU's fused kernel: o and one FP32 number per query and head."""
    sequences, heads, tokens, qk_dim, v_dim = 1, 128, 4096, 192, 128
    with FakeTensorMode():
        # Token by token in memory, as the model makes them.
        q, k, v = (
            torch.empty(sequences, tokens, heads, dim, dtype=BF16).transpose(1, 2).requires_grad_()
            for dim in (qk_dim, qk_dim, v_dim)
        )
        grad = torch.empty(tokens, heads * v_dim, dtype=BF16)
        with LiveBytes() as memory, FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as flops:
            o = causal_attention(q, k, v, scale=qk_dim**-0.5, documents=None)
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
