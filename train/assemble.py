"""Assembly: from a validated configuration to what a trainer works with on this rank.

Model, optimizer, data and parallel wrappers meet here. Mistakes of a user about stores, weights or device are refused
before the model is allocated.

    layout -> stages of this rank -> a Transformer with those layers and a dispatcher for its experts
           -> gradient buckets: dense parameters over the data axis, FP8 linears apart from the others, experts over the
              expert-data axis, copies of the embedding over both ends of the pipeline
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import nn
from torch.distributed import ProcessGroup

from kernels.attention import backend_name
from kernels.deepgemm import Choice
from parallel import deepep
from parallel.early_reduction import EarlyReduction
from parallel.fp8_weights import Fp8Buckets
from parallel.mesh import Mesh, cpu_group, single
from parallel.pipeline import Pipeline
from parallel.shards import Shard
from parallel.zero import GradientBuckets
from train.backend import check_kernels, shown, use_kernels
from train.checkpoint.lineage import lineage
from train.checkpoint.publish import published
from train.config import PretrainConfig
from train.data.conversations import open_conversations
from train.data.store import TokenStore, store_hashes
from train.data.stream import SampleStream, Stores, open_stores
from train.model.attention import MultiHeadLatentAttention
from train.model.config import ModelConfig
from train.model.init import initialize
from train.model.layers import FeedForward
from train.model.moe import Experts
from train.model.precision import Precision
from train.model.precision_config import PrecisionConfig
from train.model.sizes import held_by, parameter_counts
from train.model.te_linear import require_te
from train.model.transformer import Transformer, fp8_weights, recompute_as_asked
from train.optim.adamw import AdamW
from train.optim.config import OptimConfig
from train.optim.deepspeed_backend import DeepSpeedBuckets, check_installed
from train.optim.ema import Ema
from train.optim.muon import Muon, muon_matrices
from train.optim.qk_clip import watch_logits
from train.run_directory import CHECKPOINTS, run_directory
from train.schedules import first_step_of
from train.stage import Stage, build_stages, expert_shards, stage_specs
from train.step import Engine

if TYPE_CHECKING:
    from train.huggingface.weights import WeightSource

BUCKETS = {"native": GradientBuckets, "deepspeed": DeepSpeedBuckets}
# What reads the weights of an FP8 linear or of experts, and is called as a module.
READERS = (MultiHeadLatentAttention, FeedForward, Experts)
# Of a save: a rank that has written waits for the slowest one.
SAVE_TIMEOUT_S = 3600


@dataclass(frozen=True)
class Components:
    """What a trainer works with on this rank."""

    engine: Engine
    stream: SampleStream
    heldout: TokenStore | None  # None when the configuration names none
    checkpoint_group: ProcessGroup | None  # carries the planning of saves, apart from the step; None with one rank
    products: tuple[Choice, ...] = ()  # what DeepGEMM was measured on, and whether it is taken
    began_from: dict[str, Any] | None = None  # `train/checkpoint/lineage.py`, where weights are another run's


def choose_device(name: str) -> torch.device:
    """'auto' takes a CUDA GPU when there is one.

    Raises:
        ValueError: 'cuda' on a machine without one.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.device=cuda, but this machine shows no CUDA GPU; use run.device=cpu or run.device=auto")
    return torch.device(name)


def device_of(config: PretrainConfig) -> torch.device:
    """Where a run computes; a ValueError where it, or what it lacks, does not fit the configuration."""
    device = choose_device(config.run.device)
    if config.precision.name == "fp8_te":
        require_te(device, power_of_two=config.precision.power_of_two_scales)
    if config.layout.dispatch == "deepep" and config.layout.ep > 1:
        deepep.require(device)
    check_kernels(config.kernels.backend, device, asked="kernels.backend=")
    return device


def set_determinism(*, seed: int, deterministic: bool, threads: int | None) -> None:
    """Bit-equal repeats need one seed, deterministic algorithms and a fixed thread count; all are on the run card."""
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(deterministic)
    # Filling every torch.empty with NaN is for tests; here it would cost a pass over each activation.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if threads is not None:
        torch.set_num_threads(threads)


