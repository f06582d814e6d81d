"""One pipeline stage: its layers with the losses that arise on it, and the sums of a step.

    hidden of the stage before -> layers -> hidden for the stage after       (a balance loss is attached to it)
    ... on the last stage:       -> sum of main, MTP and its own balance losses

A whole model in one process is the first and the last stage. Every rank of a pipeline reads the same micro-batch from
the store: token ids and labels never travel between stages, only `hidden` does.

Shapes: hidden [sequences, tokens, hidden].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kernels.probe import Probe, watching
from parallel.balance import balanced_layers
from parallel.collectives import sum_over
from parallel.deepep import DeepEPDispatcher
from parallel.expert import ExpertParallelDispatcher
from parallel.mesh import Axis, Mesh
from parallel.shards import LocalShard
from train.losses import LossWeights, attach_loss, balance_sum, loss_sums
from train.model.config import ModelConfig, StageSpec
from train.model.moe import Experts, Routing, TokenDispatcher
from train.model.phases import Run, Steps, T, Travel, at_once, finish
from train.model.precision import Precision
from train.model.precision_config import PrecisionConfig
from train.model.sizes import layer_costs
from train.model.transformer import ModelOutput, Transformer, limit_expert_rows


class StepMetrics:
    """Sums over a step's micro-batches, for the log and the bias update; stays on the device.

    One row per MoE layer of the *whole* model, MTP layers last. Rows of layers on other stages stay 0: a sum over all
    ranks completes them.
    """

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self.layer_ids = config.moe_layer_ids
        self.row_of = {layer_id: row for row, layer_id in enumerate(self.layer_ids)}
        layers, depths = len(self.layer_ids), config.num_nextn_predict_layers
        self.losses = torch.zeros(1 + depths, dtype=torch.float32, device=device)  # main and MTP, nats
        self.balance = torch.zeros(layers, dtype=torch.float32, device=device)
        self.counts = torch.zeros(layers, config.n_routed_experts, dtype=torch.int64, device=device)

    def add_routings(self, routings: dict[int, Routing]) -> None:
        """Add one micro-batch's expert counts and balance losses."""
        for layer_id, routing in routings.items():
            self.balance[self.row_of[layer_id]] += routing.balance.detach()
            self.counts[self.row_of[layer_id]] += routing.counts

    def add_losses(self, main: Tensor, mtp: tuple[Tensor, ...]) -> None:
        """Add one micro-batch's losses; depths that the sequence was too short for count nothing."""
        self.losses[: 1 + len(mtp)] += torch.stack((main, *mtp))

    def reduce(self, world: Axis) -> None:
        """Sum over all ranks: two small collectives."""
        floats = torch.cat((self.losses, self.balance))
        sum_over(floats, world)
        self.losses, self.balance = floats.split((len(self.losses), len(self.balance)))
        sum_over(self.counts, world)


class Stage(nn.Module):
    """A stage of the model as a pipeline schedule calls it: `begin` once a step, `forward` once per micro-batch."""

    weights: LossWeights
    metrics: StepMetrics
    probe: Probe | None

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def begin(self, weights: LossWeights, metrics: StepMetrics, probe: Probe | None = None) -> None:
        """Start a step; its first micro-batch runs under the probe if there is one."""
        self.weights, self.metrics, self.probe = weights, metrics, probe

    def forward(
        self, inbound: Tensor, *, input_ids: Tensor, labels: Tensor, document_ids: Tensor | None = None
    ) -> Tensor:
        """One micro-batch.

        Args:
            inbound: hidden of the stage before; not read on the first.
            input_ids, labels: [sequences, tokens] int64; labels are read on the last stage.
            document_ids: the same, on the host.
        Returns:
            hidden for the stage after; the total loss, a scalar, on the last.
        """
        return finish(self.steps(at_once, inbound, input_ids=input_ids, labels=labels, document_ids=document_ids))

    def steps(
        self, run: Run, inbound: Tensor, *, input_ids: Tensor, labels: Tensor, document_ids: Tensor | None = None
    ) -> Steps[Tensor]:
        """`forward`, phase by phase."""
        model, probe = self.model, self.probe
        self.probe = None
        watched: Run = run if probe is None else partial(_watched, probe, run)
        output = yield from model.steps(watched, input_ids, document_ids, None if model.spec.is_first else inbound)
        self.metrics.add_routings(output.routings)
        return (yield from run("losses", self._add_losses, output, labels))

    def _add_losses(self, output: ModelOutput, labels: Tensor) -> Tensor:
        """hidden with the balance losses attached; the total loss on the last stage."""
        model = self.model
        balance = balance_sum(output, self.weights)
        if not model.spec.is_last:
            hidden: Tensor = output.hidden
            return hidden if balance is None else attach_loss(hidden, balance)
        losses = loss_sums(model, output, labels, self.weights)
        self.metrics.add_losses(losses.main, losses.mtp)
        return losses.total if balance is None else losses.total + balance


