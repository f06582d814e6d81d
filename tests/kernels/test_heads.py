"""Latents to heads as one operation: the bits, the weight gradients and the samples of the separate operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import deferred, probe
from kernels.formats import CarriedTiles, Quantized
from kernels.fp8_linear import LinearInput, fp8_linear
from kernels.heads import HeadSizes, UpProjection, latents_to_heads
from kernels.rmsnorm import add_rmsnorm
from kernels.rope import apply_rope, rope_tables
from tests.kernels.gemm_inputs import kept_for_backward

EPS = 1e-6
SEQUENCES, POSITIONS, Q_RANK, KV_RANK = 3, 43, 96, 64


@dataclass(frozen=True)
class Dims:
    """Of a model's attention."""

    heads: int
    nope: int
    rope: int
    v: int
    with_latent: bool = True
    power_of_two: bool = True


# Both gradients in tiles, none, and one of them.
V3 = Dims(2, 128, 64, 128)
CASES = {
    "V3": V3,
    "FP32 scales": Dims(2, 128, 64, 128, power_of_two=False),
    "tiny": Dims(4, 64, 32, 64),
    "odd number of heads": Dims(3, 128, 64, 128),
    "narrow values": Dims(3, 32, 64, 40),
    "no query latent": Dims(2, 128, 64, 128, with_latent=False),
}
each_case = pytest.mark.parametrize("dims", CASES.values(), ids=CASES)


class Layer:
    """Leaves with gradients, and q, k, v [tokens, heads, width] of them; the linears note what they are shown."""

    def __init__(self, dims: Dims) -> None:
        self.dims, generator = dims, torch.Generator().manual_seed(0)
        qk = dims.nope + dims.rope
        self.q_width = Q_RANK if dims.with_latent else dims.heads * qk
        shapes = [(SEQUENCES * POSITIONS, self.q_width + KV_RANK + dims.rope), (KV_RANK,), (Q_RANK,)]
        shapes += [(dims.heads * (dims.nope + dims.v), KV_RANK), (dims.heads * qk, Q_RANK)]
        values = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
        self.leaves = [x.requires_grad_() for x in (values if dims.with_latent else (*values[:2], values[3]))]
        self.latents, *rest = self.leaves
        self.gains, self.weights = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        for weight in (*self.gains, *self.weights):
            weight.main_grad = torch.zeros(weight.shape)  # type: ignore[attr-defined]
        self.tables = rope_tables(POSITIONS, dims.rope, 10000.0, yarn=None)
        self.seen: list[Tensor] = []

    def linear(self, x: LinearInput, weight: Tensor) -> Tensor:
        y = fp8_linear(x, weight, power_of_two=self.dims.power_of_two)
        assert isinstance(x, CarriedTiles)
        self.seen += [x.tiles.payload.view(torch.uint8), x.rows(torch.arange(5)), y.detach().clone()]
        return y

    def fused(self) -> tuple[Tensor, ...]:
        dims = self.dims
        ups = [
            UpProjection(gain, EPS, weight, lambda x, weight=weight: self.linear(x, weight))  # type: ignore[misc]
            for gain, weight in zip(self.gains, self.weights, strict=True)
        ]
        sizes = HeadSizes(dims.heads, dims.nope, dims.rope, dims.power_of_two)
        return latents_to_heads(self.latents, *self.tables, sizes, q=ups[1] if dims.with_latent else None, kv=ups[0])

    def apart(self) -> tuple[Tensor, ...]:
        """Norms, linears, turns and concatenations under autograd."""
        dims = self.dims
        *latents, k_rope = self.latents.split((self.q_width, KV_RANK, dims.rope), dim=1)
        if dims.with_latent:
            latents[0] = self._up(latents[0], 1)
        q, kv = (self._by_head(x) for x in (latents[0], self._up(latents[1], 0)))
        q_nope, q_rope = q.split((dims.nope, dims.rope), dim=-1)
        k_nope, v = kv.split((dims.nope, dims.v), dim=-1)
        key = apply_rope(k_rope.view(SEQUENCES, 1, POSITIONS, -1), *self.tables).expand(-1, dims.heads, -1, -1)
        parts = torch.cat((q_nope, apply_rope(q_rope, *self.tables)), -1), torch.cat((k_nope, key), -1), v
        return tuple(x.transpose(1, 2).flatten(0, 1) for x in parts)

    def _up(self, latent: Tensor, nth: int) -> Tensor:
        power_of_two = self.dims.power_of_two
        (x,) = add_rmsnorm(latent, None, self.gains[nth], EPS, tiles=1, power_of_two=power_of_two)[2]
        return self.linear(x, self.weights[nth])

    def _by_head(self, x: Tensor) -> Tensor:
        return x.view(SEQUENCES, POSITIONS, self.dims.heads, -1).transpose(1, 2)

    def cotangents(self) -> list[Tensor]:
        """Head after head, as some attention gives them."""
        generator, dims = torch.Generator().manual_seed(1), self.dims
        widths = (dims.nope + dims.rope, dims.nope + dims.rope, dims.v)
        shapes = [(dims.heads, SEQUENCES * POSITIONS, width) for width in widths]
        return [torch.randn(shape, generator=generator).bfloat16().transpose(0, 1) for shape in shapes]

    def gradients(self) -> list[Tensor]:
        assert all(leaf.grad is None for leaf in self.leaves[1:])
        return [self.latents.grad, *(leaf.main_grad for leaf in self.leaves[1:])]  # type: ignore[attr-defined, list-item]


