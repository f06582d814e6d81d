"""The assembly room: from a validated configuration to the parts of a run on this rank.

This is the only place where model, optimizer, data and parallel wrappers meet. Everything a user can get wrong about
stores, vocabulary or device is refused here, before the model is allocated.

    layout -> stages of this rank -> a Transformer with those layers and a dispatcher for its experts
           -> gradient buckets: dense parameters over the data axis, experts over the expert-data axis, copies of the
              embedding over both ends of the pipeline
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from parallel.expert import ExpertParallelDispatcher
from parallel.layout import num_stages, schedule_facts, stage_ids
from parallel.mesh import Mesh, cpu_group, single
from parallel.pipeline import Pipeline, balanced_split, balanced_v
from parallel.shards import LocalShard, Shard
from parallel.zero import GradientBuckets
from train.checkpoint.publish import published
from train.config import PretrainConfig
from train.data.store import TokenStore, check_same_tokenizer
from train.data.stream import TokenStream
from train.model.config import ModelConfig
from train.model.init import initialize
from train.model.moe import Experts, TokenDispatcher
from train.model.precision import Precision
from train.model.sizes import layer_costs, parameter_counts
from train.model.transformer import Part, Transformer, recompute_up_projections
from train.optim.adamw import AdamW
from train.optim.config import OptimConfig
from train.optim.ema import Ema
from train.stage import Stage
from train.step import Engine

if TYPE_CHECKING:
    from train.huggingface.weights import WeightSource

# Ranks that have written wait for the slowest one of a save.
SAVE_TIMEOUT_S = 3600
# The training stream and the held-out store.
Stores = tuple[TokenStream, TokenStore | None]


@dataclass(frozen=True)
class Parts:
    """What a trainer works with.

    heldout is None when the configuration names none; checkpoint_group carries the planning of saves, apart from the
    step's collectives, and is None with one rank.
    """

    engine: Engine
    stream: TokenStream
    heldout: TokenStore | None
    checkpoint_group: ProcessGroup | None


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


def set_determinism(*, seed: int, deterministic: bool, threads: int | None) -> None:
    """Bit-equal repeats need one seed, deterministic algorithms and a fixed thread count; all are on the run card."""
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(deterministic)
    # Filling every torch.empty with NaN is for tests; here it would cost a pass over each activation.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if threads is not None:
        torch.set_num_threads(threads)


def open_stores(config: PretrainConfig) -> Stores:
    """The training stream and the held-out store, checked against the model and each other.

    Raises:
        ValueError: missing, damaged, too short, or made with another tokeniser or too large a vocabulary.
    """
    store = TokenStore.open(Path(config.data.store))
    store.check(vocab_size=config.model.vocab_size)
    stream = TokenStream(store, config.data, config.run.seed)
    if config.data.heldout is None:
        return stream, None
    heldout = TokenStore.open(Path(config.data.heldout))
    heldout.check(vocab_size=config.model.vocab_size)
    check_same_tokenizer(store, heldout)
    return stream, heldout


def balanced_layers(config: ModelConfig, schedule: str, pp: int) -> tuple[int, ...]:
    """Layers of each stage, so that the pipeline rank with the most work has as little as possible."""
    costs = layer_costs(config)
    if pp > 1 and schedule_facts(schedule).placement == "v":
        return balanced_v(costs, pp)
    return balanced_split(costs, num_stages(schedule, pp))


def parts_of_stages(config: ModelConfig, mesh: Mesh) -> dict[int, Part]:
    """Stage index -> what it holds, for the stages of this rank."""
    layout = mesh.layout
    count = num_stages(layout.schedule, mesh.pp.size)
    layers = layout.stage_layers or balanced_layers(config, layout.schedule, mesh.pp.size)
    assert len(layers) == count, (layers, count)
    starts = [sum(layers[:index]) for index in range(count + 1)]
    return {
        i: Part(range(starts[i], starts[i + 1]), begins=i == 0, ends=i == count - 1)
        for i in stage_ids(layout.schedule, mesh.pp.size, mesh.pp.rank)
    }


def build_stages(
    config: ModelConfig, precision: Precision, mesh: Mesh, dispatcher: TokenDispatcher | None = None
) -> dict[int, Stage]:
    """The stages of this rank on its device, without values.

    Args:
        config: of the whole model.
        precision: of the run.
        mesh: of the run.
        dispatcher: brings tokens to experts; None for the one of the mesh.
    """
    if dispatcher is None and mesh.ep.size > 1:
        dispatcher = ExpertParallelDispatcher(
            config.n_routed_experts, mesh.ep, wire=precision.name, power_of_two=precision.power_of_two_scales
        )
    stages: dict[int, Stage] = {}
    for index, part in parts_of_stages(config, mesh).items():
        with mesh.device:
            model = Transformer(config, precision, dispatcher, part)
        stages[index] = Stage(model)
    models = [stage.model for stage in stages.values()]
    if len(models) > 1 and models[0].part.begins and models[-1].mtp:
        # V placement: the rank that begins also ends, and MTP reads the one embedding there is.
        models[-1].embed_tokens = models[0].embed_tokens
    return stages


def build_optimizer(models: list[Transformer], config: OptimConfig, mesh: Mesh) -> AdamW:
    """Buckets by the axis they are reduced over, and AdamW on this rank's share of them."""
    dense: dict[str, nn.Parameter] = {}
    experts: dict[str, nn.Parameter] = {}
    tied: dict[str, nn.Parameter] = {}
    flat_shards: dict[str, Shard] = {}
    for model in models:
        shards = expert_shards(model)
        for name, parameter in model.named_parameters():
            if name in shards:
                experts[name] = parameter
                flat_shards[name] = shards[name].shard.flatten()
            elif name.startswith("embed_tokens") and mesh.tied.size > 1:
                tied[name] = parameter
            else:
                dense[name] = parameter
    sharded = mesh.layout.zero
    buckets = [
        GradientBuckets(dense.items(), axis=mesh.dp, sharded=sharded),
        GradientBuckets(experts.items(), axis=mesh.edp, sharded=sharded),
        GradientBuckets(
            tied.items(), axis=mesh.dp, sharded=sharded, tied=mesh.tied, counts_in_norm=mesh.tied.rank == 0
        ),
    ]
    return AdamW(buckets, config, flat_shards)


