"""ZeRO-1 against one process that adds up all gradients: bit for bit where the sums are order-free.

Two ranks: a sum of two numbers has one rounding, whoever adds. Four ranks: gradients that are multiples of 2^-6 below
16, so that every partial sum is exact. Then nothing but the cut into shards differs from the one process.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from kernels.deferred import accumulate_grad
from kernels.fp8_linear import fp8_linear
from parallel.buckets import ALIGNMENT, BucketPlan, BucketRange, plan_buckets
from parallel.grads import GradNorm, reduce_and_clip
from parallel.mesh import Axis
from parallel.shards import Shard
from parallel.zero import GradientBuckets
from tests.ranks import run_ranks
from train.optim.adamw import AdamW
from train.optim.config import OptimConfig

ALONE = Axis(name="dp", size=1, rank=0, group=None)
SHAPES = {
    "embed_tokens.weight": (61, 33),
    "layers.0.input_layernorm.weight": (33,),
    "layers.0.mlp.down_proj.weight": (63, 65),
    "layers.0.mlp.experts.down_proj": (3, 5, 7),
    "empty": (0, 4),
    "one": (1,),
    # FP32 under every precision, as the router is.
    "layers.0.mlp.gate.weight": (7, 129),
}
NUMEL = sum(int(np.prod(shape)) for shape in SHAPES.values())
TARGETS = 37
# A thousand elements, fewer than three of the parameters have; and all in one.
BUCKETS = (4096, 2**20)
Arrays = dict[str, Any]


def main_grad(parameter: nn.Parameter) -> Tensor:
    gradient: Tensor = parameter.main_grad  # type: ignore[attr-defined]
    return gradient


def make_parameters(
    dtype: torch.dtype, shapes: dict[str, tuple[int, ...]] | None = None, *, seed: int = 0
) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(torch.float32 if "gate" in name else dtype))
        for name, shape in (shapes or SHAPES).items()
    }


def add_gradients(parameters: dict[str, nn.Parameter], *, rank: int, step: int, exact: bool) -> None:
    """Add what `rank` sums up in `step`; exact ones are multiples of 2^-6 below 4."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    for parameter in parameters.values():
        gradient = torch.randn(parameter.shape, generator=generator)
        accumulate_grad(parameter, (gradient.clamp(-3.9, 3.9) * 64).round() / 64 if exact else gradient)


def arrays(parameters: dict[str, nn.Parameter]) -> Arrays:
    return {name: parameter.detach().float().numpy().copy() for name, parameter in parameters.items()}


def shards_of(optimizer: AdamW) -> dict[str, tuple[int, int, Any]]:
    """Name -> (offset, global elements, values) of this rank's state; BF16 is exact in FP32."""
    return {
        name: (held.shard.offsets[0], held.shard.global_shape[0], held.tensor.detach().float().numpy().copy())
        for name, held in optimizer.state_shards().items()
    }


@pytest.mark.parametrize("sharded", [True, False])
def test_what_a_rank_updates_is_known_on_every_rank(sharded: bool) -> None:
    group: Any = object()
    ranks = [
        GradientBuckets(
            make_parameters(torch.bfloat16).items(), axis=Axis("dp", 3, rank, group), sharded=sharded, bucket_bytes=4096
        )
        for rank in range(3)
    ]
    for rank, buckets in enumerate(ranks):
        owned = {held.name: (held.shard.offsets[0], held.shard.numel) for held in buckets.parameter_shards()}
        assert owned == {name: (start, stop - start) for name, (start, stop) in ranks[0].shards_of(rank).items()}
    total = sum(stop - start for rank in range(3) for start, stop in ranks[0].shards_of(rank).values())
    assert total == NUMEL * (1 if sharded else 3)


def whole(ranks: Iterable[dict[str, tuple[int, int, Any]]]) -> Arrays:
    """Put the ranks' shards together; every element must come exactly once."""
    found: Arrays = {}
    for name, offset, numel, values in ((n, *held) for rank in ranks for n, held in rank.items()):
        into = found.setdefault(name, np.full(numel, np.nan, dtype=np.float32))
        assert np.isnan(into[offset : offset + len(values)]).all(), f"{name}: two ranks hold the same element"
        into[offset : offset + len(values)] = values
    assert not any(np.isnan(values).any() for values in found.values())
    return found


