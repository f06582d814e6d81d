"""A Hugging Face folder says the same model to us, to `transformers`, and back; what is wrong in it is named.

config.json first, then folders that are wrong, partial or hostile: each is refused with one sentence.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import pickle
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, DeepseekV3Config

from kernels.config import YarnScaling
from tests.huggingface.hf_folders import BF16, RAGGED, Made, changed, tensors_of, write_index
from train.config import compose
from train.data.tokenizer import SPECIAL_TOKENS, train_byte_level_bpe
from train.data.trained_on import KEY, TrainedOn
from train.huggingface.config import is_fp8, released_config, small_files
from train.huggingface.import_weights import import_hf
from train.huggingface.reader import INDEX, HfReader
from train.huggingface.safetensors_files import OpenFiles, pointer_or
from train.huggingface.weights import open_weights
from train.model.config import ModelConfig
from train.model.published import model_config

YARN = YarnScaling(40.0, 16, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0)
YARN_JSON = {"type": "yarn", **vars(YARN)}
CASES = {
    "plain": RAGGED,
    "YaRN": dataclasses.replace(RAGGED, rope_scaling=YARN, rope_theta=50000.0),
    "no query latent, no MTP": dataclasses.replace(RAGGED, q_lora_rank=None, num_nextn_predict_layers=0),
    "spread of its own": dataclasses.replace(RAGGED, embedding_initializer_range=0.3),
}


def released(**fields: Any) -> dict[str, Any]:
    return {**released_config(RAGGED, format="bf16"), **fields}


@pytest.mark.parametrize("config", CASES.values(), ids=CASES.keys())
def test_our_file_comes_back_as_it_was(config: ModelConfig) -> None:
    assert model_config(released_config(config, format="bf16"), origin="config.json") == config


@pytest.mark.parametrize("config", CASES.values(), ids=CASES.keys())
def test_what_transformers_makes_of_our_file_comes_back_as_it_was(config: ModelConfig, tmp_path: Path) -> None:
    """It spells RoPE as `rope_parameters` when it saves; only what it does not know at all may be lost."""
    theirs = DeepseekV3Config(**released_config(config, format="bf16"))
    assert theirs.rope_parameters["rope_theta"] == config.rope_theta
    saved = theirs.to_dict() | {"architectures": ["DeepseekV3ForCausalLM"]}
    assert "rope_scaling" not in saved
    assert model_config(saved, origin="config.json") == config


# The fields of the released `config.json`, as public copies have them; `scale_fmt` is V3.1's.
V3_1: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.44.2",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}


@pytest.mark.parametrize("name", ["extend_32k", "extend_128k"])
def test_the_published_file_is_the_model_that_context_extension_leaves(name: str) -> None:
    """Read, it is our V3 with the stage's YaRN; written, it says YaRN and its length as published."""
    read = model_config(V3_1, origin="config.json")
    stage = compose(["model=v3_671b", "data=text", "schedule=v3", f"+stage={name}", "run.init_from=runs/v3"])
    assert read == dataclasses.replace(stage.model, initializer_range=0.02)
    assert is_fp8(V3_1, origin="config.json")
    written = released_config(stage.model, format="fp8")
    differing = {"initializer_range", "auto_map", "transformers_version", "quantization_config"}
    assert {name: written[name] for name in V3_1.keys() - differing} == {
        name: value for name, value in V3_1.items() if name not in differing
    }


def test_fp8_says_how_it_is_quantised() -> None:
    values = released_config(RAGGED, format="fp8")
    expected = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
    assert values["quantization_config"] == expected
    assert is_fp8(values, origin="config.json")
    assert not is_fp8(released(), origin="config.json")


