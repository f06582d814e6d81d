"""Whole MoE blocks on a GPU: a CUDA graph gives the same bits, nothing waits for the device, references serve too.

Attention that keeps documents apart likewise.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.attention import causal_attention, causal_attention_reference, documents_of
from tests.kernels.gemm_inputs import relative_error
from train.studies.bench import layer as bench_layer
from train.studies.bench.layer import Layers, Sizes
from train.studies.smoke_runs import PrecisionName

pytestmark = pytest.mark.gpu


def sizes() -> Sizes:
    """Blocks whose every linear takes the Gluon GEMM: widths of V3 divided by 8, heads as wide as V3's."""
    model = replace(
        bench_layer.v3_sizes().model,
        hidden_size=896,
        moe_intermediate_size=256,
        num_attention_heads=4,
        q_lora_rank=192,
        kv_lora_rank=128,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        initializer_range=0.017,
    )
    return Sizes(model, tokens=384)


def results(layers: Layers, output: Tensor) -> dict[str, Tensor]:
    """Output, input gradient and every weight gradient."""
    assert layers.x.grad is not None
    grads = {name: grad.clone() for name, grad in layers.gradients().items()}
    return {"output": output.clone(), "input": layers.x.grad.clone(), **grads}


@pytest.mark.parametrize("precision", bench_layer.PRECISIONS)
def test_a_cuda_graph_of_forward_and_backward_replays_to_the_bit(
    precision: PrecisionName, device: torch.device
) -> None:
    """With a local dispatcher and a fixed number of tokens no size depends on a value."""
    layers = bench_layer.make(sizes(), precision, device)
    layers.step()
    layers.forget()
    expected = results(layers, layers.step())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            layers.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # What is captured is the first micro-batch of a step, which writes where later ones add.
    layers.forget()
    with torch.cuda.graph(graph):
        output = layers.step()
    for _ in range(2):
        graph.replay()
    actual = results(layers, output)
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("precision", bench_layer.PRECISIONS)
def test_forward_and_backward_never_wait_for_the_device(
    precision: PrecisionName, deterministic: bool, device: torch.device
) -> None:
    torch.use_deterministic_algorithms(deterministic)
    layers = bench_layer.make(sizes(), precision, device)
    for _ in range(2):
        layers.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layers.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(bool(value.isfinite().all()) for value in results(layers, layers.step()).values())


@pytest.mark.parametrize(
    ("deterministic", "dtype"), [(True, torch.bfloat16), (False, torch.bfloat16), (True, torch.float32)]
)
def test_attention_keeps_documents_apart_and_never_waits(
    deterministic: bool, dtype: torch.dtype, device: torch.device
) -> None:
    """V3's head dims; about 50 documents a sequence, so that flash is called more than once. FP32 it does not take."""
    torch.use_deterministic_algorithms(deterministic)
    generator = torch.Generator().manual_seed(0)
    ids = (torch.rand(2, 257, generator=generator) < 0.2).cumsum(1)
    q, k, v, grad = (
        torch.randn(2, 257, 4, dim, generator=generator).to(device, dtype).transpose(1, 2).requires_grad_()
        for dim in (192, 192, 128, 128)
    )

    def results(attend: Callable[..., Tensor]) -> list[Tensor]:
        o = attend(q, k, v, scale=192**-0.5, documents=documents_of(ids, device))
        return [o, *torch.autograd.grad(o, (q, k, v), grad)]

    results(causal_attention)
    torch.cuda.set_sync_debug_mode("error")
    try:
        once, again = results(causal_attention), results(causal_attention)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    if deterministic:
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    # Roundings as in tests/kernels/test_attention.py; in FP32 tensor cores may round products to TF32.
    assert max(relative_error(a, b) for a, b in zip(once, results(causal_attention_reference), strict=True)) < 2**-7


REFERENCE = """
import sys
import torch
from kernels.backend import use_backend
from train.studies import smoke_runs
from train.studies import step_parity

use_backend("reference")
smoke_runs.prepare(deterministic=True)
found = step_parity.compare_step(smoke_runs.smoke_run("tiny", sequences=1, tokens=64), "fp8", torch.device("cuda"))
print([name for name in sys.modules if name.startswith("kernels.gpu")], found.worst_error, found.green)
"""


def test_the_backend_of_references_runs_no_kernel(
    run_command: Callable[..., subprocess.CompletedProcess[str]], device: torch.device
) -> None:
    done = run_command("-c", REFERENCE, PYTHONPATH=".")
    assert done.stdout.startswith("[] "), f"a kernel ran: {done.stdout}"
    assert done.stdout.strip().endswith("True"), f"the references on the GPU differ from the CPU's: {done.stdout}"
