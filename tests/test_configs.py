"""Every YAML under configs/ composes and validates, and every model has the size its file states.

The parameter count is an independent closed form, written from the report's equations (arXiv:2412.19437 §2.1,
§2.2) and not from the code of the model; the meta-device model must agree with it. Exact integers everywhere.
"""

from __future__ import annotations

import functools
import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml

from kernels.config import YarnScaling
from parallel.layout import check_world
from tests.test_schedules import V3
from train.config import APPENDED_GROUPS, CONFIGS, ConfigError, PretrainConfig, compose
from train.huggingface.config import released_config
from train.model.config import ModelConfig
from train.model.precision import Precision
from train.model.transformer import Transformer
from train.schedules import scheduled_values, steps_to_go

GROUPS = ("model", "precision", "layout", "network", "data", "schedule", "optim", "observe", "checkpoint", "spikes")
CLUSTERS = sorted(path.stem for path in (CONFIGS / "cluster").glob("*.yaml"))
GROUP_FILES = sorted(CONFIGS.glob("*/*.yaml"))
TILE = 128
# What an option asks the command line for.
BEGUN = ["run.init_from=runs/tiny"]
ASKED = {
    "model=v2_lite": ["schedule.bias_speed=0"],
    "+stage=sft": [*BEGUN, "schedule.total_tokens=1e6"],
    "+stage=extend_32k": BEGUN,
    "+stage=extend_128k": BEGUN,
}


def option(path: Path) -> str:
    """The override that chooses a file: model=tiny, +cluster=h100_1, +stage=sft."""
    plus = "+" if path.parent.name in APPENDED_GROUPS else ""
    return f"{plus}{path.parent.name}={path.stem}"


@functools.cache
def model_config(name: str) -> ModelConfig:
    """A model with a schedule and data that fit any of them."""
    return compose([*ASKED.get(f"model={name}", []), f"model={name}"]).model


def attention_parameters(m: ModelConfig) -> int:
    """MLA, eq. 1-11: down- and up-projections of queries, keys and values, two latent norms, output."""
    heads, qk = m.num_attention_heads, m.qk_nope_head_dim + m.qk_rope_head_dim
    if m.q_lora_rank is None:
        queries = m.hidden_size * heads * qk
    else:
        queries = m.hidden_size * m.q_lora_rank + m.q_lora_rank + m.q_lora_rank * heads * qk
    keys_values = m.hidden_size * (m.kv_lora_rank + m.qk_rope_head_dim) + m.kv_lora_rank
    keys_values += m.kv_lora_rank * heads * (m.qk_nope_head_dim + m.v_head_dim)
    return queries + keys_values + heads * m.v_head_dim * m.hidden_size


def layer_parameters(m: ModelConfig, *, routed_experts: int | None) -> int:
    """Two norms, MLA, and a dense FFN (None) or router, shared and so many routed experts (eq. 12)."""
    block = attention_parameters(m) + 2 * m.hidden_size
    if routed_experts is None:
        return block + 3 * m.hidden_size * m.intermediate_size
    expert = 3 * m.hidden_size * m.moe_intermediate_size
    # With the bias that only chooses; a softmax router has none.
    router = m.n_routed_experts * (m.hidden_size + (m.scoring_func == "sigmoid"))
    return block + router + (m.n_shared_experts + routed_experts) * expert


def main_parameters(m: ModelConfig, *, routed_experts: int) -> int:
    """Embedding, layers, final norm, head; without MTP."""
    moe_layers = m.num_hidden_layers - m.first_k_dense_replace
    dense = m.first_k_dense_replace * layer_parameters(m, routed_experts=None)
    moe = moe_layers * layer_parameters(m, routed_experts=routed_experts)
    return 2 * m.vocab_size * m.hidden_size + dense + moe + m.hidden_size


def total_parameters(m: ModelConfig) -> int:
    """All experts, without MTP."""
    return main_parameters(m, routed_experts=m.n_routed_experts)


