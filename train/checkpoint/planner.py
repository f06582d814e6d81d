"""DCP's plans for boxes: which rectangle of which tensor a rank writes, and from which saved rectangles it reads.

torch DCP asks a planner what to write and what to read; its own planners know whole tensors, DTensors and
ShardedTensors. Ours know a name and a box (`parallel.shards`), which covers ZeRO-1's flat slices, a stage's
layers and a rank's experts alike. Intersecting a wanted box with the saved ones is DCP's own function.

Each rank plans for itself: who writes what is agreed before, so DCP runs without its collectives (`no_dist=True`),
which pickle. Every saved box that a wanted one meets becomes one read of exactly their intersection.
No process group and no file here; tensors only, values that are no tensors do not exist.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from parallel.shards import Part


class BoxSavePlanner(SavePlanner):
    """Writes each tensor of the state dict at its place in the global one.

    Args:
        parts: place of each tensor that this rank writes, by name.
    """

    def __init__(self, parts: Mapping[str, Part]) -> None:
        self._parts = parts
        self._tensors: Mapping[str, Tensor] = {}

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,  # noqa: FBT002  (DCP's signature)
    ) -> None:
        """Take the staged tensors."""
        self._tensors = state_dict

    def create_local_plan(self) -> SavePlan:
        """One write for each tensor."""
        items = []
        for name, tensor in self._tensors.items():
            part = self._parts[name]
            data = TensorWriteData(
                chunk=_chunk(part),
                properties=TensorProperties(dtype=tensor.dtype),
                size=torch.Size(part.shape),
            )
            items.append(WriteItem(MetadataIndex(name, part.offset), WriteItemType.SHARD, tensor_data=data))
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """This rank's plan is the only one here."""
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Nothing to add."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """The tensor that a write is about."""
        return self._tensors[write_item.index.fqn]


class BoxLoadPlanner(LoadPlanner):
    """Fills each tensor of the state dict from all saved boxes that meet its own.

    Args:
        parts: place of each tensor that this rank wants, by name; none is empty.
    """

    def __init__(self, parts: Mapping[str, Part]) -> None:
        self._parts = parts
        self._tensors: Mapping[str, Tensor] = {}
        self._saved = Metadata({})

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,  # noqa: FBT002  (DCP's signature)
    ) -> None:
        """Take the tensors to fill and what the shards' headers say."""
        assert metadata is not None, "safetensors readers give metadata"
        self._tensors, self._saved = state_dict, metadata

    def create_local_plan(self) -> LoadPlan:
        """The reads that fill every element of every tensor.

        Raises:
            ValueError: the shards do not hold all of a part, or hold it in another dtype; named.
        """
        items: list[ReadItem] = []
        for name, part in self._parts.items():
            saved = self._saved.state_dict_metadata.get(name)
            reads: list[ReadItem] = []
            if isinstance(saved, TensorStorageMetadata):
                if str(saved.properties.dtype) != part.dtype:
                    raise ValueError(f"the shards hold {name} as {saved.properties.dtype}, not {part.dtype}")
                reads = create_read_items_for_chunk_list(name, saved, [_chunk(part)])
            # A hole would leave old values in the tensor without a word.
            found = sum(math.prod(read.lengths) for read in reads)
            if found != part.num_elements:
                raise ValueError(f"the shards hold {found} of {part.num_elements} elements of a part of {name}")
            items.extend(reads)
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """This rank's plan is the only one here."""
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """Nothing to add."""
        return central_plan

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """The view into which a read is copied."""
        view = self._tensors[read_item.dest_index.fqn]
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            view = view.narrow(dim, start, length)
        return view

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """The view was filled in place."""
        assert tensor.device == self._tensors[read_item.dest_index.fqn].device

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Never called: safetensors hold tensors only."""
        raise AssertionError(f"{read_item.storage_index.fqn} is no tensor")


def _chunk(part: Part) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(part.offset), sizes=torch.Size(part.size))
