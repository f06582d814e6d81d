"""What an export writes is the model: for another implementation, for an independent name mapping, for us again.

Blocks of FP8 are compared with the definition, worked out here in FP64 over all 254 finite E4M3 values.
"""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from kernels.fp8_linear import weight_fp8
from kernels.quantize import dequantize_blocks
from parallel.layout import Layout
from parallel.mesh import make_mesh
from tests.hf_names import from_hf
from tests.huggingface.hf_folders import CPU, RAGGED, SHARD_BYTES, bytes_of, lively, save_checkpoint, tensors_of
from tests.ranks import run_ranks
from tests.tiny_model import TINY
from train.assemble import build_engine
from train.checkpoint.dcp import load, save
from train.huggingface import export as hf_export
from train.huggingface.export import ExportOptions, export
from train.huggingface.import_weights import import_hf
from train.huggingface.plan import BIAS, export_plan
from train.huggingface.reader import HfReader
from train.huggingface.weights import CheckpointReader, WeightSource, load_model, open_weights
from train.model.config import ModelConfig
from train.model.precision import Precision
from train.model.transformer import Transformer
from train.optim.config import OptimConfig
from train.step import checkpoint_tensors

FP8 = Precision("fp8", power_of_two_scales=True)
# Two FP32 implementations of three layers: 1.5e-7 was seen; the bound is the oracle test's.
LOGITS = 1e-5


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).detach().norm() / expected.detach().norm())


def logits_of(model: Transformer, ids: Tensor) -> Tensor:
    return model.logits(model.next_token_hidden(ids))


def ids_for(config: ModelConfig) -> Tensor:
    return torch.randint(0, config.vocab_size, (2, 33))


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> tuple[Transformer, Path]:
    model = lively(RAGGED, Precision("fp32"))
    return model, save_checkpoint(tmp_path_factory.mktemp("fp32") / "checkpoints/step_00000003", model)


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> tuple[Transformer, Path]:
    model = lively(RAGGED, FP8)
    return model, save_checkpoint(tmp_path_factory.mktemp("fp8") / "checkpoints/step_00000003", model)


def exported(source: WeightSource | Path, out: Path, **options: Any) -> Path:
    source = CheckpointReader(source) if isinstance(source, Path) else source
    export(source, out, ExportOptions(**{"shard_bytes": SHARD_BYTES, **options}))
    return out


@pytest.mark.parametrize("case", [{}, {"q_lora_rank": None}, {"n_shared_experts": 2}], ids=str)
def test_transformers_computes_the_same_logits_from_an_export(case: dict[str, Any], tmp_path: Path) -> None:
    model = lively(replace(RAGGED, **case), Precision("fp32"))
    path = save_checkpoint(tmp_path / "checkpoints/step_00000001", model)
    oracle = AutoModelForCausalLM.from_pretrained(exported(path, tmp_path / "out", format="fp32")).eval()
    ids = ids_for(RAGGED)
    with torch.no_grad():
        assert relative(logits_of(model, ids), oracle(input_ids=ids).logits) < LOGITS


def test_we_compute_the_same_logits_from_what_transformers_saved(
    fp32: tuple[Transformer, Path], tmp_path: Path
) -> None:
    """Its file is one, spells RoPE its own way and has no MTP layer."""
    oracle = AutoModelForCausalLM.from_pretrained(exported(fp32[1], tmp_path / "out", format="fp32")).eval()
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.mul_(1.25)
    oracle.save_pretrained(tmp_path / "saved")
    source = open_weights(tmp_path / "saved")
    assert isinstance(source, HfReader)
    assert source.config == replace(RAGGED, num_nextn_predict_layers=0)
    assert source.notes == [f"{tmp_path / 'saved'} holds 0 MTP layers, though its config.json says 1"]
    ids = ids_for(RAGGED)
    with torch.no_grad():
        assert relative(logits_of(load_model(source, device=CPU), ids), oracle(input_ids=ids).logits) < LOGITS


