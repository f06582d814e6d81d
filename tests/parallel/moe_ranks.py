"""What the ranks of the expert-parallel tests run: routed experts over an axis, and the same tokens in one process.

Every rank computes the reference on all tokens itself (same seed, so all agree), then its own part over the axis.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kernels.fp8_linear
from kernels.formats import Quantized
from kernels.permute import Dispatched, combine_tokens, group_tokens
from kernels.quantize import dequantize_carried, dequantize_gradient, dequantize_tiles, quantize_tiles
from kernels.router import expert_counts
from parallel.collectives import Traffic
from parallel.expert import ExpertParallelDispatcher, Wire, pack_fp8, unpack_fp8
from parallel.mesh import Axis
from tests.tiny_model import TINY
from train.model.moe import Experts, LocalDispatcher, Routing, TokenDispatcher
from train.model.phases import arrived
from train.model.precision import Precision

EXPERTS, TOPK = 8, 3
# 160 = 128 + 32: the last 1x128 tile is short.
CONFIG = replace(TINY, hidden_size=160, moe_intermediate_size=48, n_routed_experts=EXPERTS, num_experts_per_tok=TOPK)
# Tokens of each rank; rank 1 has none of its own, and no number is a multiple of 128.
TOKENS = (131, 0, 37, 63)


def choose(kind: str, tokens: int) -> Tensor:
    """Expert ids [tokens, topk], distinct within a token."""
    generator = torch.Generator().manual_seed(7)
    order = torch.rand(tokens, EXPERTS, generator=generator).argsort(-1)
    if kind == "all to one expert":
        # Expert 0: every other rank gets no token.
        return torch.zeros(tokens, 1, dtype=torch.int64)
    if kind == "experts without tokens":
        # 2 and 7 are never chosen.
        return torch.tensor([0, 1, 3, 4, 5, 6])[order[order < 6].view(tokens, 6)[:, :TOPK]]
    if kind == "all to the last rank":
        return torch.tensor([7, 6]).expand(tokens, 2).contiguous()
    assert kind == "random", kind
    return order[:, :TOPK]


KINDS = ("random", "all to one expert", "experts without tokens", "all to the last rank")


@dataclass(frozen=True)
class Case:
    """All ranks' tokens: x and the gradient of y [tokens, hidden], ids and gates [tokens, topk]."""

    x: Tensor
    grad: Tensor
    ids: Tensor
    gates: Tensor

    def part(self, rank: int, world: int) -> Case:
        """One rank's tokens."""
        start, stop = sum(TOKENS[:rank]), sum(TOKENS[: rank + 1])
        assert world <= len(TOKENS)
        return Case(*(t[start:stop].clone() for t in (self.x, self.grad, self.ids, self.gates)))


def case(kind: str, world: int, dtype: torch.dtype, hidden: int = 160) -> Case:
    """Normal tokens and gradients; gates of order one that sum to one."""
    tokens = sum(TOKENS[:world])
    generator = torch.Generator().manual_seed(11)
    ids = choose(kind, tokens)
    x, grad = torch.randn(2, tokens, hidden, generator=generator).to(dtype)
    gates = torch.rand(ids.shape, generator=generator) + 0.1
    return Case(x, grad, ids, gates / gates.sum(1, keepdim=True))


def routing_of(ids: Tensor, gates: Tensor) -> Routing:
    return Routing(ids, gates, expert_counts(ids, EXPERTS), torch.zeros(()))


def dispatcher_of(rank: int, world: int, wire: Wire, **options: Any) -> ExpertParallelDispatcher:
    axis = Axis("ep", world, rank, dist.group.WORLD)
    return ExpertParallelDispatcher(EXPERTS, axis, wire=wire, power_of_two=True, **options)


