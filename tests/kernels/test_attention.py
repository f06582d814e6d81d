"""Causal attention equals a softmax written out in fp64, never looks ahead, and never crosses a document."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.backends import cuda
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import attention
from kernels.attention import Packed, causal_attention, causal_attention_reference, documents_of
from tests.kernels.gemm_inputs import beside_reference, relative_error
from tests.varlen_flash import varlen_flash_on_cpu


def inputs(tokens: int, qk_dim: int, v_dim: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v as the model makes them: [sequences, heads, tokens, dim], heads beside each other in memory."""
    dims = (qk_dim, qk_dim, v_dim)
    return [torch.randn(2, tokens, 3, dim).to(dtype).transpose(1, 2).requires_grad_() for dim in dims]


def naive(q: Tensor, k: Tensor, v: Tensor, scale: float, document_ids: Tensor | None) -> Tensor:
    """Query by query in fp64, over exactly the keys it may read."""
    q, k, v = q.double(), k.double(), v.double()
    sequences = []
    for s in range(q.shape[0]):
        rows = []
        for t in range(q.shape[2]):
            keys = [j for j in range(t + 1) if document_ids is None or document_ids[s, j] == document_ids[s, t]]
            weights = ((q[s, :, t, None] * k[s, :, keys]).sum(-1) * scale).softmax(-1)  # [heads, keys]
            rows.append((weights[..., None] * v[s, :, keys]).sum(1))
        sequences.append(torch.stack(rows, 1))
    return torch.stack(sequences)


def three_and_one(tokens: int) -> Tensor:
    """Ids: sequence 0 holds three documents, sequence 1 one."""
    first = torch.arange(tokens) * 3 // max(tokens, 3)
    return torch.stack((first, torch.zeros_like(first)))


def on_cpu(document_ids: Tensor | None) -> Packed | None:
    return documents_of(document_ids, torch.device("cpu"))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("tokens", "qk_dim", "v_dim"), [(1, 8, 4), (17, 12, 20), (33, 24, 16)])
def test_fp32_output_and_gradients_equal_the_written_out_softmax(
    tokens: int, qk_dim: int, v_dim: int, masked: bool
) -> None:
    leaves = inputs(tokens, qk_dim, v_dim, torch.float32)
    ids = three_and_one(tokens) if masked else None
    ours = partial(causal_attention, scale=0.3, documents=on_cpu(ids))
    for a, b in beside_reference(ours, partial(naive, scale=0.3, document_ids=ids), *leaves):
        # Sums of at most 33 terms in fp32: 33 * 2^-24 = 2e-6 relative, a few such in a row.
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tokens", [63, 129])
def test_bf16_output_and_gradients_stay_within_their_roundings(tokens: int, masked: bool) -> None:
    leaves = inputs(tokens, 96, 64, torch.bfloat16)
    how = {"scale": 96**-0.5, "documents": on_cpu(three_and_one(tokens) if masked else None)}
    for a, b in beside_reference(partial(causal_attention, **how), partial(causal_attention_reference, **how), *leaves):
        assert a.dtype == torch.bfloat16
        # Scores, probabilities, their gradient and the result are each rounded to bf16 once, at most 2^-8 and
        # 2^-8 / sqrt(3) in the mean square: sqrt(4 / 3) * 2^-8 < 2^-7.
        assert relative_error(a, b) < 2**-7


