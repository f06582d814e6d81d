"""Division and clipping of gradients against torch.nn.utils.clip_grad_norm_."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from kernels import deferred
from kernels.cross_entropy import linear_cross_entropy_sum
from parallel.grads import NAMED, GradNorm, NonFinite, nonfinite_gradients
from parallel.grads import reduce_and_clip as reduce_and_clip_buckets
from parallel.mesh import Axis
from parallel.zero import GradientBuckets
from tests.ranks import run_ranks

SHAPES = ((1,), (63,), (5, 129), (3, 7, 11), (0, 4))
ALONE = Axis(name="world", size=1, rank=0, group=None)


def bucket_of(params: Iterable[nn.Parameter]) -> GradientBuckets:
    named = [(str(number), parameter) for number, parameter in enumerate(params)]
    return GradientBuckets(named, axis=ALONE, sharded=False)


def reduce_and_clip(buckets: GradientBuckets, *, num_targets: int | Tensor, max_norm: float) -> GradNorm:
    return reduce_and_clip_buckets([buckets], num_targets=num_targets, max_norm=max_norm, world=ALONE)


def make_buckets(*, scale: float) -> GradientBuckets:
    generator = torch.Generator().manual_seed(0)
    buckets = bucket_of(nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)) for shape in SHAPES)
    for parameter in buckets.parameters.values():
        main_grad(parameter).copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return buckets


def gradients(buckets: GradientBuckets) -> list[Tensor]:
    return [main_grad(parameter) for parameter in buckets.parameters.values()]


def main_grad(parameter: nn.Parameter) -> Tensor:
    gradient: Tensor = parameter.main_grad  # type: ignore[attr-defined]
    return gradient


def clipped_by_torch(buckets: GradientBuckets, *, num_targets: int, max_norm: float) -> tuple[Tensor, list[Tensor]]:
    copies = [nn.Parameter(torch.zeros(gradient.shape)) for gradient in gradients(buckets)]
    for copy, gradient in zip(copies, gradients(buckets), strict=True):
        copy.grad = gradient / num_targets
    norm = torch.nn.utils.clip_grad_norm_(copies, max_norm)
    return norm, [copy.grad for copy in copies if copy.grad is not None]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6], ids=["below", "near", "above"])
@pytest.mark.parametrize("num_targets", [1, 37, torch.tensor(4099)])
def test_division_norm_and_clipping_agree_with_torch(scale: float, num_targets: int | Tensor) -> None:
    buckets = make_buckets(scale=scale)
    norm, expected = clipped_by_torch(buckets, num_targets=int(num_targets), max_norm=1.0)
    result = reduce_and_clip(buckets, num_targets=num_targets, max_norm=1.0)
    # 1e-6: one division and one multiplication in another order, 6e-8 each, and a sum of 940 squares.
    torch.testing.assert_close(result.norm, norm, rtol=1e-6, atol=0.0)
    assert bool(result.finite)
    for gradient, wanted in zip(gradients(buckets), expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=0.0)


def test_global_norm_is_one_after_clipping() -> None:
    buckets = make_buckets(scale=50.0)
    reduce_and_clip(buckets, num_targets=3, max_norm=1.0)
    squares = sum(float(gradient.double().square().sum()) for gradient in gradients(buckets))
    # The guard 1e-6 in the denominator and fp32 roundings.
    assert squares**0.5 == pytest.approx(1.0, abs=1e-5)


def test_norm_agrees_with_float64_on_a_million_elements() -> None:
    parameter = nn.Parameter(torch.zeros(1000, 1000))
    buckets = bucket_of([parameter])
    main_grad(parameter).copy_(torch.randn(1000, 1000, generator=torch.Generator().manual_seed(3)))
    exact = float(main_grad(parameter).double().norm())
    result = reduce_and_clip(buckets, num_targets=1, max_norm=1e9)
    # Measured 2e-8 (rows of 128, squares summed in FP64); one fp32 norm of the million is off by 1.1e-5.
    assert float(result.norm) == pytest.approx(exact, rel=2**-23)


def test_a_repeated_parameter_counts_and_is_divided_once() -> None:
    once, params = make_buckets(scale=1.0), list(make_buckets(scale=1.0).parameters.values())
    twice = bucket_of([*params, params[2], params[0]])
    for gradient, wanted in zip(gradients(twice), gradients(once), strict=True):
        gradient.copy_(wanted)
    expected = reduce_and_clip(once, num_targets=10, max_norm=1.0)
    result = reduce_and_clip(twice, num_targets=10, max_norm=1.0)
    assert torch.equal(result.norm, expected.norm)
    assert all(torch.equal(a, b) for a, b in zip(gradients(once), gradients(twice), strict=True))


def test_frozen_parameters_are_passed_over() -> None:
    trained, frozen = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3), requires_grad=False)
    buckets = bucket_of([frozen, trained])
    assert list(buckets.parameters.values()) == [trained]
    assert not hasattr(frozen, "main_grad")
    main_grad(trained).fill_(2.0)
    assert float(reduce_and_clip(buckets, num_targets=1, max_norm=1e9).norm) == pytest.approx(12**0.5)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_gradient_is_flagged_and_all_gradients_stay_bit_for_bit(poison: float) -> None:
    buckets = make_buckets(scale=1.0)
    gradients(buckets)[2][1, 5] = poison
    before = [gradient.view(torch.int32).clone() for gradient in gradients(buckets)]
    result = reduce_and_clip(buckets, num_targets=10, max_norm=1.0)
    assert not bool(result.finite)
    for gradient, bits in zip(gradients(buckets), before, strict=True):
        assert torch.equal(gradient.view(torch.int32), bits)


def test_no_targets_counts_as_one() -> None:
    buckets = make_buckets(scale=0.0)
    result = reduce_and_clip(buckets, num_targets=torch.tensor(0), max_norm=1.0)
    assert float(result.norm) == 0.0
    assert bool(result.finite)
    assert not any(gradient.any() for gradient in gradients(buckets))


def test_waiting_weight_gradients_are_an_error() -> None:
    buckets = make_buckets(scale=1.0)
    with deferred.deferred():
        deferred.push(lambda: None)
        with pytest.raises(RuntimeError):
            reduce_and_clip(buckets, num_targets=1, max_norm=1.0)
        deferred.take()()
    reduce_and_clip(buckets, num_targets=1, max_norm=1.0)


def nan_of_one_rank(rank: int, world: int, victim: int, position: int, sharded: bool) -> list[NonFinite]:
    """Two parameters of 100 and 300 elements over two ranks; one element of one rank is NaN."""
    axis = Axis(name="dp", size=world, rank=rank, group=dist.group.WORLD)
    named = [(name, nn.Parameter(torch.zeros(size))) for name, size in (("first", 100), ("second", 300))]
    buckets = GradientBuckets(named, axis=axis, sharded=sharded)
    if rank == victim:
        main_grad(buckets.parameters["second"])[position] = torch.nan
    result = reduce_and_clip_buckets([buckets], num_targets=1, max_norm=1.0, world=axis)
    assert not result.finite
    return nonfinite_gradients([buckets], axis, device=torch.device("cpu"))


# The second parameter begins at element 128 of a bucket of 512, so its element 128 is the first of rank 1's shard.
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("position", [0, 127, 128, 299])
def test_the_rank_and_tensor_of_a_nan_are_named_whoever_owns_the_sum(victim: int, position: int) -> None:
    named = NonFinite(victim, "second", 1)
    assert run_ranks(2, nan_of_one_rank, victim, position, True) == [[named], [named]]


def nan_everywhere_on_one_rank(rank: int, world: int, victim: int) -> list[NonFinite]:
    axis = Axis(name="dp", size=world, rank=rank, group=dist.group.WORLD)
    buckets = GradientBuckets([(str(n), nn.Parameter(torch.zeros(200))) for n in range(40)], axis=axis, sharded=True)
    if rank == victim:
        for parameter in buckets.parameters.values():
            main_grad(parameter).fill_(torch.nan)
    reduce_and_clip_buckets([buckets], num_targets=1, max_norm=1.0, world=axis)
    return nonfinite_gradients([buckets], axis, device=torch.device("cpu"))


@pytest.mark.parametrize("victim", [0, 2])
def test_of_a_rank_whose_gradients_are_all_nan_only_that_rank_is_named(victim: int) -> None:
    """The others hold its NaN in their sums, and there is room for few names."""
    for found in run_ranks(3, nan_everywhere_on_one_rank, victim):
        assert [each.rank for each in found] == [victim] * NAMED


def nan_of_an_expert_and_of_another_rank(rank: int, world: int) -> list[NonFinite]:
    """Rank 0 has a NaN in what both reduce, in rank 1's shard; rank 1 has one in an expert that it alone has."""
    axis = Axis(name="dp", size=world, rank=rank, group=dist.group.WORLD)
    dense = GradientBuckets([("dense", nn.Parameter(torch.zeros(256)))], axis=axis, sharded=True)
    expert = bucket_of([nn.Parameter(torch.zeros(8))])
    own = dense.parameters["dense"] if rank == 0 else expert.parameters["0"]
    main_grad(own)[-1] = torch.nan
    reduce_and_clip_buckets([dense, expert], num_targets=1, max_norm=1.0, world=axis)
    return nonfinite_gradients([dense, expert], axis, device=torch.device("cpu"))


