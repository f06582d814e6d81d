"""A configuration is either exactly what was asked for or one sentence that names mistake and cure."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import train.config
from train.config import CONFIGS, ConfigError, PretrainConfig, build, compose, to_yaml

# Overrides -> what the sentence must say: the key as given and the nearest valid name, or the cure.
MISTAKES = {
    "unknown option": (["model=tinny"], "model=tinny does not exist: did you mean model=tiny?"),
    "unknown cluster": (["+cluster=h100"], "did you mean +cluster=h100_1?"),
    "no option": (["model=null"], "model=null does not exist"),
    "unknown group": (["modle=tiny"], "modle is not a configuration key: did you mean model?"),
    "unknown field": (
        ["model.hiden_size=3"],
        "model.hiden_size is not a configuration key: did you mean model.hidden_size?",
    ),
    "unknown section": (["schedul.lr_peak=1"], "did you mean schedule.lr_peak?"),
    "forgotten section": (
        ["lr_peak=1e-3"],
        "lr_peak is not a configuration key: did you mean schedule.lr_peak?",
    ),
    "unknown added key": (["+run.sed=3"], "run.sed is not a configuration key: did you mean run.seed?"),
    "unknown forced key": (
        ["++optim.epsilon=3"],
        "optim.epsilon is not a configuration key: did you mean optim.eps?",
    ),
    "unknown nested key": (["model.rope_scaling={factr: 4.0}"], "did you mean model.rope_scaling.factor?"),
    "incomplete nested section": (
        ["model.rope_scaling={factor: 4.0}"],
        "original_max_position_embeddings is missing",
    ),
    "Hydra's own key": (["hydra.run.dir=x"], "hydra.run.dir is not a configuration key"),
    "text for a number": (["schedule.lr_peak=abc"], "schedule.lr_peak=abc must be a number, not str"),
    "fraction for a whole number": (["run.seed=1.5"], "run.seed=1.5 must be a whole number, not float"),
    "truth for a number": (["run.seed=true"], "run.seed=True must be a whole number, not bool"),
    "number for a truth": (["run.resume=1"], "run.resume=1 must be true or false, not int"),
    "number for a text": (
        ["run.name=7"],
        "run.name=7 must be text, not int; to mean the text, write 'run.name=\"7\"'",
    ),
    "null for a number": (["run.seed=null"], "run.seed=None must be a whole number"),
    "not a number": (["schedule.lr_peak=nan"], "schedule.lr_peak=nan must be a finite number"),
    "too short a list": (["optim.betas=[0.9]"], "optim.betas=[0.9] must be a list of 2 values"),
    "wrong item of a list": (["optim.betas=[0.9,x]"], "optim.betas[1]=x must be a number"),
    "unknown choice": (
        ["run.device=cudda"],
        "run.device=cudda is not one of auto, cpu, cuda: did you mean run.device=cuda?",
    ),
    "unknown precision": (["precision.name=fp9"], "did you mean precision.name=fp8?"),
    "a section as a value": (["run=foo"], "run is a section: set its fields one by one, such as run.name"),
    "given twice": (
        ["run.seed=1", "run.seed=2"],
        "run.seed is given twice, as 'run.seed=1' and 'run.seed=2'",
    ),
    "not an override": (["lr"], "'lr' is not an override: write key=value"),
    "an option of another program": (["--help"], "'--help' is not an override"),
    "empty key": (["=3"], "'=3' is not an override"),
    "a sweep": (["run.seed=1,2"], "'run.seed=1,2' sweeps over several values"),
    "a deletion": (["~run.name"], "'~run.name' would delete run.name"),
    "a moved group": (["model@x=tiny"], "write model=... without '@'"),
    "cluster without plus": (["cluster=h100_1"], "write +cluster=h100_1, with the plus sign"),
    "group with plus": (["+model=tiny"], "write model=tiny, without the plus sign"),
    "interpolation to nowhere": (["schedule.lr_peak=${nothing.here}"], "schedule.lr_peak"),
    "no value": (["schedule.lr_peak=???"], "schedule.lr_peak"),
    "name of no folder": (["run.name=../x"], "run.name='../x' names a folder"),
    "no folder": (["run.directory=''"], "run.directory is empty"),
    "negative seed": (["run.seed=-1"], "run.seed=-1 is out of range"),
    "no micro-batch": (
        ["run.micro_batch_sequences=0"],
        "run.micro_batch_sequences=0 is too small: use 1 or more",
    ),
    "no threads": (["run.threads=0"], "run.threads=0 is too small: use 1 or more"),
}

# The same for values that are fine alone and contradict each other.
CONTRADICTIONS = {
    "sequence beyond the positions": (
        ["data.sequence_length=8192"],
        "data.sequence_length=8192 exceeds model.max_position_embeddings=4096",
    ),
    "no target for MTP": (
        ["data.sequence_length=2", "model.num_nextn_predict_layers=2"],
        "leaves no target at MTP depth model.num_nextn_predict_layers=2: use a sequence longer than 2",
    ),
    "batch not of whole micro-batches": (
        ["schedule.batch_multiple_sequences=2", "run.micro_batch_sequences=4"],
        "schedule.batch_multiple_sequences=2 is not a multiple of run.micro_batch_sequences=4",
    ),
    "budget below one step": (
        ["schedule.total_tokens=100"],
        "schedule.total_tokens=100 is less than one step's 512 tokens",
    ),
    "scores of nothing": (
        ["data.heldout=null", "run.eval_every_steps=5"],
        "run.eval_every_steps=5 asks for scores but data.heldout is null",
    ),
    "groups that do not divide the experts": (["model.n_group=3"], "model.n_routed_experts=8"),
    "more experts than the chosen groups hold": (
        ["model.num_experts_per_tok=5"],
        "model.num_experts_per_tok=5",
    ),
    "odd rotary part": (["model.qk_rope_head_dim=31"], "model.qk_rope_head_dim=31 must be even"),
    "break points out of order": (
        ["schedule.decay_until_tokens=1000", "schedule.constant_until_tokens=2000"],
        "schedule.constant_until_tokens = 2000 is above schedule.decay_until_tokens = 1000",
    ),
    "decay rate of a moment": (["optim.betas=[0.9,1.5]"], "optim.betas = (0.9, 1.5)"),
}


@pytest.mark.parametrize(("overrides", "sentence"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_on_the_command_line_is_one_sentence(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        compose(["experiment=tiny", *overrides])
    message = str(refused.value)
    assert sentence in message
    assert "\n" not in message


@pytest.mark.parametrize(("overrides", "sentence"), CONTRADICTIONS.values(), ids=CONTRADICTIONS.keys())
def test_a_contradiction_is_one_sentence(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        compose(overrides)
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


# File below configs/, text to replace, replacement, what the sentence must say.
FILE_MISTAKES = {
    "unknown field": ("model/tiny.yaml", "hidden_size:", "hiden_size:", "did you mean model.hidden_size?"),
    "missing field": ("model/tiny.yaml", "vocab_size: 1024", "", "model.vocab_size is missing"),
    "wrong type": (
        "optim/adamw.yaml",
        "clip_norm: 1.0",
        "clip_norm: one",
        "optim.clip_norm=one must be a number",
    ),
    "unknown field of run": ("pretrain.yaml", "  seed: 1234", "  sead: 1234", "did you mean run.seed?"),
    "unknown field of an experiment": (
        "experiment/tiny.yaml",
        "  name: tiny",
        "  nam: tiny",
        "did you mean run.name?",
    ),
    "unknown option of an experiment": ("experiment/tiny.yaml", "/model: tiny", "/model: tinny", "tinny"),
    "field given twice": (
        "optim/adamw.yaml",
        "clip_norm: 1.0",
        "clip_norm: 1.0\nclip_norm: 2.0",
        "clip_norm",
    ),
    "not YAML": ("optim/adamw.yaml", "clip_norm: 1.0", "clip_norm: [1.0", "adamw.yaml"),
    "a list for a section": ("pretrain.yaml", "\nrun:", "\noptimizer: [1]\nrun:", "did you mean optim?"),
}


@pytest.mark.parametrize(("file", "old", "new", "sentence"), FILE_MISTAKES.values(), ids=FILE_MISTAKES.keys())
def test_a_mistake_in_a_file_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, old: str, new: str, sentence: str
) -> None:
    copy = tmp_path / "configs"
    shutil.copytree(CONFIGS, copy)
    text = (copy / file).read_text()
    assert text.count(old) == 1
    (copy / file).write_text(text.replace(old, new))
    monkeypatch.setattr(train.config, "CONFIGS", copy)
    with pytest.raises(ConfigError) as refused:
        compose(["experiment=tiny"])
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def test_overrides_reach_the_dataclasses_with_their_types() -> None:
    config = compose(
        [
            "experiment=tiny",
            "precision=fp8",
            "schedule.total_tokens=3e5",
            "optim.betas=[0.8,1e-1]",
            "optim.eps=1",
            "data.heldout=null",
            'run.name="7"',
            "run.threads=2",
            "++run.seed=5",
        ]
    )
    assert (config.precision.name, config.optim.betas, config.data.heldout) == ("fp8", (0.8, 0.1), None)
    assert (config.run.name, config.run.threads, config.run.seed) == ("7", 2, 5)
    assert type(config.schedule.total_tokens) is int
    assert config.schedule.total_tokens == 300_000
    assert type(config.optim.eps) is float


def test_yarn_can_be_switched_on_from_the_command_line() -> None:
    fields = "factor: 40, original_max_position_embeddings: 4096, beta_fast: 32, beta_slow: 1"
    config = compose([f"model.rope_scaling={{{fields}, mscale: 1, mscale_all_dim: 1}}"])
    assert config.model.rope_scaling is not None
    assert config.model.rope_scaling.factor == 40.0


def test_the_composed_configuration_is_frozen() -> None:
    config = compose([])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.run = config.run  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.run.seed = 3  # type: ignore[misc]


def test_composing_does_not_depend_on_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = compose(["+cluster=h100_1"])
    monkeypatch.chdir(tmp_path)
    assert compose(["+cluster=h100_1"]) == here
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("overrides", [[], ["experiment=tiny"], ["+cluster=h100_1"], ["model=ragged_test"]])
def test_the_run_directory_copy_reads_back_equal(overrides: list[str]) -> None:
    config = compose(overrides)
    assert build(PretrainConfig, yaml.safe_load(to_yaml(config)), "") == config


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)


@given(st.sampled_from([bool, int, float, str]), scalars)
def test_a_scalar_keeps_its_value_or_is_refused(kind: type, value: object) -> None:
    """Only an int becomes a float and an integral float an int; nothing else is converted or lost."""
    finite = not isinstance(value, float) or math.isfinite(value)
    integral = kind is int and type(value) is float and finite and value.is_integer()
    if finite and (type(value) is kind or integral or (kind is float and type(value) is int)):
        built = build(kind, value, "a.b")
        assert type(built) is kind
        assert built == kind(value)
    else:
        with pytest.raises(ConfigError, match=r"^a\.b="):
            build(kind, value, "a.b")
