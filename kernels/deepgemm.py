"""DeepGEMM, where it is installed, for the FP8 products that it computes faster: `kernels.backend=deepgemm`, on Hopper.

    a [m, k] @ b [n, k].T, BF16, tiles x blocks           fp8_gemm_nt, recipe (1, 128, 128)
    the same by groups of rows                            m_grouped_fp8_gemm_nt_contiguous
    out [m, n] FP32 += a [m, k] @ b [n, k].T, tiles       fp8_gemm_nt, recipe (1, 1, 128), c = d

Ours compute the rest: `out =` (DeepGEMM always adds), FP32 results of tiles and blocks, and the gradients of experts
(DeepGEMM wants each group's size on the host and packed operands). Where DeepGEMM can, `choose` times both at the
start of a run; the launchers in `kernels/gpu/gemm_fp8.py` ask `takes`. Its scale of tiles is [rows, tiles] with rows
contiguous: ours, transposed.

The only file that imports DeepGEMM. It follows version 2.6.1, is tested against the interface that DeepGEMM publishes,
and has not run on a GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from kernels.backend import HOPPER, use_deepgemm
from kernels.formats import TILE, Quantized, ceil_div
from kernels.gemm_fp8 import gemm_tile_block, gemm_tile_tile
from kernels.gemm_grouped import grouped_gemm_tile_block

NAMES = ("fp8_gemm_nt", "m_grouped_fp8_gemm_nt_contiguous", "k_grouped_fp8_gemm_nt_contiguous")
TILE_BLOCK, TILE_TILE = (1, TILE, TILE), (1, 1, TILE)
INSTALL = "git clone --recursive https://github.com/deepseek-ai/DeepGEMM && cd DeepGEMM && ./install.sh"
OURS = "use gluon, which needs nothing else"
# Rounds in which both candidates take turns, and launches of one turn.
ROUNDS, LAUNCHES = 7, 4
# A sum in another order, rounded to BF16 at most once more than ours: 2^-9 in the mean square; FP32 sums of Hopper's
# tensor cores keep about 14 bits.
MOST_APART = 2.5e-3

Launch = Callable[[], Tensor]
# Candidates by name -> microseconds of one launch.
Clock = Callable[[Mapping[str, Launch]], Mapping[str, float]]


@dataclass(frozen=True)
class Product:
    """What DeepGEMM may compute: rows @ w.T for w [n, k], or [groups, n, k]; or the gradient of w [n, k], `+=`."""

    kind: Literal["rows", "wgrad"]
    n: int
    k: int
    groups: int = 0


@dataclass(frozen=True)
class Choice:
    """A product, measured on so many rows, microseconds."""

    product: Product
    rows: int
    deepgemm_us: float
    ours_us: float

    @property
    def taken(self) -> bool:
        """Whether DeepGEMM computes it."""
        return self.deepgemm_us < self.ours_us


_TAKEN: set[Product] = set()


def takes(product: Product) -> bool:
    """Whether DeepGEMM was chosen for a product."""
    return use_deepgemm() and product in _TAKEN


def library() -> Any:
    """DeepGEMM itself; an ImportError, or whatever its extension raises, where it cannot be loaded."""
    return importlib.import_module("deep_gemm")


def require(device: torch.device, *, asked: str) -> None:
    """Refuse, before anything is built, what DeepGEMM cannot do here.

    Args:
        asked: the setting, as its user wrote it.
    Raises:
        ValueError: no Hopper GPU, no DeepGEMM, or one with another interface.
    """
    if device.type != "cuda":
        raise ValueError(f"{asked} runs on a CUDA GPU, and the device is {device}: {OURS}")
    if (capability := torch.cuda.get_device_capability(device)) != HOPPER:
        found = ".".join(map(str, capability))
        raise ValueError(f"{asked} is for compute capability 9.0 (H100, H200, H800), this GPU has {found}: {OURS}")
    if importlib.util.find_spec("deep_gemm") is None:
        raise ValueError(f"{asked} needs DeepGEMM, which is not installed here: run `{INSTALL}`; {OURS}")
    try:
        found = library()
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{asked}: DeepGEMM is installed but cannot be imported ({reason}); {OURS}") from error
    if missing := [name for name in NAMES if not hasattr(found, name)]:
        version = getattr(found, "__version__", "of unknown version")
        raise ValueError(f"{asked}: the installed DeepGEMM {version} lacks {missing[0]}, 2.6.1 has it: run `{INSTALL}`")


def tile_block(a: Quantized, b: Quantized, out: Tensor, group_of_row: Tensor | None = None) -> None:
    """out [m, n] bf16 = a @ b.T, tiles x blocks; with `group_of_row` of each row's group b [groups, n, k]."""
    operands = (a.payload, a.scale.t()), (b.payload, b.scale), out
    if group_of_row is None:
        library().fp8_gemm_nt(*operands, recipe=TILE_BLOCK)
    else:
        library().m_grouped_fp8_gemm_nt_contiguous(*operands, group_of_row, recipe=TILE_BLOCK)


def rows_to_groups(group_ends: Tensor, rows: int) -> Tensor:
    """The group of each row, [rows] int32; -1 from the last end on, whose outputs DeepGEMM makes zeros."""
    # The kernel looks at the middle of a tile, which for the last tile may be beyond the rows: the storage is longer.
    first = torch.arange(0, ceil_div(rows, TILE) * TILE, TILE, dtype=torch.int32, device=group_ends.device)
    group = torch.searchsorted(group_ends, first, right=True, out_int32=True)
    group = group.masked_fill(group == len(group_ends), -1)
    return group.repeat_interleave(TILE)[:rows]


