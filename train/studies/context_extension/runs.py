"""A small V3 trained at 128 tokens, extended to 512 and to 2,048 as V3 was, with YaRN and without (§4.3).

    128 plain              trained from scratch at up to 128 tokens, plain RoPE
    128 YaRN               the same weights with YaRN switched on
    512 plain, 2048 plain  trained on from there, plain RoPE
    512 YaRN, 2048 YaRN    trained on from there with YaRN, of a factor that is a quarter more than needed, as V3's

As in V3 every phase sees as many tokens a step, each begins with the weights of the last one and with a new optimizer,
at one low rate, router biases at rest. Steps are the trainer's own. A finished phase is stored with what was measured
of it and read again; a killed one begins again.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from kernels.config import YarnScaling
from parallel.mesh import single
from train.assemble import assemble
from train.data.batch import IGNORE_INDEX, Batch
from train.data.store import strict_json
from train.data.whole_file import write_whole
from train.model.config import ModelConfig
from train.model.init import initialize
from train.model.precision import Precision
from train.model.transformer import Transformer
from train.optim.config import OptimConfig
from train.schedules import ScheduledValues
from train.stage import build_stages
from train.step import apply_update, compute_gradients
from train.studies.context_extension import needles
from train.studies.context_extension.needles import Source
from train.studies.recorded import claim_folder

LENGTHS = (128, 512, 2048)
# Of a step of the first training, drawn: in short documents a needle is found sooner. Of needles of an easier form 400
# steps at 128 alone found none.
FIRST_LENGTHS = (16, 32, 64, 128, 128, 128)
YARN = YarnScaling(20.0, 128, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0)
MODEL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 2,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": LENGTHS[-1],
    "initializer_range": 0.05,
    "embedding_initializer_range": 0.3,
}


@dataclass(frozen=True)
class StudySize:
    """How much is trained and measured."""

    base_steps: int = 400
    extend_steps: int = 100
    tokens_per_step: int = 4096
    base_lr: float = 4e-3
    extend_lr: float = 3e-4
    seeds: tuple[int, ...] = (0, 1, 2)
    depths: tuple[float, ...] = (0.2, 0.5, 0.8)
    documents: int = 12  # for each length and depth, and for the loss


SMOKE = StudySize(base_steps=3, extend_steps=1, tokens_per_step=2048, seeds=(0,), depths=(0.5, 1.0), documents=2)


@dataclass(frozen=True)
class Trained:
    """One model of a seed: what it was trained on last, from which other; without steps the other's weights."""

    name: str
    length: int
    yarn: bool
    after: str | None = None
    trains: bool = True


PHASES = (
    Trained("128 plain", 128, yarn=False),
    Trained("128 YaRN", 128, yarn=True, after="128 plain", trains=False),
    Trained("512 plain", 512, yarn=False, after="128 plain"),
    Trained("512 YaRN", 512, yarn=True, after="128 plain"),
    Trained("2048 plain", 2048, yarn=False, after="512 plain"),
    Trained("2048 YaRN", 2048, yarn=True, after="512 YaRN"),
)


def study(source: Source, folder: Path, size: StudySize, *, log: Callable[[str], None] = print) -> dict[str, Any]:
    """Train and measure every phase of every seed, or read what is stored.

    Returns:
        size; phases: name -> for each seed what `measure` returns, and seconds.
    Raises:
        ValueError: the folder holds a study of another size or model.
    """
    claim_folder(folder, {"size": asdict(size), "model": MODEL, "yarn": asdict(YARN)})
    found: dict[str, list[dict[str, Any]]] = {phase.name: [] for phase in PHASES}
    for seed in size.seeds:
        for phase in PHASES:
            found[phase.name].append(_stored(source, folder, size, phase, seed))
            log(f"seed {seed}, {phase.name}: {_words(found[phase.name][-1])}")
    return {"size": asdict(size), "phases": found, "torch": torch.__version__}


def _words(measured: dict[str, Any]) -> str:
    means = {length: sum(of_depth.values()) / len(of_depth) for length, of_depth in measured["needles"].items()}
    return ", ".join(f"{mean:.0%} of needles in {length}" for length, mean in means.items())


