"""A stand-in for DeepGEMM on a CPU: the interface and the checks of deepgemm_signatures.json, products in FP64.

Every call is bound to the recorded signature; an operand in another layout than the recorded one is an AssertionError.
Layouts that DeepGEMM would copy in each call count as wrong.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.formats import TILE, ceil_div
from tests import recorded
from tests.kernels.gemm_inputs import decode_blocks, decode_tiles

TABLE: dict[str, Any] = json.loads((Path(__file__).parent / "deepgemm_signatures.json").read_text())
published = partial(recorded.published, TABLE)
# Payload and scale.
Pair = tuple[Tensor, Tensor]


def of_tiles(operand: Pair) -> Tensor:
    """fp64 [rows, k] of payload [rows, k] under a scale [rows, tiles] with rows contiguous."""
    payload, scale = operand
    rows, k = payload.shape
    assert (payload.dtype, scale.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert payload.stride(1) == 1
    assert (scale.shape, scale.stride()) == ((rows, ceil_div(k, TILE)), (1, rows))
    return decode_tiles(payload, scale.t())


def of_blocks(operand: Pair) -> Tensor:
    """fp64 [..., n, k] under a scale [..., n blocks, k blocks], as it is or turned."""
    payload, scale = operand
    *groups, n, k = payload.shape
    assert payload.is_contiguous()
    assert scale.shape == (*groups, ceil_div(n, TILE), ceil_div(k, TILE))
    assert scale.is_contiguous() or scale.mT.is_contiguous()
    return decode_blocks(payload, scale)


class DeepGemm:
    """The module."""

    __version__ = "2.6.1"

    @published("fp8_gemm_nt")
    def fp8_gemm_nt(self, a: Pair, b: Pair, d: Tensor, c: Tensor | None, recipe: tuple[int, ...] | None) -> None:
        assert d.is_contiguous()
        if recipe == (1, 1, TILE):
            assert c is d
            assert d.dtype == torch.float32
            d += of_tiles(a) @ of_tiles(b).t()
        else:
            assert (recipe, c, d.dtype) == ((1, TILE, TILE), None, torch.bfloat16)
            d.copy_(of_tiles(a) @ of_blocks(b).t())

    @published("m_grouped_fp8_gemm_nt_contiguous")
    def m_grouped_fp8_gemm_nt_contiguous(
        self, a: Pair, b: Pair, d: Tensor, grouped_layout: Tensor, recipe: tuple[int, ...] | None
    ) -> None:
        assert (recipe, d.dtype) == ((1, TILE, TILE), torch.bfloat16)
        assert (grouped_layout.dtype, grouped_layout.shape) == (torch.int32, d.shape[:1])
        assert grouped_layout.is_contiguous()
        assert grouped_layout.untyped_storage().nbytes() >= 4 * ceil_div(len(d), TILE) * TILE
        assert all(rows.unique().numel() == 1 for rows in grouped_layout.split(TILE))
        x, weights = of_tiles(a), of_blocks(b)
        d.zero_()
        for group in grouped_layout[grouped_layout >= 0].unique().tolist():
            rows = grouped_layout == group
            d[rows] = (x[rows] @ weights[group].t()).to(d.dtype)

    @published("k_grouped_fp8_gemm_nt_contiguous")
    def k_grouped_fp8_gemm_nt_contiguous(
        self, a: Pair, b: Pair, d: Tensor, ks_cpu: list[int], grouped_layout: Tensor, c: Tensor,
        recipe: tuple[int, ...],
    ) -> None:  # fmt: skip
        assert recipe == (1, 1, TILE)
        assert c is d
        assert (grouped_layout.dtype, grouped_layout.tolist()) == (torch.int32, ks_cpu)
        operands = []
        for (payload, scale), rows in zip((a, b), d.shape[1:], strict=True):
            assert payload.is_contiguous()
            assert (scale.shape, scale.stride()) == ((rows, sum(ks_cpu) // TILE), (1, rows))
            parts = payload.split([rows * k for k in ks_cpu]), scale.split([k // TILE for k in ks_cpu], dim=1)
            operands.append([decode_tiles(codes.view(rows, -1), s.t()) for codes, s in zip(*parts, strict=True)])
        d += torch.stack([x @ y.t() for x, y in zip(*operands, strict=True)])
