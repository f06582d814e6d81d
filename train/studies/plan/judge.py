"""How far the planner is from what others have published, nothing fitted: residuals, each with its sign.

    products_of_profile, pair_of_profile    phases of DeepSeek's profile, and its pair of four layers
    step_of_deepseek                        the published step (arXiv:2505.09343 table 4), by class of time
    peer_residual                           throughputs of other trainers

DeepSeek is modelled in two ways: BENCH takes speeds of kernels measured alone, PROFILE takes memory-bound work and
attention from its own profile. `scale_to_profile` then makes every chunk as slow as the profile's pair, and the row
"imbalance DeepSeek" is the one input that was chosen, not found. How DeepSeek split 61 layers into stages is not
published; the bubble depends on it.

What is not modelled and makes peers slower or faster than here: tensor parallelism (its ranks count as data ranks), the
host, congestion, and what each `Peer` names. No speed was fitted to a peer, but their recipes (recomputation, stages,
MTP) were looked up after a first comparison without them, at +20.7, +22.1 and +22.9 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

from train.model.config import ModelConfig
from train.studies.plan.candidate import Candidate
from train.studies.plan.costs import StageCosts, layer_parts, layer_phases, p2p_s
from train.studies.plan.lanes import overlapped
from train.studies.plan.orders import Step, orders, stages_of_rank
from train.studies.plan.products import Implementation, Setup, machine
from train.studies.plan.timeline import link, seconds_by_class, simulate
from train.studies.plan.update import update_s

# With DeepGEMM as it was first released, which is nearest to what DeepSeek ran.
BENCH = Implementation("kernels measured alone", "deepgemm 2025-02", memory="fused", router="bf16", head="apart")
PROFILE = replace(BENCH, name="DeepSeek's profile", memory="profile", attention="profile")
SEQUENCE_LENGTH, DEEPSEEK_SEQUENCES, DEEPSEEK_GPUS = 4096, 15360, 2048
Precision = Literal["bf16", "fp8"]
# Layers of the profile's pair.
PAIR_LAYERS = 4


class Residual(NamedTuple):
    """A published figure beside the modelled one."""

    what: str
    unit: str
    published: float
    modelled: float

    @property
    def error(self) -> float:
        """Modelled over published, less one: below 0 the planner is optimistic about a time."""
        return self.modelled / self.published - 1


def even_layers(layers: int, *, ends: float) -> tuple[int, ...]:
    """Layers of DualPipe's 16 stages, twice, so that ranks differ least; the last stage does `ends` layers besides."""
    counts, stages = [0] * 16, range(16)
    extra = [0.0] * 15 + [ends]

    def load(stage: int) -> tuple[float, float, int]:
        # Rank r has stage r and the copy of the mirrored one.
        own = counts[stage] + extra[stage]
        return own + counts[15 - stage] + extra[15 - stage], own, stage

    for _ in range(layers):
        counts[min(stages, key=load)] += 1
    return tuple(counts) * 2


# The fastest of the splits that were tried, and what spreads work evenly where MTP and the heads count as 4.15 layers.
FASTEST, EVEN = ((4,) * 15 + (1,)) * 2, even_layers(61, ends=4.15)


def deepseek(model: ModelConfig, implementation: Implementation, stage_layers: Sequence[int]) -> Setup:
    """DeepSeek-V3's own run: PP16, EP64, DualPipe, FP8, on H800."""
    candidate = Candidate(16, 128, 64, "DualPipe", 2, tuple(stage_layers), dispatch="deepep", overlap=True)
    return Setup(model, candidate, implementation, machine("H800"), SEQUENCE_LENGTH)


def products_of_profile(setup: Setup) -> list[Residual]:
    """Milliseconds of the products of each phase of a MoE layer, with the profile's multiprocessors."""
    share, tables = setup.sms_share(beside_exchange=True), setup.machine.tables
    found = []
    for name, part in layer_parts(setup, moe=True, beside_exchange=True).items():
        published = tables.rows[f"profile {name} products"].value
        # On two streams; their sum overstates.
        published = sum(published) if isinstance(published, tuple) else published
        found.append(Residual(name, "ms", published, part.products / share * 1e3))
    return found


def pair_of_profile(setup: Setup) -> Residual:
    """Four MoE layers forward beside four backward."""
    layer = layer_phases(setup, moe=True, beside_exchange=True)
    seconds = overlapped(layer.forward() * PAIR_LAYERS, layer.backward() * PAIR_LAYERS).seconds
    return Residual(
        "pair of four layers", "ms", setup.machine.tables.value("profile pair of four layers"), seconds * 1e3
    )


def scale_to_profile(setup: Setup) -> float:
    """What the planner's chunks are multiplied with to take the profile's time."""
    pair = pair_of_profile(replace(setup, implementation=replace(setup.implementation, imbalance=1.0)))
    return pair.published / pair.modelled


