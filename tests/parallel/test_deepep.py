"""DeepEP's adapter: its calls against the recorded interface, its results against `direct`, what is refused."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from parallel import deepep
from parallel.deepep import DeepEPDispatcher, require
from parallel.expert import ExpertParallelDispatcher, Wire
from parallel.layout import Layout
from parallel.mesh import make_mesh
from tests.parallel.deepep_stand_in import TABLE, Buffer, DeepEP
from tests.parallel.moe_ranks import EXPERTS, Case, case, identity_experts, routed_experts, routing_of
from tests.ranks import run_ranks
from train.config import compose
from train.model.phases import arrived

CPU, GPU = torch.device("cpu"), torch.device("cuda")
KINDS = ("random", "experts without tokens")
# Of each rank: DeepEP wants the same number on all, as micro-batches have it.
TOKENS = 60


def tokens_of(kind: str, rank: int, number: int = TOKENS) -> Case:
    """One rank's tokens."""
    whole = case(kind, 4, torch.bfloat16)
    return Case(*(each[rank * TOKENS :][:number].clone() for each in (whole.x, whole.grad, whole.ids, whole.gates)))


def beside_direct(rank: int, world: int) -> dict[str, Any]:
    """Routed experts over DeepEP's stand-in and over `direct`: which tensors differ; and which calls were made."""
    sys.modules["deep_ep"] = DeepEP()  # type: ignore[assignment]
    mesh = make_mesh(Layout(dp=world, ep=world, dispatch="deepep"), device=CPU, tied_embedding=False)
    wires: tuple[Wire, ...] = ("bf16", "fp8")
    differ, calls = [], []
    for wire in wires:
        theirs = DeepEPDispatcher(EXPERTS, mesh.ep, wire=wire, power_of_two=True)
        ours = ExpertParallelDispatcher(EXPERTS, mesh.ep, wire=wire, power_of_two=True)
        for kind in KINDS:
            mine = tokens_of(kind, rank)
            found, expected = (routed_experts(mine, each, wire) for each in (theirs, ours))
            differ += [f"{wire} {kind}: {key}" for key in found if not torch.equal(found[key], expected[key])]
        calls.append([*theirs._buffer.calls])
    # Fewer tokens use the same buffer, as MTP's do; its dispatch works again.
    buffer, few = theirs._buffer, tokens_of("random", rank, TOKENS - 1)
    dispatched = arrived(theirs.dispatch(few.x, routing_of(few.ids, few.gates)))
    arrived(theirs.combine(identity_experts(dispatched), dispatched))
    before = len(theirs._buffer.calls)
    # Of a layer that runs again.
    next(theirs.combine(identity_experts(dispatched), dispatched))
    unread = theirs._buffer.calls[before:]
    return {"differ": differ, "calls": calls, "same buffer": theirs._buffer is buffer, "unread": unread}


def test_every_call_binds_to_the_published_interface_and_gives_the_bits_of_direct() -> None:
    """Two gloo ranks; BF16 and FP8, forward and backward."""
    for result in run_ranks(2, beside_direct):
        assert result["differ"] == []
        assert result["same buffer"]
        assert result["unread"] == [], "an exchange that does not begin combines nothing"
        # Twice: out, home, the gradient out, its sums and the gates' gradients home.
        assert result["calls"] == [["dispatch", "combine", "dispatch", "combine"] * 2] * 2


def test_every_name_of_deepep_in_the_adapter_is_recorded() -> None:
    source = Path(deepep.__file__).read_text(encoding="utf-8")
    attributes = TABLE["attributes"]
    assert set(re.findall(r"library\(\)\.(\w+)", source)) == set(attributes["module"])
    assert set(re.findall(r"handle\.(\w+)", source)) == set(attributes["EPHandle"])
    used = set(re.findall(r"buffer\.(\w+)", source)) - {"num_max_tokens_per_rank"}
    assert used | {"ElasticBuffer"} == set(TABLE["callables"])
    assert all(hasattr(Buffer, name) for name in used)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["precision=fp32"], "adds up in BF16 only, and precision=fp32 sends FP32: use precision=bf16 or fp8, or"),
        (["precision=fp8", "model.hidden_size=136"], "model.hidden_size=136 is no multiple of 16: use 144, or"),
        (["precision=bf16"], "runs on CUDA GPUs, and run.device=cpu: use run.device=cuda, or"),
    ],
)
def test_a_configuration_that_deepep_cannot_serve_is_one_sentence(overrides: list[str], sentence: str) -> None:
    layout = ["experiment=tiny", "run.device=cpu", "layout.dp=2", "layout.ep=2", "layout.dispatch=deepep"]
    layout.append("run.micro_batch_sequences=1")
    with pytest.raises(ValueError, match=f"^layout.dispatch=deepep .*{re.escape(sentence)} layout.dispatch=node$"):
        compose([*layout, *overrides])


def test_one_expert_rank_needs_no_deepep() -> None:
    assert compose(["experiment=tiny", "run.device=cpu", "precision=fp32", "layout.dispatch=deepep"]).layout.ep == 1


@pytest.mark.parametrize(
    ("device", "capability", "module", "sentence"),
    [
        (CPU, (9, 0), DeepEP(), "runs on CUDA GPUs, and the device is cpu"),
        (GPU, (8, 0), DeepEP(), "needs compute capability 9.0 or later, this GPU has 8.0"),
        (GPU, (9, 0), None, "needs DeepEP, which is not installed here: run `pip install .*setup.py install`"),
        (GPU, (9, 0), SimpleNamespace(__version__="1.2.1"), "the installed DeepEP 1.2.1 lacks ElasticBuffer"),
    ],
)
def test_a_machine_without_deepep_is_refused_with_the_remedy(
    device: torch.device,
    capability: tuple[int, int],
    module: ModuleType | None,
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: module)
    monkeypatch.setattr(deepep, "library", lambda: module)
    with pytest.raises(ValueError, match=f"^layout.dispatch=deepep.*{sentence}.*"):
        require(device)


def test_one_that_does_not_load_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise AssertionError("Invalid NCCL versions:\n 2.28 (loaded)")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(deepep, "library", broken)
    with pytest.raises(ValueError, match=r"cannot be imported \(Invalid NCCL versions: 2.28 \(loaded\)\); use"):
        require(GPU)