REFUSED: dict[str, dict[str, Any]] = {
    r"model_type=\"llama\", which is not one of deepseek_v3, kimi_k2,": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
    },
    r"model_type=null, which is not one of": {"model_type": None},
    r"model_type=kimi_k2 but architectures=\[\"KimiLinearForCausalLM\"\], where models of that type have Deepseek": {
        "architectures": ["KimiLinearForCausalLM"],
        "model_type": "kimi_k2",
    },
    r"topk_method=\"group_limited_greedy\", but this model knows \"greedy\" only": {
        "model_type": "deepseek_v2",
        "architectures": ["DeepseekV2ForCausalLM"],
        "scoring_func": "softmax",
        "topk_method": "group_limited_greedy",
    },
    r"mlp_layer_types=\[\"sparse\", \"dense\", \"sparse\"\], but this model has dense layers first": {
        "model_type": "glm4_moe_lite",
        "architectures": ["Glm4MoeLiteForCausalLM"],
        "mlp_layer_types": ["sparse", "dense", "sparse"],
    },
    r"contradicts itself: mlp_layer_types begins with 2 dense layers, first_k_dense_replace=1": {
        "model_type": "glm4_moe_lite",
        "architectures": ["Glm4MoeLiteForCausalLM"],
        "mlp_layer_types": ["dense", "dense", "sparse"],
    },
    r"attention_bias=true": {"attention_bias": True},
    r"mlp_bias=true": {"mlp_bias": True},
    r"sliding_window=128": {"sliding_window": 128},
    r"index_topk=2048": {"index_topk": 2048},
    r"tie_word_embeddings=true": {"tie_word_embeddings": True},
    r"hidden_act=\"gelu": {"hidden_act": "gelu"},
    r"scoring_func=\"softmax": {"scoring_func": "softmax"},
    r"topk_method=\"greedy": {"topk_method": "greedy"},
    r"moe_layer_freq=2": {"moe_layer_freq": 2},
    r"num_key_value_heads=1": {"num_key_value_heads": 1},
    r"scales RoPE by \"linear\"": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    r"rope_scaling has attention_factor=1\.0": {
        "rope_scaling": {"type": "yarn", "factor": 2.0, "attention_factor": 1.0}
    },
    r"lacks rope_scaling\.factor": {"rope_scaling": {"type": "yarn"}},
    r"hidden_size is \"wide\", not int": {"hidden_size": "wide"},
    r"n_routed_experts is true, not int": {"n_routed_experts": True},
    r"model_type=\[\"x\\n\"\], which is not one of": {"architectures": {"0": 1}, "model_type": ["x\n"]},
    r"architectures={\"0\": 1}, where models of that type": {"architectures": {"0": 1}},
    r"attention_bias=0, but": {"attention_bias": 0},
    r"rope_theta is null, not float": {"rope_theta": None},
    r"rope_scaling is \"yarn\", not an object": {"rope_scaling": "yarn"},
    r"rope_parameters is \[\], not an object": {"rope_parameters": []},
    r"rope_parameters\.rope_theta is \"1\", not float": {"rope_parameters": {"rope_theta": "1"}},
    r"rope_scaling\.factor is \"40\", not float": {"rope_scaling": {**YARN_JSON, "factor": "40"}},
    r"rope_scaling\.factor is null, not float": {"rope_scaling": {**YARN_JSON, "factor": None}},
    r"rope_scaling\.original_max_position_embeddings is 1\.5, not int": {
        "rope_scaling": {**YARN_JSON, "original_max_position_embeddings": 1.5}
    },
    r"rope_scaling\.beta_fast is true, not float": {"rope_scaling": {**YARN_JSON, "beta_fast": True}},
    r"rope_scaling has partial_rotary_factor=0\.5": {"rope_scaling": {**YARN_JSON, "partial_rotary_factor": 0.5}},
    r"of type default has \"factor\"": {"rope_scaling": {"factor": 2.0}},
    r"contradicts itself: rope_scaling has rope_type=\"default\", type=\"yarn\"": {
        "rope_scaling": {**YARN_JSON, "rope_type": "default"}
    },
    r"n_routed_experts=4, num_local_experts=8; keep": {"num_local_experts": 8},
    r"model\.rope_scaling\.factor=0\.0 must be positive": {"rope_scaling": {**YARN_JSON, "factor": 0}},
    r"model\.rms_norm_eps=nan must be positive": {"rms_norm_eps": float("nan")},
    r"model\.vocab_size=1000000000000 is out of range": {"vocab_size": 10**12},
}


