"""The auxiliary-loss-free balance of expert loads (arXiv:2412.19437 §2.1.2; arXiv:2408.15664 algorithm 1).

After each optimizer step every expert's selection bias moves by gamma: up where the expert got fewer tokens than the
mean, down where it got more. The bias takes part in the choice of experts only, never in the gates.

    b_i += gamma * sign(mean load - load_i)
"""

from __future__ import annotations

import torch
from torch import Tensor

from parallel.collectives import sum_over
from parallel.mesh import Mesh
from train.model.moe import Router
from train.model.transformer import Transformer


@torch.no_grad()
def update_bias(bias: Tensor, counts: Tensor, speed: float) -> None:
    """Move each expert's bias by `speed` towards the balanced load, in place.

    Args:
        bias: [..., experts] fp32; leading dims may be layers.
        counts: [..., experts] int64, tokens sent to each expert in the whole batch, summed over all ranks.
        speed: gamma; 0 leaves every bit of `bias` as it is.
    """
    # BF16 biases and counts have flipped the sign of updates elsewhere, so the dtypes are part of the promise.
    assert bias.dtype == torch.float32, f"the router's bias must stay fp32, got {bias.dtype}"
    assert counts.dtype == torch.int64, f"expert counts must stay int64, got {counts.dtype}"
    assert bias.shape == counts.shape, f"bias {tuple(bias.shape)} and counts {tuple(counts.shape)} differ"
    if speed == 0:
        return
    # sign(mean - count) without a division: integers decide a tie exactly.
    direction = torch.sign(counts.sum(dim=-1, keepdim=True) - counts * counts.shape[-1])  # [..., experts] int64
    # Not recentred: a common offset changes no choice, and the report doesn't mention it.
    bias.add_(direction.to(bias.dtype), alpha=speed)


@torch.no_grad()
def max_violation(counts: Tensor) -> Tensor:
    """MaxVio of arXiv:2408.15664, (max - mean) / mean of [..., experts] int64 counts: [...] fp32, 0 without tokens."""
    loads = counts.to(torch.float64)  # [..., experts]
    mean = loads.mean(dim=-1)  # [...]
    busiest = loads.amax(dim=-1)  # [...]
    violation = (busiest - mean) / torch.where(mean > 0, mean, torch.ones_like(mean))
    return violation.to(torch.float32)


def routers(models: list[Transformer]) -> dict[int, Router]:
    """Layer id -> router, for every MoE layer on this rank, MTP layers included."""
    found: dict[int, Router] = {}
    for model in models:
        for layer_id, layer in (*model.layers.items(), *model.mtp.items()):
            found |= {int(layer_id): module for module in layer.modules() if isinstance(module, Router)}
    return found


def update_biases(models: list[Transformer], counts: dict[int, Tensor], speed: float) -> None:
    """`update_bias` of every router on this rank; counts: layer id -> [experts] int64 of the whole step."""
    for layer_id, router in routers(models).items():
        update_bias(router.e_score_correction_bias, counts[layer_id], speed)


def expert_biases(models: list[Transformer], mesh: Mesh) -> Tensor:
    """The selection biases of all MoE layers, MTP layers last, [layers, experts] fp32: one small collective."""
    config = models[0].config
    biases = torch.zeros(len(config.moe_layer_ids), config.n_routed_experts, device=mesh.device)
    # The ranks of a stage hold the same biases: rank 0 of each stage contributes.
    if mesh.dp.rank == 0:
        for layer_id, router in routers(models).items():
            biases[config.moe_layer_ids.index(layer_id)] = router.e_score_correction_bias
    return sum_over(biases, mesh.world)
