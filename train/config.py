"""The configuration of a run: from YAML and command line to frozen dataclasses. Hydra stops here.

    configs/*.yaml + overrides  --Hydra-->  plain dicts  --convert-->  PretrainConfig (frozen, checked)

`configs/` holds values only, one group per field of `PretrainConfig`; each group's dataclass is defined beside the code
that uses it. A mistake is refused with one sentence that names the key and the nearest valid one, before anything is
allocated: unknown groups, options and keys, keys given twice, wrong types, values that contradict each other. Nothing
is ever ignored. Hydra and OmegaConf are imported by the first call that needs them: the dataclasses and `convert` work
without (`make gpu`).
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from yaml import YAMLError, safe_load

from kernels.config import Backend
from parallel.layout import Layout, Workload, check_layout
from parallel.network import NetworkConfig
from train.checkpoint.config import CheckpointConfig
from train.data.config import DataConfig
from train.job import JobConfig
from train.model.config import ModelConfig, whole
from train.model.precision_config import OURS, TE_MULTIPLE, PrecisionConfig
from train.model.published import read_model
from train.model.sizes import held_by, weights
from train.observe.config import ObserveConfig
from train.optim.config import OptimConfig
from train.schedules import ScheduleConfig
from train.spikes import SpikeConfig

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
ROOT_FILE = "pretrain"
# `model=hf:FOLDER` on the command line.
HF = "model=hf:"
# Groups without an entry in the defaults list: only so does `+cluster=h100_1` compose.
APPENDED_GROUPS = ("cluster", "stage")
# Fields whose names are not ours: `+network.environment.NCCL_IB_HCA=mlx5` adds one; their dataclass checks them.
MAPPINGS = ("network.environment",)


class ConfigError(ValueError):
    """A configuration that cannot be run; the message is one sentence for the user."""


@dataclass(frozen=True)
class RunConfig:
    """How one process runs: names, seeds, device, and when it stops or evaluates.

    Raises:
        ConfigError: a field is out of range.
    """

    name: str  # the run's folder below `directory`
    directory: str
    seed: int  # decides initial values and data order
    device: Literal["auto", "cpu", "cuda"]  # auto takes a CUDA GPU when there is one
    deterministic: bool  # torch's deterministic algorithms: a resumed run is bit-equal
    threads: int | None  # CPU threads of torch, part of every bit-equality promise; None leaves torch's choice
    micro_batch_sequences: int  # of one forward and backward on one rank; it x layout.dp divides every batch
    # Make queries, keys and values again in backward instead of keeping them, or whole layers; same bits, less memory.
    recompute: bool | Literal["layers"]
    resume: bool  # continue from the newest checkpoint of the same run, if there is one
    max_consecutive_nonfinite: int  # stop, with a checkpoint, after so many skipped steps in a row
    eval_every_steps: int  # score the held-out store; 0 for the end only
    init_from: str | None = None  # a run, a checkpoint or a Hugging Face folder; None draws the first weights

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise ConfigError(f"run.name={self.name!r} names a folder: use letters, digits, '.', '_' and '-' only")
        if not self.directory:
            raise ConfigError("run.directory is empty: name a folder, such as runs")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"run.seed={self.seed} is out of range: choose one between 0 and 2**63 - 1")
        lowest = {"threads": 1, "micro_batch_sequences": 1, "max_consecutive_nonfinite": 1, "eval_every_steps": 0}
        for field, low in lowest.items():
            value = getattr(self, field)
            if value is not None and value < low:
                raise ConfigError(f"run.{field}={value} is too small: use {low} or more")


@dataclass(frozen=True)
class KernelsConfig:
    """Who computes on a GPU."""

    backend: Backend = "gluon"  # see `kernels/backend.py`


@dataclass(frozen=True)
class PretrainConfig:
    """Everything a pre-training run depends on; one field for each group under `configs/`."""

    model: ModelConfig
    precision: PrecisionConfig
    layout: Layout
    network: NetworkConfig
    data: DataConfig
    schedule: ScheduleConfig
    optim: OptimConfig
    observe: ObserveConfig
    checkpoint: CheckpointConfig
    spikes: SpikeConfig
    run: RunConfig
    kernels: KernelsConfig
    job: JobConfig = dataclasses.field(default_factory=JobConfig)  # the scheduler's, nothing of the run's
    dry_run: bool = False  # plan the memory of a rank and stop
    rank: int | Literal["all"] | None = None  # which one; None finds the fullest

    def __post_init__(self) -> None:
        self._check_sequence()
        self._check_budget()
        check_layout(self.layout, self.workload)
        self._check_transformer_engine()
        self._check_attention_output()
        self._check_backend()
        self._check_deepgemm()
        self._check_deepep()
        if self.model.scoring_func == "softmax" and self.schedule.bias_speed:
            raise ConfigError(
                f"schedule.bias_speed={self.schedule.bias_speed} moves a bias that the softmax router of "
                f"model.model_type={self.model.model_type} does not have: use schedule.bias_speed=0, and "
                "schedule.balance_alpha to balance its experts"
            )
        if self.data.heldout is None and self.run.eval_every_steps:
            raise ConfigError(
                f"run.eval_every_steps={self.run.eval_every_steps} asks for scores but data.heldout is null: "
                "name a held-out store, or set run.eval_every_steps=0"
            )

    def _check_attention_output(self) -> None:
        heads, width = self.model.num_attention_heads, self.model.v_head_dim
        if self.precision.attention_output == "e5m6" and heads * width % 2:
            raise ConfigError(
                "precision.attention_output=e5m6 keeps two numbers in three bytes, and attention's output has "
                f"model.num_attention_heads={heads} x model.v_head_dim={width} of them, an odd number: make one of "
                "the two even, or set precision.attention_output=bf16"
            )

    def _check_backend(self) -> None:
        if self.optim.backend == "deepspeed" and not self.precision.keep_bf16_weights:
            raise ConfigError(
                "precision.keep_bf16_weights=false does not go with optim.backend=deepspeed, whose flat weights are "
                "BF16: use optim.backend=native, or precision.keep_bf16_weights=true"
            )
        if self.optim.backend != "deepspeed" or (self.layout.zero and self.layout.world > 1):
            return
        wrong, cure = "layout.zero=false", "layout.zero=true"
        if self.layout.zero:
            wrong, cure = "layout.pp=1 and layout.dp=1 make one", "layout.dp=2"
        raise ConfigError(
            "optim.backend=deepspeed needs two processes or more and layout.zero=true, but "
            f"{wrong}: use {cure}, or optim.backend=native"
        )

    def _check_deepgemm(self) -> None:
        """What kernels.backend=deepgemm cannot keep on any machine; `kernels.deepgemm.require` looks at this one."""
        if self.kernels.backend == "deepgemm" and self.run.deterministic:
            raise ConfigError(
                "kernels.backend=deepgemm does not go with run.deterministic=true: which products it computes is "
                "measured at each start, and others have other bits; set run.deterministic=false, or "
                "kernels.backend=gluon"
            )
        if self.kernels.backend == "deepgemm" and self.precision.name != "fp8":
            raise ConfigError(
                f"kernels.backend=deepgemm multiplies in FP8 only, and precision={self.precision.name} has no such "
                "product of ours: set kernels.backend=gluon, or precision=fp8"
            )

    def _check_deepep(self) -> None:
        """What layout.dispatch=deepep cannot send on any machine; `parallel.deepep.require` looks at this one."""
        if self.layout.dispatch != "deepep" or self.layout.ep == 1:
            return
        hidden, topk, name = self.model.hidden_size, self.model.num_experts_per_tok, self.precision.name
        # Rows are whole words of 16 bytes.
        multiple = 16 if self.precision.wire == "fp8" else 8
        reasons = {
            f"adds up in BF16 only, and precision={name} sends FP32: use precision=bf16 or fp8": name == "fp32",
            f"sends rows of whole 16 bytes, and model.hidden_size={hidden} is no multiple of {multiple}: "
            f"use {-(-hidden // multiple) * multiple}": hidden % multiple > 0,
            f"takes 32 experts a token at most, and model.num_experts_per_tok={topk}: lower it": topk > 32,
            "runs on CUDA GPUs, and run.device=cpu: use run.device=cuda": self.run.device == "cpu" and not self.dry_run,
        }
        for reason, holds in reasons.items():
            if holds:
                raise ConfigError(f"layout.dispatch=deepep {reason}, or layout.dispatch=node")

    def _check_sequence(self) -> None:
        length, limit = self.data.sequence_length, self.model.max_position_embeddings
        if length > limit:
            raise ConfigError(
                f"data.sequence_length={length} exceeds "
                f"model.max_position_embeddings={limit}: shorten the first or raise the second"
            )
        depth = self.model.num_nextn_predict_layers
        if length <= depth:
            raise ConfigError(
                f"data.sequence_length={length} leaves no target at MTP depth "
                f"model.num_nextn_predict_layers={depth}: use a sequence longer than {depth}"
            )

    def _check_transformer_engine(self) -> None:
        """What precision=fp8_te cannot do on any machine; `require_te` looks at this one."""
        if self.precision.name != "fp8_te":
            return
        cannot = {
            "dry_run=true": (self.dry_run, "its kernels take no fake tensors, plan with precision=fp8"),
            f"run.recompute={str(self.run.recompute).lower()}": (bool(self.run.recompute), "set run.recompute=false"),
            "run.device=cpu": (self.run.device == "cpu", f"{OURS}"),
            "layout.max_expert_rows": (self.layout.max_expert_rows is not None, "set layout.max_expert_rows=null"),
        }
        for setting, (chosen, cure) in cannot.items():
            if chosen:
                raise ConfigError(f"{setting} does not go with precision=fp8_te (Transformer Engine): {cure}")
        for weight in weights(self.model, held_by(self.model, [whole(self.model)]), ep=1):
            if weight.fp8 and (weight.rows % TE_MULTIPLE or weight.cols % TE_MULTIPLE):
                raise ConfigError(
                    f"precision=fp8_te takes weights whose sides are multiples of {TE_MULTIPLE}, and {weight.part} of "
                    f"this model has one of {weight.rows} x {weight.cols}: change the model's widths, or {OURS}"
                )

    @property
    def workload(self) -> Workload:
        """The numbers that a layout is checked against."""
        return Workload(
            num_layers=self.model.num_hidden_layers,
            n_routed_experts=self.model.n_routed_experts,
            n_group=self.model.n_group,
            batch_start_sequences=self.schedule.batch_start_sequences,
            batch_full_sequences=self.schedule.batch_full_sequences,
            batch_multiple_sequences=self.schedule.batch_multiple_sequences,
            micro_batch_sequences=self.run.micro_batch_sequences,
        )

    def _check_budget(self) -> None:
        step_tokens = self.schedule.batch_start_sequences * self.data.sequence_length
        if self.schedule.total_tokens < step_tokens:
            raise ConfigError(
                f"schedule.total_tokens={self.schedule.total_tokens} is less than one step's {step_tokens} "
                "tokens (schedule.batch_start_sequences x data.sequence_length): raise it"
            )


def compose(overrides: list[str]) -> PretrainConfig:
    """Compose `configs/pretrain.yaml` with the command line's overrides, from any working directory.

    Args:
        overrides: Hydra's grammar: `model=small` chooses an option, `schedule.lr_peak=3e-4` sets a value,
            `+cluster=h100_1` applies a cluster, `+stage=sft` a stage after pre-training; `model=hf:FOLDER` takes the
            model of FOLDER/config.json.
    Raises:
        ConfigError: any mistake, in one sentence.
    """
    return _build_root(_values(overrides))


def changed_world(overrides: list[str], config: PretrainConfig) -> str | None:
    """A sentence where `layout.…=` gives another number of ranks than the files that the command line names."""
    changes = [text for text in overrides if text.lstrip("+").startswith("layout.")]
    named = _values([text for text in overrides if text not in changes])["layout"] if changes else {}
    layout = config.layout
    if not changes or layout.world == named["pp"] * named["dp"]:
        return None
    return (
        f"{' '.join(changes)} makes it {layout.world:,} ranks (pp {layout.pp} x dp {layout.dp}) where the named files "
        f"have {named['pp'] * named['dp']:,} (pp {named['pp']} x dp {named['dp']})"
    )


def _values(overrides: list[str]) -> Any:
    """The composed files and overrides as plain dicts, not checked yet."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    folders = [text for text in overrides if text.startswith(HF)]
    models = [text for text in overrides if text.startswith("model=")]
    if folders and len(models) > 1:
        raise ConfigError(f"model is given twice, as {models[0]!r} and {models[1]!r}: keep one")
    overrides = [_parseable(text) for text in overrides if text not in folders]
    _check_overrides(overrides)
    if folders:
        overrides = [*_published_model(Path(folders[0].removeprefix(HF)), _set_by_stage(overrides)), *overrides]
    _register_resolvers()
    try:
        with hydra.initialize_config_dir(config_dir=str(CONFIGS), version_base="1.3"):
            tree = hydra.compose(ROOT_FILE, overrides)
        return OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except UnicodeDecodeError as error:
        raise ConfigError(f"configs/: {_undecodable()} is not UTF-8 text ({error}); save it as UTF-8") from error
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        raise _said_by_ours(error) or ConfigError(f"configs/: {' '.join(str(error).split())}") from error