@pytest.mark.parametrize(("message", "fields"), REFUSED.items())
def test_what_this_model_cannot_compute_is_refused(message: str, fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^config\.json.* {message}"):
        model_config(released(**fields), origin="config.json")


def test_what_a_file_leaves_out_is_asked_for_and_without_a_word_there_is_no_mtp() -> None:
    """Libraries have other defaults than ours; `transformers` reads a V3 without these as V3 itself."""
    for name in ("q_lora_rank", "n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor", "n_shared_experts"):
        values = released()
        del values[name]
        with pytest.raises(ValueError, match=rf"^config\.json lacks {name}: "):
            model_config(values, origin="config.json")
    values = released()
    del values["num_nextn_predict_layers"]
    assert model_config(values, origin="config.json") == dataclasses.replace(RAGGED, num_nextn_predict_layers=0)


def test_two_spellings_of_rope_are_read_as_transformers_reads_them_or_refused() -> None:
    """Every pair of sections and base; what is refused contradicts itself, the rest is theirs, YaRN and base."""
    new = {"rope_type": "yarn", **vars(YARN), "rope_theta": 5e4}
    sections = [None, {}, {"type": "default"}, {"rope_type": "default", "rope_theta": 5e4}, YARN_JSON, new]
    read = []
    for scaling, parameters, theta in itertools.product(sections, sections, [{}, {"rope_theta": 1e4}]):
        values = {name: value for name, value in released().items() if not name.startswith("rope_")} | theta
        values |= {"rope_scaling": scaling, "rope_parameters": parameters}
        theirs = DeepseekV3Config(**copy.deepcopy(values)).rope_parameters
        with suppress(ValueError):
            ours = model_config(values, origin="config.json")
            assert ours.rope_theta == theirs["rope_theta"]
            assert (YARN if theirs["rope_type"] == "yarn" else None) == ours.rope_scaling
            read.append((scaling, parameters))
    # Most of 72 are read; the public case is YaRN added to a file of `transformers` 5, whose own type is default.
    assert len(read) > 36
    assert (YARN_JSON, {"type": "default"}) in read
    with pytest.raises(ValueError, match=r"contradicts itself: rope_scaling and rope_parameters scale differently"):
        model_config(released(rope_scaling={"type": "default"}, rope_parameters=YARN_JSON), origin="config.json")
    with pytest.raises(ValueError, match=r"contradicts itself: rope_theta=10000\.0, rope_parameters\.rope_theta=5"):
        model_config(released(rope_parameters={"rope_theta": 5e4}), origin="config.json")


@pytest.mark.parametrize("value", ["fp8", [], 5, True])
def test_a_quantisation_that_is_no_object_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^config\.json: quantization_config is .*, not an object"):
        is_fp8(released(quantization_config=value), origin="config.json")


def test_another_quantisation_is_refused() -> None:
    for field, value in (("quant_method", "gptq"), ("fmt", "e5m2"), ("weight_block_size", [64, 64])):
        settings = {**released_config(RAGGED, format="fp8")["quantization_config"], field: value}
        with pytest.raises(ValueError, match=f"quantised with {field}="):
            is_fp8(released(quantization_config=settings), origin="config.json")


def test_how_samples_looked_survives_our_file_and_that_of_transformers() -> None:
    trained_on = TrainedOn("eos", 256, mask_documents=True, tokenizer_sha256="ab" * 32)
    ours = json.loads(small_files(RAGGED, format="bf16", tokenizer=None, trained_on=trained_on)["config.json"])
    assert TrainedOn.from_json(ours, origin="config.json") == trained_on
    theirs = DeepseekV3Config(**ours).to_dict()
    assert TrainedOn.from_json(theirs, origin="config.json") == trained_on


def test_a_released_model_begins_with_bos_and_gets_no_mark() -> None:
    values = json.loads(small_files(RAGGED, format="bf16", tokenizer=None, trained_on=TrainedOn())["config.json"])
    assert KEY not in values
    assert TrainedOn.from_json(values, origin="config.json") == TrainedOn("bos", None, mask_documents=False)


@pytest.mark.parametrize(
    "mark",
    [5, {"first_token": "pad"}, {"mask_documents": None}, {"new_field": 1}]
    + [{"sequence_length": length} for length in ("long", 0, -4, True)],
)
def test_a_mark_of_another_kind_is_refused(mark: Any) -> None:
    with pytest.raises(ValueError, match=rf"^config\.json has {KEY}=.*export the model again"):
        TrainedOn.from_json({KEY: mark}, origin="config.json")


def test_a_missing_field_is_named() -> None:
    values = {name: value for name, value in released().items() if name != "kv_lora_rank"}
    with pytest.raises(ValueError, match=r"config\.json lacks kv_lora_rank"):
        model_config(values, origin="config.json")


def test_the_tokeniser_gives_the_same_ids_in_transformers(tmp_path: Path) -> None:
    texts = ["In the beginning", "the earth was without form, and void\n\n", "naïve 漢字 \t", "", " a  b "]
    ours = train_byte_level_bpe(texts * 3, vocab_size=290)
    for name, text in small_files(RAGGED, format="bf16", tokenizer=ours, trained_on=TrainedOn()).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(texts, add_special_tokens=False)["input_ids"] == ours.encode_batch(texts)
    assert [theirs.decode(ids) for ids in ours.encode_batch(texts)] == texts
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.special_ids.bos, ours.special_ids.eos)
    # A text that spells a control token: `transformers` reads the token, unless told that text is data.
    spelled = f"a {SPECIAL_TOKENS['eos']} b"
    careful = AutoTokenizer.from_pretrained(tmp_path, split_special_tokens=True)
    assert careful(spelled, add_special_tokens=False)["input_ids"] == ours.encode_batch([spelled])[0]
    assert ours.special_ids.eos in theirs(spelled)["input_ids"]