@pytest.mark.parametrize("shard_bytes", [3 * 10**4, 10**9])
def test_ours_to_hf_to_ours_is_bit_equal_for_every_tensor(
    fp32: tuple[Transformer, Path], tmp_path: Path, shard_bytes: int
) -> None:
    """MTP layer and router biases too; by our reader and by DCP, whose files may cut a stack of experts."""
    model, path = fp32
    hf = HfReader(exported(path, tmp_path / "hf", format="fp32"))
    imported = import_hf(hf, tmp_path / "run", shard_bytes=shard_bytes).path
    reader, expected = open_weights(tmp_path / "run"), model.state_dict()
    assert reader.path == imported
    assert (reader.config, reader.precision.name) == (RAGGED, "fp32")
    assert set(reader.names()) == set(expected)
    blank = {f"model.{name}": torch.full_like(tensor, 7.0) for name, tensor in expected.items()}
    load(imported, blank)
    for name, tensor in expected.items():
        assert torch.equal(reader.read(name), tensor), name
        assert torch.equal(blank[f"model.{name}"], tensor), name


def test_an_import_is_not_taken_for_a_run_to_resume(fp32: tuple[Transformer, Path], tmp_path: Path) -> None:
    """What the trainer asks for, an optimizer's state, is not there; its own weights stay as they were."""
    imported = import_hf(HfReader(exported(fp32[1], tmp_path / "hf", format="fp32")), tmp_path / "run").path
    tensors = {f"model.{name}": torch.zeros_like(tensor) for name, tensor in fp32[0].state_dict().items()}
    with pytest.raises(ValueError, match=r"does not fit: it lacks optim\.exp_avg\.norm\.weight"):
        load(imported, {**tensors, "optim.exp_avg.norm.weight": torch.zeros(136)})
    assert not any(tensor.any() for tensor in tensors.values())


def test_an_independent_mapping_finds_every_tensor_in_its_place(fp32: tuple[Transformer, Path], tmp_path: Path) -> None:
    """`from_hf` knows the names by pattern, not by the plan."""
    model, path = fp32
    found = tensors_of(exported(path, tmp_path / "hf", format="fp32"))
    for copy, original in (("embed_tokens", "model.embed_tokens"), ("shared_head.head", "lm_head")):
        assert torch.equal(found[f"model.layers.3.{copy}.weight"], found[f"{original}.weight"])
    back = from_hf(found, RAGGED)
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())


def test_bf16_rounds_everything_once_but_the_router_bias(fp32: tuple[Transformer, Path], tmp_path: Path) -> None:
    model, path = fp32
    back = from_hf(tensors_of(exported(path, tmp_path / "hf", format="bf16")), RAGGED)
    for name, tensor in model.state_dict().items():
        expected = tensor if name.endswith(BIAS) else tensor.bfloat16()
        assert back[name].dtype == expected.dtype, name
        assert torch.equal(back[name], expected), name


def finite_e4m3() -> Tensor:
    """[254] FP64, every value of the format, ascending."""
    values = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).double()
    return values[values.isfinite()].sort().values


def distance_to_grid(values: Tensor, grid: Tensor) -> Tensor:
    """From each value to the nearest of an ascending grid."""
    above = torch.bucketize(values.contiguous(), grid).clamp(1, len(grid) - 1)
    return torch.minimum((grid[above] - values).abs(), (grid[above - 1] - values).abs())


@pytest.mark.parametrize("power_of_two", [True, False])
def test_fp8_values_are_the_nearest_of_their_block(tmp_path: Path, power_of_two: bool) -> None:
    model = lively(RAGGED, Precision("fp8", power_of_two_scales=power_of_two))
    path = save_checkpoint(tmp_path / "checkpoints/step_00000001", model)
    out = exported(path, tmp_path / "hf", format="fp8")
    found, exact = tensors_of(out), from_hf_split(model)
    weights = [name for name, tensor in found.items() if tensor.dtype == torch.float8_e4m3fn]
    assert len(weights) == sum(item.dtype == "F8_E4M3" for items in plan_of("fp8").values() for item in items)
    for name in weights:
        w, scale, payload = exact[name].double(), found[f"{name}_scale_inv"], found[name].double()
        for i, rows in enumerate(w.split(128)):
            for j, block in enumerate(rows.split(128, dim=1)):
                s = scale[i, j].double()
                # FP32 division: half a unit in the last place.
                least = block.abs().max() / 448
                if power_of_two:
                    assert s == torch.exp2(torch.log2(least).ceil()), name
                else:
                    assert abs(s / least - 1) <= 2.0**-24, name
                stored = payload[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128] * s
                nearest = distance_to_grid(block, finite_e4m3() * s)
                # Quotients are rounded to FP32 before they are rounded to E4M3: 2^-24 of the value on a tie.
                assert ((stored - block).abs() <= nearest + 2.0**-23 * block.abs()).all(), name
    reader = HfReader(out)
    assert reader.precision == Precision("fp8", power_of_two_scales=power_of_two)


