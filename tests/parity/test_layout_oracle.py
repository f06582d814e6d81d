"""ep2 x pp2 against `transformers`' DeepSeek-V3 in one process, FP32: the loss and every parameter's gradient.

The other layout tests compare this code with itself. Here the truth is independent of it: four ranks of ours, the
experts of each layer on two of them and the layers on two others, under both pipeline schedules, against one model of
theirs with the same weights on the same eight sequences at once.

Tolerances are the issue's, as in tests/model/test_oracle.py: 1e-5 on the loss and 1e-4 on gradients, relative
Frobenius. FP32 rounding alone explains a few times sqrt(longest sum) * 6e-8 = 1e-6 (measured: 2.3e-6 on the worst
parameter, no bit on the loss); the slack is for another order of sums.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from transformers import DeepseekV3ForCausalLM

from parallel.layout import Layout
from tests.hf_names import from_hf
from tests.model.test_oracle import BASE, enliven, hf_config, relative, released_names
from tests.parity.oracle_ranks import TOKENS, WEIGHTS, RankGradients, gradients_on
from tests.ranks import run_ranks
from train.data.batch import IGNORE_INDEX
from train.model.config import ModelConfig

GRADIENT_BOUND, LOSS_BOUND = 1e-4, 1e-5
# Five layers, so that two stages a rank are uneven; one of them dense.
CONFIG = ModelConfig(**{**BASE, "num_hidden_layers": 5, "num_nextn_predict_layers": 0})
SEQUENCES, LENGTH = 8, 37
LAYOUTS = {"1F1B": Layout(pp=2, dp=2, ep=2), "ZBVZeroBubble": Layout(pp=2, dp=2, ep=2, schedule="ZBVZeroBubble")}


class Truth(NamedTuple):
    """The oracle's mean loss and gradients under our names, and the folder with its weights and tokens."""

    loss: float
    grads: dict[str, Tensor]
    folder: Path


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    """`transformers` on all sequences at once; they have different numbers of targets, one of them none."""
    torch.manual_seed(20241227)
    oracle = DeepseekV3ForCausalLM(hf_config(CONFIG))
    enliven(oracle)
    tokens = torch.randint(0, CONFIG.vocab_size, (SEQUENCES, LENGTH + 1))
    ids, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].clone()
    for row in range(SEQUENCES):
        labels[row, : 5 * row] = IGNORE_INDEX
    labels[3] = IGNORE_INDEX
    folder = tmp_path_factory.mktemp("oracle")
    weights = from_hf(released_names(dict(oracle.state_dict())), CONFIG)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / WEIGHTS)
    save_file({"input_ids": ids, "labels": labels}, folder / TOKENS)

    logits = oracle(input_ids=ids).logits
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    loss = total / (labels != IGNORE_INDEX).sum()
    loss.backward()
    grads = {name: p.grad for name, p in oracle.named_parameters() if p.grad is not None}
    return Truth(loss.item(), from_hf(released_names(grads), CONFIG), folder)


def errors(ranks: list[RankGradients], truth: Truth) -> dict[str, float]:
    """Relative error of each parameter's gradient, put together from the ranks' shards; NaN where no rank has it."""
    whole = {name: torch.full((grad.numel(),), torch.nan) for name, grad in truth.grads.items()}
    for rank in ranks:
        for name, (first, shard) in rank.grads.items():
            whole[name][first : first + len(shard)] = torch.from_numpy(shard)
    return {name: relative(grad.view_as(truth.grads[name]), truth.grads[name]) for name, grad in whole.items()}


@pytest.mark.parametrize("schedule", LAYOUTS)
def test_gradients_of_ep2_x_pp2_are_those_of_transformers_in_one_process(schedule: str, truth: Truth) -> None:
    layout = LAYOUTS[schedule]
    found = run_ranks(layout.world, gradients_on, layout, CONFIG, truth.folder)
    healthy = [rank for rank, _ in found]
    for rank in healthy:
        assert rank.loss == pytest.approx(truth.loss, rel=LOSS_BOUND)
    bad = {name: error for name, error in errors(healthy, truth).items() if not error <= GRADIENT_BOUND}
    assert not bad
    # The same comparison notices what it should: the planted mistake is far outside the bound.
    for defect in found[0][1]:
        worst = max(errors([broken[defect] for _, broken in found], truth).values())
        assert worst > 1000 * GRADIENT_BOUND, (defect, worst)
