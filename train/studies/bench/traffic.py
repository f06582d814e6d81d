"""Memory-bound kernels of the peer bench: quantisers and SwiGLU at DeepSeek-V3's sizes (arXiv:2412.19437 §3.3, §4.2).

`fused.py` has those that do several operations in one launch.

Each kernel treats 128 rows by themselves; its outputs are compared with those of its reference on four groups of 128
rows. Tiles run along rows or along columns, so every tensor says where its rows are (`Axis`).

Sizes: activations and gradients [4096 or 32768, 7168]; the largest weight, [36864, 7168]; SwiGLU of a dense layer,
[4096, 2 * 18432], and of experts, gated, [32768, 2 * 2048]. `small` divides every dim by 32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import quantize, swiglu
from kernels.formats import TILE, Quantized
from train.studies.bench.cases import EXPERT_ROWS, TOKENS, reduced

# Where the rows of a tensor are: (dim, rows for one index), 1 or 128; None: it has none, all rows read it.
Axis = tuple[int, int] | None
WHOLE: Axis = None
ROWS, COLS, ROW_TILES = (0, 1), (1, 1), (0, TILE)


@dataclass(frozen=True)
class MemoryBound:
    """A memory-bound operation on rows that are independent in groups of 128."""

    name: str  # of the public function
    rows: int  # a multiple of 128
    cols: int  # for SwiGLU inter
    bytes_per_element: float  # read and written by one ideal call, for each of rows * cols
    # (rows, cols, normal) -> inputs, where normal(*dims) gives random BF16 numbers.
    make: Callable[[int, int, Callable[..., Tensor]], tuple[Tensor, ...]]
    # The public function and its reference; both take the inputs and return all outputs.
    run: Callable[..., tuple[Tensor, ...]]
    reference: Callable[..., tuple[Tensor, ...]]
    # Where their rows are.
    inputs: tuple[Axis, ...]
    outputs: tuple[Axis, ...]
    # Relative Frobenius error of each output. Quantisers divide and round as the references do: the same bits.
    tolerance: float = 0.0
    in_place: bool = False  # it changes its inputs

    @property
    def bytes(self) -> float:
        """Bytes read and written by one ideal call."""
        return self.bytes_per_element * self.rows * self.cols


@dataclass(frozen=True)
class MemoryInputs:
    """Inputs of a memory-bound operation."""

    kernel: MemoryBound
    tensors: tuple[Tensor, ...]
    originals: tuple[Tensor, ...]  # of those that the operation changes

    @property
    def nbytes(self) -> int:
        """Bytes of the inputs."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def reset(self) -> None:
        """Put back what an operation has changed in place; others allocate their outputs."""
        for tensor, original in zip(self.tensors, self.originals, strict=False):
            tensor.copy_(original)

    def expected(self) -> list[Tensor]:
        """The reference of four groups of 128 rows."""
        return list(self.kernel.reference(*self._groups(self.tensors, self.kernel.inputs)))

    def sampled(self, outputs: tuple[Tensor, ...]) -> list[Tensor]:
        """The same groups of the outputs."""
        return self._groups(outputs, self.kernel.outputs)

    def _groups(self, tensors: tuple[Tensor, ...], axes: tuple[Axis, ...]) -> list[Tensor]:
        last = self.kernel.rows // TILE - 1
        groups = sorted({0, last // 3, 2 * last // 3, last})
        found = []
        for tensor, axis in zip(tensors, axes, strict=True):
            if axis is None:
                found.append(tensor)
                continue
            dim, rows_per_index = axis
            each = TILE // rows_per_index
            index = [group * each + i for group in groups for i in range(each)]
            plain = tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
            taken = plain.index_select(dim, torch.tensor(index, device=tensor.device))
            found.append(taken.view(tensor.dtype))
        return found


def memory_inputs(kernel: MemoryBound, device: torch.device) -> MemoryInputs:
    """Random inputs of a memory-bound operation."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*dims: int) -> Tensor:
        return torch.randn(dims, generator=generator, device=device, dtype=torch.bfloat16)

    tensors = kernel.make(kernel.rows, kernel.cols, normal)
    return MemoryInputs(kernel, tensors, tuple(tensor.clone() for tensor in tensors) if kernel.in_place else ())


def flat(*found: Quantized) -> tuple[Tensor, ...]:
    """Payloads and scales one after the other."""
    tensors = ((q.payload, q.scale, q.payload_t) for q in found)
    return tuple(t for group in tensors for t in group if t is not None)


def kept(rows: int, inter: int, normal: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    """SwiGLU's kept input, payload and scale, and the gradient of its output."""
    return (*flat(quantize.quantize_tiles(normal(rows, 2 * inter), power_of_two=True)), normal(rows, inter))


def kept_gated(rows: int, inter: int, normal: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    """The same with routing weights before the gradient."""
    payload, scale, dh = kept(rows, inter, normal)
    return payload, scale, normal(rows).float().sigmoid(), dh


def _quantisers(rows: int, cols: int) -> list[MemoryBound]:
    """The quantisers of activations and gradients; a scale adds 4 bytes to 128 elements."""
    tiles, transposed = (ROWS, COLS), (COLS, ROW_TILES)

    def one(rows: int, cols: int, normal: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return (normal(rows, cols),)

    def quantised(rows: int, cols: int, normal: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return flat(quantize.quantize_tiles(normal(rows, cols), power_of_two=True))

    return [MemoryBound(
        "quantize_tiles", rows, cols, 3 + 1 / 32, one,
        lambda x: flat(quantize.quantize_tiles(x, power_of_two=True)),
        lambda x: quantize.quantize_tiles_reference(x, True), (ROWS,), tiles,
    ), MemoryBound(
        "quantize_tiles_transposed", rows, cols, 3 + 1 / 32, one,
        lambda x: flat(quantize.quantize_tiles_transposed(x, power_of_two=True)),
        lambda x: quantize.quantize_tiles_transposed_reference(x, True), (ROWS,), transposed,
    ), MemoryBound(
        "quantize_tiles_both", rows, cols, 4 + 2 / 32, one,
        lambda x: flat(*quantize.quantize_tiles_both(x, power_of_two=True)),
        lambda x: quantize.quantize_tiles_both_reference(x, True), (ROWS,), tiles + transposed,
    ), MemoryBound(
        "requantize_transposed", rows, cols, 2 + 2 / 32, quantised,
        lambda p, s: flat(quantize.requantize_transposed(Quantized(p, s), power_of_two=True)),
        lambda p, s: quantize.requantize_transposed_reference(p, s, True), tiles, transposed,
    ), MemoryBound(
        "dequantize_tiles", rows, cols, 3 + 1 / 32, quantised,
        lambda p, s: (quantize.dequantize_tiles(Quantized(p, s), out_dtype=torch.bfloat16),),
        lambda p, s: (quantize.dequantize_tiles_reference(p, s, torch.bfloat16),), tiles, (ROWS,),
    )]  # fmt: skip


def _swiglus(rows: int, inter: int, *, gated: bool) -> list[MemoryBound]:
    """SwiGLU with quantisation, and its backward from the kept input; of experts gated, of dense layers not."""
    tiles, gates = (ROWS, COLS), (ROWS,) if gated else ()

    def inputs(rows: int, inter: int, normal: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        gate_up = normal(rows, 2 * inter)
        return (gate_up, normal(rows).float().sigmoid()) if gated else (gate_up,)

    def gradients(p: Tensor, s: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        kept = Quantized(p, s)
        return swiglu.gated_swiglu_backward_kept(kept, *rest) if gated else (swiglu.swiglu_backward_kept(kept, *rest),)

    def gradients_reference(*tensors: Tensor) -> tuple[Tensor, ...]:
        if gated:
            return swiglu.gated_swiglu_backward_kept_reference(*tensors)
        return (swiglu.swiglu_backward_kept_reference(*tensors),)

    return [MemoryBound(
        "swiglu_quantize" + (" gated" if gated else ""), rows, inter, 7 + 3 / 32, inputs,
        lambda x, g=None: flat(*swiglu.swiglu_quantize(x, g, power_of_two=True)),
        lambda x, g=None: swiglu.swiglu_quantize_reference(x, g, True), (ROWS, *gates), tiles + tiles,
        # A GPU's exponential moves 2.4e-4 of the numbers by one E4M3 step, 1/8: sqrt(2.4e-4) / 8 = 2e-3.
        tolerance=5e-3,
    ), MemoryBound(
        ("gated_" if gated else "") + "swiglu_backward_kept", rows, inter, 8 + 2 / 32,
        kept_gated if gated else kept, gradients, gradients_reference, (*tiles, *gates, ROWS), (ROWS, *gates),
        # As above with BF16's step, 2^-7, and twice the share: sqrt(4.8e-4) / 128 = 2e-4.
        tolerance=1e-3,
    )]  # fmt: skip


def memory_bound(*, small: bool) -> list[MemoryBound]:
    """Every memory-bound case of the bench, in the order of the table."""
    hidden = reduced(7168, small=small)
    tokens, rows = reduced(TOKENS, small=small), reduced(EXPERT_ROWS, small=small)
    found = [*_quantisers(tokens, hidden), *_quantisers(rows, hidden)]
    # A dense layer's gate_up, the largest weight.
    found.append(MemoryBound(
        "quantize_blocks", reduced(36864, small=small), hidden, 4 + 4 / TILE**2,
        lambda rows, cols, normal: (normal(rows, cols),),
        lambda w: flat(quantize.quantize_blocks(w, power_of_two=True)),
        lambda w: quantize.quantize_blocks_reference(w, True), (ROWS,), (ROWS, ROW_TILES, COLS),
    ))  # fmt: skip
    found += _swiglus(tokens, max(TILE, reduced(18432, small=small)), gated=False)
    found += _swiglus(rows, max(TILE, reduced(2048, small=small)), gated=True)
    return found
