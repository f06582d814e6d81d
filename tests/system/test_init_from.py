"""A new run begins with the weights of another: of a checkpoint of any layout, or of a Hugging Face folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import train.huggingface.weights
from kernels.config import YarnScaling
from parallel.layout import Layout
from parallel.mesh import make_mesh, single
from parallel.shards import LocalShard
from tests.ranks import run_ranks
from tests.tiny_model import TINY
from train.assemble import build_alone, build_engine, first_weights
from train.checkpoint.dcp import save
from train.config import PretrainConfig, compose
from train.huggingface.weights import CheckpointReader, WeightSource, open_weights
from train.model.config import ModelConfig
from train.model.precision import Precision
from train.model.transformer import Transformer
from train.optim.config import OptimConfig
from train.step import checkpoint_tensors
from train.trainer import Trainer
from train.worker import WorkerInfo, pretrain

CONFIG = replace(TINY, num_hidden_layers=5)
CPU = torch.device("cpu")


@pytest.fixture
def config(small_config: Callable[..., PretrainConfig], tmp_path: Path) -> PretrainConfig:
    """Two steps, not scored."""
    config = small_config(tmp_path, "schedule.total_tokens=128", "data.heldout=null", "run.name=new")
    return replace(config, run=replace(config.run, init_from=str(tmp_path / "old")))


@pytest.fixture
def old(trained_run: Path, tmp_path: Path) -> Path:
    """A copy of a finished run that a test may spoil."""
    shutil.copytree(trained_run, tmp_path / "old")
    return tmp_path / "old"


def saved_model(path: Path, config: ModelConfig, precision: Precision) -> Path:
    """A checkpoint with weights that no seed of ours draws."""
    generator = torch.Generator().manual_seed(99)
    tensors = {
        f"model.{name}": torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        for name, tensor in Transformer(config, precision).state_dict().items()
    }
    save(path, tensors=tensors, state={"config": {"model": asdict(config), "precision": asdict(precision)}})
    return path


def test_the_first_weights_and_masters_are_the_old_runs(config: PretrainConfig, old: Path) -> None:
    source = open_weights(old)
    engine = build_alone(config).engine
    masters = engine.optimizer.masters()
    for name, tensor in engine.models[0].state_dict().items():
        expected = source.read(name)
        assert torch.equal(tensor, expected)
        if name in masters:
            assert torch.equal(masters[name].tensor, expected.float().flatten())


def test_a_run_opens_its_first_weights_once(config: PretrainConfig, old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of many shards is read by its headers each time it is opened, on every rank."""
    sources: list[WeightSource] = []

    def counted(path: Path) -> WeightSource:
        sources.append(open_weights(path))
        return sources[-1]

    monkeypatch.setattr(train.huggingface.weights, "open_weights", counted)
    # The run is built and resumed as ever; its steps read no weights.
    monkeypatch.setattr(Trainer, "fit", lambda trainer: trainer.state)
    pretrain(config, WorkerInfo())
    (source,) = sources
    assert isinstance(source, CheckpointReader)
    assert source.path.parent.parent == old
    assert len(source._files) == 0, "no file stays open for the length of the run"


def test_a_resume_takes_the_runs_own_checkpoint_and_needs_the_old_one_no_more(
    config: PretrainConfig, old: Path
) -> None:
    first = Trainer(config, build_alone(config))
    first.fit()
    shutil.rmtree(old)
    again = Trainer(config, build_alone(config))
    again.resume()
    assert again.state == first.state
    for name, tensor in first.engine.models[0].state_dict().items():
        assert torch.equal(again.engine.models[0].state_dict()[name], tensor)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_with_drawn_weights(
    config: PretrainConfig, old: Path
) -> None:
    checkpoint = old.parent / "new" / "checkpoints" / "step_00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    trainer = Trainer(config, build_alone(config))
    with pytest.raises(
        ValueError, match=r"no checkpoint in .*new/checkpoints is whole.*step_00000001 is damaged.*move them away"
    ):
        trainer.resume()


