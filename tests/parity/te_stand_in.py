"""A stand-in for Transformer Engine on a CPU: exactly the interface recorded in te_signatures.json, our own numerics.

Every call is bound to the recorded signature, so that a name or argument that TE does not publish is a TypeError, as it
would be with TE; a setting the stand-in does not imitate may only have its default. What is imitated: both directions
are quantised from the high-precision input, FP8 only inside `autocast`, wgrad added into `main_grad` and put off until
`backward_dw`, first in, first out.
"""

from __future__ import annotations

import enum
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.formats import Quantized
from kernels.gemm_fp8 import gemm_tile_block, gemm_tile_tile
from tests import recorded

TABLE: dict[str, Any] = json.loads((Path(__file__).parent / "te_signatures.json").read_text())
PYTORCH, RECIPE = "transformer_engine.pytorch", "transformer_engine.common.recipe"


signature_of = partial(recorded.signature_of, TABLE)
published = partial(recorded.published, TABLE)


# TE's rule, in our words: the multiplier is 448 / amax in FP32, cut to a power of two; the scale is its inverse.
def te_multiplier(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 [...]: what a tile with this largest magnitude is multiplied with."""
    multiplier = 448.0 / amax
    # A quotient beyond FP32 becomes the largest number of the tensor's own type; no amax is floored.
    multiplier = torch.where(multiplier.isinf(), torch.finfo(dtype).max, multiplier)
    exponent_only = multiplier.view(torch.int32).bitwise_and(~0x007FFFFF).view(torch.float32)
    # Zeros, and silently tiles with an infinity.
    return torch.where((amax == 0) | ~amax.isfinite(), 1.0, exponent_only)


def te_quantize(x: Tensor, *, tile_rows: int) -> tuple[Tensor, Tensor]:
    """Payload [rows, cols] and scale [row_tiles, col_tiles] of tiles of tile_rows x 128; the last may be short."""
    rows, cols = x.shape
    padded = F.pad(x, (0, -cols % 128, 0, -rows % tile_rows)).float()
    tiles = padded.view(-(-rows // tile_rows), tile_rows, -(-cols // 128), 128)
    magnitudes = tiles.abs().amax(dim=(1, 3))
    multiplier = te_multiplier(magnitudes, x.dtype)
    scaled = tiles * multiplier[:, None, :, None]
    payload = scaled.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).view_as(padded)
    return payload[:rows, :cols].contiguous(), 1.0 / multiplier


def by_row(x: Tensor) -> Quantized:
    payload, scale = te_quantize(x, tile_rows=1)
    return Quantized(payload, scale.t().contiguous())


def by_block(x: Tensor) -> Quantized:
    return Quantized(*te_quantize(x, tile_rows=128))


class DType(enum.IntEnum):
    kFloat8E4M3 = 7


class Float8BlockScaling:
    @published(f"{RECIPE}.Float8BlockScaling")
    def __init__(self, backward_override: str | None) -> None:
        assert backward_override is None
        powers = os.environ.get("NVTE_FP8_BLOCK_SCALING_FP32_SCALES", "0") != "1"
        self.fp8_quant_fwd_inp = self.fp8_quant_fwd_weight = SimpleNamespace(power_2_scale=powers)
        self.fp8_quant_bwd_grad = SimpleNamespace(power_2_scale=powers)


class autocast:
    recipe: Any = None

    @published(f"{PYTORCH}.autocast")
    def __init__(self, enabled: bool, recipe: Any) -> None:
        self._recipe = recipe if enabled else None

    def __enter__(self) -> None:
        assert autocast.recipe is None, "nested"
        autocast.recipe = self._recipe

    def __exit__(self, *error: object) -> None:
        autocast.recipe = None


class _Products(torch.autograd.Function):
    """One linear for every split of the rows: TE's three products and its order of quantising."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, owner: Any, splits: Sequence[int], *weights: Tensor) -> Tensor:
        ctx.owner, ctx.splits, ctx.params = owner, splits, weights
        ctx.save_for_backward(x)
        ctx.blocks = [by_block(weight) for weight in weights]
        products = [gemm_tile_block(by_row(each), blocks, out_dtype=x.dtype) for each, blocks in
                    zip(x.split(splits), ctx.blocks, strict=True)]  # fmt: skip
        return torch.cat(products)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        parts = dy.split(ctx.splits)
        dx = [gemm_tile_block(by_row(each), blocks.transposed_blocks(), out_dtype=dy.dtype) for each, blocks in
              zip(parts, ctx.blocks, strict=True)]  # fmt: skip

        def wgrad() -> None:
            for weight, x_part, dy_part in zip(ctx.params, x.split(ctx.splits), parts, strict=True):
                if len(x_part):
                    operands = by_row(dy_part.t()), by_row(x_part.t())
                    gemm_tile_tile(*operands, out=weight.main_grad, accumulate=True)

        if ctx.params[0].requires_grad:
            ctx.owner.waiting.append(wgrad)
        return torch.cat(dx), None, None, *(None for _ in ctx.params)


class _Module(nn.Module):
    def set_up(self, names: Sequence[str], out_features: int, in_features: int, settings: dict[str, Any]) -> None:
        # What else is asked for would change the numbers: the adapter must say it.
        wanted = {"bias": False, "fuse_wgrad_accumulation": True, "delay_wgrad_compute": True, "device": "meta"}
        assert {key: settings[key] for key in wanted} == wanted
        self.waiting: deque[Callable[[], None]] = deque()
        self.dtype, self.names = settings["params_dtype"], names
        for name in names:
            shape = torch.empty(out_features, in_features, dtype=self.dtype, device="meta")
            self.register_parameter(name, nn.Parameter(shape))

    def run(self, x: Tensor, splits: Sequence[int]) -> Tensor:
        weights = [getattr(self, name) for name in self.names]
        assert autocast.recipe is not None, "outside of autocast TE computes in BF16"
        assert all(each.dtype == x.dtype and each.device == x.device for each in weights), "x and weights must agree"
        if x.shape[0] % 8 or x.shape[1] % 16 or weights[0].shape[0] % 8:
            raise ValueError(f"FP8 execution refuses {list(x.shape)}")
        assert sum(splits) == len(x), "torch.split needs every row in a split"
        y: Tensor = _Products.apply(x, self, splits, *weights)
        return y


class Linear(_Module):
    @published(f"{PYTORCH}.Linear")
    def __init__(
        self, in_features: int, out_features: int, bias: bool, fuse_wgrad_accumulation: bool, delay_wgrad_compute: bool,
        params_dtype: torch.dtype, device: str, save_original_input: bool,
    ) -> None:  # fmt: skip
        settings = dict(locals())
        super().__init__()
        self.set_up(["weight"], out_features, in_features, settings)

    @published(f"{PYTORCH}.Linear.forward")
    def forward(self, inp: Tensor) -> Tensor:
        return self.run(inp, [len(inp)])

    @published(f"{PYTORCH}.Linear.backward_dw")
    def backward_dw(self) -> None:
        self.waiting.popleft()()


class GroupedLinear(_Module):
    @published(f"{PYTORCH}.GroupedLinear")
    def __init__(
        self, num_gemms: int, in_features: int, out_features: int, bias: bool, fuse_wgrad_accumulation: bool,
        delay_wgrad_compute: bool, params_dtype: torch.dtype, device: str, use_grouped_tensor: bool,
    ) -> None:  # fmt: skip
        settings = dict(locals())
        super().__init__()
        assert use_grouped_tensor is False, "TE warns, and lets the environment choose"
        self.set_up([f"weight{index}" for index in range(num_gemms)], out_features, in_features, settings)

    @published(f"{PYTORCH}.GroupedLinear.forward")
    def forward(self, inp: Tensor, m_splits: Tensor) -> Tensor:
        assert (m_splits.dtype, m_splits.device.type) == (torch.int64, "cpu")
        return self.run(inp, m_splits.tolist())

    @published(f"{PYTORCH}.GroupedLinear.backward_dw")
    def backward_dw(self) -> None:
        self.waiting.popleft()()


class Float8BlockQuantizer:
    @published(f"{PYTORCH}.Float8BlockQuantizer")
    def __init__(self, fp8_dtype: DType, rowwise: bool, columnwise: bool, block_scaling_dim: int) -> None:
        assert rowwise
        assert columnwise
        assert fp8_dtype is DType.kFloat8E4M3
        self._tile_rows = {1: 1, 2: 128}[block_scaling_dim]

    @published(f"{PYTORCH}.Float8BlockQuantizer.quantize")
    def quantize(self, tensor: Tensor) -> SimpleNamespace:
        found: dict[str, Tensor] = {}
        for way, x in (("rowwise", tensor), ("columnwise", tensor.t())):
            payload, scale = te_quantize(x, tile_rows=self._tile_rows)
            scale = scale.t() if self._tile_rows == 1 else scale
            found[f"{way}_data"] = payload.view(torch.uint8)
            found[f"{way}_scale_inv"] = F.pad(scale, (0, -scale.shape[1] % 4))
        return SimpleNamespace(get_metadata=lambda: found)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `import transformer_engine` find the stand-in."""
    root, common = ModuleType("transformer_engine"), ModuleType("transformer_engine.common")
    recipe, pytorch = ModuleType(RECIPE), ModuleType(PYTORCH)
    recipe.Float8BlockScaling = Float8BlockScaling  # type: ignore[attr-defined]
    for each in (DType, Float8BlockQuantizer, GroupedLinear, Linear, autocast):
        setattr(pytorch, each.__name__, each)
    root.common, root.pytorch, common.recipe = common, pytorch, recipe  # type: ignore[attr-defined]
    for module in (root, common, recipe, pytorch):
        # Without a spec `find_spec` raises, and asks whether a real package is there.
        module.__spec__ = SimpleNamespace(name=module.__name__)  # type: ignore[assignment]
        monkeypatch.setitem(sys.modules, module.__name__, module)