# What may differ between a model and the one whose weights it begins with.
_FREE_TO_DIFFER = (
    "initializer_range",
    "embedding_initializer_range",
    "max_position_embeddings",
    "num_nextn_predict_layers",
)


def first_weights(config: PretrainConfig) -> WeightSource | None:
    """The source of a new run's weights, if `run.init_from` names one; None for a run that has checkpoints to resume.

    Raises:
        ValueError: nothing to read there, or the weights of another model; names the first field that differs.
    """
    run = config.run
    if run.init_from is None or published(run_directory(run) / CHECKPOINTS):
        return None
    # Here, so that a machine without `tokenizers` can train: a folder of weights may bring a tokeniser.
    from train.huggingface.weights import open_weights

    source = open_weights(Path(run.init_from))
    wanted, found = asdict(config.model), asdict(source.config)
    for name, value in wanted.items():
        # Context extension brings YaRN (§4.3). Weights that were trained with it need it, as it was.
        added = name == "rope_scaling" and found[name] is None
        if found[name] != value and name not in _FREE_TO_DIFFER and not added:
            raise ValueError(
                f"run.init_from={run.init_from} holds a model with {name}={found[name]}, but model.{name}={value}: "
                "give the run the model's own values"
            )
    return source


class Resources(NamedTuple):
    """What a run reads; source: of the first weights, if they are neither drawn nor resumed."""

    stores: Stores
    source: WeightSource | None


def open_resources(config: PretrainConfig) -> Resources:
    """The stores and the source of the first weights.

    Raises:
        ValueError: one of them, or DeepSpeed where it is asked for, is missing here, or does not fit the configuration;
            says what to do.
    """
    if config.optim.backend == "deepspeed":
        check_installed()
    source = first_weights(config)
    return Resources(_open_stores(config, source), source)


def _open_stores(config: PretrainConfig, source: WeightSource | None) -> Stores:
    """Of text or of conversations; of the source's tokeniser, conversations beginning as its samples did."""
    data, seed, model = config.data, config.run.seed, config.model
    if data.samples == "windows":
        stores: Stores = open_stores(data, vocab_size=model.vocab_size, seed=seed)
    else:
        depths = model.num_nextn_predict_layers
        stores = open_conversations(data, vocab_size=model.vocab_size, seed=seed, mtp_depths=depths)
    if source is None:
        return stores
    manifest, known = stores[0].store.manifest, source.trained_on
    if known.tokenizer_sha256 not in (None, manifest.tokenizer_sha256):
        raise ValueError(
            f"data.store: {data.store} was made with tokeniser {manifest.tokenizer_sha256[:12]}, the weights of "
            f"run.init_from={config.run.init_from} with {str(known.tokenizer_sha256)[:12]}; prepare it with that one: "
            "`python launch/prepare.py --tokenizer tokenizer.json ...`"
        )
    if manifest.chat is not None and known.first_token != manifest.chat.first_token:
        raise ValueError(
            f"data.store: conversations of {data.store} begin with {manifest.chat.first_token}, and samples of "
            f"run.init_from={config.run.init_from} began with {known.first_token}: prepare with --first-token "
            f"{known.first_token}"
        )
    return stores


def build_optimizer(models: list[Transformer], config: OptimConfig, mesh: Mesh) -> AdamW:
    """Buckets by the axis they are reduced over, FP8 linears apart, and the optimizer of this rank's share of them."""
    precision = models[0].precision
    dense: dict[str, nn.Parameter] = {}
    linears: dict[str, nn.Parameter] = {}
    experts: dict[str, nn.Parameter] = {}
    tied: dict[str, nn.Parameter] = {}
    flat_shards: dict[str, Shard] = {}
    for model in models:
        shards, in_fp8 = expert_shards(model), fp8_weights(model, precision)
        for name, parameter in model.named_parameters():
            if name in shards:
                experts[name] = parameter
                flat_shards[name] = shards[name].shard.flatten()
            elif name.startswith("embed_tokens") and mesh.tied.size > 1:
                tied[name] = parameter
            elif name in in_fp8:
                linears[name] = parameter
            else:
                dense[name] = parameter
    made_of = partial(BUCKETS[config.backend], sharded=mesh.layout.zero)
    fp8_made_of: Callable[..., GradientBuckets] = made_of
    if not precision.keep_bf16_weights:
        fp8_made_of = partial(Fp8Buckets, sharded=mesh.layout.zero, power_of_two=precision.power_of_two_scales)
    buckets = [
        made_of(dense.items(), axis=mesh.dp),
        fp8_made_of(linears.items(), axis=mesh.dp),
        fp8_made_of(experts.items(), axis=mesh.edp),
        made_of(tied.items(), axis=mesh.dp, tied=mesh.tied, counts_in_norm=mesh.tied.rank == 0),
    ]
    if config.name == "muon":
        matrices = {name: held for model in models for name, held in muon_matrices(model).items()}
        return Muon(buckets, config, flat_shards, matrices=matrices)
    return AdamW(buckets, config, flat_shards)