def _said_by_ours(error: BaseException | None) -> ConfigError | None:
    """What a function that `configs/` calls refused, under what the libraries make of it."""
    while error is not None and not isinstance(error, ConfigError):
        error = error.__cause__ or error.__context__
    return error


def _set_by_stage(overrides: list[str]) -> frozenset[str]:
    """The model's fields that a stage on the command line sets: it begins with a model and changes it."""
    stages = [CONFIGS / "stage" / f"{text.partition('=')[2]}.yaml" for text in overrides if text.startswith("+stage=")]
    return frozenset().union(*(safe_load(path.read_text(encoding="utf-8")).get("model") or () for path in stages))


def _published_model(folder: Path, changed: frozenset[str]) -> list[str]:
    """The model of a Hugging Face folder, as overrides but for what a stage has changed; what is given wins."""
    try:
        model = read_model(folder)
    except ValueError as error:
        raise ConfigError(f"{HF}{folder}: {error}") from error
    # Keys of Hydra's mappings are not quoted.
    texts = {name: re.sub(r'"(\w+)":', r"\1:", json.dumps(value)) for name, value in dataclasses.asdict(model).items()}
    return [f"++model.{name}={text}" for name, text in texts.items() if name not in changed]


def _undecodable() -> str:
    """The first file that is no text; the libraries do not say which."""
    for path in sorted(CONFIGS.rglob("*.yaml")):
        try:
            path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            return path.relative_to(CONFIGS).as_posix()
    return "a file"