def assert_same(found: Arrays, expected: Arrays) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def train(
    axis: Axis, dtype: torch.dtype, *, ranks: Sequence[int], sharded: bool, exact: bool, bucket_bytes: int
) -> dict[str, Any]:
    """Three clipped steps with the gradients of `ranks`: weights and state after each, norms, bytes."""
    parameters = make_parameters(dtype)
    buckets = GradientBuckets(parameters.items(), axis=axis, sharded=sharded, bucket_bytes=bucket_bytes)
    optimizer = AdamW([buckets], OptimConfig())
    found: dict[str, Any] = {"weights": [], "state": [], "norms": []}
    for step in (1, 2, 3):
        optimizer.zero_grad()
        for rank in ranks:
            add_gradients(parameters, rank=rank, step=step, exact=exact)
        found["norms"].append(float(reduce_and_clip([buckets], num_targets=TARGETS, max_norm=0.5, world=axis).norm))
        versions = {name: parameter._version for name, parameter in parameters.items()}
        optimizer.step(lr=1e-2, step=step)
        assert all(p._version > versions[name] for name, p in parameters.items() if p.numel())
        found["weights"].append(arrays(parameters))
        found["state"].append(shards_of(optimizer))
    return found


def every_way(rank: int, world: int, exact: bool) -> dict[tuple[bool, bool, int], dict[str, Any]]:
    """(bf16, sharded, bucket_bytes) -> what this rank ends with."""
    axis = Axis("dp", world, rank, dist.group.WORLD)
    return {
        (bf16, sharded, size): train(
            axis, dtype_of(bf16=bf16), ranks=[rank], sharded=sharded, exact=exact, bucket_bytes=size
        )
        for bf16 in (True, False)
        for sharded in (True, False)
        for size in BUCKETS
    }


def dtype_of(*, bf16: bool) -> torch.dtype:
    return torch.bfloat16 if bf16 else torch.float32


def on_two_ranks(rank: int, world: int) -> dict[str, Any]:
    return {"ways": every_way(rank, world, exact=False), "fp8": fp8_outputs(rank, world)}


def on_four_ranks(rank: int, world: int) -> dict[str, Any]:
    return {
        "exact": every_way(rank, world, exact=True),
        "real": every_way(rank, world, exact=False),
        "experts": experts_on_two_by_two(rank),
        "tied": {sharded: tied_on_two_by_two(rank, sharded=sharded) for sharded in (True, False)},
        "poison": {sharded: one_rank_poisoned(rank, world, sharded=sharded) for sharded in (True, False)},
        "bytes": {sharded: state_bytes(rank, world, sharded=sharded) for sharded in (True, False)},
        "one_element": one_element(rank, world),
    }


@pytest.fixture(scope="module")
def two() -> list[dict[str, Any]]:
    return run_ranks(2, on_two_ranks)


@pytest.fixture(scope="module")
def four() -> list[dict[str, Any]]:
    return run_ranks(4, on_four_ranks)


@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("size", BUCKETS)
def test_ranks_train_as_one_process_bit_for_bit(
    two: list[dict[str, Any]], four: list[dict[str, Any]], bf16: bool, sharded: bool, size: int
) -> None:
    for results, exact in (([r["ways"] for r in two], False), ([r["exact"] for r in four], True)):
        ranks = range(len(results))
        truth = train(ALONE, dtype_of(bf16=bf16), ranks=ranks, sharded=False, exact=exact, bucket_bytes=2**20)
        for result in results:
            assert result[bf16, sharded, size]["norms"] == truth["norms"]
            for found, expected in zip(result[bf16, sharded, size]["weights"], truth["weights"], strict=True):
                assert_same(found, expected)
        states = [result[bf16, sharded, size]["state"] for result in results]
        for step, expected in enumerate(truth["state"]):
            # Without ZeRO every rank holds everything.
            for rank in [list(ranks)] if sharded else [[rank] for rank in ranks]:
                assert_same(whole(states[i][step] for i in rank), whole([expected]))


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("size", BUCKETS)
def test_zero_on_or_off_changes_no_bit_where_order_counts(four: list[dict[str, Any]], bf16: bool, size: int) -> None:
    """Four ranks, real-valued gradients: a sum of four has many roundings, but the same ones in both cases."""
    first = four[0]["real"][bf16, False, size]
    for result in four:
        for sharded in (True, False):
            found = result["real"][bf16, sharded, size]
            assert found["norms"] == first["norms"]
            for weights, expected in zip(found["weights"], first["weights"], strict=True):
                assert_same(weights, expected)


