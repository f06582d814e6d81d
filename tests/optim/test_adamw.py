"""AdamW against torch's own, and the bookkeeping of masters, moments and main gradients."""

from __future__ import annotations

import re
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from parallel.mesh import Axis
from parallel.shards import Shard
from parallel.zero import GradientBuckets
from train.optim.adamw import MOMENT_DTYPES, AdamW, decays, round_to_fp8
from train.optim.config import MOMENT_BYTES, OptimConfig

ALONE = Axis(name="dp", size=1, rank=0, group=None)


def make_optimizer(named_params: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> AdamW:
    return AdamW([GradientBuckets(named_params, axis=ALONE, sharded=False)], config)


def state_of(optimizer: AdamW) -> dict[str, Tensor]:
    """The live tensors of the state, flat."""
    return {name: shard.tensor for name, shard in optimizer.state_shards().items()}


def main_grad(parameter: nn.Parameter) -> Tensor:
    gradient: Tensor = parameter.main_grad  # type: ignore[attr-defined]
    return gradient


def make_parameters(dtype: torch.dtype, *, seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "embed_tokens.weight": (11, 7),
        "layers.0.input_layernorm.weight": (7,),
        "layers.0.mlp.experts.down_proj": (3, 5, 7),
        "norm.weight": (129,),
    }
    return {name: nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for name, s in shapes.items()}


def fill_main_grads(parameters: dict[str, nn.Parameter], *, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters.values():
        main_grad(parameter).copy_(torch.randn(parameter.shape, generator=generator))


def torch_adamw(parameters: dict[str, nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    spared = [p for name, p in parameters.items() if "norm" in name]
    decayed = [p for name, p in parameters.items() if "norm" not in name]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=config.betas, eps=config.eps)


def test_fp32_parameters_and_moments_agree_with_torch_over_ten_steps() -> None:
    config = OptimConfig(moments_dtype="fp32")
    ours, theirs = make_parameters(torch.float32), make_parameters(torch.float32)
    optimizer, oracle = make_optimizer(ours.items(), config), torch_adamw(theirs, config)
    for step in range(1, 11):
        lr = 1e-2 / step
        fill_main_grads(ours, seed=step)
        for name, parameter in theirs.items():
            parameter.grad = main_grad(ours[name]).clone()
        for group in oracle.param_groups:
            group["lr"] = lr
        optimizer.step(lr=lr, step=step)
        oracle.step()
    for name, parameter in theirs.items():
        # Ten updates of size lr <= 1e-2, each off by a few fp32 roundings (6e-8): 1e-6 leaves a margin of
        # ten.
        torch.testing.assert_close(ours[name], parameter, rtol=1e-6, atol=1e-7, msg=name)


def test_bf16_parameters_follow_an_fp32_master() -> None:
    """With steps below half a BF16 ulp the master moves while a rounded parameter would stand still."""
    config = OptimConfig(moments_dtype="fp32", weight_decay=0.0)
    parameters = {"w": nn.Parameter(torch.full((4, 4), 256.0, dtype=torch.bfloat16))}
    optimizer = make_optimizer(parameters.items(), config)
    for step in range(1, 11):
        main_grad(parameters["w"]).fill_(1.0)
        optimizer.step(lr=0.1, step=step)
    master = state_of(optimizer)["master.w"].view(4, 4)
    # A constant gradient makes every bias-corrected update equal to lr; 1e-6: ten fp32 roundings at 256
    # (1.5e-5 each).
    torch.testing.assert_close(master, torch.full((4, 4), 255.0), rtol=1e-6, atol=0.0)
    assert torch.equal(parameters["w"], master.to(torch.bfloat16))
    assert float(parameters["w"].detach()[0, 0]) == 255.0


def test_state_names_dtypes_and_liveness() -> None:
    parameters = make_parameters(torch.bfloat16)
    optimizer = make_optimizer(parameters.items(), OptimConfig())
    state = state_of(optimizer)
    assert sorted(state) == sorted(
        f"{kind}.{name}" for kind in ("master", "exp_avg", "exp_avg_sq") for name in parameters
    )
    fill_main_grads(parameters, seed=1)
    optimizer.step(lr=1e-2, step=1)
    for name, parameter in parameters.items():
        assert state[f"master.{name}"].dtype == torch.float32
        assert state[f"exp_avg.{name}"].dtype == state[f"exp_avg_sq.{name}"].dtype == torch.bfloat16
        gradient = main_grad(parameter).view(-1)
        # bf16 keeps 8 bits: half an ulp is 2**-9 of the value.
        torch.testing.assert_close(state[f"exp_avg.{name}"].float(), 0.1 * gradient, rtol=2**-8, atol=0.0)
        torch.testing.assert_close(state[f"exp_avg_sq.{name}"].float(), 0.05 * gradient**2, rtol=2**-8, atol=0.0)


def test_state_written_back_continues_bit_for_bit() -> None:
    config = OptimConfig()
    unbroken, resumed = make_parameters(torch.bfloat16), make_parameters(torch.bfloat16, seed=9)
    first, second = make_optimizer(unbroken.items(), config), make_optimizer(resumed.items(), config)
    fill_main_grads(unbroken, seed=1)
    first.step(lr=1e-2, step=1)
    with torch.no_grad():
        for name, parameter in unbroken.items():
            resumed[name].copy_(parameter)
    for name, tensor in state_of(first).items():
        state_of(second)[name].copy_(tensor)
    for parameters, optimizer in ((unbroken, first), (resumed, second)):
        fill_main_grads(parameters, seed=2)
        optimizer.step(lr=1e-2, step=2)
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)
    assert all(torch.equal(t, state_of(second)[name]) for name, t in state_of(first).items())


def test_autograd_gradients_land_in_main_grad_summed_in_fp32() -> None:
    """A BF16 gradient of 1 after one of 256 would be lost in BF16 (256 + 1 rounds to 256)."""
    weight = nn.Parameter(torch.zeros(6, 4, dtype=torch.bfloat16))
    optimizer = make_optimizer([("embed_tokens.weight", weight)], OptimConfig())
    ids = torch.tensor([1, 1, 5])
    for scale in (256.0, 1.0, 1.0):
        (functional.embedding(ids, weight).sum() * scale).backward()
        assert weight.grad is None
    expected = torch.zeros(6, 4)
    expected[1], expected[5] = 2 * 258.0, 258.0
    assert torch.equal(main_grad(weight), expected)
    optimizer.zero_grad()
    (functional.embedding(ids, weight).sum() * 3).backward()
    expected[1], expected[5] = 6.0, 3.0
    assert torch.equal(main_grad(weight), expected), "the next step's alone"


def test_step_raises_the_version_of_every_parameter() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        parameters = make_parameters(dtype)
        optimizer = make_optimizer(parameters.items(), OptimConfig())
        fill_main_grads(parameters, seed=1)
        before = {name: parameter._version for name, parameter in parameters.items()}
        optimizer.step(lr=1e-2, step=1)
        assert all(parameter._version > before[name] for name, parameter in parameters.items())


def test_shared_parameter_is_updated_once_and_frozen_one_never() -> None:
    shared = nn.Parameter(torch.ones(2, 2))
    frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
    config = OptimConfig(weight_decay=0.0, moments_dtype="fp32")
    optimizer = make_optimizer([("a", shared), ("b", shared), ("c", frozen)], config)
    main_grad(shared).fill_(1.0)
    optimizer.step(lr=0.25, step=1)
    # The first bias-corrected update is lr * g / (|g| + eps); eps = 1e-8 is below fp32's resolution at 1.
    assert torch.equal(shared.detach(), torch.full((2, 2), 0.75))
    assert torch.equal(frozen.detach(), torch.ones(2, 2))
    # An FP32 parameter is its own master.
    assert sorted(state_of(optimizer)) == ["exp_avg.a", "exp_avg_sq.a"]


def test_a_plan_counts_the_bytes_that_moments_are_stored_in() -> None:
    assert {name: dtype.itemsize for name, dtype in MOMENT_DTYPES.items()} == MOMENT_BYTES


def test_fp8_moments_are_e4m3_numbers_under_a_power_of_two_per_128() -> None:
    parameters = make_parameters(torch.bfloat16)
    optimizer = make_optimizer(parameters.items(), OptimConfig(moments_dtype="fp8"))
    exact = make_optimizer(make_parameters(torch.bfloat16).items(), OptimConfig(moments_dtype="fp32"))
    fill_main_grads(parameters, seed=1)
    fill_main_grads({name: state.held.parameter for name, state in exact._states.items()}, seed=1)
    for one in (optimizer, exact):
        one.step(lr=1e-2, step=1)
    assert state_of(optimizer).keys() == state_of(exact).keys()
    for name, moment in state_of(optimizer).items():
        unrounded = state_of(exact)[name]
        if name.startswith("master"):
            # The first update is made before moments are stored.
            assert torch.equal(moment, unrounded)
            continue
        for tile, wanted in zip(moment.split(128), unrounded.split(128), strict=True):
            scale = 2.0 ** float((wanted.abs().max().double() / 448).log2().ceil())
            expected = (wanted / scale).to(torch.float8_e4m3fn).float() * scale
            assert torch.equal(tile, expected), name


def test_a_second_moment_2_to_the_19th_below_its_neighbours_becomes_zero() -> None:
    # E4M3 ends at 2^-9, half of which rounds to zero: 448 x 2^10 = 2^18.8 below the largest, twice that to be safe.
    moment = torch.tensor([1.0, 2.0**-20, 2.0**-17])
    round_to_fp8(moment)
    assert moment.tolist() == [1.0, 0.0, 2.0**-17]


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("embed_tokens.weight", (4, 4), True),
        ("lm_head.weight", (4, 4), True),
        ("layers.0.mlp.gate.weight", (4, 4), True),
        ("layers.0.mlp.experts.gate_up_proj", (2, 4, 4), True),
        ("layers.0.self_attn.q_a_layernorm.weight", (4,), False),
        ("layers.61.enorm.weight", (4,), False),
        # a norm gain whose storage was reshaped is still a norm gain
        ("layers.0.input_layernorm.weight", (2, 2), False),
        ("norm.weight", (4,), False),
        ("some.vector", (4,), False),
    ],
)
def test_which_parameters_decay(name: str, shape: tuple[int, ...], expected: bool) -> None:
    assert decays(name, torch.zeros(shape)) is expected


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"betas": (0.9, 1.0)}, "optim.betas = (0.9, 1.0)"),
        ({"eps": 0.0}, "optim.eps = 0.0"),
        ({"weight_decay": -0.1}, "optim.weight_decay = -0.1"),
        ({"clip_norm": 0.0}, "optim.clip_norm = 0.0"),
        ({"moments_dtype": "fp16"}, "optim.moments_dtype = 'fp16'"),
    ],
)
def test_bad_hyperparameters_are_refused_by_name_and_value(changes: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)):
        OptimConfig(**changes)  # type: ignore[arg-type]


