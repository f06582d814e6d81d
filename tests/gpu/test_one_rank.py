"""On one GPU: NCCL among one rank, a second CUDA stream, and the interface of an installed Transformer Engine."""

from __future__ import annotations

import importlib
import importlib.util
import inspect

import pytest
import torch
import torch.distributed as dist

from kernels.fp8_linear import fp8_linear
from parallel.layout import Layout
from parallel.mesh import init_processes, make_mesh, shutdown
from tests.gpu.one_rank import average_beside_the_step, collectives, state_right_after_a_step
from tests.parity.te_stand_in import TABLE, signature_of

pytestmark = pytest.mark.gpu


def test_nccl_among_one_rank_carries_what_training_sends(device: torch.device) -> None:
    if not dist.is_nccl_available():
        pytest.skip("this torch was built without NCCL: run `make gpu` with the one that requirements/torch.txt pins")
    torch.cuda.set_device(0)
    init_processes(rank=0, world=1, backend="nccl", store=dist.HashStore(), timeout_s=60)
    mesh = make_mesh(Layout(), device=torch.device("cuda", 0), tied_embedding=True)
    assert (mesh.world.size, mesh.world.group) == (1, None)
    found = collectives(mesh.device)
    shutdown()
    assert [name for name, same in found.items() if not same] == []
    assert len(found) == 6


def test_a_linear_on_a_second_stream_has_the_bits_of_the_first(device: torch.device) -> None:
    """Kernels go to the current stream, whoever is current: a launch elsewhere would read too early."""
    torch.manual_seed(0)
    x, dy = (torch.randn(1024, 512, device=device).bfloat16() for _ in range(2))
    weight = torch.nn.Parameter(torch.randn(512, 512, device=device).bfloat16())
    weight.main_grad = torch.zeros(512, 512, device=device)  # type: ignore[attr-defined]

    def step(x: torch.Tensor) -> list[torch.Tensor]:
        weight.main_grad.zero_()  # type: ignore[attr-defined]
        x = x.detach().requires_grad_()
        y = fp8_linear(x, weight, power_of_two=True)
        y.backward(dy)
        assert x.grad is not None
        return [y.detach(), x.grad, weight.main_grad.clone()]  # type: ignore[attr-defined]

    expected = step(x)
    second = torch.cuda.Stream()
    late = torch.zeros_like(x)
    second.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(second):
        # The input arrives on this stream after about a tenth of a second.
        torch.cuda._sleep(200_000_000)
        late.copy_(x)
        actual = step(late)
    torch.cuda.current_stream().wait_stream(second)
    assert [torch.equal(*pair) for pair in zip(actual, expected, strict=True)] == [True] * 3


def test_the_average_on_its_stream_reads_before_the_step_writes(device: torch.device) -> None:
    average, expected = average_beside_the_step(device)
    assert bool((average.double() == expected).all())


def test_an_offloaded_state_is_updated_bit_for_bit_on_its_stream(device: torch.device) -> None:
    expected, found = (state_right_after_a_step(device, place) for place in ("none", "cpu"))
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert len(expected) == len(found) == 7


@pytest.mark.parametrize("name", TABLE["callables"])
def test_the_installed_transformer_engine_has_the_recorded_signatures(name: str) -> None:
    if importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("transformer-engine is not installed: `make gpu` in the image of launch/container runs this")
    module, _, rest = name.removeprefix("transformer_engine.").partition(".")
    parts = rest.split(".")
    if module == "common":
        module, parts = "common.recipe", parts[1:]
    found = getattr(importlib.import_module(f"transformer_engine.{module}"), parts[0])
    found = found.__init__ if len(parts) == 1 else getattr(found, parts[1])
    ours = list(signature_of(name).parameters.values())
    theirs = [each for each in inspect.signature(found).parameters.values() if each.name != "self"]
    assert [(each.name, each.kind) for each in theirs] == [(each.name, each.kind) for each in ours]
    for mine, installed in zip(ours, theirs, strict=True):
        assert mine.default is ... or mine.default == installed.default, mine.name