def summed_gradients(shapes: dict[str, tuple[int, ...]], *, ranks: Iterable[int], exact: bool) -> dict[str, Tensor]:
    """FP64 sums over ranks of the first step's gradients."""
    sums = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    for rank in ranks:
        parameters = make_parameters(torch.bfloat16, shapes)
        GradientBuckets(parameters.items(), axis=ALONE, sharded=False)
        add_gradients(parameters, rank=rank, step=1, exact=exact)
        for name, parameter in parameters.items():
            sums[name] += main_grad(parameter)
    return sums


def updated_alone(shapes: dict[str, tuple[int, ...]], gradients: Iterable[Tensor]) -> tuple[Arrays, AdamW]:
    """One process after one step with these gradients: weights and optimizer."""
    parameters = make_parameters(torch.bfloat16, shapes)
    optimizer = AdamW([GradientBuckets(parameters.items(), axis=ALONE, sharded=False)], OptimConfig())
    for parameter, gradient in zip(parameters.values(), gradients, strict=True):
        main_grad(parameter).copy_(gradient)
    update(optimizer, ALONE)
    return arrays(parameters), optimizer


def update(optimizer: AdamW, world: Axis) -> float:
    """One step; a clip that does nothing leaves the exact 1 / N as the only factor. The norm."""
    norm = reduce_and_clip(optimizer.buckets, num_targets=TARGETS, max_norm=1e9, world=world)
    optimizer.step(lr=1e-2, step=1)
    return float(norm.norm)


def norm_of(gradients: Iterable[Tensor]) -> float:
    return float(sum(float(gradient.square().sum()) for gradient in gradients) ** 0.5)


def test_norm_is_that_of_the_fp64_sums(two: list[dict[str, Any]], four: list[dict[str, Any]]) -> None:
    for results, key in ((two, "ways"), (four, "real")):
        sums = summed_gradients(SHAPES, ranks=range(len(results)), exact=False)
        for way in results[0][key].values():
            # Norms of rows of 128 in FP32, then FP64; sums of 2 or 4 gradients. Measured 3e-8; 2^-23 is 1.2e-7.
            assert way["norms"][0] == pytest.approx(norm_of(sums.values()) / TARGETS, rel=2**-23)


def test_state_of_two_ranks_goes_on_in_one_process(two: list[dict[str, Any]]) -> None:
    """Two steps on two ranks under ZeRO, the third alone: the weights of three steps on two ranks."""
    for bf16 in (True, False):
        ways = [result["ways"][bf16, True, BUCKETS[0]] for result in two]
        parameters = make_parameters(dtype_of(bf16=bf16), seed=9)
        buckets = GradientBuckets(parameters.items(), axis=ALONE, sharded=True)
        optimizer = AdamW([buckets], OptimConfig())
        saved = whole(way["state"][1] for way in ways)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(torch.from_numpy(ways[0]["weights"][1][name]))
            for name, held in optimizer.state_shards().items():
                held.tensor.copy_(torch.from_numpy(saved[name]))
        for rank in (0, 1):
            add_gradients(parameters, rank=rank, step=3, exact=False)
        reduce_and_clip([buckets], num_targets=TARGETS, max_norm=0.5, world=ALONE)
        optimizer.step(lr=1e-2, step=3)
        assert_same(arrays(parameters), ways[1]["weights"][2])
        assert_same(whole([shards_of(optimizer)]), whole(way["state"][2] for way in ways))


