"""Muon: one process against a reference written out here and torch's own, and every layout against that reference.

The reference is fed the gradients that the ranks are fed, so whatever a layout does differently shows as bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from parallel.buckets import owners
from parallel.layout import Layout
from parallel.mesh import Mesh, make_mesh, single
from parallel.shards import LocalShard
from tests.ranks import run_ranks
from tests.tiny_model import DISTINCT, FP32
from train.assemble import build_engine
from train.huggingface.names import released_tensors
from train.model.config import ModelConfig, StageSpec
from train.model.sizes import held_by, weights
from train.model.transformer import Transformer
from train.optim.config import OptimConfig
from train.optim.muon import Muon, muon_matrices, orthogonalize, rms_matched
from train.optim.qk_clip import row_factors
from train.stage import expert_shards
from train.step import Engine
from train.studies.plan.live_bytes import LiveBytes
from train.studies.plan.state_bytes import state_bytes

CPU = torch.device("cpu")
MUON = OptimConfig(name="muon", moments_dtype="fp32")
# Two experts a rank under ep2, and three layers for two stages. With this width dp2 cuts a row of q_b_proj, which
# QK-clip scales.
MODEL: ModelConfig = replace(DISTINCT, intermediate_size=168)
LR, STEPS = 0.02, 2
# Four layers with MTP's, three heads: most are clipped.
LOGITS = torch.tensor([[40.0, 5.0, 11.0], [10.0, 90.0, 3.0], [50.0, 60.0, 70.0], [9.0, 20.0, 30.0]])
LAYOUTS = {
    "dp2": Layout(dp=2),
    "dp2 without ZeRO": Layout(dp=2, zero=False),
    "ep2": Layout(dp=2, ep=2),
    "pp2": Layout(pp=2, stage_layers=(2, 1)),
    "dp2 x ep2 x pp2": Layout(pp=2, dp=4, ep=2, stage_layers=(2, 1)),
}


def split_as_released(name: str, whole: Tensor, config: ModelConfig) -> list[Tensor]:
    """Views of the released matrices in one of our parameters; none where AdamW moves it."""
    if whole.ndim < 2 or any(part in name for part in ("embed_tokens", "lm_head", "norm", "mlp.gate.")):
        return []
    return [each.of(whole) for each in released_tensors(name, tuple(whole.shape), config)]


def newton_schulz(matrix: Tensor) -> Tensor:
    """Five steps of the quintic on a matrix and its transpose, in the matrix's dtype."""
    x = (matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix).clone()
    x = (x / (x.norm() + 1e-7)).contiguous()
    for _ in range(5):
        a = x @ x.mT
        x = torch.addmm(x, torch.addmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if matrix.shape[0] > matrix.shape[1] else x


class Reference:
    """Muon of one process on whole parameters, without shards and buckets; AdamW's stay as they are."""

    def __init__(self, parameters: dict[str, Tensor], optim: OptimConfig) -> None:
        self.weights = {name: each.detach().clone() for name, each in parameters.items()}
        self.optim, self.momentum = optim, {name: torch.zeros_like(w) for name, w in self.weights.items()}

    def step(self, grads: dict[str, Tensor], lr: float, factors: dict[str, Tensor]) -> None:
        mu, decay = self.optim.momentum, 1 - lr * self.optim.weight_decay
        for name, weight in self.weights.items():
            parts = split_as_released(name, weight, MODEL)
            self.momentum[name].mul_(mu).add_(grads[name])
            ahead = grads[name].add(self.momentum[name], alpha=mu)
            for part, update in zip(parts, split_as_released(name, ahead, MODEL), strict=True):
                scaled = newton_schulz(update).mul(0.2 * math.sqrt(max(update.shape)))
                part.mul_(decay).add_(scaled, alpha=-lr)
            if name in factors:
                weight.mul_(factors[name][:, None].to(weight.dtype))


def engine_on(mesh: Mesh, optim: OptimConfig = MUON) -> Engine:
    return build_engine(MODEL, FP32, optim, mesh, seed=3)


def gradients(step: int) -> dict[str, Tensor]:
    """Of whole parameters; those of one expert are zero, as without tokens."""
    generator = torch.Generator().manual_seed(step)
    model = engine_on(single(CPU)).models[0]
    found = {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}
    for name, grad in found.items():
        if ".experts." in name:
            grad[1] = 0.0
    return found


def feed(engine: Engine, grads: dict[str, Tensor]) -> None:
    """Put this rank's shards of whole gradients where its optimizer reads them."""
    masters = engine.optimizer.masters()
    for bucket in engine.optimizer.buckets:
        for held in bucket.parameter_shards():
            shard = masters[held.name].shard
            held.grad.copy_(grads[held.name].flatten().narrow(0, shard.offsets[0], shard.sizes[0]))


def test_one_process_gives_the_bits_of_the_reference_and_nearly_those_of_fp64() -> None:
    engine = engine_on(single(CPU))
    parameters = dict(engine.models[0].named_parameters())
    moved = {name for name in parameters if split_as_released(name, parameters[name], MODEL)}
    assert set(muon_matrices(engine.models[0])) == moved
    reference = Reference(parameters, MUON)
    exact = Reference({name: p.double() for name, p in parameters.items()}, MUON)
    for step in range(1, STEPS + 1):
        grads = gradients(step)
        feed(engine, grads)
        engine.optimizer.step(lr=LR, step=step)
        reference.step(grads, LR, {})
        exact.step({name: grad.double() for name, grad in grads.items()}, LR, {})
    for name in moved:
        assert torch.equal(parameters[name], reference.weights[name]), name
        # Values near zero grow by 3.4445 a step and their errors with them: 3.4445^5 = 485 roundings of 2^-24 of
        # elements of 0.2 LR, twice; and two of the weights.
        torch.testing.assert_close(
            parameters[name].double(), exact.weights[name], rtol=2**-22, atol=2 * 485 * 2**-24 * LR, msg=name
        )


def test_one_matrix_moves_as_torchs_own_muon_moves_it() -> None:
    """It multiplies in BF16 wherever it runs, so this compares rules and not bits."""
    torch.manual_seed(5)
    for shape in ((63, 129), (129, 63), (1, 33)):
        weight = torch.nn.Parameter(torch.randn(shape))
        theirs = torch.optim.Muon(
            [weight], lr=LR, weight_decay=0.1, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw"
        )
        mine, momentum, start = weight.detach().clone(), torch.zeros(shape), weight.detach().clone()
        for _ in range(3):
            grad = torch.randn(shape)
            weight.grad = grad.clone()
            theirs.step()
            momentum.mul_(0.95).add_(grad)
            mine.mul_(1 - LR * 0.1).sub_(rms_matched(grad + 0.95 * momentum), alpha=LR)
        # Measured 0.008 to 0.013: torch's rounds x, gram and their products to BF16, 2^-9 each, fifteen times in a row.
        # Without the look ahead, the decay or the right factor it is 0.05 or more.
        moved = weight.detach()
        assert float((mine - moved).norm() / (moved - start).norm()) < 0.02


def test_singular_values_come_near_one_and_zeros_stay() -> None:
    torch.manual_seed(6)
    for shape in ((1, 1), (1, 129), (63, 129), (129, 63), (40, 200)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape) * 1e-3))
        # Where the report's coefficients lead from anywhere above 0.01 of the norm: 0.68 to 1.13, as Muon's author has
        # it; the smallest value of these is above that.
        assert 0.65 < float(values.min()) <= float(values.max()) < 1.25, shape
    assert not orthogonalize(torch.zeros(5, 7)).any()