def test_one_name_for_two_parameters_is_refused_in_one_bucket_and_in_two() -> None:
    one, two = (("w", nn.Parameter(torch.ones(1))) for _ in range(2))
    for buckets in ([[one, two]], [[one], [two]]):
        with pytest.raises(ValueError, match="'w' appears twice"):
            AdamW([GradientBuckets(named, axis=ALONE, sharded=False) for named in buckets], OptimConfig())


def test_state_has_the_offsets_of_its_experts_in_the_global_parameter() -> None:
    """Experts 2 and 3 of 8, of 5 x 7 elements each."""
    down_proj = nn.Parameter(torch.ones(2, 5, 7, dtype=torch.bfloat16))
    buckets = GradientBuckets([("down_proj", down_proj)], axis=ALONE, sharded=False)
    optimizer = AdamW([buckets], OptimConfig(), {"down_proj": Shard((8 * 35,), (2 * 35,), (2 * 35,))})
    state = optimizer.state_shards()
    assert sorted(state) == ["exp_avg.down_proj", "exp_avg_sq.down_proj", "master.down_proj"]
    for held in (*state.values(), *optimizer.masters().values()):
        assert (held.shard.global_shape, held.shard.offsets, tuple(held.tensor.shape)) == ((280,), (70,), (70,))


def test_masters_are_the_live_fp32_weights_of_every_parameter() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        parameters = make_parameters(dtype)
        optimizer = make_optimizer(parameters.items(), OptimConfig())
        masters = optimizer.masters()
        fill_main_grads(parameters, seed=1)
        optimizer.step(lr=1e-2, step=1)
        assert masters.keys() == parameters.keys()
        for name, parameter in parameters.items():
            assert masters[name].tensor.dtype == torch.float32
            assert torch.equal(masters[name].tensor.to(dtype).view(parameter.shape), parameter)