@torch.no_grad()
def fill(model: Transformer, source: WeightSource) -> None:
    """Copy a stage's weights out of a source; MTP layers that the source lacks keep their values.

    Raises:
        ValueError: it lacks another tensor; named.
    """
    held, shards = set(source.names()), expert_shards(model)
    for name, target in model.state_dict().items():
        if name not in held and name.startswith("mtp."):
            continue
        if name not in held:
            raise ValueError(f"{source.path} lacks {name}: it is incomplete; fetch or export it again")
        first = shards[name].shard.offsets[0] if name in shards else 0
        # In place, so that the weight's version rises and its FP8 copy is made again.
        target.copy_(source.read(name, range(first, first + len(target))))


def build_engine(
    config: ModelConfig,
    precision: PrecisionConfig,
    optim: OptimConfig,
    mesh: Mesh,
    *,
    seed: int,
    recompute: bool | Literal["layers"] = False,
    source: WeightSource | None = None,
) -> Engine:
    """Initialised stages of this rank, their pipeline and their optimizer; the same values on every layout.

    Weights are drawn, or read from `source` where it holds them.
    """
    stages = build_stages(config, precision, mesh)
    for stage in stages.values():
        spread, own = config.initializer_range, config.embedding_initializer_range
        initialize(stage.model, seed=seed, std=spread, embedding_std=own)
        if source is not None:
            fill(stage.model, source)
        recompute_as_asked(stage.model, recompute)
    if source is not None:
        source.close()
    return assemble(stages, optim, mesh)


def let_weights_arrive_later(models: list[Transformer], buckets: Sequence[GradientBuckets]) -> None:
    """New weights of attention, FFNs and experts come under the next forward: each of them waits for its own.

    Buckets that hold other weights as well, read in many places, arrive before the update ends.
    """
    readers = [module for model in models for module in model.modules() if isinstance(module, READERS)]
    read = {parameter for reader in readers for parameter in reader.parameters()}
    for each in buckets:
        if not (read.issuperset(each.parameters.values()) and each.let_arrive_later()):
            continue
        held = set(each.parameters.values())
        for reader in readers:
            own = [parameter for parameter in reader.parameters() if parameter in held]
            reader.register_forward_pre_hook(partial(_arrive, each, own))
        for model in models:
            model.register_state_dict_pre_hook(partial(_arrive, each, [None]))  # type: ignore[no-untyped-call]


def _arrive(buckets: GradientBuckets, parameters: Iterable[nn.Parameter | None], *_: object) -> None:
    for parameter in parameters:
        buckets.arrive(parameter)


def assemble(stages: dict[int, Stage], optim: OptimConfig, mesh: Mesh) -> Engine:
    """Pipeline and optimizer of the stages of this rank; masters take the values that the weights have now."""
    models = [stage.model for _, stage in sorted(stages.items())]
    config, precision = models[0].config, models[0].precision
    optimizer = build_optimizer(models, optim, mesh)
    if optim.qk_clip is not None:
        watch_logits(models)
    reduction = EarlyReduction(optimizer.buckets, [name for model in models for name, _ in model.named_parameters()])
    let_weights_arrive_later(models, optimizer.buckets)
    ema = None if optim.ema_decay is None else Ema(optimizer.masters(), optim.ema_decay)
    pipeline = Pipeline(stages, mesh=mesh, hidden_size=config.hidden_size, dtype=precision.dtype)
    return Engine(mesh=mesh, stages=stages, pipeline=pipeline, optimizer=optimizer, reduction=reduction, ema=ema)