def state_bytes(rank: int, world: int, *, sharded: bool) -> int:
    weight = nn.Parameter(torch.zeros(1000, 333, dtype=torch.bfloat16))
    axis = Axis("dp", world, rank, dist.group.WORLD)
    optimizer = AdamW([GradientBuckets([("w", weight)], axis=axis, sharded=sharded)], OptimConfig())
    storages = {p.tensor.untyped_storage() for p in (*optimizer.state_shards().values(), *optimizer.masters().values())}
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_masters_and_moments_take_a_quarter_on_each_of_four_ranks(four: list[dict[str, Any]]) -> None:
    # 4 bytes of master, 2 + 2 of moments.
    assert [result["bytes"][False] for result in four] == [8 * 333_000] * 4
    # Padded to a multiple of 4 x 128 elements, the bucket has 333,312: 83,328 a shard; the last one is 312 short.
    assert [result["bytes"][True] for result in four] == [8 * 83_328] * 3 + [8 * 83_016]


def test_gradients_take_four_bytes_each_and_the_stated_padding() -> None:
    parameters = make_parameters(torch.bfloat16)
    buckets = GradientBuckets(parameters.items(), axis=ALONE, sharded=True)
    # Two dtypes, so two buckets.
    padding = len(SHAPES) * (ALIGNMENT - 1) + 2 * (ALIGNMENT - 1)
    assert 4 * NUMEL <= buckets.grad_bytes <= 4 * (NUMEL + padding)


EXPERTS = {"layers.0.mlp.gate.weight": (7, 129), "layers.0.mlp.experts.down_proj": (4, 5, 7)}


def experts_on_two_by_two(rank: int) -> dict[str, Any]:
    """edp 2 x ep 2: rank = edp_i * 2 + ep_i holds experts 2 * ep_i and 2 * ep_i + 1 of four."""
    edp_rank, ep_rank = divmod(rank, 2)
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    world = Axis("world", 4, rank, dist.group.WORLD)
    gate_name, down_name = EXPERTS
    both = make_parameters(torch.bfloat16, EXPERTS)
    down = nn.Parameter(both[down_name].detach()[2 * ep_rank : 2 * ep_rank + 2].clone())
    parameters = {gate_name: both[gate_name], down_name: down}
    dense = GradientBuckets([(gate_name, both[gate_name])], axis=world, sharded=True)
    edp = Axis("edp", 2, edp_rank, groups[ep_rank])
    experts = GradientBuckets([(down_name, down)], axis=edp, sharded=True)
    optimizer = AdamW([dense, experts], OptimConfig(), {down_name: Shard((140,), (70 * ep_rank,), (70,))})
    add_gradients(parameters, rank=rank, step=1, exact=True)
    return {"norm": update(optimizer, world), "weights": arrays(parameters), "state": shards_of(optimizer)}


def test_experts_are_summed_over_their_replicas_only(four: list[dict[str, Any]]) -> None:
    gate_name, down_name = EXPERTS
    per_rank = {gate_name: EXPERTS[gate_name], down_name: (2, 5, 7)}
    gate = summed_gradients(per_rank, ranks=range(4), exact=True)[gate_name]
    down = torch.cat([summed_gradients(per_rank, ranks=(ep, ep + 2), exact=True)[down_name] for ep in (0, 1)])
    weights, optimizer = updated_alone(EXPERTS, (gate, down))
    results = [result["experts"] for result in four]
    for rank, result in enumerate(results):
        expected = weights | {down_name: weights[down_name][2 * (rank % 2) : 2 * (rank % 2) + 2]}
        assert_same(result["weights"], expected)
        # Origin as above.
        assert result["norm"] == pytest.approx(norm_of((gate, down)) / TARGETS, rel=2**-23)
        assert result["norm"] == results[0]["norm"]
    assert_same(whole(result["state"] for result in results), whole([shards_of(optimizer)]))


TIED = {"embed_tokens.weight": (61, 33), "layer.weight": (129,)}