def add_tile_tile(a: Quantized, b: Quantized, out: Tensor) -> None:
    """out [m, n] fp32 += a @ b.T, both in tiles."""
    operands = (a.payload, a.scale.t()), (b.payload, b.scale.t()), out
    library().fp8_gemm_nt(*operands, c=out, recipe=TILE_TILE)


def add_groups_of_contraction(a: Quantized, b: Quantized, out: Tensor, rows: Sequence[int], on_device: Tensor) -> None:
    """out [groups, m, n] fp32 += of each group of so many rows, also on the device [groups] int32, its own product.

    Operands of `packed`. For the bench: a run knows the rows on the device only.
    """
    operands = (a.payload, a.scale.t()), (b.payload, b.scale.t()), out
    library().k_grouped_fp8_gemm_nt_contiguous(*operands, list(rows), on_device, out, recipe=TILE_TILE)


def packed(q: Quantized, groups: Sequence[slice]) -> Quantized:
    """Tiles [features, rows] with each group's payload contiguous, one after another; the scale as it was."""
    payload = q.payload.view(torch.uint8)
    flat = torch.cat([payload[:, part].reshape(-1) for part in groups])
    return Quantized(flat.view(torch.float8_e4m3fn), q.scale)


def choose(products: Mapping[Product, int], *, device: torch.device, clock: Clock | None = None) -> list[Choice]:
    """Time DeepGEMM and ours on each product, and take the faster one from now on in this process.

    Args:
        products: product -> rows of its activations in one micro-batch, of all groups together.
        clock: None: CUDA events.
    Raises:
        ValueError: DeepGEMM computes something else than ours.
    """
    _TAKEN.clear()
    found = []
    for product, rows in products.items():
        if product.kind == "rows":
            _compare(product, _candidates(product, rows, device, turned=True))
        candidates = _candidates(product, rows, device)
        _compare(product, candidates)
        times = (clock or _microseconds)(candidates)
        found.append(Choice(product, rows, times["deepgemm"], times["ours"]))
    # After the last: while it is empty, "ours" is ours.
    _TAKEN.update(choice.product for choice in found if choice.taken)
    return found


def _compare(product: Product, candidates: Mapping[str, Launch]) -> None:
    """Raise a ValueError where DeepGEMM computes something else than ours."""
    ours, theirs = (candidates[name]().double() for name in ("ours", "deepgemm"))
    apart = float((theirs - ours).norm() / ours.norm())
    if not apart <= MOST_APART:
        raise ValueError(
            f"DeepGEMM's {product.kind} product of a weight [{product.n}, {product.k}] is {apart:.1e} from ours, "
            f"allowed {MOST_APART}: its installation is damaged or computes something else; {OURS}"
        )


def _candidates(product: Product, rows: int, device: torch.device, *, turned: bool = False) -> dict[str, Launch]:
    """Both ways to compute a product of random operands; groups are equal, and one more tile of rows is padding.

    turned: the scale of blocks is a transposed view, as dgrad has it.
    """
    generator = torch.Generator(device).manual_seed(0)
    n, k, groups = product.n, product.k, product.groups

    def payload(*dims: int) -> Tensor:
        return torch.randn(dims, generator=generator, device=device).mul_(64).to(torch.float8_e4m3fn)

    def scale(*dims: int) -> Tensor:
        return torch.randint(-9, -5, dims, generator=generator, device=device).float().exp2_()

    def tiles(count: int, cols: int) -> Quantized:
        return Quantized(payload(count, cols), scale(ceil_div(cols, TILE), count))

    if product.kind == "wgrad":
        a, b = tiles(n, rows), tiles(k, rows)
        mine, theirs = (torch.zeros(n, k, device=device) for _ in range(2))

        def added() -> Tensor:
            add_tile_tile(a, b, theirs)
            return theirs

        return {"deepgemm": added, "ours": lambda: gemm_tile_tile(a, b, out=mine, accumulate=True)}
    share, stack = max(1, rows // max(1, groups) // TILE) * TILE, [groups] if groups else []
    ends = torch.arange(share, (groups + 1) * share, share, dtype=torch.int32, device=device) if groups else None
    x = tiles(groups * share + TILE if groups else rows, k)
    blocks = scale(*stack, ceil_div(n, TILE), ceil_div(k, TILE))
    w = Quantized(payload(*stack, n, k), blocks.mT.contiguous().mT if turned else blocks)

    def ours() -> Tensor:
        if ends is None:
            return gemm_tile_block(x, w, out_dtype=torch.bfloat16)
        return grouped_gemm_tile_block(x, w, ends, out_dtype=torch.bfloat16)

    def launched() -> Tensor:
        out = x.scale.new_empty(len(x.payload), n, dtype=torch.bfloat16)
        tile_block(x, w, out, None if ends is None else rows_to_groups(ends, len(out)))
        return out

    return {"deepgemm": launched, "ours": ours}


def _microseconds(candidates: Mapping[str, Launch]) -> dict[str, float]:
    """Medians of CUDA events: a GPU under its power cap is compared only where candidates take turns."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(ROUNDS):
        for name, launch in candidates.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(LAUNCHES):
                launch()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / LAUNCHES * 1e3)
    return {name: statistics.median(each) for name, each in times.items()}