def routed_experts(
    case: Case, dispatcher: TokenDispatcher, name: Wire, *, max_rows: int | None = None
) -> dict[str, Tensor]:
    """Forward and backward of sum_i g_i FFN_i(x); the experts' values depend on their global ids only."""
    experts = Experts(CONFIG, Precision(name), dispatcher.experts)
    experts.max_rows = max_rows
    generator = torch.Generator().manual_seed(3)
    main_grads = {}
    for key, weight in experts.named_parameters():
        whole = torch.randn(EXPERTS, *weight.shape[1:], generator=generator) / weight.shape[-1] ** 0.5
        weight.data.copy_(whole[dispatcher.experts.start : dispatcher.experts.stop])
        main_grads[key] = weight.main_grad = torch.zeros(weight.shape)  # type: ignore[attr-defined]
    x, gates = case.x.clone().requires_grad_(), case.gates.clone().requires_grad_()
    dispatched = arrived(dispatcher.dispatch(x, routing_of(case.ids, gates)))
    y = arrived(dispatcher.combine(experts(dispatched), dispatched))
    y.backward(case.grad)
    return {"y": y.detach(), "x": x.grad, "gates": gates.grad, **main_grads}


def squares(rank: int, world: int, kind: str, name: Wire) -> dict[str, tuple[float, float]]:
    """Per tensor (|error|^2, |reference|^2) of this rank's part; sums over ranks give the relative error."""
    whole = case(kind, world, torch.float32 if name == "fp32" else torch.bfloat16)
    dispatcher = dispatcher_of(rank, world, name)
    expected = routed_experts(whole, LocalDispatcher(EXPERTS), name)
    actual = routed_experts(whole.part(rank, world), dispatcher, name)
    result = {}
    for key, value in actual.items():
        if key.endswith("_proj"):
            want = expected[key][dispatcher.experts.start : dispatcher.experts.stop]
        else:
            start = sum(TOKENS[:rank])
            want = expected[key][start : start + TOKENS[rank]]
        assert value.shape == want.shape, (key, value.shape, want.shape)
        assert bool(value.isfinite().all()), key
        result[key] = (float((value.double() - want.double()).square().sum()), float(want.double().square().sum()))
    return result


def relative(parts: list[dict[str, tuple[float, float]]], key: str) -> float:
    """Relative Frobenius error over all ranks."""
    error, size = (sum(part[key][n] for part in parts) for n in (0, 1))
    return float((error / size) ** 0.5)


def over_the_wire(x: Tensor, *, power_of_two: bool) -> Tensor:
    """The values that arrive in FP8: [tokens, hidden] fp32."""
    packets = pack_fp8(quantize_tiles(x, power_of_two=power_of_two))
    return dequantize_tiles(unpack_fp8(packets, x.shape[1]))


def identity_experts(dispatched: Dispatched) -> Tensor:
    """Sums of experts that return their input times the gate."""
    tokens, grouping = dispatched.tokens, dispatched.grouping
    tokens = tokens if isinstance(tokens, Tensor) else dequantize_carried(tokens)
    rows = group_tokens(tokens, grouping) * dispatched.gates[:, None].to(tokens.dtype)
    sums = combine_tokens(rows, grouping)
    return sums if dispatched.gradient is None else dequantize_gradient(sums, dispatched.gradient)


def there_and_back(
    case: Case, dispatcher: ExpertParallelDispatcher, gates: Tensor
) -> tuple[Tensor, Tensor, Dispatched]:
    """y and dx for experts that return their input times the gate."""
    x = case.x.clone().requires_grad_()
    dispatched = arrived(dispatcher.dispatch(x, routing_of(case.ids, gates)))
    y = arrived(dispatcher.combine(identity_experts(dispatched), dispatched))
    y.backward(case.grad)
    return y.detach(), x.grad, dispatched