def test_matrices_are_those_of_the_released_checkpoint() -> None:
    """Also without a query latent, where the first rows of the fused matrix are the queries."""
    for config in (MODEL, replace(MODEL, q_lora_rank=None)):
        model = engine_on(single(CPU)).models[0] if config is MODEL else Transformer(config, FP32)
        parameters = dict(model.named_parameters())
        for name, matrices in muon_matrices(model).items():
            flat = torch.arange(parameters[name].numel())
            expected = split_as_released(name, flat.view(parameters[name].shape), config)
            assert len(matrices) == len(expected)
            for matrix, rows in zip(matrices, expected, strict=True):
                assert torch.equal(flat[matrix.start : matrix.stop].view(matrix.rows, matrix.cols), rows)
        assert any(name.endswith("eh_proj.weight") for name in muon_matrices(model))


@dataclass(frozen=True)
class Found:
    """What a rank has that is not the reference's, how many elements it compared, and its share of the work."""

    differing: list[str]
    compared: int
    flops: list[list[int]]  # of each exchange, of each rank of its axis


def sharded_update(rank: int, world: int, layout: Layout, folder: Path) -> Found:
    mesh = make_mesh(layout, device=CPU, tied_embedding=True)
    engine = engine_on(mesh)
    optimizer = engine.optimizer
    assert isinstance(optimizer, Muon)
    for step in range(1, STEPS + 1):
        feed(engine, gradients(step))
        optimizer.step(lr=LR, step=step, row_factors=row_factors(engine.models, LOGITS, threshold=10.0))
    expected = load_file(folder / "expected.safetensors")
    held = optimizer.state_shards() | {f"weight.{name}": shard for name, shard in optimizer.masters().items()}
    differing = [
        name
        for name, each in held.items()
        if not torch.equal(each.tensor, expected[name].flatten().narrow(0, each.shard.offsets[0], each.shard.sizes[0]))
    ]
    for model in engine.models:
        for name, whole in (model.state_dict() | expert_shards(model)).items():
            if f"weight.{name}" in expected:
                source = expected[f"weight.{name}"]
                if isinstance(whole, LocalShard):
                    source, whole = source.narrow(0, whole.shard.offsets[0], whole.shard.sizes[0]), whole.tensor
                differing += [] if torch.equal(whole, source) else [f"gathered {name}"]
    owned = [exchange.owned for exchange in optimizer.exchanges]
    flops = [[sum(matrix.flops for matrix in each) for each in ranks] for ranks in owned]
    for loads, ranks in zip(flops, owned, strict=True):
        largest = max((matrix.flops for each in ranks for matrix in each), default=0)
        assert all(load <= sum(loads) / len(loads) + largest for load in loads)
    return Found(differing, sum(each.tensor.numel() for each in optimizer.masters().values()), flops)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference's weights and momentum; what AdamW moves is one process's."""
    folder = tmp_path_factory.mktemp("muon")
    engine = engine_on(single(CPU))
    reference = Reference(dict(engine.models[0].named_parameters()), MUON)
    for step in range(1, STEPS + 1):
        factors = row_factors(engine.models, LOGITS, threshold=10.0)
        feed(engine, gradients(step))
        engine.optimizer.step(lr=LR, step=step, row_factors=factors)
        reference.step(gradients(step), LR, factors)
    moved = muon_matrices(engine.models[0])
    state = {f"weight.{name}": p.detach() for name, p in engine.models[0].named_parameters()}
    state |= {name: shard.tensor for name, shard in engine.optimizer.state_shards().items()}
    state |= {f"weight.{name}": reference.weights[name] for name in moved}
    state |= {f"momentum.{name}": reference.momentum[name] for name in moved}
    save_file({name: each.contiguous() for name, each in state.items()}, folder / "expected.safetensors")
    return folder


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if "x" in name.split() else ()) for name in LAYOUTS]
)
def test_every_layout_gives_the_bits_of_the_reference(name: str, expected: Path) -> None:
    layout = LAYOUTS[name]
    ranks = run_ranks(layout.world, sharded_update, layout, expected)
    assert [rank.differing for rank in ranks] == [[]] * layout.world
    values = [each for name, each in load_file(expected / "expected.safetensors").items() if "weight." in name[:7]]
    assert sum(rank.compared for rank in ranks) >= sum(each.numel() for each in values)
    loads = [loads for rank in ranks for loads in rank.flops if any(loads)]
    assert bool(loads) == (layout.zero and layout.dp > 1)
    assert all(min(each) > 0 for each in loads), "a rank of an axis has nothing to compute"


def test_bytes_are_those_of_the_closed_form() -> None:
    """Moments of one process; and what one matrix takes for a moment beside itself, in FP32."""
    shards = engine_on(single(CPU)).optimizer.state_shards()
    table = weights(
        MODEL, held_by(MODEL, [StageSpec(range(MODEL.num_hidden_layers), is_first=True, is_last=True)]), ep=1
    )
    planned = state_bytes(table, Layout(), precision="fp32", dp_rank=0, moment_bytes=4, moments_of_matrices=1)
    assert planned.moments == sum(each.tensor.nbytes for each in shards.values())
    for shape in ((180, 70), (70, 180)):
        with FakeTensorMode(), LiveBytes() as live:
            matrix = torch.empty(shape)
            live.peak = before = live.now
            rms_matched(matrix)
            assert live.peak - before <= 8 * 180 * 70 + 8 * 70**2 + 1024
            assert live.peak - before >= 8 * 180 * 70 + 8 * 70**2


def test_owners_are_balanced_and_prefer_who_holds_a_matrix() -> None:
    equal = [{0: 90}, {0: 90}, {0: 10, 1: 80}, {1: 90}]
    assert owners([7, 7, 7, 7], equal, ranks=2) == [0, 0, 1, 1]
    # All on one rank: half of them go elsewhere, and none above the mean and one matrix.
    chosen = owners([5, 3, 3, 2, 2, 1], [{0: 9}] * 6, ranks=2)
    loads = [sum(f for f, owner in zip((5, 3, 3, 2, 2, 1), chosen, strict=True) if owner == r) for r in range(2)]
    assert max(loads) <= 8 + 5
    assert loads == [8, 8]


@pytest.mark.parametrize(
    ("key", "value", "cure"),
    [("backend", "deepspeed", "native"), ("offload", "cpu", "none"), ("moments_dtype", "fp8", "bf16")],
)
def test_what_has_no_whole_matrices_is_refused(key: str, value: str, cure: str) -> None:
    message = rf"^optim=muon does not go with optim.{key}={value} .*: use optim.{key}={cure}, or optim=adamw$"
    with pytest.raises(ValueError, match=message):
        OptimConfig(name="muon", **{key: value})  # type: ignore[arg-type]
