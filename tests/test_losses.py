"""Losses as sums: the report's normalisation, and independence of how a step is cut into micro-batches."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from parallel.mesh import single
from tests.tiny_model import FP32, TINY
from train.assemble import build_engine
from train.data.batch import IGNORE_INDEX, Batch
from train.losses import LossWeights, attach_loss, balance_sum, loss_sums
from train.model.precision import Precision
from train.optim.config import OptimConfig
from train.schedules import ScheduledValues
from train.step import Engine, StepGradients, compute_gradients
from train.studies.smoke_runs import PrecisionName

NOW = ScheduledValues(lr=1e-3, batch_sequences=4, bias_speed=1e-3, mtp_weight=0.3, balance_alpha=0.01)


def engine(**optim: float) -> Engine:
    return build_engine(TINY, FP32, OptimConfig(**optim), single("cpu"), seed=0)  # type: ignore[arg-type]


def batch() -> Batch:
    """Four sequences with 12, 9, 0 and 12 targets; sequence i has a second document of its last i tokens."""
    tokens = torch.randint(0, TINY.vocab_size, (4, 13), generator=torch.Generator().manual_seed(0))
    labels = tokens[:, 1:].clone()
    labels[1, :3] = IGNORE_INDEX
    labels[2] = IGNORE_INDEX
    return Batch(tokens[:, :-1].contiguous(), labels, torch.ones_like(labels).tril(-1).flip(1))


def step_of(parts: Engine, data: Batch, *, micro_batches: int = 1) -> StepGradients:
    return compute_gradients(parts, data, num_micro_batches=micro_batches, now=NOW)


def gradients(micro_batches: int) -> tuple[StepGradients, dict[str, torch.Tensor]]:
    parts = engine(clip_norm=1e9)
    result = step_of(parts, batch(), micro_batches=micro_batches)
    return result, {name: p.main_grad.clone() for name, p in parts.models[0].named_parameters()}


def test_total_is_the_reports_objective_times_the_number_of_targets() -> None:
    net, data = engine().models[0], batch()
    output = net(data.input_ids, data.document_ids)
    weights = LossWeights(
        mtp_weight=0.3, balance_alpha=0.01, num_targets=torch.tensor(data.num_targets), num_sequences=4
    )
    weighted_balance = balance_sum(output, weights)
    assert weighted_balance is not None
    total = loss_sums(net, output, data.labels, weights).total + weighted_balance

    def nll(hidden: torch.Tensor, labels: torch.Tensor) -> float:
        logits = net.logits(hidden).double().flatten(0, 1)
        return float(F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum").detach())

    main = nll(output.hidden, data.labels)
    mtp = [nll(hidden, data.labels[:, k:]) for k, hidden in enumerate(output.mtp_hidden, start=1)]
    balance = sum(float(routing.balance.detach()) for routing in output.routings.values())
    assert data.num_targets == 33
    # Equation 24: every depth divides by the main model's N, though it has fewer targets; the balance loss is a mean
    # over the 4 sequences.
    objective = main / 33 + 0.3 * (mtp[0] + mtp[1]) / 2 / 33 + 0.01 * balance / 4
    # FP32 sums of about 100 terms against FP64: 100 * 2^-24 = 6e-6.
    assert math.isclose(float(total.detach()) / 33, objective, rel_tol=6e-6)
    assert math.isclose(float(step_of(engine(), data).loss_total), objective, rel_tol=6e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_no_gradient_reads_what_the_step_before_left(precision: PrecisionName) -> None:
    """The first micro-batch writes where the second adds: NaN from before shows in whatever adds to it."""
    parts = build_engine(TINY, Precision(precision), OptimConfig(clip_norm=1e9), single("cpu"), seed=0)
    found = []
    for left in (0.0, float("nan")):
        for parameter in parts.models[0].parameters():
            parameter.main_grad.fill_(left)
        step_of(parts, batch(), micro_batches=2)
        found.append({name: p.main_grad.clone() for name, p in parts.models[0].named_parameters()})
    assert [name for name, gradient in found[0].items() if not torch.equal(gradient, found[1][name])] == []
    assert all(gradient.any() for gradient in found[0].values())


def test_gradients_do_not_depend_on_the_cut_into_micro_batches() -> None:
    whole, whole_grads = gradients(1)
    # The third micro-batch has no target at all; it still carries balance loss.
    cut, cut_grads = gradients(4)
    for name, expected in whole_grads.items():
        error = float((cut_grads[name] - expected).norm() / expected.norm().clamp(min=1e-12))
        # FP32 sums in another order; the longest has 48 tokens x 61 logits.
        assert error < 1e-5, (name, error)
    assert math.isclose(float(whole.loss_total), float(cut.loss_total), rel_tol=1e-5)
    assert whole.counts.keys() == cut.counts.keys() == {1, 2, 3}
    # Layer 1 sees 48 tokens x 2 experts; MTP layers 44 and 40 tokens.
    assert [int(whole.counts[i].sum()) for i in (1, 2, 3)] == [96, 88, 80]
    assert all(torch.equal(whole.counts[i], cut.counts[i]) for i in whole.counts)


def test_a_step_without_any_target_is_finite_and_has_no_gradient() -> None:
    parts, whole = engine(), batch()
    empty = Batch(whole.input_ids, torch.full_like(whole.labels, IGNORE_INDEX))
    result = step_of(parts, empty)
    assert bool(result.finite)
    assert float(result.loss_main) == 0.0
    assert all(not p.main_grad.any() for p in parts.models[0].parameters())


def test_a_non_finite_loss_is_flagged() -> None:
    parts = engine()
    with torch.no_grad():
        parts.models[0].lm_head.weight[3, 3] = float("nan")
    assert not bool(step_of(parts, batch()).finite)


def test_an_attached_loss_is_differentiated_with_whatever_reads_hidden() -> None:
    hidden = torch.randn(3, 5, requires_grad=True)
    attached = attach_loss(hidden * 2, hidden.pow(3).sum())
    assert torch.equal(attached, hidden * 2)
    attached.sum().backward()
    # d/dh (2 h) = 2 from the reader, 3 h^2 from the loss; FP32, two roundings.
    torch.testing.assert_close(hidden.grad, 2 + 3 * hidden.detach().square(), rtol=1e-6, atol=0.0)
