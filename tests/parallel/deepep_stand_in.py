"""A stand-in for DeepEP on gloo: the interface and the checks of deepep_signatures.json, every token to every rank.

Every call is bound to the recorded signature; what DeepEP would refuse is an AssertionError. Its sums are those of one
reduction, FP32 in order of rank, rounded once.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests import recorded

TABLE: dict[str, Any] = json.loads((Path(__file__).parent / "deepep_signatures.json").read_text())
published = partial(recorded.published, TABLE)
SMS = 24


@dataclass
class Handle:
    """An EPHandle; `comes` [all tokens] says which of all ranks' tokens arrive here."""

    topk_idx: Tensor
    num_experts: int
    comes: Tensor
    first: int
    num_recv_tokens_per_expert_list: list[int]
    num_sms: int = SMS


class Buffer:
    """An ElasticBuffer."""

    @published("ElasticBuffer")
    def __init__(
        self,
        group: dist.ProcessGroup,
        num_max_tokens_per_rank: int,
        hidden: int,
        num_topk: int,
        use_fp8_dispatch: bool,
        deterministic: bool,
    ) -> None:
        assert deterministic
        self.group, self.num_max_tokens_per_rank = group, num_max_tokens_per_rank
        self.hidden, self.topk, self.fp8 = hidden, num_topk, use_fp8_dispatch
        self.calls: list[str] = []
        most = self._all(torch.tensor([num_max_tokens_per_rank]))
        assert bool((most == num_max_tokens_per_rank).all()), "all ranks must say the same"

    def _all(self, mine: Tensor) -> Tensor:
        """Rows of all ranks, in order of rank."""
        parts: list[Any] = [None] * self.group.size()
        # gloo refuses FP8.
        plain = mine.view(torch.uint8) if mine.dtype == torch.float8_e4m3fn else mine
        dist.all_gather_object(parts, plain, group=self.group)
        return torch.cat(parts).view(mine.dtype)

    @published("dispatch")
    def dispatch(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        topk_idx: Tensor | None,
        topk_weights: Tensor | None,
        num_experts: int | None,
        expert_alignment: int | None,
        num_sms: int,
        handle: Handle | None,
    ) -> tuple[Any, Tensor, Tensor | None, Handle, None]:
        assert num_experts is not None, "read before the handle"
        payload, *scales = x if isinstance(x, tuple) else (x,)
        assert bool(scales) == self.fp8
        assert payload.dtype == (torch.float8_e4m3fn if scales else torch.bfloat16)
        assert payload.is_contiguous()
        assert payload.shape[1] == self.hidden
        assert payload.shape[1] * payload.element_size() % 16 == 0
        assert len(payload) <= self.num_max_tokens_per_rank
        assert all(len(each) == len(payload) and each.dtype == torch.float32 for each in scales)
        if handle is None:
            assert topk_idx is not None
            handle = self._new(topk_idx, num_experts, expert_alignment or 1)
        else:
            assert (topk_idx, topk_weights, expert_alignment) == (None, None, None)
            assert (num_experts, num_sms) == (handle.num_experts, handle.num_sms)
        self.calls.append("dispatch")
        received = tuple(self._all(each)[handle.comes] for each in (payload, *scales))
        local = num_experts // self.group.size()
        ids = self._all(handle.topk_idx)[handle.comes] - self.group.rank() * local
        ids = torch.where((ids >= 0) & (ids < local), ids, -1)
        weights = None
        if topk_weights is not None:
            assert (topk_weights.dtype, topk_weights.is_contiguous()) == (torch.float32, True)
            weights = self._all(topk_weights)[handle.comes]
        return received if scales else received[0], ids, weights, handle, None

    def _new(self, topk_idx: Tensor, num_experts: int, alignment: int) -> Handle:
        assert (topk_idx.dtype, topk_idx.is_contiguous()) == (torch.int64, True)
        assert topk_idx.shape[1] == self.topk <= 32
        ids, rank, local = self._all(topk_idx), self.group.rank(), num_experts // self.group.size()
        sizes = self._all(torch.tensor([len(topk_idx)])).tolist()
        here = range(rank * local, (rank + 1) * local)
        counts = [-(-int((ids == expert).sum()) // alignment) * alignment for expert in here]
        return Handle(topk_idx.clone(), num_experts, (ids // local == rank).any(1), sum(sizes[:rank]), counts)

    @published("combine")
    def combine(self, x: Tensor, handle: Handle, topk_weights: Tensor | None) -> tuple[Tensor, Tensor | None, None]:
        assert (x.dtype, x.is_contiguous()) == (torch.bfloat16, True)
        assert len(x) == int(handle.comes.sum())
        self.calls.append("combine")
        weights = None
        if topk_weights is not None:
            assert (topk_weights.dtype, topk_weights.is_contiguous()) == (torch.float32, True)
            assert topk_weights.shape == (len(x), self.topk)
            weights = self._home(topk_weights, handle)
        return self._home(x, handle), weights, None

    def _home(self, rows: Tensor, handle: Handle) -> Tensor:
        """FP32 sums over ranks, in their order."""
        whole = rows.new_zeros(len(handle.comes), rows.shape[1])
        whole[handle.comes] = rows
        total = torch.zeros(whole.shape)
        for part in self._all(whole).chunk(self.group.size()):
            total = total + part
        return total[handle.first : handle.first + len(handle.topk_idx)].to(rows.dtype)


class DeepEP:
    """The module."""

    __version__, ElasticBuffer, topk_idx_t = "2.1.0", Buffer, torch.int64
