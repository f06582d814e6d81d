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
from launch.meeting import network_environment
from train.config import CONFIGS, ConfigError, PretrainConfig, compose, convert, to_yaml

# Overrides -> what the sentence must say: the key as given and the nearest valid name, or the cure.
MISTAKES = {
    "unknown option": (["model=tinny"], "model=tinny does not exist: did you mean model=tiny?"),
    "unknown cluster": (["+cluster=h800"], "did you mean +cluster=h800_2048?"),
    "unknown layout": (["layout=h800"], "layout=h800 does not exist: did you mean layout=h800_2048?"),
    "unknown schedule of a pipeline": (
        ["layout.schedule=1F1X"],
        "layout.schedule=1F1X is not a pipeline schedule: did you mean layout.schedule=1F1B?",
    ),
    "misspelt group whose name is also a field": (["schdule=tiny"], "did you mean schedule?"),
    "text for a size": (["layout.dp=two"], "layout.dp=two must be a whole number, not str"),
    "a number for a list": (["layout.stage_layers=3"], "layout.stage_layers=3 must be a list of values"),
    "wrong item of a list of any length": (
        ["layout.stage_layers=[1,x]"],
        "layout.stage_layers[1]=x must be a whole number",
    ),
    "number for a variable": (
        ["+network.environment.NCCL_IB_TIMEOUT=22"],
        "must be text, not int; to mean the text, write 'network.environment.NCCL_IB_TIMEOUT=\"22\"'",
    ),
    "variable of something else": (["+network.environment.PATH=x"], "network.environment.PATH is no variable of"),
    "new variable without plus": (["network.environment.NCCL_NET=IB"], "use +network.environment.NCCL_NET=IB"),
    "no section of variables": (["network.environment=3"], "network.environment=3 must be a section of names"),
    "unknown transport": (["network.backend=mpi"], "network.backend=mpi is not one of auto, gloo, nccl"),
    "no option": (["model=null"], "model=null does not exist"),
    "unknown group": (["modle=tiny"], "modle is not a configuration key: did you mean model?"),
    "unknown field": (
        ["model.hiden_size=3"],
        "model.hiden_size is not a configuration key: did you mean model.hidden_size?",
    ),
    "unknown section": (["schedul.lr_peak=1"], "did you mean schedule.lr_peak?"),
    "forgotten section": (["lr_peak=1e-3"], "lr_peak is not a configuration key: did you mean schedule.lr_peak?"),
    "unknown added key": (["+run.sed=3"], "run.sed is not a configuration key: did you mean run.seed?"),
    "unknown forced key": (["++optim.epsilon=3"], "optim.epsilon is not a configuration key: did you mean optim.eps?"),
    "unknown nested key": (["model.rope_scaling={factr: 4.0}"], "did you mean model.rope_scaling.factor?"),
    "incomplete nested section": (["model.rope_scaling={factor: 4.0}"], "original_max_position_embeddings is missing"),
    "Hydra's own key": (["hydra.run.dir=x"], "hydra.run.dir is not a configuration key"),
    "text for a number": (["schedule.lr_peak=abc"], "schedule.lr_peak=abc must be a number, not str"),
    "fraction for a whole number": (["run.seed=1.5"], "run.seed=1.5 must be a whole number, not float"),
    "truth for a number": (["run.seed=true"], "run.seed=True must be a whole number, not bool"),
    "number for a truth": (["run.resume=1"], "run.resume=1 must be true or false, not int"),
    "number for a text": (["run.name=7"], "run.name=7 must be text, not int; to mean the text, write 'run.name=\"7\"'"),
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
    "given twice": (["run.seed=1", "run.seed=2"], "run.seed is given twice, as 'run.seed=1' and 'run.seed=2'"),
    "not an override": (["lr"], "'lr' is not an override: write key=value"),
    "an option of another program": (["--help"], "'--help' is not an override"),
    "empty key": (["=3"], "'=3' is not an override"),
    "a sweep": (["run.seed=1,2"], "'run.seed=1,2' sweeps over several values"),
    "a deletion": (["~run.name"], "'~run.name' would delete run.name"),
    "a moved group": (["model@x=tiny"], "write model=... without '@'"),
    "cluster without plus": (["cluster=h100_1"], "write +cluster=h100_1, with the plus sign"),
    "stage without plus": (["stage=sft"], "write +stage=sft, with the plus sign"),
    "what only the command line knows": (
        ["+stage=sft", "schedule.total_tokens=1e6"],
        "run.init_from has no value here: give one on the command line, such as run.init_from=runs/tiny",
    ),
    "group with plus": (["+model=tiny"], "write model=tiny, without the plus sign"),
    "interpolation to nowhere": (["schedule.lr_peak=${nothing.here}"], "schedule.lr_peak"),
    "no value": (["schedule.lr_peak=???"], "schedule.lr_peak"),
    "name of no folder": (["run.name=../x"], "run.name='../x' names a folder"),
    "no folder": (["run.directory=''"], "run.directory is empty"),
    "negative seed": (["run.seed=-1"], "run.seed=-1 is out of range"),
    "no micro-batch": (["run.micro_batch_sequences=0"], "run.micro_batch_sequences=0 is too small: use 1 or more"),
    "no threads": (["run.threads=0"], "run.threads=0 is too small: use 1 or more"),
}

