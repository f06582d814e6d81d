"""Causal attention equals a softmax written out in fp64, never looks ahead, and never crosses a document."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.backends import cuda
from torch.nn.attention import SDPBackend

from kernels import attention
from kernels.attention import causal_attention, causal_attention_reference
from tests.kernels.gemm_inputs import beside_reference, relative_error


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
            weights = torch.stack([(q[s, :, t] * k[s, :, j]).sum(-1) * scale for j in keys], -1).softmax(-1)
            rows.append(sum(weights[:, n, None] * v[s, :, j] for n, j in enumerate(keys)))
        sequences.append(torch.stack(rows, 1))
    return torch.stack(sequences)


def documents(tokens: int) -> Tensor:
    """Sequence 0 holds three documents, sequence 1 one."""
    first = torch.arange(tokens) * 3 // max(tokens, 3)
    return torch.stack((first, torch.zeros_like(first)))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("tokens", "qk_dim", "v_dim"), [(1, 8, 4), (17, 12, 20), (33, 24, 16)])
def test_fp32_output_and_gradients_equal_the_written_out_softmax(
    tokens: int, qk_dim: int, v_dim: int, masked: bool
) -> None:
    leaves = inputs(tokens, qk_dim, v_dim, torch.float32)
    how = {"scale": 0.3, "document_ids": documents(tokens) if masked else None}
    for a, b in beside_reference(partial(causal_attention, **how), partial(naive, **how), *leaves):
        # Sums of at most 33 terms in fp32: 33 * 2^-24 = 2e-6 relative, a few such in a row.
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tokens", [63, 129])
def test_bf16_output_and_gradients_stay_within_their_roundings(tokens: int, masked: bool) -> None:
    leaves = inputs(tokens, 96, 64, torch.bfloat16)
    how = {"scale": 96**-0.5, "document_ids": documents(tokens) if masked else None}
    for a, b in beside_reference(partial(causal_attention, **how), partial(causal_attention_reference, **how), *leaves):
        assert a.dtype == torch.bfloat16
        # Scores, probabilities, their gradient and the result are each rounded to bf16 once, at most 2^-8 and
        # 2^-8 / sqrt(3) in the mean square: sqrt(4 / 3) * 2^-8 < 2^-7.
        assert relative_error(a, b) < 2**-7


def test_gradients_in_fp64() -> None:
    leaves = inputs(4, 3, 2, torch.float64)
    for document_ids in (torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]]), None):
        assert torch.autograd.gradcheck(partial(causal_attention, scale=0.7, document_ids=document_ids), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_later_tokens_and_other_documents_change_no_bit(dtype: torch.dtype) -> None:
    q, k, v = (x.detach() for x in inputs(32, 16, 8, dtype))
    before = causal_attention(q, k, v, scale=0.25, document_ids=None)
    k[:, :, 20:], v[:, :, 20:] = 7.0, -7.0
    after = causal_attention(q, k, v, scale=0.25, document_ids=None)
    assert torch.equal(before[:, :, :20], after[:, :, :20])
    assert not torch.equal(before[:, :, 20:], after[:, :, 20:])

    document_ids = (torch.arange(32) >= 10).long().expand(2, 32)
    before = causal_attention(q, k, v, scale=0.25, document_ids=document_ids)
    k[:, :, :10], v[:, :, :10] = 3.0, -3.0
    after = causal_attention(q, k, v, scale=0.25, document_ids=document_ids)
    assert torch.equal(before[:, :, 10:], after[:, :, 10:])
    assert not torch.equal(before[:, :, :10], after[:, :, :10])


def test_backward_repeats_to_the_bit() -> None:
    leaves = inputs(129, 24, 16, torch.bfloat16)
    runs = [causal_attention(*leaves, scale=0.2, document_ids=None) for _ in range(3)]
    first, *others = (torch.cat([g.flatten() for g in torch.autograd.grad(o.sum(), leaves)]) for o in runs)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("broken", [0, 1, 2])
def test_a_nan_in_q_k_or_v_reaches_the_output(dtype: torch.dtype, broken: int) -> None:
    qkv = [x.detach() for x in inputs(16, 8, 8, dtype)]
    qkv[broken][0, 1, 5] = float("nan")
    o = causal_attention(*qkv, scale=0.25, document_ids=None)
    assert bool(o[0, 1, 5].isnan().all())
    # Another sequence and another head do not see it.
    assert bool(o[1].isfinite().all())
    assert bool(o[0, 0].isfinite().all())


def as_torch_accepts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks of torch 2.13 that matter here, as in its ATen/native/transformers/cuda/sdp_utils.cpp.

    cuDNN and flash: half precision; cuDNN not under deterministic algorithms; flash: no mask, one width of at most 256.
    """

    def half(params: cuda.SDPAParams) -> bool:
        return params.query.dtype in (torch.bfloat16, torch.float16)

    def cudnn(params: cuda.SDPAParams) -> bool:
        return half(params) and not torch.are_deterministic_algorithms_enabled()

    def flash(params: cuda.SDPAParams) -> bool:
        widths = {x.shape[-1] for x in (params.query, params.key, params.value)}
        return half(params) and params.attn_mask is None and len(widths) == 1 and max(widths) <= 256

    monkeypatch.setattr(cuda, "can_use_cudnn_attention", cudnn)
    monkeypatch.setattr(cuda, "can_use_flash_attention", flash)
    monkeypatch.setattr(cuda, "can_use_efficient_attention", lambda params: True)