def from_hf_split(model: Transformer) -> dict[str, Tensor]:
    """Released name -> the model's own values, cut by hand out of the plan's places."""
    state = model.state_dict()
    return {item.name: item.place.of(state[item.place.name]) for items in plan_of("fp8").values() for item in items}


def plan_of(format: Any) -> dict[str, Any]:
    return dict(export_plan(RAGGED, format=format, shard_bytes=SHARD_BYTES).files)


def test_bf16_and_fp32_runs_get_fp32_scales(fp32: tuple[Transformer, Path], tmp_path: Path) -> None:
    assert not HfReader(exported(fp32[1], tmp_path / "hf", format="fp8")).precision.power_of_two_scales


def test_payloads_are_those_that_training_multiplies(fp8: tuple[Transformer, Path], tmp_path: Path) -> None:
    """Of every fused weight whose parts begin and end with a block; the plan names the others."""
    model, path = fp8
    found = tensors_of(exported(path, tmp_path / "hf", format="fp8"))
    cut, state, compared = set(export_plan(RAGGED, format="fp8", shard_bytes=10**9).cut_blocks), model.state_dict(), 0
    for items in plan_of("fp8").values():
        for item in items:
            if item.dtype != "F8_E4M3":
                continue
            training = weight_fp8(state[item.place.name], power_of_two=True)
            part = item.place.of(training.payload.view(torch.uint8))
            same = torch.equal(found[item.name].view(torch.uint8), part)
            assert same or item.name in cut, item.name
            compared += item.name not in cut
    # Of 3 + 1 layers: five projections of attention, every down projection.
    assert compared == 4 * 5 + 1 + 3 * (RAGGED.n_routed_experts + 1)


