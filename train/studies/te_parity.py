"""Transformer Engine's second opinion on the FP8 recipe, where it is installed: a part of `make gpu`.

    payloads    E4M3 payload and scale of both quantisers, bit for bit, in all three uses (arXiv:2412.19437 §3.3.2)
    one step    loss and every gradient of precision=fp8 and precision=fp8_te, with the same experts chosen

fp8 keeps SwiGLU's output here as TE does, so that the two part only where wgrad's operand is regrouped and in the order
of FP32 sums: the bounds are those of FP8 against itself (`step_parity.py`). Never run with TE itself so far.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.formats import Quantized
from kernels.quantize import quantize_blocks, quantize_tiles_both
from train.model.te_linear import TeBrokenError, installed, require_te, te_quantized
from train.studies.smoke_runs import SEED, SmokeRun, new_engine, precision_config
from train.studies.step_parity import StepParity, compare_engines

ABSENT = "transformer-engine not installed, skipped"


@dataclass(frozen=True)
class PayloadParity:
    """One tensor in one use: how many payload bytes and scales differ."""

    tensor: str
    use: str
    payload_bytes: int
    scales: int

    @property
    def green(self) -> bool:
        """Bit-equal."""
        return self.payload_bytes == self.scales == 0


@dataclass(frozen=True)
class SecondOpinion:
    """What TE said; `refused`: why it was not asked, else empty."""

    refused: str = ""
    payloads: tuple[PayloadParity, ...] = ()
    step: StepParity | None = None

    @property
    def green(self) -> bool:
        """Whether nothing differs by more than it may."""
        return all(each.green for each in self.payloads) and (self.step is None or self.step.green)


def second_opinion(run: SmokeRun, device: torch.device) -> SecondOpinion:
    """Ask Transformer Engine; an installed one that cannot be imported is an error."""
    if not installed():
        return SecondOpinion(ABSENT)
    try:
        require_te(device, power_of_two=True)
    except TeBrokenError:
        raise
    except ValueError as refusal:
        return SecondOpinion(str(refusal))
    theirs = precision_config("fp8_te")
    ours, other = (new_engine(run, precision, device) for precision in (theirs.on_our_kernels(), theirs))
    return SecondOpinion("", tuple(compare_payloads(device)), compare_engines(run, ours, other, "fp8"))


def compare_payloads(device: torch.device) -> Iterator[PayloadParity]:
    """Both quantisers on numbers of every kind that training meets, power-of-two scales."""
    for name, x in inputs(device):
        blocks = quantize_blocks(x, power_of_two=True)
        ours = (*quantize_tiles_both(x, power_of_two=True), blocks, blocks.transposed_blocks())
        theirs = (*te_quantized(x, blocks=False), *te_quantized(x, blocks=True))
        uses = ("1x128", "1x128 of the transpose", "128x128", "128x128, transposed")
        for use, own, other in zip(uses, ours, theirs, strict=True):
            yield PayloadParity(name, use, *_differing(own, other))


def inputs(device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Normal, wide exponents, short last tiles, tiny and zero, in BF16 and FP32."""
    generator = torch.Generator().manual_seed(SEED)
    normal, ragged = (torch.randn(shape, generator=generator) for shape in ((256, 384), (208, 576)))
    exponents = torch.randint(-40, 40, normal.shape, generator=generator)
    kinds = {
        "normal": normal,
        "wide exponents": normal * torch.exp2(exponents),
        "ragged": ragged,
        "tiny": normal * 1e-9,
        "zeros": torch.zeros_like(normal),
    }
    for name, x in kinds.items():
        for dtype in (torch.bfloat16, torch.float32):
            yield f"{name}, {str(dtype).removeprefix('torch.')}", x.to(device, dtype)


def _differing(ours: Quantized, theirs: Quantized) -> tuple[int, int]:
    payload = ours.payload.view(torch.uint8) != theirs.payload.view(torch.uint8)
    return int(payload.sum()), int((ours.scale != theirs.scale).sum())
