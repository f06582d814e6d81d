"""How well E4M3 fits the operands of the FP8 linears: five figures per layer and operand (arXiv:2412.19437 §3.3.2).

On sampled steps the linears show samples of their operands of one micro-batch before and after quantisation
(`kernels/probe.py`). Here they become, per linear and operand,

    amax          max |v|                                        v: the value before quantisation
    scale spread  max scale / min scale                          of tiles that are not all zero
    saturation    (payloads at +-448 - tiles that have one) / non-zero values        the scale itself puts one there
    underflow     non-zero values whose payload is 0 / non-zero values
    SNR           10 log10(sum v^2 / sum (v - payload * scale)^2), dB

and per layer the worst over its linears; the experts of a stack are one linear. For x.wgrad, v is what the linear was
given in forward, so that both roundings count. docs/health.md says how to read them.

Sums and maxima stay on the device, per linear, until the step is over. Reduced over ranks they are those of one
process that had sampled the same rows; a layer of another rank is neutral.

Shapes: layers = all of the model, MTP layers last; linears = matrices of a layer in order of their names' first use;
operands as in `metrics.FP8_OPERANDS`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.formats import TILE, Quantized, ceil_div
from kernels.fp8_linear import has_numbers
from kernels.probe import Operand, Sample, Watch
from kernels.quantize import dequantize_blocks, dequantize_tiles
from parallel.collectives import max_over, sum_over
from parallel.mesh import Axis
from train.model.config import ModelConfig
from train.model.transformer import Transformer
from train.observe.metrics import FP8_OPERANDS

# Blocks of 128 rows of an operand, and of 128 output features of a weight, that are looked at.
SAMPLED_BLOCKS = 1
# Slots for the matrices of one layer; an MTP layer with a shared expert has ten.
LINEARS = 12
# E4M3 codes without their sign: zero, and 448.
ZERO, TOP = 0x00, 0x7E
# Kept of each linear and operand.
MAXIMA = ("amax", "max_scale", "minus_min_scale")
SUMS = ("nonzero", "saturated", "underflowed", "signal", "noise")


@dataclass(frozen=True)
class _Tiles:
    """A sampled operand, decoded. values, decoded, codes [rows, cols]; scale and top_code [row_tiles, col_tiles]."""

    values: Tensor
    decoded: Tensor
    codes: Tensor
    scale: Tensor
    top_code: Tensor


class Fp8Health:
    """The figures of one step on this rank; a `kernels.probe.Probe`. `models` are the stages that this rank holds."""

    def __init__(self, config: ModelConfig, models: Iterable[Transformer], device: torch.device) -> None:
        self.layer_ids = (*config.layer_ids, *config.mtp_layer_ids)
        shape = (len(self.layer_ids), LINEARS, len(FP8_OPERANDS))
        self.maxima = torch.full((*shape, len(MAXIMA)), -math.inf, device=device)
        self.sums = torch.zeros(*shape, len(SUMS), dtype=torch.float64, device=device)
        # id of a matrix -> its layer and its slot in it.
        self._slots: dict[int, tuple[int, int]] = {}
        for model in models:
            for layer_id, layer in (*model.layers.items(), *model.mtp.items()):
                matrices = [parameter for parameter in layer.parameters() if parameter.ndim > 1]
                assert len(matrices) <= LINEARS, len(matrices)
                for slot, matrix in enumerate(matrices):
                    self._slots[id(matrix)] = (self.layer_ids.index(int(layer_id)), slot)

    def watch(self, weight: Tensor) -> Watch | None:
        """The watch of a linear; None for a weight outside the layers."""
        slot = self._slots.get(id(weight))
        return None if slot is None else _LinearWatch(self.maxima[slot], self.sums[slot])

    def reduce(self, world: Axis) -> None:
        """Reduce over all ranks: two small collectives."""
        max_over(self.maxima, world)
        sum_over(self.sums, world)

    def tables(self) -> dict[str, list[list[float]]]:
        """The metrics `fp8/*`, each [layers][operands]; reads the device."""
        # An operand without samples, or of zeros only, reads as one that loses nothing: amax 0, spread 1, infinite SNR.
        amax, max_scale, minus_min_scale = self.maxima.double().unbind(-1)  # each [layers, linears, operands]
        nonzero, saturated, underflowed, signal, noise = self.sums.unbind(-1)
        some = nonzero.clamp(min=1)
        spread = torch.where(max_scale > 0, max_scale / -minus_min_scale, torch.ones_like(max_scale))
        snr_db = torch.where(noise == 0, math.inf, 10 * torch.log10(signal / noise))
        worst = {
            "fp8/amax": amax.clamp(min=0).amax(dim=1),
            "fp8/scale_spread_ratio": spread.amax(dim=1),
            "fp8/saturated_ratio": (saturated / some).amax(dim=1),
            "fp8/underflow_ratio": (underflowed / some).amax(dim=1),
            "fp8/snr_db": snr_db.amin(dim=1),
        }
        # Six digits are more than a sample holds.
        return {name: [[float(f"{x:.6g}") for x in row] for row in table.tolist()] for name, table in worst.items()}


class _LinearWatch:
    """Adds what it sees to one linear's rows of an Fp8Health: maxima and sums [operands, ...]."""

    num_blocks = SAMPLED_BLOCKS

    def __init__(self, maxima: Tensor, sums: Tensor) -> None:
        self._maxima, self._sums = maxima, sums

    def rows(self, operand: Operand, sample: Sample, quantized: Quantized) -> None:
        """An operand in 1x128 tiles."""
        payload = _take(quantized.payload, 0, sample.rows)
        self._add(operand, _tiles(sample.values, payload, quantized.scale.index_select(1, sample.rows)))

    def columns(self, operand: Operand, sample: Sample, quantized: Quantized) -> None:
        """An operand in 128x1 tiles: the 1x128 tiles of its transposed."""
        payload = _take(quantized.payload, 1, sample.rows)
        self._add(operand, _tiles(sample.values.t(), payload, quantized.scale.index_select(0, sample.blocks)))

    @torch.no_grad()
    def weight(self, operand: Operand, weight: Tensor, quantized: Quantized) -> None:
        """The rows of blocks at even distances of a weight; of both its orientations the same blocks.

        Where weights are kept in FP8 only, there is nothing to compare with, and they read as without samples.
        """
        if not has_numbers(weight):
            return
        payload, scale = quantized.payload, quantized.scale
        if operand == "w.dgrad":
            payload, scale = payload.mT, scale.mT
        if weight.dim() == 2:
            weight, payload, scale = weight.unsqueeze(0), payload.unsqueeze(0), scale.unsqueeze(0)
        blocks = max(weight.shape[1] // TILE, 1)
        all_blocks = len(weight) * blocks
        sampled = min(self.num_blocks, all_blocks)
        for nth in range(sampled):
            expert, block = divmod((2 * nth + 1) * all_blocks // (2 * sampled), blocks)
            rows = slice(block * TILE, (block + 1) * TILE)
            q = Quantized(payload[expert, rows], scale[expert, block : block + 1])
            codes = _magnitude(q.payload)
            top = _top_codes(codes, TILE)
            self._add(operand, _Tiles(weight[expert, rows], dequantize_blocks(q), codes, q.scale, top))

    @torch.no_grad()
    def _add(self, operand: Operand, tiles: _Tiles) -> None:
        column = FP8_OPERANDS.index(operand)
        values = tiles.values.float()
        filled = tiles.top_code != ZERO
        scales = (torch.where(filled, scale, -math.inf).amax() for scale in (tiles.scale, -tiles.scale))
        maxima = torch.stack((values.abs().amax(), *scales))
        nonzero = values != 0
        saturated = (tiles.codes == TOP).sum() - (tiles.top_code == TOP).sum()
        norms = (_energy(values), _energy(values - tiles.decoded))
        lost = (nonzero & (tiles.codes == ZERO)).sum()
        self._maxima[column] = torch.maximum(self._maxima[column], maxima)
        self._sums[column] += torch.stack((nonzero.sum().double(), saturated.double(), lost.double(), *norms))


def _energy(x: Tensor) -> Tensor:
    """Sum of squares, FP64: squares of small gradients lie below FP32's range."""
    norm: Tensor = torch.linalg.vector_norm(x, dtype=torch.float64)
    return norm.square()


def _take(payload: Tensor, dim: int, index: Tensor) -> Tensor:
    """index_select of E4M3, as bytes."""
    return payload.view(torch.uint8).index_select(dim, index).view(payload.dtype)


def _magnitude(payload: Tensor) -> Tensor:
    """E4M3 codes without their sign: 0 is zero, 126 is 448, 127 is NaN; greater codes are greater numbers."""
    return payload.view(torch.uint8) & 0x7F


def _top_codes(codes: Tensor, tile_rows: int) -> Tensor:
    """The greatest code of each tile of tile_rows x 128: [row_tiles, col_tiles]."""
    rows, cols = codes.shape
    row_tiles, col_tiles = ceil_div(rows, tile_rows), ceil_div(cols, TILE)
    padded = F.pad(codes, (0, col_tiles * TILE - cols, 0, row_tiles * tile_rows - rows))
    return padded.view(row_tiles, tile_rows, col_tiles, TILE).amax(dim=(1, 3))


def _tiles(values: Tensor, payload: Tensor, scale: Tensor) -> _Tiles:
    """Of 1x128 tiles: values and payload [rows, cols], scale [col_tiles, rows]."""
    codes, decoded = _magnitude(payload), dequantize_tiles(Quantized(payload, scale))
    return _Tiles(values, decoded, codes, scale.t(), _top_codes(codes, 1))
