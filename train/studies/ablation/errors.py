"""One-step errors of FP8 recipes: operands, products, sums, moments, and the gradient of a whole model.

    operands   x, W, dy by token (dgrad) and dy by channel (wgrad) against themselves before quantisation
    outliers   dx token by token, the wider the gradients of tokens are spread (App. B.2)
    products   y, dx, dW against FP64 products of what was not quantised (arXiv:2412.19437 §3.3.2)
    sums       y against the FP64 product of the same quantised operands: the cost of the accumulation alone
    moments    AdamW's moments and its update against a run whose moments are FP64 (§3.3.3)
    model      gradients against FP32 from the same weights, with FP32's choice of experts (§2.1.2) on both sides

Errors are relative Frobenius norms unless they say otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kernels.adamw import adamw_update, adamw_update_reference
from kernels.formats import Quantized
from kernels.fp8_linear import weight_fp8
from kernels.quantize import dequantize_blocks, quantize_tiles
from parallel.mesh import single
from train.assemble import build_engine
from train.model.precision import Precision
from train.optim.adamw import MOMENT_DTYPES, round_to_fp8
from train.step import Engine
from train.studies.ablation.linear import AblatedLinears, gradient_operands
from train.studies.smoke_runs import SmokeRun
from train.studies.step_parity import gradients_of, relative_error, step_and_choices, step_with_choices, turn

# The two dims of a product that are not contracted.
ROWS = 128
# Spread of the gradients of tokens, one standard deviation in powers of two, where it is not what is varied.
TOKEN_OCTAVES = 2.0
ADAMW: dict[str, Any] = {"lr": 1.0, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}


@dataclass(frozen=True)
class LinearCase:
    """x [rows, in], weight [out, in], dy [rows, out]: fp32."""

    x: Tensor
    weight: Tensor
    dy: Tensor


def linear_case(rows: int, inputs: int, outputs: int, *, octaves: float = TOKEN_OCTAVES) -> LinearCase:
    """Seeded operands of one linear; tokens differ in the size of their gradients by `octaves` powers of two (std)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, inputs, generator=generator)
    weight = torch.randn(outputs, inputs, generator=generator)
    # The report blames token-correlated outliers (App. B.2) for what it saw with 128x128 gradients.
    spread = torch.exp2(octaves * torch.randn(rows, 1, generator=generator))
    return LinearCase(x, weight, torch.randn(rows, outputs, generator=generator) * spread)


def _tile_values(q: Quantized) -> Tensor:
    """fp64 values of a tensor in 1x128 tiles of either format: [rows, cols]."""
    return q.payload.double() * q.scale.double().repeat_interleave(128, dim=0)[: q.payload.shape[1]].t()


def operand_errors(linears: AblatedLinears, case: LinearCase) -> dict[str, float]:
    """Relative error of each operand as it is multiplied: x, W, dy of dgrad, dy of wgrad."""
    power_of_two = linears.power_of_two
    by_row, by_channel = gradient_operands(case.dy, linears.ablation, power_of_two=power_of_two)
    return {
        "x": relative_error(_tile_values(quantize_tiles(case.x, power_of_two=power_of_two)), case.x),
        "w": relative_error(dequantize_blocks(weight_fp8(case.weight, power_of_two=power_of_two)), case.weight),
        "dy_dgrad": relative_error(_tile_values(by_row), case.dy),
        "dy_wgrad": relative_error(_tile_values(by_channel).t(), case.dy),
    }


def product_errors(linears: AblatedLinears, *, length: int) -> dict[str, float]:
    """Relative errors of y, dx and dW, each contracted over `length` terms; their other dims are 128.

    Returns:
        y, dx, dw; dx_token: the root mean square over tokens of each token's own relative error, in which small tokens
        count as much as large ones; sum and sum_largest: the error of y against the exact product of the same
        quantised operands, as a relative norm, and its largest element over the root mean square of y.
    """
    shapes = ((ROWS, length, ROWS), (ROWS, ROWS, length), (length, ROWS, ROWS))
    fprop, dgrad, wgrad = (linear_case(*shape) for shape in shapes)
    y, dx, dw = _run(linears, fprop)[0], _run(linears, dgrad)[1], _run(linears, wgrad)[2]
    xq = _tile_values(quantize_tiles(fprop.x, power_of_two=linears.power_of_two))
    wq = dequantize_blocks(weight_fp8(fprop.weight, power_of_two=linears.power_of_two)).double()
    of_quantized = xq @ wq.t()  # [ROWS, ROWS] fp64
    rest = y.double() - of_quantized
    return {
        "y": relative_error(y, fprop.x.double() @ fprop.weight.double().t()),
        "dx": relative_error(dx, dgrad.dy.double() @ dgrad.weight.double()),
        "dx_token": _token_error(dx, dgrad),
        "dw": relative_error(dw, wgrad.dy.double().t() @ wgrad.x.double()),
        "sum": float(rest.norm() / of_quantized.norm()),
        "sum_largest": float(rest.abs().max() / of_quantized.square().mean().sqrt()),
    }


