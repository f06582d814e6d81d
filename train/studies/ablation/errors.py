"""One-step errors of FP8 recipes: operands, products, sums, moments, and the gradient of a whole model.

    operands   x, W, dy by token (dgrad) and dy by channel (wgrad) against themselves before quantisation
    outliers   dx token by token, the wider the gradients of tokens are spread (App. B.2)
    products   y, dx, dW against FP64 products of what was not quantised (arXiv:2412.19437 §3.3.2)
    sums       y against the FP64 product of the same quantised operands: what the accumulation alone costs
    moments    AdamW's moments and its update against a run whose moments are FP64 (§3.3.3)
    model      gradients against FP32 from the same weights, with FP32's choice of experts (§2.1.2) on both sides

Operands are seeded: x and W normal; dy normal times 2^(c z) of its token, z normal and c the spread in octaves, since
the report blames token-correlated outliers (App. B.2) for what it saw with 128x128 gradients. Errors are relative
Frobenius norms unless they say otherwise. Shapes stand where they change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kernels.adamw import adamw_update, adamw_update_reference
from kernels.formats import Quantized
from kernels.fp8_linear import weight_fp8
from kernels.quantize import dequantize_blocks, quantize_tiles
from parallel.mesh import single
from train.assemble import build_engine
from train.model.moe import Routing
from train.model.precision import Precision
from train.optim.adamw import round_to_fp8
from train.optim.config import MOMENT_DTYPES
from train.step import Engine, compute_gradients, routers
from train.studies.ablation.linear import AblatedLinears, gradient_operands_reference
from train.studies.smoke_runs import Recipe
from train.studies.step_parity import gradients_of, relative_error, turn, with_choice

# The two dims of a product that are not contracted.
ROWS = 128
# Spread of the gradients of tokens, one standard deviation in powers of two, where it is not what is varied.
TOKEN_OCTAVES = 2.0
BETAS, EPS = (0.9, 0.95), 1e-8


@dataclass(frozen=True)
class Operands:
    """x [rows, in], weight [out, in], dy [rows, out]: fp32."""

    x: Tensor
    weight: Tensor
    dy: Tensor


def operands(rows: int, inputs: int, outputs: int, *, octaves: float = TOKEN_OCTAVES) -> Operands:
    """Seeded operands of one linear, as this file's docstring describes them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, inputs, generator=generator)
    weight = torch.randn(outputs, inputs, generator=generator)
    spread = torch.exp2(octaves * torch.randn(rows, 1, generator=generator))
    return Operands(x, weight, torch.randn(rows, outputs, generator=generator) * spread)


def tile_values(q: Quantized) -> Tensor:
    """fp64 values of a tensor in 1x128 tiles of either format: [rows, cols]."""
    cols = q.payload.shape[1]
    return q.payload.double() * q.scale.double().repeat_interleave(128, dim=0)[:cols].t()


def operand_errors(linears: AblatedLinears, given: Operands) -> dict[str, float]:
    """Relative error of each operand as it is multiplied: x, W, dy of dgrad, dy of wgrad."""
    power_of_two = linears.power_of_two
    by_row, by_channel = gradient_operands_reference(given.dy, linears.ablation, power_of_two=power_of_two)
    return {
        "x": relative_error(tile_values(quantize_tiles(given.x, power_of_two=power_of_two)), given.x),
        "w": relative_error(dequantize_blocks(weight_fp8(given.weight, power_of_two=power_of_two)), given.weight),
        "dy_dgrad": relative_error(tile_values(by_row), given.dy),
        "dy_wgrad": relative_error(tile_values(by_channel).t(), given.dy),
    }


def product_errors(linears: AblatedLinears, *, length: int) -> dict[str, float]:
    """Relative errors of y, dx and dW, each contracted over `length` terms; dx also token by token.

    Args:
        linears: the recipe.
        length: in of fprop, out of dgrad, tokens of wgrad; the other two dims are 128.
    Returns:
        y, dx, dw; dx_token: the root mean square over tokens of each token's own relative error, which small tokens
        enter like large ones; sum and sum_largest: the error of y against the exact product of the same quantised
        operands, as a relative norm, and its largest element over the root mean square of y.
    """
    fprop, dgrad, wgrad = (
        operands(*dims) for dims in ((ROWS, length, ROWS), (ROWS, ROWS, length), (length, ROWS, ROWS))
    )
    y = _run(linears, fprop)[0]
    dx = _run(linears, dgrad)[1]
    dw = _run(linears, wgrad)[2]
    xq = tile_values(quantize_tiles(fprop.x, power_of_two=linears.power_of_two))
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
    """Error of dx token by token (`product_errors`) where gradients of tokens are spread by so many octaves."""
    given = operands(512, ROWS, 512, octaves=octaves)
    return _token_error(_run(linears, given)[1], given)