def test_gradients_in_fp64() -> None:
    leaves = inputs(4, 3, 2, torch.float64)
    for documents in (on_cpu(torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])), None):
        assert torch.autograd.gradcheck(partial(causal_attention, scale=0.7, documents=documents), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_later_tokens_and_other_documents_change_no_bit(dtype: torch.dtype) -> None:
    q, k, v = (x.detach() for x in inputs(32, 16, 8, dtype))
    before = causal_attention(q, k, v, scale=0.25, documents=None)
    k[:, :, 20:], v[:, :, 20:] = 7.0, -7.0
    after = causal_attention(q, k, v, scale=0.25, documents=None)
    assert torch.equal(before[:, :, :20], after[:, :, :20])
    assert not torch.equal(before[:, :, 20:], after[:, :, 20:])

    documents = on_cpu((torch.arange(32) >= 10).long().expand(2, 32))
    before = causal_attention(q, k, v, scale=0.25, documents=documents)
    k[:, :, :10], v[:, :, :10] = 3.0, -3.0
    after = causal_attention(q, k, v, scale=0.25, documents=documents)
    assert torch.equal(before[:, :, 10:], after[:, :, 10:])
    assert not torch.equal(before[:, :, :10], after[:, :, :10])


def test_backward_repeats_to_the_bit() -> None:
    leaves = inputs(129, 24, 16, torch.bfloat16)
    runs = [causal_attention(*leaves, scale=0.2, documents=None) for _ in range(3)]
    first, *others = (torch.cat([g.flatten() for g in torch.autograd.grad(o.sum(), leaves)]) for o in runs)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("broken", [0, 1, 2])
def test_a_nan_in_q_k_or_v_reaches_the_output(dtype: torch.dtype, broken: int) -> None:
    qkv = [x.detach() for x in inputs(16, 8, 8, dtype)]
    qkv[broken][0, 1, 5] = float("nan")
    o = causal_attention(*qkv, scale=0.25, documents=None)
    assert bool(o[0, 1, 5].isnan().all())
    # Another sequence and another head do not see it.
    assert bool(o[1].isfinite().all())
    assert bool(o[0, 0].isfinite().all())


def as_torch_accepts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks of torch 2.13 that matter here, as in its ATen/native/transformers/cuda/sdp_utils.cpp.

    cuDNN and flash: half precision; cuDNN not under deterministic algorithms; flash: one width of at most 256.
    """

    def half(params: cuda.SDPAParams) -> bool:
        return params.query.dtype in (torch.bfloat16, torch.float16)

    def cudnn(params: cuda.SDPAParams) -> bool:
        return half(params) and not torch.are_deterministic_algorithms_enabled()

    def flash(params: cuda.SDPAParams) -> bool:
        widths = {x.shape[-1] for x in (params.query, params.key, params.value)}
        return half(params) and len(widths) == 1 and max(widths) <= 256

    monkeypatch.setattr(cuda, "can_use_cudnn_attention", cudnn)
    monkeypatch.setattr(cuda, "can_use_flash_attention", flash)
    monkeypatch.setattr(cuda, "can_use_efficient_attention", lambda params: True)


@pytest.mark.parametrize(
    ("widths", "dtype", "free", "deterministic"),
    [
        ((192, 128), torch.bfloat16, "CUDNN", "FLASH"),
        # cuDNN was measured at V3's widths only.
        ((96, 64), torch.bfloat16, "FLASH", "FLASH"),
        ((64, 96), torch.bfloat16, "FLASH", "FLASH"),
        ((320, 64), torch.bfloat16, "EFFICIENT", "EFFICIENT"),
        ((192, 128), torch.float32, "EFFICIENT", "EFFICIENT"),
    ],
)
def test_on_a_gpu_the_fastest_of_torchs_kernels_is_taken(
    widths: tuple[int, int], dtype: torch.dtype, free: str, deterministic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the padding deterministic runs of V3 would take the efficient kernel: 40 ms a layer instead of 12."""
    as_torch_accepts(monkeypatch)
    q, k, v = inputs(8, *widths, dtype)
    for algorithms, expected in ((False, free), (True, deterministic)):
        torch.use_deterministic_algorithms(algorithms)
        assert attention.fused_backend(q, k, v).name == f"{expected}_ATTENTION"


@pytest.mark.parametrize(("qk_dim", "v_dim"), [(24, 16), (16, 24), (16, 16)])
def test_flash_on_widened_heads_is_attention(qk_dim: int, v_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's flash kernel of the CPU, which refuses other widths just as the GPU's does."""
    monkeypatch.setattr(attention, "fused_backend", lambda *_: SDPBackend.FLASH_ATTENTION)
    leaves = inputs(33, qk_dim, v_dim, torch.float32)
    ours = partial(attention._fused, scale=0.3)
    for a, b in beside_reference(ours, partial(naive, scale=0.3, document_ids=None), *leaves):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_torchs_checks_are_there_and_a_cpu_has_its_own_name() -> None:
    q, k, v = inputs(8, 192, 128, torch.bfloat16)
    assert attention.fused_backend(q, k, v) is SDPBackend.MATH, "none of them takes tensors of a CPU"
    dims = {"heads": 2, "qk_dim": 192, "v_dim": 128, "dtype": torch.bfloat16}
    name = partial(attention.backend_name, **dims, device=torch.device("cpu"))
    assert name() == "batched GEMMs"
    assert name(documents=True) == "batched GEMMs; each document alone where a sample has several"


# A long document and one token; one token and a long document; all of one token; three.
PACKED = torch.tensor([[0] * 8 + [1], [0] + [1] * 8, [*range(9)], [0, 0, 0, 1, 1, 1, 1, 2, 2]])


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_boundaries_of_shifted_sequences_have_a_closed_form(depth: int) -> None:
    """MTP depth k attends among positions 0 .. T - k - 1: an end e of sequence r is at r (T - k) + min(e, T - k)."""
    tokens = 9 - depth
    ends = [[8, 9], [1, 9], [*range(1, 10)], [3, 7, 9]]
    expected = sorted({0} | {row * tokens + min(end, tokens) for row, each in enumerate(ends) for end in each})
    documents = on_cpu(PACKED[:, :tokens])
    assert documents is not None
    (cumulative,) = documents.cumulative
    assert cumulative.tolist() == expected
    assert on_cpu(torch.tensor([[0] * 8, [3] * 8])) is None, "no sequence is cut"


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operator returned, and the operators' names."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.names = 0, set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.add(func._opname)
        returned = [x for x in (out if isinstance(out, list | tuple) else [out]) if isinstance(x, Tensor)]
        self.elements = max([self.elements, *(x.numel() for x in returned)])
        return out


@pytest.mark.parametrize("per_call", [32, 4, 1])
def test_varlen_flash_keeps_documents_apart(per_call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own operator and autograd of it; what runs on a GPU is written out from its arguments, in FP64."""
    monkeypatch.setattr(attention, "DOCUMENTS_PER_CALL", per_call)
    leaves = [torch.randn(4, 9, 3, dim, dtype=torch.float64).transpose(1, 2).requires_grad_() for dim in (12, 12, 20)]
    how = {"scale": 0.3, "documents": on_cpu(PACKED)}
    truth = partial(naive, scale=0.3, document_ids=PACKED)
    with varlen_flash_on_cpu() as flash:
        pairs = beside_reference(partial(causal_attention, **how), truth, *leaves)
    # 2, 2, 9 and 3 documents.
    assert (sum(flash.documents), max(flash.documents)) == (16, min(per_call, 16))
    assert flash.backwards == len(flash.documents)
    for f in (causal_attention, causal_attention_reference):
        pairs += beside_reference(partial(f, **how), truth, *leaves)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_with_documents_nothing_of_tokens_squared_is_written_and_no_value_is_read() -> None:
    """On fake tensors, whose values cannot be read; `varlen_attn` is torch's own."""
    documents = on_cpu((torch.arange(4096) % 1000 == 0).cumsum(0)[None])
    assert documents is not None
    with FakeTensorMode() as fake, varlen_flash_on_cpu(), Largest() as seen:
        q, k, v = (torch.empty(1, 2, 4096, d, dtype=torch.bfloat16, requires_grad=True) for d in (192, 192, 128))
        documents = replace(documents, cumulative=tuple(map(fake.from_tensor, documents.cumulative)))
        causal_attention(q, k, v, scale=0.3, documents=documents).sum().backward()
    assert {"_varlen_attn", "_varlen_attn_backward"} <= seen.names
    assert seen.elements == q.numel() < 4096 * 4096