def identity_faults(rank: int, world: int, wire: Wire) -> list[str]:
    faults = []
    for kind in KINDS:
        mine = case(kind, world, torch.float32 if wire == "fp32" else torch.bfloat16).part(rank, world)
        expected = [mine.x, mine.grad]
        if wire == "fp8":
            expected = [over_the_wire(t, power_of_two=True).to(t.dtype) for t in expected]
        for slot, unit in enumerate(torch.eye(mine.ids.shape[1])):
            y, dx, dispatched = there_and_back(mine, dispatcher_of(rank, world, wire), unit.repeat(len(mine.ids), 1))
            if not (torch.equal(y, expected[0]) and torch.equal(dx, expected[1])):
                faults.append(f"{kind}, slot {slot}")
            ends, num_rows = dispatched.grouping.group_ends.tolist(), dispatched.grouping.num_rows
            if ends[-1] != num_rows or num_rows % 128:
                faults.append(f"{kind}: {num_rows} rows for ends {ends}")
    return faults


def dyadic_gates_are_exact(rank: int, world: int) -> bool:
    mine = case("random", world, torch.bfloat16).part(rank, world)
    mine = replace(mine, x=mine.x.float(), grad=mine.grad.float())
    gates = torch.tensor([0.5, 0.25, 0.25]).expand(mine.ids.shape).contiguous()
    y, dx, _ = there_and_back(mine, dispatcher_of(rank, world, "fp32"), gates)
    return torch.equal(y, mine.x) and torch.equal(dx, mine.grad)


@contextmanager
def exchanges() -> Iterator[list[tuple[str, int]]]:
    """(dtype, bytes) of every tensor handed to all_to_all_single while the block runs."""
    seen: list[tuple[str, int]] = []
    original = dist.all_to_all_single

    def watching(output: Tensor, source: Tensor, *arguments: Any, **options: Any) -> Any:
        seen.append((str(source.dtype).removeprefix("torch."), source.numel() * source.element_size()))
        return original(output, source, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_to_all_single", watching)
        yield seen


def without_tokens(rank: int, world: int) -> dict[str, object]:
    """Every rank has no token; backward must run its exchanges all the same."""
    # Rank 1 has none of its own.
    none = case("random", world, torch.bfloat16).part(1, world)
    gates = none.gates.clone().requires_grad_()
    with exchanges() as seen:
        y, dx, dispatched = there_and_back(none, dispatcher_of(rank, world, "fp8"), gates)
    assert gates.grad is not None
    assert dx.shape == none.x.shape
    # One exchange for the counts, two for the experts' ids and tokens, one home; three in backward.
    return {"rows": dispatched.grouping.num_rows, "y": tuple(y.shape), "exchanges": len(seen)}


def repeats(rank: int, world: int) -> bool:
    mine = case("random", world, torch.bfloat16).part(rank, world)
    runs = [routed_experts(mine, dispatcher_of(rank, world, "fp8"), "fp8") for _ in range(2)]
    return all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0])