def expert_shards(model: Transformer) -> dict[str, LocalShard]:
    """Parameter name -> this rank's experts as a shard of all experts of the layer."""
    shards: dict[str, LocalShard] = {}
    for module_name, module in model.named_modules():
        if isinstance(module, Experts):
            for leaf, parameter in module.named_parameters():
                shape = (model.config.n_routed_experts, *parameter.shape[1:])
                offset = (module.first_expert, *(0 for _ in shape[1:]))
                shards[f"{module_name}.{leaf}"] = LocalShard.at(parameter.detach(), shape, offset)
    return shards


# What may differ between a model and the one whose weights it begins with.
_FREE_TO_DIFFER = (
    "initializer_range",
    "embedding_initializer_range",
    "max_position_embeddings",
    "num_nextn_predict_layers",
)


def first_weights(config: PretrainConfig) -> WeightSource | None:
    """Where a new run's weights come from, if `run.init_from` says so; None for a run that has checkpoints to resume.

    Raises:
        ValueError: nothing to read there, or the weights of another model; names the first field that differs.
    """
    run = config.run
    if run.init_from is None or published(Path(run.directory) / run.name / "checkpoints"):
        return None
    # Here, so that a machine without `tokenizers` can train: a folder of weights may bring a tokeniser.
    from train.huggingface.weights import open_weights

    source = open_weights(Path(run.init_from))
    wanted, found = asdict(config.model), asdict(source.config)
    for name, value in wanted.items():
        if found[name] != value and name not in _FREE_TO_DIFFER:
            raise ValueError(
                f"run.init_from={run.init_from} holds a model with {name}={found[name]}, but model.{name}={value}: "
                "give the run the model's own values"
            )
    return source


