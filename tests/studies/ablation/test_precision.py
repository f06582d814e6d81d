"""A model built with the default ablation is the FP8 model, bit for bit; a real one is not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.tiny_model import TINY
from train.model.init import initialize
from train.model.precision import Precision
from train.model.transformer import Transformer
from train.studies.ablation.linear import Ablation
from train.studies.ablation.precision import AblatedPrecision


def outcome(precision: Precision) -> list[Tensor]:
    """Hidden states and gradients of one forward and backward."""
    net = Transformer(replace(TINY, num_nextn_predict_layers=0), precision)
    initialize(net, seed=0, std=0.1)
    hidden = net(torch.randint(0, 61, (2, 33), generator=torch.Generator().manual_seed(0))).hidden
    hidden.float().square().sum().backward()
    return [hidden.detach(), *(p.grad for p in net.layers.parameters() if p.grad is not None)]


@pytest.mark.parametrize("cached", [True, False])
def test_the_default_ablation_is_the_recipe(cached: bool) -> None:
    expected = outcome(Precision("fp8", cache_swiglu_input=cached))
    actual = outcome(AblatedPrecision("fp8", cache_swiglu_input=cached))
    assert len(expected) > 15
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_an_ablation_reaches_the_model_and_leaves_forward_to_its_accumulation() -> None:
    expected = outcome(Precision("fp8"))
    gradients = outcome(AblatedPrecision("fp8", ablation=Ablation(gradient_format="e5m2")))
    assert torch.equal(gradients[0], expected[0])
    assert not all(torch.equal(a, b) for a, b in zip(gradients[1:], expected[1:], strict=True))
    sums = outcome(AblatedPrecision("fp8", ablation=Ablation(accumulation="hopper")))
    assert not torch.equal(sums[0], expected[0])


def test_only_fp8_can_be_ablated() -> None:
    with pytest.raises(ValueError, match=r"precision\.name=bf16 quantises nothing"):
        AblatedPrecision("bf16")
    with pytest.raises(ValueError, match=r"set precision\.attention_output=bf16"):
        AblatedPrecision("fp8", attention_output="e5m6")
    with pytest.raises(ValueError, match="keep_bf16_weights=true"):
        AblatedPrecision("fp8", keep_bf16_weights=False)
    with pytest.raises(ValueError, match="set power_of_two_scales=true"):
        AblatedPrecision("fp8", power_of_two_scales=False, ablation=Ablation(accumulation="hopper"))