Change = Callable[[dict[str, Tensor]], None]
EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
EH_PROJ = "model.layers.3.eh_proj.weight"


@pytest.fixture
def good(made: Made) -> Path:
    return made.folder(BF16, "fp8")


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "hf"))


def refused(folder: Path, message: str) -> None:
    """Opening it says so."""
    with pytest.raises(ValueError, match=message):
        open_weights(folder)


def file_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def replaced(name: str, make: Callable[[Tensor], Tensor]) -> Change:
    return lambda tensors: tensors.update({name: make(tensors[name])})


def removed(name: str) -> Change:
    return lambda tensors: tensors.__delitem__(name)


def added(name: str) -> Change:
    return lambda tensors: tensors.update({name: torch.zeros(3)})


def test_the_folder_is_opened_as_any_other_source(good: Path) -> None:
    source = open_weights(good, "master")
    assert isinstance(source, HfReader)
    assert (source.config, source.notes) == (RAGGED, [])


def test_one_file_without_an_index_is_read(good: Path, tmp_path: Path) -> None:
    folder = changed(good, tmp_path / "one", lambda tensors: None)
    (folder / INDEX).unlink()
    (folder / "model-00001-of-00001.safetensors").rename(folder / "model.safetensors")
    several, one = HfReader(good), HfReader(folder)
    assert all(torch.equal(several.read(name), one.read(name)) for name in several.names())


def test_fp16_is_read_as_fp32(good: Path, tmp_path: Path) -> None:
    name = "model.norm.weight"
    folder = changed(good, tmp_path / "half", replaced(name, Tensor.half))
    assert torch.equal(HfReader(folder).read("norm.weight"), tensors_of(good)[name].half().float())