def mtp_parameters(m: ModelConfig) -> int:
    """Eq. 21-23: each depth has a block, M_k and three norms; embedding and head are the main model's."""
    depth = layer_parameters(m, routed_experts=m.n_routed_experts) + 2 * m.hidden_size**2 + 3 * m.hidden_size
    return m.num_nextn_predict_layers * depth


# name: (total without MTP, active with embedding and head, MTP). V3's first is the released checkpoint's, v3_16b is of
# the size of the report's ablations: 15 to 17 B in total, 2 to 3 B active.
SIZES = {
    "v3_671b": (671_026_419_200, 37_552_297_472, 11_610_068_224),
    "v3_16b": (15_790_268_544, 2_744_934_528, 592_195_136),
    "small": (2_302_302_176, 815_945_696, 129_327_904),
    # Published figures, and where they are from: docs/family.md.
    "v3_1": (671_026_419_200, 37_552_297_472, 11_610_068_224),
    "kimi_k2": (1_026_408_232_448, 32_861_500_928, 0),
    "moonlight_16b": (15_960_110_208, 2_914_776_192, 0),
    "joyai_flash_48b": (48_942_542_592, 3_304_320_768, 1_247_949_056),
    "glm_4_7_flash": (29_943_393_920, 3_896_766_080, 643_706_176),
    "v2_lite": (15_706_484_224, 2_661_150_208, 0),
    "tiny": (5_963_024, 3_603_728, 2_338_568),
    "tiny_served": (6_676_496, 4_317_200, 2_576_392),
    "ragged_test": (3_908_422, 3_701_062, 3_922_828),
}


@pytest.mark.parametrize("path", GROUP_FILES, ids=option)
def test_every_option_of_every_group_composes(path: Path) -> None:
    # A layout of many ranks needs a model and a batch of its size: those of the cluster of its name.
    with_cluster = path.parent.name == "layout" and path.stem in CLUSTERS
    asked = ASKED.get(option(path), [])
    config = compose([*([f"+cluster={path.stem}"] if with_cluster else []), option(path), *asked])
    group = path.parent.name
    if group in GROUPS:
        section = getattr(config, group)
        for name, written in yaml.safe_load(path.read_text()).items():
            assert hasattr(section, name)
            if isinstance(written, int | float) or group == "network":
                assert getattr(section, name) == written, f"{option(path)}: {name} did not arrive"


# bf16 is the default, in which `model_config` composes every model; no rule joins fp32 to a model's sizes.
@pytest.mark.parametrize(
    ("model", "precision"), [*((name, "fp8") for name in sorted(SIZES)), ("ragged_test", "fp32"), ("v2_lite", "bf16")]
)
def test_every_model_composes_on_the_cluster(model: str, precision: str) -> None:
    """What the command line names wins over the cluster file."""
    more = ASKED.get(f"model={model}", [])
    config = compose(["+cluster=h100_1", f"model={model}", f"precision={precision}", *more])
    assert config.model == model_config(model)
    assert config.precision.name == precision
    assert config.run.device == "cuda"
    assert config.data.sequence_length == 4096


YARN = {"factor": 40.0, "original_max_position_embeddings": 16, "beta_fast": 32.0, "beta_slow": 1.0}
NO_NUMBERS = [-1.0, math.nan, math.inf, 1e-300]
ONLY_ABOVE_ZERO = ["rms_norm_eps", "rope_theta", "routed_scaling_factor", "initializer_range"]
ONLY_ABOVE_ZERO += ["embedding_initializer_range", *(f"rope_scaling.{name}" for name in YARN)]
NO_VALUES = [(name, value) for name in ONLY_ABOVE_ZERO for value in (0.0, *NO_NUMBERS)]
NO_VALUES += [(f"rope_scaling.{name}", value) for name in ("mscale", "mscale_all_dim") for value in NO_NUMBERS]
NO_VALUES += [("rope_scaling.factor", 0.5), ("rope_scaling.beta_fast", 0.5), ("rope_theta", 1.0), ("vocab_size", 2**31)]