def test_fp8_is_read_back_as_payload_times_scale_exactly(fp8: tuple[Transformer, Path], tmp_path: Path) -> None:
    out = exported(fp8[1], tmp_path / "hf", format="fp8")
    values = {}
    for name, tensor in tensors_of(out).items():
        if tensor.dtype == torch.float8_e4m3fn:
            scale = tensors_of(out)[f"{name}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
            values[name] = tensor.float() * scale[: tensor.shape[0], : tensor.shape[1]]
        elif not name.endswith("_scale_inv"):
            values[name] = tensor.float()
    reader = HfReader(out)
    for name, expected in from_hf(values, RAGGED).items():
        assert torch.equal(reader.read(name).float(), expected), name
        rows = range(1, reader.shape(name)[0] - 1)
        assert torch.equal(reader.read(name, rows).float(), expected[rows.start : rows.stop]), name


def test_an_fp8_model_multiplies_the_same_weights_after_the_round_trip(
    fp8: tuple[Transformer, Path], tmp_path: Path
) -> None:
    """With power-of-two scales payload x scale is exact in BF16, and quantising it again gives the same values."""
    model, path = fp8
    hf = HfReader(exported(path, tmp_path / "hf", format="fp8"))
    again = load_model(CheckpointReader(import_hf(hf, tmp_path / "run").path), device=CPU)
    assert again.precision == FP8
    for name, before in model.state_dict().items():
        if name.endswith(("down_proj", "o_proj.weight")):
            one, two = weight_fp8(before, power_of_two=True), weight_fp8(again.state_dict()[name], power_of_two=True)
            assert torch.equal(dequantize_blocks(one), dequantize_blocks(two)), name


# Most rows of a matrix: many times the 128 that are read at once.
CONFIG = replace(TINY, num_hidden_layers=5, vocab_size=1000)


def save_on(rank: int, world: int, path: str, layout: Layout) -> None:
    mesh = make_mesh(layout, device=CPU, tied_embedding=True, timeout_s=60)
    engine = build_engine(CONFIG, FP8, OptimConfig(), mesh, seed=7)
    config = {"model": vars(CONFIG), "precision": vars(FP8), "data": {"store": "stores/none"}}
    group = torch.distributed.group.WORLD
    save(Path(path), tensors=checkpoint_tensors(engine), state={"config": config}, group=group)


class Watched:
    """A source that notes the largest read, and what of its reads is alive at once, in elements."""

    def __init__(self, source: CheckpointReader) -> None:
        self.source, self.largest, self.peak = source, 0, 0
        self.alive: list[weakref.ref[Tensor]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def read(self, name: str, rows: range | None = None) -> Tensor:
        assert rows is not None, f"{name} was read whole"
        tensor = self.source.read(name, rows)
        self.alive = [ref for ref in self.alive if ref() is not None] + [weakref.ref(tensor)]
        self.largest = max(self.largest, tensor.numel())
        self.peak = max(self.peak, sum(held.numel() for ref in self.alive if (held := ref()) is not None))
        return tensor


@pytest.fixture(scope="module")
def two_layouts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("layouts")
    paths = root / "four/checkpoints/step_00000001", root / "one/checkpoints/step_00000001"
    run_ranks(4, save_on, str(paths[0]), Layout(pp=2, dp=2, ep=2, schedule="ZBVZeroBubble"))
    run_ranks(1, save_on, str(paths[1]), Layout())
    return paths


@pytest.mark.parametrize("weights", ["model", "master"])
def test_any_layouts_checkpoint_gives_the_same_bytes(
    two_layouts: tuple[Path, Path], tmp_path: Path, weights: Any
) -> None:
    folders = []
    for index, path in enumerate(two_layouts):
        reader = CheckpointReader(path, weights)
        folders.append(exported(reader, tmp_path / str(index), format="fp8", weights=weights, shard_bytes=40_000))
    first, second = (bytes_of(folder) for folder in folders)
    # The journals name their sources.
    journals = [json.loads(files.pop("conversion.json"))["files"] for files in (first, second)]
    assert first == second
    assert journals[0] == journals[1]
    assert len(first) > 5


def test_no_more_than_a_few_rows_or_one_expert_is_ever_read(
    two_layouts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory does not grow with the model: of what was read, one piece is kept while the next is read."""
    monkeypatch.setattr(hf_export, "ROWS_ELEMENTS", 1)
    source = Watched(CheckpointReader(two_layouts[0]))
    exported(source, tmp_path / "hf", format="fp8")  # type: ignore[arg-type]
    # 128 rows of the widest matrix, or one expert's gate and up. The embedding alone is four times that.
    rows = 128 * max(shape[-1] for shape in map(source.shape, source.names()) if len(shape) == 2)
    expert = 2 * CONFIG.moe_intermediate_size * CONFIG.hidden_size
    assert source.largest <= max(rows, expert)
    assert source.peak <= 2 * max(rows, expert)


def test_a_value_that_is_not_finite_is_named(tmp_path: Path) -> None:
    model = lively(RAGGED, Precision("bf16"))
    with torch.no_grad():
        model.get_parameter("layers.1.mlp.experts.down_proj")[2, 135, 1] = torch.nan
    path = save_checkpoint(tmp_path / "checkpoints/step_00000001", model)
    with pytest.raises(ValueError, match=r"NaN or infinity in layers\.1\.mlp\.experts\.down_proj"):
        exported(path, tmp_path / "hf")
    assert not (tmp_path / "hf/config.json").exists()


def test_a_source_without_all_weights_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model = lively(replace(RAGGED, n_routed_experts=2, n_group=1), Precision("bf16"))
    model.config = RAGGED
    path = save_checkpoint(tmp_path / "checkpoints/step_00000001", model)
    with pytest.raises(
        ValueError, match=r"holds layers\.1\.mlp\.gate\.weight as \[2, 136\], which has no model\.layers\.1"
    ):
        exported(path, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
