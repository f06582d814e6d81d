"""A layer that runs again in backward gives the same bits, keeps one hidden state, and routes and is probed once."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import deferred
from parallel.collectives import Traffic
from parallel.expert import ExpertParallelDispatcher
from parallel.layout import Layout
from parallel.mesh import make_mesh
from tests.parity.layout_theorem import named_gradients
from tests.ranks import run_ranks
from tests.tiny_model import DISTINCT
from train.assemble import build_engine
from train.data.batch import Batch
from train.losses import LossWeights
from train.model.block import MoE
from train.model.config import ModelConfig
from train.model.init import initialize
from train.model.precision import Precision
from train.model.transformer import Transformer, recompute_as_asked
from train.optim.config import OptimConfig
from train.schedules import ScheduledValues
from train.stage import Stage, StepMetrics
from train.step import compute_gradients

# Two tiles of 128 along hidden, one ragged; two MTP depths.
CONFIG: ModelConfig = replace(DISTINCT, hidden_size=160, kv_lora_rank=16, num_nextn_predict_layers=2)


class Counted:
    """A probe that counts the calls of linears that it is asked about."""

    def __init__(self) -> None:
        self.asked = 0

    def watch(self, weight: Tensor) -> None:
        self.asked += 1


def outcome(precision: Precision, again: Any, *, queued: bool = False, documents: bool = False) -> dict[str, Any]:
    """Loss, every gradient, counts and the probe of two micro-batches of a whole model as a stage."""
    model = Transformer(CONFIG, precision)
    initialize(model, seed=3, std=0.2)
    recompute_as_asked(model, again)
    for parameter in model.parameters():
        parameter.main_grad = torch.zeros(parameter.shape)  # type: ignore[attr-defined]
    stage, metrics, probe = Stage(model), StepMetrics(CONFIG, torch.device("cpu")), Counted()
    stage.begin(LossWeights(0.3, 0.01, torch.tensor(2 * 2 * 70), 4), metrics, probe)
    generator = torch.Generator().manual_seed(5)
    ids = torch.tensor([[0] * 30 + [1] * 40, [0] * 70]) if documents else None
    losses = []
    for _ in range(2):
        tokens = torch.randint(CONFIG.vocab_size, (2, 71), generator=generator)
        loss = stage(tokens[:, :-1], input_ids=tokens[:, :-1], labels=tokens[:, 1:], document_ids=ids)
        if queued:
            with deferred.deferred():
                loss.backward()
            deferred.take()()
        else:
            loss.backward()
        losses.append(loss.detach())
    found = {name: p.main_grad if p.grad is None else p.grad for name, p in model.named_parameters()}
    return {
        **found,
        "losses": torch.stack(losses),
        "counts": metrics.counts,
        "balance": metrics.balance,
        "probe": probe,
    }


PRECISIONS: dict[str, Precision] = {
    "fp32": Precision("fp32"),
    "bf16": Precision("bf16"),
    "fp8": Precision("fp8"),
    "fp8_v3": Precision("fp8", attention_output="e5m6"),
}


@pytest.mark.parametrize("name", PRECISIONS)
def test_layers_run_again_to_the_same_bits(name: str) -> None:
    """Router, balance, MTP, documents apart; with the queue of a pipeline and without."""
    kept = outcome(PRECISIONS[name], again=False, documents=name == "bf16")
    again = outcome(PRECISIONS[name], again="layers", queued=name == "fp8", documents=name == "bf16")
    probes = kept.pop("probe"), again.pop("probe")
    assert [key for key in kept if not torch.equal(kept[key], again[key])] == []
    assert probes[0].asked == probes[1].asked > 0 or name in ("fp32", "bf16")
    assert all(bool(kept[key].any()) for key in kept)


def gradients_of(rank: int, world: int, layout: Layout, precision: str) -> tuple[list[str], list[Counter[str]]]:
    """What differs on this rank between a step that keeps layers and one that runs them again; rows sent in each."""
    mesh = make_mesh(layout, device=torch.device("cpu"), tied_embedding=True, timeout_s=60)
    generator = torch.Generator().manual_seed(9)
    tokens = torch.randint(CONFIG.vocab_size, (8 * layout.dp, 25), generator=generator)
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()).share(mesh.dp.rank, layout.dp)
    now = ScheduledValues(lr=1e-3, batch_sequences=len(tokens), bias_speed=1e-3, mtp_weight=0.3, balance_alpha=0.01)
    found, sent = [], []
    for again in (False, "layers"):
        config, numbers = replace(CONFIG, num_hidden_layers=5, n_routed_experts=8), Precision(precision)
        engine = build_engine(config, numbers, OptimConfig(), mesh, seed=2, recompute=again)
        traffic = Traffic()
        for module in (module for model in engine.models for module in model.modules() if isinstance(module, MoE)):
            if isinstance(module.dispatcher, ExpertParallelDispatcher):
                module.dispatcher._planner = replace(module.dispatcher._planner, traffic=traffic)
        result = compute_gradients(engine, batch, num_micro_batches=8, now=now)
        sent.append(traffic.rows)
        found.append(named_gradients(engine) | {"counts": torch.stack([*result.counts.values()])} | result.logged)
    kept, again = found
    assert len(kept) > 20
    return [name for name, tensor in kept.items() if not torch.equal(tensor, again[name])], sent


# Halves of what a step sends without: forward and backward send dispatches and combines once each.
AGAIN = {"counts": 4, "routing": 4, "dispatch": 3, "combine": 2, "gates": 2}
LAYOUTS = {
    "experts": (Layout(dp=2, ep=2), "bf16"),
    "pairs over experts": (Layout(pp=2, dp=2, ep=2, schedule="DualPipeV"), "fp8"),
    "weight gradients that wait": (Layout(pp=2, schedule="ZBVZeroBubble", max_waiting_wgrads=1), "fp8"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "experts" else pytest.mark.long) for name in LAYOUTS]
)
def test_over_ranks_they_run_again_to_the_same_bits(name: str) -> None:
    """The second forward sends tokens out, and no sums home."""
    layout, precision = LAYOUTS[name]
    for different, (once, twice) in run_ranks(layout.world, gradients_of, layout, precision):
        assert different == []
        # Out in forward, and with the gradients of their sums in backward; home in forward, and with their own.
        assert twice == Counter({kind: rows * of // 2 for kind, rows in once.items() if (of := AGAIN[kind])})
        assert bool(once) == (layout.ep > 1)