def test_an_expert_of_one_rank_is_named_beside_another_ranks_tensor() -> None:
    expected = [NonFinite(0, "dense", 1), NonFinite(1, "0", 1)]
    assert run_ranks(2, nan_of_an_expert_and_of_another_rank) == [expected, expected]


def test_without_zero_the_tensor_is_named_and_the_rank_is_not() -> None:
    found = run_ranks(2, nan_of_one_rank, 1, 5, False)
    assert found[0] == found[1] == [NonFinite(None, "second", 1)] * 2


def test_one_process_names_all_its_tensors_up_to_a_limit() -> None:
    buckets = make_buckets(scale=1.0)
    for parameter in buckets.parameters.values():
        main_grad(parameter).fill_(torch.inf)
    assert not reduce_and_clip(buckets, num_targets=1, max_norm=1.0).finite
    found = nonfinite_gradients([buckets], ALONE, device=torch.device("cpu"))
    assert [(each.tensor, each.elements) for each in found] == [("0", 1), ("1", 63), ("2", 645), ("3", 231)]
    many = bucket_of(nn.Parameter(torch.zeros(1)) for _ in range(3 * NAMED))
    for parameter in many.parameters.values():
        main_grad(parameter).fill_(torch.nan)
    assert len(nonfinite_gradients([many], ALONE, device=torch.device("cpu"))) == NAMED


def test_a_loss_that_is_not_differentiated_once_is_refused_where_gradients_are_reduced() -> None:
    """The head's gradient is added in forward: of an evaluation with gradients enabled it would be trained on."""
    weight, labels = nn.Parameter(torch.randn(7, 4)), torch.tensor([3])
    buckets = bucket_of([weight])

    def loss() -> Tensor:
        return linear_cross_entropy_sum(torch.randn(1, 4), weight, labels)

    buckets.forget()
    twice = loss()
    twice.backward(retain_graph=True)
    with torch.no_grad():
        loss()
    buckets.reduce()
    assert main_grad(weight).any()
    twice.backward()
    with pytest.raises(AssertionError, match="not differentiated once"):
        buckets.reduce()
    buckets.forget()
    buckets.reduce()
    loss()
    with pytest.raises(AssertionError, match="not differentiated once"):
        buckets.reduce()