def outlier_error(linears: AblatedLinears, *, octaves: float) -> float:
    """dx_token of `product_errors` where the gradients of tokens are spread by so many octaves."""
    case = linear_case(512, ROWS, 512, octaves=octaves)
    return _token_error(_run(linears, case)[1], case)


def _token_error(dx: Tensor, case: LinearCase) -> float:
    exact = case.dy.double() @ case.weight.double()
    by_token = (dx.double() - exact).norm(dim=1) / exact.norm(dim=1)
    return float(by_token.square().mean().sqrt())


def _run(linears: AblatedLinears, case: LinearCase) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx and dW of one forward and backward."""
    x, weight = case.x.clone().requires_grad_(), nn.Parameter(case.weight.clone())
    y = linears.linear(x, weight)
    y.backward(case.dy)
    assert x.grad is not None
    assert weight.grad is not None
    return y.detach(), x.grad, weight.grad


def moment_errors(dtype: str, *, steps: int = 50, numel: int = 1 << 14) -> dict[str, float]:
    """What a storage of the moments (a key of `MOMENT_DTYPES`) does to AdamW after some updates of the same weights.

    Returns:
        Relative errors of exp_avg, exp_avg_sq and of the last update, against moments in FP64; the largest error of an
        element of the update, in learning rates; the share of second moments that became zero.
    """
    generator = torch.Generator().manual_seed(0)
    spread = torch.exp2(TOKEN_OCTAVES * torch.randn(numel, generator=generator))
    m, v = (torch.zeros(numel, dtype=MOMENT_DTYPES[dtype]) for _ in range(2))
    exact_m, exact_v = (torch.zeros(numel, dtype=torch.float64) for _ in range(2))
    weights, exact = torch.zeros(numel), torch.zeros(numel, dtype=torch.float64)
    for step in range(1, steps + 1):
        # Each element has a spread 2^(2 z) of its own, and a tenth of it as its mean.
        grad = spread * (0.1 + torch.randn(numel, generator=generator))
        weights.zero_()
        adamw_update(weights, grad, m, v, **ADAMW, step=step)
        if dtype == "fp8":
            round_to_fp8(m)
            round_to_fp8(v)
        start = torch.zeros(numel)
        exact, exact_m, exact_v = adamw_update_reference(start, grad, exact_m, exact_v, **ADAMW, step=step)
    return {
        "exp_avg": relative_error(m, exact_m),
        "exp_avg_sq": relative_error(v, exact_v),
        "update": relative_error(weights, exact),
        "update_largest": float((weights.double() - exact).abs().max()),
        "zero_share": float((v == 0).double().mean()),
    }


@dataclass(frozen=True)
class Reference:
    """FP32's gradients of one batch, from weights that BF16 can hold, and its choices of experts by layer."""

    run: SmokeRun
    gradients: Mapping[str, Tensor]
    chosen: Mapping[int, Tensor]


def _engine(run: SmokeRun, precision: Precision) -> Engine:
    """A seeded model; gradients are not clipped, or a large one would shrink the others."""
    return build_engine(run.model, precision, replace(run.optim, clip_norm=1e9), single("cpu"), seed=0)


def reference_gradients(run: SmokeRun) -> Reference:
    """Gradients in FP32 from BF16's initial weights."""
    engine, low = _engine(run, Precision("fp32")), _engine(run, Precision("bf16"))
    with torch.no_grad():
        for parameter, rounded in zip(engine.models[0].parameters(), low.models[0].parameters(), strict=True):
            parameter.copy_(rounded)
    _, chosen = step_and_choices(engine, run)
    return Reference(run, gradients_of(engine), chosen)


def model_errors(precision: Precision, reference: Reference) -> dict[str, float]:
    """Gradients of the whole model in a precision against FP32's.

    Returns:
        gradient: relative error of all gradients as one vector; turn: 1 - cosine of it; worst_turn: of the parameter
        that turned most.
    """
    engine = _engine(reference.run, precision)
    step_with_choices(engine, reference.run, reference.chosen)
    ours = gradients_of(engine)
    whole = [torch.cat([grads[name].flatten() for name in ours]) for grads in (ours, reference.gradients)]
    return {
        "gradient": relative_error(*whole),
        "turn": turn(*whole),
        "worst_turn": max(turn(ours[name], expected) for name, expected in reference.gradients.items()),
    }
