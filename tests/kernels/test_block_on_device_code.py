"""A dense and a MoE block, forward and backward, on the device code of a Hopper GPU, interpreted.

Every call of an operator goes to its launcher in `kernels/gpu/` instead of the reference: Triton functions run in
Triton's interpreter, the Gluon GEMM in ours, the choice between them is that of an H100. So what a launcher hands to
the next one (layouts, paddings, group ends, scales) is checked between the real ones, with autograd as in training.
"""

from __future__ import annotations

import importlib
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.fp8_linear import fp8_linear_e5m6
from kernels.gpu import gemm_fp8
from kernels.operators import LAUNCHERS, NAMESPACE
from tests.kernels.gemm_inputs import relative_error
from tests.kernels.gluon_interpreter import interpret
from tests.operator_calls import OperatorCalls
from tests.tiny_model import TINY
from train.model.precision import Precision
from train.model.transformer import Transformer

# Ragged where DeepSeek-V3 is: q_kv_a_proj has 64 + 64 + 64 rows; 160 tokens are no multiple of 128. Its heads.
CONFIG = replace(
    TINY,
    hidden_size=256,
    intermediate_size=256,
    moe_intermediate_size=128,
    q_lora_rank=64,
    kv_lora_rank=64,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    # Each expert's rows are padded to 128, in which the interpreter's time goes.
    n_routed_experts=4,
    n_group=2,
    topk_group=1,
    max_position_embeddings=256,
    num_nextn_predict_layers=0,
)
TOKENS = 160


class OnDeviceCode(OperatorCalls):
    """Sends every operator that has a launcher to it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != NAMESPACE or func._opname not in LAUNCHERS:
            return func(*args, **(kwargs or {}))
        self.counts[func._opname] += 1
        launcher = getattr(importlib.import_module(LAUNCHERS[func._opname]), func._opname)
        return launcher(*args, **(kwargs or {}))


def run(precision: str, *, device_code: bool) -> tuple[dict[str, Tensor], set[str]]:
    """Hidden states and the gradient of every weight; what was called."""
    torch.manual_seed(3)
    model = Transformer(CONFIG, Precision(precision))  # type: ignore[arg-type]
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
        parameter.main_grad = torch.zeros(parameter.shape)  # type: ignore[attr-defined]
    tokens = torch.randint(CONFIG.vocab_size, (1, TOKENS))
    mode = OnDeviceCode()
    with interpret(), mode if device_code else nullcontext():
        output = model(tokens)
        hidden, balance = output.hidden, [routing.balance for routing in output.routings.values()]
        # alpha of §4.2.
        ends = [torch.randn(hidden.shape).bfloat16(), *(torch.full_like(each, 1e-4) for each in balance)]
        torch.autograd.backward([hidden, *balance], ends)
    # Norms too add to `main_grad`, autograd has none.
    assert all(weight.grad is None for weight in model.parameters())
    gradients = {name: weight.main_grad for name, weight in model.named_parameters()}
    # The head has not run.
    del gradients["lm_head.weight"]
    return {"hidden": hidden.detach(), **gradients}, set(mode.counts)


# Launchers that this training does not call: dequantising alone, gradients in BF16 that a probe samples, inputs that no
# norm has quantised, E5M6, what V3's heads do not need, the loss, the optimizer and what it does without BF16 weights.
NOT_IN_TRAINING = {"dequantize_tiles", "gated_swiglu_backward_kept", "swiglu_backward_kept", "requantize_transposed"}
NOT_IN_TRAINING |= {"pack_e5m6", "unpack_e5m6", "turn_back", "adamw"}
NOT_IN_TRAINING |= {"range_amax", "quantize_range", "transpose_blocks", "cross_entropy", "sums_of_squares"}
# Attention's output in 12 bits: the linear alone, below.
IN_12_BITS = {"quantize_pack", "unpack_quantize_transposed"}


def test_device_code_and_references_train_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within two BF16 roundings; measured 5.5e-3 in FP8, all by the norms' sums (1.8e-7 without), 5.7e-3 in BF16."""
    monkeypatch.setattr(gemm_fp8, "use_gluon", lambda _: True)
    called: set[str] = set()
    for precision in ("fp8", "bf16"):
        expected, _ = run(precision, device_code=False)
        actual, calls = run(precision, device_code=True)
        assert actual.keys() == expected.keys()
        errors = {name: relative_error(actual[name], wanted.double()) for name, wanted in expected.items()}
        assert {name: error for name, error in errors.items() if not error < 2**-7} == {}, precision
        called |= calls
    assert set(LAUNCHERS) - called <= NOT_IN_TRAINING | IN_12_BITS


def test_a_linear_that_keeps_its_input_in_12_bits_is_the_references() -> None:
    """Product, what it gives back, dx and dW: all within FP32 sums of another order, before a rounding to BF16."""
    x, dy = torch.randn(TOKENS, 256).bfloat16(), torch.randn(TOKENS, 64).bfloat16()
    found: list[list[Tensor]] = []
    for mode in (nullcontext(), OnDeviceCode()):
        leaf, weight = (
            x.clone().requires_grad_(),
            torch.nn.Parameter(torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).bfloat16()),
        )
        weight.main_grad = torch.zeros(weight.shape)  # type: ignore[attr-defined]
        given: list[Tensor] = []
        with mode:
            y = fp8_linear_e5m6(leaf, weight, power_of_two=True, give_back=given.append)
            y.backward(dy)
        assert leaf.grad is not None
        found.append([*given, y.detach(), leaf.grad, weight.main_grad])  # type: ignore[attr-defined]
    assert set(mode.counts) >= IN_12_BITS
    (kept, *expected), (given_back, *actual) = found
    assert torch.equal(kept, given_back)
    for result, wanted in zip(actual, expected, strict=True):
        assert relative_error(result, wanted.double()) < 2**-12
