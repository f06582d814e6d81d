"""DeepGEMM's adapter: its calls against the recorded interface, its products against FP64, the choice by time."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from kernels import backend, deepgemm
from kernels.deepgemm import Choice, Product, require
from kernels.formats import Quantized
from kernels.gpu import gemm_fp8
from parallel.mesh import single
from tests.kernels import deepgemm_stand_in, gemm_inputs
from tests.kernels.deepgemm_stand_in import TABLE, DeepGemm
from tests.kernels.gemm_inputs import BF16_TOLERANCE, FP32_TOLERANCE, relative_error
from train import assemble
from train.backend import use_kernels
from train.config import compose
from train.model.precision import Precision
from train.model.sizes import Held
from train.studies.smoke_runs import model_config

ROWS, N, K, ENDS = 384, 136, 272, [128, 128, 256]
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """DeepGEMM is there, asked for, and taken for every product that it is asked about."""
    monkeypatch.setitem(sys.modules, "deep_gemm", DeepGemm())  # type: ignore[arg-type]
    monkeypatch.setattr(gemm_fp8, "use_gluon", lambda _: True)
    backend.use_backend("deepgemm")
    yield
    backend.use_backend("gluon")
    deepgemm._TAKEN.clear()


def turned(blocks: Quantized) -> Quantized:
    """As dgrad has them: the scale is a transposed view."""
    return Quantized(blocks.payload, blocks.scale.mT.contiguous().mT)


def errors() -> Iterator[float]:
    """Relative errors of the launchers' results, over their tolerances: dense, turned, grouped, gradient."""
    for ends, view in ((None, lambda b: b), (None, turned), (ENDS, lambda b: b), (ENDS, turned)):
        problem = gemm_inputs.tile_block(ROWS, N, K, ends)
        a, b = problem.quantized
        operands = a.payload, a.scale, b.payload, view(b).scale, problem.group_ends, torch.bfloat16
        # Outputs are NaN-poisoned, padding rows of the operand hold numbers.
        yield relative_error(gemm_fp8.grouped_gemm_tile_block(*operands), problem.expected) / BF16_TOLERANCE
    gradient, before = gemm_inputs.tile_tile(N, K, ROWS), torch.randn(N, K)
    out = before.clone()
    gemm_fp8.gemm_tile_tile(*gradient.operands, out, True)
    yield relative_error(out, gradient.expected + before.double()) / FP32_TOLERANCE


ALL = {Product("rows", N, K), Product("rows", N, K, len(ENDS)), Product("wgrad", N, K)}


@pytest.mark.usefixtures("stand_in")
def test_every_call_binds_to_the_published_interface_and_computes_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    for name in deepgemm.NAMES:
        method = getattr(DeepGemm, name)
        monkeypatch.setattr(DeepGemm, name, lambda *a, _m=method, **k: called.append(_m.__name__) or _m(*a, **k))
    deepgemm._TAKEN.update(ALL)
    assert all(error < 1 for error in errors())
    assert called == ["fp8_gemm_nt"] * 2 + ["m_grouped_fp8_gemm_nt_contiguous"] * 2 + ["fp8_gemm_nt"]
    assert set(deepgemm.NAMES) == set(TABLE["callables"])


