"""The FP8 linears on NVIDIA's Transformer Engine (TE): `precision=fp8_te`, a second opinion on `kernels/fp8_linear.py`.

    x -> _Enter -> te.Linear or te.GroupedLinear under Float8BlockScaling -> _Leave -> y

The recipe is the same (arXiv:2412.19437 §3.3), the quantisers and products are TE's and cuBLAS's. TE adds a weight's
gradient into `weight.main_grad` itself, when the queue of `kernels.deferred` asks for it. wgrad's x is quantised from
the input and not regrouped from the kept payload (`docs/numerics.md` bounds the difference).

The only file that imports TE. Its calls are tested against the signatures that TE publishes; it never ran on a GPU.

Shapes as in `kernels/fp8_linear.py`: x [..., in], weight [out, in]; grouped: x [rows, in], weight [groups, out, in].
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import deferred
from kernels.formats import TILE, Quantized, ceil_div
from kernels.gemm_grouped import group_rows
from train.model.precision_config import OURS, TE_MULTIPLE

# What TE's block scaling needs: FP8 tensor cores of Hopper or later, and cuBLAS's blockwise products.
LEAST_CAPABILITY, LEAST_CUDA = (9, 0), (12, 9)
SCALE_VARIABLE = "NVTE_FP8_BLOCK_SCALING_FP32_SCALES"


class TeBrokenError(ValueError):
    """TE is installed and cannot be imported."""


def installed() -> bool:
    """Whether there is a package to import; the guard says more."""
    return importlib.util.find_spec("transformer_engine") is not None


def require_te(device: torch.device, *, power_of_two: bool) -> None:
    """Refuse, before anything is built, what TE cannot do here.

    Raises:
        ValueError: no GPU, too old a GPU or CUDA, no TE, or scales other than those TE was imported with.
    """
    if device.type != "cuda":
        raise ValueError(f"precision=fp8_te runs on a CUDA GPU, and this run's device is {device}: name one, or {OURS}")
    if (capability := torch.cuda.get_device_capability(device)) < LEAST_CAPABILITY:
        found = ".".join(map(str, capability))
        raise ValueError(f"precision=fp8_te needs compute capability 9.0 or later, this GPU has {found}: {OURS}")
    cuda = torch.version.cuda or "none"
    if torch.version.cuda is None or tuple(map(int, cuda.split(".")[:2])) < LEAST_CUDA:
        raise ValueError(f"precision=fp8_te needs a torch for CUDA 12.9 or later, this one's is {cuda}: {OURS}")
    if not installed():
        raise ValueError(
            "precision=fp8_te needs transformer-engine, which is not installed here: run "
            f"`pip install --no-build-isolation '.[te]'` in this repository, or {OURS}"
        )
    try:
        recipe = _recipe()
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise TeBrokenError(f"transformer-engine is installed but cannot be imported ({reason}): {OURS}") from error
    operands = (recipe.fp8_quant_fwd_inp, recipe.fp8_quant_fwd_weight, recipe.fp8_quant_bwd_grad)
    if any(operand.power_2_scale is not power_of_two for operand in operands):
        value, state = (str(power_of_two).lower(), "not be set" if power_of_two else "be 1")
        raise ValueError(
            f"precision.power_of_two_scales={value}: TE reads its own switch when it is imported, so {SCALE_VARIABLE} "
            f"must {state} in the environment of this command"
        )


@functools.cache
def _recipe() -> Any:
    import transformer_engine.pytorch  # noqa: F401  (fails here, where its libraries are missing)
    from transformer_engine.common.recipe import Float8BlockScaling

    # Said, since NVTE_BACKWARD_OVERRIDE would take backward out of FP8.
    return Float8BlockScaling(backward_override=None)


def te_linear(x: Tensor, weight: Tensor, *, keep_input: bool = False) -> Tensor:
    """x @ weight.T, all three products on TE; keep_input: x is kept by another operation anyway, so keep no copy."""
    y = _call(_module_of(weight, keep_input=keep_input), x.flatten(0, -2), weight)
    return y.view(*x.shape[:-1], weight.shape[0])


def te_grouped_linear(x: Tensor, weight: Tensor, group_ends: Tensor) -> Tensor:
    """x[rows of g] @ weight[g].T for every expert g, all three products on TE, which splits the rows on the host."""
    splits = [rows.stop - rows.start for rows in group_rows(group_ends, groups=len(weight), rows=len(x))]
    used = x[: sum(splits)]
    if len(used):
        module = _module_of(weight, keep_input=False)
        if torch.is_grad_enabled() and weight.requires_grad:
            for each, main_grad in zip(module.parameters(), weight.main_grad, strict=True):  # type: ignore[attr-defined]
                each.main_grad = main_grad
        y = _call(module, used, weight, torch.tensor(splits))
    else:
        # No expert of this rank got a token; its gradient still has a way back.
        y = used @ weight[0].detach().t()
    return F.pad(y, (0, 0, 0, len(x) - len(used)))


def _module_of(weight: Tensor, *, keep_input: bool) -> Any:
    """The TE module of a weight, made at its first use, and again where the weight has moved or was frozen."""
    key = (weight.data_ptr(), weight.requires_grad)
    cached: tuple[tuple[int, bool], Any] | None = getattr(weight, "_te_module", None)
    if cached is None or cached[0] != key:
        cached = (key, _new_module(weight, keep_input=keep_input))
        weight._te_module = cached  # type: ignore[attr-defined]
    return cached[1]


def _new_module(weight: Tensor, *, keep_input: bool) -> Any:
    from transformer_engine.pytorch import GroupedLinear, Linear

    out_features, in_features = weight.shape[-2:]
    # On the meta device nothing is allocated or drawn: the parameters are replaced by ours.
    settings: dict[str, Any] = {
        "bias": False,
        "fuse_wgrad_accumulation": True,
        "delay_wgrad_compute": True,
        "params_dtype": weight.dtype,
        "device": "meta",
    }
    if weight.dim() == 2:
        module = Linear(in_features, out_features, save_original_input=keep_input, **settings)
        module.weight = weight
        return module
    module = GroupedLinear(len(weight), in_features, out_features, use_grouped_tensor=False, **settings)
    for expert, matrix in enumerate(weight.detach()):
        # A view: what the optimizer writes is seen.
        setattr(module, f"weight{expert}", nn.Parameter(matrix, requires_grad=weight.requires_grad))
    return module


class _Ends:
    """What the two ends of one call share: its module, its weight, and `zero_or_nan` of dy."""

    def __init__(self, module: Any, weight: Tensor) -> None:
        self.module, self.weight = module, weight
        self.dy_nothing: Tensor | None = None

    def add_wgrad(self) -> None:
        deferred.settle(self.weight)
        self.module.backward_dw()


def _call(module: Any, x: Tensor, weight: Tensor, *splits: Tensor) -> Tensor:
    """module(x), [rows, in] -> [rows, out], with a non-finite number of x or the weight made visible."""
    from transformer_engine.pytorch import autocast

    nothing = zero_or_nan(x) + zero_or_nan(weight)
    ends = None
    if torch.is_grad_enabled():
        assert hasattr(weight, "main_grad") or not weight.requires_grad, "TE adds wgrad into main_grad: there is none"
        ends = _Ends(module, weight)
        x = _Enter.apply(x if x.requires_grad else x.detach().requires_grad_(), ends)  # type: ignore[no-untyped-call]
    rows = len(x)
    if rows % TE_MULTIPLE:
        # MTP drops a token a depth. Rows of zeros add nothing to a weight's gradient.
        x = F.pad(x, (0, 0, 0, -rows % TE_MULTIPLE))
    with autocast(enabled=True, recipe=_recipe()):
        y = module(x, *splits)
    return _Leave.apply(y[:rows], nothing, ends)  # type: ignore[no-any-return, no-untyped-call]


def zero_or_nan(x: Tensor) -> Tensor:
    """0, or NaN where an element is not finite: TE saturates such a tile in silence, and our guards read the loss."""
    return torch.linalg.vector_norm(x.detach(), float("inf")) * 0 if x.numel() else x.new_zeros(())


class _Enter(torch.autograd.Function):
    """x; its backward comes after TE's, which has put wgrad into the module's queue: hand it to ours."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ends: _Ends) -> Tensor:
        ctx.ends = ends
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        ends: _Ends = ctx.ends
        if ends.weight.requires_grad:
            # First in, first out, in the module as in the queue. Two micro-batches whose W slots change places add up
            # to the same sum. TE always adds.
            deferred.push(ends.add_wgrad)
        assert ends.dy_nothing is not None, "backward begins at the other end"
        return dx + ends.dy_nothing, None


