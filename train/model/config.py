"""The model's hyper-parameters under their Hugging Face names (arXiv:2412.19437 §4.2).

One frozen dataclass describes every member of the family; `configs/model/*.yaml` holds the values.
Every impossible combination is refused at construction with the field, its value and the fix. A pipeline stage is a
range of the model's layers. A file of its own: a plan is made without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kernels.config import YarnScaling

# `model_type` of a published config.json -> the router's scores; what differs between the members: docs/family.md.
FAMILY = {
    "deepseek_v3": "sigmoid",
    "kimi_k2": "sigmoid",
    "joyai_llm_flash": "sigmoid",
    "glm4_moe_lite": "sigmoid",
    "deepseek_v2": "softmax",
}
# Of a field that is a number: FP32's normal numbers, and sizes that an int32 holds.
_SMALLEST, _LARGEST, _LARGEST_SIZE = 2.0**-126, 2.0**127, 2**31 - 1


@dataclass(frozen=True)
class ModelConfig:
    """Shape of one DeepSeek-V3-style model; field names are those of the released `config.json`.

    `model_type` is the member of the family that a folder of weights is written as; `deepseek_v2` routes by softmax.
    `q_lora_rank=None` drops the query latent (V2-Lite style). `n_group=1` switches node-limited routing off.
    `num_nextn_predict_layers` is D, the MTP depth (§2.2). `initializer_range` is the standard deviation of the initial
    weights; `embedding_initializer_range` sets the embedding's apart for short runs (None: the same, as V3 has it).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    first_k_dense_replace: int
    num_attention_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    n_routed_experts: int
    num_experts_per_tok: int
    max_position_embeddings: int
    q_lora_rank: int | None = None
    n_shared_experts: int = 1
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    num_nextn_predict_layers: int = 1
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: YarnScaling | None = None
    initializer_range: float = 0.006
    embedding_initializer_range: float | None = None
    model_type: str = "deepseek_v3"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Inverse of `dataclasses.asdict`, also after a passage through JSON."""
        yarn = values.get("rope_scaling")
        return cls(**{**values, "rope_scaling": YarnScaling(**yarn) if yarn else None})

    def __post_init__(self) -> None:
        self._check_positive()
        self._check_attention()
        self._check_experts()

    def _check_positive(self) -> None:
        zero_allowed = ("first_k_dense_replace", "num_nextn_predict_layers", "n_shared_experts")
        for name, value in vars(self).items():
            _check_number(f"model.{name}", value, zero_allowed=name in zero_allowed)

    def _check_attention(self) -> None:
        if self.qk_rope_head_dim % 2:
            raise ValueError(
                f"model.qk_rope_head_dim={self.qk_rope_head_dim} must be even: RoPE rotates pairs; "
                f"use {self.qk_rope_head_dim + 1}"
            )
        if self.rope_theta <= 1:
            raise ValueError(f"model.rope_theta={self.rope_theta} must be above 1: use V3's 10000")
        if (yarn := self.rope_scaling) is None:
            return
        for name, value in vars(yarn).items():
            _check_number(f"model.rope_scaling.{name}", value, zero_allowed="mscale" in name)
        if yarn.factor < 1:
            raise ValueError(f"model.rope_scaling.factor={yarn.factor} shortens the context: use 1 or more")
        if yarn.beta_fast < yarn.beta_slow:
            raise ValueError(
                f"model.rope_scaling.beta_fast={yarn.beta_fast} is below "
                f"model.rope_scaling.beta_slow={yarn.beta_slow}: swap them"
            )

    def _check_experts(self) -> None:
        if self.model_type not in FAMILY:
            raise ValueError(f"model.model_type={self.model_type} is not one of {', '.join(FAMILY)}; choose one")
        if self.scoring_func == "softmax" and self.n_group > 1:
            raise ValueError(
                f"model.n_group={self.n_group} does not go with model.model_type={self.model_type}, which chooses "
                "among all experts (greedy); use 1"
            )
        if self.scoring_func == "softmax" and self.norm_topk_prob:
            raise ValueError(
                f"model.norm_topk_prob=true does not go with model.model_type={self.model_type}, whose gates are the "
                "softmax itself; use false"
            )
        if self.first_k_dense_replace > self.num_hidden_layers:
            raise ValueError(
                f"model.first_k_dense_replace={self.first_k_dense_replace} exceeds "
                f"model.num_hidden_layers={self.num_hidden_layers}; lower it"
            )
        if self.n_routed_experts % self.n_group:
            raise ValueError(
                f"model.n_routed_experts={self.n_routed_experts} is not a multiple of model.n_group={self.n_group}; "
                "choose a divisor"
            )
        if self.topk_group > self.n_group:
            raise ValueError(
                f"model.topk_group={self.topk_group} exceeds model.n_group={self.n_group}; lower topk_group"
            )
        if self.n_group > 1 and self.experts_per_group < 2:
            raise ValueError(
                f"model.n_group={self.n_group} leaves {self.experts_per_group} expert a group, but a group is scored "
                "by its two best; use fewer groups"
            )
        reachable = self.topk_group * self.experts_per_group
        if self.num_experts_per_tok > reachable:
            raise ValueError(
                f"model.num_experts_per_tok={self.num_experts_per_tok} exceeds the {reachable} experts of the "
                f"model.topk_group={self.topk_group} chosen groups; raise topk_group or lower num_experts_per_tok"
            )

    @property
    def qk_head_dim(self) -> int:
        """Query/key width of one head: position-free part plus rotary part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def q_width(self) -> int:
        """Width of the query part of the fused first projection: the latent, or all heads when there is none."""
        return self.q_lora_rank or self.num_attention_heads * self.qk_head_dim

    @property
    def scoring_func(self) -> str:
        """Of the router: "sigmoid" with a balancing bias, or "softmax" without."""
        return FAMILY[self.model_type]

    @property
    def experts_per_group(self) -> int:
        """Routed experts in one group (one group per node, §2.1.2)."""
        return self.n_routed_experts // self.n_group

    def is_moe(self, layer_id: int) -> bool:
        """Whether a layer carries experts; an MTP layer (numbered on) is of the kind of the last main layer."""
        return min(layer_id, self.num_hidden_layers - 1) >= self.first_k_dense_replace

    @property
    def layer_ids(self) -> range:
        """Ids of the main model's layers."""
        return range(self.num_hidden_layers)

    @property
    def moe_layer_ids(self) -> list[int]:
        """Ids of all layers with experts, MTP layers last: the rows of every table by layer."""
        return [layer_id for layer_id in (*self.layer_ids, *self.mtp_layer_ids) if self.is_moe(layer_id)]

    @property
    def mtp_layer_ids(self) -> range:
        """Ids of the MTP layers, numbered on as in the released checkpoint (layer 61 of V3)."""
        return range(self.num_hidden_layers, self.num_hidden_layers + self.num_nextn_predict_layers)


@dataclass(frozen=True)
class StageSpec:
    """What one pipeline stage holds: consecutive layers; tokens enter the first stage, losses arise on the last."""

    layer_ids: range
    is_first: bool
    is_last: bool


def whole(config: ModelConfig) -> StageSpec:
    """The only stage of a model in one process."""
    return StageSpec(config.layer_ids, is_first=True, is_last=True)


def _check_number(name: str, value: object, *, zero_allowed: bool) -> None:
    """Refuse a number that is negative, zero where it must not be, NaN, infinite, or beyond FP32 or int32."""
    if isinstance(value, bool) or not isinstance(value, int | float) or (value == 0 and zero_allowed):
        return
    if not value > 0:
        raise ValueError(f"{name}={value} must be positive; choose a value above zero")
    if not (value <= _LARGEST_SIZE if isinstance(value, int) else _SMALLEST <= value <= _LARGEST):
        raise ValueError(f"{name}={value} is out of range; choose one of V3's order")