def build(config: PretrainConfig, mesh: Mesh, resources: Resources) -> Components:
    """Everything that a run needs on this rank.

    Args:
        config: checked.
        mesh: of its layout.
        resources: of `open_resources`.
    """
    run, (stream, heldout) = config.run, resources.stores
    set_determinism(seed=run.seed, deterministic=run.deterministic, threads=run.threads)
    products = use_kernels(
        config.kernels.backend,
        config.model,
        config.precision,
        tokens=run.micro_batch_sequences * config.data.sequence_length,
        device=mesh.device,
        held=held_by(config.model, stage_specs(config.model, mesh).values()),
        ep=mesh.ep.size,
        trains=True,
    )
    engine = build_engine(
        config.model,
        config.precision,
        config.optim,
        mesh,
        seed=run.seed,
        recompute=run.recompute,
        source=resources.source,
    )
    return Components(
        engine=engine,
        stream=stream,
        heldout=heldout,
        checkpoint_group=cpu_group(timeout_s=SAVE_TIMEOUT_S),
        products=tuple(products),
        began_from=lineage(resources.source.path, resources.source.state) if resources.source else None,
    )


def build_alone(config: PretrainConfig) -> Components:
    """`build` in one process, device and resources opened here.

    Raises:
        ValueError: a store or the device does not fit the configuration; says what to do.
    """
    device = device_of(config)
    return build(config, single(device), open_resources(config))


def device_name(device: torch.device) -> str:
    """CUDA's name of a GPU, or 'cpu'."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def at_first(config: PretrainConfig) -> dict[str, object] | None:
    """The schedule of the first steps, where the batch ramp gives fewer micro-batches than the layout's takes.

    Returns:
        "schedule", its name; "until_step", the first step under the layout's own; "micro_batches", what that one takes.
    """
    layout, schedule = config.layout, config.schedule
    fewest = layout.facts.fewest(layout.pp)
    enough = fewest * layout.dp * config.run.micro_batch_sequences
    if not layout.facts.when_few or schedule.batch_start_sequences >= enough:
        return None
    until = first_step_of(schedule, sequence_length=config.data.sequence_length, batch_sequences=enough)
    return {"schedule": layout.facts.when_few, "until_step": until, "micro_batches": fewest} if until else None


def run_card(config: PretrainConfig, components: Components) -> dict[str, object]:
    """A run's sizes, precision, layout, device, versions and seed, for its directory and its dashboard."""
    mesh = components.engine.mesh
    return {
        "name": config.run.name,
        "precision": config.precision.name,
        "power_of_two_scales": config.precision.power_of_two_scales,
        "parameters": parameter_counts(config.model),
        # Rows of the tables `fp8/*`; those of `moe/*` are the ones with experts.
        "layer_ids": [*config.model.layer_ids, *config.model.mtp_layer_ids],
        "first_k_dense_replace": config.model.first_k_dense_replace,
        "layout": {"pp": mesh.pp.size, "dp": mesh.dp.size, "ep": mesh.ep.size, "schedule": mesh.layout.schedule},
        **({"at_first": first} if (first := at_first(config)) else {}),
        "tokens_total": config.schedule.total_tokens,
        "sequence_length": config.data.sequence_length,
        "seed": config.run.seed,
        "device": device_name(mesh.device),
        "threads": torch.get_num_threads(),
        "deterministic": config.run.deterministic,
        "kernels": config.kernels.backend,
        # Measured by the rank that writes this card, for itself.
        **({"products": shown(components.products)} if components.products else {}),
        "attention": backend_name(
            heads=config.model.num_attention_heads,
            qk_dim=config.model.qk_head_dim,
            v_dim=config.model.v_head_dim,
            dtype=Precision.of(config.precision).dtype,
            device=mesh.device,
            documents=config.data.mask_documents,
        ),
        "torch": torch.__version__,
        "store": store_hashes(components.stream.store),
    }