# The same for values that are fine alone and contradict each other.
CONTRADICTIONS = {
    "measured products in a deterministic run": (
        ["experiment=tiny", "kernels.backend=deepgemm"],
        "kernels.backend=deepgemm does not go with run.deterministic=true: which products",
    ),
    "FP8's products in BF16": (
        ["experiment=tiny", "kernels.backend=deepgemm", "run.deterministic=false", "precision=bf16"],
        "precision=bf16 has no such product of ours: set kernels.backend=gluon, or precision=fp8",
    ),
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
        "schedule.batch_multiple_sequences=2 is not a multiple of layout.dp=1 x run.micro_batch_sequences=4 = 4",
    ),
    "batch not of whole micro-batches on every data rank": (
        ["layout.dp=2", "schedule.batch_multiple_sequences=1"],
        "schedule.batch_multiple_sequences=1 is not a multiple of layout.dp=2 x run.micro_batch_sequences=1 = 2",
    ),
    "experts that do not divide": (
        ["layout.dp=6", "layout.ep=3", "schedule.batch_start_sequences=6", "schedule.batch_full_sequences=6"],
        "layout.ep=3 does not divide model.n_routed_experts=8: on layout.dp=6 use layout.ep=2",
    ),
    "cluster with too small a model": (
        ["+cluster=h800_2048", "model=tiny"],
        "layout.ep=64 does not divide model.n_routed_experts=8: on layout.dp=128 use layout.ep=8",
    ),
    "layout without so many layers": (
        ["layout.pp=4"],
        "layout.pp=4 with layout.schedule=1F1B makes 4 stages of model.num_hidden_layers=3",
    ),
    "too few micro-batches for the schedule": (
        ["layout.pp=3"],
        "takes 3 or more: use schedule.batch_start_sequences=3 or layout.pp=2",
    ),
    "a 12-bit output without FP8": (
        ["precision=bf16", "precision.attention_output=e5m6"],
        "goes with precision=fp8 only, and this is bf16: set precision.attention_output=bf16",
    ),
    "an odd number of 12-bit values": (
        ["precision=fp8", "precision.attention_output=e5m6", "model.num_attention_heads=3", "model.v_head_dim=5"],
        "model.num_attention_heads=3 x model.v_head_dim=5 of them, an odd number",
    ),
    "a death that is noticed too late": (
        ["network.peer_timeout_s=600"],
        "network.peer_timeout_s=600 is not below network.timeout_s=600",
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
    "more experts than the chosen groups hold": (["model.num_experts_per_tok=5"], "model.num_experts_per_tok=5"),
    "odd rotary part": (["model.qk_rope_head_dim=31"], "model.qk_rope_head_dim=31 must be even"),
    "break points out of order": (
        ["schedule.decay_until_tokens=1000", "schedule.constant_until_tokens=2000"],
        "schedule.constant_until_tokens = 2000 is above schedule.decay_until_tokens = 1000",
    ),
    "decay rate of a moment": (["optim.betas=[0.9,1.5]"], "optim.betas = (0.9, 1.5)"),
}


def refused(overrides: list[str], sentence: str) -> None:
    """One sentence says so."""
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("overrides", "sentence"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_on_the_command_line_is_one_sentence(overrides: list[str], sentence: str) -> None:
    refused(["experiment=tiny", *overrides], sentence)


@pytest.mark.parametrize(("overrides", "sentence"), CONTRADICTIONS.values(), ids=CONTRADICTIONS.keys())
def test_a_contradiction_is_one_sentence(overrides: list[str], sentence: str) -> None:
    refused(overrides, sentence)


# File below configs/, text to replace, replacement, what the sentence must say.
FILE_MISTAKES = {
    "unknown field": ("model/tiny.yaml", "hidden_size:", "hiden_size:", "did you mean model.hidden_size?"),
    "missing field": ("model/tiny.yaml", "vocab_size: 1024", "", "model.vocab_size is missing"),
    "wrong type": ("optim/adamw.yaml", "clip_norm: 1.0", "clip_norm: one", "optim.clip_norm=one must be a number"),
    "unknown field of run": ("pretrain.yaml", "  seed: 1234", "  sead: 1234", "did you mean run.seed?"),
    "unknown field of an experiment": ("experiment/tiny.yaml", "  name: tiny", "  nam: tiny", "did you mean run.name?"),
    "unknown option of an experiment": ("experiment/tiny.yaml", "/model: tiny", "/model: tinny", "tinny"),
    "field given twice": ("optim/adamw.yaml", "clip_norm: 1.0", "clip_norm: 1.0\nclip_norm: 2.0", "clip_norm"),
    "not YAML": ("optim/adamw.yaml", "clip_norm: 1.0", "clip_norm: [1.0", "adamw.yaml"),
    "a list for a section": ("pretrain.yaml", "\nrun:", "\noptimizer: [1]\nrun:", "did you mean optim?"),
}


@pytest.mark.parametrize(("file", "old", "new", "sentence"), FILE_MISTAKES.values(), ids=FILE_MISTAKES.keys())
def test_a_mistake_in_a_file_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, old: str, new: str, sentence: str
) -> None:
    copy = Path(shutil.copytree(CONFIGS, tmp_path / "configs"))
    text = (copy / file).read_text()
    assert text.count(old) == 1
    (copy / file).write_text(text.replace(old, new))
    monkeypatch.setattr(train.config, "CONFIGS", copy)
    refused(["experiment=tiny"], sentence)


