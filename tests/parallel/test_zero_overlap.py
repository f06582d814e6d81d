"""ZeRO-1 under computation: gradients are summed under the last backward, new weights arrive under the next forward.

On ranks every sum and every gather is late: its result is NaN from when it begins until somebody waits for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import kernels.deferred
import parallel.fp8_weights
import parallel.zero
import train.assemble
from kernels.deferred import accumulate_grad, forget
from parallel.early_reduction import EarlyReduction
from parallel.layout import Layout
from parallel.mesh import make_mesh
from parallel.zero import GradientBuckets
from tests.parity.layout_theorem import MODEL, NOW, OPTIM, named_gradients, take_step
from tests.ranks import run_ranks
from train.assemble import READERS, build_engine
from train.model.precision import Precision
from train.step import apply_update

# Enough layers for four stages and for gathers between them.
SMALL = replace(MODEL, num_hidden_layers=4, num_nextn_predict_layers=1)
FP8, ONLY_FP8 = Precision("fp8"), Precision("fp8", keep_bf16_weights=False)
LAYOUTS = {
    "dp2 x ep2": (Layout(dp=4, ep=2), FP8),
    "dp2 x pp2 zero-bubble": (Layout(pp=2, dp=2, schedule="ZBVZeroBubble"), ONLY_FP8),
    "dp4": (Layout(dp=4), Precision("bf16")),
    "dp4 without ZeRO": (Layout(dp=4, zero=False), FP8),
    "dp2 x pp2 1F1B": (Layout(pp=2, dp=2), FP8),
}
SHORT = ("dp2 x ep2", "dp2 x pp2 zero-bubble")


class Late:
    """A collective whose result, NaN until then, comes when it is waited for."""

    def __init__(self, now: Any, result: Tensor, given: Tensor, group: Any) -> None:
        self.finish = partial(now, result, given.clone(), group=group)
        result.fill_(0x7F if result.dtype == torch.uint8 else torch.nan)

    def wait(self) -> None:
        self.finish()


@contextmanager
def late(events: list[str]) -> Iterator[None]:
    """Sums and gathers are late; notes each gradient, sum, layer and arrival in order."""

    def noted(name: str, call: Any) -> Any:
        def noting(*args: Any, **named: Any) -> Any:
            events.append(name)
            return call(*args, **named)

        return noting

    def slow(call: Any) -> Any:
        return lambda result, given, *, group, async_op: Late(call, result, given, group)

    def layer(module: nn.Module, *_: object) -> None:
        if isinstance(module, READERS):
            events.append("layer")

    hook = register_module_forward_hook(layer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel.zero, "_reduce_scatter", noted("sum", slow(parallel.zero._reduce_scatter)))
        patch.setattr(kernels.deferred, "added", noted("gradient", kernels.deferred.added))
        patch.setattr(GradientBuckets, "reduce", noted("wait", GradientBuckets.reduce))
        for module, finish in ((parallel.zero, "_finish_gather"), (parallel.fp8_weights, "_finish")):
            patch.setattr(module, "all_gather", slow(module.all_gather))
            patch.setattr(module, finish, noted("arrival", getattr(module, finish)))
        yield
    hook.remove()


def steps(layout: Layout, precision: Precision) -> tuple[dict[str, Tensor], list[list[str]]]:
    """Gradients and norms of two steps, and all state after them; the events of each step and of its update."""
    events: list[list[str]] = [[] for _ in range(4)]
    found: dict[str, Tensor] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train.assemble.BUCKETS, "native", partial(GradientBuckets, bucket_bytes=2**15))
        mesh = make_mesh(layout, device=torch.device("cpu"), tied_embedding=True)
        engine = build_engine(SMALL, precision, OPTIM, mesh, seed=7)
    for step in range(2):
        with late(events[2 * step]):
            result = take_step(engine, step)
        found |= {f"{step}.{name}": each for name, each in named_gradients(engine).items()}
        found[f"{step}.norm"] = result.grad_norm
        with late(events[2 * step + 1]):
            apply_update(engine, result, now=NOW, update=step + 1)
    with engine.optimizer.whole_weights():
        for model in engine.models:
            found |= {name: value.clone() for name, value in model.state_dict().items()}
        found |= {name: held.tensor.clone() for name, held in engine.optimizer.state_shards().items()}
    return found, events


def measure(rank: int, world: int, names: list[str]) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name in names:
        found, events = steps(*LAYOUTS[name])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(EarlyReduction, "begin", lambda self, count: None)
            patch.setattr(GradientBuckets, "let_arrive_later", lambda self: False)
            expected, at_the_end = steps(*LAYOUTS[name])
        assert found.keys() == expected.keys()
        different = [key for key in expected if not torch.equal(found[key], expected[key])]
        results[name] = {"different": different, "events": events, "at the end": at_the_end}
    return results


def check(ranks: list[dict[str, Any]], name: str) -> None:
    for result in ranks:
        assert result[name]["different"] == []
        first, update, second, _ = result[name]["events"]
        at_the_end = result[name]["at the end"]
        sums = second.count("sum")
        assert sums == first.count("sum") > 3
        for events in (first, at_the_end[0], at_the_end[2]):
            assert "gradient" not in events[events.index("sum") :], "nothing begins before all gradients are there"
        # Every sum once, all before the first wait; most of them while gradients are still being computed.
        assert "sum" not in second[second.index("wait") :]
        last_gradient = len(second) - second[::-1].index("gradient")
        early = second[:last_gradient].count("sum")
        assert early >= sums / 2, (early, sums)
        if LAYOUTS[name][0].zero:
            # Weights arrive once, those of layers between layers of the next forward.
            arrivals = second.count("arrival")
            assert arrivals + update.count("arrival") == at_the_end[1].count("arrival")
            assert "arrival" not in at_the_end[2]
            last_arrival = len(second) - second[::-1].index("arrival")
            assert second[:last_arrival].count("layer") > 0, "all weights arrive before the first layer"


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_ranks(4, measure, list(SHORT))


@pytest.mark.parametrize("name", SHORT)
def test_sums_and_gathers_run_under_computation_and_no_bit_moves(ranks: list[dict[str, Any]], name: str) -> None:
    check(ranks, name)


@pytest.mark.long
def test_the_same_on_more_layouts() -> None:
    names = [name for name in LAYOUTS if name not in SHORT]
    found = run_ranks(4, measure, names)
    for name in names:
        check(found, name)


def without_a_wait(rank: int, world: int) -> dict[str, Any]:
    """What shows in two steps without some wait: whether losses and gradients are finite, or who complains."""
    finish, found = parallel.fp8_weights._finish, {}
    planted: Any = {
        "sums": (parallel.zero, "_wait_for", list),
        "weights": (parallel.fp8_weights, "_finish", lambda flat, _: finish(flat, SimpleNamespace(wait=bool))),
        "readers": (parallel.fp8_weights.Fp8Buckets, "arrive", lambda *_: None),
    }
    for name, mistake in planted.items():
        mesh = make_mesh(Layout(dp=2), device=torch.device("cpu"), tied_embedding=True)
        engine = build_engine(SMALL, ONLY_FP8, OPTIM, mesh, seed=7)
        with late([]), pytest.MonkeyPatch.context() as patch:
            patch.setattr(*mistake)
            try:
                result = take_step(engine, 0)
                if result.finite:
                    apply_update(engine, result, now=NOW, update=1)
                    result = take_step(engine, 1)
                found[name] = bool(result.finite)
            except AssertionError as error:
                found[name] = str(error).partition("] ")[2]
        dist.barrier()
    return found


def test_who_does_not_wait_finds_no_number_or_is_named() -> None:
    """Three planted mistakes: the third leaves the readers of weights without a wait at all."""
    named = "were read before their new weights had come: call the modules that hold them"
    assert run_ranks(2, without_a_wait) == [{"sums": False, "weights": False, "readers": named}] * 2


def buckets_of(begun: list[tuple[str, int]], name: str, *groups: tuple[str, ...]) -> Any:
    """Buckets of an axis of two ranks that note what begins."""
    parameters = {each: nn.Parameter(torch.zeros(2)) for group in groups for each in group}
    for parameter in parameters.values():
        parameter.main_grad = torch.zeros(2)  # type: ignore[attr-defined]
        forget(parameter)
    return SimpleNamespace(
        axis=SimpleNamespace(size=2), parameters=parameters, names_by_bucket=lambda: [*groups],
        begin_reduce=lambda index: begun.append((name, index)),
    )  # fmt: skip


def test_buckets_begin_in_the_reverse_order_of_the_model_as_soon_as_all_is_there() -> None:
    """Two axes; the second step has three micro-batches where the first had two."""
    begun: list[tuple[str, int]] = []
    dense, experts = buckets_of(begun, "dense", ("a",), ("c", "e")), buckets_of(begun, "experts", ("b", "d"))
    reduction = EarlyReduction([dense, experts], ["a", "b", "c", "d", "e"])
    every = dense.parameters | experts.parameters

    def gradients(names: str) -> list[tuple[str, int]]:
        begun.clear()
        for name in names:
            accumulate_grad(every[name], torch.ones(2))
        return list(begun)

    # c has two gradients in a micro-batch.
    reduction.begin(2)
    assert gradients("eccdba" * 2) == []
    reduction.finish()
    assert begun == [("dense", 1), ("experts", 0), ("dense", 0)]
    reduction.begin(3)
    assert gradients("eccdba" * 2 + "ec") == []
    # a before its turn, b and d after it.
    assert gradients("ad") == []
    assert gradients("c") == [("dense", 1)]
    assert gradients("b") == [("experts", 0), ("dense", 0)]
    with pytest.raises(AssertionError, match="a gradient of b comes after its sum over ranks has begun"):
        gradients("b")
    begun.clear()
    reduction.finish()
    assert begun == []
    # Outside a step nothing is counted.
    assert gradients("abcde") == []


def test_a_bucket_with_a_parameter_without_gradients_begins_last_and_holds_nothing_up() -> None:
    begun: list[tuple[str, int]] = []
    dense = buckets_of(begun, "dense", ("a",), ("b", "unused"))
    reduction = EarlyReduction([dense], ["a", "b", "unused"])
    for early in ([], [("dense", 0)]):
        begun.clear()
        reduction.begin(1)
        for name in "ba":
            accumulate_grad(dense.parameters[name], torch.ones(2))
        assert begun == early
        reduction.finish()
        assert sorted(begun) == [("dense", 0), ("dense", 1)]