def bytes_sent(rank: int, world: int, hidden: int) -> dict[str, object]:
    """What went over the wire in FP8, and the pairs (token, rank) that should have."""
    whole = case("random", world, torch.bfloat16, hidden)
    mine, traffic = whole.part(rank, world), Traffic()
    dispatcher = dispatcher_of(rank, world, "fp8", traffic=traffic)
    gates = mine.gates.clone().requires_grad_()
    with exchanges() as seen:
        there_and_back(mine, dispatcher, gates)
    local = EXPERTS // world
    chosen = [[expert // local for expert in row] for row in whole.ids.tolist()]
    first = sum(TOKENS[:rank])
    return {
        "tokens": len(mine.ids),
        "slots": mine.ids.numel(),
        "pairs": sum(len(set(row)) for row in chosen[first : first + TOKENS[rank]]),
        "arrived": sum(rank in row for row in chosen),
        "handed over": seen,
        "traffic": dict(traffic.sent),
    }


def limited_faults(rank: int, world: int) -> list[str]:
    """Where a limit of one tile of rows changes a bit. All tokens go to the last rank, or to one expert of rank 0."""
    faults = []
    for kind in ("random", "all to one expert", "all to the last rank"):
        for wire in get_args(Wire):
            mine = case(kind, world, torch.float32 if wire == "fp32" else torch.bfloat16).part(rank, world)
            whole = routed_experts(mine, dispatcher_of(rank, world, wire), wire)
            limited = routed_experts(mine, dispatcher_of(rank, world, wire), wire, max_rows=128)
            faults += [f"{kind}, {wire}: {key}" for key in whole if not torch.equal(whole[key], limited[key])]
    return faults


READERS = ("tolist", "item", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__", "to_list")


def host_reads(mine: Case, dispatcher: ExpertParallelDispatcher) -> dict[str, list[str]]:
    """Which methods that wait for the device were called in each phase."""
    x, gates = mine.x.clone().requires_grad_(), mine.gates.clone().requires_grad_()
    routing = routing_of(mine.ids, gates)
    calls: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func._opname in ("_local_scalar_dense", "nonzero", "masked_select", "unique2"):
                calls.append(func._opname)
            return func(*args, **(kwargs or {}))

    def watched(name: str, original: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            calls.append(name)
            return original(*args, **options)

        return call

    def phase(run: Any) -> tuple[Any, list[str]]:
        calls.clear()
        with pytest.MonkeyPatch.context() as patch, Watch():
            for name in READERS:
                if hasattr(Tensor, name):
                    patch.setattr(Tensor, name, watched(name, getattr(Tensor, name)))
            return run(), list(calls)

    dispatched, in_dispatch = phase(lambda: arrived(dispatcher.dispatch(x, routing)))
    sums = identity_experts(dispatched)
    y, in_combine = phase(lambda: arrived(dispatcher.combine(sums, dispatched)))
    _, in_backward = phase(lambda: y.backward(mine.grad))
    return {"dispatch": in_dispatch, "combine": in_combine, "backward": in_backward}


def down_proj_dgrad_operand(case: Case, dispatcher: TokenDispatcher) -> tuple[Quantized, Tensor]:
    """What down_proj's dgrad multiplies, by rows, and the ends of the experts' groups."""
    operands: list[tuple[Quantized, Tensor]] = []
    original = kernels.fp8_linear._multiply

    def remember(call: Any, gradient: Any, group_ends: Tensor, *rest: Any) -> Tensor:
        operands.append((gradient.by_row, group_ends))
        return original(call, gradient, group_ends, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels.fp8_linear, "_multiply", remember)
        routed_experts(case, dispatcher, "fp8")
    # Backward meets down_proj first, then gate_up_proj.
    assert len(operands) == 2
    return operands[0]


def compare_dgrad_operands(rank: int, world: int) -> dict[str, int]:
    whole = case("random", world, torch.bfloat16)
    dispatcher = dispatcher_of(rank, world, "fp8")
    local, local_ends = down_proj_dgrad_operand(whole, LocalDispatcher(EXPERTS))
    sent, ends = down_proj_dgrad_operand(whole.part(rank, world), dispatcher)
    starts = [0, *local_ends.tolist()]
    rows = torch.cat([torch.arange(starts[expert], starts[expert + 1]) for expert in dispatcher.experts])
    assert len(rows) == int(ends[-1]) == len(sent.payload)
    payload = local.payload.view(torch.uint8)[rows]
    different = int((sent.payload.view(torch.uint8) != payload).sum()) + int((sent.scale != local.scale[:, rows]).sum())
    return {"different": different, "tiles": sent.scale.numel()}


def measure(rank: int, world: int) -> dict[str, Any]:
    """All measurements of one spawn of ranks."""
    wires: tuple[Wire, ...] = get_args(Wire)
    mine = case("random", world, torch.bfloat16).part(rank, world)
    return {
        "squares": {(kind, wire): squares(rank, world, kind, wire) for kind in KINDS for wire in wires},
        "identity": {wire: identity_faults(rank, world, wire) for wire in wires},
        "dyadic": dyadic_gates_are_exact(rank, world),
        "no tokens": without_tokens(rank, world),
        "repeats": repeats(rank, world),
        "limited": limited_faults(rank, world),
        "bytes": {hidden: bytes_sent(rank, world, hidden) for hidden in (160, 7168)},
        "host reads": host_reads(mine, dispatcher_of(rank, world, "fp8")),
        "dgrad": compare_dgrad_operands(rank, world),
    }