def to_yaml(config: PretrainConfig) -> str:
    """The configuration as YAML, every value resolved."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))


def _register_resolvers() -> None:
    """The functions that `configs/` may call in `${...}`; idempotent."""
    from omegaconf import OmegaConf

    # `${share:${.total_tokens},0.1}`: break points that follow the budget, so that one override shortens a run.
    OmegaConf.register_new_resolver("share", lambda total, share: round(total * share), replace=True)
    # `${gcd:${.batch_start_sequences},${.batch_full_sequences}}`: the steps of the ramp are the schedule's and not the
    # layout's, so a run is the same on any layout that divides them. A wrong type gives null; it is refused where
    # it was written, which is before this value is read.
    OmegaConf.register_new_resolver("gcd", _gcd_or_null, replace=True)
    # `${asked:run.init_from,runs/tiny}`: a value that only the command line can know, with an example.
    OmegaConf.register_new_resolver("asked", _ask, replace=True)
    # `${epochs:2,${data.store},${data.sequence_length}}`: a budget in epochs of a store of conversations.
    OmegaConf.register_new_resolver("epochs", _tokens_of_epochs, replace=True)


def _ask(key: str, example: str) -> None:
    raise ConfigError(f"{key} has no value here: give one on the command line, such as {key}={example}")


def _tokens_of_epochs(epochs: float, store: str, sequence_length: int) -> int:
    # Here, so that other configurations are read without numpy.
    from train.data.best_fit import epoch_tokens

    try:
        return round(epochs * epoch_tokens(Path(str(store)), sequence_length))
    except ValueError as error:
        raise ConfigError(f"{error} (schedule.total_tokens=... is a budget that needs no store)") from error


def _gcd_or_null(left: object, right: object) -> int | None:
    whole = all(isinstance(value, int | float) and value == int(value) for value in (left, right))
    return math.gcd(int(left), int(right)) if whole else None  # type: ignore[call-overload]


def _build_root(values: object) -> PretrainConfig:
    try:
        config = convert(PretrainConfig, values, "")
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
    assert isinstance(config, PretrainConfig)
    return config


def convert(kind: Any, value: object, path: str) -> Any:
    """Convert a plain value, as YAML or JSON gives it, to a type: dataclass, tuple, dict, Optional, Literal, scalar.

    An int is a legal float and an integral float a legal int (14.8e12 tokens); nothing else is converted.

    Args:
        path: dotted name of the value, for messages.
    Raises:
        ConfigError: unknown, missing or mistyped.
    """
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, path)
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return _build_union(arguments, value, path)
    if origin is Literal:
        if value not in arguments:
            options = ", ".join(map(str, arguments))
            near = _nearest(str(value), [str(argument) for argument in arguments])
            raise ConfigError(f"{path}={value} is not one of {options}: did you mean {path}={near}?")
        return value
    if origin is tuple:
        return _build_tuple(arguments, value, path)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path}={value} must be a section of names and values")
        return {str(name): convert(arguments[1], item, f"{path}.{name}") for name, item in value.items()}
    return _build_scalar(kind, value, path)


def _build_union(arguments: tuple[Any, ...], value: object, path: str) -> object:
    """A type, or nothing, or words beside the type: `rank=all`."""
    if value is None and type(None) in arguments:
        return None
    inner, *others = (argument for argument in arguments if argument is not type(None))
    words = [word for argument in others for word in get_args(argument)]
    if words and isinstance(value, str) and value not in words:
        raise ConfigError(f"{path}={value} must be {SCALARS[inner]} or {' or '.join(words)}")
    return value if value in words else convert(inner, value, path)


def _build_tuple(arguments: tuple[Any, ...], value: object, path: str) -> tuple[object, ...]:
    """`tuple[float, float]` takes two values, `tuple[int, ...]` any number."""
    any_number = arguments[-1] is Ellipsis
    if not isinstance(value, list | tuple) or not (any_number or len(value) == len(arguments)):
        raise ConfigError(f"{path}={value} must be a list of {'' if any_number else f'{len(arguments)} '}values")
    kinds = arguments[:1] * len(value) if any_number else arguments
    return tuple(
        convert(kind, item, f"{path}[{index}]") for index, (kind, item) in enumerate(zip(kinds, value, strict=True))
    )


def _build_dataclass(kind: Any, value: object, path: str) -> object:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{path}={value} must be a section with the fields {', '.join(_hints(kind))}")
    hints = _hints(kind)
    prefix = f"{path}." if path else ""
    for name in value:
        if name not in hints:
            raise _unknown_key(f"{prefix}{name}")
    required = [
        field.name
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    for name in required:
        if name not in value:
            raise ConfigError(f"{prefix}{name} is missing: give it a value, as the other files of its group do")
    return kind(**{name: convert(hints[name], item, f"{prefix}{name}") for name, item in value.items()})


SCALARS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def _build_scalar(kind: type, value: object, path: str) -> object:
    assert kind in SCALARS, (kind, path)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 1e300 else math.inf
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{path}={value} must be a finite number")
    if type(value) is not kind:
        quote = f"; to mean the text, write '{path}=\"{value}\"'" if kind is str else ""
        raise ConfigError(f"{path}={value} must be {SCALARS[kind]}, not {type(value).__name__}{quote}")
    return value


def _parseable(text: str) -> str:
    """An override with its value in quotes where Hydra's grammar needs them: paths with spaces, '=', '[' or 'é'."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    key, equals, value = text.partition("=")
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", value)
    for candidate in (text, f"{key}='{escaped}'"):
        try:
            parser.parse_override(candidate)
        except HydraException:
            continue
        return candidate if equals else text
    # Refused later, with a sentence.
    return text


def _check_overrides(overrides: list[str]) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    seen: dict[str, str] = {}
    for text in overrides:
        refusal = ConfigError(
            f"{text!r} is not an override: write key=value, such as schedule.lr_peak=1e-3 or model=tiny"
        )
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            raise refusal from error
        key = str(override.key_or_group)
        if not key:
            raise refusal
        if key in seen:
            raise ConfigError(f"{key} is given twice, as {seen[key]!r} and {text!r}: keep one")
        seen[key] = text
        _check_override(override, text, key)


def _check_override(override: Override, text: str, key: str) -> None:
    if override.is_delete():
        raise ConfigError(f"{text!r} would delete {key}: nothing can be deleted, set {key} to another value")
    if override.is_sweep_override():
        raise ConfigError(
            f"{text!r} sweeps over several values: give one value a run; a comma of its own needs quotes inside "
            f"the shell's, '{key}=\"a, b\"'"
        )
    if override.package is not None:
        raise ConfigError(f"{text!r} moves a group to another place: write {key}=... without '@'")
    if key in _groups():
        _check_option(override, key)
    else:
        _check_key(key, override.value())


def _check_key(key: str, value: object) -> None:
    """Refuse an unknown key, or one inside `model.rope_scaling={factor: 4, ...}`; a mapping's names are free."""
    if key.rpartition(".")[0] in MAPPINGS:
        return
    if key not in _dotted_names(PretrainConfig, ""):
        raise _unknown_key(key)
    for inner, item in value.items() if isinstance(value, dict) else ():
        _check_key(f"{key}.{inner}", item)


def _check_option(override: Override, group: str) -> None:
    options = sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))
    choice = "null" if override.value() is None else str(override.value())
    plus, with_plus = ("+", "with") if group in APPENDED_GROUPS else ("", "without")
    if choice not in options:
        near = _nearest(choice, options)
        raise ConfigError(f"{group}={choice} does not exist: did you mean {plus}{group}={near}? ({', '.join(options)})")
    if override.is_add() != bool(plus):
        raise ConfigError(f"{override.input_line!r}: write {plus}{group}={choice}, {with_plus} the plus sign")