BIAS, OTHER = "model.layers.0.self_attn.q_proj.bias", EXPERT.replace(".2.", ".9.")
CHANGES: dict[str, tuple[Change, str]] = {
    "missing tensor": (removed(EXPERT), rf"lacks {EXPERT}: it is incomplete"),
    "missing MTP tensor": (removed(EH_PROJ), rf"lacks {EH_PROJ}"),
    "missing scale": (removed(f"{EXPERT}_scale_inv"), rf"lacks {EXPERT}_scale_inv"),
    "wrong shape": (replaced(EXPERT, lambda t: t[:-1]), rf"holds {EXPERT} as \[135, 136\], not \[136, 136\]"),
    "transposed": (replaced(EH_PROJ, Tensor.t), rf"{EH_PROJ} as \[272, 136\], not \[136, 272\]"),
    "wrong scale shape": (
        replaced(f"{EXPERT}_scale_inv", lambda t: t[:1]),
        rf"holds {EXPERT}_scale_inv as F32 \[1, 2\], not F32 \[2, 2\]",
    ),
    "integers": (replaced("model.norm.weight", Tensor.int), r"holds model\.norm\.weight as I32"),
    "scales of a BF16 weight": (replaced(EXPERT, Tensor.bfloat16), rf"holds scales for {EXPERT}, which is BF16"),
    "surplus tensor": (added(BIAS), rf"holds {BIAS}, which its config\.json has no place for"),
    "surplus expert": (added(OTHER), rf"holds {OTHER}, which its config\.json has no place for"),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES.keys())
def test_a_wrong_tensor_is_named_when_the_folder_is_opened(
    good: Path, tmp_path: Path, change: Change, message: str
) -> None:
    refused(changed(good, tmp_path / "hf", change), message)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -1.0])
def test_a_bad_scale_is_named_when_it_is_read(good: Path, tmp_path: Path, value: float) -> None:
    folder = changed(good, tmp_path / "hf", replaced(f"{EXPERT}_scale_inv", lambda t: t.clone().fill_(value)))
    word = "a negative scale" if value == -1.0 else "NaN or infinity"
    with pytest.raises(ValueError, match=rf"holds {word} in {EXPERT}_scale_inv"):
        HfReader(folder).read("layers.1.mlp.experts.gate_up_proj", range(2, 3))
    with pytest.raises(ValueError, match=rf"holds {word} in {EXPERT}_scale_inv"):
        import_hf(HfReader(folder), tmp_path / "run")
    assert not (tmp_path / "run/checkpoints/step_00000000").exists()


def test_a_nan_payload_is_named_when_it_is_read(good: Path, tmp_path: Path) -> None:
    def poison(tensor: Tensor) -> Tensor:
        tensor.view(torch.uint8)[3, 5] = 0x7F
        return tensor

    folder = changed(good, tmp_path / "hf", replaced(EXPERT, poison))
    with pytest.raises(ValueError, match=rf"NaN or infinity in {EXPERT}: it is damaged"):
        HfReader(folder).read("layers.1.mlp.experts.gate_up_proj")


def test_a_copy_of_the_embedding_that_differs_is_not_dropped_silently(good: Path, tmp_path: Path) -> None:
    name = "model.layers.3.embed_tokens.weight"
    folder = changed(good, tmp_path / "hf", replaced(name, lambda t: t * 2))
    with pytest.raises(ValueError, match=rf"holds a {re.escape(name)} that is not embed_tokens\.weight"):
        import_hf(HfReader(folder), tmp_path / "run")


def test_a_missing_file_is_named_with_a_tensor_in_it(folder: Path) -> None:
    lost = file_of(folder, EXPERT)
    lost.unlink()
    refused(folder, rf"lacks {lost.name}, which holds model\..*: it is incomplete")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_file_cut_short_is_named(folder: Path, keep: int) -> None:
    file = file_of(folder, EXPERT)
    file.write_bytes(file.read_bytes()[:keep])
    refused(folder, rf"{file.name} is no whole safetensors file")