def tied_on_two_by_two(rank: int, *, sharded: bool) -> dict[str, Any]:
    """pp 2 x dp 2: both stages hold a copy of the embedding and one layer of their own."""
    stage, dp_rank = divmod(rank, 2)
    stages = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    columns = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    dp = Axis("dp", 2, dp_rank, stages[stage])
    parameters = make_parameters(torch.bfloat16, TIED)
    embedding, layer = parameters.items()
    own = GradientBuckets([layer], axis=dp, sharded=sharded)
    tied = Axis("tied", 2, stage, columns[dp_rank])
    shared = GradientBuckets([embedding], axis=dp, sharded=sharded, tied=tied, counts_in_norm=stage == 0)
    optimizer = AdamW([own, shared], OptimConfig())
    add_gradients(parameters, rank=rank, step=1, exact=True)
    world = Axis("world", 4, rank, dist.group.WORLD)
    return {"norm": update(optimizer, world), "weights": arrays(parameters)}


@pytest.mark.parametrize("sharded", [True, False])
def test_tied_copies_stay_equal_and_count_once(four: list[dict[str, Any]], sharded: bool) -> None:
    embedding_name, layer_name = TIED
    embedding = summed_gradients(TIED, ranks=range(4), exact=True)[embedding_name]
    layers = [summed_gradients(TIED, ranks=ranks, exact=True)[layer_name] for ranks in ((0, 1), (2, 3))]
    for rank, result in enumerate(result["tied"][sharded] for result in four):
        assert_same(result["weights"], updated_alone(TIED, (embedding, layers[rank // 2]))[0])
        # Origin as above.
        assert result["norm"] == pytest.approx(norm_of((embedding, *layers)) / TARGETS, rel=2**-23)
        assert result["norm"] == four[0]["tied"][sharded]["norm"] == four[0]["tied"][not sharded]["norm"]


def one_rank_poisoned(rank: int, world: int, *, sharded: bool) -> tuple[bool, list[tuple[str, int, Any]]]:
    axis = Axis("dp", world, rank, dist.group.WORLD)
    parameters = make_parameters(torch.bfloat16)
    buckets = GradientBuckets(parameters.items(), axis=axis, sharded=sharded)
    add_gradients(parameters, rank=rank, step=1, exact=True)
    if rank == 2:
        main_grad(parameters["embed_tokens.weight"])[60, 32] = float("nan")
    norm: GradNorm = reduce_and_clip([buckets], num_targets=TARGETS, max_norm=0.5, world=axis)
    return bool(norm.finite), [(s.name, s.shard.offsets[0], s.grad.numpy().copy()) for s in buckets.parameter_shards()]


@pytest.mark.parametrize("sharded", [True, False])
def test_one_poisoned_rank_is_flagged_on_all_and_leaves_the_sums(four: list[dict[str, Any]], sharded: bool) -> None:
    sums = summed_gradients(SHAPES, ranks=range(4), exact=True)
    sums["embed_tokens.weight"][60, 32] = float("nan")
    for finite, segments in (result["poison"][sharded] for result in four):
        assert not finite
        for name, start, gradient in segments:
            np.testing.assert_array_equal(gradient, sums[name].flatten()[start : start + len(gradient)].numpy())


def one_element(rank: int, world: int) -> tuple[int, float]:
    """All but one rank own nothing but padding."""
    axis = Axis("dp", world, rank, dist.group.WORLD)
    weight = nn.Parameter(torch.ones(1))
    buckets = GradientBuckets([("w", weight)], axis=axis, sharded=True)
    optimizer = AdamW([buckets], OptimConfig(weight_decay=0.0))
    main_grad(weight).fill_(1.0)
    reduce_and_clip([buckets], num_targets=1, max_norm=1.0, world=axis)
    optimizer.step(lr=0.25, step=1)
    return len(buckets.parameter_shards()), float(weight.detach())


def test_ranks_that_own_only_padding_receive_the_weight(four: list[dict[str, Any]]) -> None:
    # Adam's first step is lr x sign(g) = 0.25 away from 1; FP32 roundings at 1.
    assert [result["one_element"][0] for result in four] == [1, 0, 0, 0]
    assert all(result["one_element"][1] == pytest.approx(0.75, abs=2**-22) for result in four)


def fp8_outputs(rank: int, world: int) -> tuple[Any, Any, Any]:
    """An FP8 linear before an update, after it, and after it with a weight that has no cached copy."""
    axis = Axis("dp", world, rank, dist.group.WORLD)
    generator = torch.Generator().manual_seed(5)
    weight = nn.Parameter(torch.randn(256, 128, generator=generator).bfloat16())
    x = torch.randn(3, 128, generator=generator).bfloat16()
    buckets = GradientBuckets([("w", weight)], axis=axis, sharded=True)
    optimizer = AdamW([buckets], OptimConfig())
    before = fp8_linear(x, weight, power_of_two=True)
    main_grad(weight).fill_(1.0)
    reduce_and_clip([buckets], num_targets=1, max_norm=1.0, world=axis)
    optimizer.step(lr=0.5, step=1)
    after = fp8_linear(x, weight, power_of_two=True)
    fresh = fp8_linear(x, nn.Parameter(weight.detach().clone()), power_of_two=True)
    return tuple(y.detach().float().numpy().copy() for y in (before, after, fresh))


def test_fp8_copies_follow_the_gathered_weights(two: list[dict[str, Any]]) -> None:
    for before, after, fresh in (result["fp8"] for result in two):
        np.testing.assert_array_equal(after, fresh)
        # Every row of the weight moved by lr = 0.5, in the half of the other rank as well.
        assert (before != after).any(axis=0).all()


def test_small_parameters_share_a_bucket_and_a_large_one_has_its_own() -> None:
    bf16, fp32 = torch.bfloat16, torch.float32
    sizes = [("a", 100, bf16), ("b", 1, fp32), ("c", 129, bf16), ("d", 900, bf16), ("e", 5, bf16), ("f", 0, bf16)]
    assert plan_buckets(sizes, shards=2, bucket_bytes=4 * 512) == (
        BucketPlan(bf16, (BucketRange("a", 0, 100), BucketRange("c", 128, 129)), 512),
        BucketPlan(bf16, (BucketRange("d", 0, 900),), 1024),
        BucketPlan(bf16, (BucketRange("e", 0, 5), BucketRange("f", 128, 0)), 256),
        BucketPlan(fp32, (BucketRange("b", 0, 1),), 256),
    )


@given(
    sizes=st.lists(st.tuples(st.integers(0, 3000), st.booleans()), min_size=1, max_size=30),
    shards=st.integers(1, 9),
    bucket_bytes=st.integers(4, 20_000),
)
def test_every_plan_holds_each_parameter_once_and_cuts_evenly(
    sizes: list[tuple[int, bool]], shards: int, bucket_bytes: int
) -> None:
    named = [(str(i), numel, dtype_of(bf16=bf16)) for i, (numel, bf16) in enumerate(sizes)]
    plans = plan_buckets(named, shards=shards, bucket_bytes=bucket_bytes)
    placed = [(each.name, each.numel, plan.dtype) for plan in plans for each in plan.ranges]
    assert sorted(placed, key=lambda p: int(p[0])) == named
    for plan in plans:
        ends = [each.start + each.numel for each in plan.ranges]
        assert all(each.start % ALIGNMENT == 0 for each in plan.ranges)
        assert all(each.start >= end for each, end in zip(plan.ranges[1:], ends, strict=False))
        assert plan.numel % (ALIGNMENT * shards) == 0
        assert ends[-1] <= plan.numel < ends[-1] + ALIGNMENT * shards
        assert len(plan.ranges) == 1 or ends[-1] * 4 <= bucket_bytes


def test_a_gradient_left_outside_main_grad_is_an_error() -> None:
    weight = nn.Parameter(torch.ones(3))
    buckets = GradientBuckets([("w", weight)], axis=ALONE, sharded=True)
    (weight * 2).sum().backward()
    buckets.reduce()
    assert torch.equal(main_grad(weight), torch.full((3,), 2.0))
    weight.grad = torch.ones(3)
    with pytest.raises(AssertionError, match=r"left in \.grad"):
        buckets.reduce()
