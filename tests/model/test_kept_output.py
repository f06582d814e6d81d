"""Attention's output in E5M6: what both backwards see, what that does to gradients, and what is alive meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from kernels import attention, deferred
from kernels.attention import causal_attention, causal_attention_of_output
from kernels.e5m6 import pack_e5m6, unpack_e5m6
from kernels.fp8_linear import fp8_linear_e5m6, fp8_linear_of_kept, weight_fp8
from tests.tiny_model import TINY
from tests.varlen_flash import varlen_flash_on_cpu
from train.model import kept_output
from train.model.init import initialize
from train.model.kept_output import KeptOutput
from train.model.precision import Precision
from train.model.transformer import Transformer, recompute_up_projections
from train.studies.plan.live_bytes import LiveBytes

SEQUENCES, HEADS, TOKENS, SCALE = 2, 3, 33, 0.3
CPU_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def by_token(o: Tensor) -> Tensor:
    return o.transpose(1, 2).flatten(2)


def by_head(rows: Tensor) -> Tensor:
    return rows.view(SEQUENCES, TOKENS, HEADS, -1).transpose(1, 2)


def fused(q: Tensor, k: Tensor, v: Tensor, *, scale: float, documents: None) -> Tensor:
    """torch's flash kernel of the CPU, with v as wide as q."""
    return attention._fused(q, k, v, scale)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("core", "v_dim"), [(causal_attention_of_output, 16), (fused, 16), (fused, 32)], ids=["ours", "flash", "wide v"]
)
def test_gradients_are_those_of_the_rounded_output_and_within_the_derived_bound(
    core: Callable[..., Tensor], v_dim: int, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against FP64; o_proj's product and weight gradient to the bit those of `fp8_linear_of_kept`."""
    monkeypatch.setattr(attention, "fused_backend", lambda *_: SDPBackend.FLASH_ATTENTION)
    monkeypatch.setattr(kept_output, "CORE_OPERATORS", (*attention.CORE_OPERATORS, CPU_FLASH.name()))
    q, k, v = (torch.randn(SEQUENCES, TOKENS, HEADS, dim).transpose(1, 2).requires_grad_() for dim in (24, 24, v_dim))
    weight, twin = (
        nn.Parameter(torch.randn(40, HEADS * v_dim, generator=torch.Generator().manual_seed(1))) for _ in "ab"
    )
    output, dy = KeptOutput(), torch.randn(SEQUENCES, TOKENS, 40)
    run = partial(core, scale=SCALE, documents=None)
    if recompute:
        o = checkpoint(run, q, k, v, use_reentrant=False, context_fn=output.recorded)
    else:
        o = output.not_saved_by(partial(run, q, k, v))
    o.retain_grad()
    y = fp8_linear_e5m6(by_token(o), weight, power_of_two=True, give_back=output.put)
    y.backward(dy)

    packed = pack_e5m6(by_token(o).flatten(0, 1), power_of_two=True)
    rounded = unpack_e5m6(*packed, out_dtype=torch.float32).view(SEQUENCES, TOKENS, -1)
    for x, same in ((by_token(o), y), (rounded, None)):
        found = fp8_linear_of_kept(x.detach().requires_grad_(), twin, power_of_two=True)
        assert same is None or torch.equal(found, same)
    found.backward(dy)
    assert torch.equal(weight.grad, twin.grad)

    q64, k64, v64, exact, do = (x.detach().double() for x in (q, k, v, o, o.grad))
    p = (q64 @ k64.mT * SCALE + torch.full((TOKENS, TOKENS), -torch.inf).triu(1)).softmax(-1)

    def truth(o: Tensor) -> list[Tensor]:
        ds = p * (do @ v64.mT - (do * o).sum(-1, keepdim=True))
        return [SCALE * ds @ k64, SCALE * ds.mT @ q64, p.mT @ do]

    # delta is off by at most 2^-7 sum |do o|; dq by that times the mean key, dk by that and p times the queries.
    delta = 2**-7 * (do * exact).abs().sum(-1, keepdim=True)
    bounds = [SCALE * delta * (p @ k64).abs(), SCALE * (p * delta).mT @ q64.abs(), torch.zeros(())]
    ours = [x.grad.double() for x in (q, k, v)]
    for grad, seen, unrounded, bound in zip(ours, truth(by_head(rounded.double())), truth(exact), bounds, strict=True):
        # FP32 sums of at most 33 terms.
        slack = 1e-5 * float(seen.abs().max())
        assert float((grad - seen).abs().max()) <= slack
        assert bool(((grad - unrounded).abs() <= bound + slack).all())
        assert bound.dim() == 0 or float((grad - unrounded).abs().max()) > 30 * slack, "o was not rounded"


class LaidByToken(TorchDispatchMode):
    """The core lays out o token by token in memory, as cuDNN does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if func.name() not in attention.CORE_OPERATORS:
            return results
        o, *others = results
        return o.transpose(1, 2).contiguous().transpose(1, 2), *others


def outcome(
    kept: str, *, recompute: bool = False, queued: bool = False, documents: Tensor | None = None
) -> list[Tensor]:  # fmt: skip
    """Hidden states and gradients of a tiny FP8 model."""
    net = Transformer(replace(TINY, num_nextn_predict_layers=0), Precision("fp8", attention_output=kept))  # type: ignore[arg-type]
    initialize(net, seed=0, std=0.1)
    if recompute:
        recompute_up_projections(net)
    hidden = net(torch.randint(0, 61, (2, 33), generator=torch.Generator().manual_seed(0)), documents).hidden
    if queued:
        with deferred.deferred():
            hidden.float().square().sum().backward()
            deferred.take()()
    else:
        hidden.float().square().sum().backward()
    return [hidden.detach(), *(p.grad for p in net.layers.parameters() if p.grad is not None)]


def test_forward_is_the_same_bits_and_so_are_all_ways_to_backward() -> None:
    plain, found = outcome("bf16"), outcome("e5m6")
    assert torch.equal(plain[0], found[0])
    assert not all(map(torch.equal, plain, found))
    ways = [outcome("e5m6", recompute=True), outcome("e5m6", queued=True)]
    with LaidByToken():
        ways += [outcome("e5m6"), outcome("e5m6", recompute=True, queued=True)]
    for way in ways:
        assert all(map(torch.equal, way, found))


@pytest.mark.parametrize("flash", [True, False], ids=["varlen flash", "one by one"])
def test_each_call_for_documents_apart_reads_its_own_part(flash: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one group and in several; in every order the same bits."""
    documents = torch.tensor([[0] * 5 + [1] * 28, [0] * 32 + [1]])
    with varlen_flash_on_cpu() if flash else nullcontext():
        monkeypatch.setattr(attention, "DOCUMENTS_PER_CALL", 3)
        plain, found = outcome("bf16", documents=documents), outcome("e5m6", documents=documents)
        ways = [outcome("e5m6", recompute=True, queued=queued, documents=documents) for queued in (True, False)]
        monkeypatch.setattr(attention, "DOCUMENTS_PER_CALL", 32)
        ways += [outcome("e5m6", recompute=recompute, documents=documents) for recompute in (True, False)]
        monkeypatch.setattr(kept_output, "CORE_OPERATORS", ())
        exact = outcome("e5m6", documents=documents)
    assert torch.equal(plain[0], found[0])
    for way in ways:
        assert all(map(torch.equal, way, found))
    # Where attention has the exact o, only o_proj's weight gradient sees 12 bits.
    assert not all(map(torch.equal, exact, found))


def test_at_v3s_size_12_bits_are_kept_and_8_wait_for_the_weight_gradient() -> None:
    """And scales; BF16 for neither. Between the two backwards o is there in BF16, for attention's."""
    heads, tokens, v_dim, hidden = 128, 4096, 128, 7168
    width = heads * v_dim
    with FakeTensorMode(), LiveBytes() as live, deferred.deferred():
        q, k, v = (
            torch.empty(1, tokens, heads, dim, dtype=torch.bfloat16).transpose(1, 2).requires_grad_()
            for dim in (192, 192, v_dim)
        )
        weight = nn.Parameter(torch.empty(hidden, width, dtype=torch.bfloat16))
        weight.main_grad = torch.empty(hidden, width)  # type: ignore[attr-defined]
        dy = torch.empty(1, tokens, hidden, dtype=torch.bfloat16)
        weight_fp8(weight, power_of_two=True)
        before = live.now

        output = KeptOutput()
        o = output.not_saved_by(partial(causal_attention, q, k, v, scale=1.0, documents=None))
        y = fp8_linear_e5m6(by_token(o), weight, power_of_two=True, give_back=output.put)
        del o
        log_sums = 4 * heads
        assert live.now - before == tokens * (2 * hidden + 12 * width // 8 + width // 32 + log_sums)
        y.backward(dy)
        del y
        before += 2 * tokens * heads * (192 + 192 + v_dim)
        assert live.now - before == tokens * (hidden + width) * 33 // 32
        deferred.take()()
        assert live.now == before