def _stored(source: Source, folder: Path, size: StudySize, phase: Trained, seed: int) -> dict[str, Any]:
    """A phase's measurements; trains it unless they are stored."""
    path = _path(folder, phase.name, seed)
    if path.with_suffix(".json").exists():
        return dict(json.loads(path.with_suffix(".json").read_text(encoding="utf-8")))
    begun = time.process_time()
    weights = None if phase.after is None else load_file(_path(folder, phase.after, seed))
    model = _train(source, size, phase, seed, weights)
    measured = measure(model, source, size, seed=seed) | {"core_s": time.process_time() - begun}
    save_file(model.state_dict(), path)
    # The weights first: a phase is finished when its measurements are there, whole.
    write_whole(path.with_suffix(".json"), strict_json(measured))
    return dict(json.loads(strict_json(measured)))


def _path(folder: Path, name: str, seed: int) -> Path:
    return folder / f"{name.replace(' ', '_')}-{seed}.safetensors"


def _train(
    source: Source, size: StudySize, phase: Trained, seed: int, weights: dict[str, Tensor] | None
) -> Transformer:
    """The model of a phase: its steps are the trainer's, on documents that no other phase or seed sees."""
    mesh = single("cpu")
    config = ModelConfig(vocab_size=source.symbols.vocab_size, **MODEL, rope_scaling=YARN if phase.yarn else None)
    stages = build_stages(config, Precision("fp32"), mesh)
    model = stages[0].model
    initialize(model, seed=seed, std=MODEL["initializer_range"], embedding_std=MODEL["embedding_initializer_range"])
    if weights is not None:
        model.load_state_dict(weights)
    if not phase.trains:
        return model
    engine = assemble(stages, OptimConfig(), mesh)
    chance, steps = random.Random(f"{phase.name} {seed}"), size.extend_steps if phase.after else size.base_steps
    for step in range(steps):
        length = phase.length if phase.after else chance.choice(FIRST_LENGTHS)
        sequences = size.tokens_per_step // length
        tokens = needles.training_documents(source, sequences, length, chance)
        labels = needles.known_labels(source, tokens[:, 1:])
        now = ScheduledValues(
            lr=size.extend_lr if phase.after else size.base_lr * _shape(step, steps),
            batch_sequences=sequences,
            bias_speed=0.0 if phase.after else 1e-3,
            mtp_weight=0.0,
            balance_alpha=1e-4,
        )
        batch = Batch(tokens[:, :-1].contiguous(), labels)
        apply_update(engine, compute_gradients(engine, batch, num_micro_batches=1, now=now), now=now, update=step + 1)
    return model


def _shape(step: int, steps: int) -> float:
    """Of pre-training's rate: warm-up, constant, and down to a tenth over the last third."""
    return min((step + 1) / 50, 1.0) * min(1.0, max(0.1, 3 * (steps - step) / steps))


@torch.no_grad()
def measure(model: Transformer, source: Source, size: StudySize, *, seed: int) -> dict[str, Any]:
    """Of documents that training never sees.

    Returns:
        needles: length -> depth -> share answered right; loss: last position of a range -> nats a character of text
        in it, of documents of the greatest length; borders double from 32.
    """
    chance = random.Random(f"measure {seed}")
    right = {
        length: {depth: _needles(model, source, size, length, depth, chance) for depth in size.depths}
        for length in LENGTHS
    }
    total, count = torch.zeros(LENGTHS[-1]), torch.zeros(LENGTHS[-1])
    for _ in range(size.documents):
        tokens = needles.training_documents(source, 1, LENGTHS[-1], chance)
        labels = needles.text_labels(source, tokens[:, 1:])
        logits = model.logits(model.next_token_hidden(tokens[:, :-1]))[0]
        total += F.cross_entropy(logits, labels[0], ignore_index=IGNORE_INDEX, reduction="none")
        count += labels[0] != IGNORE_INDEX
    borders = [0, *(2**power for power in range(5, LENGTHS[-1].bit_length()))]
    ranges = [slice(*pair) for pair in pairwise(borders)]
    return {"needles": right, "loss": {part.stop: float(total[part].sum() / count[part].sum()) for part in ranges}}


def _needles(
    model: Transformer, source: Source, size: StudySize, length: int, depth: float, chance: random.Random
) -> float:
    """The share of needles of one length and depth that are answered right."""
    cases = [needles.haystack(source, length, depth, chance) for _ in range(size.documents)]
    tokens, answers = torch.tensor([each[0] for each in cases]), torch.tensor([each[1] for each in cases])
    hidden = [model.next_token_hidden(part)[:, -1] for part in tokens.split(max(1, size.tokens_per_step // length))]
    return needles.share_right(model.logits(torch.cat(hidden)), answers)
