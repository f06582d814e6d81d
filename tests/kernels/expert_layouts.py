"""Choices of experts and the layouts that follow, for the tests of the permutation and of its kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.formats import TILE, ceil_div
from kernels.permute import Grouping, grouping, partial_grouping

# A process that holds only some of the experts holds 1 to 3.
EXPERTS, LOCAL = 8, 3
KINDS = ("random", "empty experts", "all to the same")


def choices(kind: str, tokens: int, topk: int) -> Tensor:
    """Ids [tokens, topk], distinct within a token."""
    if kind == "random":
        return torch.rand(tokens, EXPERTS).argsort(-1)[:, :topk].contiguous()
    if kind == "empty experts":
        # The first, the last and two between are never chosen.
        return torch.tensor([1, 2, 4, 6])[torch.rand(tokens, 4).argsort(-1)[:, :topk]]
    assert kind == "all to the same"
    # The first choice is no local expert.
    return torch.arange(4, 4 - topk, -1).expand(tokens, topk).contiguous()


def here(ids: Tensor) -> Tensor:
    """The view of a process with experts 1 to 3: local ids, int32, -1 for the others."""
    return torch.where((ids >= 1) & (ids <= LOCAL), ids - 1, -1).int()


def padded_rows(ids: Tensor, experts: int) -> int:
    return sum(ceil_div(int((ids == expert).sum()), TILE) * TILE for expert in range(experts))


def layout_of(ids: Tensor, which: str) -> tuple[Tensor, Grouping]:
    """The ids as the process sees them and its layout: "whole", or "partial" with some of the experts."""
    if which == "whole":
        return ids, grouping(ids, EXPERTS)
    return here(ids), partial_grouping(here(ids), LOCAL, num_rows=padded_rows(here(ids), LOCAL))
