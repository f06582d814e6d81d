"""`kernels.backend` of a run and `--kernels` of a command: checked, set for this process and, for DeepGEMM, measured.

DeepGEMM is timed against ours on the products of the model's FP8 weights; shapes that nothing measures are ours.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable
from typing import Any

import torch

from kernels import deepgemm
from kernels.backend import use_backend
from kernels.config import BACKENDS, Backend
from kernels.deepgemm import Choice, Product
from train.model.config import ModelConfig
from train.model.precision_config import PrecisionConfig
from train.model.sizes import Held, Weight, weights


def check_kernels(
    name: str, device: torch.device, *, asked: str = "--kernels ", has_model: bool = True
) -> Backend:  # fmt: skip
    """The backend of that name, if it can run on this device.

    Args:
        asked: how its user wrote it, up to the value.
        has_model: whether there is a model, on whose products DeepGEMM is timed.
    Raises:
        ValueError: no such backend, or DeepGEMM is missing or not for this device.
    """
    if name not in BACKENDS:
        (near,) = difflib.get_close_matches(name[:100], BACKENDS, n=1, cutoff=0.0)
        raise ValueError(f"{asked}{name[:100]} is not one of {', '.join(BACKENDS)}: did you mean {near}?")
    if name == "deepgemm":
        if not has_model:
            raise ValueError(
                f"{asked}{name} is chosen by a model's products: give it to `layer`; rows have it as a peer"
            )
        deepgemm.require(device, asked=f"{asked}{name}")
    return name


def use_kernels(
    name: Backend, model: ModelConfig, precision: PrecisionConfig, *, tokens: int, device: torch.device,
    held: Held | None = None, ep: int = 1, trains: bool = False
) -> list[Choice]:  # fmt: skip
    """Set the backend of this process; with `deepgemm` also choose, by time, what it computes.

    Args:
        name: of `check_kernels`.
        tokens: of one forward pass.
        held: the layers of this rank; None: all.
        ep: ranks that share the experts.
        trains: backward is computed too.
    Raises:
        ValueError: `deepgemm` for a precision without FP8 products, or it computes something else than ours.
    """
    use_backend(name)
    if name != "deepgemm":
        return []
    if precision.name != "fp8":
        raise ValueError(f"DeepGEMM multiplies in FP8, and precision={precision.name} has no such product: use gluon")
    held = held or Held((*model.layer_ids, *model.mtp_layer_ids), embedding=True, head=True)
    table = [weight for weight in weights(model, held, ep=ep) if weight.fp8]
    return deepgemm.choose(_products(table, tokens, trains=trains), device=device)


def _products(table: Iterable[Weight], tokens: int, *, trains: bool) -> dict[Product, int]:
    """Product -> rows, under balanced routing; only what a tensor map can describe."""
    found: dict[Product, int] = {}
    for weight in table:
        groups, rows = (weight.copies if weight.expert else 0), tokens * weight.uses
        if weight.rows % 16 or weight.cols % 16:
            continue
        found[Product("rows", weight.rows, weight.cols, groups)] = rows
        if trains:
            found[Product("rows", weight.cols, weight.rows, groups)] = rows
            if not groups:
                found[Product("wgrad", weight.rows, weight.cols)] = rows
    return found


def shown(choices: Iterable[Choice]) -> list[dict[str, Any]]:
    """Choices for the run card: product, rows, microseconds of both, and which is taken."""
    return [
        {**vars(each.product), "rows": each.rows, "deepgemm_us": round(each.deepgemm_us, 1),
         "ours_us": round(each.ours_us, 1), "takes": "deepgemm" if each.taken else "ours"}
        for each in choices
    ]  # fmt: skip


def use_for_command(
    name: str,
    model: ModelConfig,
    precision: PrecisionConfig,
    *,
    tokens: int,
    device: torch.device,
    trains: bool = False,
) -> None:
    """`check_kernels` and `use_kernels` for `--kernels`; what was measured goes to standard error, in one line."""
    found = use_kernels(check_kernels(name, device), model, precision, tokens=tokens, device=device, trains=trains)
    if found:
        taken = sum(each.taken for each in found)
        print(f"DeepGEMM computes {taken} of {len(found)} products: there it was faster", file=sys.stderr)
