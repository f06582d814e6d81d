"""DCP's plans for shards: which block of which tensor a rank writes, and from which saved blocks it reads.

DCP's own planners know whole tensors, DTensors and ShardedTensors. Ours take a name and a `Shard`, which covers
ZeRO-1's flat ranges, a stage's layers and a rank's experts alike. Every saved shard that a wanted one meets becomes one
read of exactly their intersection. Each rank plans for itself: the writers are agreed before.
"""

# ruff: noqa: FBT002  (DCP's signatures have a positional flag)

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import planner as dcp
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from parallel.shards import Shard, TypedShard


class ShardSavePlanner(dcp.SavePlanner):
    """Writes each tensor of the state dict as its shard of the global one."""

    def __init__(self, shards: Mapping[str, TypedShard]) -> None:
        self._shards = shards
        self._tensors: Mapping[str, Tensor] = {}

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        """Take the staged tensors."""
        self._tensors = state_dict

    def create_local_plan(self) -> dcp.SavePlan:
        """One write for each tensor."""
        items = []
        for name, tensor in self._tensors.items():
            shard = self._shards[name].shard
            size, properties = torch.Size(shard.global_shape), TensorProperties(dtype=tensor.dtype)
            data = dcp.TensorWriteData(chunk=_chunk(shard), properties=properties, size=size)
            items.append(dcp.WriteItem(MetadataIndex(name, shard.offsets), dcp.WriteItemType.SHARD, tensor_data=data))
        return dcp.SavePlan(items)

    def create_global_plan(self, all_plans: list[dcp.SavePlan]) -> tuple[list[dcp.SavePlan], Metadata]:
        """This rank's plan is the only one here."""
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: dcp.SavePlan) -> dcp.SavePlan:
        """Nothing to add."""
        return new_plan

    def resolve_data(self, write_item: dcp.WriteItem) -> Tensor:
        """The tensor that a write is about."""
        return self._tensors[write_item.index.fqn]


class ShardLoadPlanner(dcp.LoadPlanner):
    """Fills each tensor of the state dict from all saved shards that meet its own; none is empty."""

    def __init__(self, shards: Mapping[str, TypedShard]) -> None:
        self._shards = shards
        self._tensors: Mapping[str, Tensor] = {}
        self._saved = Metadata({})

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Take the tensors to fill and what the shards' headers say."""
        assert metadata is not None, "safetensors readers give metadata"
        self._tensors, self._saved = state_dict, metadata

    def create_local_plan(self) -> dcp.LoadPlan:
        """The reads that fill every element; a ValueError if the files do not hold them all, in the same dtype."""
        items: list[dcp.ReadItem] = []
        for name, (dtype, shard) in self._shards.items():
            saved = self._saved.state_dict_metadata.get(name)
            reads: list[dcp.ReadItem] = []
            if isinstance(saved, TensorStorageMetadata):
                if str(saved.properties.dtype) != dtype:
                    raise ValueError(f"the files hold {name} as {saved.properties.dtype}, not {dtype}")
                reads = create_read_items_for_chunk_list(name, saved, [_chunk(shard)])
            # A hole would leave old values in the tensor without an error.
            found = sum(math.prod(read.lengths) for read in reads)
            if found != shard.numel:
                raise ValueError(f"the files hold {found} of {shard.numel} elements of a shard of {name}")
            items.extend(reads)
        return dcp.LoadPlan(items)

    def create_global_plan(self, global_plan: list[dcp.LoadPlan]) -> list[dcp.LoadPlan]:
        """This rank's plan is the only one here."""
        return global_plan

    def finish_plan(self, central_plan: dcp.LoadPlan) -> dcp.LoadPlan:
        """Nothing to add."""
        return central_plan

    def resolve_tensor(self, read_item: dcp.ReadItem) -> Tensor:
        """The view into which a read is copied."""
        view = self._tensors[read_item.dest_index.fqn]
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            view = view.narrow(dim, start, length)
        return view

    def commit_tensor(self, read_item: dcp.ReadItem, tensor: Tensor) -> None:
        """The view was filled in place."""
        assert tensor.device == self._tensors[read_item.dest_index.fqn].device

    def load_bytes(self, read_item: dcp.ReadItem, value: io.BytesIO) -> None:
        """Never called: safetensors hold tensors only."""
        raise AssertionError(f"{read_item.storage_index.fqn} is no tensor")


def _chunk(shard: Shard) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(shard.offsets), sizes=torch.Size(shard.sizes))
