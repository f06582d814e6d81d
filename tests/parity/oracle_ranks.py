"""One rank's gradients for given weights, to be compared with a model that is not ours.

The weights come in our names from a file, whole; each rank takes its layers and experts out of it, runs one step on its
share of the same sequences and returns what its optimizer would update: flat shards of the mean gradients, with their
offsets. This module imports no oracle, so ranks start fast.

A *defect* is planted after the healthy step, in the same process, to see that the comparison would notice it.

Shapes: shards [elements] FP32; batches [sequences, tokens].
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from parallel.layout import Layout
from parallel.mesh import make_mesh
from tests.parity.layout_theorem import force, gradient_pieces
from train.assemble import build_engine
from train.data.batch import Batch
from train.model.config import ModelConfig
from train.model.precision import Precision
from train.optim.config import OptimConfig
from train.schedules import ScheduledValues
from train.step import Engine, compute_gradients

WEIGHTS, TOKENS = "weights.safetensors", "tokens.safetensors"
MICRO_BATCH = 1
# Main loss only: no MTP, no balance loss; what is not updated needs no rate.
NOW = ScheduledValues(lr=0.0, batch_sequences=0, bias_speed=0.0, mtp_weight=0.0, balance_alpha=0.0)
# No clipping: gradients are compared as they come.
OPTIM = OptimConfig(clip_norm=1e9)


class RankGradients(NamedTuple):
    """Mean main loss in nats per target, and this rank's gradients: name -> (first element, [elements] FP32)."""

    loss: float
    grads: dict[str, tuple[int, NDArray[np.float32]]]


def gradients_on(
    rank: int, world: int, layout: Layout, config: ModelConfig, folder: Path
) -> tuple[RankGradients, dict[str, RankGradients]]:
    """This rank's gradients, and those it has with each planted defect."""
    mesh = make_mesh(layout, device=torch.device("cpu"), tied_embedding=config.num_nextn_predict_layers > 0)
    engine = build_engine(config, Precision("fp32"), OPTIM, mesh, seed=0)
    weights, tokens = load_file(folder / WEIGHTS), load_file(folder / TOKENS)
    # Moments have no part in gradients; they stay as they are.
    moments = {name: torch.zeros(held.shard.global_shape) for name, held in engine.optimizer.state_shards().items()}
    batch = Batch(tokens["input_ids"], tokens["labels"])

    force(engine, weights | moments)
    healthy = _step(engine, batch)
    broken: dict[str, RankGradients] = {}
    name = f"layers.{config.num_hidden_layers - 1}.mlp.experts.down_proj"
    # Two experts of one rank are exchanged in one layer.
    swapped = weights | {name: weights[name][[1, 0, *range(2, config.n_routed_experts)]]}
    force(engine, swapped | moments)
    broken["two experts are exchanged"] = _step(engine, batch)
    force(engine, weights | moments)
    experts = _step(engine, batch)
    share = np.float32(1 / layout.ep)
    scaled = {n: (first, grad * share if ".experts." in n else grad) for n, (first, grad) in experts.grads.items()}
    broken["expert gradients are averaged over the expert group"] = experts._replace(grads=scaled)
    return healthy, broken


def _step(engine: Engine, batch: Batch) -> RankGradients:
    dp, sequences = engine.mesh.dp, len(batch.labels)
    result = compute_gradients(
        engine,
        batch.share(dp.rank, dp.size),
        num_micro_batches=sequences // dp.size // MICRO_BATCH,
        now=replace(NOW, batch_sequences=sequences),
    )
    shards = gradient_pieces(engine).items()
    grads = {name: (held.shard.offsets[0], held.tensor.numpy().copy()) for name, held in shards}
    return RankGradients(float(result.loss_main), grads)