@pytest.mark.usefixtures("stand_in")
def test_what_deepgemm_cannot_do_goes_to_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """FP32 results, `=`, groups of the contraction; and every product that was not chosen."""
    monkeypatch.setattr(gemm_fp8, "use_gluon", lambda out: out.dtype == torch.bfloat16)
    monkeypatch.setitem(sys.modules, "deep_gemm", None)
    problem, gradient = gemm_inputs.tile_block(ROWS, N, K), gemm_inputs.tile_tile(N, K, ROWS, ENDS)
    deepgemm._TAKEN.update(ALL)
    assert relative_error(gemm_fp8.gemm_tile_block(*problem.operands, torch.float32), problem.expected) < 1e-6
    hopper = SimpleNamespace(gemm=lambda *operands, **how: seen.append(how["accumulate"]))
    seen: list[bool] = []
    monkeypatch.setattr(gemm_fp8, "gemm_hopper", hopper)
    monkeypatch.setattr(gemm_fp8, "use_gluon", lambda _: True)
    gemm_fp8.gemm_tile_tile(*gradient.operands, torch.empty(N, K), False)
    gemm_fp8.grouped_gemm_tile_tile(*gradient.operands, gradient.group_ends, torch.empty(len(ENDS), N, K), True)
    deepgemm._TAKEN.clear()
    gemm_fp8.gemm_tile_tile(*gradient.operands, torch.empty(N, K), True)
    assert seen == [False, True, True]


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        # The scales of tiles as they are stored, of blocks turned; of a neighbour; the other recipe.
        ("(a.payload, a.scale.t()), (b.payload, b.scale), out", "(a.payload, a.scale), (b.payload, b.scale), out",
         AssertionError),
        ("(b.payload, b.scale), out", "(b.payload, b.scale.mT), out", AssertionError),
        ("(b.payload, b.scale), out", "(b.payload, b.scale.flip(-1)), out", None),
        ("fp8_gemm_nt(*operands, recipe=TILE_BLOCK)", "fp8_gemm_nt(*operands, recipe=TILE_TILE)", AssertionError),
        # Rows of another group, of an empty one, padding rows that are somebody's.
        ("right=True", "right=False", None),
        ("group.masked_fill(group == len(group_ends), -1)", "group.clamp(max=len(group_ends) - 1)", None),
        ("repeat_interleave(TILE)[:rows]", "repeat_interleave(TILE)[:rows].long()", AssertionError),
        # What is not published; what the gradient needs.
        ("group_of_row, recipe=", "m_indices=group_of_row, recipe=", TypeError),
        ("library().m_grouped_fp8_gemm_nt_contiguous", "library().m_grouped_gemm_fp8_fp8_bf16_nt_contiguous",
         AttributeError),
        ("c=out, recipe", "recipe", AssertionError),
    ],
)  # fmt: skip
def test_a_planted_defect_turns_red(
    old: str, new: str, error: type[Exception] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(deepgemm.__file__).read_text()
    assert source.count(old) == 1, old
    changed = ModuleType("changed")
    monkeypatch.setitem(sys.modules, "changed", changed)
    exec(compile(source.replace(old, new), "changed", "exec"), vars(changed))  # noqa: S102
    monkeypatch.setattr(gemm_fp8, "deepgemm", changed)
    monkeypatch.setattr(changed, "takes", lambda product: True)
    if error:
        with pytest.raises(error):
            list(errors())
    else:
        assert max(errors()) > 1


def ticking(times: Mapping[tuple[str, int], tuple[float, float]], seen: list[int]) -> deepgemm.Clock:
    """A clock that reads microseconds of DeepGEMM and ours from a list, in the order of products."""

    def clock(candidates: Mapping[str, Callable[[], Tensor]]) -> Mapping[str, float]:
        assert list(candidates) == ["deepgemm", "ours"]
        seen.append(len(candidates["deepgemm"]()))
        return dict(zip(candidates, list(times.values())[len(seen) - 1], strict=True))

    return clock


@pytest.mark.usefixtures("stand_in")
def test_the_faster_one_is_taken_for_each_product() -> None:
    """Parity first: the grouped product is compared with its padding rows."""
    products, seen = {Product("rows", N, K, 2): 300, Product("rows", K, N): 64, Product("wgrad", N, K): 64}, []
    times = {("grouped", 0): (9.0, 10.0), ("dense", 0): (10.0, 9.0), ("wgrad", 0): (1.0, 2.0)}
    found = deepgemm.choose(products, device=CPU, clock=ticking(times, seen))
    assert [(choice.product, choice.rows, choice.taken) for choice in found] == [
        (product, rows, taken) for (product, rows), taken in zip(products.items(), (True, False, True), strict=True)
    ]
    assert seen == [384, 64, N], "two groups of a tile and a tile of padding"
    assert [deepgemm.takes(product) for product in products] == [True, False, True]
    backend.use_backend("gluon")
    assert not any(map(deepgemm.takes, products))


@pytest.mark.usefixtures("stand_in")
def test_a_library_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        deepgemm_stand_in, "of_tiles", lambda operand, exact=deepgemm_stand_in.of_tiles: exact(operand) * 1.01
    )
    with pytest.raises(ValueError, match=r"rows product of a weight \[136, 272\] is 1.0e-02 from ours, allowed 0.0025"):
        deepgemm.choose({Product("rows", N, K): 64}, device=CPU, clock=lambda _: {})


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("groups", [0, 2])
def test_both_layouts_of_a_weights_scales_are_compared(
    turned: bool, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward has them as they are stored, dgrad turned; each alone is planted to be read wrongly."""
    exact = deepgemm_stand_in.of_blocks

    def misread(operand: deepgemm_stand_in.Pair) -> Tensor:
        payload, scale = operand
        return exact((payload, scale.flip(-1) if scale.is_contiguous() != turned else scale))

    monkeypatch.setattr(deepgemm_stand_in, "of_blocks", misread)
    with pytest.raises(ValueError, match="computes something else"):
        deepgemm.choose({Product("rows", N, K, groups): 64}, device=CPU, clock=lambda _: {})


@pytest.mark.parametrize(
    ("device", "capability", "module", "words"),
    [
        (CPU, (9, 0), DeepGemm(), "runs on a CUDA GPU, and the device is cpu"),
        (GPU, (8, 9), DeepGemm(), "for compute capability 9.0 (H100, H200, H800), this GPU has 8.9"),
        (GPU, (10, 0), DeepGemm(), "this GPU has 10.0"),
        (GPU, (9, 0), None, "not installed here: run `git clone --recursive https://github.com/deepseek-ai/DeepGEMM"),
        (GPU, (9, 0), OSError("libcudart.so\n.13"), "cannot be imported (libcudart.so .13)"),
        (GPU, (9, 0), SimpleNamespace(__version__="1.0"), "DeepGEMM 1.0 lacks fp8_gemm_nt, 2.6.1 has it"),
        (GPU, (9, 0), DeepGemm(), ""),
    ],
)
def test_what_deepgemm_cannot_do_here_is_refused_in_one_sentence(
    device: torch.device, capability: tuple[int, int], module: Any, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(deepgemm.importlib.util, "find_spec", lambda name: module and name)  # type: ignore[attr-defined]

    def load(name: str) -> Any:
        if isinstance(module, Exception):
            raise module
        return module

    monkeypatch.setattr(deepgemm.importlib, "import_module", load)  # type: ignore[attr-defined]
    if words:
        with pytest.raises(ValueError, match=r"^--kernels deepgemm") as refused:
            require(device, asked="--kernels deepgemm")
        assert words in str(refused.value)
        assert "\n" not in str(refused.value)
    else:
        require(device, asked="--kernels deepgemm")


@pytest.mark.usefixtures("stand_in")
def test_a_models_own_products_are_measured_and_on_the_run_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 of V3 with 8 of 256 experts: the six weights of a MoE layer three times, its experts' forward and back."""
    asked: dict[Product, int] = {}
    monkeypatch.setattr(deepgemm, "choose", lambda products, device: asked.update(products) or [])
    model, fp8 = model_config("v3_671b"), Precision("fp8")
    held = Held((5,), embedding=False, head=False)
    use_kernels("deepgemm", model, fp8, tokens=4096, device=CPU, held=held, ep=32, trains=True)
    shapes = {(2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048)}
    wanted = {Product("rows", *shape): 4096 for n, k in shapes for shape in ((n, k), (k, n))}
    wanted |= {Product("wgrad", n, k): 4096 for n, k in shapes}
    wanted |= {Product("rows", *shape, 8): 32768 for n, k in ((4096, 7168), (7168, 2048)) for shape in ((n, k), (k, n))}
    assert asked == wanted
    with pytest.raises(ValueError, match="precision=bf16 has no such product"):
        use_kernels("deepgemm", model, replace(fp8, name="bf16"), tokens=1, device=CPU)
    choices = (Choice(Product("rows", N, K, 8), 64, 10.04, 12.0), Choice(Product("wgrad", N, K), 64, 9.0, 8.0))
    mesh = single(CPU)
    components: Any = SimpleNamespace(engine=SimpleNamespace(mesh=mesh), stream=Mock(), products=choices)
    monkeypatch.setattr(assemble, "store_hashes", lambda store: {})
    asked_for = ["kernels.backend=deepgemm", "run.deterministic=false", "precision=fp8"]
    card = assemble.run_card(compose(["experiment=tiny", *asked_for]), components)
    assert card["kernels"] == "deepgemm"
    common = {"n": N, "k": K, "rows": 64}
    assert json.loads(json.dumps(card["products"])) == [
        {"kind": "rows", "groups": 8, "deepgemm_us": 10.0, "ours_us": 12.0, "takes": "deepgemm", **common},
        {"kind": "wgrad", "groups": 0, "deepgemm_us": 9.0, "ours_us": 8.0, "takes": "ours", **common},
    ]