@each_case
def test_outputs_and_gradients_have_the_bits_of_separate_operations(dims: Dims) -> None:
    layers = Layer(dims), Layer(dims)
    outputs = layers[0].fused(), layers[1].apart()
    for layer, each in zip(layers, outputs, strict=True):
        torch.autograd.backward(each, layer.cotangents())
    for found, expected in zip(*outputs, strict=True):
        assert torch.equal(found, expected)
    # Latents, and a gain and a weight for each linear.
    assert [len(layer.gradients()) for layer in layers] == [1 + 2 * (1 + dims.with_latent)] * 2
    for found, expected in zip(*(layer.gradients() for layer in layers), strict=True):
        assert torch.equal(found, expected)
    # What the linears were shown, before q was turned.
    assert len(layers[0].seen) == 3 * len(layers[0].weights)
    for found, expected in zip(*(layer.seen for layer in layers), strict=True):
        assert torch.equal(found, expected)


def test_values_are_a_view_of_the_product_and_latents_are_not_changed() -> None:
    for dims in (V3, CASES["no query latent"]):
        layer = Layer(dims)
        before = layer.latents.detach().clone()
        q, k, v = layer.fused()
        assert torch.equal(layer.latents, before)
        assert q.is_contiguous()
        assert k.is_contiguous()
        assert v.stride() == (2 * 256, 256, 1)
        assert v.untyped_storage().nbytes() == 2 * len(v) * 2 * 256


def test_latents_and_roots_are_kept_for_backward_and_nothing_of_the_heads() -> None:
    layer, tokens = Layer(V3), SEQUENCES * POSITIONS
    kept = kept_for_backward(layer.fused)
    expected = [tuple(layer.latents.shape), *2 * [(POSITIONS, 32)], *2 * [(tokens,)]]
    assert [tuple(tensor.shape) for tensor in kept] == expected


def test_weight_gradients_wait_for_their_slot_and_frozen_weights_have_none() -> None:
    layer, expected = Layer(V3), Layer(V3)
    torch.autograd.backward(expected.apart(), expected.cotangents())
    with deferred.deferred():
        torch.autograd.backward(layer.fused(), layer.cotangents())
        assert deferred.pending() == 2
        assert not any(weight.main_grad.any() for weight in layer.weights)  # type: ignore[attr-defined]
        deferred.take()()
    assert all(torch.equal(*pair) for pair in zip(layer.gradients(), expected.gradients(), strict=True))
    frozen = Layer(V3)
    frozen.weights[1].requires_grad_(requires_grad=False)
    torch.autograd.backward(frozen.fused(), frozen.cotangents())
    assert not frozen.weights[1].main_grad.any()  # type: ignore[attr-defined]
    assert torch.equal(frozen.weights[0].main_grad, expected.weights[0].main_grad)  # type: ignore[attr-defined]
    assert torch.equal(frozen.latents.grad, expected.latents.grad)  # type: ignore[arg-type]


class Notes:
    """A probe that notes all that it is shown."""

    num_blocks = 1

    def __init__(self) -> None:
        self.seen: dict[tuple[int, str], list[Tensor]] = {}
        self._weight = 0

    def watch(self, weight: Tensor) -> Any:
        watch = Notes()
        watch.seen, watch._weight = self.seen, len(weight)
        return watch

    def rows(self, operand: str, sample: probe.Sample, quantized: Quantized) -> None:
        assert (self._weight, operand) not in self.seen, "shown twice"
        found = [sample.values, sample.rows, quantized.payload.view(torch.uint8), quantized.scale]
        self.seen[self._weight, operand] = found

    columns = rows

    def weight(self, operand: str, weight: Tensor, quantized: Quantized) -> None:
        self.seen[self._weight, operand] = [weight, quantized.scale]


@pytest.mark.parametrize("dims", [V3, CASES["tiny"]], ids=["V3", "tiny"])
def test_a_probe_sees_each_operand_once_and_the_same_as_of_separate_linears(dims: Dims) -> None:
    notes = Notes(), Notes()
    for note, layer, run in zip(notes, (Layer(dims), Layer(dims)), (Layer.fused, Layer.apart), strict=True):
        with probe.watching(note):
            outputs = run(layer)
        torch.autograd.backward(outputs, layer.cotangents())
    assert notes[0].seen.keys() == notes[1].seen.keys()
    assert len(notes[0].seen) == 2 * 6
    for key, found in notes[0].seen.items():
        assert all(torch.equal(*pair) for pair in zip(found, notes[1].seen[key], strict=True)), key