def _token_error(dx: Tensor, given: Operands) -> float:
    exact = given.dy.double() @ given.weight.double()
    by_token = (dx.double() - exact).norm(dim=1) / exact.norm(dim=1)
    return float(by_token.square().mean().sqrt())


def _run(linears: AblatedLinears, given: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx and dW of one forward and backward."""
    x, weight = given.x.clone().requires_grad_(), nn.Parameter(given.weight.clone())
    y = linears.linear(x, weight)
    y.backward(given.dy)
    assert x.grad is not None
    assert weight.grad is not None
    return y.detach(), x.grad, weight.grad


def moment_errors(dtype: str, *, steps: int = 50, numel: int = 1 << 14) -> dict[str, float]:
    """What a storage of the moments does to AdamW's update, after some steps on one stream of gradients.

    Gradients are normal, each element with a spread 2^(2 z) of its own and a tenth of it as its mean.

    Args:
        dtype: a key of `MOMENT_DTYPES`.
        steps: updates, all on the same weights.
        numel: elements.
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
        grad = spread * (0.1 + torch.randn(numel, generator=generator))
        weights.zero_()
        adamw_update(weights, grad, m, v, lr=1.0, betas=BETAS, eps=EPS, weight_decay=0.0, step=step)
        if dtype == "fp8":
            round_to_fp8(m)
            round_to_fp8(v)
        exact, exact_m, exact_v = adamw_update_reference(
            torch.zeros(numel), grad, exact_m, exact_v, lr=1.0, betas=BETAS, eps=EPS, weight_decay=0.0, step=step
        )
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

    recipe: Recipe
    gradients: Mapping[str, Tensor]
    chosen: Mapping[int, Tensor]


def _engine(recipe: Recipe, precision: Precision) -> Engine:
    """A seeded model; gradients are not clipped, so that a large one does not shrink the others."""
    optim = replace(recipe.optim, clip_norm=1e9)
    return build_engine(recipe.model, precision, optim, single("cpu"), seed=0)


def reference_gradients(recipe: Recipe) -> Reference:
    """Gradients in FP32 from BF16's initial weights."""
    engine, low = _engine(recipe, Precision("fp32")), _engine(recipe, Precision("bf16"))
    with torch.no_grad():
        for parameter, rounded in zip(engine.models[0].parameters(), low.models[0].parameters(), strict=True):
            parameter.copy_(rounded)
    chosen: dict[int, Tensor] = {}
    for layer_id, router in routers(engine.models).items():

        def keep(module: nn.Module, args: object, routing: Routing, layer_id: int = layer_id) -> None:
            chosen[layer_id] = routing.topk_ids

        router.register_forward_hook(keep)
    compute_gradients(engine, recipe.batch(0), num_micro_batches=1, now=recipe.now(0))
    return Reference(recipe, gradients_of(engine), chosen)


def model_errors(precision: Precision, reference: Reference) -> dict[str, float]:
    """Gradients of the whole model in a precision against FP32's.

    Returns:
        gradient: relative error of all gradients as one vector; turn: 1 - cosine of it; worst_turn: of the parameter
        that turned most.
    """
    recipe = reference.recipe
    engine = _engine(recipe, precision)
    for layer_id, router in routers(engine.models).items():

        def force(module: nn.Module, args: tuple[Tensor], routing: Routing, layer_id: int = layer_id) -> Routing:
            return with_choice(routers(engine.models)[layer_id], args[0], routing, reference.chosen[layer_id])[0]

        router.register_forward_hook(force)
    compute_gradients(engine, recipe.batch(0), num_micro_batches=1, now=recipe.now(0))
    ours = gradients_of(engine)
    whole = [torch.cat([grads[name].flatten() for name in ours]) for grads in (ours, reference.gradients)]
    return {
        "gradient": relative_error(*whole),
        "turn": turn(*whole),
        "worst_turn": max(turn(ours[name], expected) for name, expected in reference.gradients.items()),
    }