@pytest.mark.parametrize(("name", "value"), NO_VALUES)
def test_a_number_that_cannot_be_trained_with_is_refused(name: str, value: float) -> None:
    """Both doors, Hydra and a Hugging Face folder, end in this class; YaRN of factor 0 trained on NaN."""
    tiny = asdict(model_config("tiny"))
    yarn = {**YARN, "mscale": 0.0, "mscale_all_dim": 0.0}
    section, _, field = name.rpartition(".")
    ModelConfig.from_dict({**tiny, "rope_scaling": yarn})
    changed = {"rope_scaling": {**yarn, field: value}} if section else {field: value}
    with pytest.raises(ValueError, match=rf"^model\.{re.escape(name)}={re.escape(str(value))} "):
        ModelConfig.from_dict({**tiny, **changed})


@pytest.mark.parametrize(("name", "length", "batch"), [("extend_32k", 32768, 1920), ("extend_128k", 131072, 480)])
def test_context_extension_is_a_thousand_steps_at_one_rate_and_batch(name: str, length: int, batch: int) -> None:
    """§4.3; every other scheduled value is the one with which V3's pre-training ended."""
    config = compose(["model=v3_671b", "data=text", "schedule=v3", f"+stage={name}", *BEGUN])
    schedule, total = config.schedule, config.schedule.total_tokens
    assert config.data.sequence_length == length
    assert total == 1000 * batch * length
    assert steps_to_go(schedule, sequence_length=length, tokens_seen=0) == 1000
    ended = compose(["model=v3_671b", "data=text", "schedule=v3"]).schedule
    last = scheduled_values(ended, step=10**6, tokens_seen=ended.total_tokens - 1)
    for step in (0, 1, 500, 999):
        now = scheduled_values(schedule, step=step, tokens_seen=step * batch * length)
        assert now == replace(last, batch_sequences=batch)
    assert last.lr == 7.3e-6
    assert config.model.rope_scaling == YarnScaling(40.0, 4096, 32.0, 1.0, 1.0, 1.0)
    assert config.model == replace(
        compose(["model=v3_671b", "data=text", "schedule=v3"]).model,
        rope_scaling=config.model.rope_scaling,
        max_position_embeddings=163840,
    )


def test_the_groups_are_the_fields_of_the_configuration() -> None:
    folders = {path.name for path in CONFIGS.iterdir() if path.is_dir()}
    fields = set(PretrainConfig.__dataclass_fields__) - {"run", "dry_run", "rank"}
    assert folders == fields | {*APPENDED_GROUPS, "experiment"}
    assert sorted(CONFIGS.rglob("*.y*ml")) == sorted([*GROUP_FILES, CONFIGS / "pretrain.yaml"])


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_cluster_is_its_layout_on_as_many_gpus_as_its_name_says(name: str) -> None:
    config = compose([f"+cluster={name}"])
    assert config.layout.world == int(name.rpartition("_")[2])
    assert (config.run.device, config.run.name, config.precision.name) == ("cuda", name, "fp8")
    check_world(config.layout, config.layout.world)
    one_node = config.layout.world <= config.layout.ranks_per_node
    assert config.network.backend_for("cuda") == "nccl"
    assert ("NCCL_NET" in config.network.environment) == (not one_node)
    # Every rank's experts, layers and micro-batches are whole: check_layout ran in compose; here by hand.
    unit = config.layout.dp * config.run.micro_batch_sequences
    assert config.schedule.batch_multiple_sequences % unit == 0
    assert config.schedule.batch_start_sequences % unit == config.schedule.batch_full_sequences % unit == 0
    assert config.model.n_routed_experts % config.layout.ep == 0