def test_weights_of_another_model_are_refused(config: PretrainConfig, old: Path) -> None:
    other = replace(config, model=replace(config.model, n_routed_experts=2 * config.model.n_routed_experts))
    with pytest.raises(ValueError, match=r"run\.init_from=.*old holds a model with n_routed_experts=\d+, but model"):
        first_weights(other)


# Of a small context extension: YaRN over the small run's own 32 tokens.
ORIGINAL = "model.rope_scaling.original_max_position_embeddings=32"


def test_context_extension_goes_from_run_to_run(small_run: Callable[..., list[str]], old: Path, tmp_path: Path) -> None:
    """YaRN is added to the weights of pre-training, each phase begins with the last one's, and none may lose it."""
    source, place = old, f"run.directory={tmp_path}"
    for name, length in (("extend_32k", 64), ("extend_128k", 128)):
        budget = f"schedule.total_tokens={2 * 2 * length}"
        phase = [f"+stage={name}", ORIGINAL, f"data.sequence_length={length}", budget, "data.heldout=null", place]
        config = compose(small_run(*phase, f"run.init_from={source}"))
        trainer = Trainer(config, build_alone(config))
        assert torch.equal(trainer.engine.models[0].lm_head.weight, open_weights(source).read("lm_head.weight"))
        trainer.fit()
        assert (trainer.state.step, trainer.state.tokens_seen) == (2, config.schedule.total_tokens)
        source = tmp_path / name
    assert open_weights(source).config.rope_scaling == YarnScaling(40.0, 32, 32.0, 1.0, 1.0, 1.0)
    yarn = [f"+stage={name}", ORIGINAL, f"run.init_from={source}", "run.name=other", place]
    for change in (["model.rope_scaling=null"], ["model.rope_scaling.factor=8", ORIGINAL]):
        wrong = compose(small_run(*(each for each in yarn if each != ORIGINAL), *change))
        with pytest.raises(
            ValueError, match=r"a model with rope_scaling=\{'factor': 40\.0.*give the run the model's own"
        ):
            first_weights(wrong)


def test_a_folder_without_a_model_is_refused(config: PretrainConfig) -> None:
    with pytest.raises(ValueError, match="there is no folder"):
        first_weights(config)


def test_mtp_layers_that_the_source_lacks_keep_their_drawn_values(tmp_path: Path) -> None:
    precision, optim = Precision("fp32"), OptimConfig()
    path = saved_model(tmp_path / "step_00000001", replace(CONFIG, num_nextn_predict_layers=0), precision)
    mesh = single(CPU)
    drawn = build_engine(CONFIG, precision, optim, mesh, seed=1).models[0].state_dict()
    begun = build_engine(CONFIG, precision, optim, mesh, seed=1, source=open_weights(path)).models[0].state_dict()
    for name, tensor in begun.items():
        assert torch.equal(tensor, drawn[name]) == name.startswith("mtp."), name


def filled_alike(rank: int, world: int, path: str, layout: Layout) -> int:
    """How many tensors this rank holds that came out of the source at their place; all of them, or it fails."""
    mesh = make_mesh(layout, device=CPU, tied_embedding=True, timeout_s=60)
    source = open_weights(Path(path))
    engine = build_engine(CONFIG, Precision("bf16"), OptimConfig(), mesh, seed=1, source=source)
    compared = 0
    for key, value in checkpoint_tensors(engine).items():
        if not key.startswith("model."):
            continue
        expected = source.read(key.removeprefix("model."))
        if isinstance(value, LocalShard):
            assert value.tensor.shape[0] < expected.shape[0]
            expected, value = expected[value.shard.offsets[0] :][: len(value.tensor)], value.tensor
        assert torch.equal(value, expected), key
        compared += 1
    return compared


def test_each_rank_of_a_layout_reads_its_layers_and_experts(tmp_path: Path) -> None:
    path = saved_model(tmp_path / "step_00000001", CONFIG, Precision("bf16"))
    counts = run_ranks(4, filled_alike, str(path), Layout(pp=2, dp=2, ep=2, schedule="ZBVZeroBubble"))
    assert min(counts) > 10