def _watched(probe: Probe, run: Run, name: str, phase: Callable[..., T | Travel[T]], *args: Any) -> Steps[T]:
    """A phase under a probe; between two phases another micro-batch may compute. One that travels has no linear."""

    def under_probe(*inputs: Any) -> T | Travel[T]:
        with watching(probe):
            return phase(*inputs)

    return run(name, under_probe, *args)


def stage_specs(config: ModelConfig, mesh: Mesh) -> dict[int, StageSpec]:
    """Stage index -> what it holds, for the stages of this rank."""
    layout = mesh.layout
    count = layout.num_stages
    layers = layout.stage_layers or balanced_layers(layer_costs(config), layout)
    assert len(layers) == count, (layers, count)
    starts = [sum(layers[:index]) for index in range(count + 1)]
    return {
        i: StageSpec(range(starts[i], starts[i + 1]), is_first=i == 0, is_last=i == count - 1)
        for i in layout.stages_of_rank(mesh.pp.rank)
    }


def build_stages(
    config: ModelConfig, precision: PrecisionConfig, mesh: Mesh, dispatcher: TokenDispatcher | None = None
) -> dict[int, Stage]:
    """The stages of this rank on its device, without values.

    Args:
        config: of the whole model.
        precision: of the run.
        mesh: of the run.
        dispatcher: brings tokens to experts; None for the one of the mesh.
    """
    precision, specs, stages = Precision.of(precision), stage_specs(config, mesh), dict[int, Stage]()
    if dispatcher is None and mesh.ep.size > 1:
        experts, wire, power_of_two = config.n_routed_experts, precision.wire, precision.power_of_two_scales
        if mesh.layout.dispatch == "deepep":
            dispatcher = DeepEPDispatcher(experts, mesh.ep, wire=wire, power_of_two=power_of_two)
        else:
            dispatcher = ExpertParallelDispatcher(
                experts, mesh.ep, hops=mesh.hops, wire=wire, power_of_two=power_of_two
            )
    for index, spec in specs.items():
        with mesh.device:
            model = Transformer(config, precision, dispatcher, spec)
        limit_expert_rows(model, mesh.layout.max_expert_rows)
        stages[index] = Stage(model)
    models = [stage.model for stage in stages.values()]
    if len(models) > 1 and models[0].spec.is_first and models[-1].mtp:
        # V placement: one rank has the first and the last stage, and MTP reads the one embedding there is.
        models[-1].embed_tokens = models[0].embed_tokens
    return stages


def expert_shards(model: Transformer) -> dict[str, LocalShard]:
    """Parameter name -> this rank's experts as a shard of all experts of the layer."""
    shards: dict[str, LocalShard] = {}
    for module_name, module in model.named_modules():
        if isinstance(module, Experts):
            for leaf, parameter in module.named_parameters():
                shape = (model.config.n_routed_experts, *parameter.shape[1:])
                offset = (module.first_expert, *(0 for _ in shape[1:]))
                shards[f"{module_name}.{leaf}"] = LocalShard.at(parameter.detach(), shape, offset)
    return shards
