"""Products of the peer bench: DeepSeek-V3's own GEMMs, their operands, their results in FP64.

GEMMs are those of one layer on 4,096 tokens (arXiv:2412.19437 §4.2), experts on 32,768 rows. For a weight [out, in]:

    fprop   [tokens, in] x [out, in]      -> [tokens, out]    tiles x blocks, BF16
    dgrad   [tokens, out] x [in, out]     -> [tokens, in]     tiles x blocks, BF16
    wgrad   [out, tokens] x [in, tokens]  -> [out, in]        tiles x tiles, FP32, `=` or `+=`

"grouped" has one weight per expert and rows sorted by expert. Payloads are normal numbers of E4M3's full range, scales
powers of two that differ from tile to tile: then a BF16 copy of the operands is exact, and every candidate has the same
result. Results are computed in FP64 on sampled rows, from payloads and scales and by none of the functions measured.

`small` divides every dim by 32: a CPU can run all of them.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kernels.formats import E4M3_MAX, TILE, Quantized, ceil_div

Kind = Literal["fprop", "dgrad", "wgrad", "grouped fprop", "grouped dgrad", "grouped wgrad"]

# [out, in] of q_a and kv_a, q_b, kv_b, o, a shared expert's gate_up and down, the dense layers' gate_up and down.
LAYER_WEIGHTS = 6  # the first ones, those of a MoE layer
WEIGHTS = (
    *((2112, 7168), (24576, 1536), (32768, 512), (7168, 16384)),
    *((4096, 7168), (7168, 2048), (36864, 7168), (7168, 18432)),
)
EXPERT_WEIGHTS = ((4096, 7168), (7168, 2048))
# As many experts as the layer bench and its ledger have; then fewer and more.
TOKENS, EXPERT_ROWS, EXPERTS = 4096, 32768, (8, 4, 32)
# Shares of the rows of eight experts in an uneven case; one has none.
UNEVEN = (3, 0, 1, 7, 2, 5, 4, 10)
REDUCTION = 32

# The largest of 128 normal numbers is about 2.7 standard deviations.
PAYLOAD_STD = E4M3_MAX / 2.7
SCALE_EXPONENTS = (-9, -5)
SAMPLED_ROWS = 260


@dataclass(frozen=True)
class Shape:
    """One product [m, k] x [n, k] of all groups together: rows of grouped fprop and dgrad are m, of grouped wgrad k."""

    kind: Kind
    m: int
    n: int
    k: int
    ends: tuple[int, ...] = ()  # exclusive end rows of the groups, multiples of 128
    accumulate: bool = False  # wgrad adds to its output
    label: str = ""  # how the groups are cut, for the name

    @property
    def is_wgrad(self) -> bool:
        """Whether both operands are in tiles and the output is FP32."""
        return self.kind in ("wgrad", "grouped wgrad")

    @property
    def name(self) -> str:
        """Unique in the table."""
        words = [*self.kind.split(), *self.label.split(), f"M{self.m}_N{self.n}_K{self.k}"]
        if self.is_wgrad:
            words.append("accumulate" if self.accumulate else "overwrite")
        return "_".join(words)

    @property
    def flops(self) -> float:
        """Floating point operations, of all rows."""
        return 2.0 * self.m * self.n * self.k


def reduced(dim: int, *, small: bool) -> int:
    """The dim itself or, small, a 32nd of it, rounded up to a multiple of 32."""
    return ceil_div(dim, REDUCTION * 32) * 32 if small else dim


def shapes(*, small: bool) -> list[Shape]:
    """Every GEMM of the bench: first the 24 of one MoE layer, forward and backward with `+=`, for time may run out."""
    weights = [(reduced(n, small=small), reduced(k, small=small)) for n, k in WEIGHTS]
    tokens = reduced(TOKENS, small=small)
    found = [Shape("fprop", tokens, n, k) for n, k in weights]
    found += [Shape("dgrad", tokens, k, n) for n, k in weights]
    found += [Shape("wgrad", n, k, tokens, accumulate=accumulate) for accumulate in (False, True) for n, k in weights]
    experts = [(reduced(n, small=small), reduced(k, small=small)) for n, k in EXPERT_WEIGHTS]
    groupings = []
    for groups in EXPERTS:
        # An expert of 32 needs a tile of rows even in a small case.
        rows = max(reduced(EXPERT_ROWS, small=small), groups * TILE)
        assert rows % (groups * TILE) == 0, (groups, rows)
        groupings.append((f"G{groups}", rows, tuple(range(rows // groups, rows + 1, rows // groups))))
    rows = reduced(EXPERT_ROWS, small=small)
    tiles = [round(share / sum(UNEVEN) * (rows // TILE)) for share in itertools.accumulate(UNEVEN)]
    groupings.append((f"G{len(UNEVEN)} uneven", rows, tuple(tile * TILE for tile in tiles)))
    for label, rows, ends in groupings:
        for n, k in experts:
            found.append(Shape("grouped fprop", rows, n, k, ends, label=label))
            found.append(Shape("grouped dgrad", rows, k, n, ends, label=label))
        for accumulate in (False, True):
            found += [Shape("grouped wgrad", n, k, rows, ends, accumulate, label) for n, k in experts]
    of_layer = {frozenset(pair) for pair in weights[:LAYER_WEIGHTS]}

    def is_of_layer(shape: Shape) -> bool:
        dims = (shape.m, shape.n) if shape.is_wgrad else (shape.n, shape.k)
        mine = shape.label == f"G{EXPERTS[0]}" if shape.ends else frozenset(dims) in of_layer
        return mine and (shape.accumulate or not shape.is_wgrad)

    return sorted(found, key=lambda shape: not is_of_layer(shape))


@dataclass(frozen=True)
class GemmOperands:
    """Inputs of one product."""

    shape: Shape
    a: Quantized  # tiles, payload [m, k]
    b: Quantized  # payload [n, k] or, for rows in groups, [groups, n, k]; blocks, for wgrad tiles
    group_ends: Tensor | None  # [groups] int32 on the device
    out: Tensor | None  # wgrad's output, [m, n] or [groups, m, n] fp32; None: the operation allocates it

    @property
    def nbytes(self) -> int:
        """Bytes of operands and output."""
        tensors = [self.a.payload, self.a.scale, self.b.payload, self.b.scale]
        return sum(t.nbytes for t in tensors) + (0 if self.out is None else self.out.nbytes)

    def reset(self) -> None:
        """Fill the output with numbers of the product's size, or with NaN where it is to be overwritten."""
        if self.out is None:
            return
        if self.shape.accumulate:
            terms = self.shape.k / max(1, len(self.shape.ends))
            self.out.normal_(0, terms**0.5, generator=torch.Generator(self.out.device).manual_seed(1))
        else:
            self.out.fill_(float("nan"))

    @property
    def slices(self) -> list[slice]:
        """Rows of each group; of wgrad, its rows of the contraction."""
        return [slice(start, end) for start, end in itertools.pairwise([0, *self.shape.ends])]

    @property
    def rows(self) -> list[int]:
        """Sampled rows of the output, the first and last of each group of rows among them."""
        last = self.shape.m - 1
        grouped_wgrad = self.shape.is_wgrad and bool(self.shape.ends)
        wanted = max(8, SAMPLED_ROWS // len(self.shape.ends)) if grouped_wgrad else SAMPLED_ROWS
        found = {round(i * last / (wanted - 1)) for i in range(wanted)}
        if not self.shape.is_wgrad:
            found |= {row for part in self.slices if part.stop > part.start for row in (part.start, part.stop - 1)}
        return sorted(found)

    def sampled(self, outputs: tuple[Tensor, ...]) -> list[Tensor]:
        """Sampled rows of the output, of every group's output for grouped wgrad; all of one that has a wrong shape."""
        (out,) = outputs
        groups = self.shape.ends if self.shape.is_wgrad else ()
        # An index that does not exist would be the end of a process on a GPU.
        whole = out.shape != (*([len(groups)] if groups else []), self.shape.m, self.shape.n)
        return [out if whole else out[..., self.rows, :]]

    def expected(self) -> list[Tensor]:
        """Sampled rows of the product of the dequantised operands, fp64; accumulated: on top of what `reset` put."""
        rows = self.rows
        payload = self.a.payload.view(torch.uint8)[rows].view(torch.float8_e4m3fn)
        x = decode(payload, self.a.scale.t()[rows])  # [sampled, k]
        if self.shape.is_wgrad:
            assert self.out is not None
            y = decode(self.b.payload, self.b.scale.t())  # [n, k]
            product = torch.stack([x[:, part] @ y[:, part].t() for part in self.slices]) if self.slices else x @ y.t()
            if self.shape.accumulate:
                self.reset()
                product += self.out[..., rows, :].double()
            return [product]
        if not self.slices:
            return [x @ decode_blocks(self.b.payload, self.b.scale).t()]
        product = x.new_zeros(len(rows), self.shape.n)
        for group, part in enumerate(self.slices):
            mine = [index for index, row in enumerate(rows) if part.start <= row < part.stop]
            if mine:
                product[mine] = x[mine] @ decode_blocks(self.b.payload[group], self.b.scale[group]).t()
        return [product]


def decode(payload: Tensor, scale: Tensor) -> Tensor:
    """Values in fp64 of payload [rows, cols] under scale [rows, ceil(cols/128)]."""
    values = payload.double()
    for tile, tile_scale in zip(values.split(TILE, dim=1), scale.double().split(1, dim=1), strict=True):
        tile.mul_(tile_scale)
    return values


def decode_blocks(payload: Tensor, scale: Tensor) -> Tensor:
    """Values in fp64 of payload [rows, cols] under scale [ceil(rows/128), ceil(cols/128)]."""
    return decode(payload, scale.repeat_interleave(TILE, dim=0)[: payload.shape[0]])


def operands(shape: Shape, device: torch.device) -> GemmOperands:
    """Random operands of a product; the output is reset."""
    generator = torch.Generator(device).manual_seed(0)

    def payload(*dims: int) -> Tensor:
        values = torch.randn(dims, generator=generator, device=device).mul_(PAYLOAD_STD)
        return values.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)

    def scale(*dims: int) -> Tensor:
        return torch.randint(*SCALE_EXPONENTS, dims, generator=generator, device=device).float().exp2_()

    m, n, k = shape.m, shape.n, shape.k
    groups = [len(shape.ends)] if shape.ends else []
    a = Quantized(payload(m, k), scale(ceil_div(k, TILE), m))
    ends = torch.tensor(shape.ends, dtype=torch.int32, device=device) if shape.ends else None
    if shape.is_wgrad:
        out = torch.empty(*groups, m, n, device=device)
        made = GemmOperands(shape, a, Quantized(payload(n, k), scale(ceil_div(k, TILE), n)), ends, out)
        made.reset()
        return made
    blocks = scale(*groups, ceil_div(n, TILE), ceil_div(k, TILE))
    # dgrad multiplies the transposed copy of the weight, whose scales are a transposed view.
    blocks = blocks.mT.contiguous().mT if shape.kind in ("dgrad", "grouped dgrad") else blocks
    return GemmOperands(shape, a, Quantized(payload(*groups, n, k), blocks), ends, None)