@torch.no_grad()
def fill(model: Transformer, source: WeightSource) -> None:
    """Copy this part's weights out of a source, of experts only those that live here.

    MTP layers that the source does not hold keep their values.

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
        # In place, so that the weight's version rises and its FP8 copy is made anew.
        target.copy_(source.read(name, range(first, first + len(target))))


def build_engine(
    config: ModelConfig,
    precision: Precision,
    optim: OptimConfig,
    mesh: Mesh,
    *,
    seed: int,
    recompute: bool = False,
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
        if recompute:
            recompute_up_projections(stage.model)
    return assemble(stages, optim, mesh)


def assemble(stages: dict[int, Stage], optim: OptimConfig, mesh: Mesh) -> Engine:
    """Pipeline and optimizer round the stages of this rank; masters take the values that the weights have now."""
    models = [stage.model for _, stage in sorted(stages.items())]
    config, precision = models[0].config, models[0].precision
    pipeline = Pipeline(stages, mesh=mesh, hidden_size=config.hidden_size, dtype=precision.dtype)
    optimizer = build_optimizer(models, optim, mesh)
    ema = None if optim.ema_decay is None else Ema(optimizer.masters(), optim.ema_decay)
    return Engine(mesh=mesh, stages=stages, pipeline=pipeline, optimizer=optimizer, ema=ema)


def build(
    config: PretrainConfig,
    mesh: Mesh | None = None,
    *,
    stores: Stores | None = None,
    source: WeightSource | None = None,
) -> Parts:
    """Everything a run needs on this rank.

    Args:
        config: checked.
        mesh: of its layout; None for one process.
        stores: what `open_stores` gave; None opens stores and source here.
        source: with `stores`, what `first_weights` gave.
    Raises:
        ValueError: a store or the device does not fit the configuration; says what to do.
    """
    mesh = mesh or single(choose_device(config.run.device))
    if stores is None:
        stores, source = open_stores(config), first_weights(config)
    (stream, heldout), run = stores, config.run
    set_determinism(seed=run.seed, deterministic=run.deterministic, threads=run.threads)
    engine = build_engine(
        config.model, config.precision, config.optim, mesh, seed=run.seed, recompute=run.recompute, source=source
    )
    return Parts(engine=engine, stream=stream, heldout=heldout, checkpoint_group=cpu_group(timeout_s=SAVE_TIMEOUT_S))


def checkpoint_tensors(engine: Engine) -> dict[str, Tensor | LocalShard]:
    """This rank's part of a run's tensors, by name: live ones, so that loading a checkpoint fills them in place."""
    model: dict[str, Tensor | LocalShard] = {}
    for part in engine.models:
        model |= {f"model.{name}": tensor for name, tensor in (part.state_dict() | expert_shards(part)).items()}
    optimizer = {f"optim.{name}": shard for name, shard in engine.optimizer.state_shards().items()}
    average = engine.ema.state_shards() if engine.ema else {}
    return model | optimizer | average


def store_hashes(store: TokenStore) -> dict[str, str]:
    """SHA-256 of the tokeniser and of each file of the store: what a run has read."""
    manifest = store.manifest
    files = {name: record.sha256 for name, record in sorted(manifest.files.items())}
    return {"tokenizer": manifest.tokenizer_sha256, **files}


def device_name(device: torch.device) -> str:
    """CUDA's name of a GPU, or 'cpu'."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def run_card(config: PretrainConfig, parts: Parts) -> dict[str, object]:
    """What this run is, for its directory and its dashboard: sizes, precision, layout, device, versions, seed."""
    mesh = parts.engine.mesh
    return {
        "name": config.run.name,
        "precision": config.precision.name,
        "power_of_two_scales": config.precision.power_of_two_scales,
        "parameters": parameter_counts(config.model),
        # Rows of the tables `fp8/*`; those of `moe/*` are the ones with experts.
        "layer_ids": [*config.model.layer_ids, *config.model.mtp_layer_ids],
        "first_k_dense_replace": config.model.first_k_dense_replace,
        "layout": {"pp": mesh.pp.size, "dp": mesh.dp.size, "ep": mesh.ep.size, "schedule": mesh.layout.schedule},
        "tokens_total": config.schedule.total_tokens,
        "sequence_length": config.data.sequence_length,
        "seed": config.run.seed,
        "device": device_name(mesh.device),
        "threads": torch.get_num_threads(),
        "deterministic": config.run.deterministic,
        "torch": torch.__version__,
        "store": store_hashes(parts.stream.store),
    }