def seconds_of_step(setup: Setup, *, micro_batches: int, scale: float = 1.0, forwards: int = 1) -> dict[str, float]:
    """Means over pipeline ranks by class of time, the update, and the whole "step".

    With two `forwards` each backward runs all of forward once more.
    """
    candidate, costs = setup.candidate, StageCosts(setup)

    def time(rank: int, step: Step) -> float:
        again = [action._replace(kind="F") for action in step if action.kind == "B"] * (forwards - 1)
        return scale * (costs.time(step) + sum(costs.time((action,)) for action in again))

    def update(rank: int) -> float:
        stages = stages_of_rank(candidate.schedule, candidate.pp, candidate.chunks, rank)
        return sum(update_s(setup, costs.held(stages)).values())

    steps = orders(candidate.schedule, candidate.pp, candidate.chunks, micro_batches)
    ran = simulate(link(steps, costs.stages), time=time, p2p_s=p2p_s(setup))
    longest = max(map(update, range(candidate.pp)))
    return {**seconds_by_class(ran), "update": longest, "step": ran.step_s + longest}


def step_of_deepseek(setup: Setup, *, scale: float = 1.0) -> list[Residual]:
    """The published step's classes and their sum."""
    micro_batches = DEEPSEEK_SEQUENCES // setup.candidate.dp
    found = seconds_of_step(setup, micro_batches=micro_batches, scale=scale)
    tables = setup.machine.tables
    published = {name: tables.value("step" if name == "step" else f"step {name}") for name in found}
    return [Residual(name, "s", published[name], seconds) for name, seconds in found.items()]


class Peer(NamedTuple):
    """Another trainer's published run of DeepSeek-V3 on H100, EP64 under Interleaved1F1B, with DeepEP.

    mtp: of the published FLOPs a token those with MTP are 0.261 T, without 0.250. whole_layers_again: backward runs the
    whole forward of a layer once more. unmodelled: what the planner leaves out.
    """

    row: str
    precision: Precision
    pp: int
    dp: int
    virtual: int
    sequences: int
    mtp: bool
    whole_layers_again: bool
    unmodelled: str


# Of two ranks of TP2 each counts as a data rank. Flags: Megatron-Bridge's perf_recipes/deepseek/h100 (up-projections of
# latents again, one layer on the first of 32 stages, none on the last); Automodel's examples/benchmark/configs.
PEERS = (
    Peer("peer Megatron-Bridge BF16", "bf16", 8, 128, 4, 16384, True, False, "TP2"),
    Peer("peer Megatron-Bridge FP8", "fp8", 8, 128, 4, 8192, True, False, "TP2; whether the exchange was overlapped"),
    Peer(
        "peer Automodel BF16",
        "bf16",
        4,
        64,
        8,
        512,
        False,
        True,
        "FSDP; its layers of each stage, taken as the others'",
    ),
)
PEER = Implementation("fused kernels", "deepgemm", memory="fused", router="bf16", head="apart")
PEER_LAYERS = (1, *(2,) * 30, 0)


def peer_residual(model: ModelConfig, peer: Peer) -> Residual:
    """Tokens a second and GPU."""
    candidate = Candidate(
        peer.pp, peer.dp, 64, "Interleaved1F1B", peer.virtual, PEER_LAYERS, precision=peer.precision, dispatch="deepep",
        recompute=not peer.whole_layers_again,
    )  # fmt: skip
    model = model if peer.mtp else replace(model, num_nextn_predict_layers=0)
    setup = Setup(model, candidate, PEER, machine("H100"), SEQUENCE_LENGTH)
    times = 2 if peer.whole_layers_again else 1
    step = seconds_of_step(setup, micro_batches=peer.sequences // peer.dp, forwards=times)["step"]
    modelled = peer.sequences * SEQUENCE_LENGTH / step / candidate.world
    return Residual(peer.row, "tokens/s a GPU", setup.machine.tables.value(peer.row), modelled)


def residuals(v3: ModelConfig) -> dict[str, list[Residual]]:
    """Every comparison that has a published figure, by what the model was given."""
    bench, profile = deepseek(v3, BENCH, FASTEST), deepseek(v3, PROFILE, FASTEST)
    scale, imbalance = scale_to_profile(profile), profile.machine.tables.value("imbalance DeepSeek")
    skewed = replace(profile, implementation=replace(PROFILE, imbalance=imbalance))
    even = deepseek(v3, PROFILE, EVEN)
    return {
        "DeepSeek's profile, products of a MoE layer (experts weights: two streams, their sum)": products_of_profile(
            bench
        ),
        "its pair of four layers, from kernels measured alone": [pair_of_profile(bench)],
        "and with the profile's memory-bound work and attention": [pair_of_profile(profile)],
        "DeepSeek's step, from kernels measured alone": step_of_deepseek(bench),
        "at the profile's pace": step_of_deepseek(profile, scale=scale),
        "at the profile's pace, layers split evenly": step_of_deepseek(even, scale=scale_to_profile(even)),
        f"at the profile's pace, with one chosen input, imbalance {imbalance}": step_of_deepseek(skewed, scale=scale),
        "trainers on H100 that no speed was fitted to": [peer_residual(v3, peer) for peer in PEERS],
    }