def test_overrides_reach_the_dataclasses_with_their_types() -> None:
    optim = ["optim.betas=[0.8,1e-1]", "optim.eps=1"]
    run = ['run.name="7"', "run.threads=2", "++run.seed=5"]
    others = ["experiment=tiny", "precision=fp8", "schedule.total_tokens=3e5", "data.heldout=null"]
    config = compose([*others, *optim, *run])
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


def test_a_list_of_any_length_and_a_new_variable_arrive() -> None:
    config = compose(["layout.pp=2", "layout.stage_layers=[2,1]", "+network.environment.NCCL_IB_HCA=mlx5"])
    assert config.layout.stage_layers == (2, 1)
    assert config.network.environment == {"NCCL_IB_HCA": "mlx5"}
    cluster = compose(["+cluster=h800_2048", 'network.environment.NCCL_IB_TIMEOUT="23"'])
    assert cluster.network.environment["NCCL_IB_TIMEOUT"] == "23"
    assert cluster.network.environment["NCCL_CROSS_NIC"] == "0"


def test_on_clusters_the_last_collectives_of_each_rank_go_into_the_runs_directory() -> None:
    variables = network_environment(compose(["+cluster=h800_2048", "run.directory=/runs", "run.name=x"]))
    assert variables["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] == "/runs/x/collectives_"
    assert (variables["TORCH_NCCL_TRACE_BUFFER_SIZE"], variables["TORCH_NCCL_DUMP_ON_TIMEOUT"]) == ("2000", "1")


@pytest.mark.parametrize(("dp", "micro"), [("1", "1"), ("2", "1"), ("1", "2"), ("2.0", "2")])
def test_the_batch_ramp_is_the_schedules_own_on_any_layout(dp: str, micro: str) -> None:
    batch = ["schedule.batch_start_sequences=4", "schedule.batch_full_sequences=12.0"]
    config = compose([*batch, f"layout.dp={dp}", f"run.micro_batch_sequences={micro}"])
    assert config.schedule.batch_multiple_sequences == 4
    with pytest.raises(ValueError, match=r"batch_multiple_sequences=4 is not a multiple of layout\.dp=3"):
        compose([*batch, "layout.dp=3", "run.micro_batch_sequences=1"])


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


RUNS = [[], ["experiment=tiny"], ["+cluster=h100_1"], ["+cluster=h800_2048"], ["model=ragged_test"]]


@pytest.mark.parametrize("overrides", [*RUNS, ["layout.pp=2", "layout.stage_layers=[1,2]"]])
def test_the_run_directory_copy_reads_back_equal(overrides: list[str]) -> None:
    config = compose(overrides)
    assert convert(PretrainConfig, yaml.safe_load(to_yaml(config)), "") == config


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)


@given(st.sampled_from([bool, int, float, str]), scalars)
def test_a_scalar_keeps_its_value_or_is_refused(kind: type, value: object) -> None:
    """Only an int becomes a float and an integral float an int; nothing else is converted or lost."""
    finite = not isinstance(value, float) or math.isfinite(value)
    integral = kind is int and type(value) is float and finite and value.is_integer()
    if finite and (type(value) is kind or integral or (kind is float and type(value) is int)):
        built = convert(kind, value, "a.b")
        assert type(built) is kind
        assert built == kind(value)
    else:
        with pytest.raises(ConfigError, match=r"^a\.b="):
            convert(kind, value, "a.b")


@pytest.mark.parametrize(
    "directory", ["runs/实验/lr=3", "it's a [dir] #1", "a b", "C:\\x", "{a: b", 'say "hi"', "(x)", "a\\'b"]
)
def test_a_path_is_taken_as_it_is_without_quotes_for_hydra(directory: str) -> None:
    assert compose([f"run.directory={directory}"]).run.directory == directory


def test_a_value_that_hydra_cannot_read_is_refused_by_its_type() -> None:
    with pytest.raises(ValueError, match=r"run\.seed=a=b must be a whole number, not str"):
        compose(["run.seed=a=b"])