def _groups() -> list[str]:
    return sorted(path.name for path in CONFIGS.iterdir() if path.is_dir())


def _hints(kind: Any) -> dict[str, Any]:
    """Field name -> resolved type, in order of declaration."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _dotted_names(kind: Any, prefix: str) -> Iterator[str]:
    """Every settable name: `schedule.lr_peak`, `model.rope_scaling`, `model.rope_scaling.factor`."""
    for name, hint in _hints(kind).items():
        inner = [argument for argument in (hint, *get_args(hint)) if dataclasses.is_dataclass(argument)]
        if not inner or inner[0] is not hint:
            yield f"{prefix}{name}"
        for section in inner:
            yield from _dotted_names(section, f"{prefix}{name}.")


def _unknown_key(key: str) -> ConfigError:
    names = list(_dotted_names(PretrainConfig, ""))
    inside = [name for name in names if name.startswith(f"{key}.")]
    if inside:
        return ConfigError(f"{key} is a section: set its fields one by one, such as {inside[0]}")
    if "." in key:
        near = _nearest(key, names)
    else:
        # Without a section it is a group's name, or a field whose section was forgotten.
        by_leaf = {name.rpartition(".")[2]: name for name in reversed(names)}
        leaf = _nearest(key, [*_groups(), *by_leaf])
        near = leaf if leaf in _groups() else by_leaf[leaf]
    return ConfigError(f"{key} is not a configuration key: did you mean {near}?")


def _nearest(name: str, names: list[str]) -> str:
    """The most similar name; there is always one."""
    return difflib.get_close_matches(name[:100], names, n=1, cutoff=0.0)[0]