def test_h800_2048_is_the_layout_of_the_report() -> None:
    """§3.1 and §3.2: 2048 GPUs, PP16, EP64 over 8 nodes, ZeRO-1; 3072 to 15360 sequences (§4.2)."""
    config = compose(["+cluster=h800_2048"])
    layout, schedule = config.layout, config.schedule
    assert (layout.pp, layout.dp, layout.ep, layout.edp, layout.zero) == (16, 128, 64, 2, True)
    assert (layout.schedule, layout.ep // layout.ranks_per_node) == ("ZBVZeroBubble", 8)
    assert layout.two_hops
    assert config.model == model_config("v3_671b")
    assert (schedule.batch_start_sequences // 128, schedule.batch_full_sequences // 128) == (24, 120)


def test_the_time_limits_of_infiniband_are_in_order() -> None:
    """A flapping link (4.096 us x 2^timeout x retries, NCCL's user guide) is waited for, a dead rank named first."""
    network = compose(["+cluster=h800_2048"]).network
    tries, power = int(network.environment["NCCL_IB_RETRY_CNT"]), int(network.environment["NCCL_IB_TIMEOUT"])
    flap_s = 4.096e-6 * 2**power * tries
    # The guide's own table rounds it to two minutes.
    assert flap_s == pytest.approx(120, abs=0.5)
    assert max(flap_s, network.peer_timeout_s) < network.timeout_s


@pytest.mark.parametrize("name", sorted(SIZES))
def test_each_model_has_the_size_its_file_states(name: str) -> None:
    assert {path.stem for path in (CONFIGS / "model").glob("*.yaml")} == set(SIZES)
    m = model_config(name)
    active = main_parameters(m, routed_experts=m.num_experts_per_tok)
    assert (total_parameters(m), active, mtp_parameters(m)) == SIZES[name]


@pytest.mark.parametrize("name", sorted(SIZES))
def test_the_model_built_on_meta_has_the_closed_form_size(name: str) -> None:
    m = model_config(name)
    with torch.device("meta"):
        model = Transformer(m, Precision("bf16"))
    # The published count takes in each router's selection bias, which is a buffer here.
    held = model.state_dict()
    mtp = sum(tensor.numel() for name, tensor in held.items() if name.startswith("mtp."))
    assert (sum(map(torch.Tensor.numel, held.values())) - mtp, mtp) == (total_parameters(m), mtp_parameters(m))


def test_what_the_sizes_of_v3_do_not_pin() -> None:
    """The numbers of §2.1.2 and §4.2 that no parameter count shows."""
    m = model_config("v3_671b")
    assert (m.num_attention_heads, m.qk_nope_head_dim, m.qk_rope_head_dim, m.v_head_dim) == (128, 128, 64, 128)
    assert (m.n_group, m.topk_group, m.num_experts_per_tok, m.norm_topk_prob) == (8, 4, 8, True)
    assert (m.routed_scaling_factor, m.initializer_range, m.rms_norm_eps, m.rope_theta) == (2.5, 0.006, 1e-6, 1e4)
    # Plain RoPE at 4096 tokens: YaRN comes with context extension (§4.3).
    assert (m.rope_scaling, m.max_position_embeddings) == (None, 4096)


def test_every_contraction_of_tiny_fills_tiles() -> None:
    m = model_config("tiny")
    contractions = {
        "hidden": m.hidden_size,
        "q latent": m.q_lora_rank or 0,
        "kv latent": m.kv_lora_rank,
        "heads x v": m.num_attention_heads * m.v_head_dim,
        "intermediate": m.intermediate_size,
        "expert intermediate": m.moe_intermediate_size,
    }
    assert {name: k for name, k in contractions.items() if k < 2 * TILE or k % TILE} == {}


def test_tiny_served_is_tiny_with_the_latent_that_engines_take() -> None:
    m = model_config("tiny_served")
    assert m.kv_lora_rank + m.qk_rope_head_dim == 576
    assert replace(m, kv_lora_rank=256, qk_rope_head_dim=32) == model_config("tiny")


def test_ragged_test_is_ragged_where_v3_is() -> None:
    m = model_config("ragged_test")
    assert m.q_lora_rank is not None
    assert m.q_lora_rank + m.kv_lora_rank + m.qk_rope_head_dim == 2112
    assert m.kv_lora_rank + m.qk_rope_head_dim == 576
    ragged = (2112, 576, m.hidden_size, m.num_attention_heads * m.v_head_dim, m.moe_intermediate_size)
    assert all(k % TILE for k in ragged)


def test_small_leaves_half_of_an_80_gb_gpu_to_activations() -> None:
    """Weight 2, E4M3 copies 1 + 1, master 4, gradient 4, moments 2 + 2 bytes a parameter, MTP included."""
    m = model_config("small")
    state_bytes = (2 + 1 + 1 + 4 + 4 + 2 + 2) * (total_parameters(m) + mtp_parameters(m))
    assert state_bytes == 38_906_081_280 < 80e9 / 2


def test_the_v3_schedule_is_the_one_whose_values_are_tested() -> None:
    schedule = compose(["model=v3_671b", "data=text", "schedule=v3"]).schedule
    assert replace(schedule, batch_multiple_sequences=1) == V3


@pytest.mark.parametrize("name", ["tiny", "small", "v3_16b"])
@pytest.mark.parametrize("total_tokens", [10**7, 10**12])
def test_one_override_shortens_a_run_and_keeps_its_shape(name: str, total_tokens: int) -> None:
    """Break points are shares of the budget: each stays within half a token of its share."""
    full = compose([f"schedule={name}"]).schedule
    cut = compose([f"schedule={name}", f"schedule.total_tokens={total_tokens}"]).schedule
    for point in ("constant_until_tokens", "decay_until_tokens", "final_from_tokens", "batch_ramp_tokens"):
        share = getattr(full, point) / full.total_tokens
        # Each side is rounded to a whole token once.
        rounding = 0.5 / full.total_tokens * cut.total_tokens + 0.5
        assert abs(getattr(cut, point) - share * cut.total_tokens) <= rounding


def test_a_folder_of_hugging_face_gives_the_model_and_the_command_line_wins(tmp_path: Path) -> None:
    """Kimi-K2's own fields, as its config.json has them; `model.` overrides come after."""
    kimi = model_config("kimi_k2")
    folder = tmp_path / "Kimi K2"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(released_config(kimi, format="bf16")))
    assert compose([f"model=hf:{folder}"]).model == kimi
    smaller = compose(["model.num_hidden_layers=4", f"model=hf:{folder}", "model.rope_scaling.factor=64"]).model
    assert smaller.rope_scaling is not None
    assert kimi.rope_scaling is not None
    with pytest.raises(ConfigError, match=r"^model is given twice, as .* and 'model=small': keep one$"):
        compose([f"model=hf:{folder}", "model=small"])
    assert smaller == replace(kimi, num_hidden_layers=4, rope_scaling=replace(kimi.rope_scaling, factor=64.0))


def test_a_stage_changes_the_model_of_a_folder(tmp_path: Path) -> None:
    joyai = model_config("joyai_flash_48b")
    (tmp_path / "config.json").write_text(json.dumps(released_config(joyai, format="bf16")))
    stage = ["+stage=extend_32k", *BEGUN]
    extended = compose([f"model=hf:{tmp_path}", *stage]).model
    assert extended == compose(["model=joyai_flash_48b", *stage]).model
    assert extended.rope_scaling is not None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"^model=hf:.*config\.json cannot be read as JSON \(.*name the folder of a model$"),
        ("{", r"^model=hf:.*config\.json cannot be read as JSON"),
        ("[]", r"^model=hf:.*config\.json holds no object; fetch it again$"),
        ('{"model_type": "qwen3_moe"}', r"^.*config\.json has model_type=\"qwen3_moe\", which is not one"),
    ],
)
def test_a_folder_that_describes_no_such_model_is_one_sentence(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        compose([f"model=hf:{tmp_path}"])


def test_a_softmax_router_has_no_bias_to_move() -> None:
    with pytest.raises(ConfigError, match=r"^schedule\.bias_speed=0\.005 moves a bias .* use schedule\.bias_speed=0"):
        compose(["model=v2_lite"])
    with pytest.raises(ConfigError, match=r"^model\.n_group=8 does not go with model\.model_type=deepseek_v2"):
        compose(["model=v2_lite", "schedule.bias_speed=0", "model.n_group=8", "model.topk_group=4"])
    with pytest.raises(ConfigError, match=r"^model\.norm_topk_prob=true does not go with"):
        compose(["model=v2_lite", "schedule.bias_speed=0", "model.norm_topk_prob=true"])
    with pytest.raises(ConfigError, match=r"^model\.model_type=deepseek_v4 is not one of deepseek_v3, kimi_k2,"):
        compose(["+model.model_type=deepseek_v4"])