class _Leave(torch.autograd.Function):
    """y + nothing; its backward comes before TE's and looks at dy."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, nothing: Tensor, ends: _Ends | None) -> Tensor:
        ctx.ends = ends
        return y + nothing

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        ctx.ends.dy_nothing = zero_or_nan(dy)
        return dy, None, None


def te_quantized(x: Tensor, *, blocks: bool) -> tuple[Quantized, Quantized]:
    """x [rows, cols] by TE's own quantiser, power-of-two scales, in our layout, to be compared with ours.

    Returns:
        Its 1x128 tiles and those of its transpose; with `blocks` the 128x128 blocks, and the same transposed.
    """
    from transformer_engine.pytorch import DType, Float8BlockQuantizer

    quantizer = Float8BlockQuantizer(
        DType.kFloat8E4M3,
        rowwise=True,
        columnwise=True,
        amax_epsilon=0.0,
        force_pow_2_scales=True,
        block_scaling_dim=2 if blocks else 1,
    )
    found = quantizer.quantize(x.detach()).get_metadata()
    both = []
    for way, (rows, cols) in (("rowwise", x.shape), ("columnwise", x.shape[::-1])):
        # TE pads the scales of a row to a multiple of four.
        width = ceil_div(cols, TILE) if blocks else rows
        payload, scale = found[f"{way}_data"].view(torch.float8_e4m3fn), found[f"{way}_scale_inv"][:, :width]
        both.append(Quantized(payload, scale))
    return both[0], both[1]