def test_a_file_that_cannot_be_opened_at_all_keeps_the_librarys_reason(tmp_path: Path) -> None:
    """No permission, say, which root has always."""
    files = OpenFiles(tmp_path, lambda file, error: ValueError(f"{file.name}: {pointer_or(error, file)}"))
    with pytest.raises(ValueError, match=r"^gone\.safetensors: No such file"):
        files["gone.safetensors"]


def test_an_index_that_promises_what_a_file_lacks_is_refused(folder: Path) -> None:
    file = file_of(folder, EXPERT)
    tensors = load_file(file)
    del tensors[EXPERT]
    save_file(tensors, file)
    refused(folder, rf"lacks {EXPERT}, which its index says is in {file.name}")


@pytest.mark.parametrize(
    "place",
    ["../stolen.safetensors", "a/b.safetensors", "/tmp/x.safetensors", "..", "weights.bin", 7, None, "\n.safetensors"],
)
def test_an_index_cannot_point_outside_the_folder(folder: Path, place: object) -> None:
    shutil.copy(file_of(folder, EXPERT), folder.parent / "stolen.safetensors")
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    write_index(folder, {**weight_map, EXPERT: place})  # type: ignore[dict-item]
    refused(folder, rf"puts .{EXPERT}. into .*: only safetensors files of the folder itself are read")


def test_pickled_weights_are_refused_and_not_read(folder: Path) -> None:
    for file in (*folder.glob("*.safetensors"), folder / INDEX):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    refused(folder, r"holds pickled weights \(pytorch_model\.bin\)")


@pytest.mark.parametrize("name", ["config.json", INDEX, "*.safetensors"])
def test_a_pointer_of_git_lfs_is_called_one(folder: Path, name: str) -> None:
    name = next(folder.glob(name)).name
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    refused(folder, rf"{name} is no.* \(a git-lfs pointer: run `git lfs pull`\)")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 10**9}, r"says num_hidden_layers=1000000000, which is at least 1000000000 tensors"),
        ({"n_routed_experts": 10**9, "n_group": 1, "topk_group": 1}, r"says n_routed_experts=1000000000, which is at"),
        ({"hidden_size": 2**31 - 1}, r"describes tensors too large for any memory"),
    ],
)
def test_sizes_that_no_file_can_have_are_refused_at_once(folder: Path, fields: dict[str, Any], message: str) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | fields))
    refused(folder, rf"config\.json {message}")


def test_names_of_another_layout_are_called_that(good: Path, tmp_path: Path) -> None:
    def rename(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    refused(changed(good, tmp_path / "hf", rename), r"no model\.layers\.\*: its names are not those of")


def test_stacked_experts_in_fp8_are_named(good: Path, tmp_path: Path) -> None:
    stem = "model.layers.1.mlp.experts."
    stack = lambda tensors: tensors.update(  # noqa: E731
        {f"{stem}down_proj": torch.stack([tensors.pop(f"{stem}{i}.down_proj.weight") for i in range(4)])}
    )
    refused(
        changed(good, tmp_path / "hf", stack), r"experts\.down_proj in FP8, but stacked experts can be read in BF16"
    )


@pytest.mark.parametrize("text", ["", "[1", "[]", '{"weight_map": 3}', '{"weight_map": {}}'])
def test_a_damaged_index_is_refused(folder: Path, text: str) -> None:
    (folder / INDEX).write_text(text)
    refused(folder, rf"{INDEX} (is not JSON|has no weight_map)")


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_damaged_config_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    refused(folder, r"config\.json (is not JSON|holds no object)")


def test_fp8_without_quantization_config_is_refused(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "quantization_config": None}))
    refused(folder, r"in FP8, but its config\.json has no quantization_config")


def test_an_unfinished_export_is_no_model(folder: Path) -> None:
    (folder / "config.json").unlink()
    refused(folder, r"holds no model: .*or a Hugging Face folder with its config\.json")
