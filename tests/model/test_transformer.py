"""The model as a whole: initial values by name, MTP shapes, causality, document masks."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor

from kernels.attention import causal_attention_reference
from kernels.operators import NAMESPACE
from tests.operator_calls import OperatorCalls
from tests.tiny_model import TINY
from tests.varlen_flash import varlen_flash_on_cpu
from train.model import attention
from train.model.config import ModelConfig
from train.model.init import initialize
from train.model.layers import Linear
from train.model.moe import Experts
from train.model.phases import arrived
from train.model.precision import Precision
from train.model.transformer import Transformer, recompute_up_projections

PrecisionName = Literal["fp32", "bf16", "fp8"]


def model(config: ModelConfig = TINY, seed: int = 0, precision: PrecisionName = "fp32") -> Transformer:
    built = Transformer(config, Precision(precision))
    initialize(built, seed=seed, std=config.initializer_range)
    return built


def test_initial_values_depend_on_seed_and_name_only() -> None:
    deep = model(replace(TINY, num_hidden_layers=3))
    shallow = model()
    same = set(dict(shallow.named_parameters())) & set(dict(deep.named_parameters()))
    assert "layers.1.mlp.experts.gate_up_proj" in same
    for name in same:
        assert torch.equal(deep.get_parameter(name), shallow.get_parameter(name)), name
    other = model(seed=1)
    assert not torch.equal(other.lm_head.weight, shallow.lm_head.weight)


def test_an_expert_has_the_same_values_whatever_stack_it_is_in() -> None:
    class Holder(torch.nn.Module):
        def __init__(self, experts: range) -> None:
            super().__init__()
            self.experts = Experts(TINY, Precision("fp32"), experts)

    whole, half = Holder(range(4)), Holder(range(2, 4))
    for part in (whole, half):
        initialize(part, seed=0, std=0.1)
    assert torch.equal(whole.experts.down_proj[2:], half.experts.down_proj)


def test_initial_spread_is_the_configured_one() -> None:
    weight = model(replace(TINY, hidden_size=256)).lm_head.weight
    # The standard deviation of n normal draws has relative error 1/sqrt(2n) = 0.6 % at n = 15,616; five of those.
    assert abs(float(weight.detach().std()) / TINY.initializer_range - 1) < 5 * 0.006


def test_no_output_depends_on_a_later_token() -> None:
    net = model()
    ids = torch.randint(0, TINY.vocab_size, (1, 16), generator=torch.Generator().manual_seed(1))
    changed = ids.clone()
    changed[0, 10] = (changed[0, 10] + 1) % TINY.vocab_size
    before, after = net(ids), net(changed)
    assert torch.equal(before.hidden[:, :10], after.hidden[:, :10])
    assert not torch.equal(before.hidden[:, 10:], after.hidden[:, 10:])
    for depth, (old, new) in enumerate(zip(before.mtp_hidden, after.mtp_hidden, strict=True), start=1):
        # Depth k at position i has read token i + k.
        assert old.shape[1] == 16 - depth
        assert torch.equal(old[:, : 10 - depth], new[:, : 10 - depth])
        assert not torch.equal(old[:, 10 - depth], new[:, 10 - depth])


def test_document_ids_cut_attention_between_documents() -> None:
    net = model()
    generator = torch.Generator().manual_seed(2)
    first, second = torch.randint(0, TINY.vocab_size, (2, 1, 8), generator=generator)
    packed = torch.cat((first, second), dim=1)
    documents = torch.tensor([[0] * 8 + [1] * 8])
    masked, unmasked = net(packed, documents), net(packed)
    for start, alone in ((0, net(first)), (8, net(second))):
        # Same numbers up to the order of FP32 sums, and to RoPE's angles, which are of positions in the sequence.
        torch.testing.assert_close(masked.hidden[:, start : start + 8], alone.hidden, rtol=1e-5, atol=1e-5)
        for packed_depth, depth in zip(masked.mtp_hidden, alone.mtp_hidden, strict=True):
            rows = packed_depth[:, start : start + depth.shape[1]]
            torch.testing.assert_close(rows, depth, rtol=1e-5, atol=1e-5)
    for with_mask, without in zip(
        (masked.hidden, *masked.mtp_hidden), (unmasked.hidden, *unmasked.mtp_hidden), strict=True
    ):
        assert (with_mask[:, 8:] - without[:, 8:]).abs().max() > 1e-3


def test_varlen_flash_serves_every_layer_and_depth_and_is_not_repeated_by_recomputation() -> None:
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(TINY.vocab_size, (2, 12), generator=generator)
    probe = torch.randn(2, 12, TINY.hidden_size, generator=generator)
    documents = torch.tensor([[0] * 5 + [1] * 7, [0] * 11 + [1]])

    def gradients(*, recompute: bool) -> list[Tensor]:
        net = model()
        if recompute:
            recompute_up_projections(net)
        output = net(tokens, documents)
        sum((x * probe[:, : x.shape[1]]).sum() for x in (output.hidden, *output.mtp_hidden)).backward()
        return [p.grad for p in net.parameters() if p.grad is not None]

    expected = gradients(recompute=False)
    with varlen_flash_on_cpu() as flash:
        kept = gradients(recompute=False)
        # Two layers and two depths; without its last token, and the one before, the second sequence has one document.
        assert flash.documents == [4, 4, 3, 3]
        again = gradients(recompute=True)
    assert flash.documents == [4, 4, 3, 3] * 2
    for a, b, c in zip(expected, kept, again, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
        assert torch.equal(b, c)


def test_phases_compose_to_the_block() -> None:
    net = model()
    block = net.layers["1"]
    hidden = torch.randn(2, 6, TINY.hidden_size, generator=torch.Generator().manual_seed(3))
    delta = torch.randn_like(hidden)
    routed = block.route(*block.attend(hidden, delta, None))
    dispatched = arrived(block.dispatch(routed))
    combined = arrived(block.combine(routed, dispatched, block.experts(dispatched), block.shared(routed)))
    residual, whole, routing = block(hidden, delta, None)
    assert torch.equal(residual, routed.residual)
    assert torch.equal(whole, combined)
    assert int(routing.counts.sum()) == 2 * 6 * TINY.num_experts_per_tok


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_forward_hooks_fire_on_every_linear(precision: PrecisionName) -> None:
    """A probe sees the input and output of each linear: none is read past its `forward`."""
    whole = model(precision=precision)
    fired: Counter[str] = Counter()
    linears = {name: module for name, module in whole.named_modules() if isinstance(module, Linear)}
    for name, module in linears.items():
        module.register_forward_hook(lambda _, args, output, name=name: fired.update([name]))
    output = whole(torch.randint(TINY.vocab_size, (2, 9)))
    whole.logits(output.hidden)
    # 2 layers and 2 MTP depths of 4 in attention; FFNs of 2, 3 of them shared experts; 2 eh_proj, the head.
    assert len(linears) == 4 * 4 + 4 * 2 + 2 + 1
    assert fired == dict.fromkeys(linears, 1)


class LaidOutAsInputs(torch.autograd.Function):
    """Attention with the memory of torch's cuDNN backend: o has q's order of dims, gradients those of q, k and v.

    Source: `alloc_with_matching_layout` and `empty_like` in torch 2.13, ATen/native/cudnn/MHA.cpp.
    """

    given: ClassVar[list[Tensor]] = []

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.scale = scale
        order = sorted(range(4), key=q.stride, reverse=True)
        shape = (*q.shape[:3], v.shape[3])
        o = q.new_empty([shape[dim] for dim in order]).permute([order.index(dim) for dim in range(4)])
        return o.copy_(causal_attention_reference(q, k, v, scale=scale, documents=None))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            o = causal_attention_reference(*inputs, scale=ctx.scale, documents=None)
            found = torch.autograd.grad(o, inputs, grads[0])
        returned = [torch.empty_like(x).copy_(grad) for x, grad in zip(inputs, found, strict=True)]
        LaidOutAsInputs.given += returned
        return *returned, None


class FirstArguments(OperatorCalls):
    """Where the first argument of each call of an operator lies."""

    def __init__(self) -> None:
        super().__init__()
        self.places: dict[str, set[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == NAMESPACE:
            self.places.setdefault(func._opname, set()).add(args[0].data_ptr())
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_attentions_output_and_gradients_are_not_copied_where_they_are_laid_out_as_its_inputs(
    precision: PrecisionName, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Tensor] = []
    written: list[Tensor] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, *, scale: float, documents: None) -> Tensor:
        o: Tensor = LaidOutAsInputs.apply(q, k, v, scale)  # type: ignore[no-untyped-call]
        written.append(o.detach())
        return o

    monkeypatch.setattr(attention, "causal_attention", attend)
    monkeypatch.setattr(LaidOutAsInputs, "given", [])
    net = model(replace(TINY, num_nextn_predict_layers=0), precision=precision)
    for block in net.layers.values():
        block.self_attn.o_proj.register_forward_pre_hook(lambda _, args: read.append(args[0].detach()))
    with FirstArguments() as calls:
        net(torch.randint(TINY.vocab_size, (2, 9))).hidden.float().square().sum().backward()
    heads, v_dim = TINY.num_attention_heads, TINY.v_head_dim
    for o, x in zip(written, read, strict=True):
        assert o.stride() == (9 * heads * v_dim, v_dim, heads * v_dim, 1)
        assert x.data_ptr() == o.data_ptr()
        assert x.is_contiguous()
    if precision == "fp8":
        dq, dk, dv = (LaidOutAsInputs.given[nth::3] for nth in range(3))
        assert calls.places["turn_back"] == {grad.data_ptr() for grad in dq}
        assert calls.places["rope_key_backward"] == {grad.data_ptr() for grad in dk}
        assert len(dv) == 2