@pytest.mark.parametrize(
    ("widths", "dtype", "masked", "free", "deterministic"),
    [
        ((192, 128), torch.bfloat16, False, "CUDNN", "FLASH"),
        # cuDNN was measured at V3's widths only.
        ((96, 64), torch.bfloat16, False, "FLASH", "FLASH"),
        ((64, 96), torch.bfloat16, False, "FLASH", "FLASH"),
        ((320, 64), torch.bfloat16, False, "EFFICIENT", "EFFICIENT"),
        ((192, 128), torch.bfloat16, True, "CUDNN", "EFFICIENT"),
        ((192, 128), torch.float32, False, "EFFICIENT", "EFFICIENT"),
    ],
)
def test_on_a_gpu_the_fastest_of_torchs_kernels_is_taken(
    widths: tuple[int, int],
    dtype: torch.dtype,
    masked: bool,
    free: str,
    deterministic: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without the padding deterministic runs of V3 would take the efficient kernel: 40 ms a layer instead of 12."""
    as_torch_accepts(monkeypatch)
    q, k, v = inputs(8, *widths, dtype)
    mask = torch.zeros(1, 1, 8, 8, dtype=dtype) if masked else None
    for algorithms, expected in ((False, free), (True, deterministic)):
        torch.use_deterministic_algorithms(algorithms)
        assert attention.fused_backend(q, k, v, mask).name == f"{expected}_ATTENTION"


@pytest.mark.parametrize(("qk_dim", "v_dim"), [(24, 16), (16, 24), (16, 16)])
def test_flash_on_widened_heads_is_attention(qk_dim: int, v_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's flash kernel of the CPU, which refuses other widths just as the GPU's does."""
    monkeypatch.setattr(attention, "fused_backend", lambda *_: SDPBackend.FLASH_ATTENTION)
    leaves = inputs(33, qk_dim, v_dim, torch.float32)
    ours = partial(attention._fused, scale=0.3, mask=None)
    for a, b in beside_reference(ours, partial(naive, scale=0.3, document_ids=None), *leaves):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_torchs_checks_are_there_and_a_cpu_has_its_own_name() -> None:
    q, k, v = inputs(8, 192, 128, torch.bfloat16)
    assert attention.fused_backend(q, k, v, None) is SDPBackend.MATH, "none of them takes tensors of a CPU"
    dims = {"heads": 2, "qk_dim": 192, "v_dim": 128, "dtype": torch.bfloat16}
    assert attention.backend_name(**dims, device=torch.device("cpu")) == "batched GEMMs"
