"""`optim.backend=deepspeed`: DeepSpeed's BF16_Optimizer keeps weights, gradients and masters of an axis flat.

It cuts them into one partition for each rank and gathers the new weights; our AdamW updates its partition, our schedule
and weight-gradient queue fill its gradients, our reduction sums and clips them (docs/decisions/0011):

    parameter              view of DeepSpeed's flat weights
    parameter.main_grad    view of its flat FP32 gradients
    master                 view of its FP32 partition; an FP32 parameter stays its own

The flat memory has the order and padding of our buckets, so both backends form the same sums, cut state for a
checkpoint in the same way, and a weight begins where kernels want it. The only file that imports DeepSpeed.
"""

from __future__ import annotations

import importlib.metadata
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.mesh import group_of_one
from parallel.waiting import waiting
from parallel.zero import BucketPlan, GradientBuckets, ParameterShard, WeightUpdate

SERIES, TESTED = "0.19", "0.19.8"  # its optimizer is no public interface: another version is another one


def check_installed() -> None:
    """Raise ValueError where there is no DeepSpeed that this adapter knows; loads nothing."""
    try:
        found = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        found = None
    # As pyproject.toml says: 0.19.8 or a later one of the series.
    numbers = re.match(rf"{re.escape(SERIES)}\.(\d+)", found or "")
    if numbers is None or int(numbers[1]) < int(TESTED.rpartition(".")[2]):
        raise ValueError(
            f"optim.backend=deepspeed needs DeepSpeed >= {TESTED} of {SERIES}, but {found or 'none'} is installed: "
            f"run pip install deepspeed=={TESTED}, or use optim.backend=native"
        )


class DeepSpeedBuckets(GradientBuckets):
    """`GradientBuckets` in the memory of a BF16_Optimizer; always sharded, and on a mesh with process groups."""

    def allocate(self, plans: Sequence[BucketPlan]) -> Sequence[Tensor]:
        """The flat FP32 gradients that DeepSpeed makes; parameters become views of its flat weights."""
        assert self.sharded, "DeepSpeed's BF16_Optimizer is always sharded: the configuration is refused before"
        self._masters: dict[str, Tensor] = {}
        self._optimizer: Any = None
        if not plans:
            return []
        self._optimizer = self._bf16_optimizer(plans)
        partitions = self._optimizer.fp32_groups_flat_partition
        for plan, weights, partition in zip(plans, self._optimizer.bf16_partitioned_groups, partitions, strict=True):
            assert len(partition) * self.axis.size == plan.numel, "DeepSpeed has cut for another number of ranks"
            if plan.dtype == torch.float32:
                partition.data = weights[self.axis.rank]
            self._masters |= _views(plan, partition.detach(), first=self.axis.rank * len(partition))
        # Else its `safe_get_full_fp32_param` would read the FP32 partitions that were replaced.
        self._optimizer._link_all_hp_params()
        gradients: list[Tensor] = self._optimizer.fp32_groups_gradients_flat
        return gradients

    def _bf16_optimizer(self, plans: Sequence[BucketPlan]) -> Any:
        start_deepspeed()
        from deepspeed.runtime import bf16_optimizer

        # It reports memory on stdout, with a garbage collection each and the device's peak set back.
        bf16_optimizer.see_memory_usage = lambda *_, **__: None
        names = {parameter: name for name, parameter in self.parameters.items()}
        groups = [{"params": [*self._with_padding(plan)]} for plan in plans]
        names |= {each: "padding" for group in groups for each in group["params"] if each not in names}
        return bf16_optimizer.BF16_Optimizer(
            torch.optim.Optimizer(groups, {}),
            names,
            SimpleNamespace(enabled=True, immediate_grad_update=False),
            # Our axis of one rank has no group, which DeepSpeed would take for all ranks.
            dp_process_group=self.axis.group or group_of_one(),
            grad_acc_dtype=torch.float32,
        )

    def _with_padding(self, plan: BucketPlan) -> Iterator[nn.Parameter]:
        """The parameters of a plan, and zeros where it leaves a hole."""
        ends = [*(each.start for each in plan.ranges[1:]), plan.numel]
        for each, end in zip(plan.ranges, ends, strict=True):
            parameter = self.parameters[each.name]
            yield parameter
            if hole := end - each.start - each.numel:
                yield nn.Parameter(torch.zeros(hole, dtype=plan.dtype, device=parameter.device))

    def master(self, held: ParameterShard) -> Tensor:
        """[elements] fp32, a view of DeepSpeed's partition."""
        return self._masters[held.name]

    @torch.no_grad()
    def gather(self, update: WeightUpdate) -> None:
        """Update the partition, and let DeepSpeed round it and give it to every rank of the axis."""
        if self._optimizer is None:
            return
        for name, master in self._masters.items():
            update(name, master)
        with waiting():
            self._optimizer.update_lp_params()
        # It writes through `.data`, which raises no version: cached FP8 copies would stay those of the first step.
        torch.autograd.graph.increment_version(self.parameters.values())


def start_deepspeed() -> None:
    """Import DeepSpeed without its notices, and let it use the process groups that exist; idempotent."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        import deepspeed
        from deepspeed import comm
    finally:
        logging.disable(disabled)
    # It calls torch 2.13's gathers by their older names.
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning, r"torch\.distributed\.c10d_logger")
    # On a CPU it would compile a C++ operator for its collectives.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not comm.is_initialized():
        comm.init_distributed(dist_backend=dist.get_backend(), verbose=False)


def _views(plan: BucketPlan, partition: Tensor, *, first: int) -> dict[str, Tensor]:
    """Name -> what a partition that begins at element `first` of the bucket holds of each parameter."""
    views = {}
    for each in plan.ranges:
        start, stop = max(each.start, first), min(each.start + each.numel, first + len(partition))
        if start < stop:
            views[each.name] = partition[start - first : stop - first]
    return views
